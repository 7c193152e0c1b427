"""Stored instance → frames: bounded, one frame at a time, one pinned decoder per transfer syntax.

Runs in the worker process only (the demonstration's own pictures apart): native decoders are the node's largest attack
surface, so a crash or an allocation past the limit costs that child alone. Reads files, writes none, logs nothing.
Every failure is a `PixelsUndecodableError`, whose text names the transfer syntax and never a value of the data set.

    framing   what lies where, and what it will cost         codecs   bytes → samples
    direct    the same for plain grey files, unparsed
    color     samples → grey or RGB                          decode   the order of things, and the way it fails
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from dicom_node.errors import NodeError, StoreError
from dicom_node.pixels import codecs
from dicom_node.pixels.color import YBR, Palette, YbrToRgb, off_grey, split_422, upright
from dicom_node.pixels.direct import locate
from dicom_node.pixels.framing import (
    NATIVE,
    PARSE_ERRORS,
    ImagePixel,
    Limits,
    Stored,
    UndecodableError,
    open_stored,
    transfer_syntax,
)
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header, Instance

COLOR_SPACE_CORRECTED = "COLOR_SPACE_CORRECTED"
"""Photometric Interpretation says RGB and the pixels are YCbCr, or the reverse; the pixels were believed."""
FRAME_COUNT_CORRECTED = "FRAME_COUNT_CORRECTED"
"""Number of Frames is not what the pixel data holds; the pixel data was believed."""

_DECODE_ERRORS = (*PARSE_ERRORS, RuntimeError, SyntaxError)  # Pillow raises SyntaxError on a broken marker


class PixelsUndecodableError(NodeError):
    """The pixel data cannot be decoded."""

    def __init__(self, syntax: str, why: str) -> None:
        self.syntax, self.why = syntax, why
        super().__init__(f"{syntax}: {why}")

    def refusal(self) -> Refusal:
        """REFUSED(PIXELS_UNDECODABLE(<syntax>: <why>))."""
        return Refusal(RefusalCode.PIXELS_UNDECODABLE, str(self))


class PixelDecoder:
    """`engine.PixelReader` over stored files."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._notes: dict[str, set[str]] = {}

    def frames(self, instance: Instance, numbers: Sequence[int] | None = None) -> Iterator[NDArray[Any]]:
        """Decoded frames (H, W) or (H, W, 3) RGB in the order asked for; `numbers` count from 1; None = all."""
        notes = self._notes.setdefault(instance.instance_id, set())
        known = (instance.header, instance.transfer_syntax_uid)
        return decode_file(instance.path, numbers, limits=self._limits, notes=notes, known=known)

    def notes(self, instance: Instance) -> tuple[str, ...]:
        """What had to be put right in this instance so far (COLOR_SPACE_CORRECTED, FRAME_COUNT_CORRECTED)."""
        return tuple(sorted(self._notes.get(instance.instance_id, ())))


def decode_file(
    path: Path,
    numbers: Sequence[int] | None = None,
    *,
    limits: Limits | None = None,
    notes: set[str] | None = None,
    known: tuple[Header, str] | None = None,
) -> Iterator[NDArray[Any]]:
    """Decode a Part 10 file, lazily. Grey up to 8 bits, RGB and palettes come as uint8, single bits (SEG) as 0 and 1;
    deeper grey keeps its depth and sign. `known`: the file's header and transfer syntax, which save parsing it again.

    Raises PixelsUndecodableError, at the first frame at the earliest; StoreError where the file system is to blame.
    """
    name = "unknown transfer syntax"
    limits, notes = limits or Limits(), notes if notes is not None else set()
    try:
        if known is not None and known[1] in NATIVE:
            name = _name(known[1])
            with path.open("rb") as file:
                located = locate(file, *known, limits)
                if located is not None:
                    yield from _frames(file, located, numbers, notes)
                    return
        syntax = transfer_syntax(path)
        name = _name(syntax)
        if syntax not in NATIVE and syntax not in codecs.CODECS:
            raise UndecodableError("no decoder for this transfer syntax")
        with path.open("rb") as file:
            yield from _frames(file, open_stored(file, syntax, limits), numbers, notes)
    except UndecodableError as e:
        raise PixelsUndecodableError(name, str(e)) from None
    except ImportError:
        raise PixelsUndecodableError(name, "the decoder of this transfer syntax is not installed") from None
    except _DECODE_ERRORS as e:
        if isinstance(e, OSError) and e.errno is not None:  # a missing file or a bad disk is a fault, not an answer
            raise StoreError(f"a stored instance cannot be read ({type(e).__name__})") from None
        # The library's own words may repeat values of the data set: only the kind of failure is told.
        raise PixelsUndecodableError(name, f"the file or its pixel data is broken ({type(e).__name__})") from None


def available_decoders() -> dict[str, str]:
    """Name of each compressed transfer syntax → the plugin and version that decodes it; absent = not decodable here."""
    return {_name(syntax): plugin for syntax, plugin in codecs.installed().items()}


def _name(syntax: str) -> str:
    uid = UID(syntax)
    if not uid.is_valid:  # whatever stands there instead is not repeated
        return "no valid transfer syntax"
    return f"private transfer syntax {uid}" if uid.name == uid else f"{uid.name} {uid}"


def _frames(file: BinaryIO, stored: Stored, numbers: Sequence[int] | None, notes: set[str]) -> Iterator[NDArray[Any]]:
    count = len(stored.frames.pieces)
    if count != stored.frames.claimed:
        notes.add(FRAME_COUNT_CORRECTED)
    if numbers is not None and any(not 1 <= n <= count for n in numbers):
        raise UndecodableError(f"a frame was asked for that is not among the {count} of the pixel data")
    show = _Display(stored, notes)
    for number in range(1, count + 1) if numbers is None else numbers:
        yield show(stored.frames.read(file, number - 1))


class _Display:
    """One instance's way from encoded bytes to a frame; what is constant over a clip is made once."""

    def __init__(self, stored: Stored, notes: set[str]) -> None:
        self._stored, self._image, self._notes = stored, stored.image, notes
        self._codec = None if stored.syntax in NATIVE else codecs.CODECS[stored.syntax].decode
        self._ybr_to_rgb = YbrToRgb()  # its tables are made when the first YCbCr frame comes
        self._palette = Palette(stored) if stored.image.photometric == "PALETTE COLOR" else None
        self._judged = stored.image.samples == 1

    def __call__(self, data: bytes) -> NDArray[Any]:
        frame = self._show(data, self._image)
        if not self._judged:
            self._judged = True
            return self._in_right_space(data, frame)
        return frame

    def _show(self, data: bytes, image: ImagePixel) -> NDArray[Any]:
        samples, photometric = self._codec(data, image) if self._codec else self._native(data, image)
        if samples.ndim == 3:
            return self._color(samples, photometric)
        frame = self._depth(samples)
        if self._palette is not None:
            return self._palette(frame)
        return upright(frame, image) if photometric == "MONOCHROME1" else frame

    def _native(self, data: bytes, image: ImagePixel) -> codecs.Decoded:
        if image.photometric == "YBR_FULL_422":
            return codecs.Decoded(self._ybr_to_rgb(*split_422(data, image)), "RGB")
        order = "<" if self._stored.little_endian else ">"
        samples = np.frombuffer(data, dtype=f"{order}u{max(image.bits_allocated, 8) // 8}")
        if image.samples == 1:
            return codecs.Decoded(samples.reshape(image.rows, image.columns), image.photometric)
        if image.planar == 1:
            planes = samples.reshape(image.samples, image.rows, image.columns)
            return codecs.Decoded(planes.transpose(1, 2, 0), image.photometric)
        return codecs.Decoded(samples.reshape(image.rows, image.columns, image.samples), image.photometric)

    def _depth(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Grey of Bits Stored: native byte order, the unused high bits (old overlays) cut off, the sign extended."""
        image = self._image
        kind = "i" if image.signed else "u"
        size = samples.dtype.itemsize
        samples = samples.astype(f"{samples.dtype.kind}{size}", copy=False)
        unused = 8 * size - image.bits_stored
        if samples.dtype.kind == "u" and unused > 0:
            samples = samples << unused
            samples = samples.view(f"{kind}{size}") >> unused
        else:
            samples = samples.view(f"{kind}{size}")
        if not image.signed and image.bits_stored <= 8:
            return samples.astype(np.uint8, copy=False)
        return samples.astype(f"{kind}{image.bits_allocated // 8}", copy=False)

    def _color(self, samples: NDArray[Any], photometric: str) -> NDArray[Any]:
        if photometric == "RGB":
            return samples.astype(samples.dtype.newbyteorder("="), copy=False)
        if photometric not in YBR:
            raise UndecodableError("this photometric interpretation is not decoded")
        if samples.dtype != np.uint8:
            raise UndecodableError("YCbCr deeper than 8 bits is not decoded")
        return self._ybr_to_rgb(samples[..., 0], samples[..., 1], samples[..., 2])

    def _in_right_space(self, data: bytes, frame: NDArray[Any]) -> NDArray[Any]:
        """Is the first frame far from grey as tagged, but near grey in the other colour space? Then that one is right.

        Ultrasound and captures are mostly black and grey. Black YCbCr taken for RGB is teal, black RGB taken for YCbCr
        is green: one look at the median tells. A codestream that states its colour space gives the same both ways.
        """
        other = {"RGB": "YBR_FULL", "YBR_FULL": "RGB"}.get(self._image.photometric, "")
        if self._codec and self._image.photometric == "YBR_FULL_422":
            other = "RGB"
        if not other or frame.dtype != np.uint8 or off_grey(frame) < 60:
            return frame
        image = replace(self._image, photometric=other)
        corrected = self._show(data, image)
        if off_grey(corrected) > 20:
            return frame
        self._image = image
        self._notes.add(COLOR_SPACE_CORRECTED)
        return corrected

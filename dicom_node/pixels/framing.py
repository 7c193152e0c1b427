"""Where the frames of a stored instance lie in its file: reads the Image Pixel module and the item headers, no pixels.

First step of `decode.py`. Everything a frame will cost is known and bounded here, from attributes *and* from the bytes
that are really there, before anything is allocated. Never reads a whole file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)

PARSE_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, OverflowError, EOFError, OSError,
    RecursionError, struct.error, InvalidDicomError, BytesLengthException,
)  # fmt: skip
"""What pydicom raises on a file that is not what it says (UnicodeError is a ValueError)."""

_TAGS = [
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated",
    "BitsStored", "PixelRepresentation", "NumberOfFrames", "PixelPresentation",
    *(f"{name}PaletteColorLookupTable{part}" for name in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
    *(f"Segmented{name}PaletteColorLookupTableData" for name in ("Red", "Green", "Blue")),
]  # fmt: skip
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
_ITEM, _SEQUENCE_DELIMITER = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_TOO_LONG = "an attribute is longer than the memory"
_MAX_FRAGMENTS = 1_000_000
_STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0c\x6a\x50")
"""Start of image of the JPEG family (SOI), of a JPEG 2000 codestream (SOC, SIZ), and of a JP2 file around one."""


class UndecodableError(ValueError):
    """The pixels cannot be had; the message is one of ours, free of PHI. Becomes `PixelsUndecodableError`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may cost, decoded."""

    frame_bytes: int = 128 << 20
    frames: int = 100_000


@dataclass(frozen=True, slots=True)
class ImagePixel:
    """The Image Pixel module (PS3.3 C.7.6.3) as far as decoding needs it; consistent once constructed."""

    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    signed: bool

    def __post_init__(self) -> None:
        if not (0 < self.rows <= 65535 and 0 < self.columns <= 65535):
            raise UndecodableError("Rows or Columns is absent or zero")
        if self.bits_allocated not in (1, 8, 16, 32) or not 0 < self.bits_stored <= self.bits_allocated:
            raise UndecodableError("Bits Allocated and Bits Stored are not a depth this node decodes")
        if self.bits_allocated == 1 and self.photometric != "MONOCHROME2":
            raise UndecodableError("single-bit pixels are decoded as MONOCHROME2 only (PS3.3 A.51)")
        expected = 1 if self.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR") else 3
        if self.samples != expected:
            raise UndecodableError("Samples per Pixel does not fit Photometric Interpretation")

    @property
    def frame_bytes(self) -> int:
        """Of one native frame. YBR_FULL_422 has two chroma samples for two pixels (PS3.3 C.7.6.3.1.2)."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.bits_allocated // 8


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one file: for each the (offset, length) of its pieces."""

    pieces: tuple[tuple[tuple[int, int], ...], ...]
    claimed: int
    """Number of Frames (0028,0008); where it differs, the pixel data is believed."""
    words_from: int | None = None
    """8-bit samples in OW of a big endian file: from here on the bytes of each pair are swapped (PS3.5 8.1.2)."""
    packed: int | None = None
    """Pixels of one frame where eight share a byte: frames follow without padding, so one may start inside a byte."""

    def read(self, file: BinaryIO, index: int) -> bytes:
        """The bytes of one frame, its fragments joined, its bits unpacked to bytes."""
        pieces = self.pieces[index]
        if self.words_from is not None:
            data = self._words(file, *pieces[0])
        elif len(pieces) == 1:
            data = self._piece(file, *pieces[0])
        else:
            data = b"".join(self._piece(file, *p) for p in pieces)
        return data if self.packed is None else self._bits(data, index * self.packed % 8, self.packed)

    @staticmethod
    def _bits(data: bytes, first: int, count: int) -> bytes:
        """PS3.5 8.1.1, annex D: the first pixel lies in the least significant bit."""
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return bits[first : first + count].tobytes()

    def _words(self, file: BinaryIO, offset: int, length: int) -> bytes:
        odd = (offset - (self.words_from or 0)) % 2  # a frame of odd length makes the next one start inside a word
        words = bytearray(self._piece(file, offset - odd, length + odd + (length + odd) % 2))
        words[::2], words[1::2] = words[1::2], words[::2]
        return bytes(words[odd : odd + length])

    @staticmethod
    def _piece(file: BinaryIO, offset: int, length: int) -> bytes:
        file.seek(offset)
        data = file.read(length)
        if len(data) != length:
            raise UndecodableError("the pixel data is cut short")
        return data


@dataclass(frozen=True, slots=True)
class Stored:
    """One file, read up to its pixel data."""

    syntax: str
    little_endian: bool
    image: ImagePixel
    frames: Frames
    dataset: Dataset
    """Only the attributes of `_TAGS`: what the palette needs."""


def transfer_syntax(path: Path) -> str:
    """From the meta group alone, so that nothing of a deflated or unknown data set is touched."""
    try:
        return str(read_file_meta_info(path).get("TransferSyntaxUID", ""))
    except MemoryError:  # pydicom asks for as many bytes as the length field says
        raise UndecodableError(_TOO_LONG) from None


def open_stored(file: BinaryIO, syntax: str, limits: Limits) -> Stored:
    """Read the attributes and locate the frames. Raises UndecodableError or one of PARSE_ERRORS."""
    if syntax == DeflatedExplicitVRLittleEndian:
        raise UndecodableError("a deflated data set is not accepted")
    try:
        dataset = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    except MemoryError:
        raise UndecodableError(_TOO_LONG) from None
    claimed = max(_whole(dataset, "NumberOfFrames", 1), 1)
    image = ImagePixel(
        _whole(dataset, "Rows"),
        _whole(dataset, "Columns"),
        _whole(dataset, "SamplesPerPixel", 1),
        str(dataset.get("PhotometricInterpretation") or "").strip(),
        _whole(dataset, "PlanarConfiguration"),
        _whole(dataset, "BitsAllocated"),
        _whole(dataset, "BitsStored", _whole(dataset, "BitsAllocated")),
        _whole(dataset, "PixelRepresentation") == 1,
    )
    if image.rows * image.columns * image.samples * max(image.bits_allocated, 8) // 8 > limits.frame_bytes:
        raise UndecodableError("one frame is larger than this node decodes")
    implicit, little = dataset.original_encoding
    vr, length = _pixel_data(file, bool(implicit), bool(little))
    if (length == _UNDEFINED) == (syntax in NATIVE):
        raise UndecodableError("native pixel data in an encapsulated transfer syntax, or the reverse")
    if length == _UNDEFINED:
        frames = _encapsulated(file, claimed, limits)
    else:
        start = file.tell()
        locate = _native_bits if image.bits_allocated == 1 else _native
        frames = locate(file, length, image, claimed, limits)
        if vr == b"OW" and not little and image.bits_allocated <= 8:
            frames = replace(frames, words_from=start)
    return Stored(syntax, bool(little), image, frames, dataset)


def _whole(dataset: Dataset, keyword: str, default: int = 0) -> int:
    value: Any = dataset.get(keyword)
    return default if value is None or value == "" else int(value)


def _pixel_data(file: BinaryIO, implicit: bool, little: bool) -> tuple[bytes, int]:
    """VR and length of the element the file stands at: dcmread stopped before it."""
    order = "<" if little else ">"
    head = file.read(8)
    if len(head) < 8:
        raise UndecodableError("there is no pixel data")
    if head[:4] != (_PIXEL_DATA if little else b"\x7f\xe0\x00\x10"):
        raise UndecodableError("float pixel data is not decoded")
    if implicit or not head[4:6].isalpha():  # some writers name an explicit syntax and send implicit VR
        return b"OW", int(struct.unpack(order + "L", head[4:])[0])
    if head[4:6] not in (b"OB", b"OW", b"UN"):
        raise UndecodableError("the value representation of the pixel data is not OB or OW")
    return head[4:6], int(struct.unpack(order + "L", file.read(4))[0])


def _native(file: BinaryIO, length: int, image: ImagePixel, claimed: int, limits: Limits) -> Frames:
    start = file.tell()
    length = min(length, file.seek(0, 2) - start)
    size = image.frame_bytes
    present, rest = divmod(length, size)
    # Whole frames (and a pad byte) are believed over Number of Frames; anything else needs the claimed frames at least,
    # because what is left over cannot be told from a torn frame.
    count = present if rest <= 1 else min(claimed, present)
    if not count or (rest > 1 and present < claimed):
        raise UndecodableError("the pixel data is shorter than its attributes say")
    if count > limits.frames:
        raise UndecodableError("more frames than this node decodes")
    return Frames(tuple(((start + i * size, size),) for i in range(count)), claimed)


def _native_bits(file: BinaryIO, length: int, image: ImagePixel, claimed: int, limits: Limits) -> Frames:
    """Frames of packed bits (PS3.5 8.1.1). Number of Frames is believed: where frames have a few pixels only, padding
    to an even length can hold a whole one."""
    start = file.tell()
    length = min(length, file.seek(0, 2) - start)
    size = image.rows * image.columns
    if length < (claimed * size + 7) // 8:
        raise UndecodableError("the pixel data is shorter than its attributes say")
    if claimed > limits.frames:
        raise UndecodableError("more frames than this node decodes")
    edges = ((i * size // 8, ((i + 1) * size + 7) // 8) for i in range(claimed))
    return Frames(tuple(((start + a, b - a),) for a, b in edges), claimed, packed=size)


def _encapsulated(file: BinaryIO, claimed: int, limits: Limits) -> Frames:
    """PS3.5 A.4. The offset tables are read past: walking the item headers gives the same and cannot point outside."""
    table, fragments = _fragments(file)
    if not fragments:
        raise UndecodableError("the encapsulated pixel data holds no fragment")
    frames = _group(file, table, fragments, claimed)
    if len(frames) > limits.frames:
        raise UndecodableError("more frames than this node decodes")
    if max(sum(length for _, length in pieces) for pieces in frames) > 2 * limits.frame_bytes:
        raise UndecodableError("one encoded frame is larger than this node decodes")
    return Frames(frames, claimed)


def _fragments(file: BinaryIO) -> tuple[bytes, list[tuple[int, int]]]:
    """The Basic Offset Table's bytes, and (offset, length) of each fragment's value."""
    end = file.seek(0, 1), file.seek(0, 2)
    file.seek(end[0])
    table: bytes | None = None
    fragments: list[tuple[int, int]] = []
    while len(head := file.read(8)) == 8:
        group, element, length = struct.unpack("<HHL", head)
        tag = group << 16 | element
        if tag == _SEQUENCE_DELIMITER:
            break
        at = file.tell()
        if tag != _ITEM or length == _UNDEFINED or at + length > end[1]:
            raise UndecodableError("the fragments of the pixel data are broken")
        if table is None:
            table = file.read(min(length, 8 * _MAX_FRAGMENTS))
        else:
            fragments.append((at, length))
        if len(fragments) > _MAX_FRAGMENTS:
            raise UndecodableError("more fragments than this node decodes")
        file.seek(at + length)
    return table or b"", [f for f in fragments if f[1]]


def _group(
    file: BinaryIO, table: bytes, fragments: list[tuple[int, int]], claimed: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Fragments to frames: one each, else by the Basic Offset Table, else by where a codestream starts."""
    if len(fragments) == claimed:
        return tuple((f,) for f in fragments)
    starts = _table_starts(table, fragments)
    if not starts:
        starts = [i for i, (at, _) in enumerate(fragments) if Frames._piece(file, at, 2) in (s[:2] for s in _STARTS)
                  and _peek(file, at).startswith(_STARTS)]  # fmt: skip
    if claimed == 1 and not starts:
        return (tuple(fragments),)
    if not starts or starts[0] != 0:
        raise UndecodableError("the fragments cannot be told apart into frames")
    return tuple(tuple(fragments[a:b]) for a, b in zip(starts, [*starts[1:], len(fragments)], strict=True))


def _peek(file: BinaryIO, at: int) -> bytes:
    file.seek(at)
    return file.read(8)


def _table_starts(table: bytes, fragments: list[tuple[int, int]]) -> list[int]:
    """Indices of first fragments by the table; [] unless every offset meets an item (PS3.5 A.4, 32-bit offsets)."""
    offsets = [offset for (offset,) in struct.iter_unpack("<L", table[: len(table) // 4 * 4])]
    first = fragments[0][0] - 8
    at = {offset - 8 - first: index for index, (offset, _) in enumerate(fragments)}
    if not offsets or offsets != sorted(set(offsets)) or any(o not in at for o in offsets):
        return []
    return [at[o] for o in offsets]

"""Where the frames of a plain grey image lie, without a second parse: the header is known, the pixels end the file.

A dynamic MR study is hundreds of small files, and walking the attributes of each again costs more than its pixels.
Only for native 16-bit MONOCHROME2, and only where the very bytes before the last rows x columns x frames samples are
the head of a Pixel Data element of that length. Anything else is left to `framing.open_stored`.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicom_node.pixels.framing import NATIVE, Frames, ImagePixel, Limits, Stored
from dicom_node.study import Header

_BITS = 16


def locate(file: BinaryIO, header: Header, syntax: str, limits: Limits) -> Stored | None:
    """The frames of the file, or None where it has to be parsed."""
    if syntax not in NATIVE or header.text("PhotometricInterpretation") != "MONOCHROME2":
        return None
    rows, columns, samples, allocated, stored, claimed = (
        int(header.number(k) or 0)
        for k in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "NumberOfFrames")
    )
    claimed = max(claimed, 1)
    size = rows * columns * _BITS // 8
    plausible = allocated == _BITS and 0 < stored <= _BITS and samples == 1 and 0 < rows <= 65535 >= columns > 0
    if not plausible or size > limits.frame_bytes or claimed > limits.frames:
        return None
    length = size * claimed
    start = file.seek(0, 2) - length
    little = syntax != ExplicitVRBigEndian
    heads = _heads(length, syntax)
    if not heads or start < len(heads[0]):
        return None
    file.seek(start - len(heads[0]))
    if file.read(len(heads[0])) not in heads:
        return None
    signed = header.number("PixelRepresentation") == 1
    image = ImagePixel(rows, columns, 1, "MONOCHROME2", 0, _BITS, stored, signed)
    pieces = tuple(((start + i * size, size),) for i in range(claimed))
    return Stored(syntax, little, image, Frames(pieces, claimed), Dataset())


def _heads(length: int, syntax: str) -> tuple[bytes, ...]:
    """What a Pixel Data element of this length begins with (PS3.5 7.1.2, 7.1.3)."""
    if length >= 0xFFFFFFFF:
        return ()
    if syntax == ImplicitVRLittleEndian:
        return (struct.pack("<HHL", 0x7FE0, 0x0010, length),)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    return (struct.pack(f"{order}HH2s2xL", 0x7FE0, 0x0010, b"OW", length),)

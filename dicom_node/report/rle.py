"""RLE Lossless of one frame (PS3.5 annex G): each colour plane one segment, its rows packed each by itself.

The packing is that of TIFF's PackBits, byte for byte the same code; libtiff, which Pillow carries, does it three times
as fast as pylibjpeg's encoder and in fewer bytes. The rows of the three planes go through it as one grey image whose
strips are the segments. A Pillow that was built without libtiff leaves the work to pylibjpeg.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, features
from pydicom.pixels.encoders.base import RLELosslessEncoder

_SEGMENTS: Final = 15
_HEADER: Final = struct.Struct(f"<{1 + _SEGMENTS}L")


def encode(frame: NDArray[np.uint8]) -> bytes:
    """RGB (rows, columns, 3). The same pixels give the same bytes on one machine."""
    if not features.check("libtiff"):
        return _by_pylibjpeg(frame)
    rows, columns, samples = frame.shape
    planes = np.ascontiguousarray(frame.transpose(2, 0, 1)).reshape(samples * rows, columns)
    segments = [s + b"\0" * (len(s) % 2) for s in _strips(planes, rows)]
    offsets = np.cumsum([_HEADER.size, *map(len, segments)])[:-1]
    unused = (0,) * (_SEGMENTS - len(segments))
    return _HEADER.pack(len(segments), *offsets.tolist(), *unused) + b"".join(segments)


def _strips(image: NDArray[np.uint8], rows: int) -> list[bytes]:
    """An image as PackBits, so many of its rows in each strip; libtiff packs no run across the end of a row."""
    out = BytesIO()
    tags = {TiffImagePlugin.ROWSPERSTRIP: rows}
    Image.fromarray(image).save(out, "TIFF", compression="packbits", tiffinfo=tags)
    data = out.getbuffer()
    with Image.open(out, formats=["TIFF"]) as written:
        found: TiffImagePlugin.ImageFileDirectory_v2 = written.tag_v2  # type: ignore[attr-defined]
        at, size = found[TiffImagePlugin.STRIPOFFSETS], found[TiffImagePlugin.STRIPBYTECOUNTS]
    return [bytes(data[a : a + n]) for a, n in zip(at, size, strict=True)]


def _by_pylibjpeg(frame: NDArray[np.uint8]) -> bytes:
    return RLELosslessEncoder.encode(
        frame,
        rows=frame.shape[0],
        columns=frame.shape[1],
        samples_per_pixel=3,
        bits_allocated=8,
        bits_stored=8,
        pixel_representation=0,
        photometric_interpretation="RGB",
        number_of_frames=1,
        planar_configuration=0,
        encoding_plugin="pylibjpeg",
    )

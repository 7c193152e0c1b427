"""From what is stored to what is seen: YCbCr, palette and inverted grey to RGB or MONOCHROME2. Pure numpy.

Called by `decode.py` on each decoded frame.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from dicom_node.pixels.framing import ImagePixel, Stored, UndecodableError

YBR = ("YBR_FULL", "YBR_FULL_422")


class YbrToRgb:
    """The inverse of YBR_FULL (PS3.3 C.7.6.3.1.2), rounded half up: Y is whole, so only chroma needs a table."""

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
        """What Cr adds to R, what Cb and Cr (as one 16-bit number) add to G, what Cb adds to B."""
        chroma = np.arange(256) - 128.0
        from_cb, from_cr = -0.114 * 1.772 / 0.587 * chroma, -0.299 * 1.402 / 0.587 * chroma
        exact = 1.402 * chroma, (from_cb[:, None] + from_cr[None, :]).ravel(), 1.772 * chroma
        red, green, blue = (np.floor(table + 0.5).astype(np.int16) for table in exact)
        return red, green, blue

    def __call__(self, y: NDArray[np.uint8], cb: NDArray[np.uint8], cr: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) planes to (H, W, 3). Chroma may be (H, W/2): then each value serves two pixels of a row."""
        out = np.empty((3, *y.shape), dtype=np.uint8)
        red, green, blue = self._tables
        steps = (red.take(cr), green.take(cb.astype(np.uint16) << 8 | cr), blue.take(cb))
        pixels = y.shape[1] // cb.shape[1]  # that share a chroma value
        for k in range(pixels):
            wide = y[:, k::pixels].astype(np.int16)
            for plane, step in zip(out, steps, strict=True):
                np.clip(wide + step, 0, 255, out=plane[:, k::pixels], casting="unsafe")
        return out.transpose(1, 2, 0)


def split_422(data: bytes, image: ImagePixel) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Native YBR_FULL_422: Y Y Cb Cr for two pixels of a row (PS3.3 C.7.6.3.1.2)."""
    if image.columns % 2 or image.bits_allocated != 8:
        raise UndecodableError("YBR_FULL_422 needs an even number of Columns and 8 bits")
    pairs = np.frombuffer(data, dtype=np.uint8).reshape(image.rows, image.columns // 2, 4)
    return pairs[..., :2].reshape(image.rows, image.columns), pairs[..., 2], pairs[..., 3]


class Palette:
    """PALETTE COLOR by a table over every possible value, 8 bits per colour."""

    def __init__(self, stored: Stored) -> None:
        image, dataset = stored.image, stored.dataset
        if image.bits_allocated > 16 or image.signed:
            raise UndecodableError("a palette needs unsigned values of at most 16 bits")
        if not stored.little_endian:
            _turn_entries(dataset)
        values = np.arange(1 << image.bits_allocated, dtype=f"u{image.bits_allocated // 8}")
        table = apply_color_lut(values, dataset)[..., :3]  # pydicom: descriptors, segmented tables, first value mapped
        if table.dtype != np.uint8:
            # 16-bit entries hold the colour in the high byte (C.7.6.3.1.6); some writers leave it in the low one.
            table = table >> 8 if table.max() > 255 else table
        self._planes = np.ascontiguousarray(table.astype(np.uint8).T)

    def __call__(self, frame: NDArray[Any]) -> NDArray[np.uint8]:
        return np.stack([plane.take(frame) for plane in self._planes]).transpose(1, 2, 0)


def _turn_entries(dataset: Dataset) -> None:
    """pydicom reads 16-bit entries as little endian, whatever the file; it turns segmented tables by itself."""
    for colour in ("Red", "Green", "Blue"):
        keyword = f"{colour}PaletteColorLookupTableData"
        entries = dataset.get(f"{colour}PaletteColorLookupTableDescriptor", [0])[0] or 65536
        if keyword in dataset and len(dataset[keyword].value) >= 2 * entries:
            swapped = np.frombuffer(dataset[keyword].value[: 2 * entries], dtype=">u2").astype("<u2")
            dataset[keyword].value = swapped.tobytes()


def upright(frame: NDArray[Any], image: ImagePixel) -> NDArray[Any]:
    """MONOCHROME1 (low = white) to MONOCHROME2."""
    if image.signed:
        return np.bitwise_not(frame)
    return frame.dtype.type((1 << image.bits_stored) - 1) - frame


def off_grey(frame: NDArray[np.uint8]) -> float:
    """Median distance from grey over the picture. Mistaken colour space turns black into teal or green: far from 0."""
    sample = frame[::4, ::4].astype(np.int16)
    return float(np.median(sample.max(axis=2) - sample.min(axis=2)))

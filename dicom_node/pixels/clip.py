"""The frames of a clip as a sequence that stays within a bound of memory: kept where they fit, else decoded again.

300 frames of 1024 x 768 RGB are 700 MB decoded. Whoever looks at a clip several times (layout, curve, chosen frames)
sees one sequence and need not know which it is. Reads through the PixelReader it is given, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from numpy.typing import NDArray

from dicom_node.pixels.roi_model import FrameReader
from dicom_node.study import Instance

KEPT_BYTES = 96 << 20
"""Decoded frames of one clip that are kept: 100 of 640 x 480 RGB."""

Frame = NDArray[Any]


def clip_frames(
    pixels: FrameReader, instance: Instance, numbers: tuple[int, ...], kept_bytes: int = KEPT_BYTES
) -> Sequence[Frame]:
    """The frames of these numbers (from 1), in this order. Raises what the reader raises, now or when asked again.

    All of them in a list while they fit `kept_bytes`; else a sequence that decodes on every access, so walk through
    it once, or ask for a slice.
    """
    kept: list[Frame] = []
    size = 0
    for frame in pixels.frames(instance, numbers):
        kept.append(frame)
        size += frame.nbytes
        if size > kept_bytes:
            return _Streamed(pixels, instance, numbers)
    return kept


class _Streamed(Sequence[Frame]):
    """Decoded when asked for, never kept."""

    def __init__(self, pixels: FrameReader, instance: Instance, numbers: tuple[int, ...]) -> None:
        self._pixels, self._instance, self._numbers = pixels, instance, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._pixels.frames(self._instance, self._numbers))

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Frame]: ...
    def __getitem__(self, index: int | slice) -> Frame | Sequence[Frame]:
        if isinstance(index, slice):
            return _Streamed(self._pixels, self._instance, self._numbers[index])
        return next(iter(self._pixels.frames(self._instance, (self._numbers[index],))))

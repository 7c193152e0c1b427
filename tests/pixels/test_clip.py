"""A long clip is one sequence to whoever looks at it, and never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.clip import clip_frames
from dicom_node.pixels.ultrasound import CeusPanels, ceus_panels
from dicom_node.study import Header, Instance

CLIP = Instance("1" * 32, Header({"Rows": 64, "Columns": 96}), "", "", Path("none"), "", "", "", "", 0.0)


class Counting:
    """A reader that makes its frames up and counts them."""

    def __init__(self) -> None:
        self.decoded = 0

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[NDArray[Any]]:
        for number in numbers or ():
            self.decoded += 1
            frame = np.zeros((64, 96, 3), np.uint8)
            level = 10 if number < 10 else 180
            frame[4:60, 8:88] = np.array([level, level * 3 // 4, level // 4])
            frame[4:60, 8:88] -= np.uint8(number % 2)
            frame[8:30, 10:40] //= 2
            yield frame


def test_a_short_clip_is_decoded_once_and_a_long_one_is_not_kept() -> None:
    numbers = tuple(range(1, 31))
    short, long = Counting(), Counting()
    kept = clip_frames(short, CLIP, numbers)
    list(kept), kept[3], list(kept[::2])
    assert short.decoded == 30
    streamed = clip_frames(long, CLIP, numbers, kept_bytes=5 * 64 * 96 * 3)
    assert long.decoded == 6 and not isinstance(streamed, list)
    assert len(streamed) == 30 and len(streamed[::7]) == 5
    for a, b in zip(kept, streamed, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(streamed[-1], kept[-1]) and np.array_equal(streamed[4:9][2], kept[6])


def test_the_panel_and_its_curve_are_the_same_from_a_clip_that_is_not_kept() -> None:
    numbers = tuple(range(1, 41))
    region = {
        "RegionLocationMinX0": 8, "RegionLocationMinY0": 4, "RegionLocationMaxX1": 87, "RegionLocationMaxY1": 59,
        "RegionSpatialFormat": 1, "RegionDataType": 1,
    }  # fmt: skip
    header = Header({"Rows": 64, "Columns": 96, "SequenceOfUltrasoundRegions": (Header(region),)})
    reader = Counting()
    found = ceus_panels(header, clip_frames(reader, CLIP, numbers, kept_bytes=1))
    expected = ceus_panels(header, clip_frames(Counting(), CLIP, numbers))
    assert isinstance(found, CeusPanels) and found == expected
    assert np.array_equal(found.curve, expected.curve) and found.curve[20] > 10 * found.curve[0]
    assert reader.decoded < 2.5 * len(numbers), "one walk for the curve, not one for each question"

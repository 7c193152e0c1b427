"""What the node reads out of ultrasound headers and frames: regions, times, colour, contrast panels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dicom_node.pixels.ultrasound import (
    CeusPanels,
    Region,
    ceus_panels,
    fan_region,
    frame_times,
    is_color_doppler,
    regions,
    time_intensity,
    tissue_regions,
)
from dicom_node.result import Refusal, RefusalCode
from dicom_node.store.header import read_header
from dicom_node.study import Header


def header(**values: object) -> Header:
    return Header.from_json({"Rows": 300, "Columns": 480} | values)


def region(x0: int, y0: int, x1: int, y1: int, **values: object) -> dict[str, object]:
    return {
        "RegionLocationMinX0": x0, "RegionLocationMinY0": y0, "RegionLocationMaxX1": x1, "RegionLocationMaxY1": y1,
        "RegionSpatialFormat": 1, "RegionDataType": 1, "RegionFlags": 2,
        "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": 0.02, "PhysicalDeltaY": 0.03,
    } | values  # fmt: skip


# --- regions ---------------------------------------------------------------------------------------------------------


def test_bounds_are_inclusive_and_spacing_is_in_millimetres_row_first() -> None:
    (only,) = regions(header(SequenceOfUltrasoundRegions=[region(10, 20, 109, 69)]))
    assert only.bounds == (10, 20, 109, 69)
    assert only.crop(np.zeros((300, 480))).shape == (50, 100)
    assert only.spacing_mm == pytest.approx((0.3, 0.2))
    assert only.flags == 2


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [((0.4, 0.3), (0.4, 0.3)), ((40.0, 30.0), None), (("x", "y"), None), ((0.4,), None), ((), None)],
)
def test_pixel_spacing_serves_a_region_without_units_and_no_other(
    spacing: tuple[object, ...], expected: tuple[float, float] | None
) -> None:
    bare = region(10, 20, 109, 69, PhysicalUnitsXDirection=0, PhysicalUnitsYDirection=0)
    (only,) = tissue_regions(header(SequenceOfUltrasoundRegions=[bare], PixelSpacing=spacing))
    assert only.spacing_mm == expected
    (scaled,) = tissue_regions(header(SequenceOfUltrasoundRegions=[region(10, 20, 109, 69)], PixelSpacing=spacing))
    assert scaled.spacing_mm == pytest.approx((0.3, 0.2)), "the region's own units are nearer to the pixels"


def test_a_doppler_strip_with_negative_delta_y_is_read_and_is_not_tissue() -> None:
    strip = region(
        0, 200, 400, 290, RegionSpatialFormat=3, RegionDataType=3, PhysicalUnitsXDirection=4,
        PhysicalUnitsYDirection=7, PhysicalDeltaX=0.005, PhysicalDeltaY=-0.7,
    )  # fmt: skip
    head = header(SequenceOfUltrasoundRegions=[strip, region(10, 10, 200, 190, PhysicalDeltaX=-0.02)])
    assert [(r.spatial_format, r.spacing_mm) for r in regions(head)] == [(3, None), (1, pytest.approx((0.3, 0.2)))]
    assert [r.bounds for r in tissue_regions(head)] == [(10, 10, 200, 190)]


@pytest.mark.parametrize(
    ("stated", "believed"),
    [
        ((0, 0, 480, 300), (0, 0, 479, 299)),  # exclusive bounds, one pixel too far
        ((-3, 10, 200, 100), (0, 10, 200, 100)),
        ((200, 10, 100, 100), None),  # reversed
        ((10, 100, 200, 20), None),
        ((0, 0, 0, 0), None),
        ((0, 0, 1023, 767), None),  # the picture was made smaller, the region was not
        ((500, 10, 600, 100), None),
        ((0, 0, 4294967295, 100), None),  # -1 written into an unsigned attribute
    ],
)
def test_regions_that_cannot_be_true_are_left_out(
    stated: tuple[int, int, int, int], believed: tuple[int, int, int, int] | None
) -> None:
    found = regions(header(SequenceOfUltrasoundRegions=[region(*stated)]))
    assert [r.bounds for r in found] == ([] if believed is None else [believed])


def test_no_regions_and_broken_regions_are_no_regions() -> None:
    assert regions(header()) == ()
    assert regions(header(SequenceOfUltrasoundRegions=[{"RegionSpatialFormat": 1}])) == ()
    assert regions(header(SequenceOfUltrasoundRegions=[region(1, 1, 99, 99, RegionLocationMinX0="NaN")])) == ()
    assert regions(Header.from_json({"SequenceOfUltrasoundRegions": [region(1, 1, 99, 99)]})) == ()


def test_tissue_comes_largest_first_and_slivers_do_not_come() -> None:
    head = header(
        SequenceOfUltrasoundRegions=[
            region(0, 0, 99, 99), region(100, 0, 479, 200),
            region(0, 250, 5, 299), region(0, 100, 90, 200, RegionDataType=2),
        ]
    )  # fmt: skip
    assert [r.bounds for r in tissue_regions(head)] == [(100, 0, 479, 200), (0, 0, 99, 99)]


def test_an_absurd_spacing_is_unknown() -> None:
    head = header(SequenceOfUltrasoundRegions=[region(0, 0, 99, 99, PhysicalDeltaX=1.0, PhysicalDeltaY=1.0)])
    assert regions(head)[0].spacing_mm is None


# --- colour ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "doppler"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0001"]}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0011"]}, True),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0101"]}, True),  # colour power
        ({"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0009"]}, False),  # 2D and pulsed wave
        ({"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "VENDOR WORD"]}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY"], "UltrasoundColorDataPresent": 1}, True),
        ({"UltrasoundColorDataPresent": 0}, False),
        ({"SequenceOfUltrasoundRegions": [region(0, 0, 300, 200), region(90, 90, 150, 150, RegionDataType=2)]}, True),
        ({}, False),
    ],
)
def test_color_doppler_is_known_from_any_of_its_signs(values: dict[str, object], doppler: bool) -> None:
    assert is_color_doppler(header(**values)) is doppler


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"FrameIncrementPointer": "00181063", "FrameTime": 40}, [0, 0.04, 0.08, 0.12]),
        ({"FrameIncrementPointer": 0x00181063, "FrameTime": 40, "FrameDelay": 500}, [0.5, 0.54, 0.58, 0.62]),
        ({"FrameIncrementPointer": "00181065", "FrameTimeVector": [0, 30, 90, 30]}, [0, 0.03, 0.12, 0.15]),
        # the first increment of a vector belongs to no frame before it
        ({"FrameIncrementPointer": 0x00181065, "FrameTimeVector": [33, 33, 33, 33]}, [0, 0.033, 0.066, 0.099]),
        # a vector of another length is not used
        ({"FrameIncrementPointer": "00181065", "FrameTimeVector": [0, 30, 30], "CineRate": 20}, [0, 0.05, 0.1, 0.15]),
        # seconds written where milliseconds belong
        ({"FrameIncrementPointer": "00181063", "FrameTime": 0.04, "CineRate": 25}, [0, 0.04, 0.08, 0.12]),
        ({"FrameTime": 0, "RecommendedDisplayFrameRate": 10}, [0, 0.1, 0.2, 0.3]),
        ({"ActualFrameDuration": 200}, [0, 0.2, 0.4, 0.6]),
        ({"FrameTime": 1000}, [0, 1, 2, 3]),
        ({"FrameTime": "not a number", "CineRate": 10}, [0, 0.1, 0.2, 0.3]),
        # in the order of trust
        ({"CineRate": 10, "RecommendedDisplayFrameRate": 20, "ActualFrameDuration": 25}, [0, 0.1, 0.2, 0.3]),
        ({"RecommendedDisplayFrameRate": 20, "ActualFrameDuration": 25}, [0, 0.05, 0.1, 0.15]),
        ({"FrameTime": 5}, [0, 0.005, 0.01, 0.015]),  # 200 a second
        ({"FrameTime": 4.9, "CineRate": 20}, [0, 0.05, 0.1, 0.15]),
        # how a viewer should play it is no time
        ({"FrameTime": 40, "StartTrim": 2, "StopTrim": 3, "PreferredPlaybackSequencing": 1}, [0, 0.04, 0.08, 0.12]),
    ],
)  # fmt: skip
def test_frame_times(values: dict[str, object], expected: list[float]) -> None:
    assert frame_times(header(NumberOfFrames=4, **values)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"FrameTime": 0},
        {"FrameTime": -40},
        {"FrameTime": float("nan")},
        {"FrameTime": 1200},  # slower than 1 a second
        {"FrameTime": 2, "CineRate": 1000},  # faster than 200 a second
        {"FrameTimeVector": [0, 40, -40, 40]},
        {"FrameTimeVector": [0, 40]},
    ],
)
def test_absent_or_implausible_times_are_refused(values: dict[str, object]) -> None:
    refusal = frame_times(header(NumberOfFrames=4, **values))
    assert isinstance(refusal, Refusal)
    assert refusal.code is RefusalCode.FRAME_TIME_INVALID


def test_a_single_frame_needs_no_time_and_an_absurd_number_of_frames_costs_nothing() -> None:
    assert frame_times(header()) == pytest.approx([0.0])
    refusal = frame_times(header(NumberOfFrames=2_000_000_000, FrameTime=40))
    assert isinstance(refusal, Refusal)


# --- contrast panels -------------------------------------------------------------------------------------------------


def ceus_clip(
    *, contrast_left: bool, tinted: bool = False, arrives: bool = True, frames: int = 30, gap: int = 10, seed: int = 0
) -> list[NDArray[np.uint8]]:
    """A dual display at 2 frames a second: two copies of one sector, a banner, and bolus arrival after 4 s."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:220, :220]
    fan = (np.hypot(xx - 110, yy + 30) < 240) & (np.abs(np.arctan2(xx - 110, yy + 30)) < 0.5)
    left, right = 15, 15 + 220 + gap
    clip = []
    for i in range(frames):
        s = max(0.0, i / 2 - 4.0) if arrives else 0.0
        level = 5 + 60 * (s / 4) ** 1.5 * np.exp(1.5 * (1 - s / 4))
        speckle = rng.rayleigh(0.8, (2, 220, 220))
        frame = np.zeros((300, 480, 3), np.uint8)
        frame[5:15, 20:200] = 190
        tissue = np.clip(55 * speckle[0], 0, 255) * fan
        agent = np.clip(level * speckle[1], 0, 255) * fan
        at, other = (left, right) if contrast_left else (right, left)
        frame[60:280, at : at + 220] = agent[..., None] * (np.array([1.0, 0.8, 0.4]) if tinted else np.ones(3))
        frame[60:280, other : other + 220] = tissue[..., None]
        clip.append(frame)
    return clip


DUAL = [region(15, 60, 234, 279), region(245, 60, 464, 279)]


@pytest.mark.parametrize("contrast_left", [True, False], ids=["contrast left", "contrast right"])
@pytest.mark.parametrize("tinted", [True, False], ids=["tinted", "grey"])
@pytest.mark.parametrize(
    "given", [DUAL, DUAL[::-1], [region(15, 60, 464, 279)], []], ids=["regions", "reversed", "one wide", "none"]
)
def test_the_contrast_panel_is_found_on_either_side(
    contrast_left: bool, tinted: bool, given: list[dict[str, object]]
) -> None:
    clip = ceus_clip(contrast_left=contrast_left, tinted=tinted)
    panels = ceus_panels(header(SequenceOfUltrasoundRegions=given), clip[::2])
    assert isinstance(panels, CeusPanels)
    assert panels.tissue is not None
    assert (panels.contrast.x0 < panels.tissue.x0) is contrast_left
    assert panels.contrast.y0 > 20, "the banner must stay outside"
    assert panels.contrast.x1 < panels.tissue.x0 or panels.tissue.x1 < panels.contrast.x0
    assert ("tinted" in panels.evidence) is tinted


def test_a_tint_alone_decides_when_the_clip_starts_late() -> None:
    clip = ceus_clip(contrast_left=False, tinted=True)[20:]
    panels = ceus_panels(header(SequenceOfUltrasoundRegions=DUAL), clip)
    assert isinstance(panels, CeusPanels)
    assert panels.contrast.x0 == 245


@pytest.mark.parametrize(
    "clip",
    [
        ceus_clip(contrast_left=True, arrives=False),  # dark, but nothing arrives
        ceus_clip(contrast_left=True)[22:],  # starts after the peak, grey
        ceus_clip(contrast_left=True)[:2],
        [np.concatenate([f[:, :240], f[:, :240]], axis=1) for f in ceus_clip(contrast_left=True)],  # both rise alike
    ],
    ids=["no arrival", "late", "too few frames", "alike"],
)
def test_panels_that_cannot_be_told_apart_are_refused(clip: list[NDArray[np.uint8]]) -> None:
    refusal = ceus_panels(header(SequenceOfUltrasoundRegions=DUAL), clip)
    assert isinstance(refusal, Refusal)
    assert refusal.code is RefusalCode.CEUS_PANEL_AMBIGUOUS


def test_tint_and_rise_on_different_sides_are_refused() -> None:
    clip = [f.copy() for f in ceus_clip(contrast_left=True)]
    for frame in clip:
        frame[60:280, 245:465, 2] //= 3  # a sepia map on the B-mode panel
    refusal = ceus_panels(header(SequenceOfUltrasoundRegions=DUAL), clip)
    assert isinstance(refusal, Refusal)
    assert "disagree" in refusal.detail


def test_a_single_contrast_image_has_no_tissue_panel_and_plain_b_mode_is_refused() -> None:
    clip = ceus_clip(contrast_left=True)
    alone = ceus_panels(header(SequenceOfUltrasoundRegions=DUAL[:1]), clip)
    assert isinstance(alone, CeusPanels)
    assert alone.tissue is None
    assert isinstance(ceus_panels(header(SequenceOfUltrasoundRegions=DUAL[1:]), clip), Refusal)


# --- fan and curve ---------------------------------------------------------------------------------------------------


def test_the_fan_is_found_by_motion_without_banner_and_clock() -> None:
    rng = np.random.default_rng(1)
    clip = []
    for i in range(10):
        frame = np.zeros((300, 480), np.uint8)
        frame[4:20, 10:470] = 200  # banner
        frame[30:40, 430 + i : 450 + i] = 255  # a clock
        frame[60:260, 100:380] = rng.rayleigh(40, (200, 280)).clip(0, 255)
        clip.append(frame)
    found = fan_region(clip)
    assert found is not None
    assert found.bounds == pytest.approx((100, 60, 379, 259), abs=4)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_still_picture_has_no_fan(count: int) -> None:
    frame = ceus_clip(contrast_left=True)[0]
    assert fan_region([frame] * count) is None


def test_motion_all_over_the_frame_is_not_a_fan() -> None:
    rng = np.random.default_rng(2)
    assert fan_region([rng.integers(0, 255, (200, 200)).astype(np.uint8) for _ in range(6)]) is None


def test_time_intensity_is_the_mean_grey_of_the_region_only() -> None:
    frames = [np.full((40, 60, 3), v, np.uint8) for v in (10, 20, 35)]
    for frame in frames:
        frame[:10] = 255
    assert time_intensity(iter(frames), Region(0, 10, 59, 39)) == pytest.approx([10, 20, 35])


# --- real headers, as the node reads them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bounds", "spacing", "doppler", "seconds"),
    [
        ("acuson_echo_65f_jpegbaseline.dcm", [(27, 48, 548, 391)], 0.525, False, 2.438),  # uneven FrameTimeVector
        ("hp_echo_34f_jpegbaseline.dcm", [(42, 4, 438, 353)], 0.229, True, 0.99),
        ("palette_echo_10f_rle.dcm", [], None, False, 0.684),
        ("gdcm-US-ALOKA-16.dcm", [(32, 24, 335, 415), (336, 24, 639, 415)], 0.383, False, 0.0),
        ("color-px.dcm", [], None, True, 0.0),
        ("OBXXXX1A_2frame.dcm", [(120, 60, 799, 518)], 0.262, True, None),  # two frames and no time at all
    ],
)
def test_real_headers(
    name: str,
    bounds: list[tuple[int, ...]],
    spacing: float | None,
    doppler: bool,
    seconds: float | None,
    shared_data: Path,
) -> None:
    head = read_header(shared_data / "us" / name)
    found = tissue_regions(head)
    assert [r.bounds for r in found] == bounds
    assert (found[0].spacing_mm[0] if found and found[0].spacing_mm else None) == pytest.approx(spacing, abs=1e-3)
    assert is_color_doppler(head) is doppler
    times = frame_times(head)
    if isinstance(times, Refusal):
        assert seconds is None
    else:
        assert times[-1] == pytest.approx(seconds, abs=1e-3)

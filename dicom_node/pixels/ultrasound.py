"""Ultrasound as hospitals send it: regions, frame times, colour, and the panels of a contrast clip.

Works on a Header and on decoded frames; reads no file and decodes nothing. The engines' one door to ultrasound
knowledge: what stands in `grey`, `contrast` and `laterality` is offered here under the same names.
A crop to a region comes before any model and any picture, because the banner around it carries names and dates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node.pixels.clip import clip_frames
from dicom_node.pixels.contrast import MIN_RISE, contrast_arrival
from dicom_node.pixels.grey import has_color, is_plausible_bmode, resize, tint, to_gray
from dicom_node.pixels.laterality import laterality
from dicom_node.pixels.overlay import MASKED, masked, overlay_mask, without_overlay
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header

__all__ = [
    "MASKED",
    "CeusPanels",
    "Region",
    "ceus_panels",
    "clip_frames",
    "contrast_arrival",
    "fan_region",
    "frame_times",
    "has_color",
    "is_color_doppler",
    "is_plausible_bmode",
    "laterality",
    "masked",
    "overlay_mask",
    "regions",
    "resize",
    "time_intensity",
    "tissue_regions",
    "to_gray",
    "without_overlay",
]

_2D, _TISSUE, _COLOR_FLOW = 1, 1, 2  # Region Spatial Format and Region Data Type, PS3.3 C.8.5.5.1.1 and .2
_CM = 3  # Physical Units X/Y Direction, PS3.3 C.8.5.5.1.15
_COLOR_BITS = (
    0x0010 | 0x0020 | 0x0100
)  # Image Type value 4: colour Doppler, colour M-mode, colour power; PS3.3 C.8.5.6.1.1
_OVERHANG = 0.1  # a border further outside than this belongs to another matrix: the image was scaled, the region not
_MIN_SIDE = 16
_CELL = 4  # pixels: motion is looked for on a coarser grid, so that single speckles join


@dataclass(frozen=True)
class Region:
    """A rectangle of the frame with one kind of data (PS3.3 C.8.5.5); bounds inclusive, counted from 0."""

    x0: int
    y0: int
    x1: int
    y1: int
    spatial_format: int = _2D
    data_type: int = _TISSUE
    spacing_mm: tuple[float, float] | None = None
    """(row, column) spacing; None = unknown."""
    flags: int = 0

    @property
    def width(self) -> int:
        return self.x1 - self.x0 + 1

    @property
    def height(self) -> int:
        return self.y1 - self.y0 + 1

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 as `UnitPrediction.region` wants them."""
        return self.x0, self.y0, self.x1, self.y1

    def crop(self, frame: NDArray[Any]) -> NDArray[Any]:
        """The part of the frame inside (a view)."""
        return frame[self.y0 : self.y1 + 1, self.x0 : self.x1 + 1]


# --- regions ---------------------------------------------------------------------------------------------------------


def regions(header: Header) -> tuple[Region, ...]:
    """Sequence of Ultrasound Regions (0018,6011), clipped to the matrix; regions that cannot be true are left out."""
    rows, columns = _whole(header, "Rows"), _whole(header, "Columns")
    if not rows or not columns:
        return ()
    found = (_region(item, rows, columns) for item in header.items_of("SequenceOfUltrasoundRegions"))
    return tuple(r for r in found if r is not None)


def _whole(header: Header, keyword: str) -> int | None:
    value = header.number(keyword)
    return int(value) if value is not None and math.isfinite(value) else None


def _region(item: Header, rows: int, columns: int) -> Region | None:
    x0, y0 = _whole(item, "RegionLocationMinX0"), _whole(item, "RegionLocationMinY0")
    x1, y1 = _whole(item, "RegionLocationMaxX1"), _whole(item, "RegionLocationMaxY1")
    if x0 is None or y0 is None or x1 is None or y1 is None:
        return None
    # The SL/UL confusion of some writers makes -1 of 4294967295; a reversed or far outside border is nobody's region.
    if not (-_OVERHANG * columns <= x0 < min(x1, columns - 1) and -_OVERHANG * rows <= y0 < min(y1, rows - 1)):
        return None
    if x1 > (1 + _OVERHANG) * columns or y1 > (1 + _OVERHANG) * rows:
        return None
    return Region(
        max(x0, 0),
        max(y0, 0),
        min(x1, columns - 1),
        min(y1, rows - 1),
        _whole(item, "RegionSpatialFormat") or 0,
        _whole(item, "RegionDataType") or 0,
        _spacing(item),
        _whole(item, "RegionFlags") or 0,
    )


def _spacing(item: Header) -> tuple[float, float] | None:
    """Millimetres, only where both directions are in cm; Delta Y may be negative (PS3.3 C.8.5.5.1.17)."""
    if _whole(item, "PhysicalUnitsXDirection") != _CM or _whole(item, "PhysicalUnitsYDirection") != _CM:
        return None
    dx, dy = item.number("PhysicalDeltaX"), item.number("PhysicalDeltaY")
    if dx is None or dy is None:
        return None
    spacing = (abs(dy) * 10.0, abs(dx) * 10.0)
    return spacing if all(0.005 <= s <= 5.0 for s in spacing) else None


def _pixel_spacing(header: Header) -> tuple[float, float] | None:
    """Pixel Spacing (0028,0030) of the whole frame, (row, column) mm; captures of ultrasound often lack it."""
    try:
        row, column = (float(v) for v in header.texts("PixelSpacing"))
    except ValueError:
        return None
    return (row, column) if all(0.005 <= v <= 5.0 for v in (row, column)) else None


def tissue_regions(header: Header) -> tuple[Region, ...]:
    """The 2D tissue regions (format 1, data type 1), largest first. Pixel Spacing serves one that has no units."""
    found = [r for r in regions(header) if (r.spatial_format, r.data_type) == (_2D, _TISSUE)]
    found = [r for r in found if min(r.width, r.height) >= _MIN_SIDE]
    whole = _pixel_spacing(header)
    found = [r if r.spacing_mm is not None else replace(r, spacing_mm=whole) for r in found]
    return tuple(sorted(found, key=lambda r: (-r.area, r.x0, r.y0)))


def is_color_doppler(header: Header) -> bool:
    """Do the headers say that colour flow data is in the picture? Pixels are a second witness: `has_color`."""
    mode = (header.texts("ImageType") + ("",) * 4)[3].strip()
    try:
        if int(mode, 16) & _COLOR_BITS:
            return True
    except ValueError:
        pass  # vendors write words here
    if header.number("UltrasoundColorDataPresent") == 1:
        return True
    return any((r.spatial_format, r.data_type) == (_2D, _COLOR_FLOW) for r in regions(header))


def fan_region(frames: Sequence[NDArray[Any]]) -> Region | None:
    """Where the image moves: the box of the largest connected part that changes over time. Fallback without regions.

    The banner stands still (or is small, like a clock). None with fewer than three frames, because in a still nothing
    tells image from text, and None where the box is the whole frame, because then no banner was left out.
    """
    parts = _moving_parts(frames)
    return parts[0] if parts else None


def _moving_parts(frames: Sequence[NDArray[Any]]) -> tuple[Region, ...]:
    """The boxes of all connected parts that change over time and cover 5 % of the frame, largest first."""
    if len(frames) < 3:
        return ()
    activity = _activity([to_gray(f) for f in frames[:: max(1, len(frames) // 24)]])
    height, width = activity.shape
    cells = resize(activity, (max(1, height // _CELL), max(1, width // _CELL)))
    # Closing joins speckle, opening cuts thin bridges (rulers, a clock); the frame is padded so that borders survive.
    mask = ndimage.binary_opening(ndimage.binary_closing(np.pad(cells > 1.5, 3), iterations=2), iterations=2)[
        3:-3, 3:-3
    ]
    sy, sx = height / cells.shape[0], width / cells.shape[1]
    boxes = [
        Region(int(columns.start * sx), int(rows.start * sy), int(columns.stop * sx) - 1, int(rows.stop * sy) - 1)
        for rows, columns in ndimage.find_objects(ndimage.label(mask)[0])
    ]
    boxes = [r for r in boxes if 0.05 * height * width <= r.area < 0.95 * height * width]
    return tuple(sorted(boxes, key=lambda r: (-r.area, r.x0, r.y0)))


def _activity(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Standard deviation over time, by running sums: a stack of float frames would be hundreds of megabytes."""
    total = np.zeros(frames[0].shape, dtype=np.float32)
    squares = np.zeros_like(total)
    for frame in frames:
        value = frame.astype(np.float32)
        total += value
        squares += value * value
    total /= len(frames)
    variance = squares / len(frames) - total * total
    return np.sqrt(np.maximum(variance, 0.0, out=variance), out=variance)


# --- time ------------------------------------------------------------------------------------------------------------


def frame_times(header: Header) -> NDArray[np.float64] | Refusal:
    """Seconds of each frame; the attribute that Frame Increment Pointer (0028,0009) names first, then the fallbacks.

    1 to 200 frames a second are believed. A vector of another length than Number of Frames is not used (PS3.3 C.7.6.5).
    """
    n = max(_whole(header, "NumberOfFrames") or 1, 1)
    if n == 1:
        return np.zeros(1)
    if n > 1_000_000:
        return Refusal(RefusalCode.FRAME_TIME_INVALID, "number of frames is implausible")
    tried = []
    for name, steps in _time_sources(header, n):
        if steps is not None and _believable(steps):
            delay = header.number("FrameDelay") or 0.0
            start = delay / 1000.0 if math.isfinite(delay) and 0 <= delay < 3.6e6 else 0.0
            return np.concatenate([[0.0], np.cumsum(steps)]) / 1000.0 + start
        tried.append(name)
    return Refusal(RefusalCode.FRAME_TIME_INVALID, "implausible " + ", ".join(tried) if tried else "no frame time")


def _time_sources(header: Header, n: int) -> Iterator[tuple[str, NDArray[np.float64] | None]]:
    """(attribute, milliseconds between neighbouring frames or None) in the order of trust."""
    pointer = header.text("FrameIncrementPointer").upper()
    by_vector = any(sign in pointer for sign in ("00181065", "0018,1065", "FRAMETIMEVECTOR", str(0x00181065)))
    order = ("FrameTimeVector", "FrameTime") if by_vector else ("FrameTime", "FrameTimeVector")
    for name in (*order, "CineRate", "RecommendedDisplayFrameRate", "ActualFrameDuration"):
        if name not in header:
            continue
        if name == "FrameTimeVector":
            yield name, _vector(header, n)
            continue
        value = header.number(name)
        if value is None or not math.isfinite(value) or value <= 0:
            yield name, None
            continue
        per_second = name in ("CineRate", "RecommendedDisplayFrameRate")
        yield name, np.full(n - 1, 1000.0 / value if per_second else value)


def _vector(header: Header, n: int) -> NDArray[np.float64] | None:
    try:
        values = np.array([float(v) for v in header.texts("FrameTimeVector")])
    except ValueError:
        return None
    return values[1:] if len(values) == n else None  # the first increment is of no frame before it


def _believable(steps: NDArray[np.float64]) -> bool:
    if not np.isfinite(steps).all() or (steps < 0).any():
        return False
    return 5.0 <= float(np.mean(steps)) <= 1000.0  # 1..200 frames a second on average: gaps inside a clip are real


# --- contrast ultrasound ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CeusPanels:
    """Which part of the display shows the contrast agent."""

    contrast: Region
    tissue: Region | None
    """The low-MI B-mode panel; None = the display has only the contrast image."""
    evidence: str
    curve: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)
    """`time_intensity` of the contrast panel over the frames that were looked at."""


def ceus_panels(header: Header, frames: Sequence[NDArray[np.uint8]]) -> CeusPanels | Refusal:
    """Find the panels and tell them apart by tint and by time-intensity; vendors differ in which side is which.

    `frames`: sampled over the whole clip, in order; walked through once, so they may be decoded as they are asked for.
    Undecidable or contradictory evidence is refused: scoring the B-mode panel as contrast would give a number from the
    wrong picture.
    """
    if len(frames) < 3:
        return Refusal(RefusalCode.CEUS_PANEL_AMBIGUOUS, "fewer than 3 frames")
    pair, layout = _pair(header, frames)
    if not pair:
        return Refusal(RefusalCode.CEUS_PANEL_AMBIGUOUS, "no image region found")
    curves = _curves(frames, pair)
    looks = [_look(region, frames, curve) for region, curve in zip(pair, curves, strict=True)]
    if len(pair) == 1:
        if looks[0].tinted or looks[0].rises:
            return CeusPanels(pair[0], None, f"{layout}; {looks[0]}", curves[0])
        return Refusal(RefusalCode.CEUS_PANEL_AMBIGUOUS, f"{layout}; neither tinted nor rising from dark")
    by_tint = _one_of(looks[0].tinted, looks[1].tinted)
    by_rise = _one_of(looks[0].rises_against(looks[1]), looks[1].rises_against(looks[0]))
    chosen = by_tint if by_tint is not None else by_rise
    if chosen is None:
        return Refusal(RefusalCode.CEUS_PANEL_AMBIGUOUS, f"{layout}; panels alike in tint and in time")
    if by_rise is not None and by_rise != chosen:
        return Refusal(RefusalCode.CEUS_PANEL_AMBIGUOUS, f"{layout}; tint and time-intensity disagree")
    return CeusPanels(pair[chosen], pair[1 - chosen], f"{layout}; {looks[chosen]}", curves[chosen])


def _one_of(first: bool, second: bool) -> int | None:
    return None if first == second else (0 if first else 1)


@dataclass(frozen=True)
class _Look:
    tinted: bool
    baseline: float
    peak: float

    @property
    def rises(self) -> bool:
        """Dark before arrival, then at least half as bright again and clearly more than drift."""
        return self.baseline < 64 and self.peak - self.baseline >= max(2 * MIN_RISE, 0.5 * self.baseline)

    def rises_against(self, other: _Look) -> bool:
        mine, theirs = self.peak - self.baseline, other.peak - other.baseline
        return self.rises and mine >= 2 * abs(theirs) and self.baseline <= other.baseline

    def __str__(self) -> str:
        words = ["tinted"] * self.tinted + ["dark then rising"] * self.rises
        return " and ".join(words)


def _look(region: Region, frames: Sequence[NDArray[np.uint8]], curve: NDArray[np.float64]) -> _Look:
    head = max(1, len(curve) // 10)
    smooth = ndimage.median_filter(curve, size=3, mode="nearest") if len(curve) >= 5 else curve
    brightest = region.crop(frames[int(np.argmax(curve))])
    return _Look(tint(brightest) > 0.15, float(np.median(curve[:head])), float(smooth.max()))


def _pair(header: Header, frames: Sequence[NDArray[np.uint8]]) -> tuple[tuple[Region, ...], str]:
    """The two panels (left or upper first), or the one image, and in words how they were found."""
    tissue = tissue_regions(header)
    parts, name = (tissue, "region") if tissue else (_moving_parts(frames), "detected region")
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            if _alike(a, b):
                return tuple(sorted((a, b), key=lambda r: (r.x0, r.y0))), f"two {name}s of like size"
    if not parts:
        return (), ""
    halves = _split(parts[0], frames)
    return (halves, f"symmetric split of one {name}") if halves else ((parts[0],), f"one {name}")


def _alike(a: Region, b: Region) -> bool:
    apart = a.x1 < b.x0 or b.x1 < a.x0 or a.y1 < b.y0 or b.y1 < a.y0
    return apart and abs(a.width - b.width) <= 0.1 * a.width and abs(a.height - b.height) <= 0.1 * a.height


def _split(whole: Region, frames: Sequence[NDArray[np.uint8]]) -> tuple[Region, Region] | None:
    """Halves of a wide region, if both hold the same outline (one scan plane, shown twice) beside a dark seam."""
    half = whole.width // 2
    if half < 2 * _MIN_SIDE or whole.width < 1.1 * whole.height:
        return None
    left = replace(whole, x1=whole.x0 + half - 1)
    right = replace(whole, x0=whole.x1 - half + 1)
    step = max(1, len(frames) // 16)
    seen = np.max([to_gray(whole.crop(f)) for f in frames[::step]], axis=0) > 12
    seam = seen[:, half - max(2, half // 50) : half + max(2, half // 50)].mean()
    a, b = (ndimage.binary_closing(m, iterations=3) for m in (seen[:, :half], seen[:, -half:]))
    union = np.logical_or(a, b).sum()
    if not union or seam > 0.2:
        return None
    return (left, right) if np.logical_and(a, b).sum() / union >= 0.75 else None


def time_intensity(frames: Iterable[NDArray[Any]], region: Region) -> NDArray[np.float64]:
    """Mean grey of the region, frame by frame."""
    return _curves(frames, (region,))[0]


def _curves(frames: Iterable[NDArray[Any]], of: Sequence[Region]) -> list[NDArray[np.float64]]:
    """`time_intensity` of several regions in one walk through the clip."""
    means = [[float(to_gray(region.crop(frame)).mean(dtype=np.float64)) for region in of] for frame in frames]
    return list(np.array(means, dtype=np.float64).reshape(-1, len(of)).T)

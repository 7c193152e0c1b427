"""Regions of interest as the objects of a study describe them, before they are placed on pixels. Headers only.

roi_seg, roi_contours, roi_annotations   an object → `Region`s        roi_place   a Region → masks on an image or grid
roi_raster   outlines → masks                                          roi         order of trust, versions, the answer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.laterality import side_of_text
from dicom_node.study import Header, Instance

Targets: TypeAlias = Mapping[str, frozenset[int]]
"""SOP Instance UID → frame numbers from 1; none = all frames."""
Vector: TypeAlias = NDArray[np.float64]

_SIDES = {"24028007": "R", "7771000": "L", "G-A100": "R", "G-A101": "L"}  # PS3.16 CID 244, and the retired SRT codes
_ANATOMY = {"123037004", "T-D0050", "85756007", "T-D0060", "91723000", "410653004", "91720002"}
_ABNORMAL = {"49755003", "M-01000", "M-01100"}
"""PS3.16 CID 7150: categories of what a segment is."""


FARTHEST_MM = 1e5
"""A coordinate beyond is none."""


class UnreadableError(ValueError):
    """A region cannot be placed; the message is one of ours, free of PHI. Becomes REFUSED(ROI_UNREADABLE)."""


class FrameReader(Protocol):
    """What is needed of `engine.PixelReader`."""

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[NDArray[Any]]:
        """Decoded frames in the order asked for; `numbers` count from 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """Where an image lies in the patient (PS3.3 C.7.6.2.1.1), mm. `origin` is the centre of its first pixel."""

    origin: Vector
    column_step: Vector
    """From one column to the next."""
    row_step: Vector
    """From one row to the next."""
    thickness: float
    """Between slices where known, else of the slice; 0 = not said."""

    @property
    def normal(self) -> Vector:
        (a, b, c), (d, e, f) = self.column_step.tolist(), self.row_step.tolist()
        cross = np.array([b * f - c * e, c * d - a * f, a * e - b * d])  # np.cross takes ten times as long for one
        return np.asarray(cross / np.linalg.norm(cross), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Raster:
    """One frame of a segmentation."""

    frame: int
    on: Targets
    plane: Plane | None


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A closed shape in an image's own coordinates: (0, 0) is the outer corner of the first pixel, so that the centre
    of pixel (column, row) lies at (column + 0.5, row + 0.5) (PS3.3 C.10.5.1.2, C.18.6)."""

    shape: str
    """POLYLINE | INTERPOLATED | CIRCLE | ELLIPSE."""
    points: NDArray[np.float64]
    """(n, 2) column, row."""
    on: Targets
    shown: Header | None = None
    """The presentation state's item of the displayed area, where `points` are fractions of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """A closed planar polygon in the patient, mm."""

    points: NDArray[np.float64]
    """(n, 3)."""


Drawing: TypeAlias = Raster | Outline | Contour


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One region as one object describes it."""

    kind: str
    """SEG | RTSTRUCT | SR | GSPS."""
    source: Instance
    number: int
    """The object's own: Segment Number, ROI Number, else the order in the object, from 1."""
    name: str
    """Label, folded; compared, never repeated."""
    tracking: str
    laterality: str
    structure: str
    """"organ" or "lesion" where the object codes it, else ""."""
    frame_of_reference: str
    drawings: tuple[Drawing, ...]
    refers: frozenset[str]
    """SOP Instance UIDs of the images it refers to, one way or the other."""
    segment: int | None = None
    """Which samples of a SEG's frames are inside: None = all that are set, else those of this value (label map)."""
    half: float = 1.0
    """Smallest sample that is inside."""
    defect: str = ""
    """Why it cannot be read, although it is there."""

    @property
    def time(self) -> str:
        """When it was drawn, to be compared as text; "" = not said."""
        header = self.source.header
        for date, time in _TIMES:
            if header.text(date):
                return header.text(date) + header.text(time)
        return ""


_TIMES = (
    ("StructureSetDate", "StructureSetTime"),
    ("PresentationCreationDate", "PresentationCreationTime"),
    ("ContentDate", "ContentTime"),
    ("InstanceCreationDate", "InstanceCreationTime"),
)


def folded(text: str) -> str:
    """A label as it is compared."""
    return " ".join(text.casefold().split())


def side(items: Iterable[Header], text: str = "") -> str:
    """ "R" or "L" of coded modifiers, else of the label; "" where they say nothing, both, or different sides."""
    coded = {_SIDES.get(item.text("CodeValue"), "") for item in items} - {""}
    if coded:
        return coded.pop() if len(coded) == 1 else ""
    said = side_of_text(text)
    return said if said in ("R", "L") else ""


def structure(categories: Iterable[Header]) -> str:
    """Organ or lesion, by the Segmented Property Category Code."""
    for item in categories:
        if item.text("CodeValue") in _ABNORMAL:
            return "lesion"
        if item.text("CodeValue") in _ANATOMY:
            return "organ"
    return ""


def anatomy_side(item: Header, label: str, *more: str) -> str:
    """Side of a segment or ROI: Anatomic Region Modifier, Segmented Property Type Modifier, else its label."""
    modifiers = [
        modifier
        for region in (*item.items_of("AnatomicRegionSequence"), *(r for m in more for r in item.items_of(m)))
        for key in ("AnatomicRegionModifierSequence", "SegmentedPropertyTypeModifierCodeSequence")
        for modifier in region.items_of(key)
    ]
    modifiers += item.items_of("SegmentedPropertyTypeModifierCodeSequence")
    return side(modifiers, label)


def references(items: Iterable[Header]) -> dict[str, frozenset[int]]:
    """Targets of the items of a Referenced (or Source) Image Sequence (PS3.3 Table 10-3); no frame number = all."""
    found: dict[str, frozenset[int] | None] = {}
    for item in items:
        uid = item.text("ReferencedSOPInstanceUID")
        if not uid:
            continue
        numbers = frozenset(int(n) for n in item.texts("ReferencedFrameNumber") if is_number(n))
        seen = found.get(uid, numbers)
        found[uid] = seen | numbers if seen and numbers else frozenset()
    return {uid: numbers or frozenset() for uid, numbers in found.items()}


def is_number(text: str) -> bool:
    """ASCII digits: `int` reads it."""
    return text.isascii() and text.isdigit()


def merged(drawings: Iterable[Drawing]) -> frozenset[str]:
    """All images that drawings refer to."""
    return frozenset(uid for d in drawings if not isinstance(d, Contour) for uid in d.on)


def floats(header: Header, keyword: str) -> NDArray[np.float64] | None:
    """All values of a numeric attribute; None where one of them is no number."""
    value = header.values_.get(keyword)
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if not all(isinstance(v, int | float) for v in values):
        return None
    return np.array(values, dtype=np.float64)


def planes(header: Header) -> list[Plane | None]:
    """The plane of every frame: of the instance (PS3.3 C.7.6.2), or of its functional groups (C.7.6.16.2); else []."""
    groups = header.items_of("PerFrameFunctionalGroupsSequence")
    shared = next(iter(header.items_of("SharedFunctionalGroupsSequence")), Header({}))
    if not groups and not shared:
        return [_plane(header, header, header)] if (header.number("NumberOfFrames") or 1) == 1 else []

    def part(group: Header, keyword: str) -> Header:
        return next(iter(group.items_of(keyword) or shared.items_of(keyword)), Header({}))

    return [
        _plane(*(part(g, k) for k in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")))
        for g in groups
    ]


def _plane(position: Header, orientation: Header, measures: Header) -> Plane | None:
    origin = floats(position, "ImagePositionPatient")
    axes = floats(orientation, "ImageOrientationPatient")
    spacing = floats(measures, "PixelSpacing")
    if origin is None or axes is None or spacing is None or (len(origin), len(axes), len(spacing)) != (3, 6, 2):
        return None
    column, row = axes[:3], axes[3:]
    if np.abs(axes).max() > 1.1 or np.abs(origin).max() > FARTHEST_MM or not 0 < spacing.min() <= spacing.max() <= 1e3:
        return None
    if abs(column @ row) > 1e-3 or min(column @ column, row @ row) < 0.9:
        return None
    thickness = measures.number("SpacingBetweenSlices") or measures.number("SliceThickness") or 0.0
    return Plane(origin, column * spacing[1], row * spacing[0], abs(thickness))

"""Segmentation objects (PS3.3 A.51: binary, fractional; A.86: label map) → regions, one a segment. Headers only.

A segment says where it lies by the image each of its frames was derived from (Derivation Image functional group), by
its planes in the patient, or, in the simplest objects, by the one image that the whole object refers to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from dicom_node.pixels.roi_model import (
    Plane,
    Raster,
    Region,
    anatomy_side,
    folded,
    merged,
    planes,
    references,
    structure,
)
from dicom_node.study import Header, Instance

SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP: Final = "1.2.840.10008.5.1.4.1.1.66.7"
SURFACE: Final = "1.2.840.10008.5.1.4.1.1.66.5"
MAX_SEGMENTS: Final = 1000
CLASSES: Final = frozenset({SEGMENTATION, LABEL_MAP, SURFACE})


def regions(instance: Instance) -> Iterator[Region]:
    """The segments in the order of their numbers."""
    header = instance.header
    defect = _defect(instance)
    whole = _whole(header)
    by_segment: dict[int, list[Raster]] = {}
    every: list[Raster] = []
    groups = header.items_of("PerFrameFunctionalGroupsSequence")
    shared = next(iter(header.items_of("SharedFunctionalGroupsSequence")), Header({}))
    where = planes(header) if not defect else []
    for frame, group in enumerate(groups, start=1):
        raster = Raster(frame, _derived(group, shared), where[frame - 1] if not defect else None)
        every.append(raster)
        for number in _numbers(group, shared):
            by_segment.setdefault(number, []).append(raster)
    background = header.number("PixelPaddingValue") if _is_label_map(header) else None
    segments = header.items_of("SegmentSequence")
    if len(segments) > MAX_SEGMENTS:
        segments, defect = segments[:1], f"more than {MAX_SEGMENTS} segments"
    for segment in sorted(segments, key=lambda s: s.number("SegmentNumber") or 0.0):
        number = int(segment.number("SegmentNumber") or 0)
        if number not in (0, background):  # a label map describes its background as a segment (PS3.3 C.8.20.2)
            yield _region(
                instance, segment, every if _is_label_map(header) else by_segment.get(number, []), whole, defect
            )


def _region(
    instance: Instance,
    segment: Header,
    rasters: list[Raster],
    whole: dict[str, frozenset[int]],
    defect: str,
) -> Region:
    header = instance.header
    number = int(segment.number("SegmentNumber") or 0)
    if not defect and not merged(rasters):
        rasters, why = _by_object(rasters, whole)
        defect = defect or why
    fractional = header.text("SegmentationType") == "FRACTIONAL"
    return Region(
        kind="SEG",
        source=instance,
        number=number,
        name=folded(segment.text("SegmentLabel")),
        tracking=segment.text("TrackingUID"),
        laterality=anatomy_side(segment, segment.text("SegmentLabel")),
        structure=structure(segment.items_of("SegmentedPropertyCategoryCodeSequence")),
        frame_of_reference=header.text("FrameOfReferenceUID"),
        drawings=tuple(rasters),
        refers=merged(rasters) or frozenset(whole),
        segment=number if _is_label_map(header) else None,
        half=(header.number("MaximumFractionalValue") or 255.0) / 2 if fractional else 1.0,
        defect=defect,
    )


def _defect(instance: Instance) -> str:
    header = instance.header
    if instance.sop_class_uid == SURFACE:
        return "a surface segmentation holds no pixels"
    if len(header.items_of("PerFrameFunctionalGroupsSequence")) != instance.number_of_frames:
        return "the functional groups are not as many as the frames"
    if header.text("PhotometricInterpretation") == "PALETTE COLOR":
        return "a label map in colours"
    return ""


def _is_label_map(header: Header) -> bool:
    return header.text("SOPClassUID") == LABEL_MAP or header.text("SegmentationType") == "LABELMAP"


def _numbers(group: Header, shared: Header) -> Sequence[int]:
    """The segment that a frame shows."""
    key = "SegmentIdentificationSequence"
    return [int(i.number("ReferencedSegmentNumber") or 0) for i in group.items_of(key) or shared.items_of(key)][:1]


def _derived(group: Header, shared: Header) -> dict[str, frozenset[int]]:
    key = "DerivationImageSequence"
    return references(
        source for d in group.items_of(key) or shared.items_of(key) for source in d.items_of("SourceImageSequence")
    )


def _whole(header: Header) -> dict[str, frozenset[int]]:
    """Images of the study that the object as a whole refers to (Common Instance Reference, PS3.3 C.12.2)."""
    series = header.items_of("ReferencedSeriesSequence")
    instances = [i for s in series for i in s.items_of("ReferencedInstanceSequence")]
    return references([*instances, *header.items_of("SourceImageSequence")])


def _by_object(rasters: list[Raster], whole: dict[str, frozenset[int]]) -> tuple[list[Raster], str]:
    """No frame says its source: the planes do, else the only image of the object."""
    if not rasters or all(r.plane is not None for r in rasters):
        return rasters, ""
    if len(whole) == 1:
        return [Raster(r.frame, whole, None) for r in rasters], ""
    return rasters, "its frames name neither the image they were drawn on nor their place in the patient"


def spacing(rasters: Sequence[Plane]) -> float:
    """Distance between neighbouring parallel planes, mm; 0 = there is one plane only."""
    normal = rasters[0].normal
    offsets = sorted({round(float(p.origin @ normal), 3) for p in rasters})
    gaps = [b - a for a, b in pairwise(offsets) if b - a > 0.01]
    return min(gaps, default=0.0)

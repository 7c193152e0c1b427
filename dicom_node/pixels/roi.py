"""Regions of interest that a person drew: where they lie on an image or in a volume. Reads headers, decodes SEG frames.

Order of trust: SEG, RT Structure Set, SR, presentation state; the first kind that holds a region for the image at hand
wins, the others are not looked at. Where the node's own objects, or a frame of reference other than the image's, are
concerned, nothing is read. A region that is there and cannot be placed is refused, never passed over: what comes after
it would be an automatic place in its stead.

Several objects of one kind: a newer one of the same tracking UID, or of the same label or series and on the same place,
replaces the older; two that overlap otherwise, or carry one label on different places, are refused as ambiguous; what
lies apart under different labels is another lesion. Within one object every region counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels import roi_annotations, roi_contours, roi_place, roi_seg
from dicom_node.pixels.roi_model import Contour, FrameReader, Region, UnreadableError
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study, is_own_output

TRUST: Final = ("SEG", "RTSTRUCT", "SR", "GSPS")
"""Kinds of region objects, the most trusted first."""
SAME_PLACE: Final = 0.1
"""Regions that share this part of the smaller one mark the same place."""
EQUALLY_GOOD: Final = 0.8
"""A second place with this share of the first one's weight leaves the locator undecided."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class PlanarRoi:
    """One lesion (or organ) on one 2D or cine instance."""

    source: str
    """SEG | RTSTRUCT | SR | GSPS | auto."""
    number: int
    """The same for the same lesion on every image of the study; from 1 (Segment Number, ROI Number, or order)."""
    masks: Mapping[int, Mask]
    """Frame number (from 1) → (Rows, Columns), read-only. A region drawn without frame numbers stands on all frames."""
    laterality: str = ""
    """"R" | "L" | "" as the region object says."""
    structure: str = ""
    """"organ" | "lesion" where the region object codes it, else ""."""

    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 (inclusive) around all masks."""
        union = np.logical_or.reduce(list({id(m): m for m in self.masks.values()}.values()))
        rows, columns = np.flatnonzero(union.any(axis=1)), np.flatnonzero(union.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


@dataclass(frozen=True, slots=True, eq=False)
class VolumeRoi:
    """One lesion (or organ) in a stack."""

    source: str
    number: int
    mask: Mask
    """(D, H, W) on the given grid, read-only."""
    laterality: str = ""
    structure: str = ""


def planar_rois(study: Study, instance: Instance, pixels: FrameReader) -> tuple[PlanarRoi, ...] | Refusal:
    """The regions on one instance; () = the study holds none for it."""
    uid, frame = instance.sop_instance_uid, instance.header.text("FrameOfReferenceUID")

    def place(region: Region) -> dict[int, Mask]:
        return roi_place.on_image(region, instance, pixels)

    found = _trusted(study, lambda r: _concerns(r, frozenset({uid}), frame), place)
    if isinstance(found, Refusal):
        return found
    return tuple(
        PlanarRoi(p.region.kind, p.number, MappingProxyType(p.masks), p.region.laterality, p.region.structure)
        for p in found
    )


def volume_rois(
    study: Study,
    references: frozenset[str],
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    frame_of_reference: str,
    pixels: FrameReader,
) -> tuple[VolumeRoi, ...] | Refusal:
    """The regions in a stack of the SOP Instances `references`, on its grid (column, row, slice → mm)."""
    images = {i.sop_instance_uid: i for i in study.instances if i.sop_instance_uid in references}
    grid = roi_place.Grid(shape, affine)

    def place(region: Region) -> dict[int, Mask]:
        volume = roi_place.on_grid(region, grid, images, pixels)
        return {0: volume} if volume.any() else {}

    found = _trusted(study, lambda r: _concerns(r, references, frame_of_reference), place)
    if isinstance(found, Refusal):
        return found
    return tuple(VolumeRoi(p.region.kind, p.number, p.masks[0], p.region.laterality, p.region.structure) for p in found)


def marking(study: Study, instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """The objects of the study that hold a region for one of `instances`, from headers alone; in the study's order."""
    targets = tuple(instances)
    uids = frozenset(i.sop_instance_uid for i in targets)
    frames = {i.header.text("FrameOfReferenceUID") for i in targets} - {""}
    found = {
        region.source.instance_id
        for kind in TRUST
        for region in _regions(study.instances, kind)
        if region.refers & uids or region.frame_of_reference in frames
    }
    return tuple(i for i in study.instances if i.instance_id in found)


def kinds(instances: Iterable[Instance]) -> tuple[str, ...]:
    """Kinds of the objects that mark a region, from headers alone: what `planar_rois` or `volume_rois` would read, or
    refuse as unreadable, on the images it lies on."""
    among = tuple(instances)
    return tuple(kind for kind in TRUST if next(_regions(among, kind), None) is not None)


def locate(probability: NDArray[np.float32], minimum_cells: int, threshold: float = 0.5) -> Mask | None:
    """The place on a locator's map: the connected component (by edges) with the most probability in it, of those with
    `minimum_cells`. None where there is no such place, or a second one is about as good: a guess is not a place."""
    from scipy import ndimage

    labels, count = ndimage.label(probability >= threshold)
    if not count:
        return None
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, index)
    weights = np.where(sizes >= max(minimum_cells, 1), ndimage.sum_labels(probability, labels, index), 0.0)
    order = np.argsort(weights)[::-1]
    best = weights[order[0]]
    if best <= 0 or (count > 1 and weights[order[1]] >= EQUALLY_GOOD * best):
        return None
    return _read_only(labels == index[order[0]])


# --- one kind after the other ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Placed:
    region: Region
    number: int
    masks: dict[int, Mask]


def _trusted(
    study: Study, concerns: Callable[[Region], bool], place: Callable[[Region], dict[int, Mask]]
) -> tuple[_Placed, ...] | Refusal:
    """The regions of the first kind that has one here, each lesion once, by number."""
    for kind in TRUST:
        every = list(_regions(study.instances, kind))
        numbers = _numbers(every)
        placed: list[_Placed] = []
        for region, number in zip(every, numbers, strict=True):
            if not concerns(region):
                continue
            try:
                if region.defect:
                    raise UnreadableError(region.defect)
                masks = place(region)
            except UnreadableError as e:
                return Refusal(RefusalCode.ROI_UNREADABLE, f"{kind}: {e}")
            if masks:
                placed.append(_Placed(region, number, masks))
        if placed:
            return _settled(placed, kind)
    return ()


def _regions(instances: Iterable[Instance], kind: str) -> Iterator[Region]:
    foreign = [i for i in instances if not is_own_output(i.header)]
    replaced = {uid for i in foreign for uid in _predecessors(i.header)}
    for instance in foreign:
        if instance.sop_instance_uid not in replaced and _kind(instance.sop_class_uid) == kind:
            yield from _READERS[kind](instance)


_READERS: Final[Mapping[str, Callable[[Instance], Iterator[Region]]]] = {
    "SEG": roi_seg.regions,
    "RTSTRUCT": roi_contours.regions,
    "SR": roi_annotations.report_regions,
    "GSPS": roi_annotations.presentation_regions,
}


def _kind(sop_class_uid: str) -> str:
    if sop_class_uid in roi_seg.CLASSES:
        return "SEG"
    if sop_class_uid == roi_contours.RT_STRUCTURE_SET:
        return "RTSTRUCT"
    if sop_class_uid.startswith(roi_annotations.REPORTS) and sop_class_uid != roi_annotations.KEY_OBJECTS:
        return "SR"
    return "GSPS" if sop_class_uid.startswith(roi_annotations.PRESENTATION_STATES) else ""


def _predecessors(header: Header) -> Iterator[str]:
    """Documents that this one says it replaces (PS3.3 C.17.2)."""
    for document in header.items_of("PredecessorDocumentsSequence"):
        for series in document.items_of("ReferencedSeriesSequence"):
            yield from (i.text("ReferencedSOPInstanceUID") for i in series.items_of("ReferencedSOPSequence"))


def _concerns(region: Region, uids: frozenset[str], frame_of_reference: str) -> bool:
    """Refers to one of the images, or lies in their frame of reference; never one that lies in another."""
    located = any(isinstance(d, Contour) or getattr(d, "plane", None) is not None for d in region.drawings)
    same = bool(frame_of_reference) and region.frame_of_reference == frame_of_reference
    if located and frame_of_reference and region.frame_of_reference:
        return same
    return bool(region.refers & uids) or (bool(region.defect) and same)


def _numbers(every: Sequence[Region]) -> list[int]:
    """A number for each region of one kind: its own where that tells all lesions apart, else the order of lesions."""
    labels = Counter((region.source.instance_id, region.name) for region in every)

    def identity(region: Region) -> tuple[str, ...]:
        if region.tracking:
            return ("tracking", region.tracking)
        alone = region.name and labels[region.source.instance_id, region.name] == 1
        return ("name", region.name) if alone else ("number", region.name, str(region.number))

    identities = [identity(r) for r in every]
    own: dict[tuple[str, ...], set[int]] = {}
    for key, region in zip(identities, every, strict=True):
        own.setdefault(key, set()).add(region.number)
    if all(len(n) == 1 for n in own.values()) and len({min(n) for n in own.values()}) == len(own):
        return [r.number for r in every]
    ranked = sorted(own, key=lambda key: min(own[key]))
    return [ranked.index(key) + 1 for key in identities]


# --- several objects on one place ------------------------------------------------------------------------------------


def _settled(placed: list[_Placed], kind: str) -> tuple[_Placed, ...] | Refusal:
    kept: list[_Placed] = []
    for one in sorted(placed, key=lambda p: (p.region.time, p.number), reverse=True):  # the newest first
        keep = True
        for other in kept:
            verdict = _judge(other, one)
            if verdict == "ambiguous":
                return Refusal(RefusalCode.ROI_AMBIGUOUS, f"{kind}: {_AMBIGUOUS}")
            if verdict == "same":
                for frame, mask in one.masks.items():
                    other.masks.setdefault(frame, mask)
            if verdict in ("same", "older"):
                keep = False
                break
        if keep:
            kept.append(one)
    for one in kept:
        one.masks = {n: _read_only(m) for n, m in sorted(one.masks.items())}
    return tuple(sorted(kept, key=lambda p: p.number))


_AMBIGUOUS = "two objects mark different regions, and neither label and time nor a tracking UID says which one holds"


def _judge(newer: _Placed, older: _Placed) -> str:
    """What the older one is beside the newer: "older" (replaced), "same" (to be joined), "other", or "ambiguous"."""
    a, b = newer.region, older.region
    if a.source.instance_id == b.source.instance_id or (a.structure and b.structure and a.structure != b.structure):
        return "other"
    tracked = bool(a.tracking) and a.tracking == b.tracking
    named = bool(a.name) and a.name == b.name
    common = newer.masks.keys() & older.masks.keys()
    if not common:
        return "same" if tracked or named else "other"
    if newer.masks.keys() == older.masks.keys() and all(np.array_equal(newer.masks[n], older.masks[n]) for n in common):
        return "older"
    overlap = any(_share(newer.masks[n], older.masks[n]) > SAME_PLACE for n in common)
    if tracked or (overlap and (named or a.source.series_instance_uid == b.source.series_instance_uid)):
        return "older" if a.time and b.time and a.time > b.time else "ambiguous"
    return "ambiguous" if overlap or named else "other"


def _share(a: Mask, b: Mask) -> float:
    smaller = min(int(a.sum()), int(b.sum()))
    return int((a & b).sum()) / max(smaller, 1)


def _read_only(mask: Mask) -> Mask:
    mask = np.ascontiguousarray(mask)
    mask.flags.writeable = False
    return mask

"""Outlines in structured reports and presentation states → regions. Headers only.

SR (PS3.3 C.17.3): image regions SCOORD and SCOORD3D, by measurement group where there is one (PS3.16 TID 1410, 1411:
tracking, finding site), else each by itself. GSPS (C.10.5): closed graphics. Open lines and points are measurements or
arrows, and no region. What has no identity of its own is one lesion over the frames of a clip as long as the outlines
overlap from frame to frame, one on each; on different images it is counted as different lesions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.roi_model import (
    Contour,
    Drawing,
    Outline,
    Region,
    Targets,
    floats,
    folded,
    is_number,
    merged,
    references,
    side,
    structure,
)
from dicom_node.study import Header, Instance

REPORTS: Final = "1.2.840.10008.5.1.4.1.1.88."
KEY_OBJECTS: Final = "1.2.840.10008.5.1.4.1.1.88.59"
PRESENTATION_STATES: Final = "1.2.840.10008.5.1.4.1.1.11."
MAX_CONTENT_ITEMS: Final = 20_000
ELLIPSE_POINTS: Final = 128

_MEASUREMENT_GROUP, _TRACKING_NAME, _TRACKING_UID = "125007", "112039", "112040"
_FINDING_SITE, _LATERALITY = frozenset({"363698007", "G-C0E3"}), frozenset({"272741003", "G-C171"})
_FINDING_CATEGORY = frozenset({"276214006", "G-C00A"})
_BROKEN = "an outline is broken"


@dataclass(eq=False)
class _Lesion:
    """What is known of one region while the object is read."""

    name: str = ""
    tracking: str = ""
    laterality: str = ""
    structure: str = ""
    frame_of_reference: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    refers: set[str] = field(default_factory=set)
    defect: str = ""


def _region(kind: str, instance: Instance, number: int, lesion: _Lesion) -> Region:
    return Region(
        kind=kind,
        source=instance,
        number=number,
        name=lesion.name,
        tracking=lesion.tracking,
        laterality=lesion.laterality,
        structure=lesion.structure,
        frame_of_reference=lesion.frame_of_reference,
        drawings=tuple(lesion.drawings),
        refers=merged(lesion.drawings) | lesion.refers,
        defect=lesion.defect,
    )


# --- structured reports ----------------------------------------------------------------------------------------------


def report_regions(instance: Instance) -> Iterator[Region]:
    """In the order of the report."""
    lesions: list[_Lesion] = []
    known: dict[str, _Lesion] = {}
    loose: list[Outline] = []
    groups: dict[int, _Lesion] = {}
    for item, group in _walk(instance.header):
        if item.text("ValueType") not in ("SCOORD", "SCOORD3D"):
            continue
        lesion = _Lesion()
        if group is not None:
            lesion = groups.setdefault(id(group), _of_group(group))
            # Groups of the same tracking in one report are the same lesion on other images or frames.
            lesion = known.setdefault(lesion.tracking or lesion.name or str(id(group)), lesion)
        _draw(item, instance.header, lesion)
        if group is None and not lesion.defect and lesion.drawings and isinstance(lesion.drawings[0], Outline):
            loose.append(lesion.drawings[0])
        elif lesion not in lesions and (lesion.drawings or lesion.defect):
            lesions.append(lesion)
    lesions += [_Lesion(drawings=list(outlines)) for outlines in _chained(loose)]
    for number, lesion in enumerate(lesions, start=1):
        yield _region("SR", instance, number, lesion)


def _walk(header: Header) -> Iterator[tuple[Header, Header | None]]:
    """Every content item with the measurement group around it. A loop: depth comes from the wire."""
    waiting: list[tuple[Header, Header | None]] = [(i, None) for i in reversed(header.items_of("ContentSequence"))]
    for _ in range(MAX_CONTENT_ITEMS):
        if not waiting:
            return
        item, group = waiting.pop()
        yield item, group
        inside = item if item.text("ValueType") == "CONTAINER" and _concept(item) == _MEASUREMENT_GROUP else group
        waiting.extend((child, inside) for child in reversed(item.items_of("ContentSequence")))


def _concept(item: Header, keyword: str = "ConceptNameCodeSequence") -> str:
    return next((c.text("CodeValue") for c in item.items_of(keyword)), "")


def _of_group(group: Header) -> _Lesion:
    lesion = _Lesion()
    sides: list[Header] = []
    for child in group.items_of("ContentSequence"):
        concept = _concept(child)
        if concept == _TRACKING_NAME:
            lesion.name = folded(child.text("TextValue"))
        elif concept == _TRACKING_UID:
            lesion.tracking = child.text("UID")
        elif concept in _FINDING_SITE:
            near = (m for m in child.items_of("ContentSequence") if _concept(m) in _LATERALITY)
            sides += (c for m in near for c in m.items_of("ConceptCodeSequence"))
        elif concept in _LATERALITY:
            sides += child.items_of("ConceptCodeSequence")
        elif concept in _FINDING_CATEGORY:
            lesion.structure = structure(child.items_of("ConceptCodeSequence"))
    lesion.laterality = side(sides, lesion.name)
    return lesion


def _draw(item: Header, root: Header, lesion: _Lesion) -> None:
    """Add what one SCOORD or SCOORD3D item encloses."""
    shape = item.text("GraphicType").strip()
    flat = item.text("ValueType") == "SCOORD"
    points = _points(item, 2 if flat else 3)
    on = _selected_from(item, root) if flat else {}
    if points is None:
        lesion.defect = _BROKEN
        lesion.refers.update(on)
    elif flat and item.text("PixelOriginInterpretation").strip() != "VOLUME":
        if _closed(shape, points):
            lesion.drawings.append(Outline(shape, points, on))
    elif not flat:
        lesion.frame_of_reference = item.text("ReferencedFrameOfReferenceUID")
        if shape == "ELLIPSOID":
            lesion.defect = "an ellipsoid"
        elif shape == "POLYGON":
            lesion.drawings.append(Contour(points))
        elif shape == "ELLIPSE" and len(points) == 4:
            lesion.drawings.append(Contour(_ellipse_3d(points)))


def _selected_from(item: Header, root: Header) -> Targets:
    """The images of SELECTED FROM, also where the item stands elsewhere in the tree (by reference, C.17.3.2.5)."""
    found: list[Header] = []
    for child in item.items_of("ContentSequence"):
        if child.text("RelationshipType") != "SELECTED FROM":
            continue
        path = child.texts("ReferencedContentItemIdentifier")
        image = _at(root, path) if path else child
        if image is not None:
            found += image.items_of("ReferencedSOPSequence")
    return references(found)


def _at(root: Header, path: tuple[str, ...]) -> Header | None:
    """The content item of an identifier: positions from 1, the first one of the root itself."""
    item = root
    for step in path[1:]:
        children = item.items_of("ContentSequence")
        if not is_number(step) or not 1 <= int(step) <= len(children):
            return None
        item = children[int(step) - 1]
    return item


def _ellipse_3d(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ends of the major and of the minor axis → a polygon."""
    turn = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)[:, None]
    ring = np.cos(turn) * (points[1] - points[0]) / 2 + np.sin(turn) * (points[3] - points[2]) / 2
    return np.asarray(points.mean(axis=0) + ring, dtype=np.float64)


# --- presentation states ---------------------------------------------------------------------------------------------


def presentation_regions(instance: Instance) -> Iterator[Region]:
    """In the order of the presentation state; layers are kept apart."""
    header = instance.header
    layers: dict[str, list[Outline]] = {}
    tracked: dict[str, _Lesion] = {}
    broken = _Lesion(defect=_BROKEN)
    for annotation in header.items_of("GraphicAnnotationSequence"):
        on = references(annotation.items_of("ReferencedImageSequence")) or _all_images(header)
        for graphic in annotation.items_of("GraphicObjectSequence"):
            points = _points(graphic, 2)
            if points is None:
                broken.refers.update(on)
                continue
            shape, filled = graphic.text("GraphicType").strip(), graphic.text("GraphicFilled").strip() == "Y"
            if not _closed(shape, points, filled) or graphic.text("GraphicAnnotationUnits").strip() == "MATRIX":
                continue
            outlines = [Outline(shape, points, {uid: n}, _shown(graphic, header, uid, n)) for uid, n in on.items()]
            if tracking := graphic.text("TrackingUID"):
                name = folded(graphic.text("TrackingID"))
                lesion = tracked.setdefault(tracking, _Lesion(name=name, tracking=tracking, laterality=side((), name)))
                lesion.drawings += outlines
            else:
                layers.setdefault(annotation.text("GraphicLayer"), []).extend(outlines)
    lesions = list(tracked.values())
    lesions += [_Lesion(drawings=list(found)) for outlines in layers.values() for found in _chained(outlines)]
    lesions += [broken] if broken.refers else []
    for number, lesion in enumerate(lesions, start=1):
        yield _region("GSPS", instance, number, lesion)


def _all_images(header: Header) -> Targets:
    """An annotation that names no image stands on all that the presentation state shows."""
    series = header.items_of("ReferencedSeriesSequence")
    return references(i for s in series for i in s.items_of("ReferencedImageSequence"))


def _shown(graphic: Header, header: Header, uid: str, frames: frozenset[int]) -> Header | None:
    """For graphics in DISPLAY units: the displayed area of that image, with rotation and flip of the whole state."""
    if graphic.text("GraphicAnnotationUnits").strip() != "DISPLAY":
        return None
    transform = {k: header.values_[k] for k in ("ImageRotation", "ImageHorizontalFlip") if k in header.values_}
    for area in header.items_of("DisplayedAreaSelectionSequence"):
        on = references(area.items_of("ReferencedImageSequence"))
        if not on or (uid in on and (not on[uid] or (frames and frames <= on[uid]))):
            return Header(MappingProxyType({**area.values_, **transform}))
    return Header(MappingProxyType(transform))


# --- both ------------------------------------------------------------------------------------------------------------


def _points(item: Header, dimensions: int) -> NDArray[np.float64] | None:
    values = floats(item, "GraphicData")
    if values is None or not len(values) or len(values) % dimensions:
        return None
    return values.reshape(-1, dimensions)


def _closed(shape: str, points: NDArray[np.float64], filled: bool = False) -> bool:
    """Encloses an area: PS3.3 C.18.6.1.2, C.10.5.1.2."""
    if shape in ("CIRCLE", "ELLIPSE"):
        return True
    closed = filled or bool(np.allclose(points[0], points[-1], atol=1e-3))
    return shape in ("POLYLINE", "INTERPOLATED") and len(points) >= 4 and closed


def _chained(outlines: list[Outline]) -> list[list[Outline]]:
    """Outlines without identity, by lesion: on one image, never two of them on a frame, each overlapping the last."""
    chains: list[list[Outline]] = []
    for outline in outlines:
        for chain in chains:
            if _continues(chain[-1].on, outline.on) and _boxes_meet(chain[-1], outline):
                chain.append(outline)
                break
        else:
            chains.append([outline])
    return chains


def _continues(before: Mapping[str, frozenset[int]], after: Mapping[str, frozenset[int]]) -> bool:
    """One image, later frames of it."""
    if before.keys() != after.keys() or len(after) != 1:
        return False
    (earlier,), (later,) = before.values(), after.values()
    return bool(earlier) and bool(later) and max(earlier) < min(later)


def _boxes_meet(a: Outline, b: Outline) -> bool:
    (a0, a1), (b0, b1) = _box(a), _box(b)
    return bool(np.all(a0 < b1) and np.all(b0 < a1))


def _box(outline: Outline) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = outline.points
    if outline.shape == "CIRCLE" and len(points) == 2:
        radius = np.hypot(*(points[1] - points[0]))
        return points[0] - radius, points[0] + radius
    return points.min(axis=0), points.max(axis=0)

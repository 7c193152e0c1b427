"""RT Structure Sets (PS3.3 A.19, C.8.8.5, C.8.8.6) → regions, one a ROI: closed planar contours in mm. Headers only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dicom_node.pixels.roi_model import Contour, Region, anatomy_side, floats, folded, structure
from dicom_node.study import Header, Instance

RT_STRUCTURE_SET: Final = "1.2.840.10008.5.1.4.1.1.481.3"
_CLOSED: Final = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})
_NOT_TISSUE: Final = frozenset(
    {"EXTERNAL", "SUPPORT", "FIXATION", "BOLUS", "ISOCENTER", "MARKER", "REGISTRATION", "CONTROL", "DOSE_REGION",
     "DOSE_MEASUREMENT", "BRACHY_CHANNEL", "BRACHY_ACCESSORY", "BRACHY_SRC_APP", "BRACHY_CHNL_SHLD"}
)  # fmt: skip
"""RT ROI Interpreted Types that are the outline of the body, or of things beside it."""
_TYPES: Final = {"GTV": "lesion", "CTV": "lesion", "ORGAN": "organ", "AVOIDANCE": "organ"}


def regions(instance: Instance) -> Iterator[Region]:
    """The ROIs that enclose something, in the order of their numbers."""
    header = instance.header
    contours = {c.number("ReferencedROINumber"): c for c in header.items_of("ROIContourSequence")}
    seen = {o.number("ReferencedROINumber"): o for o in header.items_of("RTROIObservationsSequence")}
    for roi in sorted(header.items_of("StructureSetROISequence"), key=lambda r: r.number("ROINumber") or 0.0):
        number = roi.number("ROINumber")
        observation = seen.get(number, Header({}))
        drawn = contours.get(number, Header({})).items_of("ContourSequence")
        closed = [c for c in drawn if c.text("ContourGeometricType").strip() in _CLOSED]
        if closed and observation.text("RTROIInterpretedType").strip() not in _NOT_TISSUE:
            yield _region(instance, roi, observation, closed)


def _region(instance: Instance, roi: Header, observation: Header, closed: list[Header]) -> Region:
    points = [floats(c, "ContourData") for c in closed]
    sound = [p for p in points if p is not None and len(p) >= 9 and len(p) % 3 == 0]
    categories = (
        *observation.items_of("SegmentedPropertyCategoryCodeSequence"),
        *(c for i in observation.items_of("RTROIIdentificationCodeSequence")
          for c in i.items_of("SegmentedPropertyCategoryCodeSequence")),
    )  # fmt: skip
    images = (i for c in closed for i in c.items_of("ContourImageSequence"))
    return Region(
        kind="RTSTRUCT",
        source=instance,
        number=int(roi.number("ROINumber") or 0),
        name=folded(roi.text("ROIName")),
        tracking="",
        laterality=anatomy_side(observation, roi.text("ROIName"), "RTROIIdentificationCodeSequence"),
        structure=structure(categories) or _TYPES.get(observation.text("RTROIInterpretedType").strip(), ""),
        frame_of_reference=roi.text("ReferencedFrameOfReferenceUID") or instance.header.text("FrameOfReferenceUID"),
        drawings=tuple(Contour(p.reshape(-1, 3)) for p in sound),
        refers=frozenset(i.text("ReferencedSOPInstanceUID") for i in images) - {""},
        # The index of headers keeps no value longer than 1 MB, and 32 MB of one instance (store/header.py).
        defect="" if len(sound) == len(closed) else "a contour is empty, broken or too long",
    )

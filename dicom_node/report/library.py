"""The image library of a report (TID 1600): every source image with its modality and size. And the evidence.

The library is ours, because highdicom's knows no retired class, and describes each image of a stack anew: with the 400
slices of a dynamic MR that took seconds and megabytes. What the images of a stack have in common stands once, at their
group (TID 1600: descriptors at the group hold for all images in it); where each lies, its own header says. The evidence
is ours, because highdicom's walks the content tree twice through properties, longer than the content took to make.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Final

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.sr.coding import Code as PydicomCode
from pydicom.tag import Tag
from pydicom.uid import UltrasoundImageStorage, UltrasoundMultiFrameImageStorage

_CONTAINS = hd.sr.RelationshipTypeValues.CONTAINS

# Retired, but still in archives. The descriptors are made from the header of the class that replaced them.
_SUCCESSOR: Final = {
    "1.2.840.10008.5.1.4.1.1.6": str(UltrasoundImageStorage),
    "1.2.840.10008.5.1.4.1.1.3": str(UltrasoundMultiFrameImageStorage),
}
_CONTENT, _REFERENCED = Tag("ContentSequence"), Tag("ReferencedSOPSequence")
_DESCRIBED: Final = (
    "SOPClassUID", "SeriesInstanceUID", "Modality", "FrameOfReferenceUID", "Rows", "Columns", "PixelSpacing",
    "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices",
)  # fmt: skip
_SERIES: Final = "SeriesInstanceUID"
_POSITION: Final = frozenset({"110901", "110902", "110903"})
"""Image Position (Patient) X, Y, Z (DCM): what differs within a stack."""


def image_library(sources: Sequence[Dataset]) -> hd.sr.ContainerContentItem | None:
    """None where no image can be described. An image it cannot describe stays in the evidence."""
    stacks: dict[tuple[str, ...], list[Dataset]] = defaultdict(list)
    for source in sources:
        stacks[tuple(str(source.get(keyword, "")) for keyword in _DESCRIBED)].append(source)
    single = _group()
    groups = [single]
    alike: dict[tuple[str, ...], Sequence[Any] | None] = {}
    """Descriptors of stacks that differ in nothing but their series: the phases of a dynamic study."""
    for described, images in stacks.items():
        look = tuple(value for keyword, value in zip(_DESCRIBED, described, strict=True) if keyword != _SERIES)
        if len(images) == 1 or look not in alike:
            alike[look] = _descriptors(images[0])
        descriptors = alike[look]
        if descriptors is None:
            continue
        if len(images) == 1:
            single.ContentSequence.append(_image(images[0], descriptors))
            continue
        stack = _group()
        stack.ContentSequence.extend(d for d in descriptors if d.name.value not in _POSITION)
        stack.ContentSequence.extend(_image(image) for image in images)
        groups.append(stack)
    library = hd.sr.ContainerContentItem(name=standard.DCM.ImageLibrary, relationship_type=_CONTAINS)
    library.ContentSequence = hd.sr.ContentSequence([group for group in groups if group.ContentSequence])
    return library if library.ContentSequence else None


def evidence(sources: Iterable[Dataset], content: Dataset, study_instance_uid: str) -> list[Dataset]:
    """Current Requested Procedure Evidence Sequence (PS3.3 C.17.2): the sources of this study by their series.

    Raises ValueError where the content refers to an image that is no source.
    """
    series: dict[str, dict[str, Dataset]] = defaultdict(dict)
    known = set()
    for source in sources:
        known.add(source.SOPInstanceUID)
        if source.StudyInstanceUID == study_instance_uid:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
            series[source.SeriesInstanceUID].setdefault(source.SOPInstanceUID, item)
    if not known.issuperset(_referenced(content)):
        raise ValueError("the content refers to an image that is no source")
    if not series:
        return []
    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = study_instance_uid, []
    for uid, instances in series.items():
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedSOPSequence = uid, list(instances.values())
        study.ReferencedSeriesSequence.append(item)
    return [study]


def _referenced(content: Dataset) -> Iterator[str]:
    """SOP Instance UIDs of IMAGE and COMPOSITE items, at any depth."""
    for item in content[_CONTENT].value if _CONTENT in content else ():
        if _REFERENCED in item:
            yield item[_REFERENCED].value[0].ReferencedSOPInstanceUID
        yield from _referenced(item)


def _group() -> hd.sr.ContainerContentItem:
    group = hd.sr.ContainerContentItem(name=standard.DCM.ImageLibraryGroup, relationship_type=_CONTAINS)
    group.ContentSequence = hd.sr.ContentSequence()
    return group


def _descriptors(source: Dataset) -> Sequence[Any] | None:
    """TID 1602; None where there is no modality known, no geometry, or no image."""
    described = source
    if source.SOPClassUID in _SUCCESSOR:
        described = deepcopy(source)
        described.SOPClassUID = _SUCCESSOR[source.SOPClassUID]
    try:
        return hd.sr.templates.ImageLibraryEntryDescriptors(described)
    except (AttributeError, ValueError, KeyError, TypeError):
        return None


def _image(source: Dataset, descriptors: Iterable[Any] = ()) -> hd.sr.ImageContentItem:
    image = hd.sr.ImageContentItem(
        name=PydicomCode("260753009", "SCT", "Source"),
        referenced_sop_class_uid=source.SOPClassUID,
        referenced_sop_instance_uid=source.SOPInstanceUID,
        relationship_type=_CONTAINS,
    )
    items = list(descriptors)
    if items:
        image.ContentSequence = hd.sr.ContentSequence(items)
    return image

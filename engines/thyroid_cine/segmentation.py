"""A SEG of nodules on an ultrasound clip, as a reader's tool writes it (PS3.3 A.51); highdicom.

A clip has no Frame of Reference, and for such an image highdicom takes one mask of one frame only. So the mask is
written as if the clip were a still, and the references then name the clip: without frame numbers it stands on all of
its frames. Training side and tests only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UltrasoundImageStorage

from engines.training.labsr import key_of, uid

THYROID = ("69748006", "SCT", "Thyroid")
NODULE = ("237495005", "SCT", "Thyroid nodule")
_OF_A_CLIP = {0x00280008, 0x00280009, 0x00181063, 0x00080016, 0x7FE00010}
"""Number of Frames, Frame Increment Pointer, Frame Time, and what a still has of its own."""


def segmentation(clip: Dataset, masks: Sequence[NDArray[np.bool_]], uid_seed: int | None = None) -> Dataset:
    """One segment for each mask (Rows, Columns), numbered in their order; each holds for every frame of the clip."""
    import highdicom as hd
    from pydicom.sr.coding import Code

    key = key_of(uid_seed)
    still = Dataset({tag: clip[tag] for tag in clip.keys() if tag not in _OF_A_CLIP})  # noqa: SIM118 - tags, not elements
    still.file_meta, still.SOPClassUID = clip.file_meta, UltrasoundImageStorage
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"Nodule {number}",
            segmented_property_category=Code("49755003", "SCT", "Morphologically Abnormal Structure"),
            segmented_property_type=Code(*NODULE),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
            anatomic_regions=[Code(*THYROID)],
        )
        for number in range(1, len(masks) + 1)
    ]
    made: Dataset = hd.seg.Segmentation(
        source_images=[still],
        pixel_array=np.stack(masks, axis=-1)[None].astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=uid(key, "seg series"),
        series_number=2,
        sop_instance_uid=uid(key, "seg"),
        instance_number=1,
        manufacturer="dicom-node",
        manufacturer_model_name="thyroid phantom",
        software_versions="1",
        device_serial_number="0",
    )
    for item in _references(made):
        if item.ReferencedSOPInstanceUID == clip.SOPInstanceUID:
            item.ReferencedSOPClassUID = clip.SOPClassUID
    made.PatientOrientation = None  # type 2C without a frame of reference, which ultrasound lacks
    return made


def _references(ds: Dataset) -> list[Dataset]:
    """Every item, at any depth, that names another instance."""
    found = []
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                found += [item] if "ReferencedSOPInstanceUID" in item else []
                found += _references(item)
    return found

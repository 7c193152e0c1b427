"""A phantom clip as DICOM: US Multi-frame, and a SEG of the nodule as a reader's tool writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from engines.thyroid_cine.phantom import Clip
from engines.training import dicomfile
from engines.training.labsr import key_of, uid

NODULE = ("237495005", "SCT", "Thyroid nodule")


@dataclass(frozen=True)
class _Shown:
    """A clip as `dicomfile` wants it: one B-mode region."""

    frames: NDArray[np.uint8]
    frame_ms: float
    contrast: tuple[int, int, int, int]
    tissue: tuple[int, int, int, int]
    mm_per_px: float


def labels(**said: object) -> dicomfile.Labels:
    """What the header of a thyroid clip says."""
    own = {
        "description": "Thyroid ultrasound, calcified nodule", "body_part": "THYROID", "laterality": "", "agent": "",
        "patient_name": "PHANTOM^THYROID",
    }  # fmt: skip
    return dicomfile.Labels(**(own | said))  # type: ignore[arg-type]


def dataset(clip: Clip, encoding: str = "jpeg", said: dicomfile.Labels | None = None) -> Dataset:
    """The whole instance with its file meta information."""
    shown = _Shown(clip.frames, clip.frame_ms, clip.region, clip.region, clip.mm_per_px)
    ds = dicomfile.dataset(shown, encoding, said or labels())
    ds.SequenceOfUltrasoundRegions = ds.SequenceOfUltrasoundRegions[:1]
    ds.ImageType = ["ORIGINAL", "PRIMARY", "SMALL PARTS", "0001"]  # PS3.3 C.8.5.6.1.1
    ds.SeriesDescription, ds.ManufacturerModelName = "Thyroid cine simulated", "thyroid phantom"
    ds.TransducerType = "LINEAR"
    return ds


def segmentation(clip: Clip, image: Dataset, uid_seed: int | None = None) -> Dataset:
    """A binary SEG of the nodule on every frame (PS3.3 A.51)."""
    import highdicom as hd
    from pydicom.sr.coding import Code

    key = key_of(uid_seed)
    description = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Nodule",
        segmented_property_category=Code("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=Code(*NODULE),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        anatomic_regions=[Code("69748006", "SCT", "Thyroid")],
    )
    made: Dataset = hd.seg.Segmentation(
        source_images=[image],
        pixel_array=np.repeat(clip.nodule[None], int(image.NumberOfFrames), axis=0).astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=uid(key, "seg series"),
        series_number=2,
        sop_instance_uid=uid(key, "seg"),
        instance_number=1,
        manufacturer="dicom-node",
        manufacturer_model_name="thyroid phantom",
        software_versions="1",
        device_serial_number="0",
    )
    made.PatientOrientation = None  # type 2C without a frame of reference, which ultrasound lacks
    return made

"""A phantom clip as DICOM: US Multi-frame. Its SEG is `segmentation.py`'s."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from engines.thyroid_cine.phantom import Clip
from engines.training import dicomfile


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
    del ds.Laterality  # the thyroid is no paired organ (PS3.3 C.7.3.1)
    return ds

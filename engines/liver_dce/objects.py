"""A phantom examination as classic MR images (PS3.3 A.4), and the outlined tumour as Segmentation.

numpy and pydicom; highdicom for the Segmentation.

Encodings: `series` one series per phase, named by its description; `times` the same, told apart by time alone, each
with a rescale slope of its own; `temporal` one series with Temporal Position Identifier; `acquisition` one series with
Acquisition Number. Training side; the node reads files like these and knows nothing of this module.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from engines.liver_dce.phantom import PHASES, SHAPE, Exam

ENCODINGS = ("series", "times", "temporal", "acquisition")
SLOPES = (1.0, 0.5, 2.0, 0.25)
"""Rescale slopes of the phases in the encoding `times`: what scanners do that fill the range of each series."""
_IMPLEMENTATION = "2.25.263416290284619736212483246107843214417"
_SCAN_S = 16


@dataclass(frozen=True)
class Labels:
    """What the header says beside the image."""

    description: str = "MR liver with contrast, HCC"
    body_part: str = "LIVER"
    patient_name: str = "PHANTOM^LIVER"
    patient_id: str = ""
    """Empty: derived from the UIDs."""
    agent: str = "Gadoterate"
    uid_seed: int | None = None
    """None: random UIDs and the current date; else everything is a function of this number."""


def images(exam: Exam, encoding: str = "series", labels: Labels | None = None) -> list[Dataset]:
    """All slices of all phases; each with file meta information."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding: one of {', '.join(ENCODINGS)}, not {encoding!r}")
    labels = labels or Labels()
    key = secrets.token_bytes(16) if labels.uid_seed is None else labels.uid_seed.to_bytes(8, "big", signed=True)
    fixed = labels.uid_seed is not None
    start = datetime.datetime(2024, 1, 15, 9, 30) if fixed else datetime.datetime.now().astimezone()
    made = []
    for phase in range(len(PHASES)):
        for index in range(SHAPE[0]):
            ds = _general(exam, key, start, labels)
            _series(ds, exam, phase, index, encoding, key, start)
            _geometry(ds, exam, index, key)
            _pixels(ds, exam, phase, index, encoding)
            ds.SOPInstanceUID = _uid(key, f"image {phase} {index}")
            ds.file_meta = FileMetaDataset()
            ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            made.append(ds)
    return made


def write(
    exam: Exam, folder: Path, encoding: str = "series", labels: Labels | None = None, roi: bool = False
) -> list[Path]:
    """Save as Part 10 files; with `roi` the Segmentation of the tumour on the arterial phase."""
    folder.mkdir(parents=True, exist_ok=True)
    made = images(exam, encoding, labels)
    if roi:
        made.append(segmentation(exam, made[SHAPE[0] : 2 * SHAPE[0]]))
    paths = []
    for number, ds in enumerate(made):
        part = "seg" if ds.Modality == "SEG" else f"{number // SHAPE[0]}-{number % SHAPE[0]:02d}"
        path = folder / f"liver_dce-{exam.seed}-{exam.label}-{encoding}-{part}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def segmentation(exam: Exam, sources: list[Dataset]) -> Dataset:
    """The tumour as a reader outlined it, on the images of one phase, as 3D Slicer stores one."""
    import highdicom as hd
    from highdicom.sr import CodedConcept

    key = sources[0].SOPInstanceUID.encode()
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Tumour",
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=CodedConcept("108369006", "SCT", "Neoplasm"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        tracking_uid=_uid(key, "tumour"),
        tracking_id="Tumour",
    )
    made: Dataset = hd.seg.Segmentation(
        source_images=sources, pixel_array=exam.drawn_mask.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY, segment_descriptions=[segment],
        series_instance_uid=_uid(key, "seg series"), series_number=50, sop_instance_uid=_uid(key, "seg"),
        instance_number=1, manufacturer="dicom-node", manufacturer_model_name="region phantom",
        software_versions="1", device_serial_number="0", series_description="Tumour, drawn by hand",
    )  # fmt: skip
    return made


def _general(exam: Exam, key: bytes, start: datetime.datetime, labels: Labels) -> Dataset:
    ds = Dataset()
    short = hashlib.sha256(key + b"patient").hexdigest()[:10].upper()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = MRImageStorage
    ds.PatientName, ds.PatientID = labels.patient_name, labels.patient_id or f"PHANTOM-{short}"
    ds.PatientBirthDate, ds.PatientSex = "19000101", "O"
    ds.StudyInstanceUID = _uid(key, "study")
    ds.StudyDate, ds.StudyTime = start.strftime("%Y%m%d"), start.strftime("%H%M%S")
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = f"A{short}"[:16], "", "1"
    ds.StudyDescription, ds.Modality, ds.BodyPartExamined = labels.description, "MR", labels.body_part
    ds.Manufacturer, ds.ManufacturerModelName = "dicom-node", "liver phantom"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", "1"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "SP", "FS", "3D"
    ds.RepetitionTime, ds.EchoTime, ds.FlipAngle = f"{exam.tr_ms:.3f}", "1.4", f"{exam.flip_deg:.2f}"
    ds.EchoTrainLength, ds.MagneticFieldStrength, ds.EchoNumbers = 1, "1.5", 1
    ds.PositionReferenceIndicator, ds.PatientPosition = "", "HFS"
    if labels.agent:
        ds.ContrastBolusAgent, ds.ContrastBolusRoute = labels.agent, "Intravenous"
    return ds


def _series(
    ds: Dataset, exam: Exam, phase: int, index: int, encoding: str, key: bytes, start: datetime.datetime
) -> None:
    """What tells the phases apart in that encoding."""
    apart = encoding in ("series", "times")
    at = start + datetime.timedelta(seconds=exam.times[phase] - exam.times[0])
    begun = at if apart else start
    ds.SeriesInstanceUID = _uid(key, f"series {phase}" if apart else "series")
    ds.SeriesNumber = 3 + phase if apart else 3
    ds.SeriesDate, ds.SeriesTime = begun.strftime("%Y%m%d"), begun.strftime("%H%M%S.%f")
    ds.AcquisitionDate = ds.ContentDate = at.strftime("%Y%m%d")
    ds.AcquisitionTime, ds.ContentTime = at.strftime("%H%M%S.%f"), at.strftime("%H%M%S.%f")
    ds.InstanceNumber = index + 1 if apart else phase * SHAPE[0] + index + 1
    ds.SeriesDescription = {
        "series": f"T1 3D GRE fs {PHASES[phase]}", "times": "T1 3D GRE fs", "temporal": "T1 3D GRE fs dynamic",
        "acquisition": "T1 3D GRE fs dynamic",
    }[encoding]  # fmt: skip
    ds.AcquisitionNumber = phase + 1 if encoding == "acquisition" else 1
    if encoding == "temporal":
        ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = phase + 1, len(PHASES)
    injected = start + datetime.timedelta(seconds=-exam.times[0])
    ds.ContrastBolusStartTime = injected.strftime("%H%M%S.%f")


def _geometry(ds: Dataset, exam: Exam, index: int, key: bytes) -> None:
    ds.FrameOfReferenceUID = _uid(key, "frame of reference")
    origin = exam.affine @ np.array([0, 0, index, 1.0])
    ds.ImagePositionPatient = [f"{v:.4f}" for v in origin[:3]]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.PixelSpacing = [f"{exam.pixel_mm:.6f}"] * 2
    ds.SliceThickness = ds.SpacingBetweenSlices = f"{exam.slice_mm:.4f}"
    ds.SliceLocation = f"{origin[2]:.4f}"


def _pixels(ds: Dataset, exam: Exam, phase: int, index: int, encoding: str) -> None:
    plane = exam.volume[phase, index]
    ds.Rows, ds.Columns = plane.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    if encoding == "times":
        slope = SLOPES[phase]
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", str(slope), "US"
        plane = np.rint(plane / slope).astype(np.uint16)
    ds.PixelData = plane.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"


def _uid(key: bytes, what: str) -> str:
    """UUID-derived UID (PS3.5 B.2)."""
    digest = bytearray(hashlib.sha256(key + what.encode()).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x40, digest[8] & 0x3F | 0x80  # version 4, RFC 9562
    return f"2.25.{int.from_bytes(digest, 'big')}"

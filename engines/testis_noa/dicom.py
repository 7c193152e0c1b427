"""A phantom patient as DICOM: two US Images of one study, and his clinical values as a report. numpy, pydicom, Pillow.

Nothing in the files tells the node that the images are phantoms; the patient's name and the series description tell a
person.
"""

from __future__ import annotations

import datetime
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, UltrasoundImageStorage

from engines.testis_noa.phantom import Patient, Still
from engines.training.labsr import LabValue, key_of, uid, write_lab_sr

ENCODINGS = ("jpeg", "raw", "rle")
JPEG_QUALITY = 92
TESTIS = ("40689003", "SCT", "Testis")
ARTERY = ("27175001", "SCT", "Testicular Artery")
VALUES = ("FSH", "TESTICULAR_VOLUME", "EDV")
_IMPLEMENTATION = "2.25.263416290284619736212483246107843214417"


@dataclass(frozen=True)
class Labels:
    """What the headers say beside the images."""

    description: str = "Scrotal ultrasound, azoospermia"
    body_part: str = "SCROTUM"
    sides: str = "RL"
    """Sides that are written."""
    lateral: bool = True
    """False: no attribute states the side of an image."""
    patient_name: str = "PHANTOM^SCROTUM"
    patient_id: str = ""
    """Empty: derived from the UIDs."""
    values: tuple[str, ...] = VALUES
    """Clinical values in the report; none = no report."""
    uid_seed: int | None = None
    """None: random UIDs and the current date; else everything is a function of this number."""


def datasets(patient: Patient, encoding: str = "jpeg", labels: Labels | None = None) -> list[Dataset]:
    """Images in the order R, L, then the report; each with file meta information."""
    labels = labels or Labels()
    key = key_of(labels.uid_seed)
    stills = [s for s in patient.stills if s.side in labels.sides]
    made = [_still(still, number, encoding, labels, key) for number, still in enumerate(stills, start=1)]
    values = clinical_values(patient, stills, labels.values)
    return [*made, write_lab_sr(made[0], values, labels.uid_seed)] if values else made


def write(
    patient: Patient, folder: Path, encoding: str = "jpeg", labels: Labels | None = None, roi: bool = False
) -> list[Path]:
    """Save as Part 10 files; with `roi` a SEG of each testis beside its image."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = labels or Labels()
    made = datasets(patient, encoding, labels)
    if roi:
        stills = [s for s in patient.stills if s.side in labels.sides]
        images = [ds for ds in made if ds.Modality == "US"]
        key = key_of(labels.uid_seed)
        made += [segmentation(image, still.mask, still.side, key) for image, still in zip(images, stills, strict=True)]
    paths = []
    for ds in made:
        part = {"SR": "lab", "SEG": f"seg-{ds.InstanceNumber}", "US": f"us-{ds.InstanceNumber}"}[ds.Modality]
        path = folder / f"testis_noa-{patient.seed}-{patient.label}-{part}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def segmentation(image: Dataset, mask: NDArray[np.bool_], side: str, key: bytes) -> Dataset:
    """A binary SEG of the testis on its image, as a reader's tool writes it (PS3.3 A.51)."""
    import highdicom as hd
    from pydicom.sr.coding import Code

    right, left = Code("24028007", "SCT", "Right"), Code("7771000", "SCT", "Left")
    description = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Testis",
        segmented_property_category=Code("123037004", "SCT", "Anatomical structure"),
        segmented_property_type=Code(*TESTIS),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        anatomic_regions=[Code(*TESTIS)],
    )
    description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [
        hd.sr.CodedConcept.from_code(right if side == "R" else left)
    ]
    number = int(image.InstanceNumber)
    made: Dataset = hd.seg.Segmentation(
        source_images=[image],
        pixel_array=mask[None].astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=uid(key, "seg series"),
        series_number=2,
        sop_instance_uid=uid(key, f"seg {number}"),
        instance_number=number,
        manufacturer="dicom-node",
        manufacturer_model_name="scrotum phantom",
        software_versions="1",
        device_serial_number="0",
    )
    made.PatientOrientation = None  # type 2C without a frame of reference, which ultrasound lacks
    return made


def clinical_values(patient: Patient, stills: list[Still], names: tuple[str, ...]) -> list[LabValue]:
    """FSH of the patient; volume and velocity of each side."""
    found = []
    if "FSH" in names:
        meaning = "Follitropin [Units/volume] in Serum or Plasma"
        found.append(LabValue("FSH", "15067-2", "LN", meaning, patient.fsh, "[IU]/L"))
    for still in stills:
        if "TESTICULAR_VOLUME" in names:
            code = ("TESTICULAR_VOLUME", "118565006", "SCT", "Volume")
            found.append(LabValue(*code, still.volume_ml, "mL", still.side, site=TESTIS))
        if "EDV" in names:
            code = ("EDV", "11653-3", "LN", "End Diastolic Velocity")
            found.append(LabValue(*code, still.edv_cm_s, "cm/s", still.side, site=ARTERY))
    return found


def header(still: Still, number: int, labels: Labels, key: bytes) -> Dataset:
    """Everything but the pixels."""
    ds = Dataset()
    now = datetime.datetime(2024, 1, 15, 9, 30) if labels.uid_seed is not None else datetime.datetime.now().astimezone()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M") + f"{number:02d}"
    short = hashlib.sha256(key + b"patient").hexdigest()[:10].upper()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName, ds.PatientID = labels.patient_name, labels.patient_id or f"PHANTOM-{short}"
    ds.PatientBirthDate, ds.PatientSex = "19000101", "M"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(key, "study"), uid(key, "series")
    ds.SOPClassUID, ds.SOPInstanceUID = UltrasoundImageStorage, uid(key, f"still {number}")
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = date
    ds.StudyTime = ds.SeriesTime = now.strftime("%H%M%S")
    ds.ContentTime = ds.AcquisitionTime = time
    ds.AcquisitionDateTime = date + time
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = f"A{short}"[:16], "", "1"
    ds.StudyDescription, ds.SeriesDescription = labels.description, "Scrotum simulated"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "US", 1, number
    ds.Manufacturer, ds.ManufacturerModelName = "dicom-node", "scrotum phantom"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", "1"
    ds.BodyPartExamined = labels.body_part
    if labels.lateral:
        ds.ImageLaterality = still.side
    else:
        ds.Laterality = ""
    # Values 3 and 4 (2D imaging): PS3.3 C.8.5.6.1.1 and .2.
    ds.ImageType = ["ORIGINAL", "PRIMARY", "SMALL PARTS", "0001"]
    ds.PatientOrientation, ds.BurnedInAnnotation = "", "YES"
    ds.TransducerType, ds.UltrasoundColorDataPresent = "LINEAR", 0
    ds.SequenceOfUltrasoundRegions = [_region(still)]
    ds.Rows, ds.Columns = still.image.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.LossyImageCompression = "00"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def jpeg_round_trip(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a receiver of the JPEG file sees."""
    return np.asarray(Image.open(io.BytesIO(_jpeg(image))), np.uint8)


def _still(still: Still, number: int, encoding: str, labels: Labels, key: bytes) -> Dataset:
    ds = header(still, number, labels, key)
    if encoding == "jpeg":
        coded = _jpeg(still.image)
        ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
        ds.LossyImageCompressionRatio = round(still.image.nbytes / len(coded), 2)
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds.PixelData = encapsulate([coded])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    elif encoding in ("raw", "rle"):
        ds.PixelData = still.image.tobytes()
        ds["PixelData"].VR = "OB"
        if encoding == "rle":
            ds.compress(RLELossless, generate_instance_uid=False)
    else:
        raise ValueError(f"encoding: one of {', '.join(ENCODINGS)}, not {encoding!r}")
    return ds


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _region(still: Still) -> Dataset:
    item, box = Dataset(), still.region
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = 1, 1, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX = item.PhysicalDeltaY = round(still.mm_per_px / 10, 6)
    item.ReferencePixelX0, item.ReferencePixelY0 = (box[2] - box[0]) // 2, 0
    item.ReferencePixelPhysicalValueX = item.ReferencePixelPhysicalValueY = 0.0
    item.TransducerFrequency = 9000
    return item

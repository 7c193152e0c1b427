"""A phantom patient as DICOM objects: the still, the drawn region as Segmentation, age and markers as Enhanced SR.

pydicom and, for the Segmentation, highdicom. Training side; the node reads files like these and knows nothing of this
module.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, UltrasoundImageStorage

from engines.testis_tumour.phantom import Still
from engines.training.labsr import LabValue, write_lab_sr

ENCODINGS = ("jpeg", "raw", "rle")
JPEG_QUALITY = 90
MARKERS = {  # key -> LOINC code, meaning, UCUM unit
    "AGE": ("30525-0", "Age", "a"),
    "AFP": ("1834-1", "Alpha-1-Fetoprotein in Serum or Plasma", "ug/L"),
    "B_HCG": ("21198-7", "Beta-hCG in Serum or Plasma", "[IU]/L"),
    "LDH": ("2532-0", "Lactate dehydrogenase in Serum or Plasma", "U/L"),
}
_IMPLEMENTATION = "2.25.263416290284619736212483246107843214417"


@dataclass(frozen=True)
class Labels:
    """What the header says beside the image."""

    description: str = "US scrotum, testicular tumour"
    body_part: str = "SCROTUM"
    laterality: str = "R"
    """Image Laterality R, L or B; "" = the attribute is absent and Laterality is empty (side unknown)."""
    patient_name: str = "PHANTOM^TESTIS TUMOUR"
    patient_id: str = ""
    """Empty: derived from the UIDs."""
    uid_seed: int | None = None
    """None: random UIDs and the current date; else everything is a function of this number."""


def still(phantom: Still, encoding: str = "jpeg", labels: Labels | None = None) -> Dataset:
    """The ultrasound image with its file meta information."""
    labels = labels or Labels()
    ds = header(phantom, labels)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.LossyImageCompression = 7, 0, "00"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    if encoding == "jpeg":
        data = jpeg(phantom.picture)
        ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
        ds.LossyImageCompressionRatio = round(phantom.picture.nbytes / len(data), 2)
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds.PixelData = encapsulate([data])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif encoding in ("raw", "rle"):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.PixelData = phantom.picture.tobytes()
        ds["PixelData"].VR = "OB"
        if encoding == "rle":
            ds.compress(RLELossless, generate_instance_uid=False)
    else:
        raise ValueError(f"encoding: one of {', '.join(ENCODINGS)}, not {encoding!r}")
    return ds


def header(phantom: Still, labels: Labels) -> Dataset:
    """Everything but the pixels."""
    key = secrets.token_bytes(16) if labels.uid_seed is None else labels.uid_seed.to_bytes(8, "big", signed=True)
    fixed = labels.uid_seed is not None
    now = datetime.datetime(2024, 1, 15, 9, 30) if fixed else datetime.datetime.now().astimezone()
    short = hashlib.sha256(key + b"patient").hexdigest()[:10].upper()
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = UltrasoundImageStorage, _uid(key, "image")
    ds.StudyInstanceUID, ds.SeriesInstanceUID = _uid(key, "study"), _uid(key, "series")
    ds.PatientName, ds.PatientID = labels.patient_name, labels.patient_id or f"PHANTOM-{short}"
    ds.PatientBirthDate, ds.PatientSex = "", "M"
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = now.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = now.strftime("%H%M%S")
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = f"A{short}"[:16], "", "1"
    ds.StudyDescription, ds.SeriesDescription = labels.description, "Scrotum simulated"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "US", 1, 1
    ds.Manufacturer, ds.ManufacturerModelName = "dicom-node", "scrotal phantom"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", "1"
    ds.BodyPartExamined = labels.body_part
    if labels.laterality:
        ds.ImageLaterality = labels.laterality
    else:
        ds.Laterality = ""
    # Value 3 SCROTAL and value 4 (2D imaging): PS3.3 C.8.5.6.1.1.
    ds.ImageType = ["ORIGINAL", "PRIMARY", "SCROTAL", "0001"]
    ds.PatientOrientation, ds.BurnedInAnnotation, ds.TransducerType = "", "YES", "LINEAR"
    ds.UltrasoundColorDataPresent = 0
    ds.Rows, ds.Columns = phantom.picture.shape
    ds.SequenceOfUltrasoundRegions = [_region(phantom)]
    return ds


def _region(phantom: Still) -> Dataset:
    x0, y0, x1, y1 = phantom.region
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = 1, 1, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = (
        x0,
        y0,
        x1,
        y1,
    )
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX = item.PhysicalDeltaY = round(phantom.mm_per_px / 10, 6)
    item.ReferencePixelX0, item.ReferencePixelY0 = (x1 - x0) // 2, 0
    item.ReferencePixelPhysicalValueX = item.ReferencePixelPhysicalValueY = 0.0
    item.TransducerFrequency = 9000
    return item


def segmentation(phantom: Still, image: Dataset) -> Dataset:
    """The drawn region as a binary Segmentation of the still, as 3D Slicer or a PACS plug-in stores one."""
    import highdicom as hd
    from highdicom.sr import CodedConcept

    mask = np.zeros((1, *phantom.picture.shape), np.uint8)
    x0, y0, x1, y1 = phantom.region
    mask[0, y0 : y1 + 1, x0 : x1 + 1] = phantom.roi
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Tumour",
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=CodedConcept("108369006", "SCT", "Neoplasm"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        tracking_uid=_uid(image.SOPInstanceUID.encode(), "tumour"),
        tracking_id="Tumour",
    )
    seg = hd.seg.Segmentation(
        source_images=[image], pixel_array=mask, segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment], series_instance_uid=_uid(image.SOPInstanceUID.encode(), "seg series"),
        series_number=50, sop_instance_uid=_uid(image.SOPInstanceUID.encode(), "seg"), instance_number=1,
        manufacturer="dicom-node", manufacturer_model_name="region phantom", software_versions="1",
        device_serial_number="0", series_description="Tumour, drawn by hand",
    )  # fmt: skip
    seg.PatientOrientation = ""  # type 2C of the General Image module, which highdicom leaves out
    return seg


def laboratory(phantom: Still, image: Dataset, uid_seed: int | None = None) -> Dataset:
    """Age and tumour markers in the study of the image."""
    values = [
        LabValue(name, MARKERS[name][0], "LN", MARKERS[name][1], phantom.blood[name], MARKERS[name][2])
        for name in MARKERS
    ]
    return write_lab_sr(image, values, uid_seed)


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """JPEG baseline, as scanners store stills."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def jpeg_round_trip(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a receiver of the JPEG file sees."""
    return np.asarray(Image.open(io.BytesIO(jpeg(picture))), np.uint8)


def _uid(key: bytes, what: str) -> str:
    """UUID-derived UID (PS3.5 B.2)."""
    digest = bytearray(hashlib.sha256(key + what.encode()).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x40, digest[8] & 0x3F | 0x80  # version 4, RFC 9562
    return f"2.25.{int.from_bytes(digest, 'big')}"

"""Writes a phantom clip as an Ultrasound Multi-frame Image (PS3.3 A.7). numpy, pydicom and Pillow only.

Runs where just the node is installed: `dicom-node demo` calls it as a process of its own. Nothing in the file tells the
node that the image is a phantom; the patient's name and the series description tell a person.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, UltrasoundMultiFrameImageStorage

ENCODINGS = ("jpeg", "raw", "rle")
_IMPLEMENTATION = "2.25.263416290284619736212483246107843214417"


class ClipLike(Protocol):
    """What a phantom must offer to be written as an ultrasound clip."""

    @property
    def frames(self) -> NDArray[np.uint8]: ...
    @property
    def frame_ms(self) -> float: ...
    @property
    def contrast(self) -> tuple[int, int, int, int]: ...
    @property
    def tissue(self) -> tuple[int, int, int, int]: ...
    @property
    def mm_per_px(self) -> float: ...


@dataclass(frozen=True)
class Labels:
    """What the header says beside the image."""

    description: str = "CEUS renal mass"
    body_part: str = "KIDNEY"
    laterality: str = "R"
    """Image Laterality R, L or B; "" = the attribute is absent and Laterality is empty (side unknown)."""
    patient_name: str = "PHANTOM^RENAL CEUS"
    patient_id: str = ""
    """Empty: derived from the UIDs."""
    agent: str = "SonoVue"
    uid_seed: int | None = None
    """None: random UIDs and the current date; else everything is a function of this number."""
    jpeg_quality: int = 92


class _Uids:
    def __init__(self, seed: int | None) -> None:
        self._key = secrets.token_bytes(16) if seed is None else seed.to_bytes(8, "big", signed=True)

    def __call__(self, what: str) -> str:
        """UUID-derived UID (PS3.5 B.2)."""
        digest = bytearray(hashlib.sha256(self._key + what.encode()).digest()[:16])
        digest[6], digest[8] = digest[6] & 0x0F | 0x40, digest[8] & 0x3F | 0x80  # version 4, RFC 9562
        return f"2.25.{int.from_bytes(digest, 'big')}"

    @property
    def short(self) -> str:
        return hashlib.sha256(self._key + b"patient").hexdigest()[:10].upper()


def dataset(clip: ClipLike, encoding: str = "jpeg", labels: Labels | None = None) -> Dataset:
    """The whole instance with its file meta information."""
    labels = labels or Labels()
    uids = _Uids(labels.uid_seed)
    ds = Dataset()
    _patient_study_series(ds, uids, labels)
    _image(ds, clip)
    ds.SOPClassUID = UltrasoundMultiFrameImageStorage
    ds.SOPInstanceUID = uids("instance")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    _pixels(ds, clip.frames, encoding, labels.jpeg_quality)
    return ds


def write(clip: ClipLike, path: Path, encoding: str = "jpeg", labels: Labels | None = None) -> Path:
    """Save as a Part 10 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(clip, encoding, labels).save_as(path, enforce_file_format=True)
    return path


def _patient_study_series(ds: Dataset, uids: _Uids, labels: Labels) -> None:
    now = datetime.datetime(2024, 1, 15, 9, 30) if labels.uid_seed is not None else datetime.datetime.now().astimezone()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName, ds.PatientID = labels.patient_name, labels.patient_id or f"PHANTOM-{uids.short}"
    ds.PatientBirthDate, ds.PatientSex = "19000101", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uids("study"), uids("series")
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = date
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = time
    ds.AcquisitionDateTime = date + time
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = f"A{uids.short}"[:16], "", "1"
    ds.StudyDescription, ds.SeriesDescription = labels.description, "CEUS simulated"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "US", 1, 1
    ds.Manufacturer, ds.ManufacturerModelName = "dicom-node", "CEUS phantom"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", "1"
    ds.BodyPartExamined = labels.body_part
    if labels.laterality:
        ds.ImageLaterality = labels.laterality
    else:
        ds.Laterality = ""
    if labels.agent:
        ds.ContrastBolusAgent = labels.agent
        ds.ContrastBolusRoute = "Intravenous"
        ds.ContrastBolusVolume = "2.4"


def _image(ds: Dataset, clip: ClipLike) -> None:
    # Value 3 RETROPERITONEAL and value 4 (2D imaging): PS3.3 C.8.5.6.1.1.
    ds.ImageType = ["ORIGINAL", "PRIMARY", "RETROPERITONEAL", "0001"]
    ds.PatientOrientation = ""
    ds.BurnedInAnnotation = "YES"
    ds.NumberOfFrames = len(clip.frames)
    ds.FrameIncrementPointer = 0x00181063
    ds.FrameTime = f"{clip.frame_ms:.3f}"
    ds.CineRate = max(1, round(1000 / clip.frame_ms))
    ds.TransducerType = "CURVED LINEAR"
    ds.UltrasoundColorDataPresent = 0
    ds.SequenceOfUltrasoundRegions = [
        _region(box, clip.mm_per_px) for box in sorted((clip.contrast, clip.tissue))
    ]  # in reading order: the order must not tell which panel is which


def _region(box: tuple[int, int, int, int], mm_per_px: float) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = 1, 1, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX = item.PhysicalDeltaY = round(mm_per_px / 10, 6)
    item.ReferencePixelX0 = (box[2] - box[0]) // 2
    item.ReferencePixelY0 = 0
    item.ReferencePixelPhysicalValueX = item.ReferencePixelPhysicalValueY = 0.0
    item.TransducerFrequency = 3500
    return item


def _pixels(ds: Dataset, frames: NDArray[np.uint8], encoding: str, quality: int) -> None:
    ds.Rows, ds.Columns, ds.SamplesPerPixel = frames.shape[1], frames.shape[2], 3
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PlanarConfiguration = 7, 0, 0
    ds.PhotometricInterpretation, ds.LossyImageCompression = "RGB", "00"
    if encoding == "jpeg":
        encoded = [jpeg(frame, quality) for frame in frames]
        ds.PhotometricInterpretation = "YBR_FULL_422"
        ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
        ds.LossyImageCompressionRatio = round(frames.nbytes / sum(map(len, encoded)), 2)
        _attach(ds, encapsulate(encoded), JPEGBaseline8Bit)
    elif encoding in ("raw", "rle"):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.PixelData = frames.tobytes()
        ds["PixelData"].VR = "OB"
        if encoding == "rle":
            ds.compress(RLELossless, generate_instance_uid=False)
            ds.PlanarConfiguration = 0
    else:
        raise ValueError(f"encoding: one of {', '.join(ENCODINGS)}, not {encoding!r}")


def _attach(ds: Dataset, data: bytes, syntax: Any) -> None:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = data
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


def jpeg(frame: NDArray[np.uint8], quality: int) -> bytes:
    """JPEG baseline, 4:2:2, as scanners send cine loops."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling="4:2:2")
    return buffer.getvalue()


def jpeg_round_trip(frame: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """What a receiver of the JPEG file sees."""
    return np.asarray(Image.open(io.BytesIO(jpeg(frame, quality))).convert("RGB"), np.uint8)

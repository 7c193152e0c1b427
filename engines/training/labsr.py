"""Clinical values of a phantom patient as a Structured Report beside the images: Enhanced SR, TID 1500 (PS3.16).

pydicom only. Every value is one NUM content item with a LOINC or SNOMED CT concept name and a UCUM unit; a value of one
of paired organs carries its side as modifier (272741003, SCT, "Laterality"): of the finding site (TID 1419) where the
site is given, else of the value itself (TID 300).
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, EnhancedSRStorage, ExplicitVRLittleEndian

_IMPLEMENTATION = "2.25.263416290284619736212483246107843214417"
_SIDES = {"R": ("24028007", "SCT", "Right"), "L": ("7771000", "SCT", "Left")}
_COPIED = (  # Patient, General Study and Patient Study (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2)
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber", "StudyDescription", "PatientAge",
)  # fmt: skip


@dataclass(frozen=True)
class LabValue:
    """One measurement."""

    name: str
    """Our key, for example "FSH"; the tracking identifier of its measurement group."""
    code: str
    scheme: str
    """LN (LOINC) or SCT."""
    meaning: str
    value: float
    unit: str
    """UCUM."""
    laterality: str = ""
    """R, L or "" for a value of the patient."""
    time: str = ""
    """ISO 8601; "" = when the study was made."""
    site: tuple[str, str, str] | None = None
    """Finding site: code, scheme, meaning."""


def write_lab_sr(image_dataset: Dataset, values: Sequence[LabValue], uid_seed: int | None = None) -> Dataset:
    """The report in the study of `image_dataset`, with file meta information. `uid_seed` None: random UIDs."""
    if not values:
        raise ValueError("a report needs a value")
    key = key_of(uid_seed)
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _COPIED:
        if keyword in image_dataset:
            ds[keyword] = copy.deepcopy(image_dataset[keyword])
    ds.SOPClassUID, ds.SOPInstanceUID = EnhancedSRStorage, uid(key, "lab sr")
    ds.SeriesInstanceUID = uid(key, "lab series")
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "SR", 99, 1
    ds.SeriesDescription = "Laboratory and measurements"
    ds.ReferencedPerformedProcedureStepSequence = []
    ds.Manufacturer, ds.ManufacturerModelName = "dicom-node", "laboratory phantom"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", "1"
    ds.ContentDate, ds.ContentTime = _when(image_dataset)
    ds.CompletionFlag, ds.VerificationFlag, ds.PreliminaryFlag = "COMPLETE", "UNVERIFIED", "FINAL"
    ds.PerformedProcedureCodeSequence = []
    _root(ds, values, key)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    return ds


def _root(ds: Dataset, values: Sequence[LabValue], key: bytes) -> None:
    """TID 1500 with one group of TID 1501 for each value: a group has one site and one side."""
    root = _item("", "CONTAINER", ("126000", "DCM", "Imaging Measurement Report"))
    for element in root:
        ds[element.tag] = element
    ds.ContentTemplateSequence = [_template("1500")]
    language = _code("HAS CONCEPT MOD", ("121049", "DCM", "Language of Content Item and Descendants"),
                     ("en-US", "RFC5646", "English (United States)"))  # fmt: skip
    observer = _code("HAS OBS CONTEXT", ("121005", "DCM", "Observer Type"), ("121007", "DCM", "Device"))
    device = _item("HAS OBS CONTEXT", "UIDREF", ("121012", "DCM", "Device Observer UID"))
    device.UID = uid(key, "device")
    procedure = _code("HAS CONCEPT MOD", ("121058", "DCM", "Procedure reported"),
                      ("363679005", "SCT", "Imaging procedure"))  # fmt: skip
    measurements = _item("CONTAINS", "CONTAINER", ("126010", "DCM", "Imaging Measurements"))
    measurements.ContentSequence = [_group(v, key) for v in values]
    ds.ContentSequence = [language, observer, device, procedure, measurements]


def _group(value: LabValue, key: bytes) -> Dataset:
    group = _item("CONTAINS", "CONTAINER", ("125007", "DCM", "Measurement Group"))
    group.ContentTemplateSequence = [_template("1501")]
    identifier = _item("HAS OBS CONTEXT", "TEXT", ("112039", "DCM", "Tracking Identifier"))
    identifier.TextValue = f"{value.name} {value.laterality}".strip()
    unique = _item("HAS OBS CONTEXT", "UIDREF", ("112040", "DCM", "Tracking Unique Identifier"))
    unique.UID = uid(key, f"tracking {identifier.TextValue}")
    group.ContentSequence = [identifier, unique, _number(value)]
    return group


def _number(value: LabValue) -> Dataset:
    item = _item("CONTAINS", "NUM", (value.code, value.scheme, value.meaning))
    if value.time:
        moment = datetime.datetime.fromisoformat(value.time)
        item.ObservationDateTime = moment.strftime("%Y%m%d%H%M%S%z")
    measured = Dataset()
    measured.NumericValue = f"{value.value:.6g}"
    measured.MeasurementUnitsCodeSequence = [_coded((value.unit, "UCUM", value.unit))]
    item.MeasuredValueSequence = [measured]
    modifiers = []
    side = None
    if value.laterality:
        side = _code("HAS CONCEPT MOD", ("272741003", "SCT", "Laterality"), _SIDES[value.laterality])
    if value.site:
        place = _code("HAS CONCEPT MOD", ("363698007", "SCT", "Finding Site"), value.site)
        if side is not None:
            place.ContentSequence = [side]
        modifiers.append(place)
    elif side is not None:
        modifiers.append(side)
    if modifiers:
        item.ContentSequence = modifiers
    return item


def _item(relationship: str, kind: str, concept: tuple[str, str, str]) -> Dataset:
    item = Dataset()
    if relationship:
        item.RelationshipType = relationship
    item.ValueType = kind
    item.ConceptNameCodeSequence = [_coded(concept)]
    if kind == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    return item


def _code(relationship: str, concept: tuple[str, str, str], value: tuple[str, str, str]) -> Dataset:
    item = _item(relationship, "CODE", concept)
    item.ConceptCodeSequence = [_coded(value)]
    return item


def _coded(code: tuple[str, str, str]) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _template(number: str) -> Dataset:
    item = Dataset()
    item.MappingResource, item.TemplateIdentifier = "DCMR", number
    return item


def _when(image: Dataset) -> tuple[str, str]:
    date = image.get("ContentDate") or image.get("StudyDate")
    if date:
        return str(date), str(image.get("ContentTime") or image.get("StudyTime") or "000000")
    now = datetime.datetime.now().astimezone()
    return now.strftime("%Y%m%d"), now.strftime("%H%M%S")


def key_of(uid_seed: int | None) -> bytes:
    """What UIDs are derived from: a number, or chance."""
    return secrets.token_bytes(16) if uid_seed is None else uid_seed.to_bytes(8, "big", signed=True)


def uid(key: bytes, what: str) -> str:
    """UUID-derived UID (PS3.5 B.2)."""
    digest = bytearray(hashlib.sha256(key + what.encode()).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x40, digest[8] & 0x3F | 0x80  # version 4, RFC 9562
    return f"2.25.{int.from_bytes(digest, 'big')}"

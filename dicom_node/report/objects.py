"""What an SR and a capture share: patient, study, equipment, time stamps, character set, encoding.

Both are built on `highdicom.base.SOPClass`; patient and study are then copied from the cleaned source header, because
the base class refuses values (a Patient's Sex of "U", a 70 character Patient ID) that a report has to live with, and
knows no retired source SOP Class. Everything the library takes from the clock or says about itself is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import BytesIO
from typing import Any, Final

from highdicom.base import SOPClass
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, Comprehensive3DSRStorage, ExplicitVRLittleEndian

from dicom_node import __version__
from dicom_node.report import codes
from dicom_node.report.context import ReportContext
from dicom_node.report.normalise import CARRIED
from dicom_node.report.uids import Uids
from dicom_node.result import Code, FrameRef
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.study import OWN_MODEL_NAME

MODEL_NAME: Final = OWN_MODEL_NAME
"""How the listener knows our objects when they come back (the loop guard)."""
_CODEC = {"GB18030": "gb18030", "ISO_IR 100": "latin-1"}
_SINGLE_FRAME = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.6.1",  # Ultrasound Image
        "1.2.840.10008.5.1.4.1.1.6",  # Ultrasound Image (retired)
        "1.2.840.10008.5.1.4.1.1.4",  # MR Image
        "1.2.840.10008.5.1.4.1.1.2",  # CT Image
        "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture Image
    }
)
_TEXT_VRS = frozenset({"SH", "LO", "ST", "LT", "UT", "UC", "PN"})


@dataclass(frozen=True, slots=True)
class Stamp:
    """The one time of all objects of a job, in the time zone that the source's own dates are in."""

    at: datetime

    @classmethod
    def of(cls, created: datetime, source: Dataset) -> Stamp:
        offset = str(source.get("TimezoneOffsetFromUTC", ""))
        if len(offset) == 5 and offset[0] in "+-" and offset[1:].isdigit():
            delta = timedelta(hours=int(offset[1:3]), minutes=int(offset[3:]))
            if delta < timedelta(hours=15):
                return cls(created.astimezone(timezone(-delta if offset[0] == "-" else delta)))
        return cls(created)

    @property
    def date(self) -> str:
        return self.at.strftime("%Y%m%d")

    @property
    def time(self) -> str:
        return self.at.strftime("%H%M%S.%f")

    @property
    def date_time(self) -> str:
        return self.at.strftime("%Y%m%d%H%M%S.%f%z")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which object this is."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    modality: str
    series_number: int
    instance_number: int
    series_description: str


def new_object(
    identity: Identity, source: Dataset, context: ReportContext, uids: Uids, transfer_syntax_uid: str, software: str
) -> Dataset:
    """Patient, study, series, equipment and SOP Common modules; the caller adds what its kind needs."""
    stamp = Stamp.of(context.created, source)
    versions: Any = [f"{MODEL_NAME} {__version__}", software] if software else f"{MODEL_NAME} {__version__}"
    made: Any = SOPClass(
        study_instance_uid=context.study_instance_uid,
        series_instance_uid=identity.series_instance_uid,
        series_number=identity.series_number,
        sop_instance_uid=identity.sop_instance_uid,
        sop_class_uid=identity.sop_class_uid,
        instance_number=identity.instance_number,
        modality=identity.modality,
        manufacturer=context.config.manufacturer,
        manufacturer_model_name=MODEL_NAME,
        software_versions=versions,
        device_serial_number=uids.device_serial_number(),
        transfer_syntax_uid=UID(transfer_syntax_uid),
        series_description=identity.series_description,
        content_date=stamp.date,
        content_time=stamp.time,
        series_date=stamp.date,
        series_time=stamp.time,
    )
    carry(source, made)
    made.StudyInstanceUID = context.study_instance_uid
    made.InstanceCreationDate, made.InstanceCreationTime = stamp.date, stamp.time
    made.InstanceCreatorUID = uids.device()
    made.StationName = context.config.station_name
    made.ContributingEquipmentSequence = list(_equipment(source, made, stamp))
    return made


def load_tables() -> None:
    """highdicom reads which attribute belongs to which IOD when the first object is made: a third of a second."""
    SOPClass(
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.1",
        series_number=1,
        sop_instance_uid="1.2.3.1.1",
        sop_class_uid=Comprehensive3DSRStorage,
        instance_number=1,
        modality="SR",
        manufacturer="none",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def carry(source: Dataset, made: Dataset) -> None:
    """Copy the attributes of the same patient and study."""
    for keyword in CARRIED:
        if keyword in source:
            made[keyword] = deepcopy(source[keyword])  # setting a value later would change the source too


def code_item(code: Code) -> Dataset:
    """One item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def frame_numbers(references: Iterable[FrameRef]) -> list[int] | None:
    """Referenced Frame Number (0008,1160) for frames of one instance; None = all of them, or a single-frame class.

    Some archives hold several frames in a class that has but one; a reference may not number them all the same.
    """
    group = list(references)
    used = sorted({r.frame_number for r in group})
    if group[0].sop_class_uid in _SINGLE_FRAME or len(used) >= group[0].number_of_frames:
        return None
    return used


def encode(made: Dataset, charset: str) -> bytes:
    """The Part 10 file, with our own implementation identity.

    Where the text does not fit the character set the destination asked for, UTF-8 is used all the same: a name with
    question marks in it would be another patient.
    """
    made.SpecificCharacterSet = charset if _fits(made, charset) else "ISO_IR 192"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = made.SOPClassUID
    meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    meta.TransferSyntaxUID = made.file_meta.TransferSyntaxUID
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    made.file_meta = meta
    out = BytesIO()
    dcmwrite(out, made, enforce_file_format=True)
    return out.getvalue()


def walk(dataset: Dataset) -> Iterator[Any]:
    """Every element, depth first."""
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from walk(item)


def _fits(made: Dataset, charset: str) -> bool:
    codec = _CODEC.get(charset)
    if codec is None:
        return True
    try:
        for element in walk(made):
            if element.VR in _TEXT_VRS:
                values: Sequence[Any] = element.value if element.VM > 1 else (element.value,)
                for value in values:
                    str(value or "").encode(codec)
    except UnicodeEncodeError:
        return False
    return True


def private_scheme() -> CodingSchemeIdentificationItem:
    """The item of Coding Scheme Identification Sequence (PS3.3 C.12.1.1.3) for 99INFER."""
    return CodingSchemeIdentificationItem(
        designator=codes.PRIVATE_SCHEME,
        name=codes.PRIVATE_SCHEME_NAME,
        responsible_organization=codes.PRIVATE_SCHEME_ORGANISATION,
    )


def _equipment(source: Dataset, made: Dataset, stamp: Stamp) -> Iterator[Dataset]:
    """PS3.3 C.12.1.5: what acquired the images, and what made this of them."""
    if source.get("Manufacturer"):
        acquired = Dataset()
        acquired.PurposeOfReferenceCodeSequence = [code_item(codes.ACQUISITION_EQUIPMENT)]
        for keyword in (
            "Manufacturer", "InstitutionName", "InstitutionAddress", "StationName", "ManufacturerModelName",
            "DeviceSerialNumber", "SoftwareVersions",
        ):  # fmt: skip
            if keyword in source:
                acquired[keyword] = source[keyword]
        yield acquired
    processed = Dataset()
    processed.PurposeOfReferenceCodeSequence = [code_item(codes.PROCESSING_EQUIPMENT)]
    for keyword in ("Manufacturer", "StationName", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions"):
        processed[keyword] = made[keyword]
    processed.ContributionDateTime = stamp.date_time
    yield processed

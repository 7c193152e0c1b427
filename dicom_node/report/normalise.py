"""The header of a source instance, made fit to be copied: a metadata-only data set with clean text.

Reads a stored file up to its pixel data, never decodes it. Only attributes named here are taken, so nothing unexpected
in the source can reach our objects. The stored file is not changed. The result

- has every Type 2 attribute of the Patient and General Study modules, empty where the source lacks it;
- has decoded text (PS3.5 6.1.2) without ISO 2022 escapes and control characters, to be written in any character set;
- has dates, times and numbers that PS3.5 6.2 allows, the others removed; Patient's Sex is M, F, O or empty;
- is free of the source's byte order, private attributes and incomplete code items.

Patient ID and the UIDs are copied as they are, whatever PS3.5 says of them: another value would be another patient.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Final

from pydicom import config, dcmread
from pydicom.datadict import dictionary_keyword, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.valuerep import validate_value

from dicom_node.errors import StoreError
from dicom_node.store.charset import Charset, charset_of

PATIENT: Final = (  # PS3.3 C.7.1.1, C.7.1.3
    "PatientName", "PatientID", "IssuerOfPatientID", "TypeOfPatientID", "IssuerOfPatientIDQualifiersSequence",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientIDsSequence",
    "OtherPatientNames", "EthnicGroup", "PatientComments", "QualityControlSubject", "ResponsiblePerson",
    "ResponsiblePersonRole", "ResponsibleOrganization", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence", "ClinicalTrialSponsorName", "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName", "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
)  # fmt: skip
STUDY: Final = (  # PS3.3 C.7.2.1, C.7.2.2, C.7.2.3
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "ReferringPhysicianName", "ReferringPhysicianIdentificationSequence",
    "ConsultingPhysicianName", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy",
    "ReferencedStudySequence", "ProcedureCodeSequence", "ReasonForPerformedProcedureCodeSequence",
    "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence", "PatientAge", "PatientSize", "PatientWeight",
    "MedicalAlerts", "Allergies", "SmokingStatus", "PregnancyStatus", "LastMenstrualDate", "PatientState",
    "Occupation", "AdditionalPatientHistory", "AdmissionID", "IssuerOfAdmissionIDSequence", "ServiceEpisodeID",
    "IssuerOfServiceEpisodeIDSequence", "ServiceEpisodeDescription",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription", "TimezoneOffsetFromUTC",
)  # fmt: skip
CARRIED: Final = PATIENT + STUDY
"""Copied into every object we create: it belongs to the same patient and study."""
CONSULTED: Final = (  # read, not copied as they stand
    "OtherPatientIDs",
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "BodyPartExamined",
    "NumberOfFrames", "FrameTime", "Rows", "Columns", "BurnedInAnnotation", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "RequestAttributesSequence",
    "RequestedProcedureDescription", "RequestedProcedureCodeSequence", "Manufacturer", "ManufacturerModelName",
    "InstitutionName", "InstitutionAddress", "StationName", "DeviceSerialNumber", "SoftwareVersions",
    "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices",
)  # fmt: skip
TYPE_2: Final = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
REFERENCED: Final = (  # of an image that a report refers to and takes neither patient nor study from
    "StudyInstanceUID", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
    "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices",
)  # fmt: skip
TAGS: Final = [tag for tag in map(tag_for_keyword, CARRIED + CONSULTED) if tag is not None]
_REFERENCED: Final = [tag for tag in map(tag_for_keyword, REFERENCED) if tag is not None]

_TEXT = frozenset({"SH", "LO", "UC", "PN"})
_LONG_TEXT = frozenset({"ST", "LT", "UT"})
_AS_IT_IS = frozenset({"PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"})
_VR = frozenset({"AS", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "SL", "SS", "TM", "UI", "UL", "US"})
_SPECIFIC_CHARACTER_SET = 0x00080005
_METHOD_CODES = "DeidentificationMethodCodeSequence"
_DEPTH = 4
_UNREADABLE = (ValueError, TypeError, NotImplementedError, KeyError, OverflowError, BytesLengthException, struct.error)

# PS3.5 6.1.2.5.3. pydicom keeps the escape of ISO 2022 IR 58 in the decoded text ("\x1b$)A…").
_ESCAPE = re.compile("\x1b[\x20-\x2f]*[\x30-\x7e]")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_CONTROL_LONG = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")  # PS3.5 6.1.3 allows TAB, LF, FF and CR in long text


def read_source(path: Path, fallback_charset: str = "") -> Dataset:
    """Read and normalise the header of a stored file. Raises StoreError.

    `fallback_charset`: for text that is not in the character set the file declares, as in `store.header`.
    """
    return normalise(_read(path, TAGS), fallback_charset)


def read_reference(path: Path) -> Dataset:
    """Read and normalise what a report needs of an image it only refers to: a stack has hundreds. Raises StoreError."""
    clean = Dataset()
    _copy_all(_read(path, _REFERENCED), _REFERENCED, clean, charset_of(()))  # none of it is localised text
    return clean


def _read(path: Path, tags: list[int]) -> Dataset:
    try:
        return dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
    except (OSError, InvalidDicomError, EOFError, *_UNREADABLE) as e:
        raise StoreError(f"the header of a source instance cannot be read ({type(e).__name__})") from None


def normalise(dataset: Dataset, fallback_charset: str = "") -> Dataset:
    """The clean copy; `dataset` is not changed."""
    clean = Dataset()
    _copy_all(dataset, TAGS, clean, _charset(dataset, charset_of((), fallback_charset)))
    if clean.get("PatientSex") not in ("M", "F", "O"):
        clean.PatientSex = ""
    if "OtherPatientIDs" in clean and "OtherPatientIDsSequence" not in clean:
        clean.OtherPatientIDsSequence = _other_ids(clean.OtherPatientIDs)
    if clean.get("PatientIdentityRemoved") == "YES" and not {"DeidentificationMethod", _METHOD_CODES} & set(
        clean.dir()
    ):
        clean.DeidentificationMethod = "not stated by the source"  # Type 1C, PS3.3 C.7.1.1
    for keyword in TYPE_2:
        if keyword not in clean:
            setattr(clean, keyword, None)
    return clean


def clean_text(text: str, *, long: bool = False) -> str:
    """Without escapes and control characters, and without the padding."""
    text = _ESCAPE.sub("", text)
    return (_CONTROL_LONG if long else _CONTROL).sub("", text).strip(" ")


def _charset(dataset: Dataset, inherited: Charset) -> Charset:
    """Of a data set or an item: its own Specific Character Set, else that of what holds it (PS3.5 6.1.2.5)."""
    if _SPECIFIC_CHARACTER_SET not in dataset:
        return inherited
    element = dataset.get_item(_SPECIFIC_CHARACTER_SET)
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        names = value.decode("ascii", "replace").split("\\")
    else:
        names = [value] if isinstance(value, str) else [str(v) for v in value or ()]
    return charset_of(names, inherited.fallback_name)


def _text_of(dataset: Dataset, tag: Any, charset: Charset) -> Any:
    """Localised text as read from the file, decoded by the one reader of text; None = not such a value.

    pydicom would keep the escapes of ISO 2022 IR 58, and refuse or garble what is not in the declared set.
    """
    raw = dataset.get_item(tag)
    if not isinstance(raw, RawDataElement) or not isinstance(raw.value, bytes):
        return None
    vr = dictionary_VR(raw.tag)
    if vr not in _TEXT | _LONG_TEXT:
        return None
    text = charset.decode(raw.value).rstrip(" \0")
    return text if vr in _LONG_TEXT or "\\" not in text else text.split("\\")


def _copy_all(dataset: Dataset, tags: list[int], clean: Dataset, charset: Charset) -> None:
    for tag in tags:
        if tag in dataset:
            _copy(dataset, tag, clean, 0, charset)


def _copy(dataset: Dataset, tag: Any, clean: Dataset, depth: int, charset: Charset) -> None:
    try:
        text = _text_of(dataset, tag, charset)
        if text is not None:
            vr, keyword = dictionary_VR(tag), dictionary_keyword(tag)
            if (value := _values(vr, keyword, text)) is not None:
                clean.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))
            return
        element = dataset[tag]
        vr = dictionary_VR(element.tag)
        if vr == "SQ":
            items = (
                []
                if element.VR != "SQ" or depth >= _DEPTH
                else _items(element.value, element.keyword, depth + 1, charset)
            )
            if items:
                clean.add(DataElement(element.tag, "SQ", Sequence(items)))
            return
        value = _values(vr, element.keyword, element.value)
    except _UNREADABLE:
        return
    if value is not None:
        clean.add(DataElement(element.tag, vr, value, validation_mode=config.IGNORE))


def _other_ids(values: Any) -> list[Dataset]:
    """Other Patient IDs (0010,1000) is retired; the sequence that replaced it says the same."""
    items = []
    for value in [values] if isinstance(values, str) else values:
        item = Dataset()
        item.add(DataElement("PatientID", "LO", value, validation_mode=config.IGNORE))
        item.TypeOfPatientID = "TEXT"
        items.append(item)
    return items


def _items(items: Any, keyword: str, depth: int, inherited: Charset) -> list[Dataset]:
    """The items with their public attributes; an item that lacks what makes it one is left out."""
    out = []
    for item in items:
        clean, charset = Dataset(), _charset(item, inherited)
        for tag in item.keys():  # noqa: SIM118  iterating a Dataset converts every element
            if not tag.is_private:
                _copy(item, tag, clean, depth, charset)
        if len(clean) and (not keyword.endswith("CodeSequence") or _is_code(clean)):
            out.append(clean)
    return out


def _is_code(item: Dataset) -> bool:
    """PS3.3 8.8: a value, a scheme where the value needs one, and a meaning."""
    if "URNCodeValue" in item:
        return "CodeMeaning" in item
    return (
        ("CodeValue" in item or "LongCodeValue" in item) and "CodingSchemeDesignator" in item and "CodeMeaning" in item
    )


def _values(vr: str, keyword: str, value: Any) -> Any:
    """The cleaned value, a list of them, or None when nothing is left."""
    if value is None or value == "":
        return None
    if isinstance(value, MultiValue | list | tuple):
        values = [v for v in (_value(vr, keyword, v) for v in value) if v is not None]
        # A number of a vector cannot be left out: the others would mean something else.
        return values if values and (len(values) == len(value) or vr in _TEXT) else None
    return _value(vr, keyword, value)


def _value(vr: str, keyword: str, value: Any) -> Any:
    if vr in _TEXT or vr in _LONG_TEXT:
        text = str(value)
        return (
            text
            if keyword in _AS_IT_IS and not _ESCAPE.search(text)
            else clean_text(text, long=vr in _LONG_TEXT) or None
        )
    if vr == "UI":
        return str(value) if keyword in _AS_IT_IS or re.fullmatch(r"[0-9.]{1,64}", str(value)) else None
    if vr not in _VR:
        return None
    if isinstance(value, str):
        value = value.strip(" \0")
        if vr == "DA":
            value = re.sub(r"^(\d{4})\.(\d\d)\.(\d\d)$", r"\1\2\3", value)  # ACR-NEMA 300, PS3.5 table 6.2-1 note
        elif vr == "TM":
            value = re.sub(r"^(\d\d):(\d\d):(\d\d(\.\d+)?)$", r"\1\2\3", value)
    if value == "":
        return None
    if vr in ("DS", "IS"):
        value = str(value)
    validate_value(vr, value, config.RAISE)
    return value

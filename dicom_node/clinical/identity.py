"""Who a study is of: what a source is asked with and compared to. Holds PHI; it never leaves a source's question."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from dicom_node.clinical.times import reference
from dicom_node.study import Study


@dataclass(frozen=True, slots=True)
class Subject:
    """The patient and the study. "" = the study does not say, or its instances differ."""

    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    issuer: str = field(repr=False)
    birth_date: str = field(repr=False)
    """YYYY-MM-DD."""
    accession_number: str = field(repr=False)
    images: datetime | None


def subject_of(study: Study) -> Subject:
    """Reports count too: they are instances of the study."""

    def one(keyword: str) -> str:
        said = {i.header.text(keyword).strip() for i in study.instances} - {""}
        return said.pop() if len(said) == 1 else ""

    birth = one("PatientBirthDate").replace(".", "")
    return Subject(
        study.study_instance_uid,
        one("PatientID"),
        one("IssuerOfPatientID"),
        f"{birth[:4]}-{birth[4:6]}-{birth[6:8]}" if len(birth) == 8 and birth.isdecimal() else "",
        one("AccessionNumber"),
        reference(study),
    )

"""Clinical values from Structured Reports: what counts, what is refused and why, what is never guessed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.clinical import Ucum, collect
from dicom_node.packages import ClinicalEntry
from dicom_node.study import Instance, Study
from engines.training.headers import instance_of
from engines.training.labsr import LabValue, write_lab_sr

FSH = ClinicalEntry.model_validate(
    {
        "name": "FSH",
        "code": {"value": "15067-2", "scheme": "LN", "meaning": "Follitropin"},
        "unit": "[IU]/L",
        "range": [0.1, 200],
        "max_age_days": 180,
    }
)
EDV = ClinicalEntry.model_validate(
    {
        "name": "EDV",
        "code": {"value": "11653-3", "scheme": "LN", "meaning": "End Diastolic Velocity"},
        "unit": "cm/s",
        "range": [0, 60],
        "per_side": True,
    }
)
AGE = ClinicalEntry.model_validate(
    {"name": "AGE", "code": {"value": "30525-0", "scheme": "LN", "meaning": "Age"}, "unit": "a", "range": [0, 120]}
)
UCUM = Ucum()


def image(**changes: Any) -> Dataset:
    ds = Dataset()
    ds.file_meta = Dataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.PatientName, ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "X", "1", "1.2.3", "1.2.3.1"
    ds.SOPInstanceUID, ds.SOPClassUID, ds.Modality = "1.2.3.1.1", "1.2.840.10008.5.1.4.1.1.6.1", "US"
    ds.StudyDate, ds.StudyTime = "20240601", "120000"
    for key, value in changes.items():
        setattr(ds, key, value)
    return ds


def number(value: float, unit: str = "[IU]/L", entry: ClinicalEntry = FSH, **more: Any) -> LabValue:
    return LabValue(entry.name, entry.code.value, entry.code.scheme, entry.code.meaning, value, unit, **more)


def study(*values: LabValue, change: Callable[[Dataset], None] | None = None, **header: Any) -> Study:
    picture = image(**header)
    instances: list[Instance] = [instance_of(picture)]
    if values:
        report = write_lab_sr(picture, values, uid_seed=1)
        if change:
            change(report)
        instances.append(instance_of(report))
    return Study.from_instances("1.2.3", 1, instances)


def test_a_laboratory_value_with_its_unit_time_and_source() -> None:
    found = collect(study(number(12.5, time="2024-05-20T08:30:00")), [FSH], UCUM)
    (value,) = found.values.values()
    assert (value.name, value.value, value.unit, value.time) == ("FSH", 12.5, "[IU]/L", "2024-05-20T08:30:00")
    assert (value.code.value, value.source, found.problems) == ("15067-2", "DICOM SR", ())


@pytest.mark.parametrize(
    ("value", "unit", "entry", "expected"),
    [(12.5, "m[IU]/mL", FSH, 12.5), (0.05, "m/s", EDV, 5.0), (0.012, "k[IU]/L", FSH, 12.0)],
)
def test_units_of_the_same_kind_are_converted(value: float, unit: str, entry: ClinicalEntry, expected: float) -> None:
    side = {"laterality": "R"} if entry.per_side else {}
    (found,) = collect(study(number(value, unit, entry, **side)), [entry], UCUM).values.values()
    assert (found.value, found.unit) == (pytest.approx(expected), entry.unit)


@pytest.mark.parametrize(
    ("lab", "entry", "said"),
    [
        (number(5, "mmol/L"), FSH, "CLINICAL_INPUT_UNIT(FSH): its unit cannot be converted to [IU]/L"),
        (number(5, "IU per litre"), FSH, "CLINICAL_INPUT_UNIT(FSH): its unit cannot be converted to [IU]/L"),
        (number(500), FSH, "CLINICAL_INPUT_IMPLAUSIBLE(FSH): outside the plausible range 0.1 to 200 [IU]/L"),
        (number(5, "cm/s", EDV), EDV, "CLINICAL_INPUT_SIDE(EDV): the source does not say of which side"),
        (
            number(5, time="2023-06-01T08:00:00"),
            FSH,
            "CLINICAL_INPUT_AGE(FSH): 366 days older than the images, at most 180 allowed",
        ),
        (
            number(5, time="2025-06-01T12:00:00"),
            FSH,
            "CLINICAL_INPUT_AGE(FSH): 365 days newer than the images, at most 180 allowed",
        ),
    ],
)
def test_what_cannot_be_used_is_said_and_not_used(lab: LabValue, entry: ClinicalEntry, said: str) -> None:
    found = collect(study(lab), [entry], UCUM)
    assert found.values == {}
    assert found.problems == (said,)


def test_each_side_has_its_own_value_wherever_the_side_is_written() -> None:
    testis = ("40689003", "SCT", "Testis")
    labs = [number(3, "cm/s", EDV, laterality="R"), number(6, "cm/s", EDV, laterality="L", site=testis)]
    found = collect(study(*labs), [EDV], UCUM).values
    assert {key: value.value for key, value in found.items()} == {"EDV R": 3.0, "EDV L": 6.0}


def test_the_newest_value_holds_and_two_of_one_time_must_agree() -> None:
    older, newer = number(30, time="2024-03-01T08:00:00"), number(12, time="2024-05-01T08:00:00")
    assert collect(study(older, newer), [FSH], UCUM).values["FSH"].value == 12
    twice = collect(study(number(12.0), number(12.4)), [FSH], UCUM)
    assert twice.values["FSH"].value == pytest.approx(12.2)
    torn = collect(study(number(12), number(20)), [FSH], UCUM)
    assert torn.values == {}
    assert torn.problems == ("CLINICAL_INPUT_CONFLICT(FSH): several values of the same time disagree (DICOM SR)",)


def test_age_comes_from_the_patients_age_attribute() -> None:
    assert collect(study(PatientAge="034Y"), [AGE], UCUM).values["AGE"].value == 34
    assert collect(study(PatientAge="018M"), [AGE], UCUM).values["AGE"].value == pytest.approx(1.5)
    assert collect(study(PatientAge="34"), [AGE], UCUM).values == {}


def test_a_duration_in_years_is_not_the_patients_age() -> None:
    duration = AGE.model_copy(update={"name": "YEARS", "code": FSH.code})
    assert collect(study(PatientAge="034Y"), [duration], UCUM).values == {}


def test_a_unit_that_is_not_ucum_is_said() -> None:
    def local(report: Dataset) -> None:
        group = report.ContentSequence[-1].ContentSequence[0]
        group.ContentSequence[-1].MeasuredValueSequence[0].MeasurementUnitsCodeSequence[
            0
        ].CodingSchemeDesignator = "99X"

    found = collect(study(number(12), change=local), [FSH], UCUM)
    assert (found.values, found.problems) == ({}, ("CLINICAL_INPUT_UNIT(FSH): its unit cannot be converted to [IU]/L",))


def test_a_unit_may_hold_a_factor() -> None:
    assert UCUM.convert(250, "10*3/uL", "10*9/L") == pytest.approx(250)
    assert UCUM.convert(2, "10.mL", "mL") == pytest.approx(20)


def test_our_own_report_is_never_a_source() -> None:
    """PACS -> node -> PACS: a number that this node wrote must not come back as evidence."""

    def own(report: Dataset) -> None:
        report.ManufacturerModelName = "dicom-node"

    assert collect(study(number(12), change=own), [FSH], UCUM).values == {}


def test_another_code_or_scheme_is_another_quantity() -> None:
    def other(report: Dataset) -> None:
        group = report.ContentSequence[-1].ContentSequence[0]
        group.ContentSequence[-1].ConceptNameCodeSequence[0].CodingSchemeDesignator = "99LOCAL"

    assert collect(study(number(12), change=other), [FSH], UCUM).values == {}


def test_a_report_of_endless_depth_is_cut_off() -> None:
    def deep(report: Dataset) -> None:
        item = report.ContentSequence[-1]
        for _ in range(200):
            inner = Dataset()
            inner.ValueType, inner.ContentSequence = "CONTAINER", item.ContentSequence
            item.ContentSequence = [inner]

    assert collect(study(number(12), change=deep), [FSH], UCUM).values == {}


def test_problems_and_values_hold_no_identity(tmp_path: Path) -> None:
    del tmp_path
    found = collect(study(number(5, "mmol/L"), PatientName="SECRET^NAME", PatientID="SECRETID"), [FSH], UCUM)
    assert "SECRET" not in repr(found)


def test_dates_with_dots_and_times_with_fractions_are_read() -> None:
    """ACR-NEMA dates and fractional seconds are in archives."""
    found = collect(study(number(5), StudyDate="2024.06.01", StudyTime="120000.123"), [FSH], UCUM)
    assert found.values["FSH"].value == 5
    assert datetime.datetime.fromisoformat(found.values["FSH"].time or "2024-06-01")


def test_a_volume_counts_only_where_the_report_says_that_it_is_of_the_organ() -> None:
    """A hydrocele has a volume and a side too."""
    volume = ClinicalEntry.model_validate(
        {
            "name": "VOLUME",
            "code": {"value": "118565006", "scheme": "SCT", "meaning": "Volume"},
            "unit": "mL",
            "range": [0.5, 60],
            "per_side": True,
            "site": {"value": "40689003", "scheme": "SCT", "meaning": "Testis"},
        }
    )
    of_testis = number(14, "mL", volume, laterality="R", site=("40689003", "SCT", "Testis"))
    of_hydrocele = number(30, "mL", volume, laterality="R", site=("55434001", "SCT", "Hydrocele"))
    unsaid = number(40, "mL", volume, laterality="R")
    found = collect(study(of_hydrocele, of_testis, unsaid), [volume], UCUM)
    assert {key: v.value for key, v in found.values.items()} == {"VOLUME R": 14.0}
    assert collect(study(of_hydrocele, unsaid), [volume], UCUM).values == {}

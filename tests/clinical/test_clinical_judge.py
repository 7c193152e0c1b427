"""Which of what the sources say a task may use: tables and properties of units, times, priority and conflicts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.clinical import ClinicalCode, CodeMap, Gathered, Observation, Ucum, collect
from dicom_node.clinical.times import moment, zone_of
from dicom_node.config_clinical import ORIGINS, Clinical
from dicom_node.packages import ClinicalEntry
from dicom_node.study import Study
from engines.training.headers import instance_of
from engines.training.labsr import LabValue, write_lab_sr

TESTIS, ARTERY = ("40689003", "SCT"), ("27175001", "SCT")
FSH = ClinicalEntry.model_validate(
    {"name": "FSH", "code": {"value": "15067-2", "scheme": "LN", "meaning": "Follitropin"}, "unit": "[IU]/L",
     "range": [0.1, 200], "max_age_days": 180}
)  # fmt: skip
EDV = ClinicalEntry.model_validate(
    {"name": "EDV", "code": {"value": "11653-3", "scheme": "LN", "meaning": "EDV"}, "unit": "cm/s", "range": [0, 60],
     "per_side": True, "repeated": "mean",
     "sites": [{"value": v, "scheme": s, "meaning": "x"} for v, s in (TESTIS, ARTERY)]}
)  # fmt: skip
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


STUDY = Study.from_instances("1.2.3", 1, [instance_of(image())])


def said(value: float, origin: str = "fhir", **more: Any) -> Observation:
    values: dict[str, Any] = {"code": ("15067-2", "LN"), "unit": "[IU]/L", "side": "", "time": "2024-05-20T08:00:00",
                              "site": ("", ""), "source": {"fhir": "FHIR"}.get(origin, origin)}  # fmt: skip
    return Observation(value=value, origin=origin, **(values | more))


def judged(*observations: Observation, entry: ClinicalEntry = FSH, study: Study = STUDY, **more: Any) -> Any:
    return collect(study, [entry], UCUM, Gathered(observations), **more)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"unit": ""}, "CLINICAL_INPUT_UNIT"),
        ({"unit": "mmol/L"}, "CLINICAL_INPUT_UNIT"),
        ({"unit": "ng/mL"}, "CLINICAL_INPUT_UNIT"),
        ({"value": 500}, "CLINICAL_INPUT_IMPLAUSIBLE"),
        ({"value": -1}, "CLINICAL_INPUT_IMPLAUSIBLE"),
        ({"unit": "k[IU]/L"}, "CLINICAL_INPUT_IMPLAUSIBLE"),
        ({"inexact": True}, "CLINICAL_INPUT_INEXACT"),
        ({"time": ""}, "CLINICAL_INPUT_TIME"),
        ({"time": "2024-05"}, "CLINICAL_INPUT_TIME"),
        ({"time": "2023-11-30"}, "CLINICAL_INPUT_AGE"),
        ({"time": "2024-12-01T00:00:00"}, "CLINICAL_INPUT_AGE"),
    ],
)
def test_each_reason_not_to_use_a_value_has_its_code(change: dict[str, Any], code: str) -> None:
    found = judged(said(**({"value": 12.0} | change)))
    assert found.values == {}
    assert found.problems[0].startswith(f"{ClinicalCode(code)}(FSH): ")


def test_a_value_without_a_side_is_of_neither_testis() -> None:
    found = judged(said(3, code=("11653-3", "LN"), unit="cm/s"), entry=EDV)
    assert found.values == {} and found.problems[0].startswith("CLINICAL_INPUT_SIDE(EDV)")


def test_images_without_a_date_let_no_outside_value_in() -> None:
    """Nobody could say how old it is."""
    study = Study.from_instances("1.2.3", 1, [instance_of(image(StudyDate=""))])
    found = judged(said(12), study=study)
    assert found.values == {} and found.problems[0].startswith("CLINICAL_INPUT_TIME")


@given(
    value=st.floats(0.2, 190, allow_nan=False),
    unit=st.sampled_from(["[IU]/L", "m[IU]/mL", "[IU]/mL", "k[IU]/L", "m[IU]/L", "u[IU]/mL", "[iU]/dL"]),
)
@settings(max_examples=60, deadline=None)
def test_a_value_is_the_same_in_every_unit_of_its_kind(value: float, unit: str) -> None:
    """There and back through UCUM; what is used stands in the task's unit, to six digits."""
    written = UCUM.convert(value, "[IU]/L", unit)
    assert written is not None
    found = judged(said(written, unit=unit))
    assert found.values["FSH"].value == pytest.approx(value, rel=1e-5)
    assert found.values["FSH"].unit == "[IU]/L"


OLD, NEW = "2024-04-01T08:00:00", "2024-05-20T08:00:00"


@pytest.mark.parametrize(
    ("observations", "value", "source"),
    [
        ([said(12, "fhir"), said(12.2, "sidecar")], 12, "FHIR, agrees with sidecar"),
        ([said(12, "fhir"), said(20, "sidecar")], None, "FHIR and sidecar disagree"),
        ([said(12, "fhir", time=NEW), said(20, "sidecar", time=OLD)], 12, "FHIR"),
        ([said(12, "fhir", time=OLD), said(20, "sidecar", time=NEW)], None, "FHIR and sidecar disagree"),
        ([said(12, "fhir", time="2024-05-20"), said(20, "sidecar", time="2024-05-19T20:00:00")], None, "disagree"),
        ([said(500, "fhir"), said(20, "sidecar")], 20, "sidecar"),
        ([said(12, "fhir", time="2023-01-01"), said(20, "sidecar")], 20, "sidecar"),
        ([said(12, "fhir"), said(20, "fhir")], None, "of the same time disagree (FHIR)"),
        ([said(12, "fhir"), said(20, "sidecar"), said(12, "sidecar")], 12, "FHIR"),
        ([said(12, "fhir", time=NEW), said(30, "fhir", time=OLD)], 12, "FHIR"),
    ],
)
def test_sources_side_by_side(observations: list[Observation], value: float | None, source: str) -> None:
    found = judged(*observations)
    if value is None:
        assert found.values == {}
        assert any(p.startswith("CLINICAL_INPUT_CONFLICT(FSH)") and source in p for p in found.problems)
    else:
        assert (found.values["FSH"].value, found.values["FSH"].source) == (value, source)


def test_the_configured_priority_decides() -> None:
    both = [said(12.0, "fhir"), said(12.2, "sidecar")]
    for order in itertools.permutations(ORIGINS):
        found = judged(*both, priority=order).values["FSH"]
        first = min(("fhir", "sidecar"), key=order.index)
        assert found.value == {"fhir": 12.0, "sidecar": 12.2}[first]


@given(
    observations=st.lists(
        st.builds(
            said,
            st.sampled_from([0.0, 3.0, 3.1, 12.0, 12.3, 100.0, 999.0]),
            st.sampled_from(["fhir", "sidecar"]),
            unit=st.sampled_from(["[IU]/L", "m[IU]/mL", "kg"]),
            time=st.sampled_from(["", "2022-01-01", "2024-05-20", "2024-05-20T08:00:00Z", "2024-05-31T23:00:00"]),
            inexact=st.booleans(),
        ),
        max_size=6,
    ),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_whatever_the_sources_say(observations: list[Observation], seed: Any) -> None:
    """The answer depends on no order, is in range and from a usable value, and nothing disappears without a word."""
    found = judged(*observations)
    shuffled = list(observations)
    seed.shuffle(shuffled)
    again = judged(*shuffled)
    assert found.values == again.values and set(found.problems) == set(again.problems)
    for value in found.values.values():
        assert 0.1 <= value.value <= 200 and value.unit == "[IU]/L" and moment(value.time) is not None
    assert not observations or found.values or found.problems


def test_times_with_an_offset_are_brought_to_the_studys_zone() -> None:
    """A FHIR server writes UTC; 22:30 of the day before is 00:30 in Berlin."""
    study = Study.from_instances("1.2.3", 1, [instance_of(image(TimezoneOffsetFromUTC="+0200"))])
    zone = zone_of(study)
    assert moment("2024-05-19T22:30:00Z", zone) == moment("2024-05-20T00:30:00")
    assert moment("2024-05-19T22:30:00Z", None) == moment("2024-05-19T22:30:00")
    newer, older = said(9, time="2024-05-19T23:30:00Z"), said(5, time="2024-05-20T01:00:00")
    assert judged(newer, older, study=study).values["FSH"].value == 9


def test_what_was_gathered_is_the_same_after_a_trip_through_the_ledger() -> None:
    gathered = Gathered((said(12, site=TESTIS, side="R", inexact=True),), ("a problem",))
    assert Gathered.from_json(gathered.to_json()) == gathered
    assert Gathered.from_json(None) == Gathered()


# -- reports of the scanner


def velocity(value: float, side: str = "R", **more: Any) -> LabValue:
    return LabValue("EDV", "11653-3", "LN", "End Diastolic Velocity", value, "cm/s", laterality=side, **more)


def report(*values: LabValue, **header: Any) -> tuple[Dataset, list[Dataset]]:
    """The report and its NUM items."""
    made = write_lab_sr(image(), values, uid_seed=1)
    for key, value in header.items():
        setattr(made, key, value)
    return made, [group.ContentSequence[-1] for group in made.ContentSequence[-1].ContentSequence]


def of(*reports: Dataset, entry: ClinicalEntry = EDV, codes: CodeMap | None = None) -> Any:
    study = Study.from_instances("1.2.3", 1, [instance_of(image()), *map(instance_of, reports)])
    return collect(study, [entry], UCUM, codes=codes)


def modifier(item: Dataset, concept: tuple[str, str], value: tuple[str, str]) -> None:
    child = Dataset()
    child.RelationshipType, child.ValueType = "HAS CONCEPT MOD", "CODE"
    for keyword, code in (("ConceptNameCodeSequence", concept), ("ConceptCodeSequence", value)):
        coded = Dataset()
        coded.CodeValue, coded.CodingSchemeDesignator, coded.CodeMeaning = *code, "x"
        setattr(child, keyword, [coded])
    item.ContentSequence = [*item.get("ContentSequence", []), child]


def test_several_heart_beats_give_their_mean_and_the_report_says_so() -> None:
    made, _ = report(velocity(3), velocity(4), velocity(5))
    (value,) = of(made).values.values()
    assert (value.value, value.source) == (4, "DICOM SR, mean of 3 measurements")


def test_beats_that_are_not_of_one_artery_give_nothing() -> None:
    made, _ = report(velocity(3), velocity(30))
    found = of(made)
    assert found.values == {} and found.problems[0].startswith("CLINICAL_INPUT_CONFLICT(EDV R)")


@pytest.mark.parametrize(
    ("concept", "value"), [(("121404", "DCM"), ("121410", "DCM")), (("121401", "DCM"), ("R-00317", "SRT"))]
)
def test_the_measurement_that_stands_for_all_holds(concept: tuple[str, str], value: tuple[str, str]) -> None:
    """Selection Status, or the derivation mean as the scanner made it (TID 300)."""
    made, items = report(velocity(3), velocity(4.4), velocity(30))
    modifier(items[1], concept, value)
    (found,) = of(made).values.values()
    assert (found.value, found.source) == (4.4, "DICOM SR")


def test_a_velocity_of_another_artery_is_not_the_testiss() -> None:
    made, _ = report(velocity(40, site=("69105007", "SCT", "Carotid artery")), velocity(3, site=(*ARTERY, "x")))
    (value,) = of(made).values.values()
    assert value.value == 3


def test_retired_codes_of_older_scanners_are_read() -> None:
    """Site and side as SNOMED RT."""
    made, items = report(velocity(3, site=("T-94000", "SRT", "Testis")))
    side = items[0].ContentSequence[0].ContentSequence[0]
    side.ConceptCodeSequence[0].CodeValue, side.ConceptCodeSequence[0].CodingSchemeDesignator = "G-A100", "SRT"
    side.ConceptNameCodeSequence[0].CodeValue = "G-C171"
    side.ConceptNameCodeSequence[0].CodingSchemeDesignator = "SRT"
    assert list(of(made).values) == ["EDV R"]


def test_both_sides_is_not_the_side_around_it() -> None:
    """A value marked bilateral in a group marked right is not the right one's."""
    made, items = report(velocity(3, ""))
    modifier(made.ContentSequence[-1], ("272741003", "SCT"), ("24028007", "SCT"))
    assert list(of(made).values) == ["EDV R"]
    modifier(items[0], ("272741003", "SCT"), ("51440002", "SCT"))
    found = of(made)
    assert found.values == {} and found.problems[0].startswith("CLINICAL_INPUT_SIDE")


@pytest.mark.parametrize(("model", "known"), [("SuperScan 9", True), ("superscan 9", True), ("Other", False)])
def test_a_vendors_private_code_counts_for_its_model(model: str, known: bool) -> None:
    section = Clinical.model_validate(
        {"codes": [{"code": {"value": "V-EDV-R", "scheme": "99VENDOR"}, "means": {"value": "11653-3", "scheme": "LN"},
                    "model": "SuperScan 9", "unit": "m/s", "laterality": "R"}]}
    )  # fmt: skip
    made, items = report(velocity(0.04, ""), ManufacturerModelName=model)
    name = items[0].ConceptNameCodeSequence[0]
    name.CodeValue, name.CodingSchemeDesignator = "V-EDV-R", "99VENDOR"
    items[0].MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodingSchemeDesignator = "99VENDOR"
    found = of(made, codes=CodeMap(section.codes, section.sites))
    assert {k: v.value for k, v in found.values.items()} == ({"EDV R": 4.0} if known else {})

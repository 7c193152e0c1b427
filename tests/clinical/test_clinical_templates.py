"""Reports as others write them: TID 1500 beside highdicom's own reader, vascular and general ultrasound reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import pytest
from highdicom.sr import CodedConcept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from dicom_node.clinical import Ucum, collect
from dicom_node.clinical.codes import LEFT, RIGHT, CodeMap
from dicom_node.clinical.model import Observation
from dicom_node.clinical.reports import in_reports
from dicom_node.config_clinical import PrivateSite
from dicom_node.packages import ClinicalEntry, wanted_of
from dicom_node.store.header import read_header
from dicom_node.study import Instance, Study

REPOSITORY = Path(__file__).parent.parent.parent
SIDES = {"R": codes.SCT.Right, "L": codes.SCT.Left, "": None}
QUANTITIES = {
    "FSH": (CodedConcept("15067-2", "LN", "Follitropin"), CodedConcept("[IU]/L", "UCUM", "IU/L")),
    "volume": (CodedConcept("118565006", "SCT", "Volume"), CodedConcept("mL", "UCUM", "mL")),
    "EDV": (CodedConcept("11653-3", "LN", "End Diastolic Velocity"), CodedConcept("m/s", "UCUM", "m/s")),
}
SITES = {
    "testis": CodedConcept("40689003", "SCT", "Testis"),
    "artery": CodedConcept("27175001", "SCT", "Testicular artery"),
    "": None,
}
SAID = tuple[str, float, str, str, str]
"""Code, value, unit, side, site."""


def picture() -> Dataset:
    ds = Dataset()
    ds.file_meta = Dataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "X^Y", "1", "", "M"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.6.1", generate_uid(), "US"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", generate_uid()
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240601", "120000", "1", ""
    ds.ReferringPhysicianName = ""
    ds.Rows = ds.Columns = 8
    return ds


def measurement(what: str, value: float, side: str, site: str, derivation: Any = None) -> hd.sr.Measurement:
    name, unit = QUANTITIES[what]
    where = [hd.sr.FindingSite(SITES[site], laterality=SIDES[side])] if SITES[site] is not None else None
    return hd.sr.Measurement(name, value, unit, derivation=derivation, finding_sites=where)


def group(number: int, *measurements: hd.sr.Measurement, **more: Any) -> Any:
    tracking = hd.sr.TrackingIdentifier(uid=generate_uid(), identifier=f"group {number}")
    return hd.sr.MeasurementsAndQualitativeEvaluations(tracking, measurements=measurements, **more)


def write(path: Path, groups: list[Any]) -> Path:
    """TID 1500 as highdicom writes it."""
    device = hd.sr.ObserverContext(codes.DCM.Device, hd.sr.DeviceObserverIdentifyingAttributes(uid=generate_uid()))
    content = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(observer_device_context=device),
        CodedConcept("363679005", "SCT", "Imaging procedure"), imaging_measurements=groups,
    )  # fmt: skip
    report = hd.sr.Comprehensive3DSR(
        [picture()], content[0], generate_uid(), 9, generate_uid(), 1, manufacturer="Other", is_complete=True
    )
    report.ContentDate, report.ContentTime = "20240601", "110000"
    report.save_as(path, enforce_file_format=True)
    return path


def as_highdicom_reads(path: Path) -> list[SAID]:
    found = []
    for each in hd.sr.srread(path).content.get_image_measurement_groups():
        for one in each.get_measurements():
            where = one.finding_sites
            side, site = "", ""
            if where:
                site = where[0].value.value
                side = {RIGHT[0]: "R", LEFT[0]: "L"}[where[0].laterality.value] if where[0].laterality else ""
            found.append((one.name.value, one.value, one.unit.value, side, site))
    return sorted(found)


def stored(path: Path) -> Study:
    instances = [Instance("0" * 32, read_header(path), "", "", path, "", "", "", "", 0.0)]
    image = path.with_suffix(".image.dcm")
    picture().save_as(image, enforce_file_format=True)
    instances.append(Instance("1" * 32, read_header(image), "", "", image, "", "", "", "", 0.0))
    return Study.from_instances("1.2.3", 1, instances)


def observations(path: Path, codes_of_site: CodeMap | None = None) -> list[Observation]:
    return in_reports(stored(path), codes_of_site or CodeMap())


def as_the_node_reads(path: Path) -> list[SAID]:
    return sorted((o.code[0], o.value, o.unit, o.side, o.site[0]) for o in observations(path))


VALUES = st.floats(1e-3, 1e6, allow_nan=False).map(lambda v: float(f"{v:.7g}"))
"""As far as a Decimal String holds them (PS3.5 6.2: 16 characters)."""
ITEMS = st.tuples(
    st.sampled_from(sorted(QUANTITIES)), VALUES, st.sampled_from(["R", "L"]), st.sampled_from(sorted(SITES))
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ITEMS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_highdicom_writes_is_read_as_highdicom_reads_it(tmp_path: Path, groups: Any) -> None:
    """Values, units, sides and sites; also in the transfer syntax that has no VRs."""
    made = [group(n, *(measurement(*item) for item in items)) for n, items in enumerate(groups)]
    path = write(tmp_path / "report.dcm", made)
    expected = as_highdicom_reads(path)
    assert len(expected) == sum(map(len, groups))
    assert as_the_node_reads(path) == expected
    again = dcmread(path)
    again.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    again.save_as(tmp_path / "implicit.dcm", implicit_vr=True)
    assert as_the_node_reads(tmp_path / "implicit.dcm") == expected


def wanted() -> list[ClinicalEntry]:
    """What the task of the repository asks for."""
    return list(wanted_of((REPOSITORY / "engines",))("testis_noa"))


def judged(path: Path, codes_of_site: CodeMap | None = None) -> dict[str, tuple[float, str]]:
    found = collect(stored(path), wanted(), Ucum(), codes=codes_of_site)
    return {key: (value.value, value.unit) for key, value in found.values.items()}


def test_the_task_gets_each_value_of_such_a_report_in_its_own_unit(tmp_path: Path) -> None:
    """Site and side at the group, as 3D Slicer and others write them, or at the measurement."""
    right = hd.sr.FindingSite(SITES["testis"], laterality=SIDES["R"])
    path = write(
        tmp_path / "report.dcm",
        [
            group(1, measurement("FSH", 21.5, "", "")),
            group(2, measurement("volume", 9.5, "", ""), measurement("EDV", 0.031, "", ""), finding_sites=[right]),
            group(3, measurement("volume", 14.0, "L", "testis")),
            group(4, measurement("EDV", 0.05, "L", "artery"), measurement("EDV", 0.07, "L", "artery", codes.SCT.Mean)),
        ],
    )
    assert judged(path) == {
        "FSH": (21.5, "[IU]/L"),
        "TESTICULAR_VOLUME R": (9.5, "mL"), "EDV R": (3.1, "cm/s"),
        "TESTICULAR_VOLUME L": (14.0, "mL"), "EDV L": (7.0, "cm/s"),
    }  # fmt: skip


def test_the_volume_of_a_finding_in_the_testis_is_not_the_volume_of_the_testis(tmp_path: Path) -> None:
    """TID 1501: Finding says what was measured, Finding Site where it lies."""
    right = hd.sr.FindingSite(SITES["testis"], laterality=SIDES["R"])
    tumour = CodedConcept("126906006", "SCT", "Neoplasm of testis")
    of_tumour = group(1, measurement("volume", 3.0, "R", "testis"), finding_type=tumour, finding_sites=[right])
    assert judged(write(tmp_path / "one.dcm", [of_tumour])) == {}
    of_testis = group(2, measurement("volume", 12.0, "", ""), finding_type=SITES["testis"], finding_sites=[right])
    both = write(tmp_path / "both.dcm", [of_tumour, of_testis])
    assert judged(both) == {"TESTICULAR_VOLUME R": (12.0, "mL")}


# -- TID 5100 and TID 12000: trees by hand, since no library writes them


def coded(value: str, scheme: str, meaning: str = "x") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def node(kind: str, name: tuple[str, str], *children: Dataset, relation: str = "CONTAINS", **more: Any) -> Dataset:
    item = Dataset()
    item.RelationshipType, item.ValueType, item.ConceptNameCodeSequence = relation, kind, [coded(*name)]
    if children:
        item.ContentSequence = list(children)
    for key, value in more.items():
        setattr(item, key, value)
    return item


def modifier(name: tuple[str, str], value: tuple[str, str]) -> Dataset:
    return node("CODE", name, relation="HAS CONCEPT MOD", ConceptCodeSequence=[coded(*value)])


def num(name: tuple[str, str], value: str, unit: str, *children: Dataset) -> Dataset:
    measured = Dataset()
    measured.NumericValue, measured.MeasurementUnitsCodeSequence = value, [coded(unit, "UCUM")]
    return node("NUM", name, *children, MeasuredValueSequence=[measured])


def report_of(path: Path, template: str, title: tuple[str, str], *children: Dataset) -> Path:
    ds = picture()
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.33", "SR"
    ds.ContentDate, ds.ContentTime = "20240601", "113000"
    ds.ValueType, ds.ConceptNameCodeSequence, ds.ContinuityOfContent = "CONTAINER", [coded(*title)], "SEPARATE"
    used = Dataset()
    used.MappingResource, used.TemplateIdentifier = "DCMR", template
    ds.ContentTemplateSequence, ds.ContentSequence = [used], list(children)
    ds.save_as(path, enforce_file_format=True)
    return path


EDV_NAME, PSV = ("11653-3", "LN"), ("11726-7", "LN")
VOLUME = ("118565006", "SCT")
FINDINGS = {"now": ("59776-5", "LN"), "then": ("121070", "DCM")}
SITE = {"now": ("363698007", "SCT"), "then": ("G-C0E3", "SRT")}
LATERALITY = {"now": ("272741003", "SCT"), "then": ("G-C171", "SRT")}
SIDE_CODE = {"now": {"R": RIGHT, "L": LEFT}, "then": {"R": ("G-A100", "SRT"), "L": ("G-A101", "SRT")}}


def vascular_section(when: str, side: str, *groups: Dataset) -> Dataset:
    """TID 5103: the section has the side, its groups are named by the vessel (TID 5104)."""
    scope = modifier(SITE[when], ("20233005", "SCT"))  # scrotum
    return node(
        "CONTAINER", FINDINGS[when], scope, modifier(LATERALITY[when], SIDE_CODE[when][side]), *groups
    )  # fmt: skip


@pytest.mark.parametrize("when", ["now", "then"])
def test_a_vascular_report_gives_the_velocity_of_the_vessel_that_names_the_group(when: str, tmp_path: Path) -> None:
    """TID 5100, with the codes of today and those of before SNOMED CT; another vessel of the section does not count."""
    selected = node("CODE", ("121404", "DCM"), relation="HAS PROPERTIES", ConceptCodeSequence=[coded("121410", "DCM")])
    artery, other = ("27175001", "SCT"), ("12691009", "SCT")
    angle = num(("125106", "DCM"), "42", "deg")
    path = report_of(
        tmp_path / "report.dcm", "5100", ("126000", "DCM"),
        vascular_section(
            when, "R",
            node("CONTAINER", artery, num(PSV, "12.5", "cm/s"), num(EDV_NAME, "0.04", "m/s"),
                 num(EDV_NAME, "3.6", "cm/s", selected, angle)),
            node("CONTAINER", other, num(EDV_NAME, "17", "cm/s")),
        ),
        vascular_section(when, "L", node("CONTAINER", artery, num(EDV_NAME, "5.1", "cm/s"))),
    )  # fmt: skip
    assert judged(path) == {"EDV R": (3.6, "cm/s"), "EDV L": (5.1, "cm/s")}
    assert {o.site for o in observations(path)} == {artery, other}


def test_a_vessel_without_a_side_is_of_no_side(tmp_path: Path) -> None:
    """ "Unilateral" is a side of TID 5103 too; the section above does not lend its own."""
    artery = ("27175001", "SCT")
    unpaired = vascular_section("now", "R", node("CONTAINER", artery, modifier(LATERALITY["now"], ("66459002", "SCT")),
                                                 num(EDV_NAME, "4", "cm/s")))  # fmt: skip
    path = report_of(tmp_path / "report.dcm", "5100", ("126000", "DCM"), unpaired)
    found = collect(stored(path), wanted(), Ucum())
    assert found.values == {}
    assert found.problems == ("CLINICAL_INPUT_SIDE(EDV): the source does not say of which side",)


def test_a_scrotal_ultrasound_report_gives_volumes_and_velocities_of_each_side(tmp_path: Path) -> None:
    """TID 12000 with the title of CID 12320: measurement groups, each value with its own Finding Site and side."""

    def at(site: tuple[str, str], side: str) -> Dataset:
        where = modifier(SITE["now"], site)
        where.ContentSequence = [modifier(LATERALITY["now"], SIDE_CODE["now"][side])]
        return where

    def measured(*items: Dataset) -> Dataset:
        return node("CONTAINER", ("126010", "DCM"), node("CONTAINER", ("125007", "DCM"), *items))

    testis, epididymis = ("40689003", "SCT"), ("87644002", "SCT")
    path = report_of(
        tmp_path / "report.dcm", "12000", ("25002-7", "LN"),
        measured(num(VOLUME, "11.5", "mL", at(testis, "R")), num(VOLUME, "1.5", "mL", at(epididymis, "R"))),
        measured(num(VOLUME, "0.0135", "L", at(testis, "L")), num(EDV_NAME, "2.5", "cm/s", at(testis, "L"))),
    )  # fmt: skip
    assert judged(path) == {
        "TESTICULAR_VOLUME R": (11.5, "mL"), "TESTICULAR_VOLUME L": (13.5, "mL"), "EDV L": (2.5, "cm/s"),
    }  # fmt: skip


def test_a_vendors_own_code_for_the_organ_may_name_the_container(tmp_path: Path) -> None:
    """clinical.sites maps it; unmapped it says nothing, and a volume of nothing is not used."""
    private = node("CONTAINER", ("GEU-1005-16", "99GEMS"), num(VOLUME, "8", "mL"))
    path = report_of(tmp_path / "report.dcm", "5100", ("126000", "DCM"), private)
    assert judged(path) == {}
    known = PrivateSite.model_validate(
        {"code": {"value": "GEU-1005-16", "scheme": "99GEMS"}, "means": {"value": "40689003", "scheme": "SCT"},
         "laterality": "R"}
    )  # fmt: skip
    assert judged(path, CodeMap((), [known])) == {"TESTICULAR_VOLUME R": (8.0, "mL")}

"""The content of the Structured Report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.report import Predecessor, Region, Variant
from dicom_node.report.codes import private_codes
from dicom_node.result import ClinicalInput, Code, FrameRef, Refusal, RefusalCode, Score

MARK = "TRAINED ON SIMULATED IMAGES - NOT A PATIENT RESULT"
OUTCOME = Code("PROB-HIGHGRADE", "99INFER", "Probability of high nuclear grade")
RESEARCH = "Research use only. Not for clinical use."


def items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence", []):
        yield item
        yield from items(item)


def named(ds: Dataset, code: str) -> list[Dataset]:
    return [i for i in items(ds) if i.ConceptNameCodeSequence[0].get("CodeValue") == code]


def texts(ds: Dataset, code: str) -> list[str]:
    return [i.TextValue for i in named(ds, code)]


@pytest.mark.parametrize("kind", ["comprehensive3d", "enhanced"])
def test_a_result_is_a_tid_1500_report_that_no_person_has_verified(case: Any, kind: str) -> None:
    ds = case.sr(sr=kind)
    uid = {"comprehensive3d": "1.2.840.10008.5.1.4.1.1.88.34", "enhanced": "1.2.840.10008.5.1.4.1.1.88.22"}[kind]
    assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == uid
    assert (ds.Modality, ds.SeriesNumber) == ("SR", 9000)
    assert (ds.CompletionFlag, ds.PreliminaryFlag, ds.VerificationFlag) == ("COMPLETE", "PRELIMINARY", "UNVERIFIED")
    assert ds.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (group,) = named(ds, "125007")
    assert group.ContentTemplateSequence[0].TemplateIdentifier == "1501"
    assert ds.StudyInstanceUID == case.report_context().study_instance_uid and ds.AccessionNumber == "A-77"


def test_the_probability_is_a_number_without_unit_beside_a_coded_category(case: Any) -> None:
    ds = case.sr()
    (number,) = named(ds, "PROB-HIGHGRADE")
    measured = number.MeasuredValueSequence[0]
    unit = measured.MeasurementUnitsCodeSequence[0]
    assert str(measured.NumericValue) == "0.8312"
    assert (unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning) == ("1", "UCUM", "no units")
    (category,) = named(ds, "RISKCAT")
    assert category.ConceptCodeSequence[0].CodeValue == "HIGH"
    (finding,) = named(ds, "121071")
    assert finding.ConceptCodeSequence[0].CodeMeaning == "Neoplasm"


def test_site_and_side(case: Any) -> None:
    (site,) = named(case.sr(), "363698007")
    assert site.ConceptCodeSequence[0].CodeValue == "64033007"
    assert site.ContentSequence[0].ConceptCodeSequence[0].CodeMeaning == "Right"


def test_an_unknown_side_is_said_and_never_defaulted(case: Any) -> None:
    case.laterality, case.laterality_note = None, "headers disagree"
    ds = case.sr()
    assert not named(ds, "272741003")
    assert "Side not established: headers disagree" in texts(ds, "121106")


def test_the_algorithm_says_enough_to_repeat_the_result(case: Any) -> None:
    ds = case.sr()
    assert texts(ds, "111001") == ["RepVGG-A0 (demo width) CEUS"] and texts(ds, "111003") == ["0.1.0"]
    assert named(ds, "111000")[0].ConceptCodeSequence[0].CodeValue == "123110"
    parameters = dict(t.split(": ", 1) for t in texts(ds, "111002"))
    assert parameters["package digest"] == "sha256:" + "ab" * 32
    assert parameters.items() >= {
        "task": "renal_ceus", "backend": "onnx-cpu", "precision": "fp32", "intended use": "research",
        "threshold": "0.5", "temperature": "1.3", "route": "renal-ceus",
    }.items()  # fmt: skip


FSH = ClinicalInput("FSH", Code("15067-2", "LN", "Follitropin"), 12.5, "[IU]/L", "2026-01-02T08:30:00", "DICOM SR")
EDV = ClinicalInput("EDV", Code("11653-3", "LN", "End Diastolic Velocity"), 3.2, "cm/s", "", "DICOM SR", "L")


def test_clinical_values_stand_in_the_report_with_unit_side_time_and_source(case: Any) -> None:
    """In groups of their own: an algorithm that read a value did not measure it."""
    case.clinical = (FSH, EDV)
    ds = case.sr()
    first, fsh, edv = named(ds, "125007")
    assert not named(first, "15067-2")
    (number,) = named(fsh, "15067-2")
    measured = number.MeasuredValueSequence[0]
    assert (measured.NumericValue, measured.MeasurementUnitsCodeSequence[0].CodeValue) == (12.5, "[IU]/L")
    assert number.ObservationDateTime == "20260102083000"
    assert texts(fsh, "121106") == ["Input of the model, not made by it. Source: DICOM SR"]
    assert not named(fsh, "111001")
    (site,) = named(edv, "363698007")
    assert site.ContentSequence[0].ConceptCodeSequence[0].CodeMeaning == "Left"
    assert "ObservationDateTime" not in named(edv, "11653-3")[0]
    parameters = texts(ds, "111002")
    assert "clinical input FSH: 12.5 [IU]/L, of 2026-01-02T08:30:00, source DICOM SR" in parameters
    assert "clinical input EDV L: 3.2 cm/s, source DICOM SR" in parameters


def test_beside_a_region_clinical_values_stand_in_the_parameters_alone(case: Any) -> None:
    """One kind of group in a document: a validator takes a TID 1501 group for TID 1410 with parts missing."""
    case.clinical = (FSH,)
    frame = FrameRef(case.first.sop_class_uid, case.first.sop_instance_uid, 3, 12)
    region = Region(frame, ((10.0, 20.0), (30.0, 20.0), (30.0, 40.5)))
    ds = case.read(case.build(regions={"Lesion 1": region})[0])
    assert len(named(ds, "125007")) == 1
    assert any(t.startswith("clinical input FSH: 12.5") for t in texts(ds, "111002"))


def test_both_scores_and_the_interval(case: Any) -> None:
    image = Code("PROB-IMAGE", "99INFER", "Probability from the image")
    case.scores = (Score(OUTCOME, 0.8, 0.65, 0.9), Score(image, 0.55))
    ds = case.sr()
    said = {
        code: float(named(ds, code)[0].MeasuredValueSequence[0].NumericValue)
        for code in ("PROB-HIGHGRADE", "PROB-IMAGE")
    }
    assert said == {"PROB-HIGHGRADE": 0.8, "PROB-IMAGE": 0.55}
    interval = [t for t in texts(ds, "121106") if "interval" in t]
    assert interval == ["Probability of high nuclear grade: 95 % interval 0.6500 to 0.9000"]
    assert "Lesion 1: interval of PROB-HIGHGRADE: 0.6500 to 0.9000 (95 %)" in texts(ds, "111002")


def test_sources_are_named_with_their_frames_and_stand_in_the_evidence(case: Any) -> None:
    ds = case.sr()
    (source,) = named(ds, "121112")
    reference = source.ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == case.first.sop_instance_uid
    assert list(reference.ReferencedFrameNumber) == [1, 2, 3, 4, 5, 6]
    evidence = ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [e.ReferencedSOPInstanceUID for e in evidence] == [case.first.sop_instance_uid]
    assert named(ds, "111028"), "the image library lists the source"


def test_a_retired_source_class_is_referenced_as_what_it_is(empty_case: Any, clip: Any) -> None:
    retired = "1.2.840.10008.5.1.4.1.1.3"
    empty_case.add(clip(SOPClassUID=retired))
    ds = empty_case.sr()
    references = [i.ReferencedSOPSequence[0].ReferencedSOPClassUID for i in items(ds) if "ReferencedSOPSequence" in i]
    assert references == [retired, retired]


def test_frames_of_a_single_frame_class_are_not_numbered(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1"))
    assert "ReferencedFrameNumber" not in named(empty_case.sr(), "121112")[0].ReferencedSOPSequence[0]


def test_a_private_source_class_is_still_reported(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(SOPClassUID="1.2.3.4.5.6"))
    ds = empty_case.sr()
    assert not named(ds, "111028") and ds.CurrentRequestedProcedureEvidenceSequence


def test_the_request_is_carried_so_that_the_worklist_finds_its_report(empty_case: Any, clip: Any) -> None:
    request = Dataset()
    request.RequestedProcedureID, request.RequestedProcedureDescription = "RP1", "Kidney mass CEUS"
    empty_case.add(clip(RequestAttributesSequence=[request]))
    (item,) = empty_case.sr().ReferencedRequestSequence
    assert (item.RequestedProcedureID, item.AccessionNumber) == ("RP1", "A-77")
    assert item.RequestedProcedureDescription == "Kidney mass CEUS"


def test_a_new_revision_follows_the_old_document_of_the_same_destinations(case: Any) -> None:
    old = Predecessor("1.2.840.10008.5.1.4.1.1.88.34", "1.2.3.4", "1.2.3", "comprehensive3d/ISO_IR 192")
    (item,) = case.read(case.build(predecessors=(old,))[0]).PredecessorDocumentsSequence
    series = item.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == "1.2.3"
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"
    other = case.build(predecessors=(old,), variants=(Variant(objects=("sr",), sr="enhanced"),))
    assert "PredecessorDocumentsSequence" not in case.read(other[0])


def test_a_region_makes_the_group_planar(case: Any) -> None:
    frame = FrameRef(case.first.sop_class_uid, case.first.sop_instance_uid, 3, 12)
    region = Region(frame, ((10.0, 20.0), (30.0, 20.0), (30.0, 40.5)))
    ds = case.read(case.build(regions={"Lesion 1": region})[0])
    (group,) = named(ds, "125007")
    assert group.ContentTemplateSequence[0].TemplateIdentifier == "1410"
    (scoord,) = named(ds, "111030")
    assert list(scoord.GraphicData) == [10, 20, 30, 20, 30, 40.5, 10, 20]
    assert scoord.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber == 3


@pytest.mark.parametrize(("use", "mark"), [("demonstration", MARK), ("research", RESEARCH)])
def test_the_intended_use_is_written_where_it_is_seen(case: Any, use: str, mark: str) -> None:
    case.intended_use = use
    for built in (*case.build(), case.not_assessable(Refusal(RefusalCode.TOO_FEW_FRAMES))):
        ds = case.read(built)
        assert ds.SeriesDescription.startswith(mark.removesuffix(".")) and len(ds.SeriesDescription) <= 64
        if built.kind == "sr":
            assert mark in texts(ds, "121106")
        else:
            assert ds.ImageComments == mark


def test_a_clinical_package_needs_no_mark(case: Any) -> None:
    case.intended_use = "clinical"
    ds = case.sr()
    assert ds.SeriesDescription == "AI renal CEUS ccRCC grade" and not texts(ds, "121106")


def test_private_codes_are_short_enough_and_their_scheme_is_identified(case: Any) -> None:
    scheme = case.sr().CodingSchemeIdentificationSequence[0]
    assert scheme.CodingSchemeDesignator == "99INFER"
    assert scheme.CodingSchemeResponsibleOrganization == "dicom-node"
    codes = private_codes()
    assert len(set(codes)) == len(codes) == 2 + len(RefusalCode)
    assert all(len(c.value) <= 16 and len(c.meaning) <= 64 for c in codes)


@pytest.mark.parametrize("code", RefusalCode)
@pytest.mark.parametrize("provenance", [True, False])
def test_a_refusal_says_why_and_holds_no_number(case: Any, code: RefusalCode, provenance: bool) -> None:
    case.parameters = {"ood distance": "51.25", "threshold": "0.5"}
    refusal = Refusal(code, "distance 51.25 above 20.5, probability 0.87")
    ds = case.read(case.not_assessable(refusal, provenance=provenance))
    measured = {i.ConceptNameCodeSequence[0].CodeMeaning for i in items(ds) if i.ValueType == "NUM"}
    assert measured <= {"Pixel Data Rows", "Pixel Data Columns"}, "only the size of the source image"
    said = " ".join(i.get("TextValue", "") for i in items(ds)).replace("version 0.1.0", "")
    assert not re.search(r"\d\.\d\d|51|20\.5|0\.5", said)
    (category,) = named(ds, "RISKCAT")
    assert category.ConceptCodeSequence[0].CodeValue == "NOTASSESS"
    assert len(named(ds, "NOTASSESS-REASON")) == 1 and code.sentence in texts(ds, "121106")
    assert bool(texts(ds, "111001")) is provenance


def test_every_refusal_has_its_own_coded_reason(case: Any) -> None:
    values = set()
    for code in RefusalCode:
        (reason,) = named(case.read(case.not_assessable(Refusal(code))), "NOTASSESS-REASON")
        values.add(reason.ConceptCodeSequence[0].CodeValue)
    assert len(values) == len(RefusalCode)

"""A study against routes: when, indication, refusals, priority, completeness."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node import config
from dicom_node.config import Require
from dicom_node.errors import ConfigError
from dicom_node.result import ClinicalInput, Code, RefusalCode
from dicom_node.route import (
    check_routes,
    evaluate,
    evaluate_all,
    missing_requirements,
    redact,
    select_priority,
    unrouted_code,
)
from dicom_node.store.header import read_header
from dicom_node.study import Instance, Study

Build = Callable[..., Any]
RENAL = {"modality": "US", "body_part": "KIDNEY", "contrast": True}
CEUS = {"StudyDescription": "CEUS kidney, renal mass"}
SHIPPED = Path(__file__).parent.parent.parent / "config.yaml"


def fsh() -> dict[str, ClinicalInput]:
    return {"fsh": ClinicalInput("fsh", Code("15067-2", "LN", "FSH"), 4.0, "IU/L", "", "sidecar")}


def test_every_key_must_hold_on_one_series(make_study: Build, make_route: Build) -> None:
    route = make_route({"modality": "US", "body_part": "KIDNEY"})
    split = make_study({"SeriesDescription": "kidney", "Modality": "OT"}, {"SeriesDescription": "x"})
    together = make_study(
        {"SeriesDescription": "x"}, {"SeriesDescription": "kidney"}, {"SeriesDescription": "kidney L"}
    )
    assert not evaluate(route, split, {}).matched
    verdict = evaluate(route, together, {})
    assert verdict.runs
    assert verdict.series == ("1.2.3.0.2", "1.2.3.0.3")


def test_keys_may_hold_on_different_instances_of_one_series(make_study: Build, make_route: Build) -> None:
    study = make_study([{"NumberOfFrames": 60}, {"ImageComments": "lesion"}])
    route = make_route({"NumberOfFrames": {"range": [10, 100]}, "ImageComments": "lesion"})
    assert evaluate(route, study, {}).matched


def test_missing_is_not_no(make_study: Build, make_route: Build) -> None:
    route = make_route({"StudyDescription": {"regex": "kidney"}})
    answers = [evaluate(route, make_study(a), {}).evidence[0].verdict for a in ({}, {"StudyDescription": "liver"})]
    assert answers == ["MISSING", "NO"]


def test_a_body_part_is_not_an_indication(make_study: Build, make_route: Build) -> None:
    route = make_route(
        RENAL, any=[{"called_ae": "RENAL_AI"}, {"roi": True, "StudyDescription": {"regex": "renal mass"}}]
    )
    verdict = evaluate(route, make_study({"StudyDescription": "CEUS kidney of Doe, John"}), {})
    assert verdict.matched
    assert not verdict.runs
    assert verdict.refusal is not None
    assert verdict.refusal.code is RefusalCode.INDICATION_NOT_ESTABLISHED
    assert verdict.refusal.detail == "any of: called_ae NO; roi MISSING and StudyDescription NO"


def test_a_reserved_called_ae_title_or_words_of_the_order_establish_it(make_study: Build, make_route: Build) -> None:
    matchers = [{"called_ae": "RENAL_AI"}, {"StudyDescription": {"regex": "renal mass"}}]
    assert evaluate(make_route(RENAL, any=matchers), make_study(CEUS), {}).runs
    plain = {"StudyDescription": "CEUS kidney"}
    assert evaluate(make_route(RENAL, any=matchers), make_study(plain, called="RENAL_AI"), {}).runs
    assert not evaluate(make_route(RENAL, all=matchers), make_study(CEUS), {}).runs
    assert evaluate(make_route(RENAL, all=matchers), make_study(CEUS, called="RENAL_AI"), {}).runs


def test_an_empty_matcher_establishes_nothing(make_study: Build, make_route: Build) -> None:
    assert not evaluate(make_route(RENAL, any=[{}]), make_study(CEUS), {}).runs


def test_an_ambiguous_body_part_is_said_of_the_routes_it_keeps_from_matching(
    make_study: Build, make_route: Build
) -> None:
    study = make_study({"StudyDescription": "US liver and kidney"})
    verdicts = [evaluate(make_route({"modality": "US", "body_part": p}), study, {}) for p in ("KIDNEY", "THYROID")]
    assert [v.matched for v in verdicts] == [False, False]
    assert verdicts[0].refusal is not None
    assert verdicts[0].refusal.code is RefusalCode.BODY_PART_AMBIGUOUS
    assert verdicts[0].refusal.detail == "series 1: AMBIGUOUS (KIDNEY 4, LIVER 4)"
    assert verdicts[1].refusal is None
    assert unrouted_code(verdicts) is RefusalCode.BODY_PART_AMBIGUOUS
    assert unrouted_code(verdicts[1:]) is RefusalCode.NO_ROUTE
    other_modality = evaluate(make_route({"modality": "MR", "body_part": "KIDNEY"}), study, {})
    assert other_modality.refusal is None


def test_each_route_is_judged_on_its_own(make_study: Build, make_route: Build) -> None:
    routes = [make_route({"modality": "US"}), make_route({"body_part": "KIDNEY"}), make_route({"modality": "MR"})]
    study = make_study(CEUS)
    assert [v.runs for v in evaluate_all(routes, study, {})] == [True, True, False]
    assert evaluate_all(routes, study, {}) == tuple(evaluate(r, study, {}) for r in routes)


def test_our_own_objects_that_came_back_are_not_evidence(make_study: Build, make_route: Build) -> None:
    """Our report holds regions: it would establish its own indication on the next run."""
    report = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.34",
        "Modality": "SR",
        "ManufacturerModelName": "dicom-node",
        "StudyDescription": "renal mass",
        "ContentSequence": [{"ValueType": "SCOORD"}],
    }
    matchers = [{"roi": True}, {"StudyDescription": {"regex": "renal mass"}}]
    study = make_study({"StudyDescription": "CEUS kidney"}, report)
    verdict = evaluate(make_route(RENAL, any=matchers), study, {})
    assert verdict.matched
    assert not verdict.established
    assert (
        evaluate(make_route({"Modality": "SR"}), study, {}).evidence
        == evaluate(make_route({"Modality": "SR"}), make_study({"StudyDescription": "CEUS kidney"}), {}).evidence
    )


def test_a_study_of_nothing_but_our_own_objects_matches_nothing(make_study: Build, make_route: Build) -> None:
    own = make_study({"ContributingEquipmentSequence": [{"ManufacturerModelName": "dicom-node"}]})
    verdict = evaluate(make_route({"StudyDescription": {"exists": False}}), own, {})
    assert not verdict.matched


def test_verdicts_are_json_and_redacted_ones_hold_no_text(make_study: Build, make_route: Build) -> None:
    private = "Zzyzx^Patient"
    attributes = {
        "StudyDescription": f"CEUS kidney renal mass {private}",
        "SeriesDescription": f"kidney {private}",
        "PatientName": private,
        "PatientID": private,
        "AccessionNumber": private,
        "PatientBirthDate": "19510829",
        "BodyPartExamined": f"kidney {private}",
        "RequestedProcedureID": private,
        "StudyDate": "19510829",
    }
    keys = ("StudyDescription", "PatientName", "PatientID", "AccessionNumber", "PatientBirthDate", "BodyPartExamined")
    exists = {k: {"exists": True} for k in (*keys, "RequestedProcedureID", "StudyDate")}
    verdict = evaluate(make_route({**RENAL, **exists}), make_study(attributes), {})
    assert verdict.runs
    shown = {c.key: c.actual for c in verdict.evidence}
    assert private in shown["StudyDescription"]  # the operator needs it
    hidden = {"PatientName", "PatientID", "AccessionNumber", "PatientBirthDate", "RequestedProcedureID", "StudyDate"}
    assert {shown[k] for k in hidden} == {"(withheld)"}
    assert private.casefold() not in json.dumps(redact(verdict).to_json()).casefold()
    assert json.loads(json.dumps(verdict.to_json())) == verdict.to_json()


def test_refusals_never_carry_values(make_study: Build, make_route: Build) -> None:
    attributes = {"StudyDescription": "CEUS kidney Zzyzx", "SeriesDescription": "liver Zzyzx"}
    for when in (RENAL, {"body_part": "LIVER"}, {"contrast": True}):
        verdict = evaluate(make_route(when, any=[{"StudyDescription": {"regex": "mass"}}]), make_study(attributes), {})
        assert verdict.refusal is not None
        assert "Zzyzx" not in str(verdict.refusal)


def test_a_study_of_hundreds_of_series_keeps_its_evidence_bounded(make_study: Build, make_route: Build) -> None:
    study = make_study(*({"SeriesDescription": "x"} for _ in range(199)), {"SeriesDescription": "kidney ceus"})
    verdict = evaluate(make_route(RENAL), study, {})
    assert verdict.series == ("1.2.3.0.200",)
    assert verdict.series_left_out == 160
    assert any(c.series == 200 for c in verdict.evidence)


@pytest.mark.parametrize(
    ("route_priority", "attributes", "calling", "expected"),
    [
        (0, {}, "MOD", 0),
        (3, {}, "MOD", 3),
        (3, {}, "ER_US", 9),
        (0, {"RequestedProcedurePriority": "STAT"}, "MOD", 9),
        (7, {"RequestedProcedurePriority": "high"}, "MOD", 7),
        (0, {"RequestAttributesSequence": [{"RequestedProcedurePriority": "HIGH"}]}, "MOD", 5),
        (0, {"RequestedProcedurePriority": "ROUTINE"}, "MOD", 0),
    ],
)
def test_priority(
    make_study: Build, make_route: Build, route_priority: int, attributes: dict[str, Any], calling: str, expected: int
) -> None:
    route = make_route({"modality": "US"}, priority=route_priority)
    assert select_priority(route, make_study(attributes, calling=calling), ("ER_US",)) == expected


def test_missing_requirements(make_study: Build) -> None:
    study = make_study([{"NumberOfFrames": 10}, {"NumberOfFrames": 12}], {"Modality": "SR"})
    require = Require(min_frames=16, min_instances=4, phases=("arterial",), clinical=("FSH", "EDV"))
    assert missing_requirements(require, study, fsh()) == [
        "min_frames 16 (the longest clip has 12)",
        "min_instances 4 (there are 3)",
        "phases arterial (NO_SUITABLE_IMAGE(no axial T1-weighted gradient echo series))",
        "clinical EDV",
    ]
    met = Require(min_frames=12, min_instances=2, phases=(), clinical=("fsh",))
    assert missing_requirements(met, study, fsh(), ["1.2.3.0.1"]) == []
    assert missing_requirements(met, study, fsh(), ["1.2.3.0.2"]) != []


def test_unsafe_regular_expressions_stop_the_start(make_route: Build) -> None:
    bad = make_route({"modality": "US"}, any=[{"called_ae": "X"}, {"StudyDescription": {"regex": "(a+)+"}}])
    check_routes([make_route({"StudyDescription": {"regex": "a+"}})], "config.yaml")
    with pytest.raises(ConfigError, match=r"routes\.1\.indication\.any\.1\.StudyDescription\.regex"):
        check_routes([make_route({"modality": "US"}), bad], "config.yaml")


def test_the_shipped_routes_take_what_they_are_for(make_study: Build) -> None:
    routes = config.load(SHIPPED).routes
    check_routes(routes, "config.yaml")
    renal = next(r for r in routes if r.name == "renal-ceus")
    for description in ("CEUS kidney: renal mass", "KM-Sono Niere, Nierentumor CEUS", "双肾肿瘤超声造影 肾肿瘤"):
        assert evaluate(renal, make_study({"StudyDescription": description}), {}).runs, description
    assert not evaluate(renal, make_study({"StudyDescription": "US kidney renal mass"}), {}).matched
    assert not evaluate(renal, make_study({"StudyDescription": "CEUS Leber"}), {}).matched


def test_the_real_head_study_matches_no_shipped_route(shared_data: Path) -> None:
    files = sorted((shared_data / "mr/adit_samples").rglob("*.dcm"))
    instances = [Instance(f"{n:032x}", read_header(p), "", "", p, "", "", "", "", 0.0) for n, p in enumerate(files)]
    study = Study.from_instances("1.2.3", 1, instances)
    verdicts = evaluate_all(config.load(SHIPPED).routes, study, {})
    assert not any(v.matched for v in verdicts)
    assert unrouted_code(verdicts) is RefusalCode.NO_ROUTE


def test_a_thousand_instances_are_judged_in_well_under_a_millisecond_each(make_study: Build, make_route: Build) -> None:
    series = [
        [{"StudyDescription": "MRI liver", "SeriesDescription": f"dyn {s}", "Modality": "MR"} for _ in range(200)]
        for s in range(5)
    ]
    study = make_study(*series)
    routes = [make_route({"modality": "MR", "body_part": "LIVER", "contrast": True}) for _ in range(5)]
    started = time.process_time()
    evaluate_all(routes, study, {})
    assert time.process_time() - started < 0.5

"""Every public code of a refusal or of a clinical value is said somewhere, and a test reaches it from an input.

The table names one such test for each code. A new code without a line here, a line whose test is gone or no longer
speaks of its code, and a code that nothing says any longer are errors. The sentence and the advice: `scripts/docs`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dicom_node.clinical import ClinicalCode
from dicom_node.result import RefusalCode

REPOSITORY = Path(__file__).parent.parent
_BROKEN = "pixels/test_dynamic_refusals.py::test_a_broken_study_is_refused_by_name"
_JUDGED = "clinical/test_clinical_judge.py::test_each_reason_not_to_use_a_value_has_its_code"
_SUBJECT = "clinical/test_clinical_fhir.py::test_a_patient_who_is_not_surely_the_studys_is_not_asked_about"
REACHED = {
    "NO_ROUTE": "route/test_rules.py::test_an_ambiguous_body_part_is_said_of_the_routes_it_keeps_from_matching",
    "BODY_PART_AMBIGUOUS": "route/test_rules.py::"
    "test_an_ambiguous_body_part_is_said_of_the_routes_it_keeps_from_matching",
    "INDICATION_NOT_ESTABLISHED": "route/test_rules.py::test_a_body_part_is_not_an_indication",
    "INCOMPLETE": "route/test_complete.py::test_give_up_is_an_answer_with_a_notice_a_metric_and_the_sr",
    "IMAGE_REJECTED": "store/test_rejections.py::"
    "test_an_open_job_ends_a_running_one_is_fenced_out_and_the_study_is_judged_again",
    "PATIENT_CONFLICT": "store/test_studies.py::"
    "test_instances_that_disagree_on_the_patient_stop_the_study_until_they_agree",
    "ENGINE_NOT_AVAILABLE": "test_worker.py::test_an_engine_that_is_not_loaded_is_not_available",
    "NO_SUITABLE_IMAGE": _BROKEN,
    "WRONG_VIEW": "engines/test_testis_tumour_engine.py::test_refuses_by_header",
    "CALIBRATION_MISSING": "engines/test_testis_tumour_engine.py::test_refuses_by_header",
    "ROI_REQUIRED": "engines/test_testis_tumour_engine.py::test_no_region_and_no_place_is_refused",
    "ROI_AMBIGUOUS": "pixels/test_roi.py::test_two_observers_on_one_place_are_ambiguous",
    "ROI_UNREADABLE": "pixels/test_roi.py::test_an_unreadable_region_is_not_passed_over_for_a_less_trusted_one",
    **dict.fromkeys(
        ("PHASES_UNSEPARABLE", "PHASES_AMBIGUOUS", "PHASE_LABEL_CONFLICT", "PHASE_TIME_INVALID", "PHASE_MISSING",
         "DIXON_WATER_MISSING", "SLICE_MISSING", "SLICE_DUPLICATE", "SLICE_SPACING_UNEVEN", "GEOMETRY_MIXED",
         "GEOMETRY_SHEAR", "FRAME_OF_REFERENCE_MISMATCH", "PHASE_COVERAGE", "PIXEL_FORMAT_MISMATCH", "SLICE_EMPTY"),
        _BROKEN,
    ),
    "PIXELS_UNDECODABLE": "test_worker.py::test_pixels_that_cannot_be_decoded_are_refused_with_the_transfer_syntax",
    "FRAME_TIME_INVALID": "pixels/test_ultrasound.py::test_absent_or_implausible_times_are_refused",
    "CEUS_PANEL_AMBIGUOUS": "pixels/test_ultrasound.py::test_panels_that_cannot_be_told_apart_are_refused",
    "CONTRAST_ARRIVAL_NOT_FOUND": "pixels/test_contrast.py::test_what_is_no_arrival_is_refused",
    "TOO_FEW_FRAMES": "engines/test_renal_ceus_engine.py::"
    "test_a_clip_that_ends_after_the_arrival_has_too_few_frames",
    "OUT_OF_DISTRIBUTION": "test_decide.py::"
    "test_images_unlike_the_validated_ones_get_no_number_however_sure_the_network",
    "CLINICAL_INPUT_MISSING": "clinical/test_clinical_stage.py::"
    "test_a_required_value_is_looked_for_again_then_the_route_decides",
    **dict.fromkeys(
        ("CLINICAL_INPUT_UNIT", "CLINICAL_INPUT_IMPLAUSIBLE", "CLINICAL_INPUT_INEXACT", "CLINICAL_INPUT_TIME",
         "CLINICAL_INPUT_AGE"),
        _JUDGED,
    ),
    "CLINICAL_INPUT_SIDE": "clinical/test_clinical_judge.py::test_a_value_without_a_side_is_of_neither_testis",
    "CLINICAL_INPUT_CONFLICT": "clinical/test_clinical_judge.py::test_sources_side_by_side",
    **dict.fromkeys(("CLINICAL_PATIENT_UNKNOWN", "CLINICAL_PATIENT_AMBIGUOUS", "CLINICAL_PATIENT_MISMATCH"), _SUBJECT),
    "CLINICAL_SOURCE_UNREACHABLE": "clinical/test_clinical_fhir.py::"
    "test_a_slow_server_costs_the_time_limit_and_no_more",
    "CLINICAL_SOURCE_DENIED": "clinical/test_clinical_fhir.py::test_the_token_is_read_for_every_question",
    "CLINICAL_SOURCE_INVALID": "service/test_checks.py::test_the_fhir_server_is_asked_and_what_is_wrong_is_said",
}  # fmt: skip
CODES = [*RefusalCode, *ClinicalCode]
_DEFINED_OR_TRANSLATED = {"dicom_node/result.py", "dicom_node/clinical/model.py", "dicom_node/report/codes.py"}


def test_the_table_holds_every_code_and_no_other() -> None:
    assert sorted(REACHED) == sorted(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_test_reaches_it(code: str) -> None:
    file, _, name = REACHED[code].partition("::")
    path = REPOSITORY / "tests" / file
    assert path.is_file(), file
    assert code in spoken(path, name)


@pytest.mark.parametrize("code", CODES)
def test_something_says_it(code: str) -> None:
    assert code in said()


# --- what a piece of source speaks of --------------------------------------------------------------------------------


@cache
def said() -> frozenset[str]:
    """Codes in the code of the node and the engines, apart from where they are defined and put into other words."""
    files = [*REPOSITORY.glob("dicom_node/**/*.py"), *REPOSITORY.glob("engines/*/engine.py")]
    trees = [parsed(f) for f in files if f.relative_to(REPOSITORY).as_posix() not in _DEFINED_OR_TRANSLATED]
    return frozenset(code for tree in trees for code in codes_of(tree))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def spoken(path: Path, test: str) -> set[str]:
    """Codes in a test function, its decorators, and what it uses of its module: helpers, tables."""
    defined: dict[str, ast.stmt] = {}
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    defined[target.id] = node
    assert test in defined, f"{path.name} has no {test}"
    found: set[str] = set()
    left, seen = [test], {test}
    while left:
        node = defined[left.pop()]
        found |= set(codes_of(node))
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & defined.keys()
        left += sorted(used - seen)
        seen |= used
    return found


def codes_of(tree: ast.AST) -> Iterator[str]:
    """`RefusalCode.X`, and texts that are a code or begin with one ("X(detail)", "X: detail")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("RefusalCode", "ClinicalCode"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition("(")[0].partition(":")[0]

"""What callers rely on: a light import, one object for each distinct wish, errors that say which file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from dicom_node import report
from dicom_node.config import Destination
from dicom_node.errors import ReportError, StoreError
from dicom_node.report import Variant
from dicom_node.result import Code
from dicom_node.study import Header, is_own_output


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('highdicom', 'PIL', 'numpy', 'pydicom')"
    code = f"import sys, dicom_node.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_destinations_that_want_the_same_share_one_object(case: Any) -> None:
    plain = Variant.of(Destination(ae_title="A", host="a", port=1))
    only_sr = Variant.of(Destination(ae_title="B", host="b", port=2, objects=("sr",)))
    old = Variant.of(Destination(ae_title="C", host="c", port=3, sr="enhanced", capture="keyframes"))
    built = case.build(variants=(plain, only_sr, old))
    assert [b.kind for b in built] == ["sr", "sr", "capture"] + ["capture"] * 8
    assert [plain.accepts(b) for b in built[:3]] == [True, False, True]
    assert [only_sr.accepts(b) for b in built[:3]] == [True, False, False]
    assert [old.accepts(b) for b in built] == [False, True, False] + [True] * 8
    assert all(len(b.variant) <= 32 for b in built)


def test_a_missing_source_is_a_fault_that_names_no_uid(case: Any) -> None:
    result = case.result()
    with pytest.raises(StoreError) as e:
        report.build(result, {}, case.report_context())
    assert case.first.sop_instance_uid not in str(e.value)


def test_a_finding_without_a_map_has_no_capture(case: Any) -> None:
    result = case.result()
    bare = replace(result, findings=(replace(result.findings[0], heatmap=None),))
    assert [b.kind for b in report.build(bare, case.sources, case.report_context())] == ["sr"]


def test_a_result_that_dicom_cannot_hold_is_a_fault_that_says_where_but_not_what(case: Any) -> None:
    result = case.result()
    secret = Code("X" * 5, "99INFER", "Doe^Jane " * 20)
    bad = replace(result, findings=(replace(result.findings[0], category=secret),))
    with pytest.raises(ReportError, match=r"\(ValueError at \w+\.py:\d+\)") as e:
        report.build(bad, case.sources, case.report_context())
    assert "Doe" not in str(e.value)


def test_what_we_made_is_known_as_ours_when_it_comes_back(case: Any) -> None:
    for built in case.build():
        ds = case.read(built)
        header = Header.from_json({"ManufacturerModelName": ds.ManufacturerModelName})
        assert is_own_output(header)

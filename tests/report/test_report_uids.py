"""UIDs: derived, legal, and one for each byte string."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.config import Report as ReportConfig
from dicom_node.report import Predecessor, Variant
from dicom_node.report.uids import derive
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

LEGAL = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
BOTH = (Variant(), Variant(sr="enhanced", capture="keyframes", charset="GB18030"))


@given(st.one_of(st.none(), st.just("1.2.840.99999"), st.just("2.999." + "9" * 24)), st.text(), st.text(), st.text())
def test_every_derived_uid_is_legal(root: str | None, namespace: str, one: str, two: str) -> None:
    uid = derive(root, namespace, one, two)
    assert LEGAL.fullmatch(uid) and len(uid) <= 64
    assert uid.startswith("2.25." if root is None else root + ".")
    assert uid == derive(root, namespace, one, two)


def test_key_parts_do_not_run_into_each_other() -> None:
    assert derive(None, "n", "ab", "c") != derive(None, "n", "a", "bc")
    assert derive(None, "n", "a") != derive(None, "m", "a")


def test_two_builds_are_identical_and_every_instance_has_its_own_uid(case: Any) -> None:
    first, second = case.build(variants=BOTH), case.build(variants=BOTH)
    assert first == second
    assert len({b.sop_instance_uid for b in first}) == len(first) == 2 + 1 + 8
    assert {b.variant for b in first} == {v.name(kind) for v in BOTH for kind in ("sr", "capture")}


def test_builds_at_different_times_are_identical(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = case.build(variants=BOTH)
    import datetime as module

    class Later(module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + timedelta(days=400, seconds=1.7)

    monkeypatch.setattr("highdicom.base.datetime.datetime", Later)
    assert module.datetime.now().year > 2026
    assert case.build(variants=BOTH) == first


@pytest.mark.parametrize("what", ["created", "score", "source", "manufacturer", "predecessor", "use", "array"])
def test_other_content_never_gets_the_same_uid(case: Any, what: str, clip: Any) -> None:
    before = {b.sop_instance_uid for b in case.build(variants=BOTH)}
    changes: dict[str, Any] = {}
    if what == "created":
        changes["created"] = case.report_context().created + timedelta(seconds=1)
    elif what == "score":
        case.parameters = {"threshold": "0.6"}
    elif what == "source":
        case.sources.clear()
        case.add(clip(PatientID="P-002"))
    elif what == "manufacturer":
        changes["config"] = ReportConfig(manufacturer="Another")
    elif what == "predecessor":
        changes["predecessors"] = (Predecessor("1.2.840.10008.5.1.4.1.1.88.34", "1.2.3", "1.2", BOTH[0].name("sr")),)
    elif what == "use":
        case.intended_use = "clinical"
    else:
        case.noise = True
    assert not before & {b.sop_instance_uid for b in case.build(variants=BOTH, **changes)}


def test_the_tracking_uid_outlives_the_model_but_not_the_lesion(case: Any) -> None:
    def tracking() -> tuple[str, str]:
        ds = case.sr()
        group = ds.ContentSequence[-1].ContentSequence[0]
        return group.ContentSequence[1].UID, ds.SOPInstanceUID

    before = tracking()
    case.parameters = {"threshold": "0.9"}
    after = tracking()
    assert before[0] == after[0] and before[1] != after[1]


def test_a_registered_root_is_used_everywhere(case: Any) -> None:
    for built in case.build(config=ReportConfig(uid_root="1.2.826.0.1.3680043.10.9999.1")):
        assert built.sop_instance_uid.startswith("1.2.826.0.1.3680043.10.9999.1.")
        assert len(built.sop_instance_uid) <= 64 and len(built.series_instance_uid) <= 64


def test_files_name_our_implementation_and_not_a_library(case: Any) -> None:
    assert LEGAL.fullmatch(IMPLEMENTATION_CLASS_UID) and len(IMPLEMENTATION_VERSION_NAME) <= 16
    for built in case.build(variants=BOTH):
        meta = case.read(built).file_meta
        assert meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
        assert meta.ImplementationVersionName == IMPLEMENTATION_VERSION_NAME
        assert b"highdicom" not in built.data.lower() and b"pydicom" not in built.data.lower()

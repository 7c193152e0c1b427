"""Sidecar files: what counts, whose they are, and what a folder may hold beside them."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dicom_node.clinical import sidecar
from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.identity import Subject
from dicom_node.clinical.sidecar import SidecarFolder
from dicom_node.errors import ClinicalSourceError

SCHEMA = Path(__file__).parents[2] / "docs/schemas/sidecar.v1.schema.json"
SUBJECT = Subject("1.2.3", "PID1", "LAB", "1990-02-03", "A1", datetime(2024, 6, 1, tzinfo=UTC))
FSH = {"code": {"value": "15067-2", "scheme": "LN"}, "value": 12.5, "unit": "[IU]/L", "time": "2024-05-20"}
EDV = {"code": {"value": "11653-3", "scheme": "LN"}, "value": 3, "unit": "cm/s", "time": "2024-05-20T08:30:00+02:00",
       "laterality": "R", "site": {"value": "T-94000", "scheme": "SRT"}, "source": "LIS"}  # fmt: skip
GOOD: dict[str, Any] = {"schema": 1, "study_instance_uid": "1.2.3", "patient_id": "PID1", "values": [FSH, EDV]}


def ask(folder: Path, *contents: dict[str, Any]) -> Any:
    for number, content in enumerate(contents):
        (folder / f"{number}.json").write_text(json.dumps(content))
    return SidecarFolder(folder, CodeMap()).ask(SUBJECT)


def test_the_values_of_a_file_with_their_sides_sites_times_and_source(tmp_path: Path) -> None:
    fsh, edv = ask(tmp_path, GOOD).observations
    assert (fsh.code, fsh.value, fsh.unit, fsh.time, fsh.source) == (
        ("15067-2", "LN"), 12.5, "[IU]/L", "2024-05-20", "sidecar",
    )  # fmt: skip
    assert (edv.side, edv.site, edv.time, edv.source) == (
        "R", ("40689003", "SCT"), "2024-05-20T08:30:00+02:00", "sidecar (LIS)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"study_instance_uid": "1.2.4"}, False),
        ({"study_instance_uid": None, "accession_number": "A1"}, True),
        ({"study_instance_uid": None, "accession_number": "A2"}, False),
        ({"accession_number": "A1"}, True),
        ({"accession_number": "A2"}, False),  # both named: both must be the study's
        ({"issuer_of_patient_id": "LAB", "patient_birth_date": "1990-02-03"}, True),
    ],
)
def test_a_file_is_of_the_study_it_names(tmp_path: Path, change: dict[str, Any], counts: bool) -> None:
    content = {k: v for k, v in (GOOD | change).items() if v is not None}
    found = ask(tmp_path, content)
    assert (bool(found.observations), found.problems) == (counts, ())


@pytest.mark.parametrize(
    "change", [{"patient_id": "PID2"}, {"issuer_of_patient_id": "ELSE"}, {"patient_birth_date": "1990-02-04"}]
)
def test_a_file_of_the_study_that_names_another_patient_is_said(tmp_path: Path, change: dict[str, Any]) -> None:
    found = ask(tmp_path, GOOD | change)
    assert found.observations == ()
    assert found.problems == ("CLINICAL_PATIENT_MISMATCH(sidecar): a file of this study names another patient",)


INVALID: list[dict[str, Any]] = [
    {"schema": 2},
    {"patient_id": ""},
    {"patient_id": 4711},
    {"values": []},
    {"values": [FSH | {"unit": ""}]},
    {"values": [FSH | {"value": "12.5"}]},
    {"values": [FSH | {"value": True}]},
    {"values": [FSH | {"laterality": "B"}]},
    {"values": [FSH | {"source": "Mr. Smith, born 1990"}]},
    {"values": [FSH | {"unexpected": 1}]},
    {"unexpected": 1},
]


@pytest.mark.parametrize("change", INVALID)
def test_schema_file_and_reader_refuse_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    published = json.loads(SCHEMA.read_text())
    jsonschema.validate(GOOD, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(GOOD | change, published)
    assert ask(tmp_path, GOOD | change).observations == ()
    (said,) = SidecarFolder(tmp_path, CodeMap()).invalid()
    assert said.startswith("0.json: ") and "PID1" not in said


def test_a_file_without_a_study_is_refused_by_both(tmp_path: Path) -> None:
    content = {k: v for k, v in GOOD.items() if k != "study_instance_uid"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    assert ask(tmp_path, content).observations == ()


def test_the_published_schema_is_the_readers_own() -> None:
    assert json.loads(SCHEMA.read_text()) == sidecar.schema()


@pytest.mark.parametrize("time", ["2024-13-01", "20.05.2024", "yesterday!", "2024-05-20T25:00:00"])
def test_a_time_must_be_a_day_that_exists(tmp_path: Path, time: str) -> None:
    assert ask(tmp_path, GOOD | {"values": [FSH | {"time": time}]}).observations == ()
    assert "time" in SidecarFolder(tmp_path, CodeMap()).invalid()[0]


def test_a_number_that_is_none_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD).replace("12.5", "NaN"))
    (tmp_path / "b.json").write_text(json.dumps(GOOD).replace("12.5", "1e999"))
    folder = SidecarFolder(tmp_path, CodeMap())
    assert folder.ask(SUBJECT).observations == () and len(folder.invalid()) == 2


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    (outside / "real.json").write_text(json.dumps(GOOD))
    (folder / "link.json").symlink_to(outside / "real.json")
    (folder / "half.json.part").write_text("{")
    (folder / "sub.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "huge.json").write_text(" " * (sidecar.MAX_FILE_BYTES + 1))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes(b'{"schema": "\xff"}')
    found = SidecarFolder(folder, CodeMap())
    assert found.ask(SUBJECT).observations == ()
    assert [line.split(":")[0] for line in found.invalid()] == ["deep.json", "huge.json", "latin.json"]


def test_a_file_that_is_corrected_counts_as_it_is_now(tmp_path: Path) -> None:
    folder = SidecarFolder(tmp_path, CodeMap())
    (tmp_path / "a.json").write_text("{half")
    assert folder.ask(SUBJECT).observations == ()
    (tmp_path / "new").write_text(json.dumps(GOOD))
    (tmp_path / "new").rename(tmp_path / "a.json")
    assert len(folder.ask(SUBJECT).observations) == 2
    (tmp_path / "a.json").unlink()
    assert folder.ask(SUBJECT).observations == ()


def test_a_folder_that_is_away_or_overfull_is_a_fault_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClinicalSourceError) as caught:
        SidecarFolder(tmp_path / "away", CodeMap()).ask(SUBJECT)
    assert caught.value.again
    monkeypatch.setattr(sidecar, "MAX_FILES", 1)
    with pytest.raises(ClinicalSourceError, match="more than 1 files") as caught:
        ask(tmp_path, GOOD, GOOD)
    assert not caught.value.again

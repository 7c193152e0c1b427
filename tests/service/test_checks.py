"""`check`: what a route asks for must be something that can ever be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_engine
from fhir_server import SYSTEM, FhirServer, send

from dicom_node import config
from dicom_node.service.checks import check

FSH = {"name": "FSH", "code": {"value": "15067-2", "scheme": "LN", "meaning": "FSH"}, "unit": "[IU]/L",
       "range": [0.1, 200]}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "unknown"),
    [
        ({}, []),
        ({"require": {"clinical": ["fsh"]}}, []),
        ({"require": {"clinical": ["FSH", "EDV"]}}, ["EDV"]),
        ({"indication": {"any": [{"clinical": "LDH"}, {"roi": True}]}}, ["LDH"]),
        ({"indication": {"all": [{"clinical": ["FSH", "AFP"]}]}}, ["AFP"]),
    ],
)
def test_a_clinical_value_that_no_engine_collects_is_an_error(
    tmp_path: Path, route: dict[str, Any], unknown: list[str]
) -> None:
    tiny_engine.write_task(tmp_path / "engines", "", clinical=[FSH])
    values = {"name": "r", "when": {"modality": "US"}, "indication": {"any": [{"roi": True}]}, "engine": "tiny"}
    data = {"routes": [values | route], "engines": {"path": ["engines"]}}
    found, _ = check(config.parse(data, file="x", base=tmp_path))
    said = [f["text"] for f in found["findings"] if "clinical value" in f["text"] and f["level"] == "error"]
    assert said == [f"no engine of the routes collects a clinical value {name}" for name in unknown]


@pytest.mark.parametrize(
    ("runtime", "level", "said"),
    [
        ("auto", "ok", "auto: can be tried here: "),
        ("onnx", "ok", "onnx: can be tried here: onnx"),
        ("cuda", "warning", "cuda is not on this machine: the reference, onnx, serves instead"),
    ],
)
def test_a_runtime_that_is_not_here_is_said_before_a_study_depends_on_it(
    tmp_path: Path, runtime: str, level: str, said: str
) -> None:
    data = {"infer": {"runtime": runtime}, "engines": {"path": []}}
    found, _ = check(config.parse(data, file="x", base=tmp_path))
    lines = [f for f in found["findings"] if f["about"] == "infer.runtime"]
    if runtime == "cuda" and lines[-1]["level"] == "ok":
        pytest.skip("this machine has onnxruntime-gpu")
    assert lines[-1]["level"] == level
    assert lines[-1]["text"].startswith(said)
    assert "onnx" in lines[-1]["text"]
    assert any("CUDA device" in f["text"] or "onnxruntime-gpu" in f["text"] for f in lines) or runtime != "cuda"


def test_a_choice_of_devices_is_not_ignored_in_silence(tmp_path: Path) -> None:
    for devices, said in (("auto", []), ("0,1", ["0,1 is not in this version: auto, which is the first GPU"])):
        found, code = check(
            config.parse({"infer": {"devices": devices}, "engines": {"path": []}}, file="x", base=tmp_path)
        )
        assert [f["text"] for f in found["findings"] if f["about"] == "infer.devices"] == said
        assert code or not said


def _said(base: Path, **clinical: Any) -> dict[str, list[str]]:
    found, _ = check(config.parse({"clinical": clinical}, file="x", base=base))
    said: dict[str, list[str]] = {}
    for finding in found["findings"]:
        if finding["about"].startswith("clinical"):
            said.setdefault(finding["level"], []).append(finding["text"])
    return said


def test_the_fhir_server_is_asked_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    token.chmod(0o644)
    with FhirServer() as server:
        server.token = "good"  # noqa: S105
        fhir = {"base_url": server.url, "identifier_systems": {"": SYSTEM}, "token_file": "token"}
        said = _said(tmp_path, fhir=fhir)
        assert said["ok"] == ["FHIR 4.0.1, searches by POST are answered"]
        assert said["warning"] == [f"{token} is open to other users (mode 644): chmod 600"]
        assert "PID" not in repr(server.asked)
        token.write_text("bad")
        assert _said(tmp_path, fhir=fhir)["error"] == [
            "CLINICAL_SOURCE_DENIED: the server answers 401: the token or its rights"
        ]
        server.answer = lambda handler: send(handler, {"resourceType": "CapabilityStatement", "fhirVersion": "3.0.2"})
        assert _said(tmp_path, fhir=fhir)["error"] == [
            "CLINICAL_SOURCE_INVALID: metadata is not a CapabilityStatement of FHIR R4 (fhirVersion 3.0.2)"
        ]
    assert _said(tmp_path, fhir=fhir)["error"] == ["CLINICAL_SOURCE_UNREACHABLE: no connection"]


def test_a_sidecar_folder_with_what_is_no_sidecar(tmp_path: Path) -> None:
    folder = tmp_path / "sidecars"
    assert "cannot be read" in _said(tmp_path, sidecar="sidecars")["error"][0]
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.json").write_text("{}")
    said = _said(tmp_path, sidecar="sidecars")
    assert said["ok"] == [f"0 valid files in {folder}"]
    assert len(said["warning"]) == 6 and said["warning"][-1] == "and 2 more files that are no sidecars"

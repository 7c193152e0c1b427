"""scripts/verify-gpu: its clear end without a GPU, what its report holds and what it must not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dicom_node.runtime.onnx import no_device

SCRIPT = Path(__file__).parent.parent / "scripts" / "verify-gpu"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("verify_gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("verify_gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.skipif(not no_device(), reason="this machine has an NVIDIA device")
def test_without_a_device_nothing_is_executed_and_nothing_written(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path / "report")]) == 1
    assert capsys.readouterr().out.startswith("no NVIDIA device: nothing was executed (")
    assert not (tmp_path / "report").exists()


def test_a_step_that_fails_stands_in_the_report_and_the_others_too(script, tmp_path, monkeypatch):
    """No step gives anything: the report still says of each why, and that no GPU was in it."""
    monkeypatch.setattr(script.sys, "executable", sys.executable)
    monkeypatch.setattr(
        script.subprocess, "run", lambda *_, **__: script.subprocess.CompletedProcess([], 3, "", "")
    )  # fmt: skip
    assert script.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["executed_on_gpu"] is False
    for step in ("plans", "backends", "torch"):
        assert report[step]["failed"].startswith("exit status 3")
    text = (tmp_path / "report.md").read_text()
    assert "nothing was executed on a GPU" in text.splitlines()[0]
    assert text.count("Failed: exit status 3") == 3


def test_the_report_names_neither_host_nor_path(script, monkeypatch):
    monkeypatch.setattr(script.socket, "gethostname", lambda: "ct-console-7.example.org")
    monkeypatch.setattr(script.Path, "home", lambda: Path("/home/jdoe"))
    text = script.scrub('{"a": "ct-console-7: /home/jdoe/venv/lib/x.so is missing", "b": "12.3/s", "c": "SM 8.6"}')
    assert json.loads(text) == {"a": "NAME: PATH is missing", "b": "12.3/s", "c": "SM 8.6"}
    assert "jdoe" not in script.scrub("by jdoe, on ct-console-7.example.org")


def test_the_table_says_what_was_reached_of_the_ceilings(script):
    row = {
        "task": "renal_ceus", "preset": "demo", "model": "classifier", "variant": "graph", "precision": "fp16",
        "reason": "", "batch": 8, "milliseconds": 0.25, "per_second": 32000.0, "flops": 2e12, "bytes": 1e12,
        "of_flops": 0.02, "of_bytes": 0.25, "against_eager": 6.5,
    }  # fmt: skip
    lost = row | {"variant": "compile", "reason": "RuntimeError: no compiler"}
    found = {"device": {"name": "GPU"}, "ceilings": {"fp32": 5e13, "fp16": 1e14, "bytes": 4e12}, "rows": [row, lost]}
    lines = script._torch(found).splitlines()
    assert "fp32 50.00 TFLOP/s, fp16 100.00 TFLOP/s, copy 4000 GB/s" in lines[1]
    assert lines[4].split() == [
        "renal_ceus", "demo", "classifier", "graph", "fp16", "8", "0.250", "32000.0", "2000.0", "2.0", "%", "1000.0",
        "25", "%", "6.50",
    ]  # fmt: skip
    assert lines[5].endswith("RuntimeError: no compiler")


@pytest.mark.long
def test_a_dry_run_holds_everything_that_needs_no_gpu(script, tmp_path):
    pytest.importorskip("torch")
    arguments = ["--device", "cpu", "--task", "renal_ceus", "--preset", "nano", "--seconds", "0.3"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {line["status"] for line in report["plans"]} == {"not here"}
    onnx = next(r for r in report["backends"]["rows"] if r["backend"] == "onnx")
    assert onnx["status"] == "accepted"
    assert onnx["ratio"]["rounds"] == 7
    eager = [r for r in report["torch"]["rows"] if (r["variant"], r["precision"]) == ("eager", "fp32")]
    assert 0 < eager[0]["of_flops"] < 1
    assert report["torch"]["ceilings"]["bytes"] > 1e8
    assert socket.gethostname() not in (tmp_path / "report.md").read_text()
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()

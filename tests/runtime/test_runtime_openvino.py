"""OpenVINO: single precision whatever the processor offers, no other patient's input, no file, no word to anyone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
from backends import ENGINES, models_of, tiny_model

from dicom_node import packages
from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place
from dicom_node.runtime.openvino import OpenVinoBackend

BACKEND = OpenVinoBackend()
pytestmark = pytest.mark.skipif(bool(BACKEND.missing()), reason=BACKEND.missing())


def session(model: Model | None = None, threads: int = 1) -> Any:
    return BACKEND.open(model or tiny_model(), Place(threads=threads))


def thyroid() -> Model:
    package = packages.load_package(ENGINES / "thyroid_cine/model")
    return next(model for model in models_of(package) if model.name == "classifier")


def test_runs_the_graph_at_any_batch() -> None:
    kept = session()
    for count in (5, 1, 3):
        x = np.linspace(-2, 3, 16 * count, dtype=np.float32).reshape(count, 1, 4, 4)
        found = kept.run({"x": x})
        for array, expected in zip((found["logits"], found["features"]), tiny_engine.answers(x), strict=True):
            np.testing.assert_allclose(array, expected, atol=1e-6)


def test_a_large_graph_lies_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.runtime.openvino.TWICE_BYTES", 100)
    kept = session()
    assert kept._one is kept._any
    x = np.ones((1, 1, 4, 4), np.float32)
    np.testing.assert_allclose(kept.run({"x": x})["logits"], tiny_engine.answers(x)[0], atol=1e-6)


def test_single_precision_and_the_given_threads_whatever_the_processor_offers() -> None:
    """The default is bfloat16 where the processor has it: faster, and wrong in the third digit."""
    kept = session(thyroid(), threads=2)
    assert kept._one is not kept._any
    for request in (kept._one, kept._any):
        said = request.get_compiled_model().get_property
        assert said("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
        assert (said("INFERENCE_NUM_THREADS"), said("NUM_STREAMS"), said("ENABLE_CPU_PINNING")) == (2, 1, False)


def test_answers_stay_when_the_session_runs_again() -> None:
    kept = session()
    first = kept.run({"x": np.ones((1, 1, 4, 4), np.float32)})
    before = {name: array.copy() for name, array in first.items()}
    kept.run({"x": np.full((1, 1, 4, 4), 9, np.float32)})
    kept.close()
    for name, array in first.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((1, 2, 4, 4), np.float32)},
        {"x": np.zeros((1, 1, 4, 4), np.float64)},
        {"x": np.zeros((4, 4), np.float32)},
        {"y": np.zeros((1, 1, 4, 4), np.float32)},
        {},
    ],
)
def test_wrong_input_is_a_fault_that_tells_shapes_and_no_values(inputs: dict[str, Any]) -> None:
    """By itself OpenVINO answers a missing input with the one before: another patient's."""
    kept = session()
    kept.run({"x": np.ones((1, 1, 4, 4), np.float32)})
    with pytest.raises(BackendError, match="OpenVINO"):
        kept.run(inputs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"graphs": {"fp32": b"not a graph"}}, "not an ONNX graph"),
        ({"graphs": {"fp32": b""}}, "not an ONNX graph"),
        ({"inputs": ("image",)}, "image"),
        ({"outputs": ("logits",)}, "logits"),
    ],
)
def test_refuses_what_was_not_promised(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PackageError, match=said):
        session(tiny_model(**changes))


@pytest.mark.parametrize("where", ["relative", "upwards", "absolute"])
def test_external_data_is_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    secret, size = tmp_path / "secret.bin", 20
    secret.write_bytes(np.ones((size, size), np.float32).tobytes())
    monkeypatch.chdir("/" if where == "upwards" else tmp_path)
    graph = tiny_engine.build_external(
        {"relative": "secret.bin", "upwards": f"..{secret}", "absolute": str(secret)}[where], size
    )
    with pytest.raises(PackageError, match="external data is not accepted"):
        session(tiny_model(graphs={"fp32": graph}, outputs=("y",), shapes={"x": (size,)}))


def test_loading_it_reports_to_nobody_and_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    """`import openvino` alone writes a client identifier into the home folder and sends an event over the network."""
    code = """
import socket, sys
def refuse(*_): raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from dicom_node.runtime.openvino import _openvino
ov = _openvino()
assert ov.Core().available_devices
assert not [m for m in sys.modules if "telemetry" in m or m.startswith("openvino.tools.ovc")], "loaded"
"""
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ENGINES.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_an_idle_session_costs_no_cpu() -> None:
    kept, model = session(thyroid(), threads=2), thyroid()
    kept.run({"x": np.zeros((1, *model.shapes["x"]), np.float32)})
    time.sleep(0.05)
    before, started = os.times(), time.monotonic()
    time.sleep(0.5)
    used = sum(os.times()[:2]) - sum(before[:2])
    assert used < 0.1 * (time.monotonic() - started)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BACKEND.missing() == 'openvino is not installed: pip install "dicom-node[openvino]"'


def test_a_broken_install_is_a_fault_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"cannot be loaded \(ModuleNotFoundError\)"):
        session()
    assert "openvino.tools.ovc" not in sys.modules or sys.modules["openvino.tools.ovc"] is not None

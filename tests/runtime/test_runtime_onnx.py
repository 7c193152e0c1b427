"""ONNX Runtime as the reference backend: promised names and types, no file of the machine, faults by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine

from dicom_node.errors import PackageError, WorkerError
from dicom_node.runtime import Session
from dicom_node.runtime.fake import FakeSession
from dicom_node.runtime.onnx import OnnxSession

OUTPUTS = ("logits", "features")


def session(graph: bytes | None = None, inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] = OUTPUTS) -> Any:
    return OnnxSession("classifier", graph or tiny_engine.GRAPH.read_bytes(), inputs, outputs, threads=1)


def built(**how: bool) -> bytes:
    pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    return tiny_engine.build_graph(**how)


def test_runs_the_graph() -> None:
    x = np.linspace(-2, 3, 80, dtype=np.float32).reshape(5, 1, 4, 4)
    found = session().run({"x": x})
    for array, expected in zip((found["logits"], found["features"]), tiny_engine.answers(x), strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_the_committed_graph_is_what_its_source_builds() -> None:
    x = np.ones((1, 1, 4, 4), np.float32)
    np.testing.assert_array_equal(session(built()).run({"x": x})["logits"], session().run({"x": x})["logits"])


@pytest.mark.parametrize("where", ["relative", "upwards", "absolute"])
def test_external_data_is_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """From bytes, ONNX Runtime would read a file relative to the working directory, wherever the graph came from."""
    pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    import onnxruntime

    secret, size = tmp_path / "secret.bin", 20
    secret.write_bytes(np.ones((size, size), np.float32).tobytes())
    monkeypatch.chdir("/" if where == "upwards" else tmp_path)
    graph = tiny_engine.build_external(
        {"relative": "secret.bin", "upwards": f"..{secret}", "absolute": str(secret)}[where], size
    )
    if where != "absolute":  # the danger is real
        naive = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        assert naive.run(None, {"x": np.ones((1, size), np.float32)})[0][0, 0] == size
    with pytest.raises(PackageError, match="refuses the graph"):
        session(graph, ("x",), ("y",))


@pytest.mark.parametrize(
    ("graph", "inputs", "outputs", "said"),
    [
        (b"not a graph", ("x",), OUTPUTS, "refuses the graph"),
        (b"", ("x",), OUTPUTS, "refuses the graph"),
        (None, ("image",), OUTPUTS, "its inputs are x; the manifest says image"),
        (None, ("x",), ("logits",), "its outputs are features, logits; the manifest says logits"),
    ],
)
def test_refuses_what_was_not_promised(
    graph: bytes | None, inputs: tuple[str, ...], outputs: tuple[str, ...], said: str
) -> None:
    with pytest.raises(PackageError, match=said):
        OnnxSession(
            "classifier", tiny_engine.GRAPH.read_bytes() if graph is None else graph, inputs, outputs, threads=1
        )


def test_refuses_double_precision_at_the_border() -> None:
    with pytest.raises(PackageError, match=r"tensor\(double\)"):
        session(built(double_input=True))


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
    with pytest.raises(WorkerError, match="ONNX Runtime"):
        session().run(inputs)


def test_an_idle_session_costs_no_cpu() -> None:
    import time

    kept = session()
    kept.run({"x": np.zeros((1, 1, 4, 4), np.float32)})
    before, started = os.times(), time.monotonic()
    time.sleep(0.5)
    used = sum(os.times()[:2]) - sum(before[:2])
    assert used < 0.25 * (time.monotonic() - started)


def test_the_fake_is_a_session_that_remembers() -> None:
    fake: Session = FakeSession(lambda inputs: {"logits": inputs["x"] * 2})
    assert fake.run({"x": np.ones(2, np.float32)})["logits"].tolist() == [2, 2]
    assert (fake.backend, len(fake.calls)) == ("fake", 1)  # type: ignore[attr-defined]
    fake.close()

"""Golden replay: a backend that answers otherwise than the training side measured is not used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_engine

from dicom_node.errors import PackageError, WorkerError
from dicom_node.runtime.accept import accept, check_head
from dicom_node.runtime.fake import FakeSession
from dicom_node.runtime.onnx import OnnxSession

OUTPUTS = ("logits", "features")


def golden(**changes: Any) -> dict[str, Any]:
    return tiny_engine.arrays(golden=changes)["golden"]


def drifting(by: float) -> FakeSession:
    def answer(inputs: Any) -> dict[str, Any]:
        logits, features = tiny_engine.answers(inputs["x"])
        return {"logits": logits + np.float32(by), "features": features}

    return FakeSession(answer)


def test_the_reference_is_accepted_and_the_table_says_how_well() -> None:
    session = OnnxSession("classifier", tiny_engine.GRAPH.read_bytes(), ("x",), OUTPUTS, threads=1)
    line = accept("classifier", session, golden(), 1e-3, OUTPUTS)
    assert (line.backend, line.precision, line.cases, line.tolerance) == ("onnx", "fp32", 3, 1e-3)
    assert 0 <= line.worst < 1e-6


def test_drift_within_the_tolerance_is_accepted_and_beyond_it_refused() -> None:
    largest = float(np.abs(golden()["classifier.logits"]).max())
    assert largest > 1  # so the tolerance is relative here
    line = accept("classifier", drifting(0.5e-3 * largest), golden(), 1e-3, OUTPUTS)
    assert line.worst == pytest.approx(0.5e-3, rel=0.01)
    with pytest.raises(PackageError, match=r"off by 2\.00e-03, allowed 1\.00e-03"):
        accept("classifier", drifting(2e-3 * largest), golden(), 1e-3, OUTPUTS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classifier.logits": None}, "no complete case"),
        ({"classifier.x": None}, "no complete case"),
        ({"classifier.logits": np.zeros((2, 2), np.float32)}, "no complete case"),
        ({name: np.zeros((0, 2)) for name in ("classifier.x", "classifier.logits", "classifier.features")}, "complete"),
        ({"classifier.logits": np.full((3, 2), np.nan, np.float32)}, "not finite"),
        ({"classifier.logits": np.zeros((3, 3), np.float32)}, "wrong shape"),
    ],
)
def test_golden_cases_that_prove_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PackageError, match=said):
        accept("classifier", drifting(0), golden(**changes), 1e-3, OUTPUTS)


def test_a_backend_that_gives_nan_or_fails_is_refused() -> None:
    with pytest.raises(PackageError, match="not finite"):
        accept("classifier", drifting(float("nan")), golden(), 1e-3, OUTPUTS)

    def fails(_: Any) -> dict[str, Any]:
        raise WorkerError("device lost")

    with pytest.raises(PackageError, match="on fake: device lost"):
        accept("classifier", FakeSession(fails), golden(), 1e-3, OUTPUTS)


def test_head_weights_of_another_network_are_refused() -> None:
    weights, bias = tiny_engine.W.astype(float), tiny_engine.B.astype(float)
    check_head("classifier", golden(), weights, bias, 1e-3)
    with pytest.raises(PackageError, match="not the head of this graph"):
        check_head("classifier", golden(), weights[::-1], bias, 1e-3)

"""Golden replay: a backend that answers otherwise than the training side measured is not used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_engine

from dicom_node.errors import PackageError, WorkerError
from dicom_node.runtime.accept import accept, answers_of, cases_of, check_head, hold, same_verdicts
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


def test_logits_are_held_to_the_tolerance_in_their_own_unit() -> None:
    """Whatever their size: thresholds are in that unit."""
    assert float(np.abs(golden()["classifier.logits"]).max()) > 1
    line = accept("classifier", drifting(0.5e-3), golden(), 1e-3, OUTPUTS)
    assert line.worst == pytest.approx(0.5e-3, rel=0.01)
    with pytest.raises(PackageError, match=r"on fake: logits off by 2\.00e-03, allowed 1\.00e-03"):
        accept("classifier", drifting(2e-3), golden(), 1e-3, OUTPUTS)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_maps_are_held_relative_to_their_largest_golden_value(scale: float) -> None:
    """A map of a hundredth is drawn as large as one of a hundred: an absolute limit would let the former be noise."""
    features = golden()["classifier.features"] * np.float32(scale)

    def answering(by: float) -> FakeSession:
        def answer(inputs: Any) -> dict[str, Any]:
            logits, maps = tiny_engine.answers(inputs["x"])
            return {"logits": logits, "features": maps * np.float32(scale) + np.float32(by * features.max())}

        return FakeSession(answer)

    scaled = golden(**{"classifier.features": features})
    line = accept("classifier", answering(0.5e-3), scaled, 1e-3, OUTPUTS)
    assert line.worst == pytest.approx(0.5e-3, rel=0.01)
    with pytest.raises(PackageError, match="features off by 2"):
        accept("classifier", answering(2e-3), scaled, 1e-3, OUTPUTS)


def test_the_live_reference_is_a_truth_of_its_own() -> None:
    """Golden within the tolerance on one side, the reference on the other: together too far."""
    cases = cases_of("classifier", golden(), OUTPUTS)
    session = drifting(0.8e-3)
    found = answers_of(session, cases)
    reference = {name: a - np.float32(0.8e-3 if name == "logits" else 0) for name, a in cases.outputs.items()}
    assert hold(session, cases, found, 1e-3).worst == pytest.approx(0.8e-3, rel=0.01)
    with pytest.raises(PackageError, match=r"logits off by 1\.60e-03"):
        hold(session, cases, found, 1e-3, reference)


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


def test_a_verdict_is_the_same_when_only_its_numbers_move_with_the_tolerance() -> None:
    said = (("HIGH", True, 0.9), ("LOW", True, 0.2))
    assert same_verdicts((("HIGH", True, 0.9009), ("LOW", True, 0.2)), said, 1e-3)
    for other in (
        (("HIGH", True, 0.902), said[1]),
        (("HIGH", False, 0.9), said[1]),
        (("INDET", True, 0.9), said[1]),
        (said[0], ("LOW", True, float("nan"))),
        said[:1],
        (said[0], said[1][:2]),
    ):
        assert not same_verdicts(other, said, 1e-3)

"""Image and clinical values together: the numbers, the sides, and what happens when one is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
from decided import TASK, manifest, package, result, unit

from dicom_node import fusion
from dicom_node.packages import FusionSpec, Task
from dicom_node.result import ClinicalInput, Code, Fusion, result_from_json

FSH = {
    "name": "FSH",
    "code": {"value": "15067-2", "scheme": "LN", "meaning": "FSH"},
    "unit": "[IU]/L",
    "range": [0.1, 99],
}
EDV = {"name": "EDV", "code": {"value": "11653-3", "scheme": "LN", "meaning": "EDV"}, "unit": "cm/s", "range": [0, 30]}
NOMOGRAM = Task.model_validate(
    tiny_engine.TASK
    | {
        "clinical": [FSH, EDV | {"per_side": True}],
        "image_outcome": {"value": "PROB-IMAGE", "scheme": "99INFER", "meaning": "Probability from the image"},
    }
)
SPEC: dict[str, Any] = {
    "terms": [
        {"name": "logit", "centre": 0, "scale": 2, "beta": 1.5, "axis": [-4, 4]},
        {"name": "FSH", "transform": "log", "centre": 2, "scale": 0.5, "beta": 0.8, "axis": [1, 60]},
        {"name": "EDV", "centre": 5, "scale": 2, "beta": -0.6, "axis": [1, 12]},
    ],
    "intercept": 0.2,
    "covariance": np.diag([0.04, 0.01, 0.09, 0.16]).tolist(),
    "decision": {"threshold": 0.6, "rule": "youden", "abstain": {"lower": 0.59, "upper": 0.61}},
    "fitted_on": "unit test",
    "n": 100,
}


def value(name: str, number: float, side: str = "") -> ClinicalInput:
    return ClinicalInput(name, Code("x", "LN", name), number, "1", "", "test", side)


VALUES = {v.key: v for v in (value("FSH", 20.0), value("EDV", 3.0, "R"), value("EDV", 6.0, "L"))}


def test_linear_predictor_probability_and_delta_method_interval_by_hand() -> None:
    made = fusion.fuse(FusionSpec.model_validate(SPEC), NOMOGRAM, 1.0, "R", VALUES)
    assert isinstance(made, Fusion)
    v = np.array([1, 0.5, (math.log(20) - 2) / 0.5, (3 - 5) / 2])
    linear = v @ np.array([0.2, 1.5, 0.8, -0.6])
    half = 1.959964 * math.sqrt(v @ np.diag([0.04, 0.01, 0.09, 0.16]) @ v)
    assert made.linear_predictor == pytest.approx(linear)
    expected = [1 / (1 + math.exp(-x)) for x in (linear, linear - half, linear + half)]
    assert (made.probability, made.low, made.high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("side", "edv"), [("R", 3.0), ("L", 6.0), ("B", 4.5)])
def test_a_side_takes_its_own_value_and_the_patient_the_mean(side: str, edv: float) -> None:
    made = fusion.fuse(FusionSpec.model_validate(SPEC), NOMOGRAM, 0.0, side, VALUES)
    assert isinstance(made, Fusion)
    assert [t.value for t in made.terms] == [0.0, 20.0, edv]


@pytest.mark.parametrize(
    ("without", "side", "said"),
    [
        ("FSH", "R", "FSH missing"),
        ("EDV L", "L", "EDV (left) missing"),
        ("EDV L", "B", "EDV (right and left) missing"),
        ("", "", "EDV (side unknown) missing"),
    ],
)
def test_a_missing_value_is_never_replaced(without: str, side: str, said: str) -> None:
    values = {key: v for key, v in VALUES.items() if key != without}
    made = fusion.fuse(FusionSpec.model_validate(SPEC), NOMOGRAM, 0.0, side, values)
    assert made == f"fusion not computed: {said}"


def test_the_result_carries_both_scores_or_the_images_alone_and_why(tmp_path: Path) -> None:
    site = replace(unit(), laterality="R")
    fused = result(tmp_path, site, task=NOMOGRAM, package=package(fusion=SPEC), clinical=VALUES)
    (found,) = fused.findings
    assert [s.outcome.value for s in found.scores] == [TASK.outcome.value, "PROB-IMAGE"]
    assert found.scores[0].low is not None and found.scores[0].low < found.scores[0].probability
    assert found.fusion is not None
    assert result_from_json(fused.to_json()) == fused
    (alone,) = result(tmp_path, site, task=NOMOGRAM, package=package(fusion=SPEC), clinical={}).findings
    assert [s.outcome.value for s in alone.scores] == ["PROB-IMAGE"]
    assert alone.scores[0] == found.scores[1]
    assert alone.notes == ("fusion not computed: FSH, EDV (right) missing",)
    assert alone.fusion is None


def test_the_fused_probability_is_judged_by_its_own_threshold(tmp_path: Path) -> None:
    """The image alone says HIGH; together with a low FSH it is LOW."""
    site = replace(unit(logits=(-1.0, 1.0)), laterality="R")
    low = VALUES | {"FSH": value("FSH", 1.0)}
    (found,) = result(tmp_path, site, task=NOMOGRAM, package=package(fusion=SPEC), clinical=low).findings
    assert found.scores[1].probability > manifest().decision.threshold
    assert found.category.value == "LOW"

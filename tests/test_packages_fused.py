"""A package's nomogram must fit its task, or the package is refused before it sees a patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_engine

from dicom_node import packages
from dicom_node.errors import PackageError

TASK: dict[str, Any] = {
    "clinical": [
        {"name": "FSH", "code": {"value": "15067-2", "scheme": "LN", "meaning": "FSH"}, "unit": "[IU]/L",
         "range": [0.1, 200]},
        {"name": "EDV", "code": {"value": "11653-3", "scheme": "LN", "meaning": "EDV"}, "unit": "cm/s",
         "range": [0, 60], "per_side": True},
    ],
    "image_outcome": {"value": "PROB-IMAGE", "scheme": "99INFER", "meaning": "Probability from the image"},
}  # fmt: skip
LOGIT = {"name": "logit", "centre": 0, "scale": 2, "beta": 1.5, "axis": [-4, 4]}
FSH = {"name": "FSH", "transform": "log", "centre": 2, "scale": 0.5, "beta": 0.8, "axis": [1, 60]}
EDV = {"name": "EDV", "centre": 5, "scale": 2, "beta": -0.6, "axis": [1, 12]}
FUSION: dict[str, Any] = {
    "terms": [LOGIT, FSH, EDV],
    "intercept": 0.2,
    "covariance": [[0.04, 0.01, 0, 0], [0.01, 0.01, 0, 0], [0, 0, 0.09, 0], [0, 0, 0, 0.16]],
    "decision": {"threshold": 0.6, "rule": "youden", "abstain": {"lower": 0.59, "upper": 0.61}},
    "fitted_on": "unit test",
    "n": 100,
}


def active(root: Path, fusion: dict[str, Any], task: dict[str, Any]) -> packages.ModelPackage:
    folder = tiny_engine.write_task(root / "engines", "", package=False, **task)
    tiny_engine.write_package(folder / "model", {"fusion": fusion})
    return packages.active_package(packages.load_task(folder), root)


def test_a_nomogram_on_the_values_of_the_task_is_accepted(tmp_path: Path) -> None:
    spec = active(tmp_path, FUSION, TASK).manifest.fusion
    assert spec is not None
    assert [term.name for term in spec.terms] == ["logit", "FSH", "EDV"]


@pytest.mark.parametrize(
    ("fusion", "task", "said"),
    [
        ({"terms": [LOGIT, FSH, EDV | {"name": "LDH"}]}, {}, "no clinical value LDH"),
        ({}, {"clinical": []}, "no clinical value EDV, FSH"),
        ({}, {"image_outcome": None}, "names no image_outcome"),
        ({"terms": [LOGIT, FSH, EDV | {"transform": "log"}]}, {}, "EDV may be 0 or less"),
        ({"terms": [LOGIT | {"transform": "log"}, FSH, EDV]}, {}, "logit may be 0 or less"),
        ({"terms": [LOGIT, FSH | {"axis": [0, 60]}, EDV]}, {}, "FSH may be 0 or less"),
        ({"terms": [LOGIT, FSH, EDV | {"axis": [12, 1]}]}, {}, "EDV: axis"),
        ({"covariance": [[0.04, 0.02, 0, 0], [0.01, 0.01, 0, 0], *FUSION["covariance"][2:]]}, {}, "not symmetric"),
        ({"covariance": [[0.04, 0.9, 0, 0], [0.9, 0.01, 0, 0], *FUSION["covariance"][2:]]}, {}, "not symmetric"),
        ({"covariance": FUSION["covariance"][:3]}, {}, "one row and column for the intercept"),
    ],
)
def test_a_nomogram_that_cannot_be_computed_is_refused(
    tmp_path: Path, fusion: dict[str, Any], task: dict[str, Any], said: str
) -> None:
    with pytest.raises(PackageError, match=said):
        active(tmp_path, FUSION | fusion, TASK | task)

"""Figures of a card: readers, fusion, pointing, plots; and the gates against fooling ourselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from engines.training import evaluate, plots, stats
from engines.training.cohort import Cohort
from engines.training.package import Choices, Scored


def cohort(n: int = 200, seed: int = 0, signal: float = 0.0) -> Cohort:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    nuisance = rng.normal(size=(n, 3)) + signal * y[:, None]
    covariates = np.stack([np.exp(rng.normal(2 + y, 0.6)), rng.normal(10 - 3 * y, 2)], axis=1)
    x = np.zeros((n, 1, 1, 4, 4), np.float16)
    return Cohort(x, np.ones(n, int), y, np.zeros((n, 4, 4), np.float16), np.arange(n), nuisance, (), covariates)


def choices(**changes: Any) -> Choices:
    return replace(Choices(1.0, 0, 0, 0.5, 0.45, 0.55, np.zeros(2), np.eye(2), 1e9), **changes)


def scored(data: Cohort, strength: float = 1.5, seed: int = 3) -> Scored:
    rng = np.random.default_rng(seed)
    margin = strength * (2 * data.y - 1) + rng.normal(0, 1.5, len(data.y))
    return Scored(data.y, margin, rng.normal(size=(len(data.y), 2)), np.arange(len(data.y)))


FUSION: dict[str, Any] = {
    "terms": [
        {"name": "logit", "centre": 0.0, "scale": 1.0, "beta": 1.0, "axis": [-5, 5]},
        {"name": "FSH", "transform": "log", "centre": 2.5, "scale": 0.6, "beta": 1.2, "axis": [1, 60]},
        {"name": "VOLUME", "centre": 8.5, "scale": 2.0, "beta": -1.0, "axis": [3, 20]},
    ],
    "intercept": 0.0,
    "decision": {"threshold": 0.5, "abstain": {"lower": 0.45, "upper": 0.55}},
}


def test_the_shortcut_baseline_sees_a_leak_and_nothing_where_there_is_none() -> None:
    assert evaluate.shortcut(cohort(seed=1), cohort(seed=2)).value < 0.65
    assert evaluate.shortcut(cohort(seed=1, signal=2), cohort(seed=2, signal=2)).value > 0.9


def test_fusion_of_a_cohort_agrees_with_the_nodes_own_arithmetic() -> None:
    from dicom_node import fusion
    from dicom_node.packages import FusionSpec, Task
    from dicom_node.result import ClinicalInput, Code, Fusion

    entry = {"code": {"value": "1", "scheme": "LN", "meaning": "x"}, "unit": "1", "range": [0, 1000]}
    zero = [[0.0] * 4] * 4
    decision = FUSION["decision"] | {"rule": "test"}
    spec = FusionSpec.model_validate(FUSION | {"covariance": zero, "fitted_on": "x", "n": 1, "decision": decision})
    task = Task.model_construct(clinical=tuple(_entries(entry)))
    data = cohort(6)
    linear = evaluate.fusion_margin(FUSION, ("FSH", "VOLUME"), np.linspace(-1, 1, 6), data.covariates)
    for margin, (fsh, volume), expected in zip(np.linspace(-1, 1, 6), data.covariates, linear, strict=True):
        values = {
            name: ClinicalInput(name, Code("1", "LN", "x"), float(v), "1", "", "test")
            for name, v in (("FSH", fsh), ("VOLUME", volume))
        }
        made = fusion.fuse(spec, task, float(margin), "", values)
        assert isinstance(made, Fusion)
        assert made.linear_predictor == pytest.approx(expected)


def _entries(entry: dict[str, Any]) -> list[Any]:
    from dicom_node.packages import ClinicalEntry

    return [ClinicalEntry.model_validate(entry | {"name": name}) for name in ("FSH", "VOLUME")]


def test_fused_figures_stand_beside_the_images_with_a_paired_test() -> None:
    data = cohort(400)
    found = evaluate.fused(FUSION, ("FSH", "VOLUME"), choices(), scored(data), data)
    assert found["auc"]["value"] > stats.auc(data.y, scored(data).margin)
    assert found["auc_minus_image"]["ci95"][0] > 0
    assert found["p"] < 0.05


def test_readers_are_compared_on_the_units_they_read(tmp_path: Path) -> None:
    data = cohort(100)
    rng = np.random.default_rng(1)
    rows = ["unit,junior,senior"]
    rows += [
        f"{s},{rng.random():.3f},{0.6 * y + 0.5 * rng.random():.3f}" for s, y in zip(data.seeds, data.y, strict=True)
    ]
    (tmp_path / "readers.csv").write_text("\n".join(rows[:81]), "utf-8")
    found = evaluate.readers(tmp_path / "readers.csv", data, scored(data).margin)
    assert set(found) == {"junior", "senior"}
    assert found["junior"]["network_minus_reader"]["ci95"][0] > 0
    assert found["senior"]["auc"]["value"] > found["junior"]["auc"]["value"]
    (tmp_path / "other.csv").write_text("unit,a\n9999,0.5\n", "utf-8")
    with pytest.raises(ValueError, match="names no unit"):
        evaluate.readers(tmp_path / "other.csv", data, scored(data).margin)


class _Pointer:
    """A graph whose map peaks in one cell of a volume."""

    outputs = ("logits", "features")

    def __init__(self, cell: tuple[int, int, int]) -> None:
        self.cell = cell

    def run(self, x: Any) -> dict[str, Any]:
        features = np.zeros((len(x), 1, 2, 4, 4), np.float32)
        features[(slice(None), 0, *self.cell)] = 1
        return {"logits": np.zeros((len(x), 2), np.float32), "features": features}


@pytest.mark.parametrize(("cell", "rate"), [((1, 2, 2), 1.0), ((0, 0, 0), 0.0)])
def test_pointing_game_in_a_volume(cell: tuple[int, int, int], rate: float) -> None:
    n = 20
    x = np.random.default_rng(0).uniform(0, 1, (n, 1, 1, 8, 32, 32)).astype(np.float16)
    place = np.zeros((n, 2, 4, 4), np.float16)
    place[:, 1, 2, 2] = 1
    data = Cohort(x, np.ones(n, int), np.ones(n, int), place, np.arange(n), np.zeros((n, 1)), ())
    weights = np.array([[0.0], [1.0]], np.float32)
    found = evaluate.pointing(_Pointer(cell), weights, data)  # type: ignore[arg-type]
    assert found["hit_rate"]["value"] == rate
    assert 0 < found["chance"] < 1


def test_corruptions_of_a_volume_keep_its_shape_and_range() -> None:
    x = np.random.default_rng(0).uniform(-1, 3, (2, 1, 4, 16, 16)).astype(np.float32)
    made = evaluate.corruptions(x, (-1, 3), np.random.default_rng(1))
    assert {v.shape for v in made.values()} == {x.shape}
    assert made["black"].max() == -1
    assert made["inverted"] == pytest.approx(2 - x, abs=1e-5)


def test_roc_runs_from_corner_to_corner_and_its_area_is_the_auc(tmp_path: Path) -> None:
    data = cohort(300)
    p = stats.sigmoid(np.round(scored(data).margin, 1))  # with ties
    false, true = plots.roc(data.y, p)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert float(np.trapezoid(true, false)) == pytest.approx(stats.auc(data.y, p))
    plots.draw(tmp_path, data.y, p, evaluate.figures(scored(data), choices(), 0))
    assert {f.name for f in tmp_path.iterdir()} == {"roc.png", "reliability.png"}

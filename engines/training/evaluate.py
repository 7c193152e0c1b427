"""Evaluate: a package on cohorts of unseen seeds, against shortcuts, corruptions and chance. Prints nothing itself.

Runs the package's ONNX graph, never torch: what is measured is what is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy import ndimage

from engines.training import stats
from engines.training.cohort import Cohort
from engines.training.package import Choices, Scored, activation_map
from engines.training.recipe import Recipe

BATCH = 32


@dataclass(frozen=True)
class Graph:
    """The scoring model of a package."""

    session: onnxruntime.InferenceSession

    @classmethod
    def of(cls, path: Path) -> Graph:
        from engines.training.export import session

        return cls(session(path))

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.session.get_outputs())

    def run(self, x: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """All outputs by name, in batches."""
        parts = [
            self.session.run(list(self.outputs), {"x": np.asarray(x[start : start + BATCH], np.float32)})
            for start in range(0, len(x), BATCH)
        ]
        return {name: np.concatenate([p[i] for p in parts]) for i, name in enumerate(self.outputs)}

    def __call__(self, x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(logits, features)."""
        out = self.run(x)
        return out["logits"], out["features"]

    def pooled(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """(n, C): features averaged over space, as the node's gate sees them."""
        parts = [self(x[start : start + BATCH])[1] for start in range(0, len(x), BATCH)]
        return np.concatenate([pooled(part) for part in parts])


def pooled(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, C, ...) to (n, C)."""
    return features.reshape(*features.shape[:2], -1).mean(axis=2, dtype=np.float64)


def score(graph: Graph, cohort: Cohort, positive: int = 1) -> Scored:
    """A cohort through the graph."""
    frames, owner = cohort.frames()
    margins, features = [], []
    for start in range(0, len(frames), BATCH):
        logits, maps = graph(frames[start : start + BATCH])
        margins.append(logits[:, positive].astype(np.float64) - logits[:, 1 - positive])
        features.append(pooled(maps))
    margin = stats.per_unit(np.concatenate(margins), owner, len(cohort.y))
    return Scored(cohort.y, margin, np.concatenate(features), owner)


def figures(scored: Scored, choices: Choices, refused: int) -> dict[str, Any]:
    """The table of one cohort. Indeterminate and refused units count as wrong in `right`; never dropped there."""
    y, p, called = scored.y, choices.probability(scored.margin), choices.called(scored.margin)
    far = choices.ood(scored) > choices.ood_limit
    right = (called == y) & ~far
    table = reported(y, p, scored.margin / choices.temperature, choices.threshold)
    return {
        "n": len(y),
        "positives": int(y.sum()),
        **table,
        "indeterminate": stats.proportion(int((called == -1).sum()), len(y)).to_json(),
        "out_of_distribution": stats.proportion(int(far.sum()), len(y)).to_json(),
        "refused_by_rule": refused,
        "right_as_reported": stats.proportion(int(right.sum()), len(y) + refused).to_json(),
    }


def reported(y: stats.Labels, p: stats.Array, margin: stats.Array, threshold: float) -> dict[str, Any]:
    """Discrimination, calibration and usefulness of a probability (TRIPOD+AI items)."""
    slope, intercept = stats.calibration_line(y, margin)
    high = p >= threshold
    return {
        "auc": stats.delong(y, margin).to_json(),
        "sensitivity": stats.proportion(int(high[y == 1].sum()), int((y == 1).sum())).to_json(),
        "specificity": stats.proportion(int((~high[y == 0]).sum()), int((y == 0).sum())).to_json(),
        "sensitivity_bootstrap": stats.bootstrap(y, p, lambda t, s: float((s[t == 1] >= threshold).mean())).to_json(),
        "specificity_bootstrap": stats.bootstrap(y, p, lambda t, s: float((s[t == 0] < threshold).mean())).to_json(),
        "brier": round(float(((p - y) ** 2).mean()), 4),
        "ece": round(stats.ece(y, p), 4),
        "calibration_slope": round(slope, 3),
        "calibration_intercept": round(intercept, 3),
        "net_benefit": {str(t): round(stats.net_benefit(y, p, t), 3) for t in (0.2, 0.5, 0.8)},
    }


def fused(
    fusion: Mapping[str, Any], names: tuple[str, ...], choices: Choices, scored: Scored, cohort: Cohort
) -> dict[str, Any]:
    """The table of image and clinical values together, and against the image alone (paired DeLong)."""
    linear = fusion_margin(fusion, names, scored.margin / choices.temperature, cohort.covariates)
    p = stats.sigmoid(linear)
    decision = fusion["decision"]
    band = decision["abstain"]
    unsure = (p >= band["lower"]) & (p <= band["upper"])
    right = ((p >= decision["threshold"]) == (cohort.y == 1)) & ~unsure & (choices.ood(scored) <= choices.ood_limit)
    difference, value = stats.delong_paired(cohort.y, linear, scored.margin)
    return {
        **reported(cohort.y, p, linear, decision["threshold"]),
        "indeterminate": stats.proportion(int(unsure.sum()), len(p)).to_json(),
        "right_as_reported": stats.proportion(int(right.sum()), len(p) + len(cohort.refused)).to_json(),
        "auc_minus_image": difference.to_json(),
        "p": round(value, 4),
    }


def fusion_margin(
    fusion: Mapping[str, Any], names: tuple[str, ...], margin: stats.Array, covariates: stats.Array
) -> stats.Array:
    """Linear predictor (n,) of `Manifest.fusion`; `names` are the columns of `covariates`, `margin` is calibrated."""
    total = np.full(len(margin), float(fusion["intercept"]))
    for term in fusion["terms"]:
        values = margin if term["name"] == "logit" else covariates[:, names.index(term["name"])]
        values = np.log(values) if term.get("transform", "none") == "log" else values
        total += term["beta"] * (values - term["centre"]) / term["scale"]
    return total


def shortcut(train: Cohort, test: Cohort) -> stats.Interval:
    """AUC of a logistic model on image statistics and metadata: what is to be had without seeing the lesion."""
    return _logistic(train.nuisance, train.y, test.nuisance, test.y)


def covariates_alone(train: Cohort, test: Cohort) -> stats.Interval:
    """AUC of a logistic model on the clinical values alone."""
    return _logistic(train.covariates, train.y, test.covariates, test.y)


def _logistic(x: stats.Array, y: stats.Labels, other: stats.Array, truth: stats.Labels) -> stats.Interval:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)).fit(x, y)
    return stats.delong(truth, model.decision_function(other))


def single_input(graph: Graph, cohort: Cohort) -> list[float]:
    """AUC of each input alone, for comparison with the pooled score; [] where a unit has one."""
    found: list[float] = []
    if cohort.x.shape[1] == 1:
        return found
    for index in range(cohort.x.shape[1]):
        has = cohort.counts > index
        logits = graph(cohort.x[has][:, index])[0]
        found.append(round(stats.auc(cohort.y[has], logits[:, 1].astype(np.float64) - logits[:, 0]), 4))
    return found


# --- does the gate hold? ---------------------------------------------------------------------------------------------


def corruptions(
    x: NDArray[np.float32], value_range: tuple[float, float], rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Inputs (n, C, *space) that are no such image any more; `value_range` is black and white of a network input."""
    low, high = value_range
    grey = (x - low) / (high - low)
    changed = {
        "noise": rng.random(x.shape, dtype=np.float32),
        "inverted": 1 - grey,
        "half gain": grey * 0.5,
        "half black": grey * (np.arange(x.shape[-1]) < x.shape[-1] // 2),
        "blur 4 px": ndimage.gaussian_filter(grey, (0,) * (x.ndim - 2) + (4, 4)),
        "upside down": grey[..., ::-1, :],
        "black": np.zeros_like(grey),
    }
    return {name: np.asarray(value * (high - low) + low, np.float32) for name, value in changed.items()}


def flagged(graph: Graph, choices: Choices, x: NDArray[np.float32], owner: stats.Labels) -> float:
    """Share of units above the limit; `owner` says which unit an input belongs to."""
    distance = stats.mahalanobis2(graph.pooled(x), choices.ood_mean, choices.ood_precision)
    return float((stats.per_unit(distance, owner, int(owner.max()) + 1) > choices.ood_limit).mean())


def corruption_table(
    recipe: Recipe, graph: Graph, choices: Choices, cohort: Cohort, units: int = 60
) -> dict[str, float]:
    """Share of corrupted units that the gate refuses; {} for inputs that are no images."""
    x = cohort.x[:units].astype(np.float32)
    if x.ndim < 5:
        return {}
    inputs = x.reshape(-1, *x.shape[2:])
    owner = np.repeat(np.arange(len(x)), x.shape[1])
    rng = np.random.default_rng(0)
    return {
        name: round(flagged(graph, choices, changed, owner), 3)
        for name, changed in corruptions(inputs, recipe.value_range, rng).items()
    }


# --- does the map point at the signal? -------------------------------------------------------------------------------


def maps(graph: Graph, weights: NDArray[np.float32], x: NDArray[Any]) -> NDArray[np.float32]:
    """Signed maps (n, *grid) of inputs: the graph's own, or the head's."""
    out = graph.run(x)
    return out["cam"] if "cam" in out else activation_map(out["features"], weights, 1)


def pointing(graph: Graph, weights: NDArray[np.float32], cohort: Cohort, units: int = 100) -> dict[str, Any]:
    """Pointing game on positives (Zhang et al. 2018): is the map's maximum within a cell of the planted signal?

    Chance is the share of such cells where the input is lit: in the dark corners nobody would point.
    """
    hits, chance = 0, []
    chosen = np.flatnonzero(cohort.y == 1)[:units]
    for index in chosen:
        x = cohort.x[index, : cohort.counts[index]]
        cam = maps(graph, weights, x).mean(axis=0)
        if cam.ndim > cohort.place.ndim - 1:  # a map per phase: the phases share one place
            cam = cam.mean(axis=0)
        place = _to_grid(cohort.place[index].astype(np.float32), cam.shape)
        target = ndimage.maximum_filter(place, 3) > 0.05
        lit = _lit(x.astype(np.float32), cam.shape)
        hits += bool(target[np.unravel_index(int(np.argmax(np.where(lit, cam, -np.inf))), cam.shape)])
        chance.append(float(target[lit].mean()))
    return {
        "hit_rate": stats.proportion(hits, len(chosen)).to_json(),
        "chance": round(float(np.mean(chance)), 3),
        "n": len(chosen),
    }


def _to_grid(values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    factors = [a / b for a, b in zip(shape, values.shape, strict=True)]
    return np.asarray(ndimage.zoom(values, factors, order=1, grid_mode=True, mode="nearest"), np.float32)


def _lit(x: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Cells that are brighter than the darkest twentieth of the range, over all inputs and channels."""
    image = x.max(axis=tuple(range(x.ndim - len(shape))))
    grid = _to_grid(image, shape)
    lit: NDArray[np.bool_] = grid > image.min() + 0.05 * (image.max() - image.min())
    return lit if lit.any() else np.ones(shape, np.bool_)


# --- against readers -------------------------------------------------------------------------------------------------


def readers(table: Path, cohort: Cohort, margin: stats.Array) -> dict[str, Mapping[str, Any]]:
    """Each reader of a CSV (columns `unit`, then one column of scores a reader) against the network, paired DeLong.

    `unit` is the seed, or the number of the row in the table of labels.
    """
    import csv

    with table.open(newline="", encoding="utf-8") as file:
        rows = {int(row["unit"]): row for row in csv.DictReader(file)}
    known = np.flatnonzero([int(seed) in rows for seed in cohort.seeds])
    if not len(known):
        raise ValueError(f"{table.name}: column unit names no unit of this cohort")
    names = [name for name in next(iter(rows.values())) if name != "unit"]
    y = cohort.y[known]
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        scores = np.array([float(rows[int(s)][name]) for s in cohort.seeds[known]])
        difference, p = stats.delong_paired(y, margin[known], scores)
        found[name] = {
            "auc": stats.delong(y, scores).to_json(),
            "network_minus_reader": difference.to_json(),
            "p": round(p, 4),
        }
    return found

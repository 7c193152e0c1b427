"""Evaluate: a package on cohorts of unseen seeds, against shortcuts, corruptions and real files. Prints nothing itself.

Runs the package's ONNX graph, never torch: what is measured is what is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy import ndimage

from engines.training import stats
from engines.training.cohort import Cohort, phantom_of
from engines.training.package import Choices, Scored, activation_map


@dataclass(frozen=True)
class Graph:
    """The classifier of a package."""

    session: onnxruntime.InferenceSession

    def __call__(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(logits, features)."""
        logits, features = self.session.run(["logits", "features"], {"x": np.asarray(x, np.float32)})
        return logits, features


def score(graph: Graph, cohort: Cohort, positive: int = 1) -> Scored:
    """A cohort through the graph."""
    frames, owner = cohort.frames()
    margins, pooled = [], []
    for start in range(0, len(frames), 64):
        logits, features = graph(frames[start : start + 64].astype(np.float32))
        margins.append(logits[:, positive].astype(np.float64) - logits[:, 1 - positive])
        pooled.append(features.mean(axis=(2, 3), dtype=np.float64))
    margin = stats.per_unit(np.concatenate(margins), owner, len(cohort.y))
    return Scored(cohort.y, margin, np.concatenate(pooled), owner)


def figures(scored: Scored, choices: Choices, refused: int) -> dict[str, Any]:
    """The table of one cohort. Indeterminate and refused clips count as wrong in `right`; never dropped there."""
    y, p, called = scored.y, choices.probability(scored.margin), choices.called(scored.margin)
    far = choices.ood(scored) > choices.ood_limit
    right = (called == y) & ~far
    slope, intercept = stats.calibration_line(y, scored.margin / choices.temperature)
    high = p >= choices.threshold
    return {
        "n": len(y),
        "positives": int(y.sum()),
        "auc": stats.delong(y, scored.margin).to_json(),
        "sensitivity": stats.proportion(int(high[y == 1].sum()), int((y == 1).sum())).to_json(),
        "specificity": stats.proportion(int((~high[y == 0]).sum()), int((y == 0).sum())).to_json(),
        "sensitivity_bootstrap": stats.bootstrap(
            y, p, lambda t, s: float((s[t == 1] >= choices.threshold).mean())
        ).to_json(),
        "indeterminate": stats.proportion(int((called == -1).sum()), len(y)).to_json(),
        "out_of_distribution": stats.proportion(int(far.sum()), len(y)).to_json(),
        "refused_by_rule": refused,
        "right_as_reported": stats.proportion(int(right.sum()), len(y) + refused).to_json(),
        "brier": round(float(((p - y) ** 2).mean()), 4),
        "ece": round(stats.ece(y, p), 4),
        "calibration_slope": round(slope, 3),
        "calibration_intercept": round(intercept, 3),
        "net_benefit": {str(t): round(stats.net_benefit(y, p, t), 3) for t in (0.2, 0.5, 0.8)},
    }


def shortcut(train: Cohort, test: Cohort) -> stats.Interval:
    """AUC of a logistic model on image statistics and metadata: what is to be had without seeing the mass."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)).fit(train.nuisance, train.y)
    return stats.delong(test.y, model.decision_function(test.nuisance))


def single_frame(graph: Graph, cohort: Cohort) -> list[float]:
    """AUC of each time after arrival alone, for comparison with the pooled score."""
    found = []
    for index in range(cohort.x.shape[1]):
        has = cohort.counts > index
        logits = np.concatenate(
            [
                graph(cohort.x[has][start : start + 64, index].astype(np.float32))[0]
                for start in range(0, int(has.sum()), 64)
            ]
        )
        found.append(round(stats.auc(cohort.y[has], logits[:, 1].astype(np.float64) - logits[:, 0]), 4))
    return found


# --- does the gate hold? ---------------------------------------------------------------------------------------------


def corruptions(x: NDArray[np.float32], rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Inputs that are no contrast image any more; `x` is normalised (0 = a quarter grey, -1 = black)."""
    grey = (x + 1) / 4
    changed = {
        "noise": rng.random(x.shape, dtype=np.float32),
        "inverted": 1 - grey,
        "half gain": grey * 0.5,
        "half black": grey * (np.arange(x.shape[-1]) < x.shape[-1] // 2),
        "blur 4 px": ndimage.gaussian_filter(grey, (0, 0, 4, 4)),
        "upside down": grey[..., ::-1, :],
        "black": np.zeros_like(grey),
    }
    return {name: np.asarray(value * 4 - 1, np.float32) for name, value in changed.items()}


def flagged(graph: Graph, choices: Choices, x: NDArray[np.float32], owner: stats.Labels) -> float:
    """Share of units above the limit; `owner` says which unit a frame belongs to."""
    pooled = np.concatenate(
        [graph(x[start : start + 64])[1].mean(axis=(2, 3), dtype=np.float64) for start in range(0, len(x), 64)]
    )
    distance = stats.mahalanobis2(pooled, choices.ood_mean, choices.ood_precision)
    return float((stats.per_unit(distance, owner, int(owner.max()) + 1) > choices.ood_limit).mean())


def corruption_table(graph: Graph, choices: Choices, cohort: Cohort, clips: int = 60) -> dict[str, float]:
    """Share of corrupted clips that the gate refuses."""
    x = cohort.x[:clips].astype(np.float32)
    frames = x.reshape(-1, *x.shape[2:])
    owner = np.repeat(np.arange(len(x)), x.shape[1])
    rng = np.random.default_rng(0)
    return {
        name: round(flagged(graph, choices, changed, owner), 3) for name, changed in corruptions(frames, rng).items()
    }


# --- does the map point at the mass? ---------------------------------------------------------------------------------


def pointing(
    graph: Graph,
    weights: NDArray[np.float32],
    cohort: Cohort,
    task: str,
    generator: Mapping[str, Any],
    clips: int = 100,
) -> dict[str, Any]:
    """Pointing game on positives: is the map's maximum in the mass (8 px margin)? Chance = share of the lit area."""
    phantom = phantom_of(task)
    hits, chance = 0, []
    chosen = np.flatnonzero(cohort.y == 1)[:clips]
    for index in chosen:
        mass = phantom.make(int(cohort.seeds[index]), 1, generator, frames=1).mass
        mass = ndimage.binary_dilation(mass, iterations=8)
        x = cohort.x[index, : cohort.counts[index]].astype(np.float32)
        cam = activation_map(graph(x)[1], weights, 1).mean(axis=0)
        row, column = np.unravel_index(int(np.argmax(cam)), cam.shape)
        at = (int((row + 0.5) * mass.shape[0] / cam.shape[0]), int((column + 0.5) * mass.shape[1] / cam.shape[1]))
        hits += bool(mass[at])
        lit = (
            ndimage.zoom(x.max(axis=(0, 1)), (mass.shape[0] / x.shape[-2], mass.shape[1] / x.shape[-1]), order=0) > -0.9
        )
        chance.append(mass[lit[: mass.shape[0], : mass.shape[1]]].mean())
    return {
        "hit_rate": stats.proportion(hits, len(chosen)).to_json(),
        "chance": round(float(np.mean(chance)), 3),
        "n": len(chosen),
    }

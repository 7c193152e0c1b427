"""The nomogram: a logistic model of the image's log-odds and clinical values, as `fusion` of a manifest. No torch.

Fit it on log-odds that the network gave for patients it was not trained on (cross-fitted): in-sample log-odds are too
far apart, and the model would trust the image more than it deserves. Only the node applies a fusion to a patient
(`dicom_node.decide`); `apply_fusion` is the same arithmetic for evaluation.

Maximum likelihood by iteratively reweighted least squares; the covariance of the coefficients is the inverse of the
observed (= expected, for the canonical link) Fisher information, and the interval of a probability the delta method's
on the log-odds (Agresti, Categorical Data Analysis, 5.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from engines.training import stats
from engines.training.stats import Array, Labels

LOGIT = "logit"
RIDGE = 1e-3
"""Penalty on the standardised coefficients, in units of log likelihood: far below the weight of one patient, but it
keeps the estimate finite where a small cohort happens to be separable."""
ABSTAIN_SHARE = 0.02
"""Share of the cohort nearest to the threshold that is called indeterminate."""
_Z95 = 1.959963984540054
_MAX_STEPS = 100


class Term(NamedTuple):
    """A clinical value of the model: its key (`ClinicalEntry.name`) and how it enters."""

    name: str
    transform: Literal["none", "log"] = "none"


def fit_fusion(
    margin: Array, covariates: Array, y: Labels, terms: Sequence[Term], fitted_on: str = ""
) -> dict[str, Any]:
    """`fusion` of the manifest (packages/schema.py, FusionSpec).

    `margin` (n,): log-odds of the image after calibration, out of fold. `covariates` (n, k): the values as measured, in
    the order of `terms`, which do not name the image.
    """
    raw = np.column_stack([margin, covariates]).astype(np.float64)
    named = (Term(LOGIT), *terms)
    if raw.shape[1] != len(named) or not np.isfinite(raw).all():
        raise ValueError("fusion: one finite column of covariates for each term")
    if len({t.name for t in named}) != len(named) or set(np.unique(y)) != {0, 1}:
        raise ValueError("fusion: every term once, both classes present")
    moved = np.column_stack([_transformed(column, t.transform) for column, t in zip(raw.T, named, strict=True)])
    centre, scale = moved.mean(axis=0), moved.std(axis=0)
    if not (scale > 0).all():
        raise ValueError("fusion: a covariate does not vary")
    centre, scale = _rounded(centre), _rounded(scale)
    design = np.column_stack([np.ones(len(y)), (moved - centre) / scale])
    beta, covariance = logistic(design, y)
    beta = _rounded(beta)
    low, high = _axes(raw)
    return {
        "terms": [
            {
                "name": t.name,
                "transform": t.transform,
                "centre": float(centre[i]),
                "scale": float(scale[i]),
                "beta": float(beta[i + 1]),
                "axis": [float(low[i]), float(high[i])],
            }
            for i, t in enumerate(named)
        ],
        "intercept": float(beta[0]),
        "covariance": _rounded(covariance).tolist(),
        "decision": _decision(y, design @ beta),
        "fitted_on": fitted_on,
        "n": len(y),
    }


def logistic(design: Array, y: Labels) -> tuple[Array, Array]:
    """Coefficients of a logistic regression and their covariance; the first column of `design` is the intercept's."""
    penalty = RIDGE * np.eye(design.shape[1])
    penalty[0, 0] = 0.0
    beta = np.zeros(design.shape[1])

    def loss(b: Array) -> float:
        return stats.nll(y, design @ b) * len(y) + 0.5 * float(b @ penalty @ b)

    for _ in range(_MAX_STEPS):
        p = stats.sigmoid(design @ beta)
        gradient = design.T @ (y - p) - penalty @ beta
        step = np.linalg.solve(_information(design, p) + penalty, gradient)
        size = 1.0
        while loss(beta + size * step) > loss(beta) + 1e-12 and size > 1e-6:
            size /= 2
        beta = beta + size * step
        if float(np.abs(size * step).max()) < 1e-10:
            break
    else:
        raise RuntimeError("fusion: the regression does not converge")
    return beta, np.asarray(np.linalg.inv(_information(design, stats.sigmoid(design @ beta)) + penalty), np.float64)


def apply_fusion(spec: Mapping[str, Any], margin: float, values: Mapping[str, float]) -> tuple[float, float, float]:
    """(probability, low, high): the 95 % interval is the delta method's. A missing value raises KeyError."""
    x = [1.0]
    for term in spec["terms"]:
        value = margin if term["name"] == LOGIT else values[term["name"]]
        moved = float(_transformed(np.array([value]), term["transform"])[0])
        x.append((moved - term["centre"]) / term["scale"])
    row = np.array(x)
    eta = float(row @ np.array([spec["intercept"], *(t["beta"] for t in spec["terms"])]))
    half = _Z95 * math.sqrt(float(row @ np.array(spec["covariance"]) @ row))
    p, low, high = stats.sigmoid(np.array([eta, eta - half, eta + half]))
    return float(p), float(low), float(high)


def probabilities(spec: Mapping[str, Any], margin: Array, covariates: Array) -> Array:
    """Fused probability of a whole cohort, `covariates` (n, k) in the order of the spec's terms."""
    names = [t["name"] for t in spec["terms"] if t["name"] != LOGIT]
    return np.array(
        [
            apply_fusion(spec, float(m), dict(zip(names, row.tolist(), strict=True)))[0]
            for m, row in zip(margin, covariates, strict=True)
        ]
    )


def _information(design: Array, p: Array) -> Array:
    return np.asarray(design.T @ (design * (p * (1 - p))[:, None]), np.float64)


def _transformed(column: Array, transform: str) -> Array:
    if transform == "none":
        return np.asarray(column, np.float64)
    if not (column > 0).all():
        raise ValueError("fusion: a logarithm needs values above 0")
    return np.asarray(np.log(column), np.float64)


def _decision(y: Labels, eta: Array) -> dict[str, Any]:
    """Youden's threshold and the narrow band around it, as `package.choose` takes them for an image alone."""
    threshold = float(np.clip(stats.youden(y, stats.sigmoid(eta)), 0.05, 0.95))
    centre = math.log(threshold / (1 - threshold))
    half = float(np.quantile(np.abs(eta - centre), ABSTAIN_SHARE))
    lower, upper = stats.sigmoid(np.array([centre - half, centre + half]))
    return {
        "threshold": round(threshold, 6),
        "rule": "youden on the cohort of the fusion",
        "abstain": {
            "lower": min(round(float(lower), 6), round(threshold, 6)),
            "upper": max(round(float(upper), 6), round(threshold, 6)),
        },
    }


def _axes(raw: Array) -> tuple[Array, Array]:
    """The range of each value in the cohort, to two digits of its width, outwards but not past zero."""
    low, high = raw.min(axis=0), raw.max(axis=0)
    step = 10 ** np.floor(np.log10(high - low) - 1)
    down, up = np.floor(low / step) * step, np.ceil(high / step) * step
    down = np.where((down <= 0) & (low > 0), low, down)  # the axis of a logarithm has no zero
    return _rounded(down, 6), _rounded(up, 6)


def _rounded(values: Array, digits: int = 10) -> Array:
    """To significant digits: what the manifest shows is what was fitted."""
    flat = [float(f"{v:.{digits}g}") for v in np.ravel(values)]
    return np.array(flat).reshape(np.shape(values))

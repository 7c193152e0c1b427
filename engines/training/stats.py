"""Statistics of the model cards: AUC with DeLong interval, bootstrap, calibration, covariance. numpy and scipy only.

References: DeLong et al. 1988 in the O(n log n) form of Sun & Xu 2014; Ledoit & Wolf 2004; Guo et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats as distributions

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, object]:
        return {"value": round(self.value, 4), "ci95": [round(self.low, 4), round(self.high, 4)]}


def auc(y: Labels, score: Array) -> float:
    """Area under the ROC curve; ties count half."""
    positives, negatives = score[y == 1], score[y == 0]
    ranks = distributions.rankdata(np.concatenate([positives, negatives]))
    m, n = len(positives), len(negatives)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def _delong_parts(y: Labels, score: Array) -> tuple[Array, Array]:
    """Placement values V10 of the positives and V01 of the negatives (their means are the AUC)."""
    positives, negatives = score[y == 1], score[y == 0]
    m, n = len(positives), len(negatives)
    joint = distributions.rankdata(np.concatenate([positives, negatives]))
    own = distributions.rankdata(positives), distributions.rankdata(negatives)
    return (joint[:m] - own[0]) / n, 1 - (joint[m:] - own[1]) / m


def delong(y: Labels, score: Array, level: float = 0.95) -> Interval:
    """AUC with the DeLong interval on the logit scale, which stays within 0..1."""
    v10, v01 = _delong_parts(y, score)
    value = float(v10.mean())
    variance = v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)
    if variance <= 0 or not 0 < value < 1:
        # Perfect separation has no variance to estimate: fall back on the rule of three of the smaller class.
        return Interval(value, max(0.0, value - 3 / min(len(v10), len(v01))), min(1.0, value))
    z = distributions.norm.ppf(0.5 + level / 2)
    centre, width = np.log(value / (1 - value)), z * np.sqrt(variance) / (value * (1 - value))
    return Interval(
        value, float(distributions.logistic.cdf(centre - width)), float(distributions.logistic.cdf(centre + width))
    )


def delong_paired(y: Labels, first: Array, second: Array, level: float = 0.95) -> tuple[Interval, float]:
    """Difference of two correlated AUCs with its interval, and the two-sided p value."""
    a, b = _delong_parts(y, first), _delong_parts(y, second)
    difference = float(a[0].mean() - b[0].mean())
    variance = float((a[0] - b[0]).var(ddof=1) / len(a[0]) + (a[1] - b[1]).var(ddof=1) / len(a[1]))
    if variance <= 0:
        return Interval(difference, difference, difference), 1.0 if difference == 0 else 0.0
    half = distributions.norm.ppf(0.5 + level / 2) * np.sqrt(variance)
    p = 2 * distributions.norm.sf(abs(difference) / np.sqrt(variance))
    return Interval(difference, difference - float(half), difference + float(half)), float(p)


def proportion(hits: int, n: int, level: float = 0.95) -> Interval:
    """Share with the Wilson interval."""
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    low, high = distributions.binomtest(hits, n).proportion_ci(level, "wilson")
    return Interval(hits / n, float(low), float(high))


def bootstrap(
    y: Labels, score: Array, statistic: Callable[[Labels, Array], float], seed: int = 0, rounds: int = 2000
) -> Interval:
    """Percentile interval, resampled within each class."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(y == k) for k in (0, 1)]
    values = []
    for _ in range(rounds):
        chosen = np.concatenate([rng.choice(members, len(members)) for members in classes])
        values.append(statistic(y[chosen], score[chosen]))
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(statistic(y, score), float(low), float(high))


def sigmoid(margin: Array) -> Array:
    """Probability of a logit."""
    return np.asarray(distributions.logistic.cdf(margin), np.float64)


def nll(y: Labels, margin: Array) -> float:
    """Mean negative log likelihood of a logit."""
    return float(np.logaddexp(0, np.where(y == 1, -margin, margin)).mean())


def temperature(y: Labels, margin: Array) -> float:
    """T that minimises the likelihood of margin / T."""

    def loss(log_t: float) -> float:
        return nll(y, margin / np.exp(log_t))

    found = optimize.minimize_scalar(loss, bounds=(-2.5, 2.5), method="bounded")
    return float(np.exp(found.x))


def ece(y: Labels, probability: Array, bins: int = 10) -> float:
    """Expected calibration error over equally filled bins."""
    parts = np.array_split(np.argsort(probability, kind="stable"), bins)
    return float(sum(len(p) * abs(probability[p].mean() - y[p].mean()) for p in parts if len(p)) / len(y))


def calibration_line(y: Labels, margin: Array) -> tuple[float, float]:
    """Slope and intercept of the logistic recalibration (1 and 0 are ideal)."""

    def loss(w: Array) -> float:
        return nll(y, w[0] * margin + w[1]) + 1e-6 * float(w[0]) ** 2

    found = optimize.minimize(loss, np.array([1.0, 0.0]))
    return float(found.x[0]), float(found.x[1])


def net_benefit(y: Labels, probability: Array, threshold: float) -> float:
    """Decision-curve net benefit of treating above the threshold (Vickers & Elkin 2006)."""
    called = probability >= threshold
    true, false = (called & (y == 1)).mean(), (called & (y == 0)).mean()
    return float(true - false * threshold / (1 - threshold))


def youden(y: Labels, probability: Array) -> float:
    """Threshold of largest sensitivity + specificity: the middle of the best gap between neighbouring scores."""
    order = np.sort(np.unique(probability))
    candidates = (order[1:] + order[:-1]) / 2
    gains = [(probability[y == 1] >= t).mean() + (probability[y == 0] < t).mean() for t in candidates]
    best = np.flatnonzero(np.isclose(gains, max(gains)))
    return float(candidates[best].mean())


def ledoit_wolf(samples: Array) -> tuple[Array, Array]:
    """Mean and shrunk covariance."""
    mean = samples.mean(axis=0)
    x = samples - mean
    n, p = x.shape
    covariance = x.T @ x / n
    mu = np.trace(covariance) / p
    delta = ((covariance - mu * np.eye(p)) ** 2).sum() / p
    beta = min(delta, (((x**2).T @ (x**2)) / n - covariance**2).sum() / (n * p))
    shrink = beta / delta if delta > 0 else 1.0
    return mean, shrink * mu * np.eye(p) + (1 - shrink) * covariance


def mahalanobis2(samples: Array, mean: Array, precision: Array) -> Array:
    """Squared distance of each row."""
    x = samples - mean
    return np.asarray(np.einsum("nc,cd,nd->n", x, precision, x), np.float64)


def per_unit(values: Array, owner: Labels, units: int) -> Array:
    """Mean of the frames of each unit."""
    return np.asarray(np.bincount(owner, values, units) / np.bincount(owner, minlength=units), np.float64)

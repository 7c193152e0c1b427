"""The statistics behind the cards, against scikit-learn, scipy and published worked values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as distributions

from engines.training import stats


def _scores(n: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return y, rng.normal(size=n) + shift * y


def test_auc_counts_ties_half() -> None:
    y, score = np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 2.0, 3.0])
    assert stats.auc(y, score) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_auc_matches_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    y, score = _scores(301, 0.8, 1)
    score = np.round(score, 1)  # many ties
    assert stats.auc(y, score) == pytest.approx(metrics.roc_auc_score(y, score), abs=1e-12)


def test_delong_variance_matches_the_definition() -> None:
    """DeLong 1988, computed pair by pair."""
    y, score = _scores(60, 1.0, 2)
    score = np.round(score, 1)
    kernel = (score[y == 1][:, None] > score[y == 0]) + 0.5 * (score[y == 1][:, None] == score[y == 0])
    v10, v01 = kernel.mean(axis=1), kernel.mean(axis=0)
    sd = np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    value = kernel.mean()
    interval = stats.delong(y, score)
    assert interval.value == pytest.approx(value)
    centre = np.log(value / (1 - value))
    half = 1.959964 * sd / (value * (1 - value))
    assert (interval.low, interval.high) == pytest.approx(
        tuple(distributions.logistic.cdf([centre - half, centre + half])), abs=1e-6
    )


def test_delong_interval_covers() -> None:
    true = distributions.norm.cdf(1 / np.sqrt(2))
    intervals = [stats.delong(*_scores(100, 1.0, seed)) for seed in range(300)]
    covered = np.mean([i.low <= true <= i.high for i in intervals])
    assert 0.91 <= covered <= 0.985


def test_delong_says_something_about_perfect_separation() -> None:
    interval = stats.delong(np.arange(40) % 2, np.arange(40) % 2 * 1.0)
    assert interval.value == 1.0
    assert interval.low == pytest.approx(1 - 3 / 20)


def test_paired_delong_sees_a_difference_and_none() -> None:
    rng = np.random.default_rng(3)
    y, score = _scores(400, 1.5, 3)
    worse = score + rng.normal(size=400) * 2
    difference, p = stats.delong_paired(y, score, worse)
    assert difference.low > 0
    assert p < 0.01
    same, p = stats.delong_paired(y, score, 2 * score + 1)
    assert same.value == 0
    assert p == 1.0


def test_wilson_interval_matches_the_worked_value() -> None:
    """81 of 263 gives 0.2553 to 0.3662 (Newcombe 1998, table I, score method)."""
    interval = stats.proportion(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_bootstrap_is_repeatable_and_brackets_the_estimate() -> None:
    y, score = _scores(200, 1.0, 4)
    one, two = (stats.bootstrap(y, score, stats.auc, seed=5, rounds=200) for _ in range(2))
    assert one == two
    assert one.low < one.value < one.high


def test_temperature_recovers_an_overconfident_score() -> None:
    rng = np.random.default_rng(6)
    margin = rng.normal(size=20000) * 2
    y = (rng.random(20000) < stats.sigmoid(margin)).astype(np.int64)
    assert stats.temperature(y, margin * 3) == pytest.approx(3, rel=0.05)
    slope, intercept = stats.calibration_line(y, margin * 3)
    assert slope == pytest.approx(1 / 3, rel=0.05)
    assert intercept == pytest.approx(0, abs=0.05)
    assert stats.ece(y, stats.sigmoid(margin)) < 0.02 < stats.ece(y, stats.sigmoid(margin * 3))


def test_net_benefit_of_treating_all_is_the_prevalence_at_threshold_zero() -> None:
    y = np.array([1, 1, 0, 0, 0])
    assert stats.net_benefit(y, np.ones(5), 1e-9) == pytest.approx(0.4, abs=1e-6)
    assert stats.net_benefit(y, np.zeros(5), 0.5) == 0


def test_youden_lies_in_the_gap() -> None:
    y = np.array([0, 0, 0, 1, 1])
    assert stats.youden(y, np.array([0.1, 0.2, 0.3, 0.7, 0.9])) == pytest.approx(0.5)


def test_ledoit_wolf_matches_scikit_learn() -> None:
    covariance = pytest.importorskip("sklearn.covariance", reason="scikit-learn is not installed")
    samples = np.random.default_rng(7).normal(size=(80, 30)) @ np.diag(np.linspace(0.5, 3, 30))
    mean, shrunk = stats.ledoit_wolf(samples)
    theirs = covariance.LedoitWolf().fit(samples)
    assert shrunk == pytest.approx(theirs.covariance_, rel=1e-6, abs=1e-9)
    distance = stats.mahalanobis2(samples, mean, np.linalg.inv(shrunk))
    assert distance == pytest.approx(theirs.mahalanobis(samples), rel=1e-6)

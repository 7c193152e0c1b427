"""A radiomics signature: few columns of a feature table, by filters and a cross-validated LASSO, and their weights.

Steps, all on training units: logarithm of positive, skewed columns; columns that hardly vary go; of columns that say
the same (rank correlation) the one that separates best stays; LASSO-logistic regression, penalty by cross-validation
with the one-standard-error rule (Hastie, Tibshirani & Friedman 2009, 7.10); ridge-logistic weights of what is left.
numpy, scipy and scikit-learn; knows no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from engines.training import stats
from engines.training.stats import Array, Labels

FOLDS = 5
PENALTIES = np.logspace(-2.5, 0.5, 16)
"""Inverse strengths C of the LASSO, strongest first."""
MAX_CORRELATION = 0.9
SKEWED = 1.0
RIDGE_C = 1.0
LOG_FLOOR = 1e-6


@dataclass(frozen=True)
class Term:
    """beta * (t(value) - centre) / scale, t the natural logarithm where `log`."""

    name: str
    column: int
    log: bool
    centre: float
    scale: float
    beta: float


@dataclass(frozen=True)
class Signature:
    """The selected columns, in the order of the table, and how many each step left."""

    terms: tuple[Term, ...]
    intercept: float
    steps: dict[str, int]
    penalty: float
    """C of the LASSO that was chosen."""

    def standardised(self, x: Array) -> Array:
        """(n, S)."""
        columns = [
            (np.log(np.maximum(x[:, t.column], LOG_FLOOR)) if t.log else x[:, t.column]) - t.centre for t in self.terms
        ]
        return np.stack(columns, axis=1) / np.array([t.scale for t in self.terms])

    def margin(self, x: Array) -> Array:
        """Log-odds of class 1."""
        return np.asarray(self.standardised(x) @ np.array([t.beta for t in self.terms]) + self.intercept, np.float64)

    def to_json(self) -> dict[str, Any]:
        """For the provenance."""
        return {
            "features": [t.name for t in self.terms],
            "logarithm_of": [t.name for t in self.terms if t.log],
            "beta": [round(t.beta, 5) for t in self.terms],
            "intercept": round(self.intercept, 5),
            "columns_left": self.steps,
            "lasso_c": round(self.penalty, 6),
        }


def select(x: NDArray[Any], y: Labels, names: Sequence[str], seed: int = 0) -> Signature:
    """The signature of a table (n, F); the same table and seed give the same one."""
    raw = x.astype(np.float64)
    if raw.shape != (len(y), len(names)) or not np.isfinite(raw).all():
        raise ValueError("signature: one finite column for each name, one row for each label")
    logged = np.array([_skewed(column) for column in raw.T])
    table = np.where(logged, np.log(np.maximum(raw, LOG_FLOOR)), raw)
    varied = _varied(table)
    kept = _distinct(table, y, varied)
    centre, scale = table.mean(axis=0), np.where(table.std(axis=0) > 0, table.std(axis=0), 1.0)
    z = (table - centre) / scale
    penalty, chosen = _lasso(z[:, kept], y, seed)
    columns = [kept[i] for i in chosen]
    beta, intercept = _ridge(z[:, columns], y)
    terms = tuple(
        Term(names[c], c, bool(logged[c]), float(centre[c]), float(scale[c]), float(b))
        for c, b in zip(columns, beta, strict=True)
    )
    steps = {"all": len(names), "varying": len(varied), "distinct": len(kept), "lasso": len(columns)}
    return Signature(terms, intercept, steps, penalty)


def cross_fitted(x: NDArray[Any], y: Labels, names: Sequence[str], seed: int = 0) -> Array:
    """Log-odds of each unit by a signature selected and weighed without it: what a fusion is fitted on."""
    margin = np.zeros(len(y))
    for fold in range(FOLDS):
        out = _folds(y, seed) == fold
        margin[out] = select(x[~out], y[~out], names, seed).margin(x[out].astype(np.float64))
    return margin


def dump(signature: Signature) -> dict[str, Any]:
    """Whole, for a file; the inverse of `load`."""
    return asdict(signature)


def load(content: dict[str, Any]) -> Signature:
    """A signature from its file."""
    return Signature(**(content | {"terms": tuple(Term(**t) for t in content["terms"])}))


def _skewed(column: Array) -> bool:
    """Would the logarithm be nearer to symmetric?"""
    if column.min() <= LOG_FLOOR or column.std() == 0:
        return False
    plain = abs(float(distributions.skew(column)))
    return plain > SKEWED and abs(float(distributions.skew(np.log(column)))) < plain


def _varied(table: Array) -> list[int]:
    """Columns with more than rounding in them: a robust spread of at least a millionth of their size."""
    low, high = np.quantile(table, (0.05, 0.95), axis=0)
    return [int(c) for c in np.flatnonzero(high - low > 1e-6 * np.maximum(np.abs(table).max(axis=0), 1e-12))]


def _distinct(table: Array, y: Labels, columns: Sequence[int]) -> list[int]:
    """Of columns whose ranks agree, the best separated one; in the order of the table."""
    apart = {c: abs(stats.auc(y, table[:, c]) - 0.5) for c in columns}
    ranks = {c: distributions.rankdata(table[:, c]) for c in columns}
    kept: list[int] = []
    for c in sorted(columns, key=lambda c: (-apart[c], c)):
        if all(abs(float(np.corrcoef(ranks[c], ranks[k])[0, 1])) <= MAX_CORRELATION for k in kept):
            kept.append(c)
    return sorted(kept)


def _folds(y: Labels, seed: int) -> NDArray[np.int64]:
    """Fold of each unit, both classes spread evenly."""
    fold = np.zeros(len(y), np.int64)
    rng = np.random.default_rng(seed)
    for label in (0, 1):
        members = rng.permutation(np.flatnonzero(y == label))
        fold[members] = np.arange(len(members)) % FOLDS
    return fold


def _lasso(z: Array, y: Labels, seed: int) -> tuple[float, list[int]]:
    """(C, columns with a weight): the strongest penalty within a standard error of the best loss."""
    fold = _folds(y, seed)
    losses = np.zeros((len(PENALTIES), FOLDS))
    for k in range(FOLDS):
        inside = fold != k
        for i, c in enumerate(PENALTIES):
            model = _fitted(z[inside], y[inside], c, l1=True)
            losses[i, k] = stats.nll(y[~inside], model.decision_function(z[~inside]))
    mean, error = losses.mean(axis=1), losses.std(axis=1, ddof=1) / np.sqrt(FOLDS)
    best = int(np.argmin(mean))
    for i, c in enumerate(PENALTIES):
        chosen = np.flatnonzero(_fitted(z, y, c, l1=True).coef_[0])
        # Where the best penalty leaves nothing (labels that mean nothing), the strongest that leaves something.
        if len(chosen) and (mean[i] <= mean[best] + error[best] or i >= best):
            return float(c), [int(k) for k in chosen]
    raise RuntimeError("signature: no column is left at any penalty")


def _ridge(z: Array, y: Labels) -> tuple[Array, float]:
    model = _fitted(z, y, RIDGE_C, l1=False)
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0])


def _fitted(z: Array, y: Labels, c: float, *, l1: bool) -> Any:
    from sklearn.linear_model import LogisticRegression

    ratio = 1.0 if l1 else 0.0
    solver = "liblinear" if l1 else "lbfgs"
    return LogisticRegression(l1_ratio=ratio, C=c, solver=solver, max_iter=2000, random_state=0).fit(z, y)

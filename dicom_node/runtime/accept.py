"""Acceptance: a backend serves an engine only after it has given the package's golden answers on this machine.

golden.npz holds arrays `<model>.<input>` and `<model>.<output>`, batch first, as the training side measured them. Reads
nothing but these arrays, decides nothing about patients; called by the worker before it says that an engine is ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import PackageError, WorkerError
from dicom_node.runtime import Session


@dataclass(frozen=True, slots=True)
class Accepted:
    """One line of the acceptance table: kept, logged and shown."""

    model: str
    backend: str
    precision: str
    cases: int
    worst: float
    """Largest difference of any output from its golden value, relative where the largest golden value is above 1."""
    tolerance: float


def accept(
    model: str, session: Session, golden: Mapping[str, NDArray[Any]], tolerance: float, outputs: tuple[str, ...]
) -> Accepted:
    """Replay the golden cases of one model. Raises PackageError when they are missing or an answer is off."""
    cases = {name.removeprefix(f"{model}."): a for name, a in golden.items() if name.startswith(f"{model}.")}
    inputs = {name: array for name, array in cases.items() if name not in outputs}
    count = len(next(iter(inputs.values()), ()))
    if not count or not set(outputs) <= cases.keys() or any(len(array) != count for array in cases.values()):
        raise PackageError(f"golden replay of {model}: golden.npz holds no complete case")
    try:
        answers = session.run(inputs)
    except WorkerError as e:
        raise PackageError(f"golden replay of {model} on {session.backend}: {e}") from None
    worst = max(_difference(model, name, answers[name], cases[name]) for name in outputs)
    if worst > tolerance:
        raise PackageError(
            f"golden replay of {model} on {session.backend}: off by {worst:.2e}, allowed {tolerance:.2e}"
        )
    return Accepted(model, session.backend, session.precision, count, worst, tolerance)


def _difference(model: str, name: str, found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise PackageError(f"golden replay of {model}: {name} has the wrong shape or is not finite")
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale


def check_head(
    model: str,
    golden: Mapping[str, NDArray[Any]],
    weights: NDArray[np.float64],
    bias: NDArray[np.float64],
    tolerance: float,
) -> None:
    """head.npz must be this graph's linear head, or the class activation map would explain another network.

    Raises PackageError unless W · GAP(features) + b gives the golden logits.
    """
    logits, features = golden[f"{model}.logits"].astype(np.float64), golden[f"{model}.features"].astype(np.float64)
    if features.ndim < 3 or features.shape[1] != weights.shape[1]:
        raise PackageError(f"golden replay of {model}: features do not fit head.npz")
    pooled = features.mean(axis=tuple(range(2, features.ndim)))
    worst = _difference(model, "logits", pooled @ weights.T + bias, logits)
    if worst > tolerance:
        raise PackageError(f"golden replay of {model}: head.npz is not the head of this graph (off by {worst:.2e})")

"""Acceptance: a backend serves an engine only after it has given the package's golden answers on this machine.

golden.npz holds arrays `<model>.<input>` and `<model>.<output>`, batch first, as the training side measured them; a
package of one model may leave the prefix out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import PackageError
from dicom_node.runtime import Session


@dataclass(frozen=True, slots=True)
class Accepted:
    """One line of the acceptance table: kept, logged and shown."""

    model: str
    backend: str
    precision: str
    cases: int
    worst: float
    """Largest absolute difference of any output, relative to the largest golden value of that output."""
    tolerance: float


def accept(
    model: str, session: Session, golden: Mapping[str, NDArray[Any]], tolerance: float, outputs: tuple[str, ...]
) -> Accepted:
    """Replay the golden cases of one model. Raises PackageError when they are missing or an answer is off."""
    prefix = f"{model}."
    mine = {name.removeprefix(prefix): a for name, a in golden.items() if name.startswith(prefix) or "." not in name}
    inputs = {name: array for name, array in mine.items() if name not in outputs}
    if not inputs or not set(outputs) <= mine.keys():
        raise PackageError(f"golden.npz holds no complete case for {model}")
    answer = session.run(inputs)
    worst = 0.0
    for name in outputs:
        expected, found = mine[name], answer[name]
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise PackageError(f"golden replay of {model}: {name} has the wrong shape or is not finite")
        scale = max(1.0, float(np.abs(expected).max()))
        worst = max(worst, float(np.abs(found.astype(np.float64) - expected).max()) / scale)
    if worst > tolerance:
        raise PackageError(
            f"golden replay of {model} on {session.backend}: off by {worst:.2e}, allowed {tolerance:.2e}"
        )
    cases = len(next(iter(inputs.values())))
    return Accepted(model, session.backend, session.precision, cases, worst, tolerance)

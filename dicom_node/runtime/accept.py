"""Acceptance: a backend serves an engine only after it has given the package's golden answers on this machine.

golden.npz holds arrays `<model>.<input>` and `<model>.<output>`, batch first, as the training side measured them. Reads
nothing but these arrays, decides nothing about patients; called by the worker before it says that an engine is ready.

Logits are compared in their own unit, because thresholds are; any other output is a map, compared relative to its
largest golden value, because what is drawn of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import PackageError, WorkerError
from dicom_node.runtime import Session

LOGITS = "logits"
Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Judge: TypeAlias = Callable[[Arrays], tuple[tuple[object, ...], ...]]
"""Outputs of the explained model -> what the node would decide for each case, such as (category, inside the limit of
the distance, probability). Two backends must give the same; numbers (float) may differ by the tolerance."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """One line of the acceptance table: kept, logged and shown."""

    model: str
    backend: str
    precision: str
    cases: int
    worst: float
    """Largest difference of any output, from golden.npz or from the reference: of logits absolute, of maps relative."""
    tolerance: float


@dataclass(frozen=True, slots=True, eq=False)
class Cases:
    """The golden cases of one model."""

    model: str
    inputs: Arrays
    outputs: Arrays
    count: int

    @staticmethod
    def shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
        """Without the batch axis."""
        return {name: array.shape[1:] for name, array in arrays.items()}

    def first(self) -> dict[str, NDArray[Any]]:
        """Inputs of one case, as a batch of one."""
        return {name: array[:1] for name, array in self.inputs.items()}

    def repeated(self, count: int) -> dict[str, NDArray[Any]]:
        """Inputs of all cases again and again, as a batch of `count`."""
        return {name: _repeated(array, count) for name, array in self.inputs.items()}


def _repeated(array: NDArray[Any], count: int) -> NDArray[Any]:
    """From the second case on: a session that answers with its own memory then shows it in the answers before."""
    return np.take(array, np.arange(1, count + 1) % len(array), axis=0)


def cases_of(model: str, golden: Arrays, outputs: tuple[str, ...]) -> Cases:
    """Raises PackageError when golden.npz holds no complete case of this model."""
    own = {name.removeprefix(f"{model}."): _fixed(a) for name, a in golden.items() if name.startswith(f"{model}.")}
    inputs = {name: array for name, array in own.items() if name not in outputs}
    count = len(next(iter(inputs.values()), ()))
    if not count or not set(outputs) <= own.keys() or any(len(array) != count for array in own.values()):
        raise PackageError(f"golden replay of {model}: golden.npz holds no complete case")
    return Cases(model, inputs, {name: own[name] for name in outputs}, count)


def _fixed(array: NDArray[Any]) -> NDArray[Any]:
    """No backend may write into what the next one is held to."""
    view = array.view()
    view.flags.writeable = False
    return view


def answers_of(session: Session, cases: Cases) -> dict[str, NDArray[Any]]:
    """All cases in one batch. Raises PackageError when the session fails."""
    return _run(session, cases, cases.inputs)


def accept(
    model: str,
    session: Session,
    golden: Arrays,
    tolerance: float,
    outputs: tuple[str, ...],
) -> Accepted:
    """Replay the golden cases of one model. Raises PackageError when they are missing or an answer is off."""
    cases = cases_of(model, golden, outputs)
    return hold(session, cases, answers_of(session, cases), tolerance)


def hold(
    session: Session, cases: Cases, found: Arrays, tolerance: float, reference: Arrays | None = None, *, most: int = 0
) -> Accepted:
    """Hold the answers of a session to golden.npz and to what the reference answers on this machine.

    One case is run alone as well: a study of one lesion must give what it gives in a batch, and answers that a session
    gave before must not change when it runs again. `most`: the largest batch that the session is given; the cases are
    repeated to fill it, because a compiled plan has a graph for each batch, and few cases reach the smaller ones alone.
    Raises PackageError.
    """
    alone = _run(session, cases, cases.first())
    full = _run(session, cases, cases.repeated(most)) if most > cases.count else None
    truths = [cases.outputs, *([] if reference is None else [reference])]
    worst = 0.0
    for name in cases.outputs:
        for truth in truths:
            worst = max(worst, difference(cases.model, name, found[name], truth[name]))
            worst = max(worst, difference(cases.model, name, alone[name], truth[name][:1], truth[name]))
            if full is not None:
                worst = max(worst, difference(cases.model, name, full[name], _repeated(truth[name], most)))
        if not worst <= tolerance:
            raise PackageError(
                f"golden replay of {cases.model} on {session.backend}: "
                f"{name} off by {worst:.2e}, allowed {tolerance:.2e}"
            )
    return Accepted(cases.model, session.backend, session.precision, cases.count, worst, tolerance)


def _run(session: Session, cases: Cases, inputs: Arrays) -> dict[str, NDArray[Any]]:
    try:
        answers = session.run(inputs)
    except WorkerError as e:
        raise PackageError(f"golden replay of {cases.model} on {session.backend}: {e}") from None
    missing = sorted(cases.outputs.keys() - answers.keys())
    if missing:
        raise PackageError(f"golden replay of {cases.model} on {session.backend}: no {', '.join(missing)}")
    return answers


def difference(
    model: str, name: str, found: NDArray[Any], expected: NDArray[Any], scale: NDArray[Any] | None = None
) -> float:
    """Largest absolute difference; of a map, relative to its largest expected value. Raises PackageError."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise PackageError(f"golden replay of {model}: {name} has the wrong shape or is not finite")
    largest = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    if name == LOGITS:
        return largest
    # A map that is zero everywhere has no scale of its own.
    return largest / (float(np.abs(expected if scale is None else scale).max(initial=0.0)) or 1.0)


def same_verdicts(
    found: tuple[tuple[object, ...], ...], expected: tuple[tuple[object, ...], ...], tolerance: float
) -> bool:
    """No decision flips: every case is judged as it was. A probability may move with the logits, and by the last of
    the four digits that are reported."""
    return len(found) == len(expected) and all(
        len(a) == len(b) and all(_same(x, y, tolerance + 1e-4) for x, y in zip(a, b, strict=True))
        for a, b in zip(found, expected, strict=True)
    )


def _same(found: object, expected: object, tolerance: float) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= tolerance
    return found == expected


def check_head(
    model: str,
    golden: Arrays,
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
    worst = difference(model, LOGITS, pooled @ weights.T + bias, logits)
    if worst > tolerance:
        raise PackageError(f"golden replay of {model}: head.npz is not the head of this graph (off by {worst:.2e})")

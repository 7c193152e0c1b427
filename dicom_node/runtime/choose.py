"""The backend of one engine on this machine: the fastest of those that give the golden answers and decide alike.

The reference is loaded first and held to golden.npz; if it fails, nothing serves. Every other backend is then opened,
held to the golden answers, to the reference's own answers here and now, and to its decisions. Whatever a candidate
does (raises, gives NaN, another shape, another answer, or is slow), the reference serves. A crash or a hang inside
a native library cannot be caught here: `at` tells the caller which backend is about to be touched, so that the parent
of a worker that died knows which one to leave out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from dicom_node.errors import NodeError, PackageError
from dicom_node.runtime import REFERENCE, Backend, Model, Place, Session
from dicom_node.runtime.accept import Accepted, Arrays, Cases, Judge, answers_of, cases_of, hold, same_verdicts
from dicom_node.runtime.guard import Guarded, bound

CLEARLY = 1.1
"""A candidate must be this much faster than the reference: machines are shared and timings noisy, and a backend that
changed from start to start would be a change of a live engine each time."""
SECONDS = 0.7
"""For timing all accepted backends of one engine."""
ROUNDS = (3, 31)
"""At least so many, whatever they take, or the median is no median; at most so many."""
_Key: TypeAlias = tuple[str, str]
"""Name and precision of a backend."""
_REFERENCE: _Key = (REFERENCE, "fp32")
_FAULTS = (
    NodeError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError,
    ImportError, OSError, MemoryError, BufferError, EOFError,
)  # fmt: skip
"""What a candidate may raise without harm: backends promise NodeErrors, foreign libraries promise nothing."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One backend at one precision, for one engine: kept, logged and shown."""

    backend: str
    precision: str
    version: str
    status: str
    """accepted | refused | not here | excluded."""
    reason: str
    """"" when accepted; in words for an operator."""
    lines: tuple[Accepted, ...] = ()
    load_seconds: float = 0.0
    milliseconds: float = 0.0
    """All models once, on one golden case each: median."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What serves, and how it was found."""

    sessions: Mapping[str, Session]
    backend: str
    precision: str
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class _Engine:
    """What every backend is asked the same about."""

    models: tuple[Model, ...]
    cases: Mapping[str, Cases]
    explained: str
    judge: Judge


@dataclass(frozen=True, slots=True)
class _Opened:
    backend: Backend
    version: str
    sessions: Mapping[str, Guarded]
    answers: Mapping[str, Arrays]
    lines: tuple[Accepted, ...]
    load_seconds: float


def choose(
    models: Sequence[Model],
    golden: Arrays,
    explained: str,
    judge: Judge,
    backends: Sequence[Backend],
    place: Place,
    excluded: Mapping[str, str] = MappingProxyType({}),
    at: Callable[[str], object] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
    *,
    named: bool = False,
) -> Chosen:
    """Raises PackageError when the package has no complete golden cases, or the reference does not give its answers.

    `excluded`: backend -> why it is not to be touched; the reference cannot be excluded, for there would be no truth.
    `at`: called with a backend's name before it is loaded or run, with "" after.
    `named`: the backends are those that `infer.runtime` names: one that is accepted serves, also if the reference is
    faster.
    """
    engine = _engine(models, golden, explained, judge)
    by_key = {(b.name, b.precision): b for b in backends}
    with _touching(at, REFERENCE):
        reference = _reference(engine, by_key[_REFERENCE], by_key, place, clock)
    accepted, tried = {_REFERENCE: reference}, dict[_Key, Tried]()
    for key, backend in by_key.items():
        if key != _REFERENCE:
            found = _try(engine, backend, by_key, place, reference, excluded, at, clock)
            if isinstance(found, Tried):
                tried[key] = found
            else:
                accepted[key] = found
    times, failed = _race(engine, accepted, at, clock)
    best = _fastest(times, list(by_key), enough=0.0 if named else CLEARLY)
    for key, opened in accepted.items():
        tried[key] = _line(opened, times.get(key, []), failed.get(key, ""))
        if key != best:
            _close(opened.sessions)
    return Chosen(MappingProxyType(dict(accepted[best].sessions)), *best, tuple(tried[key] for key in by_key))


def replay(chosen: Chosen, models: Sequence[Model], golden: Arrays, explained: str, judge: Judge) -> str:
    """Why the sessions in use no longer give the golden answers; "" = they do."""
    engine = _engine(models, golden, explained, judge)
    try:
        for model in engine.models:
            session, cases = chosen.sessions[model.name], engine.cases[model.name]
            found = answers_of(session, cases)
            hold(session, cases, found, model.tolerance[session.precision])
            if model.name == explained:
                _judged(engine, found, cases.outputs, model.tolerance[session.precision])
    except _FAULTS as e:
        return _words(e)
    return ""


# -- one backend


def _engine(models: Sequence[Model], golden: Arrays, explained: str, judge: Judge) -> _Engine:
    cases = {model.name: cases_of(model.name, golden, model.outputs) for model in models}
    for model in models:
        if cases[model.name].inputs.keys() != set(model.inputs):
            raise PackageError(f"golden replay of {model.name}: golden.npz holds other inputs than the manifest")
    if explained not in cases:
        raise PackageError(f"the package has no model {explained}, which is the one explained")
    return _Engine(tuple(models), cases, explained, judge)


def _reference(
    engine: _Engine,
    backend: Backend,
    backends: Mapping[_Key, Backend],
    place: Place,
    clock: Callable[[], float],
) -> _Opened:
    try:
        return _open(engine, backend, backends, place, None, clock)
    except PackageError:
        raise
    except NodeError as e:
        raise PackageError(f"the reference failed: {e}") from None


def _try(
    engine: _Engine,
    backend: Backend,
    backends: Mapping[_Key, Backend],
    place: Place,
    reference: _Opened,
    excluded: Mapping[str, str],
    at: Callable[[str], object],
    clock: Callable[[], float],
) -> _Opened | Tried:
    line = Tried(backend.name, backend.precision, "", "refused", "")
    if backend.name in excluded:
        return replace(line, status="excluded", reason=excluded[backend.name])
    try:
        with _touching(at, backend.name):
            missing = backend.missing()
            if missing:
                return replace(line, status="not here", reason=missing)
            line = replace(line, version=backend.version())
            return _open(engine, backend, backends, place, reference, clock)
    except _FAULTS as e:
        return replace(line, reason=_words(e))


def _open(
    engine: _Engine,
    backend: Backend,
    backends: Mapping[_Key, Backend],
    place: Place,
    reference: _Opened | None,
    clock: Callable[[], float],
) -> _Opened:
    """Load every model and hold it to the truth. Raises what backends raise; what was loaded until then is closed."""
    sessions, answers, lines = dict[str, Guarded](), dict[str, Arrays](), list[Accepted]()
    used = {model.name: _at_precision(model, backend, backends) for model in engine.models}
    if all(at.precision != backend.precision for at in used.values()):
        raise PackageError(f"the package has no graph at {backend.precision}")
    started = clock()
    try:
        for model in engine.models:
            cases = engine.cases[model.name]
            session = used[model.name].open(model, place)
            sessions[model.name] = Guarded(session, model, cases.shapes(cases.outputs), bound(model, place))
        load_seconds = clock() - started
        for model in engine.models:
            session, cases = sessions[model.name], engine.cases[model.name]
            found = answers_of(session, cases)
            truth = None if reference is None else reference.answers[model.name]
            tolerance = model.tolerance[used[model.name].precision]
            lines.append(hold(session, cases, found, tolerance, truth))
            if model.name == engine.explained:
                _judged(engine, found, cases.outputs if truth is None else truth, tolerance)
            answers[model.name] = found
    except BaseException:
        _close(sessions)
        raise
    return _Opened(backend, backend.version(), sessions, answers, tuple(lines), load_seconds)


def _at_precision(model: Model, backend: Backend, backends: Mapping[_Key, Backend]) -> Backend:
    """A model without a graph at this precision (a table of radiomics needs none) runs at fp32 on the same backend."""
    for candidate in (backend, backends.get((backend.name, "fp32"))):
        if candidate is not None and candidate.precision in model.graphs and candidate.precision in model.tolerance:
            return candidate
    raise PackageError(f"model {model.name} has no graph and tolerance at {backend.precision}")


def _judged(engine: _Engine, found: Arrays, truth: Arrays, tolerance: float) -> None:
    if not same_verdicts(engine.judge(found), engine.judge(truth), tolerance):
        raise PackageError(f"golden replay of {engine.explained}: decides otherwise on a golden case")


# -- the race


def _race(
    engine: _Engine, accepted: Mapping[_Key, _Opened], at: Callable[[str], object], clock: Callable[[], float]
) -> tuple[dict[_Key, list[float]], dict[_Key, str]]:
    """Seconds of each in each round, and why one is out. Rounds are interleaved, every second one backwards: what
    disturbs one disturbs all."""
    seconds: dict[_Key, list[float]] = {key: [] for key in accepted}
    failed: dict[_Key, str] = {}
    until = clock() + SECONDS
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and clock() > until:
            break
        for key in list(seconds)[:: -1 if number % 2 else 1]:
            try:
                with _touching(at, key[0]):
                    seconds[key].append(_round(engine, accepted[key].sessions, clock))
            except _FAULTS as e:
                if key == _REFERENCE:
                    raise PackageError(f"the reference failed: {_words(e)}") from None
                del seconds[key]
                failed[key] = _words(e)
    return seconds, failed


def _round(engine: _Engine, sessions: Mapping[str, Session], clock: Callable[[], float]) -> float:
    work = [(sessions[model.name], engine.cases[model.name].first()) for model in engine.models]
    started = clock()
    for session, first in work:
        session.run(first)
    return clock() - started


def _fastest(seconds: Mapping[_Key, list[float]], order: Sequence[_Key], enough: float = CLEARLY) -> _Key:
    """The fastest; of those as good as it the first in order; the reference unless another is clearly faster."""
    gains = {
        key: statistics.median(r / max(s, 1e-9) for r, s in zip(seconds[_REFERENCE], own, strict=True))
        for key, own in seconds.items()
        if key != _REFERENCE
    }
    best = max(gains.values(), default=0.0)
    if not gains or best < enough:
        return _REFERENCE
    return next(key for key in order if gains.get(key, -1.0) >= max(enough, best / CLEARLY))


# -- small things


@contextmanager
def _touching(at: Callable[[str], object], name: str) -> Iterator[None]:
    at(name)
    try:
        yield
    finally:
        at("")


def _line(opened: _Opened, seconds: Sequence[float], failure: str) -> Tried:
    return Tried(
        opened.backend.name, opened.backend.precision, opened.version, "refused" if failure else "accepted", failure,
        opened.lines, round(opened.load_seconds, 3), round(1000 * statistics.median(seconds or [0.0]), 3),
    )  # fmt: skip


def _close(sessions: Mapping[str, Session]) -> None:
    for session in sessions.values():
        try:
            session.close()
        except _FAULTS:
            continue  # it is not used any more; what it still holds ends with the process


def _words(e: BaseException) -> str:
    """For an operator. What a foreign library says may quote anything, so only its kind is told."""
    return str(e) if isinstance(e, NodeError) else f"failed with {type(e).__name__}"

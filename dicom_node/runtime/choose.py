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
from dataclasses import dataclass, field, replace
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
    """accepted | refused | not here | excluded | not tried."""
    reason: str
    """"" when accepted; in words for an operator."""
    lines: tuple[Accepted, ...] = ()
    load_seconds: float = 0.0
    milliseconds: float = 0.0
    """All models once, on one golden case each: median."""
    notes: tuple[str, ...] = ()
    """What an operator should know although it serves: a plan that was not what it should be, and was built again."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What serves, and how it was found."""

    sessions: Mapping[str, Guarded]
    backend: str
    precision: str
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class _Trial:
    """What every backend is asked the same about, and where."""

    models: tuple[Model, ...]
    cases: Mapping[str, Cases]
    explained: str
    judge: Judge
    backends: Mapping[_Key, Backend] = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    excluded: Mapping[str, str] = field(default_factory=dict)
    at: Callable[[str], object] = lambda _: None
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def touching(self, name: str) -> Iterator[None]:
        """While code of a backend may take the process with it."""
        self.at(name)
        try:
            yield
        finally:
            self.at("")


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
    settled: tuple[str, str] | None = None,
) -> Chosen:
    """Raises PackageError when the package has no complete golden cases, or the reference does not give its answers.

    `excluded`: backend -> why it is not to be touched; the reference cannot be excluded, for there would be no truth.
    `at`: called with a backend's name before it is loaded or run, with "" after.
    `named`: the backends are those that `infer.runtime` names: one that is accepted serves, also if the reference is
    faster.
    `settled`: name and precision of what served before on this machine. It serves again if it is accepted again; the
    others are not loaded and nothing is timed, so that a worker that died is back soon.
    """
    cases = _cases(models, golden, explained)
    by_key = {(b.name, b.precision): b for b in backends}
    trial = _Trial(tuple(models), cases, explained, judge, by_key, place, excluded, at, clock)
    accepted = {_REFERENCE: _reference(trial)}
    tried: dict[_Key, Tried] = {}
    if settled in by_key and settled != _REFERENCE:
        _sort(_try(trial, by_key[settled], accepted[_REFERENCE]), settled, accepted, tried)
    is_settled = settled in accepted
    for key, backend in by_key.items():
        if key not in accepted and key not in tried:
            found = _settled(trial, backend) if is_settled else _try(trial, backend, accepted[_REFERENCE])
            _sort(found, key, accepted, tried)
    times, failed = ({}, {}) if settled in accepted else _race(trial, accepted)
    best = settled if settled in accepted else _fastest(times, list(by_key), enough=0.0 if named else CLEARLY)
    for key, opened in accepted.items():
        tried[key] = _line(opened, times.get(key, []), failed.get(key, ""))
        if key != best:
            close(key[0], opened.sessions, at)
    return Chosen(MappingProxyType(dict(accepted[best].sessions)), *best, tuple(tried[key] for key in by_key))


def replay(chosen: Chosen, models: Sequence[Model], golden: Arrays, explained: str, judge: Judge) -> str:
    """Why the sessions in use no longer give the golden answers; "" = they do."""
    trial = _Trial(tuple(models), _cases(models, golden, explained), explained, judge)
    try:
        for model in models:
            session = chosen.sessions[model.name]
            _held(trial, model, session, model.tolerance[session.precision], None)
    except _FAULTS as e:
        return _words(e)
    return ""


def close(backend: str, sessions: Mapping[str, Session], at: Callable[[str], object]) -> None:
    """Free what the sessions of a backend hold. Its library is entered once more, perhaps after a fault: whatever it
    raises, the next backend must still be reached, and where it takes the process with it, it is to blame."""
    at(backend)
    for session in sessions.values():
        try:
            session.close()
        except _FAULTS:
            continue  # it is not used any more; what it still holds ends with the process
    at("")


# -- one backend


def _cases(models: Sequence[Model], golden: Arrays, explained: str) -> dict[str, Cases]:
    cases = {model.name: cases_of(model.name, golden, model.outputs) for model in models}
    for model in models:
        if cases[model.name].inputs.keys() != set(model.inputs):
            raise PackageError(f"golden replay of {model.name}: golden.npz holds other inputs than the manifest")
    if explained not in cases:
        raise PackageError(f"the package has no model {explained}, which is the one explained")
    return cases


def _reference(trial: _Trial) -> _Opened:
    try:
        with trial.touching(REFERENCE):
            return _open(trial, trial.backends[_REFERENCE], None)
    except PackageError:
        raise
    except _FAULTS as e:
        raise PackageError(f"the reference failed: {_words(e)}") from None


def _try(trial: _Trial, backend: Backend, reference: _Opened) -> _Opened | Tried:
    line = Tried(backend.name, backend.precision, "", "refused", "")
    if backend.name in trial.excluded:
        return replace(line, status="excluded", reason=trial.excluded[backend.name])
    try:
        with trial.touching(backend.name):
            missing = backend.missing()
            if missing:
                return replace(line, status="not here", reason=missing)
            line = replace(line, version=backend.version())
            return _open(trial, backend, reference)
    except _FAULTS as e:
        return replace(line, reason=_words(e))


def _sort(found: _Opened | Tried, key: _Key, accepted: dict[_Key, _Opened], tried: dict[_Key, Tried]) -> None:
    if isinstance(found, Tried):
        tried[key] = found
    else:
        accepted[key] = found


def _settled(trial: _Trial, backend: Backend) -> Tried:
    """It was slower, or not accepted, when this node began."""
    if backend.name in trial.excluded:
        return Tried(backend.name, backend.precision, "", "excluded", trial.excluded[backend.name])
    return Tried(backend.name, backend.precision, "", "not tried", "what served before serves again")


def _open(trial: _Trial, backend: Backend, reference: _Opened | None) -> _Opened:
    """Load every model and hold it to the truth. Raises what backends raise; what was loaded until then is closed."""
    used = {model.name: _at_precision(model, backend, trial.backends) for model in trial.models}
    if all(one.precision != backend.precision for one in used.values()):
        raise PackageError(f"the package has no graph at {backend.precision}")
    sessions, answers, lines = dict[str, Guarded](), dict[str, Arrays](), list[Accepted]()
    started = trial.clock()
    try:
        for model in trial.models:
            trial.at(backend.name)  # once more: each is a step of its own, and a plan may take long to build
            shapes = Cases.shapes(trial.cases[model.name].outputs)
            session = used[model.name].open(model, trial.place)
            sessions[model.name] = Guarded(session, model, shapes, bound(model, trial.place, backend.name))
        seconds = trial.clock() - started
        for model in trial.models:
            truth = None if reference is None else reference.answers[model.name]
            tolerance = model.tolerance[used[model.name].precision]
            line, answers[model.name] = _held(trial, model, sessions[model.name], tolerance, truth)
            lines.append(line)
    except BaseException:
        close(backend.name, sessions, trial.at)
        raise
    return _Opened(backend, backend.version(), sessions, answers, tuple(lines), seconds)


def _held(
    trial: _Trial, model: Model, session: Guarded, tolerance: float, truth: Arrays | None
) -> tuple[Accepted, Arrays]:
    """One model against golden.npz and the reference, decisions included. Raises PackageError."""
    cases = trial.cases[model.name]
    found = answers_of(session, cases)
    most = 0 if session.backend == REFERENCE else session.bound  # the truth itself is not held to itself
    line = hold(session, cases, found, tolerance, truth, most=most)
    if model.name == trial.explained:
        expected = cases.outputs if truth is None else truth
        if not same_verdicts(trial.judge(found), trial.judge(expected), tolerance):
            raise PackageError(f"golden replay of {model.name} on {session.backend}: decides otherwise on a case")
    return line, found


def _at_precision(model: Model, backend: Backend, backends: Mapping[_Key, Backend]) -> Backend:
    """A model without a graph at this precision (a table of radiomics needs none) runs at fp32 on the same backend."""
    for candidate in (backend, backends.get((backend.name, "fp32"))):
        if candidate is not None and candidate.precision in model.graphs and candidate.precision in model.tolerance:
            return candidate
    raise PackageError(f"model {model.name} has no graph and tolerance at {backend.precision}")


# -- the race


def _race(trial: _Trial, accepted: Mapping[_Key, _Opened]) -> tuple[dict[_Key, list[float]], dict[_Key, str]]:
    """Seconds of each in each round, and why one is out. Rounds are interleaved, every second one backwards: what
    disturbs one disturbs all."""
    seconds: dict[_Key, list[float]] = {key: [] for key in accepted}
    failed: dict[_Key, str] = {}
    until = trial.clock() + SECONDS
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and trial.clock() > until:
            break
        for key in list(seconds)[:: -1 if number % 2 else 1]:
            try:
                with trial.touching(key[0]):
                    seconds[key].append(_round(trial, accepted[key].sessions))
            except _FAULTS as e:
                if key == _REFERENCE:
                    for name, opened in accepted.items():
                        close(name[0], opened.sessions, trial.at)
                    raise PackageError(f"the reference failed: {_words(e)}") from None
                del seconds[key]
                failed[key] = _words(e)
    return seconds, failed


def _round(trial: _Trial, sessions: Mapping[str, Session]) -> float:
    work = [(sessions[model.name], trial.cases[model.name].first()) for model in trial.models]
    started = trial.clock()
    for session, first in work:
        session.run(first)
    return trial.clock() - started


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


def _line(opened: _Opened, seconds: Sequence[float], failure: str) -> Tried:
    return Tried(
        opened.backend.name, opened.backend.precision, opened.version, "refused" if failure else "accepted", failure,
        opened.lines, round(opened.load_seconds, 3), round(1000 * statistics.median(seconds or [0.0]), 3),
        tuple(note for session in opened.sessions.values() for note in session.notes),
    )  # fmt: skip


def _words(e: BaseException) -> str:
    """For an operator. What a foreign library says may quote anything, so only its kind is told."""
    return str(e) if isinstance(e, NodeError) else f"failed with {type(e).__name__}"

"""The child's side: bound itself, load the engines, then answer one job after the other until the parent is gone.

It may not touch the ledger, the network or a file outside the objects it was given, the spool and the cache of plans.
It owns the choice of a backend: one that fails in a job is left, and the same job is run again on the next.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dicom_node import decide, packages
from dicom_node.config import Engines, Infer
from dicom_node.config_phases import Rules as PhaseRules
from dicom_node.engine import Site
from dicom_node.errors import PackageError
from dicom_node.log import quiet_values
from dicom_node.metrics import Deltas
from dicom_node.result import ClinicalInput, Code, Refusal, RefusalCode
from dicom_node.runtime import REFERENCE, Backend, Place, backends
from dicom_node.study import Study, study_from_json
from dicom_node.worker.engines import FallenError, Loaded, load_engine
from dicom_node.worker.guard import Fault, guarded
from dicom_node.worker.wire import EndedError, Wire

OOM_SCORE_ADJUST = "500"
"""The kernel kills a worker before it kills the receiver."""
NVIDIA = Path("/dev/nvidiactl")
"""There where a driver is."""
ROI_MODALITIES = frozenset({"SEG", "RTSTRUCT", "SR", "PR", "KO"})
"""Series an engine sees besides those the route matched: where a region, a measurement or a rejection may stand."""

Send = Callable[[Mapping[str, Any]], None]
Known = Callable[[str], tuple[Backend, ...]]
"""`infer.runtime` -> the backends, in the order in which they are tried; the reference is the last."""


class Worker:
    """The resident engines and the one job in hand."""

    def __init__(self, setup: Mapping[str, Any], send: Send, known: Known = backends.known) -> None:
        self._send, self._known = send, known
        self._root = Path(setup["root"])
        self._spool = self._root / "spool"
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._engines = Engines.model_validate(setup["engines"])
        self._infer = Infer.model_validate(setup["infer"])
        self._site = Site(PhaseRules.model_validate(setup["phases"]))
        self._excluded: dict[str, dict[str, str]] = {task: dict(why) for task, why in setup["excluded"].items()}
        self._settled: dict[str, dict[str, Any]] = setup["settled"]
        self._threads = max(1, len(os.sched_getaffinity(0)) // self._infer.workers_per_device)
        self.deltas = Deltas()
        self.engines: dict[str, Loaded | Fault] = {}
        tasks = list(setup["tasks"])
        # Side by side, so that a start takes as long as the slowest; after a crash one by one, to find who it was.
        with ThreadPoolExecutor(1 if setup["one_by_one"] else self._threads) as pool:
            self.engines.update(zip(tasks, pool.map(self._load_first, tasks), strict=True))

    def _load_first(self, task: str) -> Loaded | Fault:
        self._send({"kind": "loading", "task": task})
        before = self._settled.get(task)
        how: dict[str, Any] = {}
        if before is not None:
            how = {"settled": (before["backend"], before["precision"]), "earlier": frozenset(before["accepted"])}
        engine = guarded(partial(self._load, task, **how))
        self._send({"kind": "through", "task": task})
        return engine

    def load(self, task: str, candidate: str | None) -> dict[str, Any]:
        """Between two jobs: the active package of a task, or a candidate, in place of the one that serves.

        One that is refused takes nobody's place.
        """
        engine = guarded(lambda: self._load(task, None if candidate is None else Path(candidate)))
        if isinstance(engine, Fault):
            return {"error": engine.text}
        before, self.engines[task] = self.engines.get(task), engine
        if isinstance(before, Loaded):
            guarded(before.close)
        return engine.told()

    def _load(
        self,
        task: str,
        candidate: Path | None = None,
        settled: tuple[str, str] | None = None,
        earlier: frozenset[str] = frozenset(),
    ) -> Loaded:
        folder = packages.find_tasks(self._engines.path).get(task)
        if folder is None:
            raise PackageError(f"no task {task} under engines.path")

        def at(backend: str) -> None:
            if backend != REFERENCE:  # nothing to fall back to: who dies in it dies of the engine or the input
                self._send({"kind": "at", "task": task, "backend": backend})

        return load_engine(
            folder,
            self._root,
            self._known(self._infer.runtime),
            require_signature=self._engines.require_signature,
            place=Place(threads=self._threads, plans=self._root / "plans"),
            at=at,
            named=self._infer.runtime != "auto",
            candidate=candidate,
            excluded=self._excluded.get(task, {}),
            settled=settled,
            earlier=earlier,
        )

    def told(self) -> dict[str, Any]:
        """What `ready` says of each engine."""
        return {task: _told(engine) for task, engine in self.engines.items()}

    def replay(self, task: str) -> str:
        """The golden cases once more; a backend that no longer gives their answers is left. Why, or ""."""
        engine = self.engines.get(task)
        if not isinstance(engine, Loaded):
            return ""
        found = guarded(engine.drifted)
        text = found.text if isinstance(found, Fault) else found
        if text:
            self._next(task, engine, "drift", text)
        return text

    def answer(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One job, with everything that may go wrong in it."""
        engine = self.engines.get(str(job["engine"]), Fault("not loaded"))
        if isinstance(engine, Fault):
            return _refused(Refusal(RefusalCode.ENGINE_NOT_AVAILABLE, engine.text))
        about: dict[str, Any] = {"package": engine.about()}
        outcome = guarded(lambda: self._run(engine, job, about))
        return about | ({"outcome": "FAULT", "error": outcome.text} if isinstance(outcome, Fault) else outcome)

    def _run(self, engine: Loaded, job: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        study = visible(study_from_json(job["study"]), frozenset(job["series"]))
        given = (ClinicalInput(**(c | {"code": Code(*c["code"])})) for c in job["clinical"])
        clinical = {value.key: value for value in given}
        selection = engine.select(study, clinical, self._site)
        if isinstance(selection, Refusal):
            return _refused(selection)
        about["input_digest"] = decide.input_digest(selection, clinical, engine.package)
        if about["input_digest"] == job["previous_input_digest"]:
            return {"outcome": "UNCHANGED"}
        while True:  # ends: each turn leaves a backend, and the reference does not fall
            try:
                concluded = engine.conclude(str(job["route"]), selection, clinical, self._spool, self.deltas)
                break
            except FallenError as e:
                engine = self._next(str(job["engine"]), engine, "answer", str(e))
                about["package"] = engine.about()
        if isinstance(concluded, Refusal):
            return _refused(concluded)
        return {"outcome": "RESULT", "result": concluded.to_json()}

    def _next(self, task: str, engine: Loaded, reason: str, text: str) -> Loaded:
        """Leave the backend of an engine for the next one, and say so. Raises PackageError where there is none."""
        left = engine.chosen
        if engine.on_reference:  # nothing to fall back to: the package is read and held to its answers once more
            after = guarded(partial(self._load, task))
        else:
            self._excluded.setdefault(task, {})[left.backend] = text
            after = guarded(partial(engine.on_next, self._excluded[task]))
        self.engines[task] = after
        self._send(
            {
                "kind": "left",
                "task": task,
                "backend": left.backend,
                "reason": reason,
                "text": text,
                "engine": _told(after),
            }
        )
        if isinstance(after, Fault):
            raise PackageError(after.text)
        return after


def _told(engine: Loaded | Fault) -> dict[str, Any]:
    return {"error": engine.text} if isinstance(engine, Fault) else engine.told()


def visible(study: Study, series: frozenset[str]) -> Study:
    """What the route matched, and what may hold a region: an engine for kidneys must not pick a liver clip."""
    if not series:
        return study
    keep = tuple(s for s in study.series if s.series_instance_uid in series or s.modality in ROI_MODALITIES)
    return Study(study.study_instance_uid, study.revision, keep)


def _refused(refusal: Refusal) -> dict[str, Any]:
    return {"outcome": "REFUSED", "refusal": {"code": str(refusal.code), "detail": refusal.detail}}


# -- the process


def main(known: Known = backends.known) -> None:
    """The child's life."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    args = parser.parse_args()
    _die_with_parent(args.lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us in its order
    np.seterr(all="ignore")  # what is not finite is caught by decide.py, where it has a meaning
    quiet_values()
    warnings.simplefilter("ignore")
    with socket.socket(fileno=args.fd) as channel, contextlib.suppress(EndedError):
        _serve(Wire(channel), known)


def _serve(wire: Wire, known: Known) -> None:
    setup = wire.receive()
    _bound(float(setup["infer"]["memory_gb"]))
    worker = Worker(setup, wire.send, known)
    wire.send({"kind": "ready", "engines": worker.told()})
    while True:
        job = wire.receive()
        if job["kind"] == "load":
            wire.send({"kind": "loaded", "engine": worker.load(job["task"], job["candidate"])})
        elif job["kind"] == "replay":
            text = guarded(partial(worker.replay, job["task"]))
            wire.send({"kind": "replayed", "text": text.text if isinstance(text, Fault) else text})
        else:
            _do(wire, worker, job)


def _do(wire: Wire, worker: Worker, job: Mapping[str, Any]) -> None:
    answer = {"kind": "done", "id": job["id"]} | worker.answer(job)
    if deltas := worker.deltas.drain():
        wire.send({"kind": "metrics", "deltas": deltas})
    try:
        wire.send(answer)
    except (TypeError, ValueError):  # an engine put something else than plain values into its answer
        wire.send({"kind": "done", "id": job["id"], "outcome": "FAULT", "error": "the answer is not plain values"})


def _bound(memory_gb: float) -> None:
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # private writable memory, mapped or not
    if not NVIDIA.exists():  # CUDA reserves address space by the size of the cards, and fails without
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold pixels and names
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJUST)


def _die_with_parent(lifeline: int) -> None:
    """The kernel ends this process when the parent's end of the pipe closes, however the parent ended.

    A thread that waits for it would be kept waiting by a native decoder that hangs with the interpreter lock held, and
    PR_SET_PDEATHSIG follows the thread that started us, not the process.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # its default action is to end the process
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit(0)  # the parent was gone before we looked

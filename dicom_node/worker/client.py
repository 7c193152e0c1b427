"""The parent's side: starts the child, hands it one job at a time, kills it at the deadline, starts it again.

Runs in the stages process (and in `infer FOLDER`), decodes nothing and runs no model. Whatever the child does, `run`
ends: with its answer, or with WorkerError by the deadline. A child that dies or hangs inside a backend's library costs
that backend its place (`Standing`), and the next child does without it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dicom_node.config import Config, Route
from dicom_node.errors import NodeStoppingError, WorkerError
from dicom_node.log import Log
from dicom_node.metrics import Metrics, Recorder
from dicom_node.packages import acceptance
from dicom_node.result import ClinicalInput, RefusalCode, result_from_json
from dicom_node.study import Study, study_to_json
from dicom_node.worker.process import START_LIMIT, START_SECONDS, ChildProcess, LostError, cause
from dicom_node.worker.standing import Standing

MAX_PAUSE = 10.0
"""Between starts that fail one after the other."""
MAX_LOAD_CRASHES = 2
"""An engine that ended the child so often while it was loaded is left out, so that the others serve."""
_SPOOLED = re.compile(r"[0-9a-f]{32}\.npy")
OUTCOMES = frozenset({"RESULT", "REFUSED", "UNCHANGED", "FAULT"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one job."""

    outcome: str
    """RESULT | REFUSED | UNCHANGED | FAULT."""
    result: Mapping[str, Any] | None = None
    refusal: Mapping[str, Any] | None = None
    package: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    input_digest: str = ""


class JobLike(Protocol):
    """The part of a ledger job that a worker needs."""

    @property
    def id(self) -> int: ...
    @property
    def payload(self) -> dict[str, Any]: ...


class WorkerClient:
    """One child. Any thread may call; jobs are done one at a time."""

    def __init__(
        self,
        config: Config,
        tasks: tuple[str, ...],
        log: Log,
        recorder: Recorder,
        standing: Standing | None = None,
        *,
        number: int = 0,
        module: str = "dicom_node.worker",
    ) -> None:
        """`standing` is shared by the workers of a node, each with its `number`; `module` is what the child runs."""
        self._setup = {
            "root": str(config.store.root.absolute()),
            "engines": config.engines.model_dump(mode="json"),
            "infer": config.infer.model_dump(mode="json"),
            "phases": config.phases.model_dump(mode="json"),
        }
        self._tasks, self._log, self._recorder = tasks, log, recorder
        self._standing = standing or Standing(config.infer.runtime, log, recorder)
        self._number, self._module = number, module
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._child: ChildProcess | None = None
        self._engines: dict[str, Any] = {}
        self._proved: dict[str, float] = {}
        self._load_crashes: dict[str, str] = {}
        self._suspects: dict[str, int] = {}
        self._one_by_one = False
        self._failed_starts = 0
        self._ready = False

    @property
    def is_ready(self) -> bool:
        """The child runs and its engines are loaded; after a crash not until `ready` or a job started another."""
        child = self._child
        return self._ready and child is not None and child.process.poll() is None

    @property
    def loading(self) -> tuple[str, ...]:
        """Engines that are not loaded yet."""
        child = self._child
        through = set() if child is None else set(child.through)
        return () if self.is_ready else tuple(task for task in self._tasks if task not in through)

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        child = self._child
        return None if child is None else child.process.pid

    def engines(self) -> dict[str, Any]:
        """What the child said of each engine (`error`, package, acceptance table); empty before the first start."""
        return dict(self._engines)

    def ready(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait until the engines are loaded, starting the child as often as it takes.

        Raises WorkerError after `timeout` seconds; without one it goes on until `close`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._closing.is_set():
            try:
                with self._lock:
                    self._ensure()
                break
            except NodeStoppingError:
                break
            except WorkerError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
        return self.engines()

    def run(
        self,
        job: JobLike,
        route: Route,
        study: Study,
        previous: str | None,
        clinical: Iterable[ClinicalInput] = (),
        *,
        timeout: float,
    ) -> Reply:
        """One job. Raises WorkerError on crash, hang or a broken answer (the next job starts a new child), and
        NodeStoppingError when `close` ended it."""
        message = {
            "kind": "job",
            "id": job.id,
            "route": route.name,
            "engine": route.engine,
            "study": study_to_json(study),
            "series": list(job.payload.get("series", [])),
            "clinical": [asdict(c) for c in clinical],
            "previous_input_digest": previous,
        }
        with self._lock:
            child = self._ensure_in_the_end()
            try:
                answer = child.ask(message, time.monotonic() + timeout, self._hear)
                return _reply(answer, job.id)
            except LostError as e:
                self._lose(child, e.reason, e.text)
                raise WorkerError(e.text) from None

    def load(self, task: str, candidate: Path | None = None) -> dict[str, Any]:
        """Put the active package of a task to use, or a candidate, when the job in hand is done.

        What the child says of it: with an `error` the package before it serves on. Raises WorkerError when the child
        is lost over it (the next one loads the active package), and NodeStoppingError.
        """
        message = {"kind": "load", "task": task, "candidate": None if candidate is None else str(candidate.absolute())}
        with self._lock:
            told = self._loaded(message)
            if not told["error"]:
                self._load_crashes.pop(task, None)
                self._suspects.pop(task, None)
                self._told({task: told})
        return told

    def _loaded(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A package is not refused for a backend that takes the child with it: the next child loads it without."""
        while True:
            child, known = self._ensure_in_the_end(), self._standing.excluded()
            try:
                return _loaded(child.ask(message, time.monotonic() + START_LIMIT, self._hear, step=START_SECONDS))
            except LostError as e:
                self._lose(child, e.reason, e.text)
                if self._standing.excluded() == known:
                    raise WorkerError(f"while the package was loaded: {e.text}") from None

    def replay(self, older_than: float, timeout: float, *, patience: float = 5.0) -> bool:
        """Have the engine replay its golden cases that gave their answers longest ago, if that is `older_than` seconds.

        Between two jobs, and only in a child that runs. True = one did; a backend that drifted, died or hung over it is
        dropped, and everybody told.
        """
        if not self._lock.acquire(timeout=patience):
            return False
        try:
            child, now = self._child, time.monotonic()
            task = min(self._proved, key=self._proved.__getitem__, default="")
            if child is None or child.process.poll() is not None or not task or now - self._proved[task] < older_than:
                return False
            self._proved[task] = now
            try:
                answer = child.ask({"kind": "replay", "task": task}, now + timeout, self._hear)
                drifted = _replayed(answer)
            except LostError as e:
                self._lose(child, e.reason, e.text)
                return True
            self._recorder.inc("dicom_node_golden_replays_total", engine=task, outcome="drifted" if drifted else "held")
            return True
        except NodeStoppingError:
            return False
        finally:
            self._lock.release()

    def digest(self, task: str) -> str | None:
        """Of the package that serves a task, in a child that runs. Raises WorkerError, NodeStoppingError."""
        with self._lock:
            self._ensure()
            digest: str | None = self._engines.get(task, {}).get("digest")
            return digest

    def close(self) -> None:
        """End the child now, also in the middle of a job."""
        self._closing.set()
        if self._child is not None:
            self._child.process.kill()
        with self._lock:  # a job in hand has noticed by now
            if self._child is not None:
                self._child.end()
                self._child = None

    # -- one child after the other

    def _ensure(self) -> ChildProcess:
        child = self._child
        if child is not None:
            code = child.process.poll()
            if code is None and not self._runs_what_was_dropped():
                return child
            if code is None:
                self._lose(child, "dropped", "another worker left a backend that this one runs on")
            else:
                self._lose(child, "crash", f"the idle worker ended ({cause(code)})")
        if self._failed_starts:
            self._closing.wait(min(MAX_PAUSE, 0.2 * 2.0**self._failed_starts))
        if self._closing.is_set():
            raise NodeStoppingError
        return self._start()

    def _ensure_in_the_end(self) -> ChildProcess:
        """Neither does a job pay with its few attempts, nor is a package refused, for starts that each find one more
        backend to leave out: of a lost device, one for every engine."""
        while True:
            known = self._left_out()
            try:
                return self._ensure()
            except WorkerError:
                if self._left_out() == known:
                    raise

    def _runs_what_was_dropped(self) -> bool:
        """By another worker: of the same device the same is to be feared here."""
        dropped = self._standing.excluded()
        return any(told.get("backend") in dropped.get(task, ()) for task, told in self._engines.items())

    def _left_out(self) -> tuple[object, ...]:
        """What failed starts have taught the next one."""
        return self._one_by_one, dict(self._suspects), dict(self._load_crashes), self._standing.excluded()

    def _start(self) -> ChildProcess:
        tasks = [task for task in self._tasks if task not in self._load_crashes]
        setup = {
            "tasks": tasks,
            "excluded": self._standing.excluded(),
            "settled": {task: _settled(told) for task, told in self._engines.items() if not told["error"]},
            "one_by_one": self._one_by_one,
        }
        child = self._child = ChildProcess(self._module)
        try:
            if self._closing.is_set():  # close() may have looked before there was a child
                raise LostError("stop", "the node is stopping")
            engines = _checked(child.start(self._setup | setup))
        except LostError as e:
            self._failed_starts += 1
            self._suspect(child, e.text)
            self._lose(child, e.reason, e.text)
            raise WorkerError(f"the worker does not start: {e.text}") from None
        self._failed_starts, self._one_by_one = 0, False
        self._suspects.clear()
        engines = {task: _with_earlier(told, self._engines.get(task)) for task, told in engines.items()}
        self._engines.clear()
        self._proved.clear()
        self._ready = True
        self._told(engines | {task: {"error": text} for task, text in self._load_crashes.items()})
        return child

    def _suspect(self, child: ChildProcess, text: str) -> None:
        """Of several that were loaded side by side, the next start finds the guilty one. A backend comes first."""
        self._one_by_one = True
        for task in child.loading - child.inside().keys():
            self._suspects[task] = self._suspects.get(task, 0) + 1
            if self._suspects[task] >= MAX_LOAD_CRASHES and len(child.loading) == 1:
                self._load_crashes[task] = f"left out until the next start of the node: while it was loaded, {text}"

    def _told(self, engines: dict[str, Any]) -> None:
        self._engines |= engines
        for task, told in engines.items():
            self._proved.pop(task, None)
            if not told["error"]:
                self._proved[task] = time.monotonic()
        self._standing.tell(self._number, engines)

    def _lose(self, child: ChildProcess, reason: str, text: str) -> None:
        child.end()
        self._child, self._ready = None, False
        if self._closing.is_set():
            raise NodeStoppingError
        inside = child.inside()
        if reason in ("crash", "deadline") and len(child.loading) <= 1:
            for task, backend in inside.items():
                self._standing.drop(self._number, task, backend, reason, text)
        self._recorder.inc("dicom_node_worker_restarts_total", reason=reason)
        self._log.error("worker_ended", reason=reason, cause=text, inside=[f"{t}: {b}" for t, b in inside.items()])

    def _hear(self, message: dict[str, Any]) -> None:
        """What the child says before its answer."""
        if message["kind"] == "metrics":
            self._merge(message.get("deltas"))
            return
        task, told = str(message.get("task")), _checked({"": message.get("engine")})[""]
        if task not in self._engines:
            raise LostError("protocol", "the worker speaks of an engine it was not given")
        backend, reason, text = (str(message.get(key)) for key in ("backend", "reason", "text"))
        self._standing.drop(self._number, task, backend, reason, text)
        self._told({task: _with_earlier(told, self._engines[task])})

    def _merge(self, deltas: Any) -> None:
        """The child's counts; without a registry (`infer FOLDER`) nobody asks for them."""
        if isinstance(self._recorder, Metrics):
            try:
                self._recorder.merge(deltas)
            except (ValueError, TypeError):
                raise LostError("protocol", "the worker sent counts that are none") from None


def _settled(told: Mapping[str, Any]) -> dict[str, Any]:
    """What served, and what else was accepted: for the next child, which tries only the first unless that fails."""
    accepted = {tried["backend"] for tried in told["tried"] if tried["status"] == "accepted"}
    return {"backend": told["backend"], "precision": told["precision"], "accepted": sorted(accepted)}


def _with_earlier(told: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a child that had one before it did not try stands as it was found then, of the same package."""
    if told["error"] or earlier is None or earlier.get("digest") != told["digest"]:
        return told
    # Without notes: they were told when they were made, and each telling is an event.
    known = {(tried["backend"], tried["precision"]): tried | {"notes": []} for tried in earlier["tried"]}
    tried = [known.get((t["backend"], t["precision"]), t) if t["status"] == "not tried" else t for t in told["tried"]]
    return told | {"tried": tried}


def _checked(engines: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {str(task): acceptance.checked(told) for task, told in engines.items()}
    except ValueError:
        raise LostError("protocol", "what the worker says of its engines cannot be used") from None


def _loaded(answer: Mapping[str, Any]) -> dict[str, Any]:
    if answer.get("kind") != "loaded":
        raise LostError("protocol", "the worker said something else than loaded")
    return dict(_checked({"": answer.get("engine")})[""])


def _replayed(answer: Mapping[str, Any]) -> bool:
    if answer.get("kind") != "replayed" or not isinstance(answer.get("text"), str):
        raise LostError("protocol", "the worker said something else than replayed")
    return bool(answer["text"])


def _reply(answer: Mapping[str, Any], job_id: int) -> Reply:
    body = {key: value for key, value in answer.items() if key not in ("kind", "id")}
    known = set(Reply.__dataclass_fields__)
    if answer.get("kind") != "done" or answer.get("id") != job_id or not body.keys() <= known:
        raise LostError("protocol", "the worker answered something else than this job")
    if body.get("outcome") not in OUTCOMES or not _is_sound(body):
        raise LostError("protocol", "the worker gave an answer that cannot be used")
    return Reply(**body)


def _is_sound(body: Mapping[str, Any]) -> bool:
    """The child decodes foreign bytes: what it says is checked before anything acts on it, most of all file names."""
    try:
        if body["outcome"] == "REFUSED":
            RefusalCode(body["refusal"]["code"])
        if body["outcome"] == "RESULT":
            maps = [f.heatmap for f in result_from_json(body["result"]).findings if f.heatmap is not None]
            return all(_SPOOLED.fullmatch(file.name) for m in maps for file in (m.frames, m.map))
    except (KeyError, TypeError, ValueError):
        return False
    return True

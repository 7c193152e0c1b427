"""The parent's side: starts the child, hands it one job at a time, kills it at the deadline, starts it again.

Runs in the stages process (and in `infer FOLDER`), decodes nothing and imports neither numpy nor a runtime. Whatever
the child does, `run` ends: with its answer, or with WorkerError by the deadline.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
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
from dicom_node.result import ClinicalInput, RefusalCode, result_from_json
from dicom_node.study import Study, study_to_json
from dicom_node.worker.wire import EndedError, GarbageError, Wire

START_SECONDS = 120.0
"""For all engines: import, verify, load, replay the golden cases."""
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


class _LostError(Exception):
    """The child did not answer: why, in a word for the metric and in words for the operator."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason, self.text = reason, text
        super().__init__(text)


class WorkerClient:
    """One child. Any thread may call; jobs are done one at a time."""

    def __init__(self, config: Config, tasks: tuple[str, ...], log: Log, recorder: Recorder) -> None:
        self._setup = {
            "root": str(config.store.root.absolute()),
            "engines": config.engines.model_dump(mode="json"),
            "infer": config.infer.model_dump(mode="json"),
            "phases": config.phases.model_dump(mode="json"),
        }
        self._tasks, self._log, self._recorder = tasks, log, recorder
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._child: _Child | None = None
        self._engines: dict[str, Any] = {}
        self._load_crashes: dict[str, str] = {}
        self._suspects: dict[str, int] = {}
        self._failed_starts = 0
        self._ready = False

    @property
    def is_ready(self) -> bool:
        """The child runs and its engines are loaded; after a crash not until `ready` or a job started another."""
        child = self._child
        return self._ready and child is not None and child.process.poll() is None

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
            child = self._ensure()
            try:
                answer = child.ask(message, time.monotonic() + timeout, self._merge)
                return _reply(answer, job.id)
            except _LostError as e:
                self._lose(child, e.reason, e.text)
                raise WorkerError(e.text) from None

    def load(self, task: str, candidate: Path | None = None) -> dict[str, Any]:
        """Put the active package of a task to use, or a candidate, when the job in hand is done.

        What the child says of it: with an `error` the package before it serves on. Raises WorkerError when the child
        is lost over it (the next one loads the active package), and NodeStoppingError.
        """
        message = {"kind": "load", "task": task, "candidate": None if candidate is None else str(candidate.absolute())}
        with self._lock:
            child = self._ensure()
            try:
                told = _loaded(child.ask(message, time.monotonic() + START_SECONDS, self._merge))
            except _LostError as e:
                self._lose(child, e.reason, e.text)
                raise WorkerError(f"while the package was loaded: {e.text}") from None
            if not told["error"]:
                self._load_crashes.pop(task, None)
                self._suspects.pop(task, None)
                self._engines[task] = told
                self._tell({task: told})
        return told

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

    def _ensure(self) -> _Child:
        child = self._child
        if child is not None:
            code = child.process.poll()
            if code is None:
                return child
            self._lose(child, "crash", f"the idle worker ended ({_cause(code)})")
        if self._failed_starts:
            self._closing.wait(min(MAX_PAUSE, 0.2 * 2.0**self._failed_starts))
        if self._closing.is_set():
            raise NodeStoppingError
        return self._start()

    def _start(self) -> _Child:
        tasks = [task for task in self._tasks if task not in self._load_crashes]
        child = self._child = _Child()
        loading: list[str] = []
        try:
            if self._closing.is_set():  # close() may have looked before there was a child
                raise _LostError("stop", "the node is stopping")
            engines = child.start(self._setup | {"tasks": tasks}, time.monotonic() + START_SECONDS, loading.append)
        except _LostError as e:
            self._failed_starts += 1
            self._suspect(loading[-1:], e.text)
            self._lose(child, e.reason, e.text)
            raise WorkerError(f"the worker does not start: {e.text}") from None
        self._failed_starts = 0
        self._engines = engines | {task: {"error": text} for task, text in self._load_crashes.items()}
        self._ready = True
        self._tell(self._engines)
        return child

    def _suspect(self, tasks: list[str], text: str) -> None:
        for task in tasks:
            self._suspects[task] = self._suspects.get(task, 0) + 1
            if self._suspects[task] >= MAX_LOAD_CRASHES:
                self._load_crashes[task] = f"left out until the next start of the node: while it was loaded, {text}"

    def _tell(self, engines: Mapping[str, Any]) -> None:
        for task, told in sorted(engines.items()):
            self._recorder.set("dicom_node_engine_accepted", float(not told["error"]), engine=task, backend="onnx")
            if told["error"]:
                self._log.error("engine_refused", engine=task, error=told["error"])
                continue
            for line in told["accepted"]:
                self._log.info("engine_accepted", engine=task, version=told["version"], digest=told["digest"], **line)

    def _lose(self, child: _Child, reason: str, text: str) -> None:
        child.end()
        self._child, self._ready = None, False
        if self._closing.is_set():
            raise NodeStoppingError
        self._recorder.inc("dicom_node_worker_restarts_total", reason=reason)
        self._log.error("worker_ended", reason=reason, cause=text)

    def _merge(self, deltas: Any) -> None:
        """The child's counts; without a registry (`infer FOLDER`) nobody asks for them."""
        if isinstance(self._recorder, Metrics):
            try:
                self._recorder.merge(deltas)
            except (ValueError, TypeError):
                raise _LostError("protocol", "the worker sent counts that are none") from None


class _Child:
    """One process and the wire to it. Every failure is a _LostError."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        watched, self._lifeline = os.pipe()  # closes with this process, however it ends
        package = str(Path(__file__).parent.parent.parent)
        search = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        command = [sys.executable, "-P", "-m", "dicom_node.worker", "--fd", str(theirs.fileno())]
        try:
            self.process = subprocess.Popen(  # noqa: S603  our own interpreter, our own arguments
                [*command, "--lifeline", str(watched)],
                pass_fds=[theirs.fileno(), watched],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # an engine that prints must not reach ours
                env=os.environ | {"PYTHONPATH": search},
            )
        except OSError as e:
            ours.close()
            os.close(self._lifeline)
            raise WorkerError(f"the worker cannot be started ({e.strerror})") from None
        finally:
            theirs.close()
            os.close(watched)
        self._wire = Wire(ours)

    def start(self, setup: Mapping[str, Any], deadline: float, loading: Any) -> dict[str, Any]:
        """Send the setup; wait for `ready`."""
        self._guard(lambda: self._wire.send(setup, deadline))
        while True:
            message = self._guard(lambda: self._wire.receive(deadline))
            if message.get("kind") == "loading":
                loading(str(message.get("task")))
            elif message.get("kind") == "ready" and isinstance(message.get("engines"), dict):
                return dict(message["engines"])
            else:
                raise _LostError("protocol", "the worker said something else than ready")

    def ask(self, message: Mapping[str, Any], deadline: float, merge: Any) -> dict[str, Any]:
        """One job; what comes before `done` is counted."""
        self._guard(lambda: self._wire.send(message, deadline))
        while True:
            answer: dict[str, Any] = self._guard(lambda: self._wire.receive(deadline))
            if answer.get("kind") != "metrics":
                return answer
            merge(answer.get("deltas"))

    def _guard(self, work: Any) -> Any:
        try:
            return work()
        except TimeoutError:
            raise _LostError("deadline", "no answer by the deadline: the worker was killed") from None
        except EndedError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # a crash tells its signal
            raise _LostError("crash", f"the worker process ended ({_cause(self.process.returncode)})") from None
        except GarbageError as e:
            raise _LostError("protocol", f"the worker: {e}") from None

    def end(self) -> None:
        """Kill, reap, close."""
        self.process.kill()
        self.process.wait()
        self._wire.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _loaded(answer: Mapping[str, Any]) -> dict[str, Any]:
    engine = answer.get("engine")
    if answer.get("kind") != "loaded" or not isinstance(engine, dict) or not isinstance(engine.get("error"), str):
        raise _LostError("protocol", "the worker said something else than loaded")
    return engine


def _reply(answer: Mapping[str, Any], job_id: int) -> Reply:
    body = {key: value for key, value in answer.items() if key not in ("kind", "id")}
    known = set(Reply.__dataclass_fields__)
    if answer.get("kind") != "done" or answer.get("id") != job_id or not body.keys() <= known:
        raise _LostError("protocol", "the worker answered something else than this job")
    if body.get("outcome") not in OUTCOMES or not _is_sound(body):
        raise _LostError("protocol", "the worker gave an answer that cannot be used")
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


def _cause(code: int | None) -> str:
    if code is None:
        return "it closed its end"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"

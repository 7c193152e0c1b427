"""The engine worker: a child process that decodes pixels and runs engines. Job in, Result out, one at a time.

Its death (crash of a native decoder, out of memory, a hang) costs one attempt and nothing else. It has no network, no
ledger and a limit on its address space. It speaks JSON lines over an inherited socket; arrays go through the spool.

    parent -> {"kind": "start", config, tasks}      child -> {"kind": "ready", "engines": {...}}
    parent -> {"kind": "job", ...}                  child -> {"kind": "done", "outcome": ...}
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dicom_node import decide, packages
from dicom_node.config import Config, Route
from dicom_node.engine import Engine, Selection
from dicom_node.errors import NodeError, PackageError, WorkerError
from dicom_node.log import Log, place_of
from dicom_node.metrics import Recorder
from dicom_node.packages import ModelPackage, Task
from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError, quiet_values
from dicom_node.result import ClinicalInput, Refusal, RefusalCode
from dicom_node.runtime.accept import Accepted, accept
from dicom_node.runtime.onnx import OnnxSession
from dicom_node.study import Study, study_from_json, study_to_json

START_SECONDS = 120.0
OOM_SCORE_ADJUST = "500"
"""The kernel kills a worker before it kills the receiver."""
ROI_MODALITIES = frozenset({"SEG", "RTSTRUCT", "SR", "PR", "KO"})
"""Series an engine sees besides those the route matched: where a region, a measurement or a rejection may stand."""


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


# -- the child


@dataclass(frozen=True, slots=True)
class Loaded:
    """One engine, resident: code, weights, accepted sessions."""

    task: Task
    package: ModelPackage
    engine: Engine
    sessions: Mapping[str, OnnxSession]
    accepted: tuple[Accepted, ...]

    def run(self, model: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """`engine.RunModel`."""
        if model not in self.sessions:
            raise PackageError(f"the package has no model {model!r}")
        return self.sessions[model].run(inputs)


def load_engine(folder: Path, root: Path, *, require_signature: bool, threads: int) -> Loaded:
    """Task, package, code, sessions; every model replays its golden cases. Raises PackageError naming the step."""
    task = packages.load_task(folder)
    if task.missing_libraries:
        raise PackageError(f"not available: install {', '.join(task.missing_libraries)}")
    package = packages.active_package(task, root, require_signature=require_signature)
    sessions, accepted = {}, []
    for name, entry in package.manifest.models.items():
        session = OnnxSession(package.graph(name), entry.inputs, entry.outputs, threads=threads)
        accepted.append(accept(name, session, package.golden, entry.tolerance["fp32"], entry.outputs))
        sessions[name] = session
    return Loaded(task.task, package, cast(Engine, _module(folder)), sessions, tuple(accepted))


def _module(folder: Path) -> ModuleType:
    """engine.py by its path: no search path is changed, no package of that name need be installed."""
    spec = importlib.util.spec_from_file_location(f"dicom_node_engine_{folder.name}", folder / "engine.py")
    if spec is None or spec.loader is None:
        raise PackageError(f"{folder.name}: engine.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in engine.py look their module up
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, ValueError, TypeError, NameError, AttributeError) as e:
        raise PackageError(f"{folder.name}: engine.py: {type(e).__name__}: {e}") from e
    if not (callable(getattr(module, "select", None)) and callable(getattr(module, "predict", None))):
        raise PackageError(f"{folder.name}: engine.py defines no select and predict")
    return module


class Worker:
    """The resident engines and the one job in hand."""

    def __init__(self, config: Config, tasks: tuple[str, ...]) -> None:
        self._root, self._spool = config.store.root, config.store.root / "spool"
        threads = max(1, (os.cpu_count() or 1) // config.infer.workers_per_device)
        folders = packages.find_tasks(config.engines.path)
        self.engines: dict[str, Loaded] = {}
        self.errors: dict[str, str] = {}
        for name in tasks:
            try:
                if name not in folders:
                    raise PackageError(f"no task {name} under engines.path")
                self.engines[name] = load_engine(
                    folders[name], self._root, require_signature=config.engines.require_signature, threads=threads
                )
            except PackageError as e:
                self.errors[name] = str(e)

    def told(self) -> dict[str, Any]:
        """What `ready` says of each engine."""
        good = {
            name: {
                "error": "",
                **_package(e.package),
                "accepted": [
                    {"model": a.model, "backend": a.backend, "worst": a.worst, "tolerance": a.tolerance}
                    for a in e.accepted
                ],
            }
            for name, e in self.engines.items()
        }
        return good | {name: {"error": text} for name, text in self.errors.items()}

    def run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One job. Raises whatever the engine raises; the loop makes a FAULT of it."""
        engine = self.engines.get(str(message["engine"]))
        if engine is None:
            why = self.errors.get(str(message["engine"]), "not loaded")
            return _refused(Refusal(RefusalCode.ENGINE_NOT_AVAILABLE, why))
        about: dict[str, Any] = {"package": _package(engine.package)}
        study = _visible(study_from_json(message["study"]), frozenset(message["series"]))
        clinical: dict[str, ClinicalInput] = {}
        selection = engine.engine.select(study, clinical)
        if isinstance(selection, Refusal):
            return about | _refused(selection)
        about["input_digest"] = decide.input_digest(selection, clinical, engine.package)
        if about["input_digest"] == message["previous"]:
            return about | {"outcome": "UNCHANGED"}
        return about | self._predict(engine, str(message["route"]), selection, clinical)

    def _predict(
        self, engine: Loaded, route: str, selection: Selection, clinical: Mapping[str, ClinicalInput]
    ) -> dict[str, Any]:
        started = time.monotonic()
        try:
            prediction = engine.engine.predict(selection, PixelDecoder(), engine.run)
        except PixelsUndecodableError as e:
            return _refused(e.refusal())
        if isinstance(prediction, Refusal):
            return _refused(prediction)
        session = next(iter(engine.sessions.values()))
        concluded = decide.conclude(
            route, engine.task, engine.package, selection, prediction, clinical,
            spool=self._spool, backend=session.backend, precision=session.precision, seconds=time.monotonic() - started,
        )  # fmt: skip
        if isinstance(concluded, Refusal):
            return _refused(concluded)
        return {"outcome": "RESULT", "result": concluded.to_json()}


def _visible(study: Study, series: frozenset[str]) -> Study:
    """What the route matched, and what may hold a region: an engine for kidneys must not pick a liver clip."""
    if not series:
        return study
    keep = tuple(s for s in study.series if s.series_instance_uid in series or s.modality in ROI_MODALITIES)
    return Study(study.study_instance_uid, study.revision, keep)


def _package(package: ModelPackage) -> dict[str, Any]:
    """What is said of a package beside every answer: enough for the provenance of a refusal."""
    m = package.manifest
    return {"version": m.version, "digest": package.digest, "intended_use": m.intended_use, "algorithm": m.algorithm}


def _refused(refusal: Refusal) -> dict[str, Any]:
    return {"outcome": "REFUSED", "refusal": {"code": str(refusal.code), "detail": refusal.detail}}


def _serve(channel: socket.socket) -> None:
    """The child's life: start, then jobs until the parent is gone."""
    with channel.makefile("rwb") as file:
        start = json.loads(file.readline())
        config = Config.model_validate_json(start["config"])
        _limit(config.infer.memory_gb)
        worker = Worker(config, tuple(start["tasks"]))
        _send(file, {"kind": "ready", "engines": worker.told()})
        for line in file:
            _send(file, {"kind": "done"} | _answer(worker, json.loads(line)))


def _answer(worker: Worker, message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return worker.run(message)
    except NodeError as e:
        return {"outcome": "FAULT", "error": str(e)}
    except MemoryError:
        return {"outcome": "FAULT", "error": "out of memory (infer.memory_gb)"}
    except Exception as e:  # noqa: BLE001  the worker's stage loop: an engine may raise anything
        # Type and place only: the text of a foreign exception may quote a data element.
        return {"outcome": "FAULT", "error": f"{type(e).__name__} at {place_of(e.__traceback__)}"}


def _send(file: Any, message: Mapping[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def _limit(memory_gb: float) -> None:
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold pixels and names
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJUST)


def main() -> None:
    """`python -m dicom_node.worker --fd N`: started by WorkerClient only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us in its order
    np.seterr(all="ignore")  # what is not finite is caught by decide.py, where it has a meaning
    quiet_values()
    with socket.socket(fileno=parser.parse_args().fd) as channel, contextlib.suppress(BrokenPipeError, ConnectionError):
        _serve(channel)


# -- the parent


class WorkerClient:
    """Starts the child, hands it jobs one at a time, kills it at the deadline, starts it again."""

    def __init__(self, config: Config, tasks: tuple[str, ...], log: Log, recorder: Recorder) -> None:
        self._config, self._tasks, self._log, self._recorder = config, tasks, log, recorder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._file: Any = None
        self._engines: dict[str, Any] = {}
        self._closed = False

    @property
    def is_ready(self) -> bool:
        """The child runs and its engines are loaded."""
        return self._process is not None and self._process.poll() is None and bool(self._engines)

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    def engines(self) -> dict[str, Any]:
        """What the child said of each engine; empty until it is ready."""
        return self._engines

    def ready(self) -> dict[str, Any]:
        """Start the child if it does not run; wait until its engines are loaded. Raises WorkerError."""
        with self._lock:
            self._ensure()
        return self._engines

    def run(self, job: JobLike, route: Route, study: Study, previous: str | None, timeout: float) -> Reply:
        """One job. Raises WorkerError on crash, hang or a broken answer; the child restarts with the next job."""
        message = {
            "kind": "job", "id": job.id, "route": route.name, "engine": route.engine, "study": study_to_json(study),
            "series": job.payload.get("series", []), "previous": previous,
        }  # fmt: skip
        with self._lock:
            self._ensure()
            answer = self._ask(message, timeout)
        answer.pop("kind", None)
        return Reply(**answer)

    def close(self) -> None:
        """End the child. Does not wait for a job in hand."""
        self._closed = True
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def _ensure(self) -> None:
        if self._closed:
            raise WorkerError("the node is stopping")
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            self._gone("ended", self._process.returncode)
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(  # noqa: S603  our own interpreter, our own arguments
            [sys.executable, "-m", "dicom_node.worker", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._channel, self._file = ours, ours.makefile("rwb")
        start = {"kind": "start", "config": self._config.model_dump_json(), "tasks": self._tasks}
        self._engines = self._ask(start, START_SECONDS)["engines"]
        for task, told in self._engines.items():
            self._recorder.set("dicom_node_engine_accepted", float(not told["error"]), engine=task, backend="onnx")
            if told["error"]:
                self._log.error("engine_refused", engine=task, error=told["error"])

    def _ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert self._channel is not None and self._process is not None  # noqa: S101  set by _ensure
        self._channel.settimeout(timeout)
        try:
            _send(self._file, message)
            line = self._file.readline()
        except TimeoutError:
            self._end()
            self._gone("deadline", None)
            raise WorkerError(f"no answer within {timeout:g} s; the worker was killed") from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self._end()
            code = self._process.returncode
            self._gone("crash", code)
            raise WorkerError(f"the worker ended while it worked on this job ({_cause(code)})")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise WorkerError("the worker gave no answer that can be read")
        return answer

    def _end(self) -> None:
        assert self._process is not None and self._channel is not None  # noqa: S101  set by _ensure
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # a crashed child tells its signal
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._file.close()
        self._channel.close()

    def _gone(self, reason: str, code: int | None) -> None:
        self._engines = {}
        self._process = None
        if not self._closed:
            self._recorder.inc("dicom_node_worker_restarts_total", reason=reason)
            self._log.error("worker_ended", reason=reason, cause=_cause(code))


def _cause(code: int | None) -> str:
    if code is None:
        return "killed by the node"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    main()

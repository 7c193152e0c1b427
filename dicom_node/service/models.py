"""The life of a model package at a site: install, activate, rollback, verify.

A package becomes active only after everything that could refuse it has had its say, in a worker that loads it as it
will serve. While a node runs, the node switches: between two jobs, so that the job in hand ends with the package it
began with and every result names the one that made it. A step that fails leaves the active package in place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dicom_node import packages
from dicom_node.config import Config, Infer
from dicom_node.errors import NodeError, PackageError, UnknownTargetError, WorkerError
from dicom_node.log import Log
from dicom_node.metrics import NullRecorder, Recorder
from dicom_node.packages import ModelPackage, TaskFolder
from dicom_node.packages import install as files
from dicom_node.service.control import Message
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.worker import WorkerClient

KINDS = ("activate", "rollback")
Answer = dict[str, Any]
Load = Callable[[str, Path | None], dict[str, Any]]
"""Put a package to use: (task, its folder; None = the active one) -> what the worker says of it."""


def task_folder(config: Config, task: str) -> Path:
    """Raises UnknownTargetError."""
    found = packages.find_tasks(config.engines.path)
    if task not in found:
        known = ", ".join(sorted(found)) or "there is none"
        raise UnknownTargetError(f"no task {task[:48]!r} under engines.path ({known})")
    return found[task]


def _keys(config: Config) -> Path | None:
    return config.store.root / "keys" if config.engines.require_signature else None


@contextlib.contextmanager
def trial(config: Config) -> Iterator[Load]:
    """A worker of its own, under the same limits as one that serves, and gone afterwards."""
    client = WorkerClient(config, (), Log.null(), NullRecorder())
    try:
        yield client.load
    finally:
        client.close()


def _accepted(load: Load, task: str, folder: Path | None) -> dict[str, Any]:
    """What the worker says. Raises PackageError where it refuses, or is lost over it."""
    try:
        told = load(task, folder)
    except WorkerError as e:
        raise PackageError(f"{task}: {e}") from None
    if told["error"]:
        raise PackageError(f"{task}: {told['error']}")
    return told


# -- install


def install(config: Config, folder: Path) -> Answer:
    """Check, replay, copy; not yet active. Raises PackageError, UnknownTargetError, StoreError, RootInUseError."""
    root = config.store.root
    with files.lock_models(root):
        (root / "models").mkdir(mode=0o700, exist_ok=True)
        files.sweep(root)
        package = files.check(folder, _keys(config))
        task, version = package.manifest.task, package.manifest.version
        home = packages.load_task(task_folder(config, task))
        answer = {"task": task, "version": version, "digest": package.digest,
                  "intended_use": package.manifest.intended_use}  # fmt: skip
        if version in files.installed(root, task):
            _same(files.version_folder(root, task, version), package)
            return answer | {"already_installed": True, "accepted": []}
        if home.missing_libraries:
            raise PackageError(f"{task}: not available: install {', '.join(home.missing_libraries)}")
        with files.staged(package, root) as copy, trial(config) as load:
            told = _accepted(load, task, copy)
            files.settle(copy, root, package)
        return answer | {"already_installed": False, "accepted": told["accepted"]}


def _same(there: Path, package: ModelPackage) -> None:
    if packages.load_package(there).digest != package.digest:
        version = package.manifest.version
        raise PackageError(
            f"{package.folder.name}: version {version} is installed with other bytes; a version is given once"
        )


# -- activate, rollback


class Switch:
    """Applies an order. One at a time, in the process that writes the ledger."""

    def __init__(
        self, config: Config, ledger: Ledger, log: Log, recorder: Recorder, workers: list[WorkerClient]
    ) -> None:
        """`workers`: those that serve; without one, or for a task of no route, a trial worker has the last word."""
        self._config, self._ledger, self._log, self._recorder, self._workers = config, ledger, log, recorder, workers
        self._served = {route.engine for route in config.routes}
        self._lock = threading.Lock()

    def apply(self, message: Message) -> Message:
        """The answer is `{"text"}`, or `{"error"}` where nothing was changed."""
        kind, task, version = (str(message.get(key, "")) for key in ("kind", "task", "version"))
        try:
            with self._lock, files.lock_models(self._config.store.root):
                return {"text": self._switch(kind, task, version)}
        except NodeError as e:
            return {"error": str(e)}

    def _switch(self, kind: str, task: str, version: str) -> str:
        root = self._config.store.root
        home = packages.load_task(task_folder(self._config, task))
        before = files.history(root, task)
        after = self._wanted(kind, task, version, before)
        served = [_digest(worker, task) for worker in self._serving(task)]
        try:
            package = self._put_to_use(home, files.version_folder(root, task, after[0]) if after else None)
            files.choose(root, task, after)
        except NodeError as e:
            self._restore(task, served)
            self._tell("PACKAGE_REFUSED", task, "refused", f"{task}: the package in use stays: {e}")
            raise
        self._confirm(task, package)
        name = f"{task}: {package.manifest.version} ({package.manifest.intended_use}), digest {package.digest[:16]}…"
        text = f"{name}, in use; before: {before[0] if before else 'the package that comes with the task'}"
        if kind == "rollback":
            self._tell("PACKAGE_ROLLED_BACK", task, "rolled_back", text)
        else:
            self._tell("PACKAGE_ACTIVATED", task, "activated", text)
        return text

    def _wanted(self, kind: str, task: str, version: str, before: tuple[str, ...]) -> tuple[str, ...]:
        if kind == "rollback":
            if not before:
                raise PackageError(f"{task}: the package that comes with the task is in use: nothing to go back to")
            return before[1:]
        known = files.installed(self._config.store.root, task)
        if kind != "activate" or version not in known:  # also keeps ".." out of the path
            raise PackageError(f"{task}: version {version[:32]!r} is not installed ({', '.join(known) or 'none is'})")
        return before if before[:1] == (version,) else (version, *before)

    def _put_to_use(self, home: TaskFolder, folder: Path | None) -> ModelPackage:
        config, folder = self._config, folder or home.folder / "model"
        package = packages.package_for(
            home, folder, config.store.root, require_signature=config.engines.require_signature
        )
        if not self._serving(home.task.task):
            with trial(config) as load:
                _accepted(load, home.task.task, folder)
        for worker in self._serving(home.task.task):
            _accepted(worker.load, home.task.task, folder)
        return package

    def _serving(self, task: str) -> list[WorkerClient]:
        return self._workers if task in self._served else []

    def _restore(self, task: str, served: list[str | None]) -> None:
        """What has gone ahead goes back to the active package, which the marker still names."""
        for worker, digest in zip(self._serving(task), served, strict=True):
            with contextlib.suppress(NodeError):
                if _digest(worker, task) != digest:
                    worker.load(task)

    def _confirm(self, task: str, package: ModelPackage) -> None:
        """A worker that died meanwhile may have come back with the package before."""
        for worker in self._serving(task):
            with contextlib.suppress(NodeError):
                if worker.digest(task) != package.digest:
                    worker.load(task)

    def _tell(self, code: str, task: str, outcome: str, text: str) -> None:
        self._recorder.inc("dicom_node_package_switches_total", engine=task, outcome=outcome)
        self._log.info(code.lower(), engine=task, text=text)
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            if code == "PACKAGE_ACTIVATED":
                add_event(tx, now, None, "PACKAGE_ACTIVATED", text)
            elif code == "PACKAGE_ROLLED_BACK":
                add_event(tx, now, None, "PACKAGE_ROLLED_BACK", text)
            else:
                add_event(tx, now, None, "PACKAGE_REFUSED", text[:400])


def _digest(worker: WorkerClient, task: str) -> str | None:
    digest: str | None = worker.engines().get(task, {}).get("digest")
    return digest


# -- drift


REPLAY_TURN = 30.0
"""Seconds between two looks for an engine that is due; a turn replays one engine in one worker."""


def replay_one(workers: list[WorkerClient], section: Infer) -> bool:
    """Hold one engine that serves to its golden answers again, where one is due. True = there was one."""
    older_than = section.replay_minutes * 60
    return any(worker.replay(older_than, section.timeout_seconds) for worker in workers)


# -- verify


def verify(config: Config, task: str | None) -> tuple[list[Answer], int]:
    """Hash every package again and replay its golden cases; exit code 1 when one does not hold."""
    names = [task] if task is not None else sorted(packages.find_tasks(config.engines.path))
    told = []
    with trial(config) as load:
        for name in names:
            told += [_verified(config, load, name, *found) for found in _candidates(config, name)]
    return told, 0 if all(line["ok"] for line in told) else 1


def _candidates(config: Config, task: str) -> list[tuple[str, Path]]:
    root, shipped = config.store.root, task_folder(config, task) / "model"
    active = files.history(root, task)[:1]
    found = [("shipped" if active else "active, shipped", shipped)] if shipped.is_dir() else []
    versions = sorted({*files.installed(root, task), *active})
    states = ("active" if active == (version,) else "installed" for version in versions)
    return [*found, *zip(states, (files.version_folder(root, task, v) for v in versions), strict=True)]


def _verified(config: Config, load: Load, task: str, state: str, folder: Path) -> Answer:
    line: Answer = {
        "task": task, "version": folder.name if state in ("active", "installed") else None, "state": state,
        "digest": None, "ok": False, "reason": "", "backend": None, "precision": None, "accepted": [], "tried": [],
    }  # fmt: skip
    try:
        package = files.check(folder, _keys(config))
        line |= {"version": package.manifest.version, "digest": package.digest}
        told = _accepted(load, task, folder)
        line |= {key: told[key] for key in ("backend", "precision", "accepted", "tried")}
    except NodeError as e:
        return line | {"reason": str(e)}
    return line | {"ok": True}

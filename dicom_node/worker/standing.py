"""What every engine runs on, in every worker of a node: which backends are left out, and who is told of a change.

In the parent. A backend that was dropped (it crashed, hung, gave what no answer can be, or drifted) is left out for its
engine in every later child, until the node starts again. Nothing changes in silence: log, metrics, an event, a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.packages import acceptance

Told = Mapping[str, Any]
Use = tuple[str, str]
"""Backend and precision."""
REFERENCE = "onnx"
REASONS = {
    "crash": "the worker died in it",
    "deadline": "the worker hung in it",
    "answer": "it gave no sound answer where the reference did",
    "drift": "it no longer gives the golden answers",
    "missing": "it is no longer here",
    "refused": "it was not accepted again",
    "slower": "the other is faster now",
    "package": "another package is in use",
    "plan": "its compiled plan was not what it should be",
}
_PLANS = "plan cache: "
"""How notes on the cache of compiled plans begin (`runtime/plans.py`)."""


class _Drop(NamedTuple):
    reason: str
    text: str


class Standing:
    """Shared by the workers of a node. Any thread may call."""

    def __init__(
        self,
        runtime: str,
        log: Log,
        recorder: Recorder,
        *,
        changed: Callable[[str], None] = lambda _: None,
        keep: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        """`changed` is told of a change in words, `keep` is given the whole table (for `acceptance.write`)."""
        self._runtime, self._log, self._recorder = runtime, log, recorder
        self._changed, self._keep = changed, keep
        self._lock = threading.Lock()
        self._dropped: dict[str, dict[str, _Drop]] = {}
        self._unsaid: dict[tuple[int, str], tuple[str, _Drop]] = {}
        """Worker and task -> what it left, until it says what it runs instead."""
        self._uses: dict[str, dict[int, tuple[Use, str]]] = {}
        self._seen: dict[str, set[Use]] = {}
        self._table: dict[str, dict[str, Any]] = {}

    def excluded(self) -> dict[str, dict[str, str]]:
        """Task -> backend -> why, for a child that starts."""
        with self._lock:
            return {
                task: {b: f"{REASONS[d.reason]}: {d.text}" for b, d in drops.items()}
                for task, drops in self._dropped.items()
            }

    def drop(self, worker: int, task: str, backend: str, reason: str, text: str) -> None:
        """A worker left a backend: left out for this engine in every child that starts from now on."""
        backend = backend if backend in _BACKENDS else "other"
        fallen = _Drop(reason if reason in REASONS else "answer", acceptance.plain(text)[:200])
        with self._lock:
            if backend != REFERENCE:  # which serves last whatever it did: its package is held to its answers again
                self._dropped.setdefault(task, {})[backend] = fallen
            self._unsaid[worker, task] = (backend, fallen)
        self._recorder.inc("dicom_node_backend_changes_total", engine=task, backend=backend, reason=fallen.reason)
        self._log.error(
            "backend_dropped", engine=task, backend=backend, reason=fallen.reason, cause=fallen.text,
        )  # fmt: skip

    def tell(self, worker: int, engines: Mapping[str, Told]) -> None:
        """What a worker says of engines: counted, logged, kept; a change of backend becomes an event."""
        for task, told in sorted(engines.items()):
            with self._lock:
                said = self._note(worker, task, told)
            self._record(task, told)
            if said:
                self._log.warning("backend_changed", engine=task, text=said)
                self._changed(said)
        with self._lock:
            now = time.time()
            self._table |= {task: {"at": now, **told} for task, told in engines.items()}
            table = dict(self._table)
        self._keep(table)

    # -- under the lock

    def _note(self, worker: int, task: str, told: Told) -> str:
        """The change in words; "" where there is none."""
        uses = self._uses.setdefault(task, {})
        before = uses.get(worker)
        backend, fallen = self._unsaid.pop((worker, task), ("", None))
        if told["error"]:
            uses.pop(worker, None)
            self._show(task)
            return f"{task}: nothing serves any longer: {told['error'][:200]}" if before or fallen else ""
        now = ((told["backend"], told["precision"]), told["digest"])
        uses[worker] = now
        self._show(task)
        if fallen is not None and backend == now[0][0]:  # the reference: behind it there is nothing
            return f"{task}: {_words(now[0])} serves on, loaded anew: {REASONS[fallen.reason]} ({fallen.text})"
        if fallen is not None:
            return f"{task}: {_words(now[0])} serves; {backend} is left out: {REASONS[fallen.reason]} ({fallen.text})"
        if before is None or before[0] == now[0]:
            return ""
        reason, text = self._why(task, before, now, told)
        left = before[0][0]
        self._recorder.inc("dicom_node_backend_changes_total", engine=task, backend=left, reason=reason)
        return f"{task}: {_words(now[0])} serves in place of {_words(before[0])}: {REASONS[reason]}" + (
            f" ({text})" if text else ""
        )

    def _why(self, task: str, before: tuple[Use, str], now: tuple[Use, str], told: Told) -> tuple[str, str]:
        if fallen := self._dropped.get(task, {}).get(before[0][0]):
            return fallen.reason, fallen.text
        if before[1] != now[1]:
            return "package", ""
        for tried in told["tried"]:
            if (tried["backend"], tried["precision"]) == before[0]:
                reason = {"not here": "missing", "accepted": "slower"}.get(tried["status"], "refused")
                return reason, tried["reason"][:200]
        return "missing", ""

    def _show(self, task: str) -> None:
        """1 for what any worker runs, 0 for what none does any longer."""
        used = {use for use, _ in self._uses[task].values()}
        seen = self._seen.setdefault(task, set())
        seen |= used
        for backend, precision in seen:
            value = float((backend, precision) in used)
            self._recorder.set("dicom_node_engine_backend", value, engine=task, backend=backend, precision=precision)

    # -- counts and lines

    def _record(self, task: str, told: Told) -> None:
        self._recorder.set("dicom_node_engine_accepted", float(not told["error"]), engine=task)
        if told["error"]:
            self._log.error("engine_refused", engine=task, error=told["error"])
            return
        if self._runtime != "auto":
            named = told["backend"].startswith(self._runtime)  # tensorrt is also its edition for RTX
            self._recorder.set("dicom_node_engine_first_choice", float(named), engine=task)
        for line in told["accepted"]:
            self._log.info("engine_accepted", engine=task, version=told["version"], digest=told["digest"], **line)
        for tried in told["tried"]:
            self._record_tried(task, tried, serves=tried["backend"] == told["backend"])

    def _record_tried(self, task: str, tried: Mapping[str, Any], *, serves: bool) -> None:
        ratios = [line["worst"] / line["tolerance"] for line in tried["lines"] if line["tolerance"] > 0]
        if ratios:
            labels = {"engine": task, "backend": tried["backend"], "precision": tried["precision"]}
            self._recorder.set("dicom_node_engine_acceptance_ratio", max(ratios), **labels)
        for note in tried["notes"]:
            self._record_note(task, tried["backend"], note[:200], serves=serves)
        if tried["status"] in ("refused", "excluded"):
            self._log.warning(
                "backend_not_used", engine=task, backend=tried["backend"], precision=tried["precision"],
                status=tried["status"], reason=tried["reason"],
            )  # fmt: skip

    def _record_note(self, task: str, backend: str, note: str, *, serves: bool) -> None:
        self._log.warning("backend_noted", engine=task, backend=backend, text=note)
        if _PLANS in note:  # somebody else wrote there, or the disk loses what is written
            said = f"{task}: {backend} {'serves on' if serves else 'stays accepted'}; {note}"
            self._recorder.inc("dicom_node_backend_changes_total", engine=task, backend=backend, reason="plan")
            self._log.warning("backend_changed", engine=task, text=said)
            self._changed(said)


_BACKENDS = frozenset(get_args(acceptance.BackendName))


def _words(use: Use) -> str:
    return " ".join(use)

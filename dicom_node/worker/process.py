"""One worker process as its parent sees it: started, asked, ended. Every failure is a LostError.

What the child says on the way (which engines it loads, which backend's library it is inside of) is remembered here:
when it dies, that is all there is to tell who was to blame.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dicom_node.errors import WorkerError
from dicom_node.worker.wire import EndedError, GarbageError, Wire

START_SECONDS = 120.0
"""Without a word from the child: the longest that one step of loading may take (import, verify, build, replay)."""
START_LIMIT = 1800.0
"""For all engines together: plans for a GPU are built once and then found in the cache."""
MOST_TASKS = 256
_T = TypeVar("_T")
Hear = Callable[[dict[str, Any]], None]


class LostError(Exception):
    """The child did not answer: why, in a word for the metric and in words for the operator."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason, self.text = reason, text
        super().__init__(text)


class ChildProcess:
    """One process and the wire to it."""

    def __init__(self, module: str = "dicom_node.worker") -> None:
        ours, theirs = socket.socketpair()
        watched, self._lifeline = os.pipe()  # closes with this process, however it ends
        package = str(Path(__file__).parent.parent.parent)
        search = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        command = [sys.executable, "-P", "-m", module, "--fd", str(theirs.fileno())]
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
        self.loading: set[str] = set()
        """Engines that are being loaded."""
        self.through: set[str] = set()
        """Engines that are loaded, or refused."""
        self._inside: dict[str, str] = {}

    def inside(self) -> dict[str, str]:
        """Task -> the backend whose library the child is in, or was when it ended."""
        return {task: backend for task, backend in self._inside.items() if backend}

    def start(self, setup: Mapping[str, Any]) -> dict[str, Any]:
        """Send the setup; wait for `ready`."""

        def nothing(_: dict[str, Any]) -> None:
            raise LostError("protocol", "the worker answered before it was ready")

        answer = self.ask(setup, time.monotonic() + START_LIMIT, nothing, step=START_SECONDS)
        if answer.get("kind") != "ready" or not isinstance(answer.get("engines"), dict):
            raise LostError("protocol", "the worker said something else than ready")
        return dict(answer["engines"])

    def ask(
        self, message: Mapping[str, Any], deadline: float, hear: Hear, *, step: float | None = None
    ) -> dict[str, Any]:
        """One order; `hear` is given what comes before the answer: `metrics` and `left`.

        With `step`, the child must also say something so often (it says where it is).
        """

        def by() -> float:
            return deadline if step is None else min(deadline, time.monotonic() + step)

        self._guard(lambda: self._wire.send(message, by()))
        while True:
            answer = self._guard(lambda: self._wire.receive(by()))
            if self._noted(answer):
                continue
            if answer.get("kind") not in ("metrics", "left"):
                return answer
            hear(answer)

    def _noted(self, message: Mapping[str, Any]) -> bool:
        """Where the child is; False for any other message."""
        kind, task = message.get("kind"), str(message.get("task", ""))[:64]
        if kind not in ("loading", "through", "at"):
            return False
        if len(self._inside) + len(self.loading) + len(self.through) > MOST_TASKS:
            raise LostError("protocol", "the worker speaks of engines without end")
        if kind == "loading":
            self.loading.add(task)
        elif kind == "through":
            self.loading.discard(task)
            self.through.add(task)
        else:
            self._inside[task] = str(message.get("backend", ""))[:32]
        return True

    def _guard(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except TimeoutError:
            raise LostError("deadline", "no answer by the deadline: the worker was killed") from None
        except EndedError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # a crash tells its signal
            raise LostError("crash", f"the worker process ended ({cause(self.process.returncode)})") from None
        except GarbageError as e:
            raise LostError("protocol", f"the worker: {e}") from None

    def end(self) -> None:
        """Kill, reap, close."""
        self.process.kill()
        self.process.wait()
        self._wire.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def cause(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "it closed its end"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"

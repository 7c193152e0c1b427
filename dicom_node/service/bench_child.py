"""The processes that `engines bench` times: started, asked one at a time, ended. Also the training side's commands.

A child is foreign code under test: it may die, hang or answer nonsense, and then its row says so and the bench goes on.
The questions are those of `worker/timing.py`. Nothing here knows what is timed.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicom_node import config as configuration
from dicom_node.errors import NodeError
from dicom_node.worker.wire import EndedError, GarbageError, Wire

COMMAND_SECONDS = 900.0
"""An export of the largest graph, with others at work."""
Answer = dict[str, Any]


class ChildError(NodeError):
    """A process that is timed gave no usable answer."""


class Child:
    """One process. Every failure is a ChildError, after which the process is gone."""

    def __init__(self, command: list[str]) -> None:
        """`command` takes `--fd N`, an inherited socket that speaks JSON lines."""
        ours, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter, our own arguments
                [sys.executable, *command, "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said,
                pass_fds=[theirs.fileno()], env=_environment(),
            )  # fmt: skip
        self._channel, self._wire = ours, Wire(ours)

    def ask(self, question: Mapping[str, Any], patience: float) -> Answer:
        """Raises ChildError."""
        try:
            deadline = time.monotonic() + patience
            self._wire.send(question, deadline)
            answer = self._wire.receive(deadline)
        except TimeoutError:
            self.close()
            raise ChildError(f"no answer in {patience:.0f} s") from None
        except EndedError:
            raise ChildError(self._ended()) from None
        except GarbageError:
            self.close()
            raise ChildError("its answer is no answer") from None
        if "error" in answer:
            raise ChildError(str(answer["error"])[:240])
        return answer

    def milliseconds(self, question: Mapping[str, Any], patience: float, key: str = "ms") -> list[float]:
        """The answer of `time` or `case`. Raises ChildError."""
        return durations(self.ask(question, patience), key)

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self._said.seek(0)
        last = (self._said.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1].strip()
        self.close()
        if code is None:
            return "it closed the pipe"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return last[:240] or f"ended with exit status {code}"

    def close(self) -> None:
        """Ends the process: it holds nothing that must be kept."""
        self._channel.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._said.close()


def durations(answer: Answer, key: str) -> list[float]:
    """Raises ChildError unless they are what a clock can have shown."""
    found = answer.get(key)
    if not isinstance(found, list) or not found:
        raise ChildError("its answer is no answer")
    if not all(isinstance(ms, (int, float)) and math.isfinite(ms) and ms > 0 for ms in found):
        raise ChildError("its answer is no duration")
    return [float(ms) for ms in found]


def training(*arguments: str) -> str:
    """`python -m engines.training …`; "" = done, else why not."""
    command = [sys.executable, "-m", "engines.training", *arguments]
    try:
        done = subprocess.run(  # noqa: S603  as above
            command, capture_output=True, text=True, env=_environment(), timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no end in {COMMAND_SECONDS:.0f} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].strip()[:240]


def phantom(task: str, folder: Path) -> list[Path]:
    """A phantom study of a task, with its region where the task knows one. Raises ChildError."""
    why = training("phantom", task, "--seed", "20261", "--label", "1", "--roi", "--out", str(folder))
    if why:
        raise ChildError(f"its phantom cannot be made: {why}")
    return sorted(folder.rglob("*.dcm"))


def _environment() -> dict[str, str]:
    """The training side is found where the tasks are; it is no part of the node."""
    path = os.pathsep.join(filter(None, [str(configuration.shipped()), os.environ.get("PYTHONPATH", "")]))
    return dict(os.environ) | {"PYTHONPATH": path}

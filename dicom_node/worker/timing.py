"""What a process that is timed says of itself, over the pipe it was given: JSON lines, one question, one answer.

    here {…}                    → missing: why a backend cannot be tried, "" = it can     (the node's own backends only)
    open {…}                    → seconds, version, models: what each was off from its golden answers, memory
    time {batch, seconds}       → ms: of each pass over all models, one after the other
    case {study, seconds}       → ms, score_ms: decoded input to result             (the node's own backends only)
    build {…}                   → lines: a plan for each graph                      (`planning`)
    memory                      → rss, pss of this process, in bytes

An answer with `error` says in words what went wrong, and the process goes on. `engines bench` asks; the torch side
(`python -m engines.training eager`) speaks the same, so that both are timed by the same clock in the same rounds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import NodeError
from dicom_node.runtime import Session
from dicom_node.worker.wire import EndedError, Wire

Answer = dict[str, Any]
Question = Mapping[str, Any]
MOST_CALLS = 20_000
"""Of one question: a graph of ten microseconds would fill a message."""


def serve(fd: int, answers: Mapping[str, Callable[[Question], Answer]], foreign: tuple[type[Exception], ...]) -> None:
    """Answer until the other end is gone. `foreign`: what the libraries that are timed raise; told by its type."""
    # What a library prints must not stand between two answers, and nobody reads it.
    os.dup2(2, 1)
    with socket.socket(fileno=fd) as channel, contextlib.suppress(EndedError):
        wire = Wire(channel)
        while True:
            question = wire.receive()
            wire.send(_answered(answers, question, foreign))


def _answered(
    answers: Mapping[str, Callable[[Question], Answer]], question: Question, foreign: tuple[type[Exception], ...]
) -> Answer:
    known = {"memory": lambda _: memory(), **answers}
    ask = known.get(str(question.get("do")))
    if ask is None:
        return {"error": "no such question"}
    try:
        return ask(question)
    except NodeError as e:
        return {"error": str(e)}
    except MemoryError:
        return {"error": "out of memory"}
    except foreign as e:
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"}


def timed(call: Callable[[], object], seconds: float, least: int = 1) -> list[float]:
    """Milliseconds of each call, for so long and at least so often, after one that is not counted: what ran before in
    another process has emptied the caches."""
    call()
    spent: list[float] = []
    begun = time.perf_counter()
    while len(spent) < least or (time.perf_counter() - begun < seconds and len(spent) < MOST_CALLS):
        started = time.perf_counter()
        call()
        spent.append(1000 * (time.perf_counter() - started))
    return spent


class Passes:
    """Sessions of one engine and an input for each: what `time` asks about."""

    def __init__(self, sessions: Mapping[str, Session], inputs: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        self._sessions, self._inputs = sessions, inputs

    def __call__(self, question: Question) -> Answer:
        """Milliseconds of each pass: every model once, on so many cases."""
        batch, least = int(question["batch"]), int(question.get("least", 1))
        given = {
            name: {
                key: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:]))) for key, array in arrays.items()
            }
            for name, arrays in self._inputs.items()
        }

        def once() -> None:
            for name, session in self._sessions.items():
                session.run(given[name])

        return {"ms": [round(ms, 5) for ms in timed(once, float(question["seconds"]), least)]}


def memory() -> Answer:
    """Of this process: resident, and proportional (what is shared counts in parts)."""
    found = {"Rss": 0, "Pss": 0}
    for line in Path("/proc/self/smaps_rollup").read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = 1024 * int(rest.split()[0])
    return {"rss": found["Rss"], "pss": found["Pss"]}

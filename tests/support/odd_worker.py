"""A worker whose backends do what a file tells them: `python -m odd_worker`, started by WorkerClient(module=…).

`ODD_BACKENDS` names a JSON file {backend: behaviour}, read at every call, so that a backend that was accepted can turn.
Behaviours: "" (sound), missing, load-crash, refuse, lie, raise, leak, nan, shape, crash, hang, slow, and stuck: NaN,
and a crash when it is left.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import BackendError
from dicom_node.runtime import Backend, Model, Place, Session, choose
from dicom_node.runtime.onnx import OnnxBackend
from dicom_node.worker.child import main

choose.SECONDS = 0.05
"""Of each race: these backends differ by tens of milliseconds, and the least number of rounds shows that."""


def behaviour(name: str) -> str:
    return str(json.loads(Path(os.environ["ODD_BACKENDS"]).read_text()).get(name, ""))


class OddSession:
    """The reference's answers after `seconds`, or what it is told."""

    precision = "fp32"

    def __init__(self, name: str, inner: Session, seconds: float) -> None:
        self.backend, self._inner, self._seconds = name, inner, seconds

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        mode = behaviour(self.backend)
        if mode == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "hang":
            ctypes.PyDLL(None).sleep(600)  # the interpreter lock is held, as in a driver's call
        if mode == "raise":
            raise BackendError("the device is gone")
        if mode == "leak":
            raise KeyError("DOE^JANE")
        answer = self._inner.run(inputs)
        time.sleep(0.1 if mode == "slow" else self._seconds)
        if mode == "lie":
            return {name: array + np.float32(0.5) for name, array in answer.items()}
        if mode in ("nan", "stuck"):
            return {name: array * np.float32("nan") for name, array in answer.items()}
        if mode == "shape":
            return {name: array[:1, :1] for name, array in answer.items()}
        return answer

    def close(self) -> None:
        if behaviour(self.backend) == "stuck":
            os.kill(os.getpid(), signal.SIGSEGV)
        self._inner.close()


class OddBackend:
    precision = "fp32"

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self._seconds = name, seconds

    def missing(self) -> str:
        return "it was taken out" if behaviour(self.name) == "missing" else ""

    def version(self) -> str:
        return "odd 1"

    def open(self, model: Model, place: Place) -> Session:
        if behaviour(self.name) == "load-crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if behaviour(self.name) == "refuse":
            raise BackendError("it cannot be compiled")
        return OddSession(self.name, OnnxBackend().open(model, place), self._seconds)


class SlowReference(OnnxBackend):
    """Slower than the others, so that these are chosen."""

    def open(self, model: Model, place: Place) -> Session:
        return OddSession("onnx", super().open(model, place), 0.04)


def known(_runtime: str) -> tuple[Backend, ...]:
    return OddBackend("cuda", 0.0), OddBackend("openvino", 0.01), SlowReference()


if __name__ == "__main__":
    main(known)

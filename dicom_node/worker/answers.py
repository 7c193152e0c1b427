"""The `run` of one job: what a model answers, and who is to blame where it answers nothing sound.

`runtime.guard` has checked names, types, shapes and that all is finite. Where that fails, or the backend raises, the
reference is given the same input. Where it gives a sound answer the backend has failed, and nothing of this run may be
used; where it fails alike, the fault is the engine's or the input's and costs an attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from dicom_node.engine import NoSuchModelError
from dicom_node.errors import BackendError
from dicom_node.runtime import REFERENCE, Backend, Model, Place, Session
from dicom_node.runtime.guard import Guarded, bound
from dicom_node.worker.guard import Fault, guarded

Arrays = Mapping[str, NDArray[Any]]
At = Callable[[str], object]
"""Called with a backend's name before its library is entered, with "" after."""


class Answers:
    """`engine.RunModel`. `failed` says how the backend failed, whatever the engine made of the exception."""

    def __init__(self, sessions: Mapping[str, Session], reference: Reference, at: At) -> None:
        self._sessions, self._reference, self._at = sessions, reference, at
        self.failed = ""

    def __call__(self, model: str, inputs: Arrays) -> Arrays:
        """Raises NoSuchModelError, BackendError where the backend failed, WorkerError where the input is to blame."""
        session = self._sessions.get(model)
        if session is None:
            raise NoSuchModelError(f"the package has no model {str(model)[:32]!r}")
        if session.backend == REFERENCE:
            return session.run(inputs)
        if self.failed:
            raise BackendError(self.failed)  # the engine went on all the same: this job is run again anyhow
        self._at(session.backend)
        try:
            answer = guarded(partial(session.run, inputs))
        finally:
            self._at("")
        if isinstance(answer, Fault):
            self._reference.judge(model, inputs)
            self.failed = f"{session.backend} {session.precision}, model {model}: {answer.text}"
            raise BackendError(self.failed)
        return answer


class Reference:
    """The reference, opened where another backend is in doubt."""

    def __init__(self, backend: Backend, models: Sequence[Model], golden: Arrays, place: Place) -> None:
        self._backend, self._golden, self._place = backend, golden, place
        self._models = {model.name: model for model in models}

    def judge(self, name: str, inputs: Arrays) -> None:
        """Returns where it gives a sound answer. Raises WorkerError where it fails on this input alike."""
        model = self._models[name]
        outputs = {output: self._golden[f"{name}.{output}"].shape[1:] for output in model.outputs}
        most = bound(model, self._place, self._backend.name)
        session = Guarded(self._backend.open(model, self._place), model, outputs, most)
        try:
            session.run(inputs)
        finally:
            session.close()


def reference_of(backends: tuple[Backend, ...]) -> Backend:
    """The last resort, which every list of backends ends with."""
    return next(b for b in backends if is_reference(b))


def is_reference(backend: Backend) -> bool:
    """ONNX Runtime at single precision on the CPU."""
    return (backend.name, backend.precision) == (REFERENCE, "fp32")

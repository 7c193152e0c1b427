"""What a model answers, checked before an engine sees it: the `run` of one job.

An answer of the wrong names, shape or type, one that is not finite, or none at all raises a question: is it the backend
or the input? The reference is given the same input. Where it gives a sound answer the backend has failed, and nothing
of this run may be used; where it fails alike, the fault is the engine's or the input's and costs an attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.engine import NoSuchModelError
from dicom_node.errors import BackendError, WorkerError
from dicom_node.runtime import Backend, Model, Place, Session
from dicom_node.worker.guard import Fault, guarded
from dicom_node.worker.watch import is_reference

Arrays = Mapping[str, NDArray[Any]]
Sizes = Mapping[str, tuple[int, ...]]


class Answers:
    """`engine.RunModel`. `failed` says how the backend failed, whatever the engine made of the exception."""

    def __init__(
        self,
        models: Mapping[str, Model],
        sessions: Mapping[str, Session],
        golden: Arrays,
        reference: Backend,
        place: Place,
    ) -> None:
        self._models, self._sessions, self._golden = models, sessions, golden
        self._reference, self._place = reference, place
        self.failed = ""

    def __call__(self, model: str, inputs: Arrays) -> Arrays:
        """Raises NoSuchModelError, BackendError where the backend failed, WorkerError where the input is to blame."""
        session = self._sessions.get(model)
        if session is None:
            raise NoSuchModelError(f"the package has no model {str(model)[:32]!r}")
        if self.failed:
            raise BackendError(self.failed)  # the engine went on all the same: this job is run again anyhow
        if (session.backend, session.precision) == (self._reference.name, self._reference.precision):
            return session.run(inputs)
        answer = guarded(partial(session.run, inputs))
        wrong = answer.text if isinstance(answer, Fault) else self._wrong(self._models[model], inputs, answer)
        if isinstance(answer, Fault) or wrong:
            self._blame(self._models[model], inputs, wrong)
            self.failed = f"model {model} on {session.backend} {session.precision}: {wrong}"
            raise BackendError(self.failed)
        return answer

    def _wrong(self, model: Model, inputs: Arrays, answer: Arrays) -> str:
        """What no answer can be; "" where it may be one."""
        if set(answer) != set(model.outputs):
            return f"it gives {len(answer)} outputs, or others than the {len(model.outputs)} of the manifest"
        batch = len(next(iter(inputs.values())))
        usual = all(inputs[name].shape[1:] == shape for name, shape in model.shapes.items() if name in inputs)
        for name in model.outputs:
            array, rest = answer[name], self._golden[f"{model.name}.{name}"].shape[1:]
            expected = (batch, *rest) if usual else (batch, *array.shape[1:])
            if array.dtype != np.float32 or array.shape != expected or array.ndim != 1 + len(rest):
                return f"{name} is {array.dtype} {array.shape}, float32 {expected} expected"
            if not np.isfinite(array).all():
                return f"{name} holds NaN or infinity"
        return ""

    def _blame(self, model: Model, inputs: Arrays, wrong: str) -> None:
        """Returns where the backend is to blame. Raises WorkerError where the reference fails alike."""
        if not all(np.isfinite(array).all() for array in inputs.values()):
            raise WorkerError(f"model {model.name}: the input holds NaN or infinity, and {wrong}")
        session = self._reference.open(model, self._place)
        try:
            sound = self._wrong(model, inputs, session.run(inputs))  # raises WorkerError where it does not take them
        finally:
            session.close()
        if sound:
            raise WorkerError(f"model {model.name}, also on the reference: {sound}")


def reference_of(backends: tuple[Backend, ...]) -> Backend:
    """The last resort, which every list of backends ends with."""
    return next(b for b in backends if is_reference(b))

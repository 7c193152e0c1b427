"""What stands between an engine and a session, whatever the backend: a bounded batch, and answers that can be answers.

A session is given at most `bound` frames, patches or studies at once: memory does not grow with the study, and a
compiled plan has a largest batch. What comes back must be what was promised, in single precision and finite. The
engine's own mistakes (a name, a shape, a value that is no number) are told apart from the backend's: only for the
latter is a backend dropped. Computes nothing, retries nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import BackendError, WorkerError
from dicom_node.runtime import REFERENCE, Model, Place, Session

VECTORS, IMAGES, VOLUMES = 1024, 16, 4
"""Largest batch by the spatial dimensions of an input: none or one, two, three."""
CACHED = 4
"""Largest batch of the reference, of images too: ONNX Runtime keeps no memory between runs here (see `onnx`), so a
large batch asks the system for all of it anew. In parts most graphs are faster, none much slower, and all need less."""

Arrays = Mapping[str, NDArray[Any]]


def bound(model: Model, place: Place, backend: str = "") -> int:
    """The largest batch that a session of this model is given; also the largest that a plan is built for."""
    if model.name in place.max_batch:
        return max(1, place.max_batch[model.name])
    spatial = max((len(shape) - 1 for shape in model.shapes.values()), default=0)
    if spatial < 2:
        return VECTORS
    return CACHED if backend == REFERENCE else IMAGES if spatial == 2 else VOLUMES


class Guarded:
    """A session of one model behind the checks. `outputs`: shape of each promised output without its batch axis."""

    def __init__(self, session: Session, model: Model, outputs: Mapping[str, tuple[int, ...]], bound: int) -> None:
        self.backend, self.precision = session.backend, session.precision
        self._session, self._model, self._outputs, self._bound = session, model, outputs, bound

    @property
    def bound(self) -> int:
        """The largest batch that the session is given."""
        return self._bound

    @property
    def notes(self) -> tuple[str, ...]:
        """What the session has to say to an operator, where it has a word."""
        return tuple(getattr(self._session, "notes", ()))

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Raises WorkerError for what the engine gave, BackendError for what the backend did with it."""
        count = self._count(inputs)
        if count <= self._bound:
            return self._checked(inputs)
        parts = [
            self._checked({name: array[at : at + self._bound] for name, array in inputs.items()})
            for at in range(0, count, self._bound)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def close(self) -> None:
        """Free what the device holds."""
        self._session.close()

    def _count(self, inputs: Arrays) -> int:
        """The batch, once names, types and shapes are known to be those that the session was accepted with."""
        shapes = self._model.shapes
        fits = inputs.keys() == shapes.keys() and all(
            isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape[1:] == shapes[name]
            for name, array in inputs.items()
        )
        counts = {len(array) for array in inputs.values()} if fits else set()
        if len(counts) != 1 or 0 in counts:
            given = ", ".join(f"{name} {_form(array)}" for name, array in inputs.items())
            wanted = ", ".join(f"{name} float32 (n, {', '.join(map(str, s))})" for name, s in shapes.items())
            raise WorkerError(f"model {self._model.name} was given {given or 'nothing'}; it takes {wanted}")
        return counts.pop()

    def _checked(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        count = len(next(iter(inputs.values())))
        answers = self._session.run({name: np.ascontiguousarray(array) for name, array in inputs.items()})
        for name, shape in self._outputs.items():
            found = answers.get(name)
            if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != (count, *shape):
                wanted = f"float32 {(count, *shape)}"
                raise BackendError(
                    f"model {self._model.name} on {self.backend}: {name} is {_form(found)}, {wanted} expected"
                )
            if not np.isfinite(found).all():
                self._not_finite(name, inputs)
        return {name: answers[name] for name in self._outputs}

    def _not_finite(self, name: str, inputs: Arrays) -> None:
        if not all(np.isfinite(array).all() for array in inputs.values()):
            raise WorkerError(f"model {self._model.name} was given NaN or infinity")
        raise BackendError(f"model {self._model.name} on {self.backend}: {name} holds NaN or infinity")


def _form(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "missing or no array"

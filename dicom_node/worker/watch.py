"""Tells the parent whenever this process is inside a backend's library: if it dies or hangs there, the parent knows
which backend to leave out. The reference is not watched: there is nothing to fall back to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from dicom_node.runtime import REFERENCE, Backend, Model, Place, Session

At = Callable[[str], None]
"""Called with the backend's name on the way in, with "" on the way out."""


def watched(backends: Iterable[Backend], at: At) -> tuple[Backend, ...]:
    """The same backends, in the same order; each says where it is."""
    return tuple(b if is_reference(b) else _WatchedBackend(b, at) for b in backends)


def is_reference(backend: Backend) -> bool:
    """ONNX Runtime at single precision on the CPU."""
    return (backend.name, backend.precision) == (REFERENCE, "fp32")


class _WatchedBackend:
    """A Backend around another."""

    def __init__(self, inner: Backend, at: At) -> None:
        self._inner, self._at = inner, at
        self.name, self.precision = inner.name, inner.precision

    def missing(self) -> str:
        """Looking for a library may load its drivers."""
        with self._inside():
            return self._inner.missing()

    def version(self) -> str:
        """Of the library."""
        with self._inside():
            return self._inner.version()

    def open(self, model: Model, place: Place) -> Session:
        """A session that says where it is."""
        with self._inside():
            return _WatchedSession(self._inner.open(model, place), self._inside)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        self._at(self.name)
        try:
            yield
        finally:
            self._at("")


class _WatchedSession:
    """A Session around another."""

    def __init__(self, inner: Session, inside: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._inner, self._inside = inner, inside
        self.backend, self.precision = inner.backend, inner.precision

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises what the backend raises."""
        with self._inside():
            return self._inner.run(inputs)

    def close(self) -> None:
        """A library may also die of that."""
        with self._inside():
            self._inner.close()

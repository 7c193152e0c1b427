"""Backends: a `Session` runs one graph. `onnx.py` is the reference; `accept.py` holds every backend to its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Session(Protocol):
    """One loaded graph on one device. Not thread-safe: one session a worker."""

    backend: str
    precision: str

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays in, named arrays out; batch first."""

    def close(self) -> None:
        """Free what the device holds."""

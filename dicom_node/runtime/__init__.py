"""Backends: what runs a graph of a model package on this machine.

    Backend   a way to run graphs (ONNX Runtime on the CPU, OpenVINO, CUDA, TensorRT), at one precision; opens Sessions
    Session   one loaded graph on one device
    accept    holds a session to the golden answers; choose.py takes the fastest backend that gives them

`onnx` at single precision is the reference: always there, and the truth that the others are held to. Nothing here reads
a file of a package: graphs come as the bytes whose SHA-256 was verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

REFERENCE = "onnx"


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One network of a package, as a backend is given it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: Mapping[str, bytes]
    """ONNX by precision: "fp32" always, "fp16" where the package has it."""
    digests: Mapping[str, str]
    """SHA-256 (hex) of each graph, as the manifest lists it."""
    tolerance: Mapping[str, float]
    """By precision, of the manifest; a precision without one is not accepted."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of each input, without its batch axis (from the golden cases)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session runs, and what it may use."""

    threads: int = 1
    """CPU threads of one session: cores divided by the workers that share them."""
    device: int = 0
    """Index of the GPU."""
    plans: Path | None = None
    """The node's own cache of compiled plans (0700); None: nothing is kept."""
    max_batch: Mapping[str, int] = field(default_factory=dict)
    """Largest batch by model, where another than the default is wanted."""


class Session(Protocol):
    """One loaded graph on one device. Not thread-safe: one session a worker."""

    backend: str
    precision: str

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays in, named arrays out; batch first. Raises BackendError."""

    def close(self) -> None:
        """Free what the device holds."""


class Backend(Protocol):
    """One way to run graphs, at one precision. Making one imports nothing and asks no driver."""

    name: str
    """onnx | openvino | cuda | tensorrt | tensorrt_rtx; as SR, metrics and config.yaml say it."""
    precision: str
    """fp32 | fp16."""

    def missing(self) -> str:
        """Why it cannot be used on this machine, in words for an operator; "" = it can be tried."""

    def version(self) -> str:
        """Of the library that runs the graph, for provenance and for the key of a plan."""

    def open(self, model: Model, place: Place) -> Session:
        """Load a graph. Raises PackageError where the graph is refused, BackendError where the backend fails."""

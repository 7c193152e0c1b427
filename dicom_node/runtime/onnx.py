"""ONNX Runtime on the CPU: always there, and the truth that other backends are accepted against.

A graph is read as bytes, so a reference to external data (a path out of the package) cannot be followed, and no custom
operator library is ever loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dicom_node.errors import PackageError

MAX_GRAPH_BYTES = 2 << 30


class OnnxSession:
    """One graph. Raises PackageError when it cannot be loaded or does not have the promised inputs and outputs."""

    backend = "onnx"
    precision = "fp32"

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str], *, threads: int) -> None:
        import onnxruntime as ort

        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise PackageError(f"{path.name}: larger than {MAX_GRAPH_BYTES >> 30} GB")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle worker costs no CPU
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except _errors() as e:
            raise PackageError(f"{path.name}: ONNX Runtime refuses the graph ({type(e).__name__})") from e
        self._outputs = list(outputs)
        self._check({i.name for i in self._session.get_inputs()}, set(inputs), "inputs", path.name)
        self._check({o.name for o in self._session.get_outputs()}, set(outputs), "outputs", path.name)

    @staticmethod
    def _check(found: set[str], promised: set[str], what: str, name: str) -> None:
        if found != promised:
            raise PackageError(f"{name}: its {what} are {sorted(found)}, the manifest says {sorted(promised)}")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises PackageError when the graph does not take these shapes or dtypes."""
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except _errors() as e:
            raise PackageError(f"ONNX Runtime: {type(e).__name__}") from e
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """ONNX Runtime frees the session with its last reference."""
        del self._session


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes derive from Exception and RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
        "NoSuchFile",
    )
    return (*(getattr(state, name) for name in own if hasattr(state, name)), RuntimeError, ValueError)

"""ONNX Runtime on the CPU: always there, and the truth that other backends are accepted against.

A graph is untrusted input: it is handed over as the bytes whose SHA-256 was verified, external data is looked for in a
folder that cannot exist, and no library of custom operators is ever loaded. Runs in the worker, under its memory limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from dicom_node.errors import PackageError, WorkerError

NOWHERE = "/dev/null/external-data"
"""From bytes, ONNX Runtime resolves a reference to external data against the working directory, "../" included. Here
no folder can be, so a graph that refers to a file of this machine does not load."""


class OnnxSession:
    """One graph. Raises PackageError when it cannot be loaded or does not have the promised inputs and outputs."""

    backend = "onnx"

    def __init__(
        self,
        name: str,
        graph: bytes,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        threads: int,
        precision: str = "fp32",
    ) -> None:
        import onnxruntime as ort

        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # its words quote names of the graph; what matters is raised
        options.enable_cpu_mem_arena = False  # an arena keeps the largest study's memory for ever
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle worker costs no CPU
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except _errors() as e:
            raise PackageError(f"model {name}: ONNX Runtime refuses the graph ({type(e).__name__})") from None
        self.precision = precision
        self._outputs = list(outputs)
        self._check(name, "inputs", self._session.get_inputs(), inputs)
        self._check(name, "outputs", self._session.get_outputs(), outputs)

    @staticmethod
    def _check(name: str, what: str, nodes: Sequence[Any], promised: Sequence[str]) -> None:
        if {node.name for node in nodes} != set(promised):
            found = ", ".join(sorted(node.name for node in nodes))
            raise PackageError(f"model {name}: its {what} are {found}; the manifest says {', '.join(promised)}")
        for node in nodes:
            if node.type != "tensor(float)":
                raise PackageError(f"model {name}: {node.name} is {node.type}; single precision at the border expected")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises WorkerError when the graph does not take these names, shapes or dtypes, or memory runs out."""
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except _errors() as e:
            given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
            raise WorkerError(f"ONNX Runtime: {type(e).__name__} on {given}") from None
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """ONNX Runtime frees the session with its last reference."""
        del self._session


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes derive from Exception, not from one base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)

"""ONNX Runtime: on the CPU the reference, always there, the truth that other backends are accepted against; on a GPU
one candidate more.

A graph is untrusted input: it is handed over as the bytes whose SHA-256 was verified, external data is looked for in a
folder that cannot exist, and no library of custom operators is ever loaded. Runs in the worker, under its memory limit.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from dicom_node.errors import BackendError, NodeError, PackageError
from dicom_node.runtime import REFERENCE, Model, Place, Session

NOWHERE = "/dev/null/external-data"
"""From bytes, ONNX Runtime resolves a reference to external data against the working directory, "../" included. Here
no folder can be, so a graph that refers to a file of this machine does not load."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxSession:
    """One graph on the CPU. Raises PackageError when it does not load or lacks the promised inputs and outputs."""

    backend = REFERENCE
    _refusal: ClassVar[type[NodeError]] = PackageError
    """What a graph that does not load is: of the reference, the package's fault."""

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
            self._session = ort.InferenceSession(graph, options, providers=self._providers())
        except _errors() as e:
            raise self._refusal(f"model {name}: ONNX Runtime refuses the graph ({type(e).__name__})") from None
        self.precision = precision
        self._outputs = list(outputs)
        self._check(name, "inputs", self._session.get_inputs(), inputs)
        self._check(name, "outputs", self._session.get_outputs(), outputs)

    def _providers(self) -> list[Any]:
        return [CPU]

    @staticmethod
    def _check(name: str, what: str, nodes: Sequence[Any], promised: Sequence[str]) -> None:
        if {node.name for node in nodes} != set(promised):
            found = ", ".join(sorted(node.name for node in nodes))
            raise PackageError(f"model {name}: its {what} are {found}; the manifest says {', '.join(promised)}")
        for node in nodes:
            if node.type != "tensor(float)":
                raise PackageError(f"model {name}: {node.name} is {node.type}; single precision at the border expected")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises BackendError when the graph does not take these names, shapes or dtypes, or memory runs out."""
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except _errors() as e:
            given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
            raise BackendError(f"ONNX Runtime: {type(e).__name__} on {given}") from None
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """ONNX Runtime frees the session with its last reference."""
        del self._session


class CudaSession(OnnxSession):
    """The same graph on a GPU. Not executed by us: no machine of ours has both a GPU and onnxruntime-gpu.

    Arrays are copied by `run` itself: an engine wants its answers in the host's memory, so binding inputs and outputs
    to device memory would save no copy. Convolution algorithms are chosen by cuDNN's heuristics, not by timing each
    new batch size in the middle of a study.
    """

    backend = "cuda"
    _refusal = BackendError  # the reference has loaded a graph of this package: here a driver or memory is to blame

    def __init__(self, model: Model, precision: str, place: Place) -> None:
        import onnxruntime as ort

        self._device = place.device
        try:
            ort.preload_dlls()  # CUDA and cuDNN as pip installs them lie where no loader looks
        except (AttributeError, OSError, RuntimeError) as e:
            raise BackendError(f"ONNX Runtime cannot load CUDA's libraries ({type(e).__name__})") from None
        graph = model.graphs[precision]
        super().__init__(model.name, graph, model.inputs, model.outputs, threads=place.threads, precision=precision)
        # ONNX Runtime goes on without a word on the CPU when the provider does not load (a wrong CUDA or cuDNN). The
        # option session.disable_cpu_ep_fallback would say so, but also refuses graphs whose few nodes on shapes it puts
        # on the CPU on purpose.
        if self._session.get_providers()[:1] != [CUDA]:
            raise BackendError("ONNX Runtime does not use the GPU: its CUDA provider did not load (CUDA or cuDNN?)")
        self._session.disable_fallback()  # or a failing run would be repeated on the CPU, under the GPU's name

    def _providers(self) -> list[Any]:
        options = {
            "device_id": str(self._device),
            "use_tf32": "0",  # its ten bits of mantissa would pass for single precision
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(CUDA, options), CPU]


class OnnxBackend:
    """ONNX Runtime on the CPU. At fp32 it is the reference; at fp16 it shows without a GPU what an fp16 graph loses."""

    name = REFERENCE

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def missing(self) -> str:
        """Never: the node depends on it."""
        return ""

    def version(self) -> str:
        """Of ONNX Runtime."""
        return _version()

    def open(self, model: Model, place: Place) -> Session:
        """Raises PackageError."""
        graph = model.graphs[self.precision]
        return OnnxSession(
            model.name, graph, model.inputs, model.outputs, threads=place.threads, precision=self.precision
        )


class CudaBackend:
    """ONNX Runtime's CUDA execution provider. Not executed by us."""

    name = "cuda"

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def missing(self) -> str:
        """Looks for the provider's library and for a device; loads neither ONNX Runtime nor CUDA's libraries."""
        spec = importlib.util.find_spec("onnxruntime")
        folder = Path(spec.origin).parent / "capi" if spec is not None and spec.origin else None
        if folder is None or not (folder / "libonnxruntime_providers_cuda.so").is_file():
            return "onnxruntime-gpu is not installed (it takes the place of onnxruntime)"
        return no_device()

    def version(self) -> str:
        """Of ONNX Runtime."""
        return _version()

    def open(self, model: Model, place: Place) -> Session:
        """Raises PackageError, and BackendError where the provider does not come up."""
        return CudaSession(model, self.precision, place)


def no_device() -> str:
    """Why no CUDA device can be used; "" = there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA device: no NVIDIA driver (libcuda.so.1)"
    status, count = driver.cuInit(0), ctypes.c_int(0)
    if status or (status := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"no CUDA device: the driver answers {status}"
    return "" if count.value else "no CUDA device: the driver knows none"


def _version() -> str:
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes derive from Exception, not from one base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)

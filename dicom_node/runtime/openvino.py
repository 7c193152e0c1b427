"""OpenVINO on the CPU, at single precision: on most of our networks the fastest backend of a machine without a GPU.

Nothing leaves the machine: `import openvino` alone would send an event to its maker and write a client identifier into
the home folder, so the module that does it is kept from loading. A graph is untrusted input, and OpenVINO would follow
a reference to external data to any file: so it comes as the bytes whose SHA-256 was verified, `graph.check` sees it
first, and no other reader than that of ONNX is ever asked. Runs in the worker.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place, Session
from dicom_node.runtime.graph import check

_TALKS = "openvino.tools.ovc"
"""The converter of other formats. Importing it reports the import to a web service; the package goes on without it."""

TWICE_BYTES = 64 << 20
"""A larger graph is compiled once: its weights would lie in memory twice, and its layers have more to do than to look
up shapes."""


class OpenVinoSession:
    """A graph, compiled for any batch and for a batch of one."""

    backend = "openvino"
    precision = "fp32"

    def __init__(self, model: Model, place: Place) -> None:
        data = model.graphs[self.precision]
        check(data, model.inputs, model.outputs)
        ov = _openvino()
        try:
            reader = ov.frontend.FrontEndManager().load_by_framework("onnx")
            graph = reader.convert(reader.load(io.BytesIO(data)))
        except _errors() as e:
            raise PackageError(f"model {model.name}: OpenVINO refuses the graph ({type(e).__name__})") from None
        _check(model.name, "inputs", graph.inputs, model.inputs)
        _check(model.name, "outputs", graph.outputs, model.outputs)
        self._shapes, self._outputs = dict(model.shapes), model.outputs
        try:
            # Open shapes cost a search for each layer of each run, which a network of many small layers feels. So a
            # batch of one, what most studies are, has a compiled graph of its own, where that is not too large.
            self._any = self._one = _request(ov, graph, place.threads)
            if len(data) <= TWICE_BYTES:
                graph.reshape({name: [1, *shape] for name, shape in self._shapes.items()})
                self._one = _request(ov, graph, place.threads)
        except _errors() as e:
            raise BackendError(f"model {model.name}: OpenVINO cannot compile the graph ({type(e).__name__})") from None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises BackendError."""
        given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
        # OpenVINO converts another type in silence, fits some wrong shapes into the last one given, and answers a
        # missing input with the last one itself: another patient's.
        if inputs.keys() != self._shapes.keys() or any(
            array.dtype != np.float32 or array.shape[1:] != self._shapes[name] for name, array in inputs.items()
        ):
            raise BackendError(f"OpenVINO: these are not the inputs of the graph: {given or 'nothing'}")
        try:
            # Both ways copied: what the request holds is overwritten by the next run.
            request = self._one if all(len(array) == 1 for array in inputs.values()) else self._any
            request.infer(dict(inputs), share_inputs=False, share_outputs=False)
            return {name: np.array(request.get_tensor(name).data, copy=True) for name in self._outputs}
        except _errors() as e:
            raise BackendError(f"OpenVINO: {type(e).__name__} on {given}") from None

    def close(self) -> None:
        """OpenVINO frees a request and a compiled graph with their last reference."""
        del self._one, self._any


class OpenVinoBackend:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    precision = "fp32"

    def missing(self) -> str:
        """Looks, loads nothing."""
        if importlib.util.find_spec("openvino") is None:
            return 'openvino is not installed: pip install "dicom-node[openvino]"'
        return ""

    def version(self) -> str:
        """Of the package openvino."""
        try:
            return importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def open(self, model: Model, place: Place) -> Session:
        """Raises PackageError where the graph is refused, BackendError where OpenVINO fails."""
        return OpenVinoSession(model, place)


def _openvino() -> ModuleType:
    """The package, loaded without the part that reports to its maker. Raises BackendError."""
    # None makes its import fail, and openvino allows for that.
    sys.modules.setdefault(_TALKS, None)  # type: ignore[arg-type]
    try:
        import openvino
    except (ImportError, OSError, RuntimeError, AttributeError) as e:  # a broken install shows in several ways
        raise BackendError(f"openvino cannot be loaded ({type(e).__name__})") from None
    finally:
        if sys.modules.get(_TALKS) is None:
            sys.modules.pop(_TALKS, None)
    return openvino


def _request(ov: ModuleType, graph: Any, threads: int) -> Any:
    return ov.Core().compile_model(graph, "CPU", _options(threads)).create_infer_request()


def _options(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 wherever the processor has it, and no word about it
        "EXECUTION_MODE_HINT": "ACCURACY",
        "ENABLE_CPU_PINNING": False,  # several workers would be pinned to the same cores
        "PERF_COUNT": False,
        "CACHE_DIR": "",
    }


def _check(name: str, what: str, ports: Sequence[Any], promised: Sequence[str]) -> None:
    found = [sorted(port.get_names()) for port in ports]
    if len(found) != len(promised) or not all(any(name in names for names in found) for name in promised):
        said = ", ".join("/".join(names) for names in found)
        raise PackageError(f"model {name}: its {what} are {said}; the manifest says {', '.join(promised)}")
    for port in ports:
        kind = port.get_element_type().get_type_name()
        if kind != "f32":
            raise PackageError(
                f"model {name}: {port.get_any_name()} is {kind}; single precision at the border expected"
            )


def _errors() -> tuple[type[Exception], ...]:
    from openvino.exceptions import OVError

    return (OVError, RuntimeError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)

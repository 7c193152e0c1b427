"""TensorRT without a GPU: a library that parses, builds, loads and executes networks of its own small kind.

`Library(version)` has the classes of `tensorrt` 10.16 or 11, or of `tensorrt_rtx`, cut down to the members which
`tensorrt_api.json` lists for it, so code that uses another name fails as it would on the real one; the tests hold the
parameters to the file too. `Site` is a machine with one of them and a GPU. A graph is JSON (`graph_bytes`); output j of
row n is (j + 1) · the sum of that row.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import math
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_api
from fake_cuda import FakeCuda

from dicom_node.runtime import Model, Place
from dicom_node.runtime.tensorrt import TensorRtBackend

VERSIONS = ("tensorrt 10.16.1.11", "tensorrt 11.4.0.106", "tensorrt_rtx 1.7.1.116")


def graph_bytes(batch: int = -1, **more: Any) -> bytes:
    """x (n, 1, 4, 4) to logits (n, 2) and features (n, 3, 2, 2)."""
    inputs, outputs = {"x": [batch, 1, 4, 4]}, {"logits": [batch, 2], "features": [batch, 3, 2, 2]}
    return json.dumps({"inputs": inputs, "outputs": outputs, "dtype": "FLOAT", "errors": []} | more).encode()


def answers(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What a plan of `graph_bytes` gives."""
    rows = x.sum(axis=(1, 2, 3), dtype=np.float32)
    logits = np.repeat(rows[:, None], 2, axis=1)
    return {"logits": logits, "features": np.tile(2 * rows[:, None, None, None], (1, 3, 2, 2))}


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    """Subclassed by the node."""

    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    """Subclassed by the node."""


class ITensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, shape: list[int], dtype: Any) -> None:
        self.name, self.shape, self.dtype = name, tuple(shape), dtype


class ParserError:
    __slots__ = ("_of",)

    def __init__(self, of: dict[str, Any]) -> None:
        self._of = of

    def node(self) -> int:
        return int(self._of["node"])

    def node_name(self) -> str:
        return str(self._of["name"])

    def node_operator(self) -> str:
        return str(self._of["operator"])

    def desc(self) -> str:
        return str(self._of["desc"])


class OnnxParser:
    __slots__ = ("__weakref__", "_errors", "_library", "_network")

    def __init__(self, library: Library, network: Any, logger: ILogger) -> None:
        self._library, self._network, self._errors = library, network, list[ParserError]()
        library.parser = weakref.ref(self)

    def parse(self, model: bytes, path: str | None = None) -> bool:
        assert path is None, "a path would let the parser look for other files"
        told = self._library.network or json.loads(model)
        self._errors = [ParserError(error) for error in told["errors"]]
        dtype = self._library.DataType[told["dtype"]]
        self._network._told = told
        self._network._inputs = [ITensor(name, shape, dtype) for name, shape in told["inputs"].items()]
        self._network._outputs = [ITensor(name, shape, dtype) for name, shape in told["outputs"].items()]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class INetworkDefinition:
    __slots__ = ("_inputs", "_outputs", "_told")

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:  # noqa: A002
        assert len(min) == len(opt) == len(max) and -1 not in min + opt + max
        self._shapes[input] = (min, opt, max)


class ITimingCache:
    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data + b"+"


class IBuilderConfig:
    __slots__ = ("_library", "builder_optimization_level", "num_compute_capabilities", "progress_monitor")

    def __init__(self, library: Library) -> None:
        self._library = library
        library.built = {"flags": {"TF32"}, "targets": []}

    def clear_flag(self, flag: Any) -> None:
        self._library.built["flags"] -= {flag.name}

    def set_flag(self, flag: Any) -> None:
        self._library.built["flags"] |= {flag.name}

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._library.built[pool.name] = pool_size

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self._library.built["targets"].append(compute_capability.name)
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return self._library._made("ITimingCache", serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if b"other machine" in cache._data:
            return False
        self._library.built["timing"] = cache._data
        return True

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._library.built["profile"] = profile._shapes
        return 0


class Builder:
    __slots__ = ("_library", "_logger")

    def __init__(self, library: Library, logger: ILogger) -> None:
        self._library, self._logger = library, logger

    def create_network(self, flags: int = 0) -> Any:
        self._library.creation_flags = flags
        return self._library._made("INetworkDefinition")

    def create_builder_config(self) -> Any:
        return self._library._made("IBuilderConfig", self._library)

    def create_optimization_profile(self) -> Any:
        return self._library._made("IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        library = self._library
        library.builds += 1
        assert library.parser() is not None, "the weights were the parser's"
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, library.steps)
        for step in range(library.steps):
            time.sleep(library.step_seconds)
            if not monitor.step_complete("Building engine", step):
                self._logger.log(Severity.ERROR, "Error Code 7: BuildCanceled")
                return None
        monitor.phase_finish("Building engine")
        profile = library.built.get("profile", {})
        if library.refuses_open_batch and any(least != most for least, _, most in profile.values()):
            self._logger.log(Severity.ERROR, "Error Code 1: Myelin (fault In f at /_src/secret/dir/file.cpp:12)")
            return None
        plan = {"version": library.__version__, "profile": profile, "network": network._told, "serial": library.builds}
        return json.dumps(plan).encode()


class Runtime:
    __slots__ = ("_library", "_logger", "engine_host_code_allowed")

    def __init__(self, library: Library, logger: ILogger) -> None:
        self._library, self._logger = library, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        library = self._library
        assert not self.engine_host_code_allowed
        library.loads.append(serialized_engine)
        if library.load_error:
            self._logger.log(Severity.ERROR, library.load_error)
            return None
        plan = json.loads(serialized_engine)
        if plan["version"] != library.__version__ or plan["serial"] in library.unloadable:
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        library.alive.append("engine")
        return library._made("ICudaEngine", library, self._logger, plan)


class ICudaEngine:
    __slots__ = ("_library", "_logger", "_plan", "_tensors")

    def __init__(self, library: Library, logger: ILogger, plan: dict[str, Any]) -> None:
        self._library, self._logger, self._plan = library, logger, plan
        network = plan["network"]
        self._tensors = network["inputs"] | network["outputs"] | network.get("plan_tensors", {})

    def __del__(self) -> None:
        self._library.alive.remove("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return 123_000_000

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._library.TensorIOMode["INPUT" if name in self._plan["network"]["inputs"] else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._library.DataType[self._plan["network"].get("plan_dtype", "FLOAT")]

    def get_tensor_location(self, name: str) -> Any:
        return self._library.TensorLocation["DEVICE"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [tuple(shape) for shape in self._plan["profile"][name]]

    def create_runtime_config(self) -> Any:
        return self._library._made("IRuntimeConfig")

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        if self._library.context_error:
            self._logger.log(Severity.ERROR, self._library.context_error)
            return None
        self._library.runtime_config = runtime_config
        self._library.alive.append("context")
        return self._library._made("IExecutionContext", self._library, self)


class IRuntimeConfig:
    __slots__ = ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy")


class IExecutionContext:
    __slots__ = ("_addresses", "_engine", "_library", "_shapes")

    def __init__(self, library: Library, engine: Any) -> None:
        self._library, self._engine = library, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def __del__(self) -> None:
        self._library.alive.remove("context")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        self._library.cuda.calls.append(f"shape {name} {shape[0]}")
        if -1 in self._engine.get_tensor_shape(name):
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            if not all(a <= found <= b for a, found, b in zip(least, shape, most, strict=True)):
                return False
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._plan["network"]["inputs"] if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if d == -1 and i == 0 else d for i, d in enumerate(self._engine.get_tensor_shape(name)))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int and memory in self._library.cuda.device, "not memory of the device"
        self._library.cuda.calls.append(f"address {name}")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in self._library.cuda.streams
        return bool(self._library.capturable)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert type(stream_handle) is int and stream_handle != 0, "the default stream"
        library, network = self._library, self._engine._plan["network"]
        assert self._addresses.keys() == network["inputs"].keys() | network["outputs"].keys()
        stream = library.cuda.streams[stream_handle]
        library.cuda.calls.append("execute")
        if stream.capturing is not None and not library.capturable:
            stream.broken = True
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        stream.put(lambda: self._compute(shapes, addresses))
        return not library.enqueue_fails

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        network = self._engine._plan["network"]
        rows = sum(_memory(addresses[name], shapes[name]).reshape(shapes[name][0], -1).sum(1) for name in shapes)
        batch = next(iter(shapes.values()))[0]
        if self._library.computes:
            given = {name: _memory(addresses[name], shapes[name]) for name in shapes}
            for name, array in self._library.computes(given).items():
                _memory(addresses[name], array.shape)[...] = array
            return
        for index, (name, shape) in enumerate(network["outputs"].items()):
            out = _memory(addresses[name], (batch, *shape[1:]))
            out[...] = (index + 1) * np.reshape(rows, (batch, *[1] * (len(shape) - 1)))


def _memory(address: int, shape: tuple[int, ...]) -> Any:
    return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)


CLASSES = (
    Builder, IBuilderConfig, INetworkDefinition, IOptimizationProfile, OnnxParser, ParserError, Runtime, ICudaEngine,
    IExecutionContext, ITimingCache, ITensor, IRuntimeConfig,
)  # fmt: skip


def _cut(cls: type, known: set[str]) -> type:
    """The class with the members that the real one has, and no others can be set."""
    slots = tuple(slot for slot in vars(cls)["__slots__"] if slot[0] == "_" or slot in known)
    body = {k: v for k, v in vars(cls).items() if k not in vars(cls)["__slots__"] and (k[0] == "_" or k in known)}
    return type(cls.__name__, (), body | {"__slots__": slots})


class Library(SimpleNamespace):
    """Stands in for the module: `TensorRtBackend(…, find_module=lambda _: library)`."""

    def __init__(self, name: str, cuda: FakeCuda) -> None:
        api = tensorrt_api.stored()[name]
        super().__init__(
            __version__=name.split()[1], cuda=cuda, ILogger=ILogger, IProgressMonitor=IProgressMonitor,
            builds=0, loads=[], parser=None, alive=[], built={}, creation_flags=None, runtime_config=None,
            steps=3, step_seconds=0.0, refuses_open_batch=False, unloadable=set(), load_error="", context_error="",
            capturable=True, enqueue_fails=False,
            network=None, computes=None,
        )  # fmt: skip
        for enumeration in tensorrt_api.ENUMS:
            if enumeration in api:
                setattr(self, enumeration, enum.IntEnum(enumeration, list(api[enumeration]), start=0))
        self._classes = {cls.__name__: _cut(cls, set(api[cls.__name__])) for cls in CLASSES if cls.__name__ in api}
        self.Builder = lambda logger: self._made("Builder", self, logger)
        self.OnnxParser = lambda network, logger: self._made("OnnxParser", self, network, logger)
        self.Runtime = lambda logger: self._made("Runtime", self, logger)

    def _made(self, name: str, *given: Any) -> Any:
        return self._classes[name](*given)

    def classes(self) -> Iterator[tuple[str, type]]:
        """Those that this library has."""
        return iter(self._classes.items())


def model_of(graph: bytes = graph_bytes(), **changes: Any) -> Model:
    graphs = {"fp32": graph, "fp16": graph}
    digests = {name: hashlib.sha256(graph).hexdigest() for name in graphs}
    given: dict[str, Any] = {
        "name": "classifier", "inputs": ("x",), "outputs": ("logits", "features"), "graphs": graphs,
        "digests": digests, "tolerance": {"fp32": 1e-3}, "shapes": {"x": (1, 4, 4)},
    }  # fmt: skip
    return Model(**(given | changes))


class Site:
    """A machine with one GPU and one of the libraries."""

    def __init__(self, version: str = VERSIONS[2], **gpu: Any) -> None:
        self.cuda = FakeCuda(**gpu)
        self.library = Library(version, self.cuda)
        self.name = version.split()[0]

    def backend(self, precision: str = "fp32", **how: Any) -> TensorRtBackend:
        return TensorRtBackend(
            self.name, precision, find_module=lambda _: self.library, find_cuda=lambda: self.cuda, **how
        )

    def open(self, model: Model | None = None, place: Place | None = None, **how: Any) -> Any:
        return self.backend(**how).open(model or model_of(), place or Place())


def images(count: int) -> Any:
    return np.random.default_rng(count).normal(size=(count, 1, 4, 4)).astype(np.float32)

"""A plan in execution: one context, one stream, page-locked buffers, one captured graph for each batch.

Everything is allocated, run once and captured when the session is made, so that what does not fit or does not run
fails there and the first study takes as long as the tenth. Whatever goes wrong later is a BackendError, and the session
is not used again: after a fault in a kernel the device's context answers nothing any more.

A batch is executed as one of the few of `Batches.steps`, padded where that is cheaper than two launches; larger ones
are split. `close` frees in the reverse of the order in which things were made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model
from dicom_node.runtime.cuda import Gpu, view
from dicom_node.runtime.tensorrt_build import LIBRARY_ERRORS, Batches, kind_of, make_logger


class PlanRefusedError(BackendError):
    """The library does not take this plan: of another version or GPU, or damaged. Build it again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """One input or output: where it lies on both sides."""

    name: str
    shape: tuple[int, ...]
    """Without the batch."""
    device: int
    address: int
    host: NDArray[np.float32]
    """The page-locked memory at `address`, largest batch."""

    def size(self, batch: int) -> int:
        return batch * 4 * math.prod(self.shape)


class TensorRtSession:
    """One plan on one GPU. Not thread-safe; may be used from another thread than the one that made it."""

    _context: Any
    _stream: Any

    def __init__(self, trt: Any, gpu: Gpu, model: Model, plan: bytes, *, backend: str, precision: str) -> None:
        """Raises PlanRefusedError, PackageError where the plan is not the manifest's, BackendError for the rest."""
        self.backend, self.precision = backend, precision
        self.notes: tuple[str, ...] = ()
        """What an operator should know of how it came about."""
        self._trt, self._gpu, self._model = trt, gpu, model
        self._logger = make_logger(trt)
        self._graphs: dict[int, Any] = {}
        self._broken = ""
        self._made = contextlib.ExitStack()
        try:
            gpu.use()
            self._load(plan)
        except LIBRARY_ERRORS as e:
            self.close()
            raise BackendError(f"{self._who()} failed ({kind_of(e)}): {self._logger.said()}") from None
        except BaseException:
            self.close()
            raise

    def _who(self) -> str:
        return f"model {self._model.name}: {self.backend} {self.precision}"

    # -- once

    def _load(self, plan: bytes) -> None:
        gpu = self._gpu
        self._stream = gpu.make_stream()
        self._freed(gpu.end_stream, self._stream)
        runtime = self._trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = False  # its default; said, because it keeps a plan from running on the host
        self._hold("_runtime", runtime)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refused(len(plan))
        self._hold("_engine", engine)
        self.batches = self._check(engine)
        context = self._make_context(engine)
        if context is None:
            wanted = f"{int(engine.device_memory_size_v2) / 1e6:,.1f} MB"
            raise BackendError(
                f"{self._who()} needs {wanted} of GPU memory to run, {gpu.free_memory()} are free: "
                f"{self._logger.said()}"
            )
        self._hold("_context", context)
        self._inputs, self._outputs = self._allocate(context)
        for batch in reversed(self.batches.steps()):  # the largest first: what does not fit fails at once
            self._warm(batch)

    def _refused(self, size: int) -> BackendError:
        said = self._logger.said()
        if "outofmemory" in said.lower().replace(" ", ""):
            free = self._gpu.free_memory()
            return BackendError(f"{self._who()} cannot load its plan of {size / 1e6:,.1f} MB, {free} are free: {said}")
        return PlanRefusedError(f"{self._who()} does not take the plan: {said}")

    def _make_context(self, engine: Any) -> Any:
        """TensorRT-RTX compiles kernels when a shape is first met, by default in the background, so that the second
        study would be computed by other kernels than the accepted first one: here it compiles before it answers."""
        strategy = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategy is None:
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # the session captures its own
        return engine.create_execution_context(config)

    def _check(self, engine: Any) -> Batches:
        """Names, directions, dtypes and shapes of the plan against the manifest; its batches."""
        trt, model = self._trt, self._model
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        for mode, promised in ((trt.TensorIOMode.INPUT, model.inputs), (trt.TensorIOMode.OUTPUT, model.outputs)):
            found = sorted(name for name in names if modes[name] == mode)
            if found != sorted(promised):
                raise PackageError(f"model {model.name}: its plan has {', '.join(found)}, not {', '.join(promised)}")
        batches = set()
        for name in names:
            if engine.get_tensor_dtype(name) != trt.DataType.FLOAT:
                raise PackageError(f"model {model.name}: {name} of its plan is not of single precision")
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise PackageError(f"model {model.name}: {name} of its plan is not in GPU memory")
            if name in model.inputs:
                batches.add(self._batches(engine, name))
        if len(batches) != 1:
            raise PackageError(f"model {model.name}: the inputs of its plan do not have one batch")
        return batches.pop()

    def _batches(self, engine: Any, name: str) -> Batches:
        shape = tuple(engine.get_tensor_shape(name))
        whole = [shape] * 3
        if -1 in shape:
            whole = [tuple(found) for found in engine.get_tensor_profile_shape(name, 0)]
        if any(found[1:] != self._model.shapes[name] for found in whole):
            raise PackageError(f"model {self._model.name}: {name} of its plan is {shape}, not the golden cases' shape")
        return Batches(*(found[0] for found in whole))

    def _allocate(self, context: Any) -> tuple[tuple[_Tensor, ...], tuple[_Tensor, ...]]:
        model, most = self._model, self.batches.most
        self._set_shapes(context, most)
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in model.outputs}
        for name, shape in outputs.items():
            if not shape or shape[0] != most or -1 in shape:
                raise PackageError(f"model {model.name}: {name} is {shape} for a batch of {most}")
        return (
            tuple(self._tensor(name, model.shapes[name], most) for name in model.inputs),
            tuple(self._tensor(name, outputs[name][1:], most) for name in model.outputs),
        )

    def _tensor(self, name: str, shape: tuple[int, ...], most: int) -> _Tensor:
        gpu, what = self._gpu, f"{self._who()}: {name} for a batch of {most}"
        size = most * 4 * math.prod(shape)
        address = gpu.pin(size, what)
        self._freed(gpu.unpin, address)
        device = gpu.allocate(size, what)
        self._freed(gpu.free, device)
        host = view(address, (most, *shape))
        host[:] = 0
        return _Tensor(name, shape, device, address, host)

    def _set_shapes(self, context: Any, batch: int) -> None:
        for name in self._model.inputs:
            if not context.set_input_shape(name, (batch, *self._model.shapes[name])):
                raise BackendError(f"{self._who()} does not take a batch of {batch}: {self._logger.said()}")
        if unknown := context.infer_shapes():
            raise BackendError(f"{self._who()}: shapes of {', '.join(unknown)} depend on more than the batch")

    def _warm(self, batch: int) -> None:
        """One run, which compiles and sets up what a capture may not; then the capture, where the plan allows one."""
        gpu, stream = self._gpu, self._stream
        self._prepare(batch)
        self._enqueue(batch)
        gpu.wait(stream)
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(stream)):
            self.notes += (f"{self._who()}: batch {batch} is run without a CUDA graph",)
            return
        try:
            graph = gpu.capture(stream, lambda: self._enqueue(batch))
        except BackendError as e:
            self.notes += (f"{self._who()}: batch {batch} is run without a CUDA graph ({e})",)
            return
        self._freed(gpu.end_graph, graph)
        self._graphs[batch] = graph

    # -- each time

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises BackendError; of what went wrong on the GPU every later call tells again."""
        count = self._count(inputs)
        if self._broken:
            raise BackendError(self._broken)
        answers = {t.name: np.empty((count, *t.shape), np.float32) for t in self._outputs}
        try:
            self._gpu.use()
            for start, rows, batch in split(count, self.batches.steps()):
                for tensor in self._inputs:
                    tensor.host[:rows] = inputs[tensor.name][start : start + rows]
                    tensor.host[rows:batch] = 0
                self._execute(batch)
                for tensor in self._outputs:
                    answers[tensor.name][start : start + rows] = tensor.host[:rows]
        except LIBRARY_ERRORS as e:
            self._broken = f"{self._who()} failed ({kind_of(e)}): {self._logger.said()}"
            raise BackendError(self._broken) from None
        except BackendError as e:
            self._broken = f"{self._who()} on a batch of {count}: {e}"
            raise BackendError(self._broken) from None
        return answers

    def _count(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        given = {name: getattr(array, "shape", ()) for name, array in inputs.items()}
        counts = {shape[0] for shape in given.values() if shape}
        fits = inputs.keys() == self._model.shapes.keys() and len(counts) == 1 and 0 not in counts
        if not fits or any(
            shape[1:] != self._model.shapes[name] or inputs[name].dtype != np.float32 for name, shape in given.items()
        ):
            said = ", ".join(f"{name} {getattr(a, 'dtype', '')} {given[name]}" for name, a in inputs.items())
            raise BackendError(f"{self._who()} was given {said or 'nothing'}")
        count = int(counts.pop())
        if count % self.batches.least:
            raise BackendError(f"{self._who()} takes batches of {self.batches.least}, and was given {count}")
        return count

    def _execute(self, batch: int) -> None:
        graph = self._graphs.get(batch)
        if graph is not None:
            self._gpu.launch(graph, self._stream)
        else:
            self._prepare(batch)
            self._enqueue(batch)
        self._gpu.wait(self._stream)

    def _prepare(self, batch: int) -> None:
        self._set_shapes(self._context, batch)
        for tensor in (*self._inputs, *self._outputs):
            if not self._context.set_tensor_address(tensor.name, tensor.device):
                raise BackendError(f"{self._who()} refuses the memory for {tensor.name}: {self._logger.said()}")

    def _enqueue(self, batch: int) -> None:
        gpu, stream = self._gpu, self._stream
        for tensor in self._inputs:
            gpu.copy_in(tensor.device, tensor.address, tensor.size(batch), stream)
        if not self._context.execute_async_v3(int(stream)):
            raise BackendError(f"{self._who()} cannot be started: {self._logger.said()}")
        for tensor in self._outputs:
            gpu.copy_out(tensor.address, tensor.device, tensor.size(batch), stream)

    # -- the end

    def close(self) -> None:
        """Free what the device holds. May be called twice; what cannot be freed ends with the process."""
        self._broken = self._broken or f"{self._who()} is closed"
        self._graphs.clear()
        with contextlib.suppress(BackendError):
            self._gpu.use()
        with contextlib.suppress(BackendError):
            if "_stream" in vars(self):
                self._gpu.wait(self._stream)
                del self._stream
        self._made.close()

    def _freed(self, free: Any, what: Any) -> None:
        def quietly() -> None:
            with contextlib.suppress(BackendError):
                free(what)

        self._made.callback(quietly)

    def _hold(self, name: str, value: Any) -> None:
        """An object of the library lives as long as the attribute: context before engine before runtime."""
        setattr(self, name, value)
        self._made.callback(vars(self).pop, name)


def split(count: int, steps: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, rows, batch to execute): as few launches as cost less than twice the rows."""
    start = 0
    while start < count:
        left = count - start
        fitting = max((step for step in steps if step <= left), default=min(steps))
        above = min((step for step in steps if step >= left), default=fitting)
        batch = above if 2 * left > above else fitting
        rows = min(left, batch)
        yield start, rows, batch
        start += rows

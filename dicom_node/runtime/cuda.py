"""A GPU as the node uses it: page-locked and device memory, a stream of its own, captured graphs.

The only file that imports `cuda.bindings`. Knows nothing of networks; owns no memory: who allocates frees. Every call
is checked; what CUDA refuses is a BackendError in words for an operator: sizes, and CUDA's own name for the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import BackendError

DRIVER_VERSION = Path("/sys/module/nvidia/version")
"""Of the kernel module, as in 580.65.06; CUDA itself tells only which CUDA the driver knows."""
_NO_DEVICE, _INSUFFICIENT_DRIVER, _OUT_OF_MEMORY = 100, 35, 2


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, as far as a compiled plan depends on it."""

    index: int
    name: str
    sm: tuple[int, int]
    """Compute capability."""
    multiprocessors: int
    """A slice of a GPU (MIG) has the name of the whole one in some drivers, and fewer of these."""
    driver: str


def find_library() -> Any:
    """`cuda.bindings.runtime`. Raises ImportError."""
    from cuda.bindings import runtime

    return runtime


def find_devices(library: Any) -> tuple[Device, ...]:
    """At least one. Raises BackendError that says what is missing."""
    error, count = _called(library, "cudaGetDeviceCount")
    if int(error) == _INSUFFICIENT_DRIVER:
        known, wanted = (_called(library, f"cuda{side}GetVersion")[1] for side in ("Driver", "Runtime"))
        if not known:
            raise BackendError("no NVIDIA driver is loaded on this machine")
        raise BackendError(f"the NVIDIA driver is too old: it knows CUDA {_cuda(known)}, {_cuda(wanted)} is installed")
    if int(error) == _NO_DEVICE or (not int(error) and not count):
        raise BackendError("the NVIDIA driver finds no GPU on this machine")
    _check(error, "looking for GPUs")
    return tuple(_device(library, index) for index in range(count))


def _device(library: Any, index: int) -> Device:
    found = _done(library, f"asking GPU {index} for its properties", "cudaGetDeviceProperties", index)
    driver = f"CUDA {_cuda(_done(library, 'asking the driver for its version', 'cudaDriverGetVersion'))}"
    with contextlib.suppress(OSError, UnicodeError):  # a container may hide it
        driver = f"{DRIVER_VERSION.read_text(encoding='ascii').strip()}, {driver}"
    name = found.name.decode("ascii", "replace").strip("\0 ")
    return Device(index, name, (int(found.major), int(found.minor)), int(found.multiProcessorCount), driver)


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class Gpu:
    """One device. A thread that did not make it calls `use` first."""

    def __init__(self, library: Any, device: Device) -> None:
        self._library, self.device = library, device
        self.use()

    def use(self) -> None:
        """Make it the current device of this thread."""
        self._do("choosing the GPU", "cudaSetDevice", self.device.index)

    def free_memory(self) -> str:
        """For a message; never raises."""
        error, *found = _called(self._library, "cudaMemGetInfo")
        return "an unknown amount" if int(error) else f"{_size(found[0])} of {_size(found[1])}"

    # -- memory

    def allocate(self, size: int, what: str) -> int:
        """Device memory; its address."""
        return self._memory("cudaMalloc", size, f"{what}: {_size(size)} of GPU memory")

    def free(self, address: int) -> None:
        """Of `allocate`."""
        self._do("freeing GPU memory", "cudaFree", address)

    def pin(self, size: int, what: str) -> int:
        """Page-locked memory of the host: the device copies it without the processor; its address."""
        return self._memory("cudaMallocHost", size, f"{what}: {_size(size)} of page-locked memory")

    def unpin(self, address: int) -> None:
        """Of `pin`."""
        self._do("freeing page-locked memory", "cudaFreeHost", address)

    def _memory(self, function: str, size: int, wanted: str) -> int:
        error, address = _called(self._library, function, size)
        if int(error) == _OUT_OF_MEMORY:
            raise BackendError(f"out of memory: {wanted} wanted, {self.free_memory()} of the GPU are free")
        _check(error, wanted)
        return int(address)

    # -- work

    def make_stream(self) -> Any:
        """One that does not wait for the default stream, nor the default stream for it."""
        return self._do("making a stream", "cudaStreamCreateWithFlags", self._library.cudaStreamNonBlocking)

    def end_stream(self, stream: Any) -> None:
        """Of `make_stream`."""
        self._do("ending a stream", "cudaStreamDestroy", stream)

    def copy_in(self, device: int, host: int, size: int, stream: Any) -> None:
        """Host to device, in the stream's order; the host's memory must be page-locked and stay as it is."""
        kind = self._library.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("copying to the GPU", "cudaMemcpyAsync", device, host, size, kind, stream)

    def copy_out(self, host: int, device: int, size: int, stream: Any) -> None:
        """Device to host, likewise; there after `wait`."""
        kind = self._library.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("copying from the GPU", "cudaMemcpyAsync", host, device, size, kind, stream)

    def wait(self, stream: Any) -> None:
        """Until everything in the stream is done. What went wrong in a kernel is raised here."""
        self._do("running on the GPU", "cudaStreamSynchronize", stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """What `work` puts into the stream, as one thing to launch; nothing of it is executed now.

        Other threads may allocate meanwhile: engines load in parallel.
        """
        mode = self._library.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("beginning a graph", "cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            _, *broken = _called(self._library, "cudaStreamEndCapture", stream)  # or the stream captures for ever
            if broken and broken[0]:
                _called(self._library, "cudaGraphDestroy", broken[0])
            raise
        graph = self._do("ending a graph", "cudaStreamEndCapture", stream)
        try:
            return self._do("making a graph", "cudaGraphInstantiate", graph, 0)
        finally:
            self._do("freeing a graph", "cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """All of a captured graph."""
        self._do("launching a graph", "cudaGraphLaunch", graph, stream)

    def end_graph(self, graph: Any) -> None:
        """Of `capture`."""
        self._do("ending a graph", "cudaGraphExecDestroy", graph)

    def _do(self, what: str, function: str, *given: Any) -> Any:
        return _done(self._library, what, function, *given)


def view(address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Page-locked memory as an array; valid until `unpin`."""
    memory = (ctypes.c_float * math.prod(shape)).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)


def _done(library: Any, what: str, function: str, *given: Any) -> Any:
    error, *values = _called(library, function, *given)
    _check(error, what)
    return values[0] if values else None


def _called(library: Any, function: str, *given: Any) -> Any:
    """(error, value …). cuda.bindings raises where a library of the driver cannot be loaded at all."""
    try:
        return getattr(library, function)(*given)
    except (RuntimeError, OSError) as e:
        raise BackendError(f"CUDA cannot be called ({function}: {type(e).__name__})") from None


def _check(error: Any, what: str) -> None:
    if int(error):
        raise BackendError(f"{what}: {getattr(error, 'name', f'CUDA error {int(error)}')}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"

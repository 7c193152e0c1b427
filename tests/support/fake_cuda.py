"""A GPU in the memory of a test: `cuda.bindings.runtime` as far as the node calls it, with every call recorded.

Memory is real (copies move bytes and may not leave what was allocated), streams execute at once or capture, a captured
graph executes when it is launched. `fails` makes a function answer an error of CUDA. `left()` tells what was not freed.
"""

# ruff: noqa: N815  the names are CUDA's

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


OK = CudaError.cudaSuccess


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class Properties:
    name: bytes
    major: int
    minor: int
    multiProcessorCount: int


@dataclass
class Stream:
    handle: int
    capturing: list[Callable[[], None]] | None = None
    broken: bool = False

    def __int__(self) -> int:
        return self.handle

    def put(self, work: Callable[[], None]) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)


@dataclass
class Graph:
    work: list[Callable[[], None]]


@dataclass
class FakeCuda:
    """Stands in for the module: `TensorRtBackend(…, find_cuda=lambda: FakeCuda())`."""

    names: tuple[bytes, ...] = (b"NVIDIA RTX A4000",)
    sm: tuple[int, int] = (8, 6)
    memory: int = 1 << 30
    driver: int = 13000
    fails: dict[str, CudaError] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    device: dict[int, Any] = field(default_factory=dict)
    """Address → buffer."""
    pinned: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    graphs: list[Graph] = field(default_factory=list)

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode

    def left(self) -> int:
        """What was made and not freed."""
        return len(self.device) + len(self.pinned) + len(self.streams) + len(self.graphs)

    def _error(self, name: str) -> CudaError:
        return self.fails.get(name, OK)

    # -- the device

    def cudaGetDeviceCount(self) -> Any:
        error = self._error("cudaGetDeviceCount")
        return (error, None) if error else (OK, len(self.names))

    def cudaDriverGetVersion(self) -> Any:
        return (OK, self.driver)

    def cudaRuntimeGetVersion(self) -> Any:
        return (OK, 13050)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return (OK, Properties(self.names[device], *self.sm, 48))

    def cudaSetDevice(self, device: int) -> Any:
        return (OK if device < len(self.names) else CudaError.cudaErrorInvalidDevice,)

    def cudaMemGetInfo(self) -> Any:
        return (OK, self.memory - self._used(), self.memory)

    def _used(self) -> int:
        return sum(len(buffer) for buffer in self.device.values())

    # -- memory

    def cudaMalloc(self, size: int) -> Any:
        self.calls.append(f"malloc {size}")
        if self._used() + size > self.memory:
            return (CudaError.cudaErrorMemoryAllocation, None)
        return self._allocated(self.device, size)

    def cudaMallocHost(self, size: int) -> Any:
        self.calls.append(f"pin {size}")
        error = self._error("cudaMallocHost")
        return (error, None) if error else self._allocated(self.pinned, size)

    @staticmethod
    def _allocated(where: dict[int, Any], size: int) -> Any:
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)  # never zeros: NaN where nobody wrote
        where[ctypes.addressof(buffer)] = buffer
        return (OK, ctypes.addressof(buffer))

    def cudaFree(self, devPtr: int) -> Any:
        self.calls.append("free")
        del self.device[devPtr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> Any:
        self.calls.append("unpin")
        del self.pinned[ptr]
        return (OK,)

    # -- work

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        stream = Stream(1000 + len(self.streams))
        self.streams[int(stream)] = stream
        return (OK, stream)

    def cudaStreamDestroy(self, stream: Stream) -> Any:
        self.calls.append("end stream")
        del self.streams[int(stream)]
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: CopyKind, stream: Stream) -> Any:
        inwards = kind is CopyKind.cudaMemcpyHostToDevice
        target, source = (self.device, self.pinned) if inwards else (self.pinned, self.device)
        assert count <= len(target[dst]) and count <= len(source[src])
        self.calls.append(f"copy {'in' if inwards else 'out'} {count}")
        stream.put(lambda: ctypes.memmove(dst, src, count))  # type: ignore[func-returns-value]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> Any:
        assert stream.capturing is None, "a stream that captures cannot be waited for"
        self.calls.append("wait")
        return (self._error("cudaStreamSynchronize"),)

    def cudaStreamBeginCapture(self, stream: Stream, mode: CaptureMode) -> Any:
        assert mode is CaptureMode.cudaStreamCaptureModeThreadLocal and stream.capturing is None
        self.calls.append("begin capture")
        stream.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> Any:
        self.calls.append("end capture")
        work, stream.capturing = stream.capturing, None
        assert work is not None
        if stream.broken:
            return (CudaError.cudaErrorStreamCaptureUnsupported, None)
        self.graphs.append(Graph(work))
        return (OK, self.graphs[-1])

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        assert flags == 0 and any(graph is known for known in self.graphs)
        self.graphs.append(Graph(graph.work))
        return (OK, self.graphs[-1])

    def cudaGraphDestroy(self, graph: Graph) -> Any:
        self._forget(graph)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Graph) -> Any:
        self.calls.append("end graph")
        self._forget(graphExec)
        return (OK,)

    def _forget(self, graph: Graph) -> None:
        index = next(i for i, known in enumerate(self.graphs) if known is graph)
        del self.graphs[index]

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> Any:
        assert any(graphExec is known for known in self.graphs) and int(stream) in self.streams
        self.calls.append("launch")
        for work in graphExec.work:
            work()
        return (OK,)

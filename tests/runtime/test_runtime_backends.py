"""The backends that are known: their order, and that knowing them costs nothing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import get_args

import pytest
from backends import tiny_model

from dicom_node.config import Infer
from dicom_node.errors import BackendError
from dicom_node.runtime import Place
from dicom_node.runtime.backends import known
from dicom_node.runtime.onnx import CudaBackend

RUNTIMES = get_args(Infer.model_fields["runtime"].annotation)


def test_every_runtime_of_the_configuration_is_known_and_ends_with_the_reference() -> None:
    assert set(RUNTIMES) == {"auto", "onnx", "openvino", "cuda", "tensorrt"}
    for runtime in RUNTIMES:
        backends = [(b.name, b.precision) for b in known(runtime)]
        assert backends[-1] == ("onnx", "fp32")
        assert len(set(backends)) == len(backends)


def test_auto_tries_what_is_usually_fastest_first() -> None:
    assert [f"{b.name} {b.precision}" for b in known("auto")] == [
        "tensorrt fp16", "tensorrt fp32", "tensorrt_rtx fp16", "tensorrt_rtx fp32", "cuda fp16", "cuda fp32",
        "openvino fp32", "onnx fp32",
    ]  # fmt: skip
    assert [b.name for b in known("openvino")] == ["openvino", "onnx"]
    assert {b.name for b in known("tensorrt")} == {"tensorrt", "tensorrt_rtx", "onnx"}
    assert [b.name for b in known("onnx")] == ["onnx"]


def test_to_know_them_loads_no_library() -> None:
    code = """
import sys
from dicom_node.runtime.backends import known
assert len(known("auto")) == 8
heavy = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the provider, then the driver."""
    assert "onnxruntime-gpu" in CudaBackend("fp32").missing() or "CUDA device" in CudaBackend("fp32").missing()
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: True)
    monkeypatch.setattr("ctypes.CDLL", _no_driver)
    assert CudaBackend("fp16").missing() == "no CUDA device: no NVIDIA driver (libcuda.so.1)"
    for status, count, said in (
        (100, 0, "no CUDA device: the driver answers 100"),
        (0, 0, "no CUDA device: the driver knows none"),
        (0, 1, ""),
    ):
        monkeypatch.setattr("ctypes.CDLL", lambda name, s=status, c=count: _Driver(s, c))
        assert CudaBackend("fp16").missing() == said


def _no_driver(name: str) -> None:
    raise OSError(name)


class _Driver:
    def __init__(self, status: int, count: int) -> None:
        self._status, self._count = status, count

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self._count  # type: ignore[attr-defined]  ctypes.byref keeps it
        return 0


def test_cuda_that_does_not_come_up_is_not_the_processor_under_another_name() -> None:
    """ONNX Runtime would go on on the CPU with a warning at most; provenance would then name a GPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with warnings.catch_warnings(), pytest.raises(BackendError, match="does not use the GPU"):
        warnings.simplefilter("ignore")
        CudaBackend("fp32").open(tiny_model(), Place())

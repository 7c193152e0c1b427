"""Which backends the node knows, in the order in which they are tried. Imports no runtime and asks no driver.

Precision comes first in speed, not in trust: an fp16 backend serves only where it gave the golden answers within the
tolerance of the manifest and decided as the reference does.
"""

from __future__ import annotations

from dicom_node.runtime import Backend
from dicom_node.runtime.onnx import CudaBackend, OnnxBackend
from dicom_node.runtime.openvino import OpenVinoBackend
from dicom_node.runtime.tensorrt import TensorRtBackend


def known(runtime: str) -> tuple[Backend, ...]:
    """For `infer.runtime`. The reference is always the last: nothing is accepted without it."""
    tensorrt: tuple[Backend, ...] = (
        TensorRtBackend("tensorrt", "fp16"),
        TensorRtBackend("tensorrt", "fp32"),
        TensorRtBackend("tensorrt_rtx", "fp16"),
        TensorRtBackend("tensorrt_rtx", "fp32"),
    )
    cuda: tuple[Backend, ...] = (CudaBackend("fp16"), CudaBackend("fp32"))
    openvino: tuple[Backend, ...] = (OpenVinoBackend(),)
    candidates: dict[str, tuple[Backend, ...]] = {
        "auto": (*tensorrt, *cuda, *openvino),
        "tensorrt": tensorrt,
        "cuda": cuda,
        "openvino": openvino,
        "onnx": (),
    }
    return (*candidates[runtime], OnnxBackend())

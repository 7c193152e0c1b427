"""Which backends the node knows, in the order in which they are tried. Imports no runtime and asks no driver.

Precision comes first in speed, not in trust: an fp16 backend serves only where it gave the golden answers within the
tolerance of the manifest and decided as the reference does.
"""

from __future__ import annotations

from dicom_node.runtime import Backend
from dicom_node.runtime.onnx import CudaBackend, OnnxBackend
from dicom_node.runtime.openvino import OpenVinoBackend

NOT_EXECUTED_BY_US = frozenset({"cuda"})
"""Backends that no machine of ours could run; said wherever they are listed."""


def known(runtime: str) -> tuple[Backend, ...]:
    """For `infer.runtime`. The reference is always the last: nothing is accepted without it."""
    cuda: tuple[Backend, ...] = (CudaBackend("fp16"), CudaBackend("fp32"))
    openvino: tuple[Backend, ...] = (OpenVinoBackend(),)
    candidates: dict[str, tuple[Backend, ...]] = {
        "auto": (*cuda, *openvino),
        "cuda": cuda,
        "openvino": openvino,
        "tensorrt": (),
        "onnx": (),
    }
    return (*candidates[runtime], OnnxBackend())

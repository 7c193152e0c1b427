"""Names and parameters of TensorRT's Python classes, read off an installed library and kept in `tensorrt_api.json`.

    python tests/support/tensorrt_api.py tensorrt_rtx_bindings cuda

TensorRT itself cannot be installed from the package index alone, but its bindings can (`tensorrt-cu13-bindings`): with
nine empty functions in place of its libraries they import, and tell their classes. That is how the entries of 10.16
and 11.4 were read; the entries of the installed libraries are compared with them by the tests.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "OnnxParser", "ParserError", "Runtime",
    "ICudaEngine", "IExecutionContext", "ILogger", "IProgressMonitor", "ITimingCache", "ITensor", "IRuntimeConfig",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "MemoryPoolType", "NetworkDefinitionCreationFlag", "DataType", "TensorIOMode", "TensorLocation",
    "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy",
)  # fmt: skip
FUNCTIONS = (
    "cudaDriverGetVersion", "cudaFree", "cudaFreeHost", "cudaGetDeviceCount", "cudaGetDeviceProperties",
    "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaMalloc",
    "cudaMallocHost", "cudaMemGetInfo", "cudaMemcpyAsync", "cudaRuntimeGetVersion", "cudaSetDevice",
    "cudaStreamBeginCapture", "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture",
    "cudaStreamSynchronize",
)  # fmt: skip
FILE = Path(__file__).with_suffix(".json")

Api = dict[str, dict[str, list[str]]]
"""Class → member → its overloads, each as "a, b?" (? = may be left out); [] = a property or a member of an enum."""


def of_tensorrt(module: Any) -> Api:
    """What the module has of CLASSES and ENUMS."""
    found: Api = {}
    for name in CLASSES:
        if hasattr(module, name):
            members = vars(getattr(module, name))
            found[name] = {m: overloads(m, v.__doc__ or "") for m, v in sorted(members.items()) if m[0] != "_"}
    for name in ENUMS:
        if hasattr(module, name):
            found[name] = {member: [] for member in getattr(module, name).__members__}
    return found


def of_cuda(module: Any) -> Api:
    """FUNCTIONS of `cuda.bindings.runtime`."""
    return {"runtime": {name: [", ".join(inspect.signature(getattr(module, name)).parameters)] for name in FUNCTIONS}}


def overloads(name: str, doc: str) -> list[str]:
    """Of a pybind11 docstring: `name(self: X, a: tuple[int, int], b: Y = <Y.Z: 0>) -> None`."""
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\(self: [\w.]+(?:, (.*))?\) -> ", line)
        if match:
            found.append(", ".join(_parameters(match[1] or "")))
    return found


def _parameters(text: str) -> list[str]:
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[(<") - (c in "])>")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.split(":")[0].strip() + ("?" if " = " in part else "") for part in parts if part]


def stored() -> dict[str, Api]:
    """By library and version."""
    known: dict[str, Api] = json.loads(FILE.read_text(encoding="utf-8"))
    return known


def write(entries: dict[str, Api]) -> None:
    """One class a line."""
    lines = []
    for library, api in sorted(entries.items()):
        classes = ",\n".join(f'  "{name}": {json.dumps(members)}' for name, members in api.items())
        lines.append(f' "{library}": {{\n{classes}\n }}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Add the libraries that are named to the file."""
    entries = stored() if FILE.exists() else {}
    for name in sys.argv[1:]:
        if name == "cuda":
            import cuda.bindings

            entries[f"cuda {cuda.bindings.__version__}"] = of_cuda(importlib.import_module("cuda.bindings.runtime"))
        else:
            module = importlib.import_module(name)
            entries[f"{name.removesuffix('_bindings')} {module.__version__}"] = of_tensorrt(module)
    write(entries)


if __name__ == "__main__":
    main()

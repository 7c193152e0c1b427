"""A task and a model package as small as they can be, for tests of the loader, the gates and the worker.

The graph (`tiny.onnx`): x (n, 1, 4, 4) → 1x1 convolution to three channels → ReLU = features → global average →
linear = logits (n, 2). `build_graph` is how the file was made; the numbers stand here, so tests know every answer.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

GRAPH = Path(__file__).parent / "tiny.onnx"
KERNEL = np.array([1.0, -1.0, 0.5], np.float32)
W = np.array([[0.5, -1.0, 0.25], [-0.5, 1.5, 1.0]], np.float32)
B = np.array([0.1, -0.2], np.float32)

CODES = {"scheme": "99INFER", "meaning": "Test"}
TASK: dict[str, Any] = {
    "schema": 1, "task": "tiny", "title": "Tiny task", "series_description": "AI tiny", "study_reference": "none",
    "modality": "US", "unit": "lesion", "paired": True, "libraries": [],
    "indication": {"value": "IND", **CODES}, "finding": {"value": "FIND", **CODES},
    "site": {"value": "SITE", **CODES}, "outcome": {"value": "PROB", **CODES},
    "categories": {name: {"value": code, **CODES} for name, code in
                   {"name": "CAT", "high": "HIGH", "low": "LOW", "indeterminate": "INDET"}.items()},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "schema": 1, "task": "tiny", "version": "1", "algorithm": "Tiny", "intended_use": "demonstration",
    "classes": ["low", "high"], "positive": "high",
    "models": {"classifier": {"inputs": ["x"], "outputs": ["logits", "features"], "tolerance": {"fp32": 1e-3}}},
    "inputs": [{"name": "x", "kind": "cine", "frames": 2, "size": [4, 4]}],
    "calibration": {"method": "temperature", "T": 2.0}, "metrics": {"test": {"auc": 0.9}},
    "decision": {"threshold": 0.5, "rule": "fixed", "abstain": {"lower": 0.45, "upper": 0.55}},
    "explain": {"model": "classifier", "method": "class activation map", "vmin": 0.1, "vmax": 1.0},
    "ood": {"file": "ood.npz", "limit": 50.0},
}  # fmt: skip


def answers(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the graph computes, in numpy."""
    features = np.maximum(x * KERNEL[None, :, None, None], 0).astype(np.float32)
    return (features.mean(axis=(2, 3)) @ W.T + B).astype(np.float32), features


def arrays(**changes: Any) -> dict[str, dict[str, Any]]:
    """The three array files; `arrays(head={"W": …})` changes one array of one file, None removes it."""
    x = np.linspace(-1, 2, 48, dtype=np.float32).reshape(3, 1, 4, 4)
    logits, features = answers(x)
    files: dict[str, dict[str, Any]] = {
        "head": {"W": W, "b": B},
        "ood": {"mean": np.zeros(3), "precision": np.diag([1.0, 2.0, 4.0])},
        "golden": {"classifier.x": x, "classifier.logits": logits, "classifier.features": features},
    }
    for name, change in changes.items():
        files[name] = {key: value for key, value in (files[name] | change).items() if value is not None}
    return files


def write_package(
    folder: Path, manifest: dict[str, Any] | None = None, graph: bytes | None = None, **changes: Any
) -> Path:
    """A package in `folder`, listed and digested."""
    (folder / "models/classifier").mkdir(parents=True)
    (folder / "models/classifier/fp32.onnx").write_bytes(GRAPH.read_bytes() if graph is None else graph)
    for name, content in arrays(**changes).items():
        np.savez_compressed(folder / f"{name}.npz", **content)
    (folder / "MODEL_CARD.md").write_text("# Tiny\n")
    (folder / "metadata.json").write_text("{}\n")
    write_manifest(folder, MANIFEST | (manifest or {}))
    return folder


def write_manifest(folder: Path, content: dict[str, Any], sign_with: Any = None) -> None:
    """List every file of the folder; `sign_with` is an Ed25519 private key, known to the site as "site-key"."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.yaml"
    }
    text = yaml.safe_dump({**content, "files": files}, sort_keys=False)
    if sign_with is not None:
        signature = base64.b64encode(sign_with.sign(text.encode())).decode()
        text += f"signature:\n  alg: ed25519\n  key_id: site-key\n  sig: {signature}\n"
    (folder / "manifest.yaml").write_text(text)


def write_task(engines: Path, source: str, name: str = "tiny", *, package: bool = True, **changes: Any) -> Path:
    """`engines/<name>/` with engine.yaml, engine.py and, by default, a demonstration package."""
    folder = engines / name
    folder.mkdir(parents=True)
    (folder / "engine.yaml").write_text(yaml.safe_dump(TASK | {"task": name} | changes))
    (folder / "engine.py").write_text(source)
    if package:
        write_package(folder / "model", {"task": name})
    return folder


def build_graph(*, double_input: bool = False) -> bytes:
    """The graph of `tiny.onnx`. Needs onnx."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {"K": KERNEL.reshape(3, 1, 1, 1), "W": W, "b": B}
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    nodes = [
        helper.make_node("Cast", ["x"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["single", "K"], ["c"]),
        helper.make_node("Relu", ["c"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["p"]),
        helper.make_node("Flatten", ["p"], ["v"]),
        helper.make_node("Gemm", ["v", "W", "b"], ["logits"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE if double_input else TensorProto.FLOAT, ["n", 1, 4, 4])
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3, 4, 4]),
    ]
    return _model(helper.make_graph(nodes, "tiny", [x], outputs, tensors))


def build_external(location: str, size: int) -> bytes:
    """x (n, size) times a square matrix that lies in a file. Needs onnx."""
    from onnx import TensorProto, helper

    matrix = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[size, size], data_location=TensorProto.EXTERNAL)
    entry = matrix.external_data.add()
    entry.key, entry.value = "location", location
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in "xy")
    return _model(helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "external", [x], [y], [matrix]))


def _model(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())

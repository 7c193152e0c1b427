"""Builders of what goes into `decide.conclude`: a package in memory, a selection, a unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_engine

from dicom_node import decide
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.metrics import NullRecorder
from dicom_node.packages import Manifest, ModelPackage, Task
from dicom_node.result import FrameRef, Refusal, Result
from dicom_node.study import Header, Instance

TASK = Task.model_validate(tiny_engine.TASK)
UID = "1.2.3.4"


def manifest(**changes: Any) -> Manifest:
    files = {
        name: {"sha256": "0" * 64, "bytes": 1}
        for name in (
            "models/classifier/fp32.onnx",
            "head.npz",
            "ood.npz",
            "golden.npz",
            "MODEL_CARD.md",
            "metadata.json",
        )
    }
    return Manifest.model_validate(tiny_engine.MANIFEST | {"files": files} | changes)


def package(digest: str = "d" * 64, **changes: Any) -> ModelPackage:
    head, ood = (tiny_engine.arrays()[name] for name in ("head", "ood"))
    weights, bias = head["W"].astype(float), head["b"].astype(float)
    return ModelPackage(Path("nowhere"), manifest(**changes), digest, weights, bias, ood["mean"], ood["precision"], {})


def instance(uid: str = UID, **changes: Any) -> Instance:
    made = Instance("0" * 32, Header({"SOPInstanceUID": uid}), "1.2", "a" * 64, Path("p"), "A", "B", "h", "x", 1.0)
    return replace(made, **changes)


def selection(*instances: Instance, **changes: Any) -> Selection:
    return replace(Selection(instances or (instance(),), "R", "", {"clips": "1"}, {"first": 3}), **changes)


def unit(name: str = "Lesion 1", logits: Any = (-1.0, 1.0), level: float = 1.0, **changes: Any) -> UnitPrediction:
    rng = np.random.default_rng(3)
    made: dict[str, Any] = {
        "tracking_identifier": name,
        "logits": np.array(logits, np.float32),
        "feature_maps": (rng.random((2, 3, 4, 5)) * level).astype(np.float32),
        "frames": rng.integers(0, 255, (2, 40, 60)).astype(np.uint8),
        "frame_refs": tuple(FrameRef("1.2.840", UID, n, 9) for n in (4, 7)),
        "region": (10, 20, 69, 59),
    }
    return UnitPrediction(**(made | changes))


def conclude(
    tmp_path: Path, *units: UnitPrediction, recorder: Any = None, task: Task = TASK, **how: Any
) -> Result | Refusal:
    return decide.conclude(
        "tiny-route", task, how.get("package", package()), how.get("selection", selection()),
        Prediction(units or (unit(),), how.get("parameters", {})), how.get("clinical", {}),
        spool=tmp_path, backend="onnx", precision="fp32", seconds=0.25, recorder=recorder or NullRecorder(),
    )  # fmt: skip


def result(tmp_path: Path, *units: UnitPrediction, **how: Any) -> Result:
    concluded = conclude(tmp_path, *units, **how)
    assert isinstance(concluded, Result), concluded
    return concluded

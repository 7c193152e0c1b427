"""What the node itself decides on an engine's raw output: out-of-distribution gate, calibration, abstention,
explanation, provenance. It stands outside every engine, so that no engine can skip it. The only I/O is the spool.

Order: fault (not finite, wrong shape) > out of distribution > calibrate > threshold and band > class activation map.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node import __version__
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.errors import WorkerError
from dicom_node.packages import CodeEntry, Manifest, ModelPackage, Task
from dicom_node.result import (
    ArrayFile,
    ClinicalInput,
    Code,
    Finding,
    Heatmap,
    Provenance,
    Refusal,
    RefusalCode,
    Result,
    Score,
)

Array = NDArray[np.floating[Any]]
SIDES = {
    "R": Code("24028007", "SCT", "Right"),
    "L": Code("7771000", "SCT", "Left"),
    "B": Code("51440002", "SCT", "Right and left"),
}


def conclude(
    route: str,
    task: Task,
    package: ModelPackage,
    selection: Selection,
    prediction: Prediction,
    clinical: Mapping[str, ClinicalInput],
    *,
    spool: Path,
    backend: str,
    precision: str,
    seconds: float,
) -> Result | Refusal:
    """From raw output to a Result, or OUT_OF_DISTRIBUTION. Raises WorkerError when the output is not usable at all."""
    manifest = package.manifest
    distances = {unit.tracking_identifier: ood_distance(unit, package) for unit in prediction.units}
    worst = max(distances.values())
    if worst > manifest.ood.limit:
        return Refusal(RefusalCode.OUT_OF_DISTRIBUTION, f"distance {worst:.1f}, limit {manifest.ood.limit:.1f}")
    findings = tuple(_finding(task, package, unit, spool) for unit in prediction.units)
    parameters = {
        "threshold": f"{manifest.decision.threshold:.4f} ({manifest.decision.rule})",
        "abstention band": f"{manifest.decision.abstain.lower:.4f} to {manifest.decision.abstain.upper:.4f}",
        "calibration": f"{manifest.calibration.method}, T = {manifest.calibration.T:g}",
        **{f"out-of-distribution distance, {name}": f"{d:.2f}" for name, d in distances.items()},
        "out-of-distribution limit": f"{manifest.ood.limit:.2f}",
        **{
            f"side, {unit.tracking_identifier}": unit.laterality_note
            for unit in prediction.units
            if task.paired and unit.laterality in SIDES and unit.laterality_note
        },
        "node version": __version__,
        **selection.parameters,
        **prediction.parameters,
    }
    provenance = Provenance(
        task.task,
        manifest.version,
        package.digest,
        manifest.intended_use,
        backend,
        precision,
        manifest.algorithm,
        parameters,
    )
    return Result(
        route=route,
        findings=findings,
        provenance=provenance,
        clinical=tuple(clinical[name] for name in sorted(clinical)),
        source_instances=tuple(i.sop_instance_uid for i in selection.instances),
        input_digest=input_digest(selection, clinical, package),
        title=task.series_description,
        seconds=round(seconds, 3),
    )


def input_digest(selection: Selection, clinical: Mapping[str, ClinicalInput], package: ModelPackage) -> str:
    """SHA-256 over all a result depends on: selected pixels, clinical inputs, weights, how the selection was made."""
    about = [
        sorted((i.sop_instance_uid, i.digest) for i in selection.instances),
        sorted((c.name, c.value, c.unit, c.time, c.source) for c in clinical.values()),
        package.digest,
        selection.laterality,
        sorted(selection.parameters.items()),
        sorted((k, str(v)) for k, v in selection.extra.items()),
    ]
    return hashlib.sha256(json.dumps(about, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def ood_distance(unit: UnitPrediction, package: ModelPackage) -> float:
    """Mean over the frames of the squared Mahalanobis distance of the globally averaged features (`OodSpec`)."""
    features = unit.feature_maps
    if features.ndim < 3 or features.shape[1] != package.ood_mean.shape[0]:
        raise WorkerError(f"features of shape {features.shape}, {package.ood_mean.shape[0]} channels expected")
    if not np.isfinite(features).all():
        raise WorkerError("the features hold NaN or infinity")
    pooled = features.astype(np.float64).mean(axis=tuple(range(2, features.ndim)))
    centred = pooled - package.ood_mean
    return float(np.einsum("ni,ij,nj->n", centred, package.ood_precision, centred).mean())


def probability(logits: Array, manifest: Manifest) -> float:
    """Calibrated probability of the positive class: softmax of logits / T. Raises WorkerError."""
    if logits.shape != (len(manifest.classes),) or not np.isfinite(logits).all():
        raise WorkerError(f"logits of shape {logits.shape} or not finite; {len(manifest.classes)} classes expected")
    scaled = logits.astype(np.float64) / manifest.calibration.T
    odds = np.exp(scaled - scaled.max())
    return float(odds[manifest.classes.index(manifest.positive)] / odds.sum())


def category(p: float, task: Task, manifest: Manifest) -> Code:
    """HIGH, LOW, or INDET inside the abstention band."""
    band = manifest.decision.abstain
    if band.lower <= p <= band.upper:
        return code(task.categories.indeterminate)
    return code(task.categories.high if p >= manifest.decision.threshold else task.categories.low)


def activation_map(features: Array, weights: Array, manifest: Manifest) -> NDArray[np.float32]:
    """Analytic class activation map of a linear head on globally averaged features, (n, h, w), signed.

    d logit_c / d f = W[c] / Z with Z = h * w cells, so the gradient-weighted map (Grad-CAM before its ReLU) is exactly
    sum_c (W[positive] - W[others]) f / Z (Zhou 2016; Selvaraju 2017, section 3).
    """
    positive = manifest.classes.index(manifest.positive)
    others = [k for k in range(len(manifest.classes)) if k != positive]
    direction = weights[positive] - weights[others].mean(axis=0)
    cells = features.shape[2] * features.shape[3]
    return np.asarray(np.einsum("c,nchw->nhw", direction, features.astype(np.float64)) / cells, np.float32)


def upsample(maps: Array, height: int, width: int) -> NDArray[np.float32]:
    """Bilinear from feature cells to pixels: cell centres stay where they are, the border is extended."""
    n, h, w = maps.shape
    rows = np.clip((np.arange(height) + 0.5) * h / height - 0.5, 0, h - 1)
    columns = np.clip((np.arange(width) + 0.5) * w / width - 0.5, 0, w - 1)
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([ndimage.map_coordinates(maps[k].astype(np.float32), grid, order=1) for k in range(n)])


def _finding(task: Task, package: ModelPackage, unit: UnitPrediction, spool: Path) -> Finding:
    manifest = package.manifest
    p = probability(unit.logits, manifest)
    return Finding(
        tracking_identifier=unit.tracking_identifier,
        finding=code(task.finding),
        site=code(task.site),
        laterality=SIDES.get(unit.laterality) if task.paired else None,
        laterality_note=unit.laterality_note if task.paired and unit.laterality not in SIDES else "",
        category_name=code(task.categories.name),
        category=category(p, task, manifest),
        scores=(Score(code(task.outcome), round(p, 4)),),
        sources=unit.frame_refs,
        heatmap=_heatmap(task, package, unit, spool),
        roi_source=unit.roi_source,
    )


def _heatmap(task: Task, package: ModelPackage, unit: UnitPrediction, spool: Path) -> Heatmap:
    explain = package.manifest.explain
    maps = unit.cam
    if maps is None:
        maps = activation_map(unit.feature_maps, package.head_weights, package.manifest)
    height, width = unit.frames.shape[1:3]
    return Heatmap(
        method=explain.method,
        target=code(task.outcome),
        frames=spill(unit.frames, spool),
        map=spill(upsample(maps, height, width), spool),
        frame_refs=unit.frame_refs,
        region=unit.region,
        vmin=explain.vmin,
        vmax=explain.vmax,
        frame_time_ms=unit.frame_time_ms,
    )


def spill(array: NDArray[Any], spool: Path) -> ArrayFile:
    """Write an array as `.npy`, durable, under a name of ours."""
    name = f"{uuid.uuid4().hex}.npy"
    with (spool / name).open("xb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    digest = hashlib.sha256((spool / name).read_bytes()).hexdigest()
    return ArrayFile(name, digest, tuple(array.shape), str(array.dtype))


def unspill(files: Iterable[ArrayFile], spool: Path) -> None:
    """Remove arrays of a result that is not going to be used."""
    for file in files:
        (spool / file.name).unlink(missing_ok=True)


def code(entry: CodeEntry) -> Code:
    """YAML to value."""
    return Code(entry.value, entry.scheme, entry.meaning)

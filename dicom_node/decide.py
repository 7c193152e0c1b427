"""What the node itself decides on an engine's raw output: out-of-distribution gate, calibration, abstention,
explanation, provenance. It stands outside every engine, so that no engine can skip it. The only I/O is the spool.

Order: fault (not finite, wrong shape) > out of distribution > calibrate > threshold and band > class activation map.
A fault is the engine's defect and costs an attempt (WorkerError); a refusal is an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node import __version__, fusion
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.errors import StoreError, WorkerError
from dicom_node.metrics import Recorder
from dicom_node.packages import CodeEntry, Decision, Manifest, ModelPackage, Task
from dicom_node.result import (
    ArrayFile,
    ClinicalInput,
    Code,
    Finding,
    Fusion,
    Heatmap,
    Provenance,
    Refusal,
    RefusalCode,
    Result,
    Score,
)
from dicom_node.store.sync import fsync_path

Array = NDArray[np.floating[Any]]
SIDES = {  # CID 244
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
    recorder: Recorder,
) -> Result | Refusal:
    """From raw output to a Result, or OUT_OF_DISTRIBUTION when no unit is like the images the model was validated on.

    Raises WorkerError when the output is not usable at all, StoreError when an array cannot be written.
    """
    check(selection, prediction, package)
    limit = package.manifest.ood.limit
    distances = {unit.tracking_identifier: ood_distance(unit, package) for unit in prediction.units}
    for distance in distances.values():
        recorder.observe("dicom_node_ood_ratio", distance / limit, route=route)
    inside = [unit for unit in prediction.units if distances[unit.tracking_identifier] <= limit]
    if not inside:
        return Refusal(RefusalCode.OUT_OF_DISTRIBUTION, _beyond(min(distances.values()), limit))
    with _Spool(spool).batch() as files:
        findings = tuple(_finding(task, package, selection, unit, clinical, files) for unit in inside)
    manifest = package.manifest
    provenance = Provenance(
        task=task.task,
        package_version=manifest.version,
        package_digest=package.digest,
        intended_use=manifest.intended_use,
        backend=backend,
        precision=precision,
        algorithm_name=manifest.algorithm,
        parameters=_parameters(task, manifest, selection, prediction, distances),
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
    """SHA-256 over all a result depends on: selected instances, clinical inputs, weights, how the selection was made.

    When and by whom an instance was sent, where it lies and what else the study holds do not count.
    """
    about = [
        sorted((i.sop_instance_uid, i.digest) for i in selection.instances),
        sorted((c.key, c.value, c.unit, c.time, c.source) for c in clinical.values()),
        package.digest,
        selection.laterality,
        dict(selection.parameters),
        dict(selection.extra),
    ]
    try:
        text = json.dumps(about, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError):
        raise WorkerError("select: extra holds something else than plain values") from None
    return hashlib.sha256(text.encode()).hexdigest()


# -- faults


def check(selection: Selection, prediction: Prediction, package: ModelPackage) -> None:
    """Raises WorkerError unless every unit holds what `engine.UnitPrediction` promises, finite and of this package."""
    names = [unit.tracking_identifier for unit in prediction.units]
    if not names or not all(names) or len(set(names)) != len(names):
        raise WorkerError("predict returned no unit, or two of the same name")
    selected = {i.sop_instance_uid for i in selection.instances}
    for unit in prediction.units:
        for what, fits in _promises(unit, selected, package).items():
            if not fits:
                raise WorkerError(f"{unit.tracking_identifier}: {what}")


def _promises(unit: UnitPrediction, selected: set[str], package: ModelPackage) -> dict[str, bool]:
    n, maps, frames = len(unit.frame_refs), unit.feature_maps, unit.frames
    classes, channels = package.head_weights.shape
    grey_or_rgb = frames.ndim == 3 or (frames.ndim == 4 and frames.shape[3] == 3)
    x0, y0, x1, y1 = unit.region
    return {
        f"logits of shape {unit.logits.shape}, {(classes,)} expected": unit.logits.shape == (classes,),
        "the logits hold NaN or infinity": bool(np.isfinite(unit.logits).all()),
        f"feature maps of shape {maps.shape}, (n, {channels}, h, w) expected": (
            maps.ndim in (4, 5)
            and maps.shape[1] == channels
            and maps.size > 0
            and (unit.cam is not None or not unit.heatmap or maps.shape[0] == (n if maps.ndim == 4 else 1))
        ),
        "the feature maps hold NaN or infinity": bool(np.isfinite(maps).all()),
        f"frames of shape {frames.shape} and type {frames.dtype}, uint8 (n, H, W) or (n, H, W, 3) expected": (
            not unit.heatmap or (grey_or_rgb and frames.dtype == np.uint8 and frames.shape[0] == n and frames.size > 0)
        ),
        f"a region of {x1 - x0 + 1} x {y1 - y0 + 1} pixels for frames of shape {frames.shape}": (
            not unit.heatmap or (min(x0, y0) >= 0 and grey_or_rgb and frames.shape[1:3] == (y1 - y0 + 1, x1 - x0 + 1))
        ),
        "a frame of an instance that was not selected": {r.sop_instance_uid for r in unit.frame_refs} <= selected,
        "a map that is not finite, or not (n, h, w)": unit.cam is None
        or (unit.cam.ndim == 3 and unit.cam.shape[0] == n and bool(np.isfinite(unit.cam).all())),
        f"laterality {unit.laterality!r}, R, L, B or empty expected": unit.laterality in ("", *SIDES),
    }


# -- gates and numbers


def ood_distance(unit: UnitPrediction, package: ModelPackage) -> float:
    """Mean over the maps of the squared Mahalanobis distance of the spatially averaged features (`OodSpec`)."""
    return _distance(unit.feature_maps, package)


def _distance(maps: Array, package: ModelPackage) -> float:
    centred = maps.reshape(*maps.shape[:2], -1).mean(axis=2, dtype=np.float64) - package.ood_mean
    return float(np.einsum("ni,ij,nj->n", centred, package.ood_precision, centred).mean())


def _beyond(distance: float, limit: float) -> str:
    return f"distance {distance:.1f} > limit {limit:.1f}"


def probability(logits: Array, manifest: Manifest) -> float:
    """Calibrated probability of the positive class: softmax of logits / T."""
    scaled = logits.astype(np.float64) / manifest.calibration.T
    odds = np.exp(scaled - scaled.max())
    return float(odds[manifest.classes.index(manifest.positive)] / odds.sum())


def log_odds(logits: Array, manifest: Manifest) -> float:
    """Calibrated log-odds of the positive class against the others together."""
    scaled = logits.astype(np.float64) / manifest.calibration.T
    positive = manifest.classes.index(manifest.positive)
    return float(scaled[positive] - np.logaddexp.reduce(np.delete(scaled, positive)))


def category(p: float, task: Task, decision: Decision) -> Code:
    """HIGH, LOW, or INDET inside the abstention band."""
    band = decision.abstain
    if band.lower <= p <= band.upper:
        return code(task.categories.indeterminate)
    return code(task.categories.high if p >= decision.threshold else task.categories.low)


def judge(task: Task, package: ModelPackage, outputs: Mapping[str, Array]) -> tuple[tuple[object, ...], ...]:
    """What the node would say of each golden case of the explained model, as `runtime.accept.Judge`.

    OUT_OF_DISTRIBUTION alone, or category and probability of the image. Fusion is left out: golden cases hold no
    clinical values, and it is a smooth function of the same log-odds.
    """
    logits, maps = outputs.get("logits"), outputs.get("features")
    if logits is None or logits.ndim != 2:
        return ()  # a map alone: its own tolerance is all that can be asked
    said: list[tuple[object, ...]] = []
    for n, row in enumerate(logits):
        if maps is not None and not _distance(maps[n : n + 1], package) <= package.manifest.ood.limit:
            said.append((str(RefusalCode.OUT_OF_DISTRIBUTION),))
            continue
        p = probability(row, package.manifest)
        said.append((category(p, task, package.manifest.decision).value, round(p, 4)))
    return tuple(said)


# -- explanation


def activation_map(features: Array, weights: Array, manifest: Manifest) -> NDArray[np.float32]:
    """Analytic class activation map of a linear head on globally averaged features (n, C, ...), signed: (n, ...).

    d logit_c / d f = W[c] / Z with Z cells in a map, so the gradient-weighted map (Grad-CAM before its ReLU) is exactly
    sum_c (W[positive] - W[others]) f / Z (Zhou 2016; Selvaraju 2017, section 3).
    """
    positive = manifest.classes.index(manifest.positive)
    others = [k for k in range(len(manifest.classes)) if k != positive]
    direction = weights[positive] - weights[others].mean(axis=0)
    cells = int(np.prod(features.shape[2:]))
    return np.asarray(np.einsum("c,nc...->n...", direction, features.astype(np.float64)) / cells, np.float32)


def upsample(maps: Array, height: int, width: int) -> NDArray[np.float32]:
    """Bilinear from feature cells to pixels: cell centres stay where they are, the border is extended."""
    n, h, w = maps.shape
    rows = np.clip((np.arange(height) + 0.5) * h / height - 0.5, 0, h - 1)
    columns = np.clip((np.arange(width) + 0.5) * w / width - 0.5, 0, w - 1)
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([ndimage.map_coordinates(maps[k].astype(np.float32), grid, order=1) for k in range(n)])


def over_frames(volume: Array, n: int) -> NDArray[np.float32]:
    """A map (d, h, w) whose depth spans n frames, linear between its cells: (n, h, w)."""
    depth = volume.shape[0]
    at = np.clip((np.arange(n) + 0.5) * depth / n - 0.5, 0, depth - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, depth - 1), (at - low)[:, None, None]
    return np.asarray(volume[low] * (1 - share) + volume[high] * share, np.float32)


# -- the result


def _finding(
    task: Task,
    package: ModelPackage,
    selection: Selection,
    unit: UnitPrediction,
    clinical: Mapping[str, ClinicalInput],
    files: _Spool,
) -> Finding:
    side, note = _side(task, selection, unit)
    said = _score(task, package.manifest, unit, side, clinical)
    return Finding(
        tracking_identifier=unit.tracking_identifier,
        finding=code(task.finding),
        site=code(task.site),
        laterality=SIDES.get(side),
        laterality_note="" if side else note,
        category_name=code(task.categories.name),
        category=said.category,
        scores=said.scores,
        sources=unit.frame_refs,
        heatmap=_heatmap(task, package, unit, files) if unit.heatmap else None,
        roi_source=unit.roi_source,
        fusion=said.fusion,
        notes=(*said.notes, *unit.notes),
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What the numbers say of one unit."""

    scores: tuple[Score, ...]
    category: Code
    fusion: Fusion | None = None
    notes: tuple[str, ...] = ()


def _score(
    task: Task, manifest: Manifest, unit: UnitPrediction, side: str, clinical: Mapping[str, ClinicalInput]
) -> _Said:
    """The image's score; with clinical values where the package fuses them and none is missing."""
    p = probability(unit.logits, manifest)
    if manifest.fusion is None:
        return _Said((Score(code(task.outcome), round(p, 4)),), category(p, task, manifest.decision))
    image = Score(code(task.image_outcome or task.outcome), round(p, 4))
    fused = fusion.fuse(manifest.fusion, task, log_odds(unit.logits, manifest), side, clinical)
    if isinstance(fused, str):
        return _Said((image,), category(p, task, manifest.decision), notes=(fused,))
    together = Score(
        code(task.outcome), round(fused.probability, 4), low=round(fused.low, 4), high=round(fused.high, 4)
    )
    return _Said((together, image), category(fused.probability, task, manifest.fusion.decision), fused)


def _side(task: Task, selection: Selection, unit: UnitPrediction) -> tuple[str, str]:
    """Side and what is said of it: the unit's; else, where it says nothing, that of all selected images."""
    if not task.paired:
        return "", ""
    if unit.laterality or unit.laterality_note:
        return unit.laterality, unit.laterality_note
    return selection.laterality, selection.laterality_note


def _heatmap(task: Task, package: ModelPackage, unit: UnitPrediction, files: _Spool) -> Heatmap:
    explain = package.manifest.explain
    maps = unit.cam
    if maps is None:
        maps = activation_map(unit.feature_maps, package.head_weights, package.manifest)
        if maps.ndim == 4:
            maps = over_frames(maps[0], len(unit.frame_refs))
    height, width = unit.frames.shape[1:3]
    return Heatmap(
        method=explain.method,
        target=code(task.outcome),
        frames=files.put(unit.frames),
        map=files.put(upsample(maps, height, width)),
        frame_refs=unit.frame_refs,
        region=unit.region,
        vmin=explain.vmin,
        vmax=explain.vmax,
        frame_time_ms=unit.frame_time_ms,
    )


def _parameters(
    task: Task, manifest: Manifest, selection: Selection, prediction: Prediction, distances: Mapping[str, float]
) -> dict[str, str]:
    """Enough to repeat the result. What the engine says comes last and cannot replace what the node says."""
    decision, limit = manifest.decision, manifest.ood.limit
    own = {
        "threshold": f"{decision.threshold:.4f} ({decision.rule})",
        "abstention band": f"{decision.abstain.lower:.4f} to {decision.abstain.upper:.4f}",
        "calibration": f"{manifest.calibration.method}, T = {manifest.calibration.T:g}",
        "out-of-distribution limit": f"{limit:.2f}",
        **_fusion_parameters(manifest),
        "node version": __version__,
    }
    for unit in prediction.units:
        name = unit.tracking_identifier
        distance = distances[name]
        own[f"{name}: out-of-distribution distance"] = f"{distance:.2f}"
        if distance > limit:
            own[f"{name}: not assessed"] = str(Refusal(RefusalCode.OUT_OF_DISTRIBUTION, _beyond(distance, limit)))
            continue
        own[f"{name}: frames"] = ", ".join(str(ref.frame_number) for ref in unit.frame_refs)
        side, note = _side(task, selection, unit)
        if side and note:
            own[f"{name}: side"] = note
    theirs = {str(key): str(value) for key, value in {**selection.parameters, **prediction.parameters}.items()}
    return own | {key: value for key, value in theirs.items() if key not in own}


def _fusion_parameters(manifest: Manifest) -> dict[str, str]:
    if manifest.fusion is None:
        return {}
    spec, band = manifest.fusion, manifest.fusion.decision.abstain
    return {
        "fusion": f"logistic on {', '.join(t.name for t in spec.terms)}; fitted on {spec.fitted_on}, n = {spec.n}",
        "fusion threshold": f"{spec.decision.threshold:.4f} ({spec.decision.rule})",
        "fusion abstention band": f"{band.lower:.4f} to {band.upper:.4f}",
    }


def code(entry: CodeEntry) -> Code:
    """YAML to value."""
    return Code(entry.value, entry.scheme, entry.meaning)


class _Spool:
    """Arrays on their way to `report`: durable before the result names them, gone when there is no result."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: list[Path] = []

    @contextlib.contextmanager
    def batch(self) -> Iterator[_Spool]:
        """All that is put is durable at the end, or nothing is left of it. Raises StoreError."""
        try:
            yield self
            for path in self._written:  # all of them last: the first flushes most of what the others wrote
                fsync_path(path)
            fsync_path(self._folder)
        except BaseException as e:
            for path in self._written:
                path.unlink(missing_ok=True)
            if isinstance(e, OSError):
                raise StoreError(f"an array cannot be spooled ({e.strerror})") from e
            raise

    def put(self, array: NDArray[Any]) -> ArrayFile:
        """Write an array as `.npy`, under a name of ours."""
        path = self._folder / f"{uuid.uuid4().hex}.npy"
        self._written.append(path)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w+b") as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ArrayFile(path.name, digest, tuple(array.shape), str(array.dtype))

"""Liver MRI: stack the phases after contrast, crop every outlined tumour from all of them, score it.

`select` reads headers, `predict` pixels. The tumour must be outlined in the study (SEG, RTSTRUCT, SR): which of several
lesions is the primary tumour no image says, so nothing is located automatically. Out-of-distribution gate, calibration
and abstention are the node's. Training prepares its volumes through `prepare` below, so the two can never drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.engine import PixelReader, Prediction, RunModel, Selection, Site, UnitPrediction
from dicom_node.pixels import dynamic, roi
from dicom_node.result import ClinicalInput, Refusal, RefusalCode
from dicom_node.study import Study

GRID = (16, 64, 64)
"""Slices, rows, columns of the network's input."""
SPACING_MM = (3.0, 1.5, 1.5)
"""Of that grid; coarser for a tumour that would not fit, so that the whole of it is seen."""
MARGIN = 0.15
"""Of the tumour's extent on each side, at least."""
EARLY = ("pre", "arterial", "portal venous")
LATE = ("delayed", "hepatobiliary")
"""The first of these that was acquired is the fourth phase."""
SHOWN = 1
"""The phase under the map: arterial."""
MAX_LESIONS = 3
MIN_MM = 8.0
"""A region that reaches less far, in rows or columns, shows no rim at the grid's spacing."""

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """What the network sees of one tumour, and where it comes from."""

    x: NDArray[np.float32]
    """(1, 5, 16, 64, 64): four phases, z-scored on the first, and the region (0..1)."""
    crops: NDArray[np.uint8]
    """(n, H, W): the arterial phase, native slices and pixels."""
    slices: tuple[int, ...]
    """Of the stack, for each crop."""
    region: tuple[int, int, int, int]
    centre: tuple[float, float, float]
    """Voxel of the stack (slice, row, column) in the middle of the grid."""
    step: tuple[float, float, float]
    """Voxels of the stack from one voxel of the grid to the next."""


# --- headers ---------------------------------------------------------------------------------------------------------


def select(study: Study, clinical: Mapping[str, ClinicalInput], site: Site = Site()) -> Selection | Refusal:
    """The series of the phases, and the objects that outline something on them."""
    del clinical  # the published score uses the images alone
    plan = _planned(study, site.phases)
    if isinstance(plan, Refusal):
        return plan
    marks = roi.marking(study, plan.instances)
    if not marks:
        return Refusal(RefusalCode.ROI_REQUIRED, "the study outlines no tumour on these phases")
    parameters = {"phases": ", ".join(plan.names), "phase encoding": plan.rule}
    own = site.phases.model_dump(mode="json", exclude_defaults=True)
    return Selection((*plan.instances, *marks), "", "", parameters | dict(plan.notes), own)


def _planned(study: Study, rules: dynamic.Rules) -> dynamic.Plan | Refusal:
    """The four phases the network needs."""
    plan = dynamic.plan(study, rules)
    if isinstance(plan, Refusal):
        return plan
    late = next((name for name in LATE if name in plan.names), LATE[0])
    return dynamic.choose(plan, (*EARLY, late))


# --- pixels ----------------------------------------------------------------------------------------------------------


def predict(selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
    """One unit for each outlined lesion, at most the three largest."""
    study = Study.from_instances("", 0, selection.instances)
    plan = _planned(study, dynamic.Rules.model_validate(selection.extra))
    if isinstance(plan, Refusal):
        return plan
    stack = dynamic.load(plan, pixels)
    if isinstance(stack, Refusal):
        return stack
    every = _outlined(study, stack, pixels)
    if isinstance(every, Refusal):
        return every
    lesions = sorted(every[:MAX_LESIONS], key=lambda r: r.number)
    times = (f"{name} {seconds:.0f}" for name, seconds in zip(stack.phases, stack.times, strict=True))
    notes = dict(stack.notes) | {"phase times (s)": ", ".join(times)}
    if len(every) > len(lesions):
        notes["lesions not assessed"] = f"{len(every) - len(lesions)}, beyond the {MAX_LESIONS} largest"
    units: list[UnitPrediction] = []
    refusals: list[Refusal] = []
    for number, lesion in enumerate(lesions, start=1):
        name = f"Lesion {number}"
        prepared = prepare(stack.volume, stack.affine, lesion.mask)
        if isinstance(prepared, Refusal):
            refusals.append(prepared)
            notes[f"{name}: not assessed"] = str(prepared)
            continue
        unit, said = _score(name, lesion, prepared, stack, run)
        units.append(unit)
        notes |= said
    return Prediction(tuple(units), notes) if units else refusals[0]


def _outlined(study: Study, stack: dynamic.Stack, pixels: PixelReader) -> list[roi.VolumeRoi] | Refusal:
    """The regions that are not coded as an organ, the largest first."""
    references = frozenset(ref.sop_instance_uid for phase in stack.frames for ref in phase)
    depth, rows, columns = stack.volume.shape[1:]
    found = roi.volume_rois(study, references, (depth, rows, columns), stack.affine, stack.frame_of_reference, pixels)
    if isinstance(found, Refusal):
        return found
    lesions = [r for r in found if r.structure != "organ"]
    if not lesions:
        return Refusal(RefusalCode.ROI_REQUIRED, "no tumour is outlined on these phases")
    return sorted(lesions, key=lambda r: (-int(r.mask.sum()), r.number))


def prepare(volume: Volume, affine: NDArray[np.float64], mask: NDArray[np.bool_]) -> Prepared | Refusal:
    """From four phases (4, D, H, W) and a region (D, H, W) to the network's input."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)[::-1]  # of a voxel: slice, row, column
    held = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if not len(held[0]):
        return Refusal(RefusalCode.ROI_REQUIRED, "an empty region")
    extent = np.array([(h[-1] - h[0] + 1) * mm for h, mm in zip(held, edges, strict=True)])
    if extent[1:].min() < MIN_MM:
        return Refusal(RefusalCode.ROI_REQUIRED, f"a region of {extent[1]:.0f} x {extent[2]:.0f} mm is too small")
    centre = np.array([(h[0] + h[-1]) / 2 for h in held])
    need = extent * (1 + 2 * MARGIN) / (np.array(GRID) * SPACING_MM)
    zoom = np.array([max(1.0, need[0]), *[max(1.0, need[1:].max())] * 2])
    step = zoom * SPACING_MM / edges
    weights = [
        interpolation(size, places(middle, n, s), s)
        for size, middle, n, s in zip(mask.shape, centre, GRID, step, strict=True)
    ]
    first = volume[0]
    spread = float(first.std())
    if not np.isfinite(volume).all() or spread <= 0:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "the phase before contrast is constant or not finite")
    phases = [(_resampled(phase, weights) - np.float32(first.mean())) / np.float32(spread) for phase in volume]
    x = np.stack([*phases, _resampled(mask.astype(np.float32), weights)])[None]
    slices, region = _shown(mask.shape, centre, step)
    crops = _window(volume[SHOWN][slices[0] : slices[-1] + 1, region[1] : region[3] + 1, region[0] : region[2] + 1])
    return Prepared(np.asarray(x, np.float32), crops, slices, region, _three(centre), _three(step))


def places(middle: float, count: int, step: float) -> NDArray[np.float64]:
    """Where `count` grid points lie on an axis of the stack."""
    return np.asarray(middle + (np.arange(count) - (count - 1) / 2) * step, np.float64)


def interpolation(size: int, at: NDArray[np.float64], step: float) -> NDArray[np.float32]:
    """(n, size): linear interpolation at the places `at`, averaging where the step is wider than a voxel (or the finer
    structure would alias); beyond the ends the last voxel counts."""
    wide = max(1.0, step)
    where = np.clip(at, 0, size - 1)[:, None]
    weight = np.maximum(0.0, 1 - np.abs(np.arange(size)[None] - where) / wide)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), np.float32)


def _resampled(volume: Volume, weights: Sequence[NDArray[np.float32]]) -> Volume:
    along_z, along_y, along_x = weights
    held = np.flatnonzero(along_z.any(axis=0))  # slices outside the crop need no work
    part = np.asarray(volume[held[0] : held[-1] + 1], np.float32)
    plane = along_y @ (part @ along_x.T)
    return np.asarray(np.tensordot(along_z[:, held[0] : held[-1] + 1], plane, axes=1), np.float32)


def _three(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _shown(
    shape: Sequence[int], centre: NDArray[np.float64], step: NDArray[np.float64]
) -> tuple[tuple[int, ...], tuple[int, int, int, int]]:
    """Native slices and the box of native pixels that the grid covers."""
    half = np.array(GRID) * step / 2
    low = np.maximum(np.ceil(centre - half), 0).astype(int)
    high = np.minimum(np.floor(centre + half), np.array(shape) - 1).astype(int)
    return tuple(range(low[0], high[0] + 1)), (int(low[2]), int(low[1]), int(high[2]), int(high[1]))


def _window(part: Volume) -> NDArray[np.uint8]:
    """Grey values for display: the 1st to the 99.5th percentile of the crop."""
    low, high = np.percentile(part, (1, 99.5))
    return np.asarray(np.clip((part - low) / max(float(high - low), 1e-6) * 255, 0, 255), np.uint8)


# --- units -----------------------------------------------------------------------------------------------------------


def _score(
    name: str, lesion: roi.VolumeRoi, prepared: Prepared, stack: dynamic.Stack, run: RunModel
) -> tuple[UnitPrediction, dict[str, str]]:
    out: Mapping[str, NDArray[Any]] = run("classifier", {"x": prepared.x})
    shares = np.asarray(out["attention"], np.float64)[0]
    unit = UnitPrediction(
        tracking_identifier=name,
        logits=np.asarray(out["logits"], np.float32)[0],
        feature_maps=np.asarray(out["features"], np.float32),
        frames=prepared.crops,
        frame_refs=tuple(stack.frames[SHOWN][index] for index in prepared.slices),
        region=prepared.region,
        cam=native_map(np.asarray(out["cam"], np.float32)[0, SHOWN], prepared),
        roi_source=lesion.source,
    )
    weights = ", ".join(f"{phase} {share:.0%}" for phase, share in zip(stack.phases, shares, strict=True))
    said = {f"{name}: region of interest": f"{lesion.source}, number {lesion.number}", f"{name}: attention": weights}
    return unit, said


def native_map(cells: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """A map (d, h, w) over the grid on the pixels of the crops, linear between the middles of its cells."""
    x0, y0, x1, y1 = prepared.region
    places = (np.array(prepared.slices), np.arange(y0, y1 + 1), np.arange(x0, x1 + 1))
    weights = []
    for axis, at in enumerate(places):
        on_grid = (at - prepared.centre[axis]) / prepared.step[axis] + (GRID[axis] - 1) / 2
        cell = GRID[axis] / cells.shape[axis]
        weights.append(interpolation(cells.shape[axis], (on_grid + 0.5) / cell - 0.5, 1.0))
    return np.asarray(np.einsum("zk,yi,xj,kij->zyx", *weights, cells, optimize=True), np.float32)

"""Contrast-enhanced dynamic MR: the phases of a study as one array, however they were encoded, or why not.

    plan     headers → which frame is which slice of which phase, and what the phases are called
    choose   the phases a model needs, in increasing order; none is replaced by another
    load     pixels → one float stack on one grid, real-world values

A wrong stack looks like a right one, so whatever is ambiguous is refused, with its own code and without a value of the
data set. PS3.3 C.8.3 (MR), C.8.13 (Enhanced MR), C.7.6.16 (functional groups).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels import dynamic_frames, dynamic_names, dynamic_split, geometry
from dicom_node.pixels.dynamic_model import ORDER, PORTAL, Frame, PhasePlan, Plan, Rules, Stack, own_rules
from dicom_node.pixels.dynamic_split import Part
from dicom_node.pixels.geometry import Grid
from dicom_node.pixels.roi_model import FrameReader
from dicom_node.result import FrameRef, Refusal, RefusalCode
from dicom_node.study import Instance, Study

__all__ = ["PhasePlan", "Plan", "Rules", "Stack", "choose", "load", "plan"]

_HALF_DAY = 43200.0
_SAME_TIME_S = 1.0
_SERIES = "series per phase"
_SAME_SCALE = 1e-3
_SPACING_OFF = 0.1
"""Share of the measured spacing by which Spacing Between Slices may be off: scanners round it."""


def plan(study: Study, rules: Rules | None = None) -> Plan | Refusal:
    """How the contrast phases of the study are stacked. Reads no pixels."""
    rules = rules or Rules()
    frames = _candidates(study, rules)
    if isinstance(frames, Refusal):
        return frames
    grouped = dynamic_split.groups(frames, rules)
    if isinstance(grouped, Refusal):
        return grouped
    if not grouped:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, f"no stack of {rules.minimum_slices} slices or more")
    grouped, notes = _one_echo(grouped)
    clock = _clock([f for g in grouped for f in g])
    if isinstance(clock, Refusal):
        return clock
    parts: list[Part] = []
    for group in grouped:
        found = dynamic_split.split(group, clock)
        if isinstance(found, Refusal):
            return found
        parts += found
    if len(parts) < 2:
        return Refusal(RefusalCode.PHASE_MISSING, "one phase only")
    return _planned(parts, len(grouped), rules, notes)


def choose(found: Plan, names: Sequence[str]) -> Plan | Refusal:
    """The phases of these names, in this order, which must be their order in time."""
    missing = [n for n in names if n not in found.names]
    if missing:
        return Refusal(RefusalCode.PHASE_MISSING, ", ".join(missing))
    at = [found.names.index(n) for n in names]
    if at != sorted(set(at)):
        return Refusal(RefusalCode.PHASE_MISSING, "the phases are not in increasing order")
    phases = tuple(found.phases[i] for i in at)
    return replace(found, phases=phases, reference=_reference(phases))


def _candidates(study: Study, rules: Rules) -> list[Frame] | Refusal:
    """Frames that can be part of the dynamic series; of a Dixon acquisition the water images."""
    kept: list[Frame] = []
    parts: set[str] = set()
    for instance in study.instances:
        if not dynamic_frames.is_mr(instance):
            continue
        for frame in dynamic_frames.frames_of(instance):
            if dynamic_frames.why_not(frame, rules):
                continue
            parts.add(frame.part)
            if frame.part in ("", "water"):
                kept.append(frame)
    if any(f.original for f in kept):
        kept = [f for f in kept if f.original]
    if kept:
        return kept
    if parts:
        return Refusal(RefusalCode.DIXON_WATER_MISSING, f"there are {', '.join(sorted(parts))} images only")
    return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no axial T1-weighted gradient echo series")


def _one_echo(grouped: list[list[Frame]]) -> tuple[list[list[Frame]], dict[str, str]]:
    """Of several echoes of one series the first: the least T2* in it. Echoes are never mixed."""
    first: dict[tuple[str, str], list[Frame]] = {}
    notes: dict[str, str] = {}
    for group in grouped:
        key = (group[0].series, group[0].part)
        other = first.setdefault(key, group)
        if other is not group:
            notes["echo"] = "the shortest of several"
            first[key] = min(other, group, key=lambda g: (g[0].echo_ms or 0.0, g[0].echo_number or 0))
    return list(first.values()), notes


# --- time ------------------------------------------------------------------------------------------------------------


def _clock(frames: Sequence[Frame]) -> Callable[[Frame], float | None] | Refusal:
    """When a frame was acquired, on one scale for the study: time zones and midnight put right."""
    said = {f.zone for f in frames if f.clock is not None}
    if len(said) > 1 and None in said:
        return Refusal(RefusalCode.PHASE_TIME_INVALID, "only some images name their time zone, and not one zone")
    several_zones = len(said) > 1
    times: dict[int, float | None] = {}
    for frame in frames:
        header = frame.instance.header
        time = frame.clock
        if time is None:
            day = header.text("SeriesDate") or header.text("StudyDate")
            time = dynamic_frames.moment(day, header.text("SeriesTime"))
        elif several_zones:
            time -= frame.zone or 0.0
        times[id(frame)] = time
    known = [t for t in times.values() if t is not None]
    if known and max(known) - min(known) > _HALF_DAY:
        # No examination takes half a day: the clock passed midnight, and the date is absent or did not follow.
        late = {k: t + 2 * _HALF_DAY if t is not None and t < max(known) - _HALF_DAY else t for k, t in times.items()}
        shifted = [t for t in late.values() if t is not None]
        if max(shifted) - min(shifted) > _HALF_DAY:
            return Refusal(RefusalCode.PHASE_TIME_INVALID, "the images were acquired more than half a day apart")
        times = late
    return lambda frame: times[id(frame)]


def _ordered(parts: list[Part], groups: int, rules: Rules) -> list[Part] | Refusal:
    """All phases of the study by time; where that is not known, by the names of the series."""
    if groups > 1 and not all(p.absolute for p in parts):
        parts = [replace(p, clock=None, clock_from="") for p in parts]
    if all(p.clock is not None for p in parts):
        ordered = sorted(parts, key=lambda p: p.clock or 0.0)
        for a, b in pairwise(ordered):
            if (b.clock or 0.0) - (a.clock or 0.0) < _SAME_TIME_S and a.frames[0].series != b.frames[0].series:
                if any((c.clock or 0.0) - (ordered[0].clock or 0.0) >= _SAME_TIME_S for c in ordered):
                    return Refusal(RefusalCode.PHASES_AMBIGUOUS, "two series were acquired at one time")
                break  # all at one time: a time of the study, which says nothing
        else:
            return ordered
    if groups == 1:
        return parts
    named = [dynamic_names.words_of(p.frames[0].instance.header.text("SeriesDescription"), rules) for p in parts]
    labels = [n.pop() if len(n) == 1 and p.of == 1 else "" for n, p in zip(named, parts, strict=True)]
    if "" in labels or len(set(labels)) < len(labels):
        return Refusal(RefusalCode.PHASES_AMBIGUOUS, "neither time nor description orders the series")
    parts = [replace(p, clock=None, clock_from="") for p in parts]
    return [p for _, p in sorted(zip(labels, parts, strict=True), key=lambda pair: ORDER.index(pair[0]))]


# --- the plan --------------------------------------------------------------------------------------------------------


def _planned(parts: list[Part], groups: int, rules: Rules, notes: dict[str, str]) -> Plan | Refusal:
    uids = {f.frame_of_reference for p in parts for f in p.frames}
    if len(uids) > 1 or (groups > 1 and uids == {""}):
        return Refusal(RefusalCode.FRAME_OF_REFERENCE_MISMATCH, f"{len(uids)} frames of reference")
    ordered = _ordered(_shortest_echo(parts, notes), groups, rules)
    if isinstance(ordered, Refusal):
        return ordered
    named = dynamic_names.name(ordered, rules)
    if isinstance(named, Refusal):
        return named
    phases: list[PhasePlan] = []
    for index, part in enumerate(ordered):
        phase = _phase(part, index, named)
        if isinstance(phase, Refusal):
            return phase
        phases.append(phase)
    refusal = _lost_slices(phases)
    if refusal is not None:
        return refusal
    how = sorted({p.rule for p in ordered if p.rule})
    notes |= dict(named.notes) | _times_from(ordered) | _written_spacing(phases)
    if own := own_rules(rules):
        notes["phase rules of the site"] = own
    if any(p.frames[0].part == "water" for p in ordered):
        notes["Dixon"] = "water images"
    private = _private_scale([f for p in ordered for f in p.frames])
    notes["values"] = "Philips floating point (2005,100E)" if private else "rescaled (0028,1053)"
    return Plan(
        tuple(phases), ", ".join(([_SERIES] if groups > 1 else []) + how), _reference(phases), uids.pop(),
        MappingProxyType(notes), private,
    )  # fmt: skip


def _shortest_echo(parts: list[Part], notes: dict[str, str]) -> list[Part]:
    """Echoes stored as series of their own: acquired at one time, in one geometry, with different echo times."""
    kept: list[Part] = []
    for part in sorted(parts, key=lambda p: p.frames[0].echo_ms or 0.0):
        twin = next((k for k in kept if _twins(k, part)), None)
        if twin is None:
            kept.append(part)
        else:
            notes["echo"] = "the shortest of several"
    return kept


def _twins(a: Part, b: Part) -> bool:
    ta, tb = a.frames[0].echo_ms, b.frames[0].echo_ms
    if a.clock is None or b.clock is None or ta is None or tb is None or a.of != b.of:
        return False
    apart = abs(a.clock - b.clock) < _SAME_TIME_S and abs(ta - tb) > dynamic_split.SAME_ECHO_MS
    return apart and len(a.frames) == len(b.frames) and a.frames[0].series != b.frames[0].series


def _phase(part: Part, index: int, named: dynamic_names.Named) -> PhasePlan | Refusal:
    first = part.frames[0]
    stacked = geometry.stack([f.plane for f in part.frames if f.plane is not None], first.rows, first.columns)
    if isinstance(stacked, Refusal):
        return Refusal(stacked.code, f"phase {index + 1}: {stacked.detail}")
    frames = tuple(part.frames[i] for i in stacked.order)
    return PhasePlan(named.names[index], named.named_by[index], named.seconds[index], stacked.grid, frames)


def _lost_slices(phases: Sequence[PhasePlan]) -> Refusal | None:
    """A phase that has fewer slices of the same lattice was cut short on the way, as far as anybody can tell."""
    whole = max(phases, key=lambda p: p.grid.shape[0])
    for index, phase in enumerate(phases, start=1):
        if geometry.is_part_of(phase.grid, whole.grid):
            short = f"phase {index}: {phase.grid.shape[0]} of {whole.grid.shape[0]} slices"
            return Refusal(RefusalCode.SLICE_MISSING, short)
    return None


def _written_spacing(phases: Sequence[PhasePlan]) -> dict[str, str]:
    """Where Spacing Between Slices (0018,0088) is not the distance of the slices: the positions count, and it is said.

    Slice Thickness (0018,0050) is not compared: gaps and interpolated slices make it another number by design.
    """
    off: dict[str, None] = {}
    for phase in phases:
        measured = float(phase.grid.edges[2])
        written = {f.written_spacing_mm for f in phase.frames if f.written_spacing_mm is not None}
        if phase.grid.shape[0] > 1:
            off |= {
                f"{measured:.2f} mm by position, {mm:.2f} mm written": None
                for mm in sorted(written)
                if math.isfinite(mm) and mm > 0 and abs(mm - measured) > _SPACING_OFF * measured
            }
    return {"slice spacing": f"{'; '.join(off)} (0018,0088): the positions were used"} if off else {}


def _reference(phases: Sequence[PhasePlan]) -> int:
    """The portal venous phase, in which the liver is best seen; without one the middle one."""
    names = [p.name for p in phases]
    return names.index(PORTAL) if PORTAL in names else len(phases) // 2


def _times_from(parts: Sequence[Part]) -> dict[str, str]:
    said = sorted({p.clock_from for p in parts if p.clock_from})
    return {"times": ", ".join(said) if said and all(p.clock is not None for p in parts) else "not known"}


def _private_scale(frames: Sequence[Frame]) -> bool:
    """Philips rescales what is shown. Where rescale slope times scale slope is not one constant, only the
    floating-point values, (stored * slope + intercept) / (slope * scale), are comparable between phases."""
    scales = [f.private_scale for f in frames]
    if any(s is None or s <= 0 for s in scales) or any(f.slope == 0 for f in frames):
        return False
    products = [abs(f.slope * (s or 1.0)) for f, s in zip(frames, scales, strict=True)]
    return max(products) - min(products) > _SAME_SCALE * max(products)


# --- pixels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """Where one frame goes."""

    frame: Frame
    phase: int
    slice: int


def load(found: Plan, pixels: FrameReader) -> Stack | Refusal:
    """Decode, rescale, lay all phases on one grid. Raises PixelsUndecodableError."""
    reference = found.phases[found.reference].grid
    moved = [i for i, p in enumerate(found.phases) if not geometry.same_grid(p.grid, reference)]
    grid = geometry.common(reference, [found.phases[i].grid for i in moved]) if moved else reference
    if isinstance(grid, Refusal):
        return grid
    volume = np.empty((len(found.phases), *grid.shape), dtype=np.float32)
    # On one grid the slices are decoded where they stay: a second array of this size costs more than the decoding.
    apart = [np.empty(p.grid.shape, dtype=np.float32) for p in found.phases] if moved else list(volume)
    refusal = _fill(apart, found, pixels)
    if refusal is not None:
        return refusal
    if moved:
        for index, phase in enumerate(found.phases):
            volume[index] = geometry.resample(apart[index], phase.grid, grid)
    volume.flags.writeable = False
    notes = dict(found.notes)
    if moved:
        notes["resampled"] = ", ".join(found.phases[i].name for i in moved)
    return Stack(
        volume, found.names, tuple(p.seconds for p in found.phases), grid.affine, found.rule,
        tuple(_refs(p, grid) for p in found.phases), found.frame_of_reference, MappingProxyType(notes),
    )  # fmt: skip


def _refs(phase: PhasePlan, grid: Grid) -> tuple[FrameRef, ...]:
    return tuple(phase.frames[geometry.nearest_slice(phase.grid, grid, s)].ref for s in range(grid.shape[0]))


def _fill(volumes: Sequence[NDArray[np.float32]], found: Plan, pixels: FrameReader) -> Refusal | None:
    by_instance: dict[str, tuple[Instance, list[_Wanted]]] = {}
    for p, phase in enumerate(found.phases):
        for s, frame in enumerate(phase.frames):
            instance = frame.instance
            by_instance.setdefault(instance.instance_id, (instance, []))[1].append(_Wanted(frame, p, s))
    for instance, wanted in by_instance.values():
        wanted.sort(key=lambda w: w.frame.number)
        numbers = tuple(w.frame.number for w in wanted)
        for want, stored in zip(wanted, pixels.frames(instance, numbers), strict=True):
            where = f"phase {want.phase + 1}, slice {want.slice + 1}"
            target = volumes[want.phase][want.slice]
            if stored.shape != target.shape:
                return Refusal(RefusalCode.PIXEL_FORMAT_MISMATCH, f"{where}: not of the size its headers say")
            if stored.min() == stored.max():
                return Refusal(RefusalCode.SLICE_EMPTY, where)
            if not _rescale(stored, want.frame, found.private_scale, target):
                return Refusal(RefusalCode.PIXEL_FORMAT_MISMATCH, f"{where}: rescale slope is zero or not finite")
    return None


def _rescale(stored: NDArray[Any], frame: Frame, private: bool, target: NDArray[np.float32]) -> bool:
    """PS3.3 C.11.1.1.2, C.7.6.16.2.9: stored * slope + intercept, in double precision, rounded once."""
    slope, intercept = frame.slope, frame.intercept
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        return False
    if private and frame.private_scale:
        divisor = slope * frame.private_scale
        slope, intercept = slope / divisor, intercept / divisor
    if (slope, intercept) == (1.0, 0.0):
        target[...] = stored
    else:
        target[...] = stored * np.float64(slope) + np.float64(intercept)
    return True

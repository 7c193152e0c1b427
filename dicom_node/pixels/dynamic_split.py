"""Frames → phases: what can be a stack together, and which attribute divides several images at one position. No I/O.

An attribute counts only when it divides n images at each of N positions into n phases of N exactly; one that nearly
does is evidence of something else, and is not repaired. Two that both do and disagree are a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels import geometry
from dicom_node.pixels.dynamic_model import Frame, Rules
from dicom_node.result import Refusal, RefusalCode

Key = Callable[[Frame], float | None]

SAME_ECHO_MS = 0.1
_BLOCKS = "InstanceNumber blocks"
_TIME = "AcquisitionTime"
KEYS = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "DimensionIndexValues", "TemporalPositionTimeOffset",
    "AcquisitionNumber", _TIME, "TriggerTime", "ContentTime",
)  # fmt: skip
"""In order of trust; contiguous blocks of Instance Number come after all of them."""
_TRUSTED = KEYS[:6]
"""These are written by the acquisition: where two of them divide exactly, they must divide alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The frames of one phase, and how they were found."""

    frames: tuple[Frame, ...]
    rule: str
    """"" = the only phase of its group."""
    index: int
    """Among the phases of its group, from 0."""
    of: int
    clock: float | None
    """Seconds; median time of acquisition, or counted from it; None where nothing tells the phases' times apart."""
    clock_from: str
    absolute: bool = True
    """False: the seconds begin at the group's first phase, and say nothing of other groups."""


def groups(frames: Sequence[Frame], rules: Rules) -> list[list[Frame]] | Refusal:
    """Frames that could be slices of one acquisition, split by series, Dixon part and echo.

    Groups of few positions are left out; a series that mixes orientations, sizes or frames of reference is refused.
    """
    by_series: dict[tuple[str, str], list[Frame]] = {}
    for frame in frames:
        by_series.setdefault((frame.series, frame.part), []).append(frame)
    clustered = [_clusters(echo) for of_series in by_series.values() for echo in _echoes(of_series)]
    models = [c[0] for clusters in clustered for c in clusters if _size(c) >= rules.minimum_slices]
    found: list[list[Frame]] = []
    for clusters in clustered:
        # Few slices of the geometry of a whole phase are what is left of one.
        if any(_alike(c[0], m) for c in clusters for m in models):
            refusal = _several(clusters)
            if refusal is not None:
                return refusal
            found.append(clusters[0])
    return found


def _echoes(frames: list[Frame]) -> list[list[Frame]]:
    """One list for each echo: by Echo Time, else by Echo Number."""
    times = sorted({f.echo_ms for f in frames if f.echo_ms is not None})
    starts = [t for i, t in enumerate(times) if i == 0 or t - times[i - 1] > SAME_ECHO_MS]
    echoes: dict[tuple[int, int], list[Frame]] = {}
    for frame in frames:
        of_time = -1 if frame.echo_ms is None else sum(s <= frame.echo_ms for s in starts)
        echoes.setdefault((of_time, -1 if frame.echo_number is None else frame.echo_number), []).append(frame)
    return [echoes[k] for k in sorted(echoes)]


def _clusters(frames: list[Frame]) -> list[list[Frame]]:
    """Frames of one geometry each."""
    clusters: list[list[Frame]] = []
    for frame in frames:
        for cluster in clusters:
            if _alike(cluster[0], frame):
                cluster.append(frame)
                break
        else:
            clusters.append([frame])
    return clusters


def _several(clusters: list[list[Frame]]) -> Refusal | None:
    """Why one series is not one geometry."""
    if any(c[0].plane is None for c in clusters):
        return Refusal(RefusalCode.GEOMETRY_MIXED, "slices do not say where they lie in the patient")
    if len({f.frame_of_reference for c in clusters for f in c}) > 1:
        return Refusal(RefusalCode.FRAME_OF_REFERENCE_MISMATCH, "several frames of reference in one series")
    if len(clusters) > 1:
        return Refusal(RefusalCode.GEOMETRY_MIXED, "one series holds slices of several orientations or sizes")
    if len({f.stored_as for f in clusters[0]}) > 1:
        return Refusal(RefusalCode.PIXEL_FORMAT_MISMATCH, "slices of one series differ in bits or sign")
    return None


def _size(frames: Sequence[Frame]) -> int:
    """Slice positions."""
    return len(frames) if frames[0].plane is None else int(_places(frames).max()) + 1


def _alike(a: Frame, b: Frame) -> bool:
    if (a.rows, a.columns, a.frame_of_reference) != (b.rows, b.columns, b.frame_of_reference):
        return False
    if a.plane is None or b.plane is None:
        return a.plane is b.plane
    return geometry.same_plane(a.plane, b.plane)


def _places(frames: Sequence[Frame]) -> NDArray[np.int64]:
    return geometry.places([f.plane for f in frames if f.plane is not None])


# --- several images at each position ---------------------------------------------------------------------------------


def split(frames: Sequence[Frame], clock: Key) -> list[Part] | Refusal:
    """The phases of one group, in order. `clock`: when a frame was acquired, made comparable over midnight."""
    where = _places(frames)
    counts = np.bincount(where)
    several = int(np.bincount(counts).argmax())  # what most positions hold
    refusal = _unequal(counts, several)
    if refusal is not None:
        return refusal
    if several == 1:
        return [_part(list(frames), "", 0, 1, clock)]
    exact = {name: order for name in KEYS if (order := _by_value(frames, where, several, _key(name, clock)))}
    name = next(iter(exact), "")
    if not name:
        order = _by_blocks(frames, where, several)
        if order is None:
            return Refusal(RefusalCode.PHASES_UNSEPARABLE, f"{several} images at each of {len(counts)} positions")
        name, exact = _BLOCKS, {_BLOCKS: order}
    refusal = _contradiction(exact, name) or _unfinished(frames, name, several)
    if refusal is not None:
        return refusal
    members: list[list[Frame]] = [[] for _ in range(several)]
    for frame, phase in zip(frames, exact[name], strict=True):
        members[phase].append(frame)
    return _timed([_part(m, name, i, several, clock) for i, m in enumerate(members)])


def _unequal(counts: NDArray[np.int64], several: int) -> Refusal | None:
    if np.all(counts == several):
        return None
    if np.count_nonzero(counts == several) * 2 <= len(counts):
        return Refusal(RefusalCode.PHASES_UNSEPARABLE, f"between {counts.min()} and {counts.max()} images a position")
    at = int(np.flatnonzero(counts != several)[0])
    code = RefusalCode.SLICE_MISSING if counts.min() < several else RefusalCode.SLICE_DUPLICATE
    return Refusal(code, f"{counts[at]} images at position {at + 1} of {len(counts)}, {several} at the others")


def _key(name: str, clock: Key) -> Key:
    return clock if name == _TIME else lambda frame: frame.keys.get(name)


def _by_value(frames: Sequence[Frame], where: NDArray[np.int64], several: int, key: Key) -> list[int] | None:
    """Phase of each frame by the order of the key's values; None unless it divides exactly."""
    values = [key(f) for f in frames]
    known = [v for v in values if v is not None]
    if len(known) != len(values):
        return None
    ranks = {v: i for i, v in enumerate(sorted(set(known)))}
    if len(ranks) != several:
        return None
    order = [ranks[v] for v in known]
    return order if _exact(order, where, several) else None


def _exact(order: Sequence[int], where: NDArray[np.int64], several: int) -> bool:
    """Every phase has every position once."""
    return len(set(zip(order, where.tolist(), strict=True))) == len(order) == several * (int(where.max()) + 1)


def _by_blocks(frames: Sequence[Frame], where: NDArray[np.int64], several: int) -> list[int] | None:
    """Phase of each frame where Instance Number runs through one phase after the other, in the same way in each.

    Some scanners say how long such a block is: Images in Acquisition.
    """
    count = len(frames) // several
    numbers = [(f.instance.header.number("InstanceNumber"), f.number) for f in frames]
    if any(n is None for n, _ in numbers) or len(set(numbers)) != len(numbers):
        return None
    said = {f.instance.header.number("ImagesInAcquisition") for f in frames} - {None}
    if not said <= {float(count), float(len(frames))}:
        return None
    sequence = sorted(range(len(frames)), key=lambda i: (numbers[i][0] or 0.0, numbers[i][1]))
    blocks = [sequence[i * count : (i + 1) * count] for i in range(several)]
    walk = where[blocks[0]].tolist()
    if walk not in (sorted(walk), sorted(walk, reverse=True)):
        return None
    if any(where[b].tolist() != walk for b in blocks) or any(_gaps([numbers[i] for i in b]) for b in blocks):
        return None
    order = [0] * len(frames)
    for phase, block in enumerate(blocks):
        for i in block:
            order[i] = phase
    return order


def _gaps(numbers: list[tuple[float | None, int]]) -> bool:
    steps = {((b[0] or 0.0) - (a[0] or 0.0), b[1] - a[1]) for a, b in pairwise(numbers)}
    return not steps <= {(1.0, 0), (0.0, 1)}


def _contradiction(exact: dict[str, list[int]], chosen: str) -> Refusal | None:
    for name in _TRUSTED:
        if name in exact and exact[name] != exact[chosen]:
            return Refusal(RefusalCode.PHASES_AMBIGUOUS, f"{chosen} and {name} divide the images differently")
    return None


def _unfinished(frames: Sequence[Frame], name: str, several: int) -> Refusal | None:
    """Number of Temporal Positions says how many phases there were to be."""
    if name not in ("TemporalPositionIdentifier", "TemporalPositionIndex"):
        return None
    said = {int(f.instance.header.number("NumberOfTemporalPositions") or several) for f in frames}
    if said == {several}:
        return None
    if min(said) > several:
        return Refusal(RefusalCode.PHASE_MISSING, f"{several} of {min(said)} temporal positions are there")
    return Refusal(RefusalCode.PHASES_AMBIGUOUS, f"{several} temporal positions, not as many as the images say")


# --- when ------------------------------------------------------------------------------------------------------------


def _part(frames: list[Frame], rule: str, index: int, of: int, clock: Key) -> Part:
    known = [t for f in frames if (t := clock(f)) is not None]
    return Part(tuple(frames), rule, index, of, median(known) if len(known) == len(frames) else None, _TIME)


def _timed(parts: list[Part]) -> list[Part] | Refusal:
    """Times that tell the phases of one group apart: of acquisition, else from a start, else phase by phase."""
    clocks = [p.clock for p in parts]
    rising = _rising(clocks)
    if rising is True:
        return parts
    if rising is False:
        return Refusal(RefusalCode.PHASES_AMBIGUOUS, f"{parts[0].rule} and {_TIME} order the phases differently")
    start = next((c for c in clocks if c is not None), None)
    name, offsets = _from_a_start(parts)
    if not offsets:
        return [replace(p, clock=None, clock_from="") for p in parts]
    return [
        replace(p, clock=(start or 0.0) + offset - offsets[0], clock_from=name, absolute=start is not None)
        for p, offset in zip(parts, offsets, strict=True)
    ]


def _rising(values: Sequence[float | None]) -> bool | None:
    """True: every one later than the last; False: one is earlier; None: they do not tell."""
    known = [v for v in values if v is not None]
    if any(b < a for a, b in pairwise(known)):
        return False
    return True if len(known) == len(values) and all(b > a for a, b in pairwise(known)) else None


def _from_a_start(parts: list[Part]) -> tuple[str, list[float]]:
    """Seconds of each phase from some start, by the first attribute that has one for every frame, and rises."""
    for name in ("TemporalPositionTimeOffset", "dynamic scan begin time (2005,10A0)", "TriggerTime"):
        values = [[f.offsets[name] for f in p.frames if name in f.offsets] for p in parts]
        if all(len(v) == len(p.frames) for p, v in zip(parts, values, strict=True)):
            offsets = [float(median(v)) for v in values]
            if _rising(offsets):
                return name, offsets
    steps = {f.instance.header.number("TemporalResolution") for p in parts for f in p.frames}
    milliseconds = steps.pop() if len(steps) == 1 else None
    if milliseconds is not None and milliseconds > 0:
        return "TemporalResolution", [i * milliseconds / 1000.0 for i in range(len(parts))]
    return "", []

"""Where a stack of slices lies in the patient: order, faults of the stack, one grid for several. Plain arithmetic.

Decided by Image Position (Patient) along the normal alone (PS3.3 C.7.6.2.1.1). Instance Number, Slice Location and
Spacing Between Slices are no evidence: scanners and archives renumber, and the last two are optional and often wrong.
Reads no file; a stack that cannot be trusted is a Refusal, never put right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.roi_model import Plane
from dicom_node.result import Refusal, RefusalCode

Vector = NDArray[np.float64]

SAME_COSINE = 1e-3
"""Direction cosines that differ by less are one direction: decimal strings are rounded (PS3.5 6.2)."""
SAME_SPACING_MM = 1e-3
SHEAR_MM = 0.5
"""Origins may leave the normal by this much a slice (a table that sags); beyond it is a tilted gantry."""
SAME_GRID = 0.05
"""Corners of one grid agree within this share of the smallest edge of a voxel."""
LEAST_COMMON = 0.5
"""Less than this share of the reference, on any axis, covered by all phases: these are not images of one thing."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Voxels in the patient: (column, row, slice, 1) → mm."""

    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.affine.flags.writeable = False

    @property
    def edges(self) -> Vector:
        """Voxel size in mm: column, row, slice."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0), dtype=np.float64)

    def corners(self) -> Vector:
        """(8, 3) centres of the outermost voxels, mm."""
        depth, rows, columns = self.shape
        ends = np.array(
            [[c, r, s, 1] for c in (0, columns - 1) for r in (0, rows - 1) for s in (0, depth - 1)], dtype=np.float64
        )
        return np.asarray((ends @ self.affine.T)[:, :3], dtype=np.float64)

    def crop(self, low: tuple[int, int, int], shape: tuple[int, int, int]) -> Grid:
        """The part that begins at `low` (slice, row, column)."""
        affine = self.affine.copy()
        affine[:, 3] = affine @ np.array([low[2], low[1], low[0], 1.0])
        return Grid(shape, affine)


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """A stack in order along its normal."""

    grid: Grid
    order: tuple[int, ...]
    """Indices into what was given."""


def same_plane(a: Plane, b: Plane) -> bool:
    """One orientation and one pixel spacing: the two could be slices of one stack."""
    ca, cb = np.linalg.norm(a.column_step), np.linalg.norm(b.column_step)
    ra, rb = np.linalg.norm(a.row_step), np.linalg.norm(b.row_step)
    if abs(ca - cb) > SAME_SPACING_MM or abs(ra - rb) > SAME_SPACING_MM:
        return False
    turn = max(np.abs(a.column_step / ca - b.column_step / cb).max(), np.abs(a.row_step / ra - b.row_step / rb).max())
    return bool(turn <= SAME_COSINE)


def positions(planes: Sequence[Plane]) -> Vector:
    """Place of every slice along the normal of the first, mm."""
    return np.asarray(np.array([p.origin for p in planes]) @ planes[0].normal, dtype=np.float64)


def places(planes: Sequence[Plane]) -> NDArray[np.int64]:
    """Number of the slice position each plane stands on, from 0 along the normal, where positions may repeat.

    Two stand on one position when they are nearer than 10 % of the spacing, or 0.1 mm.
    """
    along = positions(planes)
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    apart = gaps[gaps > 0.1]
    step = gaps > max(0.1, 0.1 * float(np.median(apart)) if len(apart) else 0.0)
    found = np.empty(len(planes), dtype=np.int64)
    found[order] = np.concatenate([[0], np.cumsum(step)])
    return found


def stack(planes: Sequence[Plane], rows: int, columns: int) -> Ordered | Refusal:
    """One slice at each position, equally spaced along the normal, or why not."""
    first = planes[0]
    if not all(same_plane(first, p) for p in planes[1:]):
        return Refusal(RefusalCode.GEOMETRY_MIXED, "slices of one stack differ in orientation or pixel spacing")
    along = positions(planes)
    order = np.argsort(along, kind="stable")
    origins = np.array([planes[i].origin for i in order])
    refusal = _uneven(along[order]) or _sheared(origins, first.normal)
    if refusal is not None:
        return refusal
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = first.column_step, first.row_step, origins[0]
    count = len(planes)
    affine[:3, 2] = (origins[-1] - origins[0]) / (count - 1) if count > 1 else first.normal * (first.thickness or 1.0)
    return Ordered(Grid((count, rows, columns), affine), tuple(int(i) for i in order))


def _uneven(along: Vector) -> Refusal | None:
    gaps = np.diff(along)
    if not len(gaps):
        return None
    apart = gaps[gaps > 0.1]
    if not len(apart):
        return Refusal(RefusalCode.SLICE_DUPLICATE, f"{len(along)} slices at one position")
    step = float(np.median(apart))
    same = np.flatnonzero(gaps <= max(0.1, 0.1 * step))
    if len(same):
        return Refusal(RefusalCode.SLICE_DUPLICATE, f"two slices at position {int(same[0]) + 1} of {len(along)}")
    off = np.flatnonzero(np.abs(gaps - step) > max(0.01 * step, 0.05))
    if not len(off):
        return None
    at = int(off[0])
    share = gaps[off] / step
    if np.all(np.round(share) >= 2) and np.all(np.abs(share - np.round(share)) < 0.1):
        return Refusal(RefusalCode.SLICE_MISSING, f"nothing between positions {at + 1} and {at + 2} of {len(along)}")
    return Refusal(RefusalCode.SLICE_SPACING_UNEVEN, f"gap {gaps[at]:.2f} mm after position {at + 1}, else {step:.2f}")


def _sheared(origins: Vector, normal: Vector) -> Refusal | None:
    """Origins must go along the normal, not merely on a straight line: else the affine is a parallelepiped's."""
    if len(origins) < 2:
        return None
    steps = np.diff(origins, axis=0)
    drift = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1)
    worst = float(drift.max())
    if worst <= SHEAR_MM:
        return None
    return Refusal(RefusalCode.GEOMETRY_SHEAR, f"slices are shifted by {worst:.2f} mm across their normal")


# --- several grids ---------------------------------------------------------------------------------------------------


def same_grid(a: Grid, b: Grid) -> bool:
    """The voxels of one are those of the other."""
    if a.shape != b.shape:
        return False
    return bool(np.linalg.norm(a.corners() - b.corners(), axis=1).max() <= SAME_GRID * a.edges.min())


def is_part_of(part: Grid, whole: Grid) -> bool:
    """Fewer slices of the very lattice of `whole`: slices were lost, or never sent."""
    if part.shape[1:] != whole.shape[1:] or part.shape[0] >= whole.shape[0]:
        return False
    to_whole = np.linalg.inv(whole.affine) @ part.affine
    last = to_whole @ np.array([0.0, 0.0, part.shape[0] - 1, 1.0])
    first = to_whole[:, 3]
    near = all(np.abs(p[:2]).max() < SAME_GRID and abs(p[2] - round(p[2])) < SAME_GRID for p in (first, last))
    inside = first[2] > -0.5 and last[2] < whole.shape[0] - 0.5
    return bool(near and inside and np.abs(to_whole[:3, :3] - np.eye(3)).max() < SAME_COSINE)


def common(reference: Grid, others: Sequence[Grid]) -> Grid | Refusal:
    """The largest box of the reference's voxels that every other grid covers, so that nothing is made up."""
    inside = np.ones(reference.shape, dtype=np.bool_)
    for grid in others:
        inside &= _covered(reference, grid)
    low, high = [0, 0, 0], list(reference.shape)
    while True:
        box = inside[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        if box.size and box.all():
            break
        if any(h - lo <= n * LEAST_COMMON for lo, h, n in zip(low, high, reference.shape, strict=True)):
            return Refusal(RefusalCode.PHASE_COVERAGE, "the phases show less than half of the reference in common")
        _trim(box, low, high)
    if any(h - lo < n * LEAST_COMMON for lo, h, n in zip(low, high, reference.shape, strict=True)):
        return Refusal(RefusalCode.PHASE_COVERAGE, "the phases show less than half of the reference in common")
    return reference.crop((low[0], low[1], low[2]), (high[0] - low[0], high[1] - low[1], high[2] - low[2]))


def _trim(box: NDArray[np.bool_], low: list[int], high: list[int]) -> None:
    """Give up the face of the box that is covered least."""
    faces = [(float(np.take(box, index, axis=axis).mean()), axis, index) for axis in range(3) for index in (0, -1)]
    _, axis, index = min(faces)
    if index == 0:
        low[axis] += 1
    else:
        high[axis] -= 1


def _covered(reference: Grid, grid: Grid) -> NDArray[np.bool_]:
    """Voxels of the reference whose centre lies in a voxel of `grid`."""
    to_grid = np.linalg.inv(grid.affine) @ reference.affine
    depth, rows, columns = reference.shape
    slices, lines, across = np.ogrid[:depth, :rows, :columns]
    inside = np.ones(reference.shape, dtype=np.bool_)
    for axis, size in enumerate((grid.shape[2], grid.shape[1], grid.shape[0])):
        at = to_grid[axis, 0] * across + to_grid[axis, 1] * lines + to_grid[axis, 2] * slices + to_grid[axis, 3]
        inside &= (at > -0.5 - 1e-6) & (at < size - 0.5 + 1e-6)
    return inside


def resample(volume: NDArray[np.float32], grid: Grid, onto: Grid) -> NDArray[np.float32]:
    """The volume of `grid` on the voxels of `onto`, linearly, in patient space. Every voxel must be covered."""
    from scipy.ndimage import affine_transform

    back = np.linalg.inv(grid.affine) @ onto.affine
    # The arrays run slice, row, column; the affines column, row, slice.
    matrix, offset = back[:3, :3][::-1, ::-1], back[:3, 3][::-1]
    out = affine_transform(
        volume, matrix, offset=offset, output_shape=onto.shape, output=np.float32, order=1, mode="nearest"
    )
    return np.asarray(out, dtype=np.float32)


def nearest_slice(grid: Grid, onto: Grid, index: int) -> int:
    """Slice of `grid` nearest to the middle of slice `index` of `onto`."""
    middle = onto.affine @ np.array([(onto.shape[2] - 1) / 2, (onto.shape[1] - 1) / 2, index, 1.0])
    at = (np.linalg.inv(grid.affine) @ middle)[2]
    return int(np.clip(round(float(at)), 0, grid.shape[0] - 1))

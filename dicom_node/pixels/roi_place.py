"""A region → masks: on the frames of one image, or on a grid in the patient. Decodes the frames of segmentations.

On an image without a place in the patient (ultrasound) a region counts by what it refers to; else by geometry, nearest
neighbour: a voxel takes the pixel its centre lies in, of the plane nearest to it, none farther than half the distance
between planes. In between nothing is interpolated, so a mask on the grid it was drawn on comes back as it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels import roi_raster
from dicom_node.pixels.roi_model import (
    FARTHEST_MM,
    Contour,
    FrameReader,
    Outline,
    Plane,
    Raster,
    Region,
    UnreadableError,
    Vector,
    planes,
)
from dicom_node.pixels.roi_seg import spacing
from dicom_node.study import Header, Instance

Mask = NDArray[np.bool_]
MAX_FRAMES = 100_000
_FLAT_MM = 1.0
"""A contour may leave its plane by this much (decimal strings, oblique slices)."""
_FINER = 4
"""A contour across the slices is rasterised on pixels so many times smaller than the grid's."""
_EDGE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Voxels in the patient."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    """(column, row, slice, 1) → mm."""

    @property
    def slice_mm(self) -> float:
        """Distance between slices."""
        normal = np.cross(self.affine[:3, 0], self.affine[:3, 1])
        return float(abs(self.affine[:3, 2] @ normal) / np.linalg.norm(normal))

    @classmethod
    def of(cls, plane: Plane, rows: int, columns: int) -> Grid:
        """One image as a grid of one slice."""
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1], affine[:3, 3] = plane.column_step, plane.row_step, plane.origin
        affine[:3, 2] = plane.normal * (plane.thickness or 1.0)
        return cls((1, rows, columns), affine)


@dataclass(frozen=True, slots=True, eq=False)
class _Slab:
    """A mask on a plane of the patient."""

    mask: Mask
    plane: Plane
    thickness: float


# --- on the frames of one image --------------------------------------------------------------------------------------


def on_image(region: Region, instance: Instance, pixels: FrameReader) -> dict[int, Mask]:
    """Frame number → mask, frames without a pixel inside left out. Raises UnreadableError."""
    rows, columns = _size(instance.header)
    found: dict[int, Mask] = {}
    for frames, mask in _by_reference(region, instance, pixels, rows, columns):
        if mask.any():
            for frame in frames:
                found[frame] = found[frame] | mask if frame in found else mask
    if not found and _same_frame(region, instance.header.text("FrameOfReferenceUID")):
        for frame, plane in enumerate(planes(instance.header), start=1):
            if plane is not None:
                mask = on_grid(region, Grid.of(plane, rows, columns), {}, pixels)[0]
                if mask.any():
                    found[frame] = mask
    in_patient = any(isinstance(d, Contour) for d in region.drawings)
    if in_patient and instance.sop_instance_uid in region.refers and not any(planes(instance.header)):
        raise UnreadableError("its contours are in mm of the patient, and the image has no place there")
    return dict(sorted(found.items()))


def _by_reference(
    region: Region, instance: Instance, pixels: FrameReader, rows: int, columns: int
) -> Iterator[tuple[Iterable[int], Mask]]:
    uid = instance.sop_instance_uid
    rasters = [d for d in region.drawings if isinstance(d, Raster) and uid in d.on]
    if rasters and (rows, columns) != _size(region.source.header):
        if not _placeable(region, instance):
            raise UnreadableError("the segmentation has not the size of the image")
        return  # by geometry, then
    for order, (raster, mask) in enumerate(_decoded(region, rasters, pixels)):
        yield _frames(raster.on[uid], order, len(rasters), instance.number_of_frames), mask
    for drawing in region.drawings:
        if isinstance(drawing, Outline) and uid in drawing.on:
            points = _in_pixels(drawing)
            frames = _frames(drawing.on[uid], 0, 1, instance.number_of_frames)
            yield frames, roi_raster.draw(drawing.shape, points, rows, columns)


def _frames(said: frozenset[int], order: int, of: int, count: int) -> Iterable[int]:
    """The frames one drawing stands on. Unsaid: all of them, or, where there is one drawing a frame, each its own."""
    if said:
        if not all(1 <= n <= count for n in said):
            raise UnreadableError("a region refers to a frame that the image does not have")
        return said
    if count > MAX_FRAMES:
        raise UnreadableError("the image has too many frames")
    if of == 1 or count == 1:
        return range(1, count + 1)
    if of == count:
        return (order + 1,)
    raise UnreadableError("nothing says which of its frames stands on which frame of the image")


def _placeable(region: Region, instance: Instance) -> bool:
    known = any(p is not None for p in planes(instance.header))
    return known and _same_frame(region, instance.header.text("FrameOfReferenceUID")) and _has_geometry(region)


def _has_geometry(region: Region) -> bool:
    return all(isinstance(d, Contour) or (isinstance(d, Raster) and d.plane is not None) for d in region.drawings)


def _same_frame(region: Region, frame_of_reference: str) -> bool:
    return bool(frame_of_reference) and region.frame_of_reference == frame_of_reference


def _decoded(region: Region, rasters: list[Raster], pixels: FrameReader) -> Iterator[tuple[Raster, Mask]]:
    """One frame at a time."""
    if not rasters:
        return
    frames = pixels.frames(region.source, tuple(r.frame for r in rasters))
    for raster, frame in zip(rasters, frames, strict=True):
        if frame.ndim != 2:
            raise UnreadableError("a segmentation in colours")
        yield raster, frame == region.segment if region.segment is not None else frame >= region.half


def _size(header: Header) -> tuple[int, int]:
    return int(header.number("Rows") or 0), int(header.number("Columns") or 0)


def _in_pixels(drawing: Outline) -> NDArray[np.float64]:
    """Fractions of the displayed area → pixels (PS3.3 C.10.4, C.10.6): undo the flip, then the rotation."""
    if drawing.shown is None:
        return drawing.points
    corners = (
        drawing.shown.texts("DisplayedAreaTopLeftHandCorner"),
        drawing.shown.texts("DisplayedAreaBottomRightHandCorner"),
    )
    try:
        (x0, y0), (x1, y1) = ((int(x), int(y)) for x, y in corners)
        turn = int(drawing.shown.number("ImageRotation") or 0) % 360
    except ValueError:
        raise UnreadableError("the presentation state does not say which area it shows") from None
    u, v = drawing.points[:, 0], drawing.points[:, 1]
    if drawing.shown.text("ImageHorizontalFlip").strip().upper() == "Y":
        u = 1 - u
    turned = {0: (u, v), 90: (v, 1 - u), 180: (1 - u, 1 - v), 270: (1 - v, u)}
    if turn not in turned:
        raise UnreadableError("the presentation state turns the image by no right angle")
    s, t = turned[turn]
    left, right, top, bottom = min(x0, x1) - 1, max(x0, x1), min(y0, y1) - 1, max(y0, y1)  # pixels count from 1\1
    return np.stack([left + s * (right - left), top + t * (bottom - top)], axis=1)


# --- on a grid in the patient ----------------------------------------------------------------------------------------


def on_grid(region: Region, grid: Grid, images: Mapping[str, Instance], pixels: FrameReader) -> Mask:
    """(D, H, W). `images`: the source images by SOP Instance UID, whose own planes carry what refers to them only."""
    volume = np.zeros(grid.shape, dtype=np.bool_)
    for slab in _slabs(region, grid, images, pixels):
        _put(slab, grid, volume)
    return volume


def _slabs(region: Region, grid: Grid, images: Mapping[str, Instance], pixels: FrameReader) -> Iterator[_Slab]:
    rasters = [d for d in region.drawings if isinstance(d, Raster)]
    own = [r.plane for r in rasters if r.plane is not None]
    if len(own) == len(rasters):
        apart = (spacing(_all_planes(region)) if own else 0.0) or max(own[0].thickness if own else 0.0, grid.slice_mm)
        for raster, mask in _decoded(region, rasters, pixels):
            if raster.plane is not None:
                yield _Slab(mask, raster.plane, apart)
    else:
        for raster, mask in _decoded(region, rasters, pixels):
            for plane, size in _image_planes(raster, images):
                if mask.shape != size:
                    raise UnreadableError("the segmentation has not the size of the image")
                yield _Slab(mask, plane, grid.slice_mm)
    for drawing in region.drawings:
        if isinstance(drawing, Outline):
            for plane, size in _image_planes(drawing, images):
                points = _in_pixels(drawing)
                yield _Slab(roi_raster.draw(drawing.shape, points, *size), plane, grid.slice_mm)
    yield from _contour_slabs([d for d in region.drawings if isinstance(d, Contour)], grid)


def _all_planes(region: Region) -> list[Plane]:
    """Of the whole object: a small lesion has too few slices of its own to tell how far apart they lie."""
    return [p for p in planes(region.source.header) if p is not None]


def _image_planes(drawing: Raster | Outline, images: Mapping[str, Instance]) -> Iterator[tuple[Plane, tuple[int, int]]]:
    for uid, frames in drawing.on.items():
        if uid in images:
            header = images[uid].header
            for frame, plane in enumerate(planes(header), start=1):
                if frames and frame not in frames:
                    continue
                if plane is None:
                    raise UnreadableError("the image it was drawn on has no place in the patient")
                yield plane, _size(header)


def _put(slab: _Slab, grid: Grid, volume: Mask) -> None:
    """Set the voxels whose centres lie in the slab. Half-open: between two planes one of them wins."""
    normal = slab.plane.normal
    to_plane = np.linalg.inv(np.stack([slab.plane.column_step, slab.plane.row_step, normal], axis=1))
    matrix = to_plane @ grid.affine[:3, :3]
    offset = to_plane @ (grid.affine[:3, 3] - slab.plane.origin)
    depth, height, width = grid.shape
    half = slab.thickness / 2
    column, row = np.arange(width)[None, :], np.arange(height)[:, None]
    reach = abs(matrix[2, 0]) * (width - 1) + abs(matrix[2, 1]) * (height - 1)
    for k in range(depth):
        base = matrix[:, 2] * k + offset
        if abs(base[2]) > half + reach + _EDGE:
            continue
        distance = matrix[2, 0] * column + matrix[2, 1] * row + base[2]
        hit = (distance >= -half - _EDGE) & (distance < half - _EDGE)
        if not hit.any():
            continue
        x = np.floor(matrix[0, 0] * column + matrix[0, 1] * row + base[0] + 0.5 + _EDGE).astype(np.int64)
        y = np.floor(matrix[1, 0] * column + matrix[1, 1] * row + base[1] + 0.5 + _EDGE).astype(np.int64)
        rows, columns = slab.mask.shape
        hit = hit & (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
        volume[k] |= hit & slab.mask[np.clip(y, 0, rows - 1), np.clip(x, 0, columns - 1)]


# --- contours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """A contour with its plane."""

    points: NDArray[np.float64]
    normal: Vector
    offset: float


def _contour_slabs(contours: list[Contour], grid: Grid) -> Iterator[_Slab]:
    """One mask a plane. Contours of one plane cut holes into each other (PS3.3 C.8.8.6.3, as planning systems do)."""
    flat: list[_Flat] = []
    for contour in contours:
        flat.append(_flatten(contour, flat[0].normal if flat else None))
    stacks: list[list[_Flat]] = []
    for one in sorted(flat, key=lambda f: f.offset):
        if stacks and one.offset - stacks[-1][0].offset < 0.01 and stacks[-1][0].normal @ one.normal > 0.999:
            stacks[-1].append(one)
        else:
            stacks.append([one])
    offsets = [s[0].offset for s in stacks]
    gaps = [b - a for a, b in pairwise(offsets) if b - a > 0.01]
    for stack in stacks:
        yield _slab_of(stack, min(gaps, default=0.0) or grid.slice_mm, grid)


def _flatten(contour: Contour, like: Vector | None) -> _Flat:
    points = contour.points
    if np.abs(points).max(initial=0.0) > FARTHEST_MM:
        raise UnreadableError("an outline lies outside of every image")
    area = np.cross(points - points[0], np.roll(points, -1, axis=0) - points[0]).sum(axis=0)  # Newell's normal
    length = float(np.linalg.norm(area))
    if len(points) < 3 or length < 1e-9:
        raise UnreadableError("a contour encloses nothing")
    normal = area / length
    if like is not None and normal @ like < 0:
        normal = -normal
    along = points @ normal
    if np.ptp(along) > 2 * _FLAT_MM:
        raise UnreadableError("a contour is not planar")
    return _Flat(points, normal, float(along.mean()))


def _slab_of(stack: list[_Flat], thickness: float, grid: Grid) -> _Slab:
    project, plane, rows, columns = _canvas(stack, grid)
    mask = np.zeros((rows, columns), dtype=np.bool_)
    for one in stack:
        mask ^= roi_raster.draw("POLYLINE", project(one.points) + 0.5, rows, columns)
    return _Slab(mask, plane, thickness)


def _canvas(
    stack: list[_Flat], grid: Grid
) -> tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], Plane, int, int]:
    """Where to rasterise: on the grid's own pixels where the contour runs along its slices, else on its own."""
    column, row = grid.affine[:3, 0], grid.affine[:3, 1]
    normal, offset = stack[0].normal, stack[0].offset
    across = np.cross(column, row) / np.linalg.norm(np.cross(column, row))
    if abs(across @ normal) > 0.9999:
        shift = offset * float(np.sign(across @ normal)) - float(across @ grid.affine[:3, 3])
        origin = grid.affine[:3, 3] + across * shift
        rows, columns = grid.shape[1:]
    else:
        step = float(min(np.linalg.norm(column), np.linalg.norm(row))) / _FINER
        axis = np.eye(3)[np.argmin(np.abs(normal))]
        column = axis - (axis @ normal) * normal
        column = column / np.linalg.norm(column) * step
        row = np.cross(normal, column)
        points = np.vstack([one.points for one in stack])
        low = np.array([(points @ column).min(), (points @ row).min()]) / step
        high = np.array([(points @ column).max(), (points @ row).max()]) / step
        # Borders of pixels, not centres, on the borders of the contour.
        origin = normal * offset + (low[0] - step / 2) * column / step + (low[1] - step / 2) * row / step
        columns, rows = (int(n) for n in np.ceil((high - low) / step) + 3)
        if rows * columns > roi_raster.MAX_PIXELS:
            raise UnreadableError("a contour is too large")
    inverse = np.linalg.pinv(np.stack([column, row], axis=1))

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((points - origin) @ inverse.T, dtype=np.float64)

    return project, Plane(origin, column, row, 0.0), rows, columns

"""Outlines → masks: a pixel belongs to a region when its centre lies inside. Pure numpy (scipy for the spline).

The rule is exact and half-open: a centre on the left or upper border of a polygon is inside, one on the right or lower
border is not, so that two regions that share an edge share no pixel. A polygon that crosses itself follows the even-odd
rule. Coordinates: the centre of pixel (column, row) lies at (column + 0.5, row + 0.5) (PS3.3 C.18.6, C.10.5.1.2).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.roi_model import UnreadableError

MAX_PIXELS: Final = 1 << 26
MAX_CROSSINGS: Final = 20_000_000
"""Of the edges of one polygon with rows of pixels: 8 bytes each, three times."""
SPLINE_STEPS: Final = 16

Mask = NDArray[np.bool_]
Points = NDArray[np.float64]


def draw(shape: str, points: Points, rows: int, columns: int) -> Mask:
    """The mask of one outline: POLYLINE and INTERPOLATED closed, CIRCLE, ELLIPSE. Raises UnreadableError."""
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableError("the image is too large for a region of interest")
    if not np.isfinite(points).all() or np.abs(points).max(initial=0.0) > 1e6:
        raise UnreadableError("an outline lies outside of every image")
    if shape == "CIRCLE" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        return _ellipse(points[0], np.array([radius, 0.0]), radius, rows, columns)
    if shape == "ELLIPSE" and len(points) == 4:
        return _four_points(points, rows, columns)
    if shape == "POLYLINE" and len(points) >= 3:
        return polygon(points, rows, columns)
    if shape == "INTERPOLATED" and len(points) >= 4:
        return polygon(_smooth(points), rows, columns)
    raise UnreadableError("an outline has too few points, or too many")


def polygon(points: Points, rows: int, columns: int) -> Mask:
    """Even-odd fill; the last point need not repeat the first."""
    mask = np.zeros((rows, columns), dtype=np.bool_)
    start, stop = points, np.roll(points, -1, axis=0)
    upward = start[:, 1] <= stop[:, 1]
    low, high = np.where(upward[:, None], start, stop), np.where(upward[:, None], stop, start)
    first = np.clip(np.ceil(low[:, 1] - 0.5), 0, rows).astype(np.int64)
    last = np.clip(np.ceil(high[:, 1] - 0.5), 0, rows).astype(np.int64)  # half-open: this row is not crossed
    count = last - first
    if not count.any():
        return mask
    if count.sum() > MAX_CROSSINGS:
        raise UnreadableError("an outline is too long")
    edge = np.repeat(np.arange(len(points)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    share = (row + 0.5 - low[edge, 1]) / (high[edge, 1] - low[edge, 1])
    x = low[edge, 0] + share * (high[edge, 0] - low[edge, 0])
    column = np.clip(np.ceil(x - 0.5), 0, columns).astype(np.int64)
    top, bottom = int(first[count > 0].min()), int(last[count > 0].max())
    left, right = int(column.min()), int(column.max())
    toggles = np.zeros((bottom - top, right - left + 1), dtype=np.uint8)
    np.add.at(toggles, (row - top, column - left), 1)  # modulo 256 keeps the parity
    inside = np.add.accumulate(toggles, axis=1, dtype=np.uint8) & 1
    mask[top:bottom, left:right] = inside[:, : right - left]
    return mask


def _four_points(points: Points, rows: int, columns: int) -> Mask:
    """Ends of the major axis, ends of the minor axis (PS3.3 C.18.6.1.2): the centre is their mean."""
    major, minor = points[1] - points[0], points[3] - points[2]
    return _ellipse(points.mean(axis=0), major / 2, float(np.hypot(*minor)) / 2, rows, columns)


def _ellipse(centre: Points, major: Points, minor: float, rows: int, columns: int) -> Mask:
    mask = np.zeros((rows, columns), dtype=np.bool_)
    length = float(np.hypot(*major))
    if length <= 0 or minor <= 0:
        return mask
    reach = max(length, minor)
    x0, y0 = np.clip(np.floor(centre - reach), 0, (columns, rows)).astype(int)
    x1, y1 = np.clip(np.ceil(centre + reach), 0, (columns, rows)).astype(int)
    dx = np.arange(x0, x1)[None, :] + 0.5 - centre[0]
    dy = np.arange(y0, y1)[:, None] + 0.5 - centre[1]
    along = (dx * major[0] + dy * major[1]) / length
    across = (dy * major[0] - dx * major[1]) / length
    mask[y0:y1, x0:x1] = (along / length) ** 2 + (across / minor) ** 2 <= 1.0
    return mask


def _smooth(points: Points) -> Points:
    """A periodic cubic spline by chord length: INTERPOLATED leaves the curve to the reader (PS3.3 C.10.5.1.2)."""
    from scipy.interpolate import CubicSpline

    ring = points[
        np.hypot(*(points - np.roll(points, 1, axis=0)).T) > 1e-3
    ]  # no point twice, nor the first as the last
    if len(ring) < 3:
        raise UnreadableError("an outline has too few points")
    closed = np.vstack([ring, ring[:1]])
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    steps = np.concatenate([np.linspace(a, b, SPLINE_STEPS, endpoint=False) for a, b in pairwise(at)])
    return np.asarray(CubicSpline(at, closed, bc_type="periodic")(steps), dtype=np.float64)

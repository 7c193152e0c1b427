"""One frame as numbers: grey values, size, colour. Pure numpy; knows no DICOM attribute and does no I/O.

Stands under `ultrasound.py` and the engines, which import these names from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIT = 24
"""Grey level under which hue is noise (also what a lossy codec makes of black)."""


def to_gray(frame: NDArray[Any], bits_stored: int = 16) -> NDArray[np.uint8]:
    """Grey values 0..255. RGB by the luma weights of ITU-R BT.601 in integers, so that R = G = B is kept exactly.

    A frame deeper than 8 bits loses its low bits by `bits_stored`: never by its own maximum, because a scale that
    changes from frame to frame would bend every time-intensity curve.
    """
    if frame.dtype != np.uint8:
        frame = np.clip(frame >> max(bits_stored - 8, 0), 0, 255).astype(np.uint8)
    if frame.ndim == 2:
        return frame
    wide = frame[..., 0] * np.uint16(77)
    wide += frame[..., 1] * np.uint16(150)
    wide += frame[..., 2] * np.uint16(29)
    wide += np.uint16(128)
    return (wide >> 8).astype(np.uint8)


def resize(frame: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """(H, W) or (H, W, C) to `size` = (height, width): area average where it shrinks, bilinear where it grows.

    Sums run in a fixed order (no BLAS), so every machine gives the same bits.
    """
    if min(size) < 1 or min(frame.shape[:2]) < 1:
        raise ValueError("resize: both sizes must be at least 1 pixel")
    out = _resize_axis(_resize_axis(frame, 0, size[0]), 1, size[1])
    return np.ascontiguousarray(out, dtype=np.float32)


def _resize_axis(a: NDArray[Any], axis: int, n: int) -> NDArray[Any]:
    m = a.shape[axis]
    if n == m:
        return a
    along = (slice(None),) * axis
    weight_shape = [1] * a.ndim
    weight_shape[axis] = n
    if n < m:
        # Integral along the axis, read at the (fractional) borders of the new pixels: an exact box average.
        total = np.zeros(
            (*a.shape[:axis], m + 1, *a.shape[axis + 1 :]), np.int32 if a.dtype == np.uint8 else np.float64
        )
        np.cumsum(a, axis=axis, dtype=total.dtype, out=total[(*along, slice(1, None))])
        edges = np.arange(n + 1) * (m / n)
        low = np.minimum(edges.astype(np.intp), m - 1)
        weight_shape[axis] = n + 1
        part = (edges - low).reshape(weight_shape)
        at = total.take(low, axis=axis).astype(np.float64)
        at += (total.take(low + 1, axis=axis) - at) * part
        return np.diff(at, axis=axis) * (n / m)
    # Pixel centres of the new grid in the old one; the border is repeated (half-pixel convention).
    centre = np.clip((np.arange(n) + 0.5) * (m / n) - 0.5, 0, m - 1)
    low = np.minimum(centre.astype(np.intp), max(m - 2, 0))
    part = (centre - low).reshape(weight_shape)
    below = a.take(low, axis=axis).astype(np.float64)
    return below + (a.take(np.minimum(low + 1, m - 1), axis=axis) - below) * part


def chroma(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The distance from grey per pixel: largest less smallest of R, G, B (0 for a grey frame)."""
    if frame.ndim == 2:
        return np.zeros(frame.shape, dtype=np.uint8)
    darkest = np.minimum(np.minimum(frame[..., 0], frame[..., 1]), frame[..., 2])
    return np.asarray(brightest(frame) - darkest, dtype=np.uint8)


def brightest(frame: NDArray[Any]) -> NDArray[Any]:
    """Largest of R, G, B per pixel. Channel by channel: a reduction over an axis of three takes ten times as long."""
    return np.asarray(np.maximum(np.maximum(frame[..., 0], frame[..., 1]), frame[..., 2]))


def tint(frame: NDArray[np.uint8]) -> float:
    """Median chroma of the lit pixels, relative to their brightness: 0 = grey, about 0.3..0.7 = a sepia or gold map."""
    if frame.ndim == 2:
        return 0.0
    bright = brightest(frame)
    lit = bright > _LIT
    if not lit.any():
        return 0.0
    return float(np.median(chroma(frame)[lit] / bright[lit].astype(np.float32)))


def has_color(frames: Iterable[NDArray[np.uint8]]) -> bool:
    """True when a minority of the lit pixels leaves the hue of the rest: the sign of colour or power Doppler.

    A tinted grey map (sepia B-mode, gold contrast) colours all lit pixels alike and is not colour data. Give the crop
    of one region: a dual display with one tinted panel has two hues, and a colour bar stands outside the region.
    """
    for frame in frames:
        if frame.ndim == 2:
            continue
        step = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // 65536))  # a flow is never one pixel wide
        frame = frame[::step, ::step]
        bright = brightest(frame)
        lit = frame[bright > 2 * _LIT].astype(np.float32)
        if len(lit) < 64:
            continue
        most = brightest(lit)
        away = np.zeros(len(lit), np.bool_)
        for channel in (0, 2):
            hue = (lit[:, channel] - lit[:, 1]) / most
            away |= np.abs(hue - np.median(hue)) > 0.35
        # Half a per cent of what is lit and 0.2 % of the picture: calipers, a logo and measurements stay under it.
        if away.mean() > 0.005 and away.sum() > 0.002 * bright.size:
            return True
    return False


def is_plausible_bmode(frame: NDArray[Any]) -> bool:
    """Does this crop look like a B-mode image: structure, a dark part, not washed out, all of one hue?"""
    if min(frame.shape[:2]) < 16:
        return False
    grey = to_gray(frame)
    low, high = np.percentile(grey, (5, 99))
    if high - low < 24 or low > 128 or (grey >= 250).mean() > 0.3:
        return False
    return not has_color([frame])

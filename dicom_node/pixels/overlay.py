"""What the scanner drew on the image: calipers, measurement lines, focus marks, logos. Pure numpy and scipy on values.

They tell a model where a person looked, and sometimes what was found, so they are masked before any model sees them and
reported as possible leakage. In a clip they stand still while the tissue moves; in a still only their colour tells,
and white marks on a white echo stay unseen there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node.pixels.grey import brightest, chroma, to_gray

_SATURATED = 0.5
"""Chroma relative to brightness: sepia and gold maps stay under it, calipers are pure yellow, green, cyan or red."""
_LIT = 96
_THICK = 7
"""Pixels: what is wider in both directions is flow, a colour bar or a map, not a drawn line."""
_STILL = 1.0
"""Standard deviation over time, grey levels: less is drawn (a lossy codec moves a drawn line a little)."""
_MOVES = 4.0
"""What moves more than this around a mark is tissue: in a frozen clip nothing is told apart."""
_WHITE = 200

MASKED = "drawn marks masked"
"""Name of the algorithm parameter that says so."""


def overlay_mask(frames: Sequence[NDArray[Any]], *, white: bool = True) -> NDArray[np.bool_]:
    """(H, W): True where something is drawn, in crops of one size from one clip, or in one still.

    `white` = False: coloured marks only, for a model that looks for white points (a calcification may stand still too).
    """
    mask = _colored(frames[0])
    for frame in frames[1:]:
        mask &= _colored(frame)
    if white and len(frames) >= 3:
        mask |= _standing(frames)
    return ndimage.binary_dilation(mask, iterations=1) if mask.any() else mask


def without_overlay(grey: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The drawn pixels replaced by the nearest that are not; the same array where nothing is drawn."""
    if not mask.any() or mask.all():
        return grey
    nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    return np.asarray(grey[tuple(nearest)], dtype=np.uint8)


def masked(mask: NDArray[np.bool_], *, white: bool = True) -> str:
    """What the report says of marks that were masked on a crop; "" = none was found.

    `white` = False: white marks were not looked for, in a still or beside echoes that are as white.
    """
    if not mask.any():
        return ""
    share = 100 * float(mask.mean())
    much = f"{share:.1f} %" if share >= 0.05 else "less than 0.1 %"
    said = f"{much} of the region; they may have told where a person looked"
    return said if white else f"{said}; coloured marks only, white ones are not told from echoes here"


def _colored(frame: NDArray[Any]) -> NDArray[np.bool_]:
    """Lit, saturated and thin."""
    if frame.ndim == 2 or frame.dtype != np.uint8:
        return np.zeros(frame.shape[:2], dtype=np.bool_)
    bright = brightest(frame)
    found = (bright >= _LIT) & (chroma(frame) > _SATURATED * bright)
    return _thin(found)


def _standing(frames: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """White, unmoved and thin, with moving tissue around it."""
    grey = np.stack([to_gray(f) for f in frames[:: max(1, len(frames) // 16)]]).astype(np.float32)
    activity = grey.std(axis=0)
    around = ndimage.uniform_filter(activity, 4 * _THICK + 1)
    return _thin((grey.min(axis=0) >= _WHITE) & (activity <= _STILL) & (around > _MOVES))


def _thin(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if not found.any():
        return found
    thick = ndimage.binary_opening(found, np.ones((_THICK, _THICK), dtype=np.bool_))
    return found & ~ndimage.binary_dilation(thick, iterations=_THICK)

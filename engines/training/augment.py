"""Augmentation of stills, with MONAI's transforms: what leaves the label as it is. The place moves with the image."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIFT_CELLS = 2


def stills(
    x: NDArray[np.float32], place: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images (b, 1, ..., H, W), black at -1, and their places (b, ..., h, w): mirrored, shifted by whole cells of the
    place (image and map have different grids, and stay together only so), with other gain and contrast."""
    out, moved = np.empty_like(x), np.empty_like(place)
    cell = np.array(x.shape[-2:]) // np.array(place.shape[-2:])
    chain = _chain()
    chain.set_random_state(seed=int(rng.integers(2**31)))
    for i, (image, where) in enumerate(zip(x, place, strict=True)):
        done = chain({"image": image + 1, "place": where[None]})
        shift = rng.integers(-SHIFT_CELLS, SHIFT_CELLS + 1, 2)
        out[i] = np.roll(np.asarray(done["image"]) - 1, tuple(shift * cell), axis=(-2, -1))
        moved[i] = np.roll(np.asarray(done["place"])[0], tuple(shift), axis=(-2, -1))
    return out, moved


@cache
def _chain() -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import RandScaleIntensityd, RandShiftIntensityd
    from monai.transforms.spatial.dictionary import RandFlipd

    return Compose(
        [
            RandFlipd(keys=("image", "place"), prob=0.5, spatial_axis=-1),
            RandScaleIntensityd(keys="image", prob=1, factors=0.15),
            RandShiftIntensityd(keys="image", prob=1, offsets=0.1),
        ]
    )

"""Marks drawn on the picture are masked; tissue, flow and tinted maps are not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node.pixels.overlay import masked, overlay_mask, without_overlay


def tissue(frames: int = 8, tint: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> NDArray[np.uint8]:
    rng = np.random.default_rng(2)
    speckle = ndimage.gaussian_filter(rng.rayleigh(70, (frames, 120, 160)), (0, 1, 1)).clip(0, 255)
    return (speckle[..., None] * np.array(tint)).astype(np.uint8)


def cross(clip: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    drawn = np.zeros(clip.shape[1:3], np.bool_)
    for y, x in ((30, 40), (80, 110)):
        drawn[y - 5 : y + 6, x] = drawn[y, x - 5 : x + 6] = True
    clip[:, drawn] = colour
    return drawn


@pytest.mark.parametrize("colour", [(255, 255, 0), (0, 255, 0), (0, 220, 220), (255, 255, 255)])
def test_calipers_of_a_clip_are_masked_and_filled_from_their_surroundings(colour: tuple[int, int, int]) -> None:
    clip = tissue()
    plain = clip[..., 1].copy()
    drawn = cross(clip, colour)
    mask = overlay_mask(list(clip))
    assert mask[drawn].all() and mask.sum() < 5 * drawn.sum()
    filled = without_overlay(clip[0, ..., 1], mask)
    assert np.array_equal(filled[~mask], plain[0][~mask])
    assert abs(float(filled[mask].mean()) - float(plain[0].mean())) < 25


def test_coloured_calipers_of_a_still_are_masked() -> None:
    still = tissue(1)
    drawn = cross(still, (255, 255, 0))
    assert overlay_mask([still[0]])[drawn].all()


@pytest.mark.parametrize("tint", [(1.0, 1.0, 1.0), (1.0, 0.8, 0.6)], ids=["grey", "sepia"])
@pytest.mark.parametrize("count", [1, 8])
def test_tissue_is_left_alone(tint: tuple[float, float, float], count: int) -> None:
    clip = tissue(count, tint)
    mask = overlay_mask(list(clip))
    assert not mask.any()
    assert without_overlay(clip[0, ..., 0], mask) is not None


def test_flow_and_a_frozen_clip_are_no_marks() -> None:
    flow = tissue()
    flow[:, 40:70, 50:90] = (220, 30, 20)
    assert not overlay_mask(list(flow)).any()
    frozen = np.repeat(tissue(1), 8, axis=0)
    frozen[:, 20:22, 20:30] = 255  # a bright echo that stands still with everything else
    assert not overlay_mask(list(frozen)).any()


def test_the_report_says_how_much_was_masked_and_what_was_not_looked_for() -> None:
    mask = np.zeros((100, 100), np.bool_)
    assert masked(mask) == ""
    mask[:2, :20] = True
    assert masked(mask) == "0.4 % of the region; they may have told where a person looked"
    assert masked(mask, white=False).endswith("coloured marks only, white ones are not told from echoes here")
    assert masked(np.eye(3000, dtype=np.bool_)).startswith("less than 0.1 % of the region")

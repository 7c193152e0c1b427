"""Grey values, size and colour of single frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dicom_node.pixels.grey import brightest, chroma, has_color, is_plausible_bmode, resize, tint, to_gray


def test_grey_stored_as_rgb_is_kept_exactly() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_gray(np.stack([grey] * 3, axis=-1)), grey)
    assert to_gray(grey) is grey


def test_brightness_and_chroma_are_those_of_the_three_channels() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (33, 47, 3)).astype(np.uint8)
    for seen in (frame, frame[::-1, ::3], np.asfortranarray(frame)):
        assert np.array_equal(brightest(seen), seen.max(axis=2))
        assert np.array_equal(chroma(seen), seen.max(axis=2) - seen.min(axis=2))
        assert chroma(seen).dtype == np.uint8


def test_colours_have_the_luma_of_bt_601() -> None:
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert to_gray(rgb).tolist() == [[77, 149, 29]]


def test_deep_grey_is_scaled_by_its_depth_not_by_its_content() -> None:
    assert to_gray(np.array([[4095, 2048, 16]], np.uint16), bits_stored=12).tolist() == [[255, 128, 1]]
    assert to_gray(np.array([[16]], np.uint16), bits_stored=12).tolist() == [[1]]


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 60), w=st.integers(1, 60), oh=st.integers(1, 60), ow=st.integers(1, 60))
def test_resize_keeps_a_constant_and_the_range_and_the_mean_when_it_shrinks(h: int, w: int, oh: int, ow: int) -> None:
    flat = resize(np.full((h, w), 77, np.uint8), (oh, ow))
    assert flat.shape == (oh, ow)
    assert flat.dtype == np.float32
    assert flat == pytest.approx(77)
    noise = np.random.default_rng(h * w).integers(0, 256, (h, w)).astype(np.uint8)
    out = resize(noise, (oh, ow))
    assert noise.min() - 1e-3 <= out.min() <= out.max() <= noise.max() + 1e-3
    if oh <= h and ow <= w:
        assert out.mean() == pytest.approx(noise.mean(), abs=1e-3)


def test_resize_against_blocks_and_against_linear_interpolation() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (12, 20, 3)).astype(np.uint8)
    blocks = frame.reshape(4, 3, 5, 4, 3).mean(axis=(1, 3))
    assert resize(frame, (4, 5)) == pytest.approx(blocks, abs=1e-4)
    ramp = np.arange(8, dtype=np.float64)[None, :].repeat(2, axis=0)
    assert resize(ramp, (2, 16))[0, 1:-1] == pytest.approx(np.arange(1, 15) / 2 - 0.25)


def sector(seed: int = 0) -> NDArray[np.uint8]:
    grey = np.zeros((200, 260), np.uint8)
    grey[20:180, 40:220] = np.random.default_rng(seed).rayleigh(45, (160, 180)).clip(0, 255)
    return np.stack([grey] * 3, axis=-1)


def test_a_colour_box_is_colour_and_a_tinted_map_is_not() -> None:
    plain = sector()
    assert not has_color([plain])
    sepia = (plain * np.array([1.0, 0.8, 0.5])).astype(np.uint8)
    assert tint(sepia) > 0.4 > 0.01 > tint(plain)
    assert not has_color([sepia])
    flow = plain.copy()
    flow[80:110, 90:130] = (220, 30, 20)
    assert has_color([flow])
    assert has_color([plain, plain, flow]), "colour may come late in a clip"
    caliper = plain.copy()
    caliper[100, 90:130] = (0, 255, 0)
    assert not has_color([caliper])


def test_a_plausible_b_mode_picture() -> None:
    flow = sector()
    flow[80:110, 90:130] = (220, 30, 20)
    assert is_plausible_bmode(sector())
    assert is_plausible_bmode(sector()[..., 0])
    for wrong in (flow, np.zeros((64, 64), np.uint8), np.full((64, 64), 200, np.uint8), np.zeros((4, 4), np.uint8)):
        assert not is_plausible_bmode(wrong)

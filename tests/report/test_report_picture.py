"""The picture: a fixed scale, nothing painted below it, and the marks over the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dicom_node.errors import ReportError, StoreError
from dicom_node.report.picture import ALPHA, Caption, Layout, blend, caption_of, colours, render_frames, saliency

CAPTION = Caption("Title", "Model, version 1", "high grade", "", "")


def panels(layout: Layout, frame: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    w, h = layout.panel
    x, y = layout.second
    return frame[layout.top : layout.top + h, layout.left : layout.left + w], frame[y : y + h, x : x + w]


def test_nothing_is_painted_below_vmin_and_the_scale_is_fixed() -> None:
    frame = np.full((1, 4, 3), 100, np.uint8)
    out = blend(frame, np.array([[0.99, 1.0, 4.0, 400.0]], np.float32), 1.0, 4.0)
    assert (out[0, 0] == 100).all()
    low, high = (np.rint(100 * (1 - ALPHA) + colours(np.array([v]))[0] * ALPHA) for v in (0.0, 1.0))
    assert (out[0, 1] == low).all() and (out[0, 2] == high).all() and (out[0, 3] == high).all()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_the_map_is_half_transparent_to_the_last_grey_level(channels: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    frame = rng.integers(0, 256, (200, 300, *channels), np.uint8)
    values = rng.uniform(0, 5, (200, 300)).astype(np.float32)
    colour = np.broadcast_to(frame[..., None] if frame.ndim == 2 else frame, (200, 300, 3)).astype(float)
    mixed = np.rint(colour * (1 - ALPHA) + colours((values - 1.0) / (4.0 - 1.0)) * ALPHA)
    expected = np.where((values >= 1.0)[..., None], mixed, colour)
    assert np.array_equal(blend(frame, values, 1.0, 4.0), expected)


def test_the_colour_map_rises_in_lightness_and_is_never_grey() -> None:
    ramp = colours(np.linspace(0, 1, 256)).astype(float)
    lightness = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > -0.8).all() and lightness[-1] - lightness[0] > 180
    assert ((ramp.max(axis=1) - ramp.min(axis=1)) > 60).all()


def test_a_map_below_the_scale_leaves_both_panels_equal(case: Any) -> None:
    heatmap = replace(case.heatmap(), vmin=3.0)
    picture = render_frames(heatmap, case.folder, CAPTION, [11])[0]
    left, right = panels(Layout.of(60, 80, CAPTION), picture)
    assert (left == right).all() and left.size


def test_the_painted_area_is_where_the_map_is(case: Any) -> None:
    picture = render_frames(case.heatmap(), case.folder, CAPTION, [11])[0]
    left, right = panels(Layout.of(60, 80, CAPTION), picture)
    changed = (left != right).any(axis=2)
    rows, columns = np.nonzero(changed)
    scale = changed.shape[1] / 80
    assert abs(rows.min() - 20 * scale) <= scale and abs(rows.max() - 40 * scale) <= scale
    assert abs(columns.min() - 30 * scale) <= scale and abs(columns.max() - 75 * scale) <= scale


@pytest.mark.parametrize("shape", [(60, 80), (60, 200), (300, 40), (900, 1200), (1, 1)])
def test_the_demonstration_mark_lies_across_the_image_whatever_its_shape(shape: tuple[int, int]) -> None:
    from dicom_node.report import picture as module

    mark = "TRAINED ON SIMULATED IMAGES - NOT A PATIENT RESULT"
    layout = Layout.of(*shape, replace(CAPTION, across=mark))
    (_, outline), (_, letters) = module.mark_across(layout.images, mark)
    box = letters.getbbox()
    assert letters.size == layout.images
    if min(shape) >= 60:
        assert box is not None and outline.getbbox() is not None
        assert box[2] - box[0] > 0.6 * letters.width or box[3] - box[1] > 0.6 * letters.height
        assert box[0] > 0 and box[2] < letters.width and box[1] > 0 and box[3] < letters.height, "no letter is cut"


@pytest.mark.parametrize("faint", [False, True])
def test_the_mark_is_drawn_as_pillow_would(faint: bool) -> None:
    from PIL import Image

    from dicom_node.report import picture as module

    text = "TRAINED ON SIMULATED IMAGES - NOT A PATIENT RESULT"
    pixels = np.random.default_rng(1).integers(0, 256, (374, 810, 3), np.uint8)
    expected = Image.fromarray(pixels)
    for grey, mask in module.mark_across((810, 374), text):
        expected.paste((grey, grey, grey), (0, 0), mask.point(lambda level: level // 2) if faint else mask)
    module.mark_of_area((810, 374), text, faint=faint).over(pixels)
    assert np.array_equal(pixels, np.asarray(expected))


def test_the_mark_changes_every_demonstration_frame_and_no_other(case: Any) -> None:
    def rendered(use: str) -> np.ndarray[Any, Any]:
        case.intended_use = use
        result = case.result()
        finding = result.findings[0]
        return render_frames(finding.heatmap, case.folder, caption_of(result, finding))

    demonstration, research = rendered("demonstration"), rendered("research")
    top = Layout.of(60, 80, CAPTION).top
    area = (slice(None), slice(top, top + 200), slice(30, 400))
    assert (demonstration[area] != research[area]).any(axis=(1, 2, 3)).all()


def test_saliency_counts_only_what_is_above_the_scale(case: Any) -> None:
    heatmap = case.heatmap()
    assert (np.diff(saliency(heatmap, case.folder)) > 0).all()
    assert not saliency(replace(heatmap, vmin=2.5), case.folder).any()


def test_colour_frames_and_single_images_are_drawn(case: Any) -> None:
    case.frames = 1
    grey = render_frames(case.heatmap(), case.folder, CAPTION)
    assert grey.shape[0] == 1
    heatmap = case.heatmap()
    frames = np.repeat(np.load(case.folder / heatmap.frames.name)[..., None], 3, axis=3)
    coloured = replace(heatmap, frames=case.spill("rgb.npy", frames))
    assert np.array_equal(render_frames(coloured, case.folder, CAPTION), grey), "grey as RGB is the same picture"
    frames[..., 0] = 255 - frames[..., 0]
    coloured = replace(heatmap, frames=case.spill("rgb.npy", frames))
    left, _ = panels(Layout.of(60, 80, CAPTION), render_frames(coloured, case.folder, CAPTION)[0])
    assert (left[..., 0] > left[..., 1]).all()


def test_an_array_that_is_not_the_one_named_is_refused(case: Any) -> None:
    heatmap = case.heatmap()
    path = case.folder / heatmap.map.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="digest"):
        render_frames(heatmap, case.folder, CAPTION)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        render_frames(heatmap, case.folder, CAPTION)


def test_a_pickle_is_never_loaded(case: Any) -> None:
    import hashlib

    heatmap = case.heatmap()
    path = case.folder / heatmap.map.name
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    forged = replace(heatmap.map, digest=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(StoreError, match="cannot be read"):
        render_frames(replace(heatmap, map=forged), case.folder, CAPTION)


def test_a_scale_without_extent_is_refused(case: Any) -> None:
    with pytest.raises(ReportError, match="vmin < vmax"):
        render_frames(replace(case.heatmap(), vmin=4.0), case.folder, CAPTION)

"""The thyroid phantom: what it plants, what must not give it away, and that a SEG of its clip is sound DICOM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engines.thyroid_cine import dicom, engine, phantom
from engines.thyroid_cine.recipe import RECIPE
from engines.thyroid_cine.segmentation import segmentation
from engines.training import stats
from engines.training.recipe import Sample

SETTINGS = phantom.generator()


@pytest.fixture(scope="module")
def pair() -> tuple[phantom.Clip, phantom.Clip]:
    """The same seed with either label."""
    return phantom.make(11, 0, SETTINGS), phantom.make(11, 1, SETTINGS)


def test_a_seed_is_a_clip(pair: tuple[phantom.Clip, phantom.Clip]) -> None:
    again = phantom.make(11, 1, SETTINGS)
    assert np.array_equal(pair[1].frames, again.frames)
    assert not np.array_equal(pair[1].frames, phantom.make(12, 1, SETTINGS).frames)


def test_the_other_label_moves_the_echoes_and_nothing_else(pair: tuple[phantom.Clip, phantom.Clip]) -> None:
    low, high = pair
    assert np.array_equal(low.nodule, high.nodule)
    assert (low.region, low.frame_ms, low.mm_per_px) == (high.region, high.frame_ms, high.mm_per_px)
    assert np.array_equal(low.foci[:, 0], high.foci[:, 0])  # as many, on the same frames
    assert np.array_equal(low.inside, ~high.inside)
    difference = np.abs(low.frames.astype(int) - high.frames).max(axis=(0, 3))
    rows, columns = np.nonzero(difference > 2)
    places = np.concatenate([low.foci, high.foci])[:, 1:]
    reach = [np.hypot(*(places - (r, c)).T).min() for r, c in zip(rows, columns, strict=True)]
    assert max(reach) < 16  # drift, jitter and the point spread


def test_an_echo_is_seen_only_near_its_slice(pair: tuple[phantom.Clip, phantom.Clip]) -> None:
    """The clip with the echoes against the same clip without them there: a still mostly misses one."""
    low, high = pair
    difference = np.abs(high.frames.astype(int) - low.frames)[..., 0]
    for when, row, column in high.foci[high.inside]:
        r, c = round(row), round(column)
        seen = difference[:, r - 9 : r + 10, c - 9 : c + 10].max(axis=(1, 2)) > 25
        assert seen[round(when)]
        assert seen.mean() < 0.5


def test_every_positive_has_an_echo_in_the_nodule() -> None:
    for seed in range(30):
        clip = phantom.make(700_000 + seed, 1, SETTINGS, frames=2)
        assert 3 <= len(clip.inside) <= 8
        assert clip.inside.any()
        other = phantom.make(700_000 + seed, 0, SETTINGS, frames=2)
        assert not other.inside.all()


@pytest.mark.long
def test_the_engine_accepts_every_phantom_and_no_shortcut_tells_the_label() -> None:
    samples = [RECIPE.sample(610_000 + s, s % 2, SETTINGS, "jpeg" if s // 2 % 2 else "raw") for s in range(160)]
    kept = [s for s in samples if isinstance(s, Sample)]
    assert len(kept) == len(samples)
    assert {s.x.shape for s in kept} == {(1, 1, engine.FRAMES, *engine.INPUT_SIZE)}
    assert all(s.place.any() for s in kept[1::2])
    y = np.arange(len(kept)) % 2
    features = np.stack([s.nuisance for s in kept])
    for column in features.T:
        area = stats.auc(y, column)
        assert max(area, 1 - area) < 0.70


@pytest.mark.parametrize("generator", ["training", "shifted"])
def test_the_segmentation_of_a_clip_is_sound(generator: str, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed")
    clip = phantom.make(5, 1, phantom.generator(generator), frames=16)
    image = dicom.dataset(clip, "raw", dicom.labels(uid_seed=5))
    before = image.SOPClassUID, image.NumberOfFrames
    path = tmp_path / "seg.dcm"
    segmentation(image, [clip.nodule], 5).save_as(path, enforce_file_format=True)
    assert (image.SOPClassUID, image.NumberOfFrames) == before  # the clip itself is left as it is
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
    assert "Error" not in said, said

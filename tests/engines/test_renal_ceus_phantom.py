"""The renal CEUS phantom: repeatable, honest about what the label changes, and a valid DICOM object."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import stats as distributions

from engines.renal_ceus import phantom

ROOT = Path(__file__).parents[2]


def test_a_seed_gives_the_same_clip_and_another_seed_another() -> None:
    a, b, c = phantom.make(11, 1, frames=6), phantom.make(11, 1, frames=6), phantom.make(12, 1, frames=6)
    assert np.array_equal(a.frames, b.frames)
    assert not np.array_equal(a.frames, c.frames)


def test_only_the_perfusion_of_mass_and_hump_depends_on_the_label() -> None:
    high, low = phantom.make(11, 1, frames=4), phantom.make(11, 0, frames=4)
    unlike = {key for key in high.drawn if high.drawn[key] != low.drawn[key]}
    assert unlike <= {f"grade_{key}" for key in phantom.generator()["high"]}
    assert (high.contrast, high.frame_ms, high.mm_per_px) == (low.contrast, low.frame_ms, low.mm_per_px)
    assert np.array_equal(high.mass, low.mass)
    # Before the agent arrives there is nothing to tell them apart.
    assert np.array_equal(high.frames, low.frames)


def test_the_panel_follows_the_time_intensity_curve_of_the_cortex() -> None:
    settings = phantom.generator()
    fixed = {
        "dose": 0.4,
        "gain_db": -12,
        "dynamic_range_db": 60,
        "noise_db": -60,
        "leak_db": -60,
        "shadow_probability": 0,
    }
    settings["nuisance"] |= fixed | {
        "drift_db": 0.0,
        "breathing_px": 0.0,
        "blotch": 0.0,
        "mottle": 0.0,
        "tints": {"grey": 1.0},
    }
    clip = phantom.make(21, 0, settings, frames=40)
    x0, y0, x1, y1 = clip.contrast
    panel = clip.frames[:, y0 : y1 + 1, x0 : x1 + 1, 0].astype(np.float64)
    t = np.arange(40) * clip.frame_ms / 1000
    d = clip.drawn
    expected = phantom.enhancement(t, clip.arrival_s, d["cortex_peak_s"], d["cortex_shape"], d["cortex_plateau"])
    # Back from decibels to power, over the pixels that are cortex for certain: brightest on average over time.
    power = np.where(panel > 0, 10 ** ((panel / 255 - 1) * d["dynamic_range_db"] / 10), 0)
    bright = panel.mean(axis=0) > np.quantile(panel.mean(axis=0), 0.9)
    measured = power[:, bright].mean(axis=1)
    assert np.corrcoef(measured, expected)[0, 1] > 0.97
    assert measured[t < clip.arrival_s - 1].max() < 0.02 * measured.max()


def test_nuisance_draws_do_not_know_the_label() -> None:
    """Over seeds, no drawn machine setting separates even from odd seeds (the labels of the cohorts)."""
    ranges = phantom.generator()["nuisance"]
    drawn = [phantom._draw(np.random.default_rng([seed, 0]), ranges) for seed in range(600)]
    for key in drawn[0]:
        values = np.array([d[key] for d in drawn])
        if np.ptp(values) == 0:
            continue
        assert distributions.mannwhitneyu(values[::2], values[1::2]).pvalue > 1e-4, key


def test_the_shifted_generator_leaves_the_training_range() -> None:
    training, shifted = phantom.generator()["nuisance"], phantom.generator("shifted")["nuisance"]
    assert shifted["lateral_px"][0] >= training["lateral_px"][1]
    assert shifted["depth_cm"][1] > training["depth_cm"][1]
    assert set(shifted) == set(training)


@pytest.mark.parametrize("encoding", ["jpeg", "raw", "rle"])
def test_the_file_holds_the_clip_and_its_regions(phantom_file: Callable[..., Path], encoding: str) -> None:
    clip = phantom.make(5, 1, frames=3)
    ds = pydicom.dcmread(phantom_file(5, 1, encoding, frames=3, uid_seed=1))
    pixels = ds.pixel_array
    assert pixels.shape == clip.frames.shape
    error = np.abs(pixels.astype(int) - clip.frames)
    assert error.max() == 0 if encoding != "jpeg" else error.mean() < 6
    boxes = sorted(
        (r.RegionLocationMinX0, r.RegionLocationMinY0, r.RegionLocationMaxX1, r.RegionLocationMaxY1)
        for r in ds.SequenceOfUltrasoundRegions
    )
    assert boxes == sorted((clip.contrast, clip.tissue))
    assert all(r.PhysicalDeltaX == pytest.approx(clip.mm_per_px / 10, abs=1e-6) for r in ds.SequenceOfUltrasoundRegions)
    assert ds.FrameTime == pytest.approx(clip.frame_ms, abs=1e-3)


def test_dciodvfy_finds_no_error(phantom_file: Callable[..., Path]) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    for encoding in ("jpeg", "raw", "rle"):
        for side in ("R", ""):
            path = phantom_file(5, 1, encoding, frames=3, laterality=side)
            said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=60)
            assert "Error" not in said.stdout + said.stderr


def test_uids_are_fresh_unless_a_seed_fixes_them(phantom_file: Callable[..., Path], tmp_path: Path) -> None:
    from engines.training import dicomfile

    clip = phantom.make(5, 1, frames=2)
    free = {dicomfile.dataset(clip, "jpeg").SOPInstanceUID for _ in range(3)}
    assert len(free) == 3
    one, two = (dicomfile.write(clip, tmp_path / n, "jpeg", dicomfile.Labels(uid_seed=9)) for n in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_the_command_needs_neither_torch_nor_the_checkout(tmp_path: Path) -> None:
    """As the installed demo calls it: engines/ lies somewhere else, torch and the training extra are absent."""
    elsewhere = tmp_path / "shipped"
    shutil.copytree(ROOT / "engines", elsewhere / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    block = tmp_path / "block"
    block.mkdir()
    for name in ("torch", "monai", "onnx", "sklearn", "safetensors", "matplotlib"):
        (block / f"{name}.py").write_text("raise ImportError('not in the base installation')")
    said = ["--seed", "4", "--label", "1", "--frames", "4", "--laterality", "L", "--description"]
    command = [sys.executable, "-m", "engines.training", "phantom", "renal_ceus", *said, "CEUS kidney tumour"]
    command += ["--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(elsewhere), str(block), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ds = pydicom.dcmread(done.stdout.strip())
    assert (ds.ImageLaterality, ds.StudyDescription, ds.NumberOfFrames) == ("L", "CEUS kidney tumour", 4)


def test_an_unknown_task_is_a_usage_error() -> None:
    from engines.training.__main__ import main

    assert main(["phantom", "../renal_ceus", "--seed", "1", "--label", "1", "--out", "x"]) == 2

"""The liver phantom: reproducible, the label moves what it should and nothing else, real MR files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicom_node.result import Refusal
from engines.liver_dce import engine, objects, phantom, recipe
from engines.training.recipe import Sample


def _levels(exam: phantom.Exam, lesion: phantom._Lesion) -> np.ndarray:
    """Mean of rim and core of a lesion in each phase, in units of the liver before contrast."""
    middle = lesion.core > 0.9
    rim = lesion.rim > 0.6
    return np.array([[phase[part].mean() for phase in exam.volume] for part in (rim, middle)])


def _anatomy(seed: int) -> phantom._Anatomy:
    settings = phantom.generator()
    n = phantom._draw(np.random.default_rng([seed, 0]), settings["nuisance"])
    texture = phantom._draw(np.random.default_rng([seed, 1]), settings["texture"])
    return phantom._Anatomy(np.random.default_rng([seed, 4]), n, texture)


def test_a_seed_is_one_examination() -> None:
    first, second = phantom.make(11, 1), phantom.make(11, 1)
    assert np.array_equal(first.volume, second.volume)
    assert np.array_equal(first.drawn_mask, second.drawn_mask)
    assert not np.array_equal(first.volume, phantom.make(12, 1).volume)
    assert first.volume.shape == (4, *phantom.SHAPE)
    assert first.volume.max() < 4096


def test_the_label_changes_the_lesions_after_contrast_and_nothing_else() -> None:
    low, high = phantom.make(11, 0), phantom.make(11, 1)
    assert low.drawn == high.drawn
    assert np.array_equal(low.drawn_mask, high.drawn_mask)
    assert np.array_equal(low.volume[0], high.volume[0])  # before contrast
    anatomy = _anatomy(11)
    far = (anatomy.tumour.distance > 2) & (anatomy.other.distance > 2)
    assert far.any()
    assert np.abs(low.volume[:, far].astype(int) - high.volume[:, far]).max() <= 1  # soft edges, rounded
    assert (low.volume[1, low.drawn_mask] != high.volume[1, low.drawn_mask]).mean() > 0.5
    assert not low.signal.any()
    assert high.signal[high.drawn_mask].mean() > 0.5


@pytest.mark.parametrize("seed", [11, 14, 18])
def test_rim_and_core_stand_in_the_tumour_or_in_the_other_lesion(seed: int) -> None:
    anatomy = _anatomy(seed)
    for label, lesion in ((1, anatomy.tumour), (0, anatomy.other)):
        rim, core = _levels(phantom.make(seed, label), lesion)
        assert rim[1] > 1.4 * core[1]  # arterial hyperenhancement of the rim, ill-perfused core
        assert rim[3] / core[3] < rim[1] / core[1]  # washout
    rim, core = _levels(phantom.make(seed, 0), anatomy.tumour)
    assert rim[1] < 1.25 * core[1]  # even


@pytest.mark.parametrize("name", ["training", "shifted"])
def test_the_engine_takes_every_phantom(name: str) -> None:
    settings = phantom.generator(name)
    for seed in range(950_000, 950_006):
        sample = recipe.RECIPE.sample(seed, seed % 2, settings, "raw")
        assert isinstance(sample, Sample), seed
        assert sample.x.shape == (1, 5, *engine.GRID)
        assert np.isfinite(sample.x).all()
        assert sample.place.any() == bool(seed % 2)
        middle = sample.x[0, 4, 7:9, 30:34, 30:34]
        assert middle.min() > 0.9  # the tumour lies in the middle


def test_shifted_generator_leaves_the_training_range() -> None:
    training, shifted = phantom.generator()["nuisance"], phantom.generator("shifted")["nuisance"]
    beyond = [k for k, v in shifted.items() if isinstance(v, list) and (v[0] < training[k][0] or v[1] > training[k][1])]
    assert {"slice_mm", "tr_ms", "delayed_s", "noise"} <= set(beyond)
    assert training.keys() == shifted.keys()


@pytest.mark.parametrize("encoding", objects.ENCODINGS)
def test_files_are_mr_images_that_hold_the_voxels(encoding: str, tmp_path: Path) -> None:
    exam = phantom.make(3, 1)
    paths = objects.write(exam, tmp_path, encoding, objects.Labels(uid_seed=3))
    read = [pydicom.dcmread(p) for p in paths]
    assert len(read) == 4 * phantom.SHAPE[0]
    assert len({ds.SOPInstanceUID for ds in read}) == len(read)
    assert len({ds.StudyInstanceUID for ds in read}) == len({ds.FrameOfReferenceUID for ds in read}) == 1
    assert len({ds.SeriesInstanceUID for ds in read}) == (4 if encoding in ("series", "times") else 1)
    for index, ds in enumerate(read):
        slope = float(ds.get("RescaleSlope", 1))
        found = ds.pixel_array * slope
        assert np.abs(found - exam.volume[index // 20, index % 20]).max() <= slope / 2
        assert "proliferative" not in str(ds).casefold()


def test_uids_are_fresh_unless_fixed(tmp_path: Path) -> None:
    exam = phantom.make(3, 1)
    several = [objects.images(exam, "series", labels)[0] for labels in (None, None)]
    assert several[0].StudyInstanceUID != several[1].StudyInstanceUID
    fixed = [objects.images(exam, "series", objects.Labels(uid_seed=4))[0] for _ in range(2)]
    assert fixed[0] == fixed[1]
    with pytest.raises(ValueError, match="encoding"):
        objects.images(exam, "jpeg")


def test_the_command_writes_a_study_with_its_region(tmp_path: Path) -> None:
    from engines.training.__main__ import main

    args = ["phantom", "liver_dce", "--seed", "4", "--label", "1", "--roi", "--out", str(tmp_path), "--uid-seed", "1"]
    assert main(args) == 0
    modalities = [pydicom.dcmread(p, stop_before_pixels=True).Modality for p in tmp_path.iterdir()]
    assert sorted(set(modalities)) == ["MR", "SEG"]
    assert modalities.count("SEG") == 1


def test_an_empty_region_or_a_dead_phase_is_refused() -> None:
    exam = phantom.make(3, 1)
    volume = exam.volume.astype(np.float32)
    assert isinstance(engine.prepare(volume, exam.affine, np.zeros(phantom.SHAPE, np.bool_)), Refusal)
    volume[0] = 7
    assert isinstance(engine.prepare(volume, exam.affine, exam.drawn_mask), Refusal)

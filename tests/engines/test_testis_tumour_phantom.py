"""The testicular tumour phantom: repeatable, honest about what the label changes, and valid DICOM objects."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml

from dicom_node.packages import Task
from engines.testis_tumour import objects, phantom
from engines.training import stats

ROOT = Path(__file__).parents[2]


def test_a_seed_gives_the_same_still_and_another_seed_another() -> None:
    a, b, c = phantom.make(11, 1, sharp=True), phantom.make(11, 1, sharp=True), phantom.make(12, 1)
    assert np.array_equal(a.picture, b.picture)
    assert a.sharp is not None
    assert np.array_equal(a.sharp, b.sharp)
    assert a.blood == b.blood
    assert not np.array_equal(a.picture, c.picture)


def test_only_texture_and_blood_depend_on_the_label() -> None:
    mixed, even = phantom.make(11, 1), phantom.make(11, 0)
    unlike = {key for key in mixed.drawn if mixed.drawn[key] != even.drawn[key]}
    assert unlike <= {f"grade_{key}" for key in phantom.generator()["nonseminoma"]}
    assert np.array_equal(mixed.tumour, even.tumour)
    assert np.array_equal(mixed.roi, even.roi)
    assert mixed.mm_per_px == even.mm_per_px
    assert mixed.signal.any()
    assert not even.signal.any()


def test_the_sharp_picture_lies_where_the_acquired_one_lies() -> None:
    """A shift between the two would be learnt by the network and held against the interpolation beside it."""
    made = phantom.make(5, 1, sharp=True)
    assert made.sharp is not None
    x0, y0, x1, y1 = made.region
    acquired = made.picture[y0 : y1 + 1, x0 : x1 + 1].astype(float)
    small = made.sharp.reshape(phantom.PANEL[0], 2, phantom.PANEL[1], 2).mean(axis=(1, 3))

    def agreement(rows: int, columns: int) -> float:
        moved = np.roll(small, (rows, columns), (0, 1))
        return float(np.corrcoef(moved[8:-8, 8:-8].ravel(), acquired[8:-8, 8:-8].ravel())[0, 1])

    here = agreement(0, 0)
    for step in ((0, 1), (1, 0)):
        before, after = agreement(*step), agreement(-step[0], -step[1])
        assert here > max(before, after)
        assert before == pytest.approx(after, abs=0.1 * (here - before))


def test_the_region_is_drawn_near_the_outline_and_covers_the_tumour() -> None:
    for seed in range(20, 30):
        made = phantom.make(seed, seed % 2)
        overlap = 2 * (made.roi & made.tumour).sum() / (made.roi.sum() + made.tumour.sum())
        assert 0.8 < overlap <= 1.0, seed


def test_the_largest_tumour_fits_the_tile_of_a_cohort() -> None:
    from engines.testis_tumour import engine, samples

    settings = phantom.generator()
    for key in ("tumour_mm", "tumour_aspect", "lobes", "roi_mm", "roi_wobble_mm", "mm_per_px"):
        settings["nuisance"][key] = settings["nuisance"][key][1]
    for seed in range(12):
        found = samples.prepared(phantom.make(seed, seed % 2, settings), "raw")
        assert isinstance(found, engine.Prepared)
        assert found.image.shape == (engine.TILE, engine.TILE)


def test_blood_alone_separates_in_part() -> None:
    settings = phantom.generator()["blood"]
    rows = [
        list(phantom.blood(np.random.default_rng([seed, 7]), settings[("seminoma", "nonseminoma")[seed % 2]]).values())
        for seed in range(1000)
    ]
    table, y = np.array(rows), np.arange(1000) % 2
    for name, column in zip(phantom.MARKERS, table.T, strict=True):
        apart = abs(stats.auc(y, column) - 0.5)
        assert 0.03 < apart < 0.35, name
    score = np.log(table[:, 1]) + np.log(table[:, 2]) - 0.08 * table[:, 0]
    assert 0.7 < stats.auc(y, score) < 0.93


def test_objects_carry_what_the_task_asks_for() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/testis_tumour/engine.yaml").read_text("utf-8")))
    made = phantom.make(3, 1)
    image = objects.still(made, "raw", objects.Labels(uid_seed=3))
    report = objects.laboratory(made, image, 3)
    assert report.StudyInstanceUID == image.StudyInstanceUID
    found = {}
    for item in _numbers(report):
        code = item.ConceptNameCodeSequence[0]
        value = item.MeasuredValueSequence[0]
        found[code.CodeValue] = (float(value.NumericValue), value.MeasurementUnitsCodeSequence[0].CodeValue)
    for entry in task.clinical:
        value, unit = found[entry.code.value]
        assert unit == entry.unit
        assert value == pytest.approx(made.blood[entry.name], rel=1e-4)
        assert entry.range[0] <= value <= entry.range[1]


def _numbers(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    own = [item] if item.get("ValueType") == "NUM" else []
    return own + [number for child in item.get("ContentSequence", []) for number in _numbers(child)]


def test_encodings_hold_the_same_picture(tmp_path: Path) -> None:
    made = phantom.make(3, 1)
    for encoding in objects.ENCODINGS:
        path = tmp_path / f"{encoding}.dcm"
        objects.still(made, encoding).save_as(path, enforce_file_format=True)
        pixels = pydicom.dcmread(path).pixel_array.astype(int)
        difference = np.abs(pixels - made.picture)
        assert difference.max() == 0 if encoding != "jpeg" else 0 < difference.mean() < 6


def test_segmentation_is_the_drawn_region() -> None:
    made = phantom.make(3, 1)
    image = objects.still(made, "raw")
    seg = objects.segmentation(made, image)
    x0, y0, x1, y1 = made.region
    assert np.array_equal(np.squeeze(seg.pixel_array)[y0 : y1 + 1, x0 : x1 + 1] > 0, made.roi)
    assert seg.StudyInstanceUID == image.StudyInstanceUID


def test_the_command_writes_a_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engines.training", "phantom", "testis_tumour", "--seed", "4", "--label", "0"]
    done = subprocess.run([*command, "--roi", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in done.stdout.splitlines()]
    read = [pydicom.dcmread(p) for p in paths]
    assert [d.Modality for d in read] == ["US", "SR", "SEG"]
    assert len({d.StudyInstanceUID for d in read}) == 1
    again = subprocess.run([*command, "--out", tmp_path / "b"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert pydicom.dcmread(again.stdout.splitlines()[0]).StudyInstanceUID != read[0].StudyInstanceUID


@pytest.mark.peer("dicom3tools")
def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    made = phantom.make(6, 1)
    image = objects.still(made, "jpeg")
    for name, ds in {"us": image, "seg": objects.segmentation(made, objects.still(made, "raw"))}.items():
        path = tmp_path / f"{name}.dcm"
        ds.save_as(path, enforce_file_format=True)
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        assert "Error" not in done.stdout + done.stderr, done.stdout + done.stderr

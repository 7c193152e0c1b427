"""The phantom of azoospermia: what it plants, what must not give it away, and that the files are sound DICOM."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml

from dicom_node.clinical import Ucum, collect
from dicom_node.packages import Task
from dicom_node.study import Instance, Study
from engines.testis_noa import dicom, engine, phantom
from engines.testis_noa.recipe import RECIPE, reader_box
from engines.training import stats
from engines.training.fusion import Term, fit_fusion, probabilities
from engines.training.headers import MemoryReader, instance_of
from engines.training.recipe import Sample

ROOT = Path(__file__).parents[2]
SETTINGS = phantom.generator()


def test_a_seed_is_a_patient() -> None:
    first, second = (phantom.make(7, 1, SETTINGS) for _ in range(2))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first.stills, second.stills, strict=True))
    assert first.covariates("R") == second.covariates("R")
    assert not np.array_equal(first.stills[0].image, phantom.make(9, 1, SETTINGS).stills[0].image)


def test_one_side_alone_is_the_same_side() -> None:
    both, left = phantom.make(7, 1, SETTINGS), phantom.make(7, 1, SETTINGS, ("L",))
    assert [s.side for s in both.stills] == ["R", "L"]
    assert np.array_equal(both.stills[1].image, left.stills[0].image)
    assert both.covariates("L") == left.covariates("L")


def test_the_other_label_changes_texture_and_blood_and_nothing_else() -> None:
    noa, oa = phantom.make(8, 1, SETTINGS), phantom.make(8, 0, SETTINGS)
    a, b = noa.stills[0], oa.stills[0]
    assert np.array_equal(a.mask, b.mask)
    assert a.region == b.region
    x0, y0, x1, y1 = a.region
    outside = np.ones(a.image.shape, bool)
    outside[y0 : y1 + 1, x0 : x1 + 1] = False
    assert np.array_equal(a.image[outside], b.image[outside])
    assert a.strength > b.strength
    assert noa.fsh > oa.fsh
    assert a.volume_ml < b.volume_ml
    assert a.edv_cm_s < b.edv_cm_s
    assert noa.drawn == oa.drawn


def test_the_patient_has_the_mean_of_his_sides() -> None:
    patient = phantom.make(8, 1, SETTINGS)
    right, left, both = (np.array(patient.covariates(side)) for side in ("R", "L", "B"))
    assert both == pytest.approx((right + left) / 2)


def test_blood_values_overlap_so_that_they_do_not_decide() -> None:
    """Alone each is a weak sign, together a fair one: AUC 0.6 to 0.8 and below 0.9."""
    seeds = np.arange(1200)
    y = seeds % 2
    rows = []
    for seed in seeds:
        drawn = phantom._blood(int(seed), int(seed % 2), SETTINGS["blood"])
        rows.append([drawn["FSH"], drawn["R"]["TESTICULAR_VOLUME"], drawn["R"]["EDV"]])
    values = np.array(rows)
    for column, sign in zip(values.T, (1, -1, -1), strict=True):
        assert 0.6 < stats.auc(y, sign * column) < 0.8
    spec = fit_fusion(np.random.default_rng(0).normal(size=len(y)), values, y, (Term("F", "log"), Term("V"), Term("E")))
    together = stats.auc(y, probabilities(spec, np.zeros(len(y)), values))
    assert 0.75 < together < 0.9


def test_the_engine_accepts_every_phantom_and_only_label_1_has_a_planted_place() -> None:
    samples = [RECIPE.sample(600000 + s, s % 2, SETTINGS, "jpeg" if s % 3 else "raw") for s in range(40)]
    assert all(isinstance(s, Sample) for s in samples)
    kept = [s for s in samples if isinstance(s, Sample)]
    assert {s.x.shape for s in kept} == {(1, 1, 224, 224)}
    assert not any(s.place.any() for s in kept[0::2])
    assert sum(bool(s.place.max() > 0.3) for s in kept[1::2]) >= 18  # a few have the texture of the other label


def test_the_place_lies_where_the_network_sees_the_testis() -> None:
    """The box of the reader is inexact; the planted signal moves with the crop."""
    sample = RECIPE.sample(600001, 1, SETTINGS, "raw")
    assert isinstance(sample, Sample)
    rows, columns = np.nonzero(sample.place > 0.1)
    assert rows.min() >= 3
    assert rows.max() <= 24
    assert columns.min() >= 3
    assert columns.max() <= 24


def test_the_banner_is_no_part_of_the_image_region() -> None:
    still = phantom.make(3, 0, SETTINGS, ("R",)).stills[0]
    assert still.image[: still.region[1] - 8].std() > 5  # text
    box = reader_box(3, still)
    found = engine.prepare(
        instance_of(dicom.header(still, 1, dicom.Labels(uid_seed=3), b"")), MemoryReader(still.image[None]), box
    )
    assert isinstance(found, engine.Prepared)
    assert found.region[1] >= still.region[1]


@pytest.mark.long
def test_shortcut_features_do_not_decide() -> None:
    """Mean, spread, histogram, spectrum, size on the screen and metadata: at most 0.70 on unseen seeds."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    samples = [RECIPE.sample(seed, seed % 2, SETTINGS, "raw") for seed in range(610000, 610900)]
    x = np.stack([s.nuisance for s in samples if isinstance(s, Sample)])
    y = np.arange(len(x)) % 2
    z = (x - x[:600].mean(axis=0)) / x[:600].std(axis=0).clip(1e-9)
    model = linear_model.LogisticRegression(C=0.3, max_iter=2000).fit(z[:600], y[:600])
    assert stats.auc(y[600:], model.decision_function(z[600:])) < 0.70


# --- as DICOM --------------------------------------------------------------------------------------------------------


def test_the_files_are_of_one_patient_and_one_study(tmp_path: Path) -> None:
    paths = dicom.write(phantom.make(5, 1, SETTINGS), tmp_path, "jpeg", roi=True)
    read = [pydicom.dcmread(p) for p in paths]
    assert [ds.Modality for ds in read] == ["US", "US", "SR", "SEG", "SEG"]
    assert len({ds.StudyInstanceUID for ds in read}) == len({ds.PatientID for ds in read}) == 1
    assert len({ds.SOPInstanceUID for ds in read}) == 5
    assert [ds.ImageLaterality for ds in read[:2]] == ["R", "L"]
    again = dicom.write(phantom.make(5, 1, SETTINGS), tmp_path / "again", "jpeg")
    assert pydicom.dcmread(again[0]).StudyInstanceUID != read[0].StudyInstanceUID


def test_the_node_reads_the_clinical_values_as_they_were_drawn(
    tmp_path: Path, instance_of: Callable[..., Instance], study_of: Callable[..., Study]
) -> None:
    patient = phantom.make(5, 1, SETTINGS)
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/testis_noa/engine.yaml").read_text("utf-8")))
    paths = dicom.write(patient, tmp_path, "raw", dicom.Labels(uid_seed=5))
    found = collect(study_of(*(instance_of(p) for p in paths)), task.clinical, Ucum())
    assert not found.problems
    right, left = patient.stills
    assert {key: value.value for key, value in found.values.items()} == {
        "FSH": patient.fsh,
        "TESTICULAR_VOLUME R": right.volume_ml,
        "TESTICULAR_VOLUME L": left.volume_ml,
        "EDV R": right.edv_cm_s,
        "EDV L": left.edv_cm_s,
    }


@pytest.mark.parametrize("encoding", dicom.ENCODINGS)
def test_the_files_pass_the_validator(tmp_path: Path, encoding: str) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed")
    labels = dicom.Labels(uid_seed=5)
    for path in dicom.write(phantom.make(5, 1, SETTINGS), tmp_path, encoding, labels, roi=encoding == "raw"):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
        assert "Error" not in said, said


def test_the_command_writes_a_study_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engines.training.__main__ import main

    said = ["phantom", "testis_noa", "--seed", "4", "--label", "0", "--out", str(tmp_path), "--laterality", "L"]
    assert main([*said, "--roi", "--uid-seed", "4", "--description", "Scrotum infertility"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    first = pydicom.dcmread(paths[0])
    assert (first.ImageLaterality, first.StudyDescription) == ("L", "Scrotum infertility")
    assert [pydicom.dcmread(p, stop_before_pixels=True).Modality for p in paths] == ["US", "SR", "SEG"]

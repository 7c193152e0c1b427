"""How the nomogram's log-odds are made: out of fold, by patient, calibrated; and what a site's folder goes without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

for module in ("tqdm", "sklearn", "torch"):
    pytest.importorskip(module, reason=f"{module} is not installed (pip install 'dicom-node[train]')")

from engines.testis_noa.recipe import RECIPE, folds, temperature  # noqa: E402
from engines.training.cohort import Cohort  # noqa: E402
from engines.training.recipe import Run  # noqa: E402


def _cohort(n: int, first_seed: int, **extra: NDArray[Any]) -> Cohort:
    rng = np.random.default_rng(first_seed)
    y = np.arange(n) % 2
    covariates = np.exp(rng.normal(1.5 + 0.4 * np.outer(y, [1, -1, -1]), 0.3))
    empty = np.zeros((n, 1, 1, 4, 4), np.float16)
    return Cohort(
        empty, np.ones(n, np.int64), y, np.zeros((n, 2, 2), np.float16), np.arange(first_seed, first_seed + n),
        np.zeros((n, 1)), (), covariates, extra,
    )  # fmt: skip


def test_folds_of_phantoms_hold_both_labels_alike() -> None:
    cohort = _cohort(60, 100)
    fold = folds(cohort, 3)
    for k in range(3):
        assert cohort.y[fold == k].mean() == 0.5
        assert (fold == k).sum() == 20


def test_images_of_one_patient_are_never_in_two_folds() -> None:
    patient = np.repeat(np.arange(12), 5)
    fold = folds(_cohort(60, 100, patient=patient), 4)
    assert all(len(set(fold[patient == p])) == 1 for p in range(12))
    assert set(fold) == {0, 1, 2, 3}


def test_a_temperature_never_sharpens_and_is_used_only_where_it_helps() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(2000) % 2
    calibrated = rng.normal(2.0 * (2 * y - 1), 2.0)  # two normals at -2 and 2 with variance 4: log-odds = value
    assert temperature(y, calibrated) == pytest.approx(1, abs=0.1)
    assert temperature(y, calibrated / 3) == 1
    assert temperature(y, calibrated * 3) == pytest.approx(3, rel=0.15)


class _FoldRun:
    """A run over cohorts in memory."""

    def __init__(self, folder: Path, train: Cohort) -> None:
        self.task, self.preset, self.threads, self.device, self.folder = "testis_noa", "nano", 1, "cpu", None
        self.checkpoint = folder
        self.plan = {
            "presets": {"nano": {"seed": 1, "epochs": 3, "batch": 8, "frames_per_clip": 1, "learning_rate": 1e-3,
                                 "weight_decay": 0.0}},
            "folds": {"nano": {"count": 3, "epochs": 2}},
        }  # fmt: skip
        self._cohorts = {"train": train, "validation": _cohort(40, 900)}

    def cohort(self, name: str) -> Cohort:
        return self._cohorts[name]


def test_no_log_odds_of_the_nomogram_come_from_a_network_that_saw_the_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
    from engines.training import fit

    def train_on(task: str, preset: str, settings: Any, seen: Cohort, held: Cohort, folder: Path) -> Any:
        assert (task, preset, settings.epochs) == ("testis_noa", "nano", 2)
        assert not set(seen.seeds) & set(held.seeds)
        return SimpleNamespace(seen=frozenset(seen.seeds.tolist()))

    def margins(model: Any, cohort: Cohort, device: str) -> NDArray[np.float64]:
        if cohort.seeds[0] != 900:  # not the validation cohort
            assert not model.seen & set(cohort.seeds.tolist())
        return np.where(cohort.y == 1, 1.0, -1.0) + (cohort.seeds % 7) / 10

    monkeypatch.setattr(fit, "fit", train_on)
    monkeypatch.setattr(fit, "clip_margins", margins)
    train = _cohort(60, 100)
    run: Any = _FoldRun(tmp_path, train)
    RECIPE._fit_folds(run)
    with np.load(tmp_path / "folds.npz") as file:
        assert np.isfinite(file["margin"]).all()
        assert np.sign(file["margin"]) == pytest.approx(2 * train.y - 1)
    spec = RECIPE.fusion(run)
    assert spec is not None
    assert [t["name"] for t in spec["terms"]] == ["logit", "FSH", "TESTICULAR_VOLUME", "EDV"]
    assert spec["n"] == 60


def test_patients_with_a_missing_value_are_left_out_of_the_nomogram_never_filled_in(tmp_path: Path) -> None:
    train = _cohort(60, 100)
    train.covariates[:10, 1] = np.nan
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "folds.npz", margin=rng.normal(2.0 * train.y - 1), fold=np.arange(60) % 3)
    run: Any = _FoldRun(tmp_path, train)
    spec = RECIPE.fusion(run)
    assert spec is not None
    assert spec["n"] == 50


def test_log_odds_of_another_cohort_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "folds.npz", margin=np.zeros(10), fold=np.arange(10) % 3)
    run: Any = _FoldRun(tmp_path, _cohort(60, 100))
    with pytest.raises(ValueError, match="another cohort"):
        RECIPE.fusion(run)


def test_a_package_without_folds_or_outlines_goes_without_nomogram_and_locator(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
    run = Run("testis_noa", "nano", tmp_path, tmp_path / "out")
    plain: Any = _FoldRun(tmp_path, _cohort(60, 100))
    assert RECIPE.fusion(plain) is None
    assert list(RECIPE.models(run)) == ["classifier"]
    assert RECIPE.golden(run) == {}

"""The regression of the nomogram: likelihood, covariance, interval, the leak it must not have; laboratory reports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.fusion import fuse
from dicom_node.packages.schema import FusionSpec, Task
from dicom_node.result import ClinicalInput, Code, Fusion
from engines.training import stats
from engines.training.fusion import Term, apply_fusion, fit_fusion, probabilities
from engines.training.labsr import LabValue, write_lab_sr

ROOT = Path(__file__).parents[2]
TERMS = (Term("FSH", "log"), Term("VOLUME"))


def _cohort(seed: int, n: int = 500) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 2).astype(np.int64)
    margin = rng.normal(1.2 * (2 * y - 1), 1.5)
    covariates = np.column_stack([np.exp(rng.normal(1.6 + 0.6 * y, 0.6)), rng.normal(15 - 3 * y, 4)])
    return margin, covariates, y


def _design(spec: dict[str, Any], margin: NDArray[np.float64], covariates: NDArray[np.float64]) -> Any:
    columns = [margin, np.log(covariates[:, 0]), covariates[:, 1]]
    return np.column_stack([(c - t["centre"]) / t["scale"] for c, t in zip(columns, spec["terms"], strict=True)])


def test_the_schema_of_the_manifest_takes_it() -> None:
    spec = fit_fusion(*_cohort(1), TERMS, "phantoms")
    kept = FusionSpec.model_validate(spec)
    assert [t.name for t in kept.terms] == ["logit", "FSH", "VOLUME"]
    assert kept.n == 500
    assert kept.terms[1].axis[0] > 0


def test_coefficients_are_those_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    margin, covariates, y = _cohort(2)
    spec = fit_fusion(margin, covariates, y, TERMS)
    model = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=2000).fit(
        _design(spec, margin, covariates), y
    )
    ours = [spec["intercept"], *(t["beta"] for t in spec["terms"])]
    assert ours == pytest.approx([model.intercept_[0], *model.coef_[0]], abs=2e-4)
    assert probabilities(spec, margin, covariates) == pytest.approx(
        model.predict_proba(_design(spec, margin, covariates))[:, 1], abs=1e-4
    )


def test_covariance_is_the_inverse_of_the_numerical_hessian() -> None:
    margin, covariates, y = _cohort(3)
    spec = fit_fusion(margin, covariates, y, TERMS)
    x = np.column_stack([np.ones(len(y)), _design(spec, margin, covariates)])
    at = np.array([spec["intercept"], *(t["beta"] for t in spec["terms"])])

    def loss(b: NDArray[np.float64]) -> float:
        return stats.nll(y, x @ b) * len(y)

    step, k = 1e-3, len(at)
    unit = np.eye(k) * step
    hessian = np.array(
        [
            [
                (loss(at + unit[i] + unit[j]) - loss(at + unit[i] - unit[j]) - loss(at - unit[i] + unit[j])
                 + loss(at - unit[i] - unit[j])) / (4 * step**2)
                for j in range(k)
            ]
            for i in range(k)
        ]
    )  # fmt: skip
    assert np.array(spec["covariance"]) == pytest.approx(np.linalg.inv(hessian), rel=2e-3, abs=1e-6)


def test_the_interval_covers_the_true_probability_in_95_of_100_cohorts() -> None:
    """Repeated sampling: the delta method's interval of one patient holds what the cohort's law gives him."""
    truth = np.array([0.2, 1.1, 0.7, -0.5])
    patient = np.array([0.4, 0.8, -0.6])
    expected = float(stats.sigmoid(np.array([truth[0] + truth[1:] @ patient]))[0])
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(400, 3))
        y = (rng.random(400) < stats.sigmoid(truth[0] + z @ truth[1:])).astype(np.int64)
        spec = fit_fusion(z[:, 0], z[:, 1:], y, (Term("A"), Term("B")))
        _, low, high = apply_fusion(spec, patient[0], {"A": patient[1], "B": patient[2]})
        covered += low <= expected <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_missing_value_is_never_made_up() -> None:
    spec = fit_fusion(*_cohort(1), TERMS)
    with pytest.raises(KeyError, match="VOLUME"):
        apply_fusion(spec, 0.0, {"FSH": 6.0})


def test_a_separable_cohort_stays_finite() -> None:
    y = (np.arange(60) % 2).astype(np.int64)
    spec = fit_fusion(4.0 * (2 * y - 1) + 0.01 * np.arange(60), np.arange(60.0)[:, None], y, (Term("AGE"),))
    probability, low, high = apply_fusion(spec, 4.0, {"AGE": 30.0})
    assert 0.99 < probability < 1
    assert 0 <= low < probability < high <= 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m, c, y: (m, c * 0 + 1, y), "does not vary"),
        (lambda m, c, y: (m, -c, y), "above 0"),
        (lambda m, c, y: (m, c, y * 0), "both classes"),
        (lambda m, c, y: (m, c[:, :1], y), "one finite column"),
        (lambda m, c, y: (m * np.nan, c, y), "one finite column"),
    ],
)
def test_a_cohort_that_tells_nothing_is_refused(change: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit_fusion(*change(*_cohort(4)), TERMS)


def test_in_sample_log_odds_make_the_nomogram_over_trust_the_image() -> None:
    """The leak: a memorising image model on 120 patients, 60 features of which one says something. Its in-sample
    log-odds look far better than they are; fused in-sample, the blood is all but ignored and new patients pay."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    image = linear_model.LogisticRegression(C=10.0, max_iter=5000)

    def patients(seed: int, n: int) -> Any:
        rng = np.random.default_rng(seed)
        y = (np.arange(n) % 2).astype(np.int64)
        features = rng.normal(size=(n, 60))
        features[:, 0] += 0.8 * (2 * y - 1)
        return features, np.column_stack([np.exp(rng.normal(1.5 + 0.9 * y, 0.7))]), y

    features, blood, y = patients(1, 120)
    inside = image.fit(features, y).decision_function(features)
    outside = np.zeros(len(y))
    for fold in range(4):
        held = np.arange(len(y)) // 2 % 4 == fold
        outside[held] = image.fit(features[~held], y[~held]).decision_function(features[held])
    image.fit(features, y)
    new_features, new_blood, new_y = patients(2, 4000)
    new_margin = image.decision_function(new_features)
    loss, trust = {}, {}
    for name, margin in (("inside", inside), ("outside", outside)):
        spec = fit_fusion(margin, blood, y, (Term("FSH", "log"),))
        logit, fsh = spec["terms"]
        trust[name] = (logit["beta"] / logit["scale"]) / (fsh["beta"] / fsh["scale"])
        p = np.clip(probabilities(spec, new_margin, new_blood), 1e-12, 1 - 1e-12)
        loss[name] = stats.nll(new_y, np.log(p / (1 - p)))
    assert trust["inside"] > 2 * trust["outside"]
    assert loss["inside"] > loss["outside"] + 0.3


# --- the node's own arithmetic ---------------------------------------------------------------------------------------


def _node(values: dict[str, float], side: str, margin: float = 0.7) -> Fusion | str:
    spec = FusionSpec.model_validate(_azoospermia())
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/testis_noa/engine.yaml").read_text("utf-8")))
    clinical = {}
    for key, value in values.items():
        name, _, lateral = key.partition(" ")
        clinical[key] = ClinicalInput(name, Code("x", "LN", "x"), value, "1", "", "test", lateral)
    return fuse(spec, task, margin, side, clinical)


def _azoospermia() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    y = (np.arange(300) % 2).astype(np.int64)
    blood = np.exp(rng.normal(np.outer(y, [0.6, -0.2, -0.3]) + np.array([1.8, 2.6, 1.1]), 0.4))
    terms = (Term("FSH", "log"), Term("TESTICULAR_VOLUME"), Term("EDV"))
    return fit_fusion(rng.normal(2.0 * y - 1, 1.5), blood, y, terms)


def test_the_node_computes_what_the_training_side_computes() -> None:
    values = {"FSH": 9.0, "TESTICULAR_VOLUME R": 10.0, "TESTICULAR_VOLUME L": 14.0, "EDV R": 2.0, "EDV L": 3.0}
    for side, volume, edv in (("R", 10.0, 2.0), ("L", 14.0, 3.0), ("B", 12.0, 2.5)):
        found = _node(values, side)
        assert isinstance(found, Fusion)
        expected = apply_fusion(_azoospermia(), 0.7, {"FSH": 9.0, "TESTICULAR_VOLUME": volume, "EDV": edv})
        assert (found.probability, found.low, found.high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "side", "missing"),
    [
        ({"TESTICULAR_VOLUME R": 10.0, "EDV R": 2.0}, "R", "FSH"),
        ({"FSH": 9.0, "TESTICULAR_VOLUME L": 10.0, "EDV R": 2.0}, "R", "TESTICULAR_VOLUME (right)"),
        ({"FSH": 9.0, "TESTICULAR_VOLUME R": 10.0, "TESTICULAR_VOLUME L": 9.0, "EDV R": 2.0}, "B", "EDV"),
    ],
)
def test_the_node_computes_nothing_where_a_value_is_missing(values: dict[str, float], side: str, missing: str) -> None:
    """The value of the other side, or of one side for both, is no substitute."""
    found = _node(values, side)
    assert isinstance(found, str)
    assert "not computed" in found
    assert missing in found


# --- clinical values as a report -------------------------------------------------------------------------------------


def _report() -> Dataset:
    image = Dataset()
    image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "PHANTOM^X", "P1", "19000101", "M"
    image.StudyInstanceUID, image.StudyDate, image.StudyTime, image.StudyID = "2.25.77", "20240115", "093000", "1"
    image.AccessionNumber, image.ReferringPhysicianName = "A1", ""
    testis = ("40689003", "SCT", "Testis")
    return write_lab_sr(
        image,
        [
            LabValue("FSH", "15067-2", "LN", "Follitropin", 12.25, "[IU]/L", time="2024-01-10T08:30:00+08:00"),
            LabValue("VOLUME", "118565006", "SCT", "Volume", 9.5, "mL", "R", site=testis),
            LabValue("EDV", "11653-3", "LN", "End Diastolic Velocity", 3.25, "cm/s", "L"),
        ],
        uid_seed=5,
    )


def test_the_report_is_of_the_same_patient_and_study_and_says_value_unit_side_and_time() -> None:
    ds = _report()
    assert (ds.PatientID, ds.StudyInstanceUID, ds.Modality) == ("P1", "2.25.77", "SR")
    groups = ds.ContentSequence[-1].ContentSequence
    fsh, volume, edv = (g.ContentSequence[-1] for g in groups)
    assert [float(i.MeasuredValueSequence[0].NumericValue) for i in (fsh, volume, edv)] == [12.25, 9.5, 3.25]
    assert fsh.ObservationDateTime == "20240110083000+0800"
    assert volume.ContentSequence[0].ContentSequence[0].ConceptCodeSequence[0].CodeValue == "24028007"
    assert edv.ContentSequence[0].ConceptCodeSequence[0].CodeValue == "7771000"
    assert _report().SOPInstanceUID == ds.SOPInstanceUID


@pytest.mark.peer("dciodvfy")
def test_the_report_passes_the_validator(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed")
    path = tmp_path / "lab.dcm"
    _report().save_as(path, enforce_file_format=True)
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
    assert "EnhancedSR" in said
    assert "Error" not in said
    assert pydicom.dcmread(path).ContentTemplateSequence[0].TemplateIdentifier == "1500"

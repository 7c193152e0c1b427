"""The shipped demonstration package: whole, honest about itself, and it recovers the planted signal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from dicom_node.packages import Manifest
from dicom_node.runtime.accept import accept
from dicom_node.runtime.onnx import OnnxSession
from engines.thyroid_cine import phantom, recipe
from engines.training import stats
from engines.training.package import activation_map
from engines.training.recipe import Sample

FOLDER = Path(__file__).parents[2] / "engines" / "thyroid_cine" / "model"
Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.model_validate(yaml.safe_load((FOLDER / "manifest.yaml").read_text("utf-8")))


def _session(manifest: Manifest, model: str, precision: str) -> OnnxSession:
    entry = manifest.models[model]
    data = (FOLDER / f"models/{model}/{precision}.onnx").read_bytes()
    return OnnxSession(model, data, entry.inputs, entry.outputs, threads=1)


@pytest.fixture(scope="module")
def run(manifest: Manifest) -> Run:
    session = _session(manifest, "classifier", "fp32")
    return lambda x: session.run({"x": x})


def test_every_file_is_listed_with_its_digest_and_nothing_else_lies_there(manifest: Manifest) -> None:
    present = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()} - {"manifest.yaml"}
    assert present == set(manifest.files)
    for name, entry in manifest.files.items():
        data = (FOLDER / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes), name
    assert sum(entry.bytes for entry in manifest.files.values()) < 3_500_000


def test_it_is_a_demonstration_and_says_so(manifest: Manifest) -> None:
    assert manifest.intended_use == "demonstration"
    card = (FOLDER / "MODEL_CARD.md").read_text("utf-8")
    assert "recovers a planted signal" in card
    assert "Not for clinical use" in card
    published = card.split("## The published study")[1].split("##")[0]
    for figure in ("0.916", "0.86", "0.834", "0.638", "10.1186/s40644-025-00944-3"):
        assert figure in published


def test_the_figures_hold_the_gates(manifest: Manifest) -> None:
    """Recorded by `evaluate` at the held-out seeds: the signal is recovered, and not by a shortcut."""
    metrics: Any = manifest.metrics
    test = metrics["test"]
    assert test["n"] + test["refused_by_rule"] >= 400
    assert test["auc"]["ci95"][0] >= 0.90
    assert metrics["shortcut_auc"]["value"] <= 0.70
    assert test["auc"]["ci95"][0] > metrics["shortcut_auc"]["ci95"][1]
    assert metrics["gate_real"]["refused"]["value"] >= 0.95
    assert metrics["permuted_labels"]["ci95"][0] <= 0.5 <= metrics["permuted_labels"]["ci95"][1]
    assert metrics["random_weights_ssim"] < 0.5
    assert metrics["pointing"]["hit_rate"]["ci95"][0] > metrics["pointing"]["chance"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", ["classifier", "locator"])
def test_golden_cases_replay(model: str, precision: str, manifest: Manifest) -> None:
    golden = dict(np.load(FOLDER / "golden.npz", allow_pickle=False))
    entry = manifest.models[model]
    accept(model, _session(manifest, model, precision), golden, entry.tolerance[precision], entry.outputs)  # type: ignore[index]


def test_head_explains_the_logits(run: Run) -> None:
    """W and b of head.npz are the graph's own head, so the 3D map that the node paints sums to the logit difference."""
    head = np.load(FOLDER / "head.npz", allow_pickle=False)
    out = run(np.load(FOLDER / "golden.npz", allow_pickle=False)["classifier.x"])
    cam = activation_map(out["features"], head["W"], 1)
    assert cam.shape[1:] == recipe.GRID
    difference = out["logits"][:, 1] - out["logits"][:, 0]
    assert cam.sum(axis=(1, 2, 3)) + head["b"][1] - head["b"][0] == pytest.approx(difference, abs=1e-3)


def test_gate_refuses_what_is_no_clip_of_a_nodule(run: Run, manifest: Manifest) -> None:
    rng = np.random.default_rng(0)
    shape = np.load(FOLDER / "golden.npz", allow_pickle=False)["classifier.x"][:1].shape
    for name, x in {
        "noise": rng.normal(size=shape),
        "black": np.full(shape, -1.0),
        "white": np.full(shape, 3.0),
    }.items():
        assert _distance(run(x.astype(np.float32))["features"]) > manifest.ood.limit, name


def _distance(features: NDArray[np.float32]) -> float:
    ood = np.load(FOLDER / "ood.npz", allow_pickle=False)
    pooled = features.reshape(*features.shape[:2], -1).mean(axis=2, dtype=np.float64)
    return float(stats.mahalanobis2(pooled, ood["mean"], ood["precision"]).mean())


def _called(out: Mapping[str, NDArray[np.float32]], manifest: Manifest) -> int:
    """What the line would say: 1, 0, or -1 for indeterminate or out of distribution."""
    if _distance(out["features"]) > manifest.ood.limit:
        return -1
    low, high = out["logits"][0]
    p = float(stats.sigmoid(np.array([(high - low) / manifest.calibration.T]))[0])
    band = manifest.decision.abstain
    return -1 if band.lower <= p <= band.upper else int(p >= manifest.decision.threshold)


def _sample(seed: int, label: int, encoding: str) -> Sample:
    sample = recipe.RECIPE.sample(seed, label, phantom.generator(), encoding)
    assert isinstance(sample, Sample)
    return sample


@pytest.mark.parametrize("seed", [910_001, 910_002])
def test_one_seed_with_either_label_is_told_apart(seed: int, run: Run) -> None:
    """Same nodule, same machine, same speckle: only where the small echoes lie moves the score."""
    benign, malignant = (run(_sample(seed, label, "raw").x)["logits"][0] for label in (0, 1))
    assert benign[1] - benign[0] < malignant[1] - malignant[0]


@pytest.mark.parametrize("encoding", ["raw", pytest.param("jpeg", marks=pytest.mark.long)])
def test_twenty_unseen_seeds(encoding: str, run: Run, manifest: Manifest) -> None:
    right = 0
    for seed in range(920_000, 920_020):
        label = seed // 3 % 2  # both classes, not tied to the parity that the cohorts use
        right += _called(run(_sample(seed, label, encoding).x), manifest) == label
    assert right >= 17

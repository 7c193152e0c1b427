"""The node's own gates: faults, out-of-distribution, calibration, abstention, the map, the digest of the input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
from decided import TASK, UID, conclude, instance, manifest, package, result, selection, unit
from numpy.typing import NDArray

from dicom_node import decide
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.errors import StoreError, WorkerError
from dicom_node.metrics import Metrics
from dicom_node.packages import ModelPackage
from dicom_node.result import ClinicalInput, Code, FrameRef, Refusal, RefusalCode, Result, result_from_json

# -- faults are not refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logits": (np.nan, 1.0)}, "logits hold NaN"),
        ({"logits": (np.inf, 1.0)}, "logits hold NaN or infinity"),
        ({"logits": (1.0, 2.0, 3.0)}, r"logits of shape \(3,\), \(2,\) expected"),
        ({"logits": ()}, r"logits of shape \(0,\)"),
        ({"feature_maps": np.full((2, 3, 4, 5), np.nan, np.float32)}, "feature maps hold NaN"),
        ({"feature_maps": np.zeros((2, 4, 4, 5), np.float32)}, r"feature maps of shape .* \(n, 3, h, w\) expected"),
        ({"feature_maps": np.zeros((2, 3), np.float32)}, "feature maps of shape"),
        ({"feature_maps": np.zeros((2, 3, 0, 5), np.float32)}, "feature maps of shape"),
        ({"frames": np.zeros((2, 40, 60), np.float32)}, "type float32, uint8"),
        ({"frames": np.zeros((2, 40, 60, 4), np.uint8)}, "frames of shape"),
        ({"frames": np.zeros((2, 40, 61), np.uint8)}, "a region of 60 x 40 pixels"),
        ({"region": (-1, 20, 58, 59)}, "a region of"),
        ({"laterality": "right"}, "laterality 'right'"),
        ({"cam": np.zeros((1, 4, 5), np.float32)}, "a map that is not"),
        ({"cam": np.full((2, 4, 5), np.inf, np.float32)}, "a map that is not finite"),
        ({"frame_refs": tuple(FrameRef("1.2", "9.9.9", n, 9) for n in (1, 2))}, "instance that was not selected"),
    ],
)
def test_output_that_is_not_what_was_promised_is_a_fault(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkerError, match=f"Lesion 1: .*{said}"):
        conclude(tmp_path, unit(**changes))
    assert not list(tmp_path.iterdir())


def test_no_unit_and_two_of_one_name_are_faults(tmp_path: Path) -> None:
    for units in ((), (unit(), unit())):
        with pytest.raises(WorkerError, match="no unit, or two of the same name"):
            decide.check(selection(), Prediction(units), package())


# -- what two backends are compared by


def test_golden_cases_are_judged_as_a_study_would_be() -> None:
    """Category and calibrated probability by the package's own numbers; beyond the limit no number at all."""
    near, far = np.zeros((1, 3, 4, 5), np.float32), np.full((1, 3, 4, 5), 100.0, np.float32)
    logits = np.array([[0.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 3.0]], np.float32)
    outputs = {"logits": logits, "features": np.concatenate([near, near, near, far])}
    high = round(1 / (1 + np.exp(-1.5)), 4)  # T = 2
    assert decide.judge(TASK, package(), outputs) == (
        ("INDET", 0.5), ("HIGH", high), ("LOW", round(1 - high, 4)), ("OUT_OF_DISTRIBUTION",),
    )  # fmt: skip


def test_features_that_are_not_finite_are_outside() -> None:
    outputs = {"logits": np.zeros((1, 2), np.float32), "features": np.full((1, 3, 4, 5), np.nan, np.float32)}
    assert decide.judge(TASK, package(), outputs) == (("OUT_OF_DISTRIBUTION",),)


# -- out of distribution


def brute_force_distance(u: UnitPrediction, p: ModelPackage) -> float:
    total = 0.0
    for frame in u.feature_maps.astype(float):
        v = np.array([channel.sum() / channel.size for channel in frame]) - p.ood_mean
        total += sum(v[i] * p.ood_precision[i, j] * v[j] for i in range(3) for j in range(3))
    return total / len(u.feature_maps)


def test_the_distance_is_the_mean_squared_mahalanobis_distance() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=(3, 3))
    odd = replace(package(), ood_mean=rng.normal(size=3), ood_precision=a @ a.T + np.eye(3))
    assert decide.ood_distance(unit(), odd) == pytest.approx(brute_force_distance(unit(), odd), rel=1e-9)


def test_images_unlike_the_validated_ones_get_no_number_however_sure_the_network(tmp_path: Path) -> None:
    far = unit(logits=(-50.0, 50.0), level=100.0)
    metrics = Metrics()
    refusal = conclude(tmp_path, far, recorder=metrics)
    distance = brute_force_distance(far, package())
    assert refusal == Refusal(RefusalCode.OUT_OF_DISTRIBUTION, f"distance {distance:.1f} > limit 50.0")
    assert metrics.value("dicom_node_ood_ratio", route="tiny-route") == 1
    assert not list(tmp_path.iterdir())


def test_the_limit_itself_is_inside(tmp_path: Path) -> None:
    at = brute_force_distance(unit(), package())
    assert isinstance(conclude(tmp_path, package=package(ood={"limit": at * (1 + 1e-9)})), Result)
    assert isinstance(conclude(tmp_path, package=package(ood={"limit": at * (1 - 1e-6)})), Refusal)


def test_one_strange_unit_is_left_out_and_said_so(tmp_path: Path) -> None:
    made = result(tmp_path, unit(), unit("Lesion 2", level=100.0))
    assert [f.tracking_identifier for f in made.findings] == ["Lesion 1"]
    assert made.provenance.parameters["Lesion 2: not assessed"].startswith("OUT_OF_DISTRIBUTION(distance")
    assert len(list(tmp_path.iterdir())) == 2


# -- calibration and abstention


def test_probability_is_the_softmax_of_the_tempered_logits() -> None:
    assert decide.probability(np.array([-1.0, 1.0]), manifest()) == pytest.approx(1 / (1 + np.exp(-1)))  # T = 2
    assert decide.probability(np.array([-1.0, 1.0]), manifest(positive="low")) == pytest.approx(1 / (1 + np.exp(1)))
    assert decide.probability(np.array([-3000.0, 3000.0], np.float32), manifest()) == 1.0  # no overflow
    three = manifest(classes=["a", "high", "c"], calibration={"method": "none"})
    assert decide.probability(np.array([0.0, np.log(2), 0.0]), three) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0, "LOW"), (0.4499, "LOW"), (0.45, "INDET"), (0.5, "INDET"), (0.55, "INDET"), (0.5501, "HIGH"), (1.0, "HIGH")],
)
def test_inside_the_band_the_node_abstains(p: float, said: str) -> None:
    assert decide.category(p, TASK, manifest().decision).value == said


def test_without_a_band_the_threshold_decides() -> None:
    narrow = manifest(decision={"threshold": 0.6, "rule": "fixed", "abstain": {"lower": 0.6, "upper": 0.6}})
    assert [decide.category(p, TASK, narrow.decision).value for p in (0.5999, 0.6001)] == ["LOW", "HIGH"]


# -- the map


def brute_force_cam(features: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    n, channels, h, w = features.shape
    cam = np.zeros((n, h, w))
    for k in range(n):
        for y in range(h):
            for x in range(w):
                cam[k, y, x] = sum((weights[1, c] - weights[0, c]) * features[k, c, y, x] for c in range(channels)) / (
                    h * w
                )
    return cam


def test_the_map_is_the_gradient_weighted_map_and_sums_to_the_logit_difference() -> None:
    features = unit().feature_maps
    cam = decide.activation_map(features, tiny_engine.W, manifest())
    np.testing.assert_allclose(cam, brute_force_cam(features, tiny_engine.W), rtol=1e-5)
    logits = features.mean(axis=(2, 3)) @ tiny_engine.W.T
    np.testing.assert_allclose(cam.sum(axis=(1, 2)), logits[:, 1] - logits[:, 0], rtol=1e-5)
    np.testing.assert_allclose(
        decide.activation_map(features, tiny_engine.W, manifest(positive="low")), -cam, rtol=1e-6
    )


def test_upsampling_is_bilinear_between_cell_centres() -> None:
    cells = np.array([[[0.0, 1.0], [2.0, 3.0]]], np.float32)
    grown = decide.upsample(cells, 8, 8)[0]
    assert (grown[0, 0], grown[0, -1], grown[-1, 0], grown[-1, -1]) == (0, 1, 2, 3)  # extended beyond the centres
    np.testing.assert_allclose(grown[0, 2:6], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(decide.upsample(cells, 2, 2), cells)
    assert decide.upsample(np.full((3, 2, 5), 7, np.float32), 11, 13).shape == (3, 11, 13)


def test_a_map_of_the_graph_is_used_where_the_head_is_not_linear(tmp_path: Path) -> None:
    cam = np.zeros((2, 4, 5), np.float32)
    cam[1, 2] = -4.0
    heatmap = result(tmp_path, unit(cam=cam)).findings[0].heatmap
    assert heatmap is not None
    stored = np.load(tmp_path / heatmap.map.name)
    assert (stored.shape, stored.dtype) == ((2, 40, 60), np.float32)
    np.testing.assert_array_equal(stored, decide.upsample(cam, 40, 60))
    assert (stored[0].any(), stored[1, 25].max()) == (False, pytest.approx(-3.8))  # near its centre


# -- the result


def test_the_result_says_all_and_survives_the_trip(tmp_path: Path) -> None:
    made = result(
        tmp_path, unit(laterality="L", laterality_note="from text"), parameters={"panel": "left", "threshold": "0"}
    )
    (finding,) = made.findings
    assert finding.laterality == Code("7771000", "SCT", "Left")
    assert (finding.scores[0].outcome.value, finding.scores[0].probability) == ("PROB", 0.7311)
    assert finding.category.value == "HIGH"
    heatmap = finding.heatmap
    assert heatmap is not None
    assert (heatmap.vmin, heatmap.vmax, heatmap.method, heatmap.region) == (
        0.1, 1.0, "class activation map", (10, 20, 69, 59),
    )  # fmt: skip
    np.testing.assert_array_equal(np.load(tmp_path / heatmap.frames.name), unit().frames)
    said = made.provenance.parameters
    assert said["threshold"] == "0.5000 (fixed)"  # an engine cannot say otherwise
    assert (said["panel"], said["clips"], said["Lesion 1: frames"]) == ("left", "1", "4, 7")
    assert said["Lesion 1: side"] == "from text"
    assert (made.provenance.backend, made.provenance.precision, made.provenance.package_digest) == (
        "onnx",
        "fp32",
        "d" * 64,
    )
    assert result_from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("of_unit", "of_selection", "side", "note"),
    [
        (("R", ""), ("", ""), "R", ""),
        (("", ""), ("L", ""), "L", ""),
        (("", "two sides named"), ("L", ""), None, "two sides named"),
        (("", ""), ("", "no side is named"), None, "no side is named"),
        (("B", ""), ("L", ""), "B", ""),
    ],
)
def test_the_side_is_never_defaulted(
    tmp_path: Path, of_unit: tuple[str, str], of_selection: tuple[str, str], side: str | None, note: str
) -> None:
    u = unit(laterality=of_unit[0], laterality_note=of_unit[1])
    s = selection(laterality=of_selection[0], laterality_note=of_selection[1])
    finding = result(tmp_path, u, selection=s).findings[0]
    assert finding.laterality == (decide.SIDES[side] if side else None)
    assert finding.laterality_note == note


def test_an_unpaired_organ_has_no_side(tmp_path: Path) -> None:
    unpaired = TASK.model_copy(update={"paired": False})
    finding = result(tmp_path, unit(laterality="L", laterality_note="x"), task=unpaired).findings[0]
    assert (finding.laterality, finding.laterality_note) == (None, "")


def test_a_full_disk_is_a_store_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(file: Any, array: Any, **_: Any) -> None:
        calls.append(array)
        file.write(b"half")
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StoreError, match="No space left"):
        conclude(tmp_path, unit(), unit("Lesion 2"))
    assert not list(tmp_path.iterdir())


def test_every_array_is_durable_before_the_result_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd))[1]
    )
    result(tmp_path, unit(), unit("Lesion 2"))
    assert sorted(synced[:-1]) == sorted(map(str, tmp_path.iterdir())) and len(synced) == 5
    assert synced[-1] == str(tmp_path), "their names last"


def test_an_array_that_cannot_be_made_durable_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="Input/output"):
        conclude(tmp_path, unit())
    assert not list(tmp_path.iterdir())


def test_spooled_arrays_are_private_and_named_by_us(tmp_path: Path) -> None:
    result(tmp_path)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.stem) == 32
        assert int(path.stem, 16)


# -- the digest of the input

FSH = ClinicalInput("FSH", Code("15067-2", "LN", "FSH"), 7.5, "[IU]/L", "20260101", "SR")


def digest(
    s: Selection | None = None, clinical: dict[str, ClinicalInput] | None = None, p: ModelPackage | None = None
) -> str:
    return decide.input_digest(s or selection(), clinical or {}, p or package())


@pytest.mark.parametrize(
    "same",
    [
        lambda: digest(selection(instance(instance_id="f" * 32))),
        lambda: digest(selection(instance(path=Path("elsewhere"), received_at=9.0, calling_ae_title="C"))),
        lambda: digest(selection(instance(peer="other", association_id="other", transfer_syntax_uid="1.9"))),
        lambda: digest(p=replace(package(), folder=Path("moved"))),
        lambda: digest(selection(laterality_note="a note")),
    ],
)
def test_how_and_when_an_image_came_changes_nothing(same: Callable[[], str]) -> None:
    assert same() == digest()


@pytest.mark.parametrize(
    "other",
    [
        lambda: digest(selection(instance(digest="b" * 64))),
        lambda: digest(selection(instance(), instance("1.2.5"))),
        lambda: digest(clinical={"FSH": FSH}),
        lambda: digest(p=package("e" * 64)),
        lambda: digest(selection(laterality="L")),
        lambda: digest(selection(parameters={"clips": "2"})),
        lambda: digest(selection(extra={"first": 4})),
    ],
)
def test_what_a_result_depends_on_changes_the_digest(other: Callable[[], str]) -> None:
    assert other() != digest()


def test_the_order_of_arrival_does_not_count_and_clinical_values_do() -> None:
    a, b = instance("1.2.5", digest="b" * 64), instance()
    assert digest(selection(a, b)) == digest(selection(b, a))
    for change in ({"value": 7.6}, {"unit": "mU/mL"}, {"time": "20260102"}, {"source": "sidecar"}):
        assert digest(clinical={"FSH": replace(FSH, **change)}) != digest(clinical={"FSH": FSH})


def test_the_side_of_a_clinical_value_counts() -> None:
    """The same two numbers with their sides exchanged are another patient's blood flow."""
    right, left = replace(FSH, laterality="R"), replace(FSH, laterality="L", value=3.0)
    exchanged = replace(right, value=3.0), replace(left, value=7.5)
    assert digest(clinical={c.key: c for c in (right, left)}) != digest(clinical={c.key: c for c in exchanged})


def test_values_that_are_not_plain_have_no_stable_digest_and_are_a_fault() -> None:
    with pytest.raises(WorkerError, match="plain values"):
        digest(selection(extra={"array": np.zeros(3)}))


# -- volumes, and units that sum up others


def test_a_volume_of_features_is_gated_as_a_whole_and_its_map_spans_the_frames(tmp_path: Path) -> None:
    """Depth 2 over 4 frames: the first frame shows the first cell, the last the last, those between lie between."""
    features = np.zeros((1, 3, 2, 2, 2), np.float32)
    features[0, 0, 0], features[0, 0, 1] = 1, 3
    frames = np.zeros((4, 8, 8), np.uint8)
    refs = tuple(FrameRef("1.2.840", UID, n, 9) for n in (1, 2, 3, 4))
    u = unit(feature_maps=features, frames=frames, frame_refs=refs, region=(0, 0, 7, 7))
    pooled = np.array([2.0, 0, 0]) - package().ood_mean
    assert decide.ood_distance(u, package()) == pytest.approx(pooled @ package().ood_precision @ pooled)
    (found,) = result(tmp_path, u, package=package(ood={"limit": 1e9})).findings
    assert found.heatmap is not None
    painted = np.load(tmp_path / found.heatmap.map.name)
    assert painted.shape == (4, 8, 8)
    shares = painted[:, 0, 0] / painted[0, 0, 0]
    assert shares == pytest.approx([1, 1.5, 2.5, 3])


def test_a_volume_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="feature maps of shape"):
        result(tmp_path, unit(feature_maps=np.zeros((2, 3, 2, 4, 5), np.float32)))


def test_a_unit_that_sums_up_others_has_a_score_and_no_picture(tmp_path: Path) -> None:
    both = unit("Patient", heatmap=False, frames=np.zeros((0, 1, 1), np.uint8), notes=("mean of both sides",))
    found = result(tmp_path, unit("Right testis"), both).findings
    assert found[0].heatmap is not None
    assert found[1].heatmap is None
    assert found[1].notes == ("mean of both sides",)

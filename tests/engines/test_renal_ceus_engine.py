"""The renal CEUS engine on phantom files: what it selects, what it hands to the model, and when it says no."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from dicom_node.engine import Prediction, Selection
from dicom_node.packages import Task
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Instance, Study
from engines.renal_ceus import engine, phantom

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
MakeInstance = Callable[..., Instance]
MakeStudy = Callable[..., Study]


class Recorder:
    """A model that keeps its input and answers with its mean."""

    def __init__(self) -> None:
        self.seen: list[NDArray[np.float32]] = []

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        assert name == "classifier"
        x = inputs["x"]
        self.seen.append(x)
        mean = x.mean(axis=(1, 2, 3))
        return {"logits": np.stack([-mean, mean], 1), "features": np.repeat(x[:, :, ::16, ::16], 3, axis=1)}


def test_engine_yaml_meets_the_schema() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/renal_ceus/engine.yaml").read_text("utf-8")))
    assert (task.task, task.paired, task.site.value, task.outcome.value) == (
        "renal_ceus", True, "64033007", "PROB-HIGHGRADE",
    )  # fmt: skip
    assert task.finding.meaning == "Neoplasm"


def test_engine_imports_only_what_an_engine_may() -> None:
    allowed = {"dicom_node.engine", "dicom_node.pixels", "dicom_node.result", "dicom_node.study", "numpy", "scipy"}
    tree = ast.parse((ROOT / "engines/renal_ceus/engine.py").read_text("utf-8"))
    third_party = {"dicom_node", "numpy", "scipy", "torch", "monai", "pydicom", "engines"}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names:
                assert name.split(".")[0] not in third_party or any(name.startswith(a) for a in allowed), name


# --- select ----------------------------------------------------------------------------------------------------------


def test_selects_contrast_clips_in_order_of_acquisition(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    path = phantom_file(5, 1, frames=3)
    late = instance_of(path, SOPInstanceUID="1.2.1", AcquisitionDateTime="20240101120500", InstanceNumber=1)
    early = instance_of(path, SOPInstanceUID="1.2.2", AcquisitionDateTime="20240101120000", InstanceNumber=2)
    still = instance_of(path, SOPInstanceUID="1.2.3", NumberOfFrames=1)
    selection = engine.select(study_of(late, early, still), {})
    assert isinstance(selection, Selection)
    assert [i.sop_instance_uid for i in selection.instances] == ["1.2.2", "1.2.1"]
    assert selection.laterality == "R"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"NumberOfFrames": 1}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"ContrastBolusAgent": None, "StudyDescription": "Kidney", "SeriesDescription": ""},
         RefusalCode.NO_SUITABLE_IMAGE),
        ({"ContrastBolusAgent": None, "StudyDescription": "US without contrast", "SeriesDescription": ""},
         RefusalCode.NO_SUITABLE_IMAGE),
        ({"ContrastBolusAgent": "NONE"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"UltrasoundColorDataPresent": 1}, RefusalCode.WRONG_VIEW),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "ABDOMINAL", "0011")}, RefusalCode.WRONG_VIEW),
        ({"NumberOfFrames": 2}, RefusalCode.TOO_FEW_FRAMES),
    ],
)  # fmt: skip
def test_refuses_by_header(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy, changes: dict[str, Any], code: RefusalCode
) -> None:
    answer = engine.select(study_of(instance_of(phantom_file(5, 1, frames=3), **changes)), {})
    assert isinstance(answer, Refusal)
    assert answer.code == code


@pytest.mark.parametrize("text", ["CEUS left kidney", "Kontrastmittel-Sonographie Niere", "肾脏超声造影", "US SonoVue"])
def test_contrast_may_be_said_in_words(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy, text: str
) -> None:
    clip = instance_of(
        phantom_file(5, 1, frames=3), ContrastBolusAgent=None, StudyDescription=text, SeriesDescription=None
    )
    assert isinstance(engine.select(study_of(clip), {}), Selection)


# --- predict ---------------------------------------------------------------------------------------------------------


def _predict(instance: Instance, study: Study) -> tuple[Prediction | Refusal, Recorder]:
    run = Recorder()
    selection = engine.select(study, {})
    assert isinstance(selection, Selection)
    return engine.predict(selection, PixelDecoder(), run), run


@pytest.mark.parametrize("seed", [31, 34])
def test_frames_lie_at_fixed_times_after_the_arrival(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy, seed: int
) -> None:
    clip = phantom.make(seed, seed % 2)
    instance = instance_of(phantom_file(seed, seed % 2))
    prediction, run = _predict(instance, study_of(instance))
    assert isinstance(prediction, Prediction)
    (unit,) = prediction.units
    times = np.array([(r.frame_number - 1) * clip.frame_ms / 1000 - clip.arrival_s for r in unit.frame_refs])
    assert np.abs(times - engine.SECONDS_AFTER_ARRIVAL).max() < 2.0
    assert run.seen[0].shape == (6, 1, 224, 224)
    assert unit.region == clip.contrast
    assert unit.frames.shape == (6, *phantom.PANEL)
    assert unit.logits == pytest.approx([-run.seen[0].mean(), run.seen[0].mean()], abs=1e-5)
    assert unit.laterality == "R"
    assert unit.frame_time_ms == pytest.approx(clip.frame_ms, abs=0.01)
    assert {r.sop_instance_uid for r in unit.frame_refs} == {instance.sop_instance_uid}


def test_the_banner_never_reaches_the_model_or_a_picture(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    """Whatever is painted outside the contrast panel changes nothing that leaves the engine."""
    instance = instance_of(phantom_file(31, 1, "raw"))
    outside = np.ones((phantom.ROWS, phantom.COLUMNS), bool)
    outside[phantom.TOP : phantom.TOP + phantom.PANEL[0]] = False

    class Scribbled(PixelDecoder):
        def frames(self, instance: Instance, numbers: Any = None) -> Any:
            for frame in super().frames(instance, numbers):
                frame = frame.copy()
                frame[outside] = 255
                yield frame

    selection = engine.select(study_of(instance), {})
    assert isinstance(selection, Selection)
    clean, dirty = Recorder(), Recorder()
    first = engine.predict(selection, PixelDecoder(), clean)
    second = engine.predict(selection, Scribbled(), dirty)
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert np.array_equal(clean.seen[0], dirty.seen[0])
    assert np.array_equal(first.units[0].frames, second.units[0].frames)


class _Painted(PixelDecoder):
    """The clip with a thin cross in the contrast panel, from a frame on."""

    def __init__(self, colour: tuple[int, int, int], first: int = 1) -> None:
        super().__init__()
        self._colour, self._first = colour, first

    def frames(self, instance: Instance, numbers: Any = None) -> Any:
        x0, y0, x1, y1 = phantom.make(31, 1, frames=1).contrast
        y, x = (y0 + y1) // 2, (x0 + x1) // 2
        wanted = range(1, instance.number_of_frames + 1) if numbers is None else numbers
        for number, frame in zip(wanted, super().frames(instance, numbers), strict=True):
            if number >= self._first:
                frame = frame.copy()
                frame[y - 8 : y + 9, x] = frame[y, x - 8 : x + 9] = self._colour
            yield frame


@pytest.mark.parametrize("colour", [(255, 255, 0), (255, 255, 255)], ids=["yellow", "white"])
def test_calipers_are_masked_and_the_report_says_so(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy, colour: tuple[int, int, int]
) -> None:
    instance = instance_of(phantom_file(31, 1, "raw"))
    selection = engine.select(study_of(instance), {})
    assert isinstance(selection, Selection)
    clean, marked = Recorder(), Recorder()
    first = engine.predict(selection, PixelDecoder(), clean)
    second = engine.predict(selection, _Painted(colour), marked)
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert "Lesion 1: drawn marks masked" not in first.parameters
    said = second.parameters["Lesion 1: drawn marks masked"]
    assert said.endswith("% of the region; they may have told where a person looked")
    assert np.abs(clean.seen[0] - marked.seen[0]).max() < 1.5  # 4 from black to white
    assert (second.units[0].frames >= 220).sum() > (first.units[0].frames >= 220).sum() + 100, "the picture shows them"


def test_a_vessel_that_is_bright_only_once_the_agent_is_there_is_no_mark(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    instance = instance_of(phantom_file(31, 1, "raw"))
    clip = phantom.make(31, 1, frames=1)
    reader = _Painted((255, 255, 255), first=int((clip.arrival_s + 2.0) / clip.frame_ms * 1000))
    selection = engine.select(study_of(instance), {})
    assert isinstance(selection, Selection)
    run = Recorder()
    answer = engine.predict(selection, reader, run)
    assert isinstance(answer, Prediction)
    assert "Lesion 1: drawn marks masked" not in answer.parameters
    assert run.seen[0].max() > 2.5, "the model sees it"


def test_patient_and_descriptions_change_nothing_and_pixels_do(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    path = phantom_file(31, 1)
    one = instance_of(path)
    other = instance_of(path, PatientName="X^Y", PatientID="7", SOPInstanceUID="1.9", SeriesDescription="other")
    swapped = Instance("0" * 32, one.header, "", "", phantom_file(33, 0), "", "", "", "", 0.0)
    seen = [_predict(i, study_of(i))[1].seen[0] for i in (one, other)]
    assert np.array_equal(*seen)
    answer, run = _predict(swapped, study_of(swapped))
    assert isinstance(answer, Refusal) or not np.array_equal(run.seen[0], seen[0])


@pytest.mark.parametrize("encoding", ["jpeg", "rle"])
def test_the_encoding_hardly_changes_the_input(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy, encoding: str
) -> None:
    raw, coded = (instance_of(phantom_file(31, 1, e)) for e in ("raw", encoding))
    (a, first), (b, second) = _predict(raw, study_of(raw)), _predict(coded, study_of(coded))
    assert isinstance(a, Prediction)
    assert isinstance(b, Prediction)
    assert a.units[0].frame_refs[0].frame_number == b.units[0].frame_refs[0].frame_number
    difference = np.abs(first.seen[0] - second.seen[0])
    assert difference.max() == 0 if encoding == "rle" else difference.mean() < 0.06


def test_a_clip_without_arrival_is_refused(phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy) -> None:
    instance = instance_of(phantom_file(31, 1, frames=6))
    answer, run = _predict(instance, study_of(instance))
    assert isinstance(answer, Refusal)
    assert answer.code in (RefusalCode.CONTRAST_ARRIVAL_NOT_FOUND, RefusalCode.CEUS_PANEL_AMBIGUOUS)
    assert not run.seen


def test_a_clip_that_ends_after_the_arrival_has_too_few_frames(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    clip = phantom.make(31, 1, frames=1)
    frames = int((clip.arrival_s + 7.0) / clip.frame_ms * 1000)
    instance = instance_of(phantom_file(31, 1, frames=frames))
    answer, run = _predict(instance, study_of(instance))
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.TOO_FEW_FRAMES
    assert not run.seen


def test_implausible_frame_times_are_refused(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    instance = instance_of(phantom_file(31, 1, frames=12), FrameTime=0.0, CineRate=None)
    answer, _ = _predict(instance, study_of(instance))
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.FRAME_TIME_INVALID


def test_the_second_clip_is_used_where_the_first_shows_no_arrival(
    phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    first = instance_of(phantom_file(31, 1, frames=10), SOPInstanceUID="1.2.1", AcquisitionDateTime="20240101120000")
    second = instance_of(phantom_file(31, 1), SOPInstanceUID="1.2.2", AcquisitionDateTime="20240101120500")
    answer, _ = _predict(first, study_of(first, second))
    assert isinstance(answer, Prediction)
    assert {r.sop_instance_uid for r in answer.units[0].frame_refs} == {"1.2.2"}


def test_two_sides_are_two_results(phantom_file: Make, instance_of: MakeInstance, study_of: MakeStudy) -> None:
    right = instance_of(phantom_file(31, 1), SOPInstanceUID="1.2.1")
    left = instance_of(phantom_file(34, 0, laterality="L"), SOPInstanceUID="1.2.2")
    study = study_of(right, left)
    selection = engine.select(study, {})
    assert isinstance(selection, Selection)
    assert selection.laterality == ""
    answer = engine.predict(selection, PixelDecoder(), Recorder())
    assert isinstance(answer, Prediction)
    assert {u.laterality for u in answer.units} == {"R", "L"}
    assert [u.tracking_identifier for u in answer.units] == ["Lesion 1", "Lesion 2"]

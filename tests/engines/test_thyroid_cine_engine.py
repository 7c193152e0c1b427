"""The thyroid engine on phantom files: which clips and frames it takes, where it looks, when it says no."""

from __future__ import annotations

import ast
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from dicom_node.engine import NoSuchModelError, Prediction, Selection
from dicom_node.packages import Task
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Instance, Study
from engines.thyroid_cine import dicom, engine, phantom
from engines.thyroid_cine.segmentation import segmentation

ROOT = Path(__file__).parents[2]
MakeInstance = Callable[..., Instance]
MakeStudy = Callable[..., Study]
Files = dict[str, Path]


class Models:
    """Models that keep their input: a classifier that answers with its mean, a locator that sees what it is told."""

    def __init__(self, located: NDArray[np.float32] | None = None) -> None:
        self.seen: dict[str, list[NDArray[np.float32]]] = {"classifier": [], "locator": []}
        self.located = located

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        x = inputs["x"]
        self.seen[name].append(x)
        if name == "locator":
            found = np.zeros(engine.LOCATOR_SIZE, np.float32) if self.located is None else self.located
            return {"probability": found[None, None]}
        mean = x.mean(axis=(1, 2, 3, 4))
        return {"logits": np.stack([-mean, mean], 1), "features": np.repeat(x[:, :, ::4, ::8, ::8], 3, axis=1)}


@pytest.fixture(scope="module")
def instance_of(instance_of: MakeInstance) -> MakeInstance:
    """As for the other tasks; with ids of their own, because objects that mark regions are told apart by them."""
    numbers = itertools.count(1)
    return lambda path, **changes: replace(instance_of(path, **changes), instance_id=f"{next(numbers):032x}")


@pytest.fixture(scope="module")
def clip() -> phantom.Clip:
    return phantom.make(5, 1)


@pytest.fixture(scope="module")
def files(clip: phantom.Clip, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """One study: the clip and a SEG of its nodule."""
    folder = tmp_path_factory.mktemp("thyroid")
    image = dicom.dataset(clip, "raw", dicom.labels(uid_seed=5))
    made = {"clip": image, "seg": segmentation(image, [clip.nodule], 5)}
    for name, ds in made.items():
        ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return {name: folder / f"{name}.dcm" for name in made}


@pytest.fixture
def study(files: Files, instance_of: MakeInstance, study_of: MakeStudy) -> Callable[..., Study]:
    """study("clip", "seg", changes={"clip": {keyword: value}})."""

    def make(*names: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Study:
        return study_of(*(instance_of(files[n], **(changes or {}).get(n, {})) for n in names))

    return make


def _predict(study: Study, run: Models, pixels: PixelDecoder | None = None) -> Prediction | Refusal:
    selection = engine.select(study, {})
    assert isinstance(selection, Selection)
    return engine.predict(selection, pixels or PixelDecoder(), run)


def _located(clip: phantom.Clip) -> NDArray[np.float32]:
    """What a perfect locator sees."""
    x0, y0, x1, y1 = clip.region
    return resize(clip.nodule[y0 : y1 + 1, x0 : x1 + 1].astype(np.float32), engine.LOCATOR_SIZE)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def test_engine_yaml_meets_the_schema() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/thyroid_cine/engine.yaml").read_text("utf-8")))
    assert (task.task, task.paired, task.unit, task.site.value) == ("thyroid_cine", False, "lesion", "69748006")
    assert (task.outcome.value, task.clinical) == ("PROB-MALIG", ())
    assert "10.1186/s40644-025-00944-3" in task.study_reference


def test_engine_imports_only_what_an_engine_may() -> None:
    allowed = {"dicom_node.engine", "dicom_node.pixels", "dicom_node.result", "dicom_node.study", "numpy", "scipy"}
    tree = ast.parse((ROOT / "engines/thyroid_cine/engine.py").read_text("utf-8"))
    third_party = {"dicom_node", "numpy", "scipy", "torch", "monai", "pydicom", "engines"}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names:
                assert name.split(".")[0] not in third_party or any(name.startswith(a) for a in allowed), name


# --- select ----------------------------------------------------------------------------------------------------------


def test_selects_the_clip_and_the_object_that_marks_it(study: Callable[..., Study]) -> None:
    selection = engine.select(study("clip", "seg"), {})
    assert isinstance(selection, Selection)
    assert [i.header.text("Modality") for i in selection.instances] == ["US", "SEG"]
    assert selection.laterality == ""  # an unpaired organ


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"NumberOfFrames": 1}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"NumberOfFrames": 15}, RefusalCode.TOO_FEW_FRAMES),
        ({"UltrasoundColorDataPresent": 1}, RefusalCode.WRONG_VIEW),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "SMALL PARTS", "0011")}, RefusalCode.WRONG_VIEW),
        ({"ContrastBolusAgent": "SonoVue"}, RefusalCode.WRONG_VIEW),
    ],
)
def test_refuses_by_header(study: Callable[..., Study], changes: dict[str, Any], code: RefusalCode) -> None:
    answer = engine.select(study("clip", changes={"clip": changes}), {})
    assert isinstance(answer, Refusal)
    assert answer.code == code


def test_a_doppler_clip_beside_the_b_mode_clip_is_left_out(
    files: Files, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    doppler = instance_of(files["clip"], SOPInstanceUID="1.2.77", UltrasoundColorDataPresent=1)
    selection = engine.select(study_of(doppler, instance_of(files["clip"])), {})
    assert isinstance(selection, Selection)
    assert [i.sop_instance_uid for i in selection.instances] != ["1.2.77"]
    assert len(selection.instances) == 1


# --- frames by time --------------------------------------------------------------------------------------------------


def test_frames_are_evenly_spread_in_time_whatever_the_frame_rate(
    clip: phantom.Clip, study: Callable[..., Study]
) -> None:
    for milliseconds in (20.0, 80.0):
        answer = _predict(study("clip", "seg", changes={"clip": {"FrameTime": milliseconds}}), Models())
        assert isinstance(answer, Prediction)
        numbers = [ref.frame_number for ref in answer.units[0].frame_refs]
        assert (numbers[0], numbers[-1], len(set(numbers))) == (1, len(clip.frames), 16)
        assert set(np.diff(numbers)) <= {1, 2}
        # Rounded to frames, half of the steps are one frame long and half two.
        assert answer.units[0].frame_time_ms in (
            pytest.approx(milliseconds),
            pytest.approx(1.5 * milliseconds),
            pytest.approx(2 * milliseconds),
        )


def test_an_uneven_clip_is_sampled_by_its_times_and_not_by_its_numbers() -> None:
    """The first half of the frames took a tenth of the time, and gets about a tenth of the samples; none twice."""
    times = np.concatenate([np.arange(60) * 0.01, 0.6 + np.arange(60) * 0.09])
    numbers = engine._spread(times)
    assert len(set(numbers)) == engine.FRAMES
    assert list(numbers) == sorted(numbers)
    assert sum(n <= 60 for n in numbers) in (1, 2, 3)
    even = np.linspace(times[0], times[-1], engine.FRAMES)
    assert np.abs(times[np.array(numbers) - 1] - even).max() <= 0.045 + 1e-9


@pytest.mark.parametrize("times", [np.zeros(16), np.arange(16.0), np.r_[np.zeros(10), np.arange(7.0)]])
def test_no_frame_is_taken_twice_and_none_that_does_not_exist(times: NDArray[np.float64]) -> None:
    numbers = engine._spread(times)
    assert len(set(numbers)) == engine.FRAMES
    assert 1 <= min(numbers) <= max(numbers) <= len(times)


def test_a_clip_without_plausible_times_is_refused(study: Callable[..., Study]) -> None:
    changes = {"clip": {"FrameTime": 0.0, "CineRate": None}}
    answer = _predict(study("clip", "seg", changes=changes), Models())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.FRAME_TIME_INVALID


# --- where it looks --------------------------------------------------------------------------------------------------


def test_one_volume_of_the_nodule_with_a_margin(clip: phantom.Clip, study: Callable[..., Study]) -> None:
    run = Models()
    answer = _predict(study("clip", "seg"), run)
    assert isinstance(answer, Prediction)
    (unit,) = answer.units
    assert (unit.tracking_identifier, unit.roi_source, unit.laterality) == ("Nodule 1", "SEG", "")
    assert run.seen["classifier"][0].shape == (1, 1, 16, 112, 112)
    assert not run.seen["locator"]
    assert unit.feature_maps.shape[0] == 1  # one volume; the node spreads its depth over the frames
    x0, y0, x1, y1 = _box(clip.nodule)
    wide, high = engine.MARGIN * (x1 - x0 + 1), engine.MARGIN * (y1 - y0 + 1)
    left, top, right, bottom = clip.region
    expected = (max(x0 - wide, left), max(y0 - high, top), min(x1 + wide, right), min(y1 + high, bottom))
    assert unit.region == pytest.approx(expected, abs=1)
    a, b, c, d = unit.region
    for picture, ref in zip(unit.frames, unit.frame_refs, strict=True):
        assert np.array_equal(picture, clip.frames[ref.frame_number - 1, b : d + 1, a : c + 1, 0])


def test_the_network_sees_those_frames_in_their_order(clip: phantom.Clip, study: Callable[..., Study]) -> None:
    run = Models()
    answer = _predict(study("clip", "seg"), run)
    assert isinstance(answer, Prediction)
    seen = run.seen["classifier"][0][0, 0]
    for k in (0, 7, 15):
        shown = resize(answer.units[0].frames[k], engine.INPUT_SIZE) / 255
        assert seen[k] == pytest.approx((shown - engine.MEAN) / engine.STD, abs=1e-5)


def test_the_box_covers_the_region_over_all_frames(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    """A reader who follows a moving nodule draws it elsewhere on every frame."""
    image = pydicom.dcmread(files["clip"])
    objects = []
    for number, (x, frames) in enumerate(((90, list(range(1, 13))), (120, list(range(13, 25))))):
        mask = np.zeros_like(clip.nodule)
        mask[100:140, x : x + 40] = True
        seg = segmentation(image, [mask], 70 + number)
        derivation = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
        derivation.SourceImageSequence[0].ReferencedFrameNumber = frames
        seg.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        objects.append(instance_of(tmp_path / f"{number}.dcm"))
    answer = _predict(study_of(instance_of(files["clip"]), *objects), Models())
    assert isinstance(answer, Prediction)
    x0, y0, x1, y1 = answer.units[0].region
    margin = round(engine.MARGIN * 70)
    assert (x0, x1) == (90 - margin, 159 + margin)
    assert y0 < 100 < 139 < y1


def test_a_result_for_each_nodule_and_none_for_the_gland(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    second = np.zeros_like(clip.nodule)
    second[60:100, 20:60] = True
    gland = np.zeros_like(clip.nodule)
    gland[40:230, 12:276] = True
    seg = segmentation(pydicom.dcmread(files["clip"]), [clip.nodule, second, gland])
    category = seg.SegmentSequence[2].SegmentedPropertyCategoryCodeSequence[0]
    category.CodeValue, category.CodeMeaning = "123037004", "Anatomical Structure"
    kind = seg.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0]
    kind.CodeValue, kind.CodeMeaning = "69748006", "Thyroid"
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    answer = _predict(study_of(instance_of(files["clip"]), instance_of(tmp_path / "seg.dcm")), Models())
    assert isinstance(answer, Prediction)
    assert [u.tracking_identifier for u in answer.units] == ["Nodule 1", "Nodule 2"]
    assert answer.units[0].region != answer.units[1].region


def test_a_nodule_too_small_is_said_beside_the_other(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    tiny = np.zeros_like(clip.nodule)
    tiny[60:70, 20:30] = True
    seg = segmentation(pydicom.dcmread(files["clip"]), [clip.nodule, tiny])
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    answer = _predict(study_of(instance_of(files["clip"]), instance_of(tmp_path / "seg.dcm")), Models())
    assert isinstance(answer, Prediction)
    assert [u.tracking_identifier for u in answer.units] == ["Nodule 1"]
    assert "ROI_REQUIRED" in answer.parameters["Nodule 2: not assessed"]


def test_without_a_drawn_region_the_locator_gives_the_place(clip: phantom.Clip, study: Callable[..., Study]) -> None:
    drawn = _predict(study("clip", "seg"), Models())
    run = Models(_located(clip))
    found = _predict(study("clip"), run)
    assert isinstance(drawn, Prediction)
    assert isinstance(found, Prediction)
    assert found.units[0].roi_source == "auto"
    assert found.units[0].region == pytest.approx(drawn.units[0].region, abs=8)
    assert run.seen["locator"][0].shape == (1, 1, *engine.LOCATOR_SIZE)


def test_a_locator_that_finds_nothing_means_a_region_is_required(study: Callable[..., Study]) -> None:
    run = Models()
    answer = _predict(study("clip"), run)
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED
    assert not run.seen["classifier"]


def test_a_package_without_a_locator_means_a_region_is_required(study: Callable[..., Study]) -> None:
    class OnlyClassifier(Models):
        def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
            if name == "locator":
                raise NoSuchModelError(name)
            return super().__call__(name, inputs)

    answer = _predict(study("clip"), OnlyClassifier())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_a_region_that_cannot_be_placed_is_not_replaced_by_the_locator(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    """Somebody marked something: an automatic place would be another one."""
    seg = pydicom.dcmread(files["seg"])
    seg.Rows, seg.Columns = seg.Rows // 2, seg.Columns
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    run = Models(_located(clip))
    answer = _predict(study_of(instance_of(files["clip"]), instance_of(tmp_path / "seg.dcm")), run)
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_UNREADABLE
    assert not run.seen["locator"]


def test_of_two_clips_the_marked_one_is_used(
    files: Files, instance_of: MakeInstance, study_of: MakeStudy, clip: phantom.Clip
) -> None:
    """An earlier clip without a region does not take precedence over the one that a person marked."""
    plain = instance_of(files["clip"], SOPInstanceUID="1.2.77", AcquisitionDateTime="20200101000000")
    answer = _predict(
        study_of(plain, instance_of(files["clip"]), instance_of(files["seg"])), Models(_located(clip))
    )  # fmt: skip
    assert isinstance(answer, Prediction)
    assert {ref.sop_instance_uid for ref in answer.units[0].frame_refs} != {"1.2.77"}
    assert answer.units[0].roi_source == "SEG"


# --- pixels ----------------------------------------------------------------------------------------------------------


class _Painted(PixelDecoder):
    """The clip's frames with something painted over them."""

    def __init__(self, paint: Callable[[NDArray[np.uint8]], None]) -> None:
        super().__init__()
        self._paint = paint

    def frames(self, instance: Instance, numbers: Any = None) -> Any:
        for frame in super().frames(instance, numbers):
            if instance.header.text("Modality") == "US":
                frame = frame.copy()
                self._paint(frame)
            yield frame


def test_the_banner_never_reaches_a_model_or_a_picture(clip: phantom.Clip, study: Callable[..., Study]) -> None:
    x0, y0, x1, y1 = clip.region
    outside = np.ones(clip.nodule.shape, bool)
    outside[y0 : y1 + 1, x0 : x1 + 1] = False

    def scribble(frame: NDArray[np.uint8]) -> None:
        frame[outside] = 255

    for names in (("clip", "seg"), ("clip",)):
        clean, dirty = Models(_located(clip)), Models(_located(clip))
        first = _predict(study(*names), clean)
        second = _predict(study(*names), dirty, _Painted(scribble))
        assert isinstance(first, Prediction)
        assert isinstance(second, Prediction)
        for name in ("classifier", "locator"):
            assert all(np.array_equal(a, b) for a, b in zip(clean.seen[name], dirty.seen[name], strict=True))
        assert np.array_equal(first.units[0].frames, second.units[0].frames)


def test_colour_that_no_header_admits_is_seen_in_the_pixels(study: Callable[..., Study]) -> None:
    def flow(frame: NDArray[np.uint8]) -> None:
        frame[110:160, 110:180] = (200, 20, 20)

    answer = _predict(study("clip", "seg"), Models(), _Painted(flow))
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.WRONG_VIEW


@pytest.mark.parametrize("names", [("clip", "seg"), ("clip",)], ids=["drawn", "located"])
def test_calipers_are_masked_for_every_model_and_the_report_says_so(
    names: tuple[str, ...], clip: phantom.Clip, study: Callable[..., Study]
) -> None:
    ys, xs = np.nonzero(clip.nodule)
    y, x = int(ys.mean()), int(xs.mean())

    def calipers(frame: NDArray[np.uint8]) -> None:
        frame[y - 6 : y + 7, x] = frame[y, x - 6 : x + 7] = (255, 255, 0)

    def unseen(frame: NDArray[np.uint8]) -> None:
        frame[y - 6 : y + 7, x] = frame[y, x - 6 : x + 7] = 255

    plain, marked, bright = (Models(_located(clip)) for _ in range(3))
    first = _predict(study(*names), plain)
    second = _predict(study(*names), marked, _Painted(calipers))
    _predict(study(*names), bright, _Painted(unseen))
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    said = second.parameters["Nodule 1: drawn marks masked"]
    assert "% of the region; they may have told where a person looked" in said
    assert said.endswith("coloured marks only, white ones are not told from echoes here")
    assert "Nodule 1: drawn marks masked" not in first.parameters
    for name in ("classifier", "locator") if "seg" not in names else ("classifier",):
        ((a,), (b,), (c,)) = plain.seen[name], marked.seen[name], bright.seen[name]
        assert 0 < abs(float((b - a).sum())) < 0.4 * float((c - a).sum()), name
    assert (second.units[0].frames != first.units[0].frames).any(), "the picture shows what the scanner showed"


def test_a_clip_without_a_stated_image_region_is_not_used(study: Callable[..., Study]) -> None:
    """Nobody could say where the banner with the patient's name ends."""
    changes = {"clip": {"SequenceOfUltrasoundRegions": None}}
    answer = _predict(study("clip", "seg", changes=changes), Models())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.NO_SUITABLE_IMAGE


def test_patient_and_descriptions_change_nothing(study: Callable[..., Study]) -> None:
    seen = []
    for changes in ({}, {"PatientName": "X^Y", "PatientID": "7", "StudyDescription": "other"}):
        run = Models()
        _predict(study("clip", "seg", changes={"clip": changes}), run)
        seen.append(run.seen["classifier"][0])
    assert np.array_equal(*seen)


@pytest.mark.parametrize("encoding", ["jpeg", "rle"])
def test_the_encoding_hardly_changes_the_input(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy, encoding: str
) -> None:
    coded = dicom.dataset(clip, encoding, dicom.labels(uid_seed=5))
    coded.save_as(tmp_path / "clip.dcm", enforce_file_format=True)
    seen = []
    for path in (files["clip"], tmp_path / "clip.dcm"):
        run = Models()
        _predict(study_of(instance_of(path), instance_of(files["seg"])), run)
        seen.append(run.seen["classifier"][0])
    difference = np.abs(seen[0] - seen[1])
    assert difference.max() == 0 if encoding == "rle" else difference.mean() < 0.06


# --- the task's README -----------------------------------------------------------------------------------------------


def test_the_recipe_of_the_readme_writes_a_region_that_the_engine_takes(
    clip: phantom.Clip, files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    text = (ROOT / "engines/thyroid_cine/README.md").read_text("utf-8")
    script = tmp_path / "seg.py"
    script.write_text(text.split("```python\n", 1)[1].split("```", 1)[0], "utf-8")
    Image.fromarray(clip.nodule.astype(np.uint8) * 255).save(tmp_path / "nodule1.png")
    second = np.zeros_like(clip.nodule)
    second[60:100, 20:60] = True
    Image.fromarray(second.astype(np.uint8) * 255).save(tmp_path / "nodule2.png")
    arguments = [files["clip"], tmp_path / "seg.dcm", tmp_path / "nodule1.png", tmp_path / "nodule2.png"]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answer = _predict(study_of(instance_of(files["clip"]), instance_of(tmp_path / "seg.dcm")), Models())
    expected = _predict(study_of(instance_of(files["clip"]), instance_of(files["seg"])), Models())
    assert isinstance(answer, Prediction)
    assert isinstance(expected, Prediction)
    assert [(u.tracking_identifier, u.roi_source) for u in answer.units] == [("Nodule 1", "SEG"), ("Nodule 2", "SEG")]
    assert answer.units[0].region == expected.units[0].region
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", str(tmp_path / "seg.dcm")], capture_output=True, text=True).stderr
        assert "Error" not in said, said

"""The azoospermia engine on phantom files: which stills it takes, where it looks, what it hands on, when it says no."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from dicom_node.engine import NoSuchModelError, Prediction, Selection
from dicom_node.packages import Task
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import ClinicalInput, Code, Refusal, RefusalCode
from dicom_node.study import Instance, Study
from engines.testis_noa import dicom, engine, phantom

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
        mean = x.mean(axis=(1, 2, 3))
        return {"logits": np.stack([-mean, mean], 1), "features": np.repeat(x[:, :, ::16, ::16], 3, axis=1)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """One patient: us-1 and us-2 (right, left), lab, seg-1, seg-2."""
    paths = dicom.write(
        phantom.make(5, 1), tmp_path_factory.mktemp("noa"), "raw", dicom.Labels(uid_seed=5), roi=True
    )  # fmt: skip
    return {p.stem.split("-", 3)[-1]: p for p in paths}


@pytest.fixture
def study(files: Files, instance_of: MakeInstance, study_of: MakeStudy) -> Callable[..., Study]:
    """study("us-1", "seg-1", …, changes={"us-1": {keyword: value}})."""

    def make(*names: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Study:
        return study_of(*(instance_of(files[n], **(changes or {}).get(n, {})) for n in names))

    return make


def _predict(study: Study, run: Models) -> Prediction | Refusal:
    selection = engine.select(study, {})
    assert isinstance(selection, Selection)
    return engine.predict(selection, PixelDecoder(), run)


def _located(still: phantom.Still) -> NDArray[np.float32]:
    """What a perfect locator sees."""
    x0, y0, x1, y1 = still.region
    pane = still.mask[y0 : y1 + 1, x0 : x1 + 1].astype(np.float32)
    from dicom_node.pixels.grey import resize

    return resize(pane, engine.LOCATOR_SIZE)


def test_engine_yaml_meets_the_schema() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/testis_noa/engine.yaml").read_text("utf-8")))
    assert (task.task, task.paired, task.unit, task.site.value) == ("testis_noa", True, "testis", "40689003")
    assert (task.outcome.value, task.image_outcome and task.image_outcome.value) == ("PROB-NOA", "PROB-NOA-IMAGE")
    said = [(c.name, c.code.value, c.code.scheme, c.unit, c.per_side) for c in task.clinical]
    assert said == [
        ("FSH", "15067-2", "LN", "[IU]/L", False),
        ("TESTICULAR_VOLUME", "118565006", "SCT", "mL", True),
        ("EDV", "11653-3", "LN", "cm/s", True),
    ]


def test_engine_imports_only_what_an_engine_may() -> None:
    allowed = {"dicom_node.engine", "dicom_node.pixels", "dicom_node.result", "dicom_node.study", "numpy", "scipy"}
    tree = ast.parse((ROOT / "engines/testis_noa/engine.py").read_text("utf-8"))
    third_party = {"dicom_node", "numpy", "scipy", "torch", "monai", "pydicom", "engines"}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names:
                assert name.split(".")[0] not in third_party or any(name.startswith(a) for a in allowed), name


# --- select ----------------------------------------------------------------------------------------------------------


def test_selects_the_stills_of_both_sides_and_the_objects_with_regions(study: Callable[..., Study]) -> None:
    selection = engine.select(study("us-2", "us-1", "lab", "seg-1", "seg-2"), {})
    assert isinstance(selection, Selection)
    kinds = [i.header.text("Modality") for i in selection.instances]
    assert kinds[:2] == ["US", "US"]
    assert [i.header.text("ImageLaterality") for i in selection.instances[:2]] == ["R", "L"]
    assert kinds.count("SEG") == 2
    assert selection.laterality == "B"


def test_clinical_values_do_not_change_the_selection(study: Callable[..., Study]) -> None:
    """Fusion is the node's: with or without blood values the engine hands on the same."""
    fsh = ClinicalInput("FSH", Code("15067-2", "LN", "FSH"), 9.0, "[IU]/L", "", "SR")
    assert engine.select(study("us-1", "us-2"), {"FSH": fsh}) == engine.select(study("us-1", "us-2"), {})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"NumberOfFrames": 40}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"BodyPartExamined": "KIDNEY"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"UltrasoundColorDataPresent": 1}, RefusalCode.WRONG_VIEW),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "SMALL PARTS", "0011")}, RefusalCode.WRONG_VIEW),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "SMALL PARTS", "0009")}, RefusalCode.WRONG_VIEW),
        ({"ImageLaterality": None}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"ImageLaterality": "B"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"ImageLaterality": "R", "SeriesDescription": "left testis"}, RefusalCode.NO_SUITABLE_IMAGE),
    ],
)
def test_refuses_by_header(study: Callable[..., Study], changes: dict[str, Any], code: RefusalCode) -> None:
    answer = engine.select(study("us-1", changes={"us-1": changes}), {})
    assert isinstance(answer, Refusal)
    assert answer.code == code


def test_a_still_of_unknown_side_is_left_out_and_said(study: Callable[..., Study]) -> None:
    selection = engine.select(study("us-1", "us-2", changes={"us-2": {"ImageLaterality": None}}), {})
    assert isinstance(selection, Selection)
    assert len(selection.instances) == 1
    assert selection.laterality == "R"
    assert any("side unknown" in value for value in selection.parameters.values())


# --- predict ---------------------------------------------------------------------------------------------------------


def test_a_result_for_each_testis_and_one_for_the_patient(study: Callable[..., Study]) -> None:
    run = Models()
    answer = _predict(study("us-1", "us-2", "seg-1", "seg-2"), run)
    assert isinstance(answer, Prediction)
    right, left, patient = answer.units
    assert [u.tracking_identifier for u in answer.units] == ["Right testis", "Left testis", "Patient"]
    assert [u.laterality for u in answer.units] == ["R", "L", "B"]
    assert {u.roi_source for u in answer.units} == {"SEG"}
    assert patient.logits == pytest.approx((right.logits + left.logits) / 2)
    assert patient.feature_maps.shape[0] == len(patient.frame_refs) == 2
    assert not patient.heatmap
    assert right.heatmap
    assert right.frame_refs[0] != left.frame_refs[0]
    assert not run.seen["locator"]


def test_the_crop_is_the_testis_and_a_quarter_around(study: Callable[..., Study]) -> None:
    still = phantom.make(5, 1).stills[0]
    rows, columns = np.nonzero(still.mask.any(axis=1))[0], np.nonzero(still.mask.any(axis=0))[0]
    answer = _predict(study("us-1", "seg-1"), Models())
    assert isinstance(answer, Prediction)
    (unit,) = answer.units
    wide, high = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    expected = (columns[0] - wide / 4, rows[0] - high / 4, columns[-1] + wide / 4, rows[-1] + high / 4)
    x0, y0, x1, y1 = still.region
    clipped = (max(expected[0], x0), max(expected[1], y0), min(expected[2], x1), min(expected[3], y1))
    assert unit.region == pytest.approx(clipped, abs=1)
    a, b, c, d = unit.region
    assert np.array_equal(unit.frames[0], still.image[b : d + 1, a : c + 1])


def test_one_side_alone_has_no_patient_unit(study: Callable[..., Study]) -> None:
    answer = _predict(study("us-2", "seg-2"), Models())
    assert isinstance(answer, Prediction)
    assert [u.tracking_identifier for u in answer.units] == ["Left testis"]


def test_the_banner_never_reaches_the_model_or_a_picture(study: Callable[..., Study]) -> None:
    """Whatever is painted outside the B-mode region changes nothing that leaves the engine."""
    x0, y0, x1, y1 = phantom.make(5, 1).stills[0].region
    outside = np.ones((phantom.ROWS, phantom.COLUMNS), bool)
    outside[y0 : y1 + 1, x0 : x1 + 1] = False

    class Scribbled(PixelDecoder):
        def frames(self, instance: Instance, numbers: Any = None) -> Any:
            for frame in super().frames(instance, numbers):
                frame = frame.copy()
                if frame.shape[:2] == outside.shape and instance.header.text("Modality") == "US":
                    frame[outside] = 255
                yield frame

    selection = engine.select(study("us-1", "us-2", "seg-1"), {})
    assert isinstance(selection, Selection)
    located = _located(phantom.make(5, 1).stills[1])
    clean, dirty = Models(located), Models(located)
    first = engine.predict(selection, PixelDecoder(), clean)
    second = engine.predict(selection, Scribbled(), dirty)
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert len(first.units) == 3
    for name in ("classifier", "locator"):
        assert clean.seen[name]
        assert all(np.array_equal(a, b) for a, b in zip(clean.seen[name], dirty.seen[name], strict=True))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first.units, second.units, strict=True))


def test_without_a_drawn_region_the_locator_gives_the_place(study: Callable[..., Study]) -> None:
    still = phantom.make(5, 1).stills[0]
    drawn = _predict(study("us-1", "seg-1"), Models())
    run = Models(_located(still))
    found = _predict(study("us-1"), run)
    assert isinstance(drawn, Prediction)
    assert isinstance(found, Prediction)
    assert found.units[0].roi_source == "auto"
    assert found.units[0].region == pytest.approx(drawn.units[0].region, abs=6)
    assert run.seen["locator"][0].shape == (1, 1, *engine.LOCATOR_SIZE)


def test_a_mixed_patient_is_as_sure_of_the_place_as_the_weaker_side(study: Callable[..., Study]) -> None:
    answer = _predict(study("us-1", "us-2", "seg-1"), Models(_located(phantom.make(5, 1).stills[1])))
    assert isinstance(answer, Prediction)
    assert [u.roi_source for u in answer.units] == ["SEG", "auto", "auto"]


def test_a_locator_that_finds_nothing_means_a_region_is_required(study: Callable[..., Study]) -> None:
    run = Models()
    answer = _predict(study("us-1", "us-2"), run)
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED
    assert not run.seen["classifier"]


def test_a_package_without_a_locator_means_a_region_is_required(study: Callable[..., Study]) -> None:
    class OnlyClassifier(Models):
        def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
            if name == "locator":
                raise NoSuchModelError(name)
            return super().__call__(name, inputs)

    answer = _predict(study("us-1", "us-2"), OnlyClassifier())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_a_side_without_a_place_is_said_beside_the_other(study: Callable[..., Study]) -> None:
    answer = _predict(study("us-1", "us-2", "seg-1"), Models())
    assert isinstance(answer, Prediction)
    assert [u.tracking_identifier for u in answer.units] == ["Right testis"]
    assert "ROI_REQUIRED" in answer.parameters["Left testis: not assessed"]


def _seg(files: Files, tmp_path: Path, change: Callable[[Dataset], None]) -> Path:
    ds = pydicom.dcmread(files["seg-1"])
    change(ds)
    ds.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    return tmp_path / "seg.dcm"


def test_a_region_of_the_other_side_is_not_used(
    files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    def left(ds: Dataset) -> None:
        modifier = ds.SegmentSequence[0].AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0]
        modifier.CodeValue, modifier.CodeMeaning = "7771000", "Left"

    run = Models(_located(phantom.make(5, 1).stills[0]))
    seg = instance_of(_seg(files, tmp_path, left))
    answer = _predict(study_of(instance_of(files["us-1"]), seg), run)
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED
    assert "other side" in answer.detail
    assert not run.seen["classifier"]


def test_the_region_of_a_lesion_is_not_taken_for_the_testis(
    files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    def lesion(ds: Dataset) -> None:
        segment = ds.SegmentSequence[0]
        category = segment.SegmentedPropertyCategoryCodeSequence[0]
        category.CodeValue, category.CodeMeaning = "49755003", "Morphologically Altered Structure"

    still = phantom.make(5, 1).stills[0]
    seg = instance_of(_seg(files, tmp_path, lesion))
    answer = _predict(study_of(instance_of(files["us-1"]), seg), Models(_located(still)))
    assert isinstance(answer, Prediction)
    assert answer.units[0].roi_source == "auto"


def test_a_still_without_a_stated_image_region_is_not_used(study: Callable[..., Study]) -> None:
    """Nobody could say where the banner with the patient's name begins."""
    answer = _predict(
        study("us-1", "seg-1", changes={"us-1": {"SequenceOfUltrasoundRegions": None}}), Models()
    )  # fmt: skip
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.NO_SUITABLE_IMAGE


def test_colour_that_no_header_admits_is_seen_in_the_pixels(study: Callable[..., Study]) -> None:
    class Coloured(PixelDecoder):
        def frames(self, instance: Instance, numbers: Any = None) -> Any:
            for frame in super().frames(instance, numbers):
                if instance.header.text("Modality") != "US":
                    yield frame
                    continue
                painted = np.repeat(frame[..., None], 3, axis=2).copy()
                painted[150:220, 180:300] = (200, 20, 20)
                yield painted

    selection = engine.select(study("us-1", "seg-1"), {})
    assert isinstance(selection, Selection)
    answer = engine.predict(selection, Coloured(), Models())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.WRONG_VIEW


def test_the_first_of_two_drawn_stills_is_used_whatever_the_order_of_arrival(
    files: Files, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    """A second still of the same side, acquired earlier but without a region, does not take precedence."""
    drawn, seg = instance_of(files["us-1"]), instance_of(files["seg-1"])
    plain = instance_of(files["us-1"], SOPInstanceUID="1.2.77", AcquisitionDateTime="20200101000000")
    answer = _predict(study_of(plain, drawn, seg), Models(_located(phantom.make(5, 1).stills[0])))
    assert isinstance(answer, Prediction)
    assert answer.units[0].frame_refs[0].sop_instance_uid == drawn.sop_instance_uid
    assert answer.units[0].roi_source == "SEG"


def test_patient_and_descriptions_change_nothing(files: Files, instance_of: MakeInstance, study_of: MakeStudy) -> None:
    seen = []
    for changes in ({}, {"PatientName": "X^Y", "PatientID": "7", "StudyDescription": "other"}):
        run = Models()
        _predict(study_of(instance_of(files["us-1"], **changes), instance_of(files["seg-1"])), run)
        seen.append(run.seen["classifier"][0])
    assert np.array_equal(*seen)


@pytest.mark.parametrize("encoding", ["jpeg", "rle"])
def test_the_encoding_hardly_changes_the_input(
    files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy, encoding: str
) -> None:
    labels = dicom.Labels(uid_seed=5, sides="R")
    coded = dicom.write(phantom.make(5, 1), tmp_path, encoding, labels)[0]
    seen = []
    for path in (files["us-1"], coded):
        run = Models()
        _predict(study_of(instance_of(path), instance_of(files["seg-1"])), run)
        seen.append(run.seen["classifier"][0])
    difference = np.abs(seen[0] - seen[1])
    assert difference.max() == 0 if encoding == "rle" else difference.mean() < 0.06


def test_the_recipe_of_the_readme_writes_a_region_that_the_engine_takes(
    files: Files, tmp_path: Path, instance_of: MakeInstance, study_of: MakeStudy
) -> None:
    text = (ROOT / "engines/testis_noa/README.md").read_text("utf-8")
    script = tmp_path / "seg.py"
    script.write_text(text.split("```python\n", 1)[1].split("```", 1)[0], "utf-8")
    still = phantom.make(5, 1).stills[0]
    Image.fromarray(still.mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    arguments = [str(files["us-1"]), str(tmp_path / "mask.png"), str(tmp_path / "seg.dcm")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = _predict(study_of(instance_of(files["us-1"]), instance_of(tmp_path / "seg.dcm")), Models())
    expected = _predict(study_of(instance_of(files["us-1"]), instance_of(files["seg-1"])), Models())
    assert isinstance(answer, Prediction)
    assert isinstance(expected, Prediction)
    assert answer.units[0].roi_source == "SEG"
    assert answer.units[0].region == expected.units[0].region
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", str(tmp_path / "seg.dcm")], capture_output=True, text=True).stderr
        assert "Error" not in said, said


class _Painted(PixelDecoder):
    """Stills with calipers of a colour on the testis."""

    def __init__(self, colour: tuple[int, int, int], y: int, x: int) -> None:
        super().__init__()
        self._colour, self._at = colour, (y, x)

    def frames(self, instance: Instance, numbers: Any = None) -> Any:
        y, x = self._at
        for frame in super().frames(instance, numbers):
            if instance.header.text("Modality") != "US":
                yield frame
                continue
            painted = np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame.copy()
            painted[y - 8 : y + 9, x] = painted[y, x - 8 : x + 9] = self._colour
            yield painted


@pytest.mark.parametrize("names", [("us-1", "seg-1"), ("us-1",)], ids=["drawn", "located"])
def test_coloured_calipers_are_masked_for_every_model_and_the_report_says_so(
    names: tuple[str, ...], study: Callable[..., Study]
) -> None:
    """White ones cannot be told from echoes in a still: nothing is guessed, and the report says it."""
    still = phantom.make(5, 1).stills[0]
    ys, xs = np.nonzero(still.mask)
    y, x = int(ys.mean()), int(xs.mean())
    selection = engine.select(study(*names), {})
    assert isinstance(selection, Selection)
    seen, parameters = {}, {}
    readers = {"plain": PixelDecoder(), "yellow": _Painted((255, 255, 0), y, x), "white": _Painted((255,) * 3, y, x)}
    for kind, reader in readers.items():
        run = Models(_located(still))
        answer = engine.predict(selection, reader, run)
        assert isinstance(answer, Prediction)
        seen[kind], parameters[kind] = run.seen, answer.parameters
    told = "Right testis: drawn marks masked"
    assert told not in parameters["plain"] and told not in parameters["white"]
    assert "they may have told where a person looked; coloured marks only" in parameters["yellow"][told]
    for name in ("classifier", "locator") if names == ("us-1",) else ("classifier",):
        (plain,), (yellow,), (white,) = seen["plain"][name], seen["yellow"][name], seen["white"][name]
        assert 0 < abs(float((yellow - plain).sum())) < 0.4 * float((white - plain).sum()), name

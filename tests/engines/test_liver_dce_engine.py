"""The liver engine on phantom studies: every encoding gives one input; what is missing is refused by name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.engine import Prediction, Selection, Site
from dicom_node.packages import Task
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.dynamic import Rules
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Instance, Study
from engines.liver_dce import engine, objects, phantom
from engines.training.headers import MemoryReader, instance_of

ROOT = Path(__file__).parents[2]
CELLS = (4, 16, 16)


class Recorder:
    """A model that keeps its input and answers with a map that is hot in one corner of the arterial phase."""

    def __init__(self) -> None:
        self.seen: list[NDArray[np.float32]] = []

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        assert name == "classifier"
        self.seen.append(inputs["x"])
        cam = np.zeros((1, 4, *CELLS), np.float32)
        cam[0, 1, 2, 5, 10] = 1
        return {
            "logits": np.array([[-1.0, 1.0]], np.float32),
            "features": np.zeros((1, 6, *CELLS), np.float32),
            "cam": cam,
            "attention": np.array([[0.1, 0.5, 0.15, 0.25]]),
        }


@pytest.fixture(scope="module")
def exam() -> phantom.Exam:
    return phantom.make(21, 1)


def _instances(made: list[Dataset]) -> tuple[list[Instance], MemoryReader]:
    frames = {}
    for ds in made:
        whole = ds.pixel_array
        frames[str(ds.SOPInstanceUID)] = whole if whole.ndim == 3 else whole[None]
    return [replace(instance_of(ds), instance_id=uuid.uuid4().hex) for ds in made], MemoryReader(frames)


def _study(
    exam: phantom.Exam, encoding: str = "series", drop: Callable[[Dataset], bool] | None = None,
    masks: tuple[NDArray[np.bool_], ...] | None = None, **changes: Any,
) -> tuple[Study, MemoryReader]:  # fmt: skip
    """The study in memory: phases that are not dropped, and a SEG for each mask (default: the tumour)."""
    made = objects.images(exam, encoding, objects.Labels(uid_seed=exam.seed))
    kept = [ds for ds in made if drop is None or not drop(ds)]
    arterial = made[20:40]
    segs = []
    for number, mask in enumerate((exam.drawn_mask,) if masks is None else masks):
        seg = objects.segmentation(replace(exam, drawn_mask=mask), arterial)
        if number:  # other lesions, drawn into objects of their own
            seg.SOPInstanceUID = seg.file_meta.MediaStorageSOPInstanceUID = f"{seg.SOPInstanceUID[:-3]}{number:03d}"
            item = seg.SegmentSequence[0]
            item.TrackingUID, item.TrackingID = f"2.25.{number}", f"Tumour {number}"
            item.SegmentLabel = f"Tumour {number}"
        segs.append(seg)
    instances, reader = _instances([*kept, *segs])
    return Study.from_instances("1.2.3", 1, instances), reader


def _box(z: int, y: int, x: int, side: int = 12) -> NDArray[np.bool_]:
    mask = np.zeros(phantom.SHAPE, np.bool_)
    mask[z : z + 4, y : y + side, x : x + side] = True
    return mask


def _predicted(study: Study, reader: Any, run: Any) -> Prediction:
    selection = engine.select(study, {})
    assert isinstance(selection, Selection), selection
    answer = engine.predict(selection, reader, run)
    assert isinstance(answer, Prediction), answer
    return answer


def test_engine_yaml_meets_the_schema() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/liver_dce/engine.yaml").read_text("utf-8")))
    assert (task.task, task.paired, task.site.value, task.outcome.value) == (
        "liver_dce", False, "10200004", "PROB-PROLIF",
    )  # fmt: skip
    assert task.finding.meaning == "Neoplasm"


def test_engine_imports_only_what_an_engine_may() -> None:
    allowed = {"dicom_node.engine", "dicom_node.pixels", "dicom_node.result", "dicom_node.study", "numpy", "scipy"}
    third_party = {"dicom_node", "numpy", "scipy", "torch", "monai", "pydicom", "engines"}
    for node in ast.walk(ast.parse((ROOT / "engines/liver_dce/engine.py").read_text("utf-8"))):
        names = (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names:
                assert name.split(".")[0] not in third_party or any(name.startswith(a) for a in allowed), name


def test_a_site_names_the_phases_by_its_own_windows(exam: phantom.Exam) -> None:
    """Select and predict go by the same rules, which count in the input digest and stand in the report."""
    study, reader = _study(exam, "times")
    usual = engine.select(study, {})
    own = engine.select(study, {}, Site(Rules(words={"delayed": ("spezial",)})))
    assert isinstance(usual, Selection) and isinstance(own, Selection)
    assert dict(usual.extra) == {} and own.extra["words"] == {"delayed": ["spezial"]}
    assert own.parameters["phase rules of the site"] == "delayed also called spezial"
    answer = engine.predict(own, reader, Recorder())
    assert isinstance(answer, Prediction)
    assert answer.parameters["phase rules of the site"] == "delayed also called spezial"
    refused = engine.select(study, {}, Site(Rules(windows={"portal venous": (90, 110)})))
    assert isinstance(refused, Refusal) and refused.code == RefusalCode.PHASE_MISSING


@pytest.mark.parametrize("encoding", objects.ENCODINGS)
def test_every_encoding_gives_the_network_what_training_saw(encoding: str, exam: phantom.Exam) -> None:
    run = Recorder()
    study, reader = _study(exam, encoding)
    answer = _predicted(study, reader, run)
    expected = engine.prepare(exam.volume.astype(np.float32), exam.affine, exam.drawn_mask)
    assert isinstance(expected, engine.Prepared)
    assert len(answer.units) == 1
    # Series with a slope of their own are rounded to it, as a scanner would.
    assert run.seen[0] == pytest.approx(expected.x, abs=2e-2 if encoding == "times" else 1e-4)
    assert "pre -25, arterial" in answer.parameters["phase times (s)"]


def test_files_on_disk_give_the_same(
    exam: phantom.Exam, tmp_path: Path, instance_of: Callable[..., Instance], study_of: Callable[..., Study]
) -> None:
    paths = objects.write(exam, tmp_path, "series", objects.Labels(uid_seed=1), roi=True)
    study = study_of(*(replace(instance_of(p), instance_id=uuid.uuid4().hex) for p in paths))
    run, memory = Recorder(), Recorder()
    unit = _predicted(study, PixelDecoder(), run).units[0]
    _predicted(*_study(exam), memory)
    assert np.array_equal(run.seen[0], memory.seen[0])
    assert unit.roi_source == "SEG"


def test_a_unit_shows_the_arterial_slices_around_the_tumour(exam: phantom.Exam) -> None:
    study, reader = _study(exam)
    answer = _predicted(study, reader, Recorder())
    unit = answer.units[0]
    arterial = {i.sop_instance_uid: i for i in study.instances if "arterial" in i.header.text("SeriesDescription")}
    assert [r.sop_instance_uid in arterial for r in unit.frame_refs] == [True] * len(unit.frame_refs)
    heights = [arterial[r.sop_instance_uid].header["ImagePositionPatient"][2] for r in unit.frame_refs]  # type: ignore[index]
    assert heights == sorted(heights)
    x0, y0, x1, y1 = unit.region
    rows, columns = (np.flatnonzero(exam.drawn_mask.any(axis=a)) for a in ((0, 2), (0, 1)))
    assert x0 < columns[0] < columns[-1] < x1
    assert y0 < rows[0] < rows[-1] < y1
    assert unit.frames.shape[1:] == (y1 - y0 + 1, x1 - x0 + 1)
    assert unit.frames.min() == 0
    assert unit.frames.max() == 255
    assert answer.parameters["Lesion 1: attention"] == "pre 10%, arterial 50%, portal venous 15%, delayed 25%"


def test_the_map_lies_where_its_cell_does(exam: phantom.Exam) -> None:
    """The cell of the recorder, through voxel of the grid and millimetres, to the brightest native pixel."""
    study, reader = _study(exam)
    unit = _predicted(study, reader, Recorder()).units[0]
    prepared = engine.prepare(exam.volume.astype(np.float32), exam.affine, exam.drawn_mask)
    assert isinstance(prepared, engine.Prepared)
    assert unit.cam is not None
    on_grid = [(c + 0.5) * n / k - 0.5 for c, n, k in zip((2, 5, 10), engine.GRID, CELLS, strict=True)]
    native = [
        c + (g - (n - 1) / 2) * s
        for c, g, n, s in zip(prepared.centre, on_grid, engine.GRID, prepared.step, strict=True)
    ]
    z, y, x = np.unravel_index(int(unit.cam.argmax()), unit.cam.shape)
    found = (prepared.slices[int(z)], unit.region[1] + y, unit.region[0] + x)
    assert found == pytest.approx(native, abs=0.75)


def test_a_tumour_larger_than_the_grid_is_seen_whole() -> None:
    volume = np.random.default_rng(0).random((4, 60, 180, 180), np.float32)
    mask = np.zeros(volume.shape[1:], np.bool_)
    mask[10:50, 20:150, 40:120] = True
    prepared = engine.prepare(volume, np.diag([1.0, 1.0, 2.0, 1.0]), mask)
    assert isinstance(prepared, engine.Prepared)
    region = prepared.x[0, 4]
    assert region[0].max() == region[-1].max() == region[:, 0].max() == region[:, -1].max() == 0
    assert prepared.step[1] == prepared.step[2]  # in-plane shape is kept
    assert region[8, 32].sum() / region[8, :, 32].sum() == pytest.approx(80 / 130, abs=0.05)


def test_resampling_averages_what_is_finer_than_the_grid_and_keeps_constants() -> None:
    weights = engine.interpolation(100, engine.places(49.5, 20, 4.0), 4.0)
    assert weights.sum(axis=1) == pytest.approx(np.ones(20))
    stripes = np.arange(100) % 2
    assert (weights @ stripes)[3:-3] == pytest.approx(np.full(14, 0.5), abs=0.02)
    line = np.arange(50.0)
    fine = engine.interpolation(50, engine.places(20.0, 11, 0.5), 0.5)
    assert fine @ line == pytest.approx(engine.places(20.0, 11, 0.5))


# --- lesions ---------------------------------------------------------------------------------------------------------


def test_every_outlined_lesion_is_a_unit_at_most_three(exam: phantom.Exam) -> None:
    masks = (exam.drawn_mask, _box(2, 4, 80), _box(2, 80, 4), _box(14, 84, 84, 8))
    study, reader = _study(exam, masks=masks)
    run = Recorder()
    answer = _predicted(study, reader, run)
    assert [u.tracking_identifier for u in answer.units] == ["Lesion 1", "Lesion 2", "Lesion 3"]
    assert len({u.region for u in answer.units}) == 3
    assert answer.parameters["lesions not assessed"] == "1, beyond the 3 largest"


def test_a_region_too_small_is_named_and_the_others_are_read(exam: phantom.Exam) -> None:
    study, reader = _study(exam, masks=(exam.drawn_mask, _box(2, 4, 80, 3)))
    answer = _predicted(study, reader, Recorder())
    assert len(answer.units) == 1
    (said,) = (v for k, v in answer.parameters.items() if k.endswith(": not assessed"))
    assert said.startswith("ROI_REQUIRED")


def test_the_liver_is_no_lesion(exam: phantom.Exam) -> None:
    made = objects.images(exam, "series", objects.Labels(uid_seed=1))
    seg = objects.segmentation(exam, made[20:40])
    category = seg.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[0]
    category.CodeValue, category.CodeMeaning = "123037004", "Anatomical Structure"
    instances, reader = _instances([*made, seg])
    selection = engine.select(Study.from_instances("1.2.3", 1, instances), {})
    assert isinstance(selection, Selection)
    answer = engine.predict(selection, reader, Recorder())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", phantom.PHASES)
def test_a_missing_phase_is_refused_by_name(phase: str, exam: phantom.Exam) -> None:
    study, _ = _study(exam, drop=lambda ds: ds.SeriesDescription.endswith(phase))
    answer = engine.select(study, {})
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.PHASE_MISSING
    assert phase in answer.detail


def test_without_a_region_nothing_is_guessed(exam: phantom.Exam) -> None:
    study, _ = _study(exam, masks=())
    answer = engine.select(study, {})
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_a_region_of_another_examination_is_none(exam: phantom.Exam) -> None:
    made = objects.images(exam, "series", objects.Labels(uid_seed=1))
    other = objects.images(exam, "series", objects.Labels(uid_seed=2))
    seg = objects.segmentation(exam, other[20:40])
    instances, _ = _instances([*made, seg])
    answer = engine.select(Study.from_instances("1.2.3", 1, instances), {})
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_a_lost_slice_is_refused(exam: phantom.Exam) -> None:
    study, _ = _study(exam, drop=lambda ds: ds.SeriesNumber == 4 and ds.InstanceNumber == 9)
    answer = engine.select(study, {})
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.SLICE_MISSING


def test_ultrasound_is_no_dynamic_series(phantom_file: Any, instance_of: Any, study_of: Any) -> None:
    answer = engine.select(study_of(instance_of(phantom_file(5, 1, frames=3))), {})
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.NO_SUITABLE_IMAGE


# --- the recipe of the README ----------------------------------------------------------------------------------------


def test_the_recipe_of_the_readme_writes_regions_that_the_engine_takes(
    exam: phantom.Exam, tmp_path: Path, instance_of: Callable[..., Instance], study_of: Callable[..., Study]
) -> None:
    text = (ROOT / "engines/liver_dce/README.md").read_text("utf-8")
    script = tmp_path / "seg.py"
    script.write_text(text.split("```python\n", 1)[1].split("```", 1)[0], "utf-8")
    paths = objects.write(exam, tmp_path / "study", "series", objects.Labels(uid_seed=1))
    arterial = tmp_path / "arterial"
    arterial.mkdir()
    for path in paths[20:40]:
        (arterial / path.name).symlink_to(path)
    mask = exam.drawn_mask.astype(np.uint8)
    mask[_box(2, 4, 80) & ~exam.drawn_mask] = 2
    np.save(tmp_path / "mask.npy", mask)
    arguments = [str(arterial), str(tmp_path / "mask.npy"), str(tmp_path / "seg.dcm")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    study = study_of(*(replace(instance_of(p), instance_id=uuid.uuid4().hex) for p in [*paths, tmp_path / "seg.dcm"]))
    run, memory = Recorder(), Recorder()
    answer = _predicted(study, PixelDecoder(), run)
    _predicted(*_study(exam), memory)
    assert [u.roi_source for u in answer.units] == ["SEG", "SEG"]
    assert np.array_equal(run.seen[0], memory.seen[0])
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", str(tmp_path / "seg.dcm")], capture_output=True, text=True).stderr
        assert "Error" not in said, said


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy is not installed")
@pytest.mark.parametrize("encoding", objects.ENCODINGS)
def test_the_validator_finds_no_error_in_a_phantom(encoding: str, exam: phantom.Exam, tmp_path: Path) -> None:
    paths = objects.write(exam, tmp_path, encoding, objects.Labels(uid_seed=1), roi=True)
    for path in (paths[0], paths[45], paths[-1]):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
        assert "Error" not in said, said

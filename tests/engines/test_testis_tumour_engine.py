"""The testicular tumour engine on phantom files: what it selects, what it hands to the models, and when it says no."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import yaml
from highdicom.sr import CodedConcept
from numpy.typing import NDArray

from dicom_node.engine import NoSuchModelError, Prediction, Selection
from dicom_node.packages import Task
from dicom_node.pixels import ultrasound
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study

pytest.importorskip("nyxus", reason="nyxus is not installed (pip install 'dicom-node[radiomics]')")

from engines.testis_tumour import engine, objects, phantom

ROOT = Path(__file__).parents[2]
MakeInstance = Callable[..., Instance]


class Models:
    """Bicubic-like super-resolution, and a score that grows with the spread of the grey values inside."""

    def __init__(self, place: NDArray[np.float32] | None = None) -> None:
        self.seen: dict[str, list[NDArray[Any]]] = {}
        self.place = place

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        x = inputs["x"]
        self.seen.setdefault(name, []).append(x)
        if name == "superres":
            return {"y": np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)}
        if name == "locator":
            place = np.zeros((1, 1, *engine.LOCATOR_SIZE), np.float32)
            return {"probability": place if self.place is None else self.place[None, None]}
        assert name == "radiomics"
        spread = x[:, engine.FEATURES.index("INTENSITY_VARIANCE_BIASED")] / 1000
        return {"logits": np.stack([-spread, spread], 1), "features": x[:, :5, None, None]}


@pytest.fixture(scope="module")
def made() -> phantom.Still:
    return phantom.make(31, 1)


@pytest.fixture
def files(made: phantom.Still, tmp_path: Path, instance_of: MakeInstance) -> Callable[..., list[Instance]]:
    """files("us", "seg", "lab", encoding="raw", **changes of the picture) -> instances."""

    def make(*kinds: str, encoding: str = "raw", **changes: object) -> list[Instance]:
        image = objects.still(made, encoding, objects.Labels(uid_seed=1))
        whole = {
            "us": image,
            "seg": objects.segmentation(made, image),
            "lab": objects.laboratory(made, image, 1),
        }
        found = []
        for kind in kinds:
            path = tmp_path / f"{kind}.dcm"
            whole[kind].save_as(path, enforce_file_format=True)
            instance = instance_of(path, **(changes if kind == "us" else {}))
            found.append(replace(instance, instance_id=kind.ljust(32, "0")))
        return found

    return make


def _study(instances: list[Instance]) -> Study:
    return Study.from_instances("1.2.3", 1, instances)


def _predict(
    instances: list[Instance], models: Models | None = None, pixels: Any = None
) -> tuple[Prediction | Refusal, Models]:
    models = models or Models()
    selection = engine.select(_study(instances), {})
    assert isinstance(selection, Selection)
    return engine.predict(selection, pixels or PixelDecoder(), models), models


def test_engine_yaml_meets_the_schema() -> None:
    task = Task.model_validate(yaml.safe_load((ROOT / "engines/testis_tumour/engine.yaml").read_text("utf-8")))
    assert (task.task, task.paired, task.site.value, task.libraries) == ("testis_tumour", True, "40689003", ("nyxus",))
    assert task.image_outcome is not None
    assert [c.name for c in task.clinical] == list(phantom.MARKERS)


def test_engine_imports_only_what_an_engine_may() -> None:
    allowed = {"dicom_node.engine", "dicom_node.pixels", "dicom_node.result", "dicom_node.study", "numpy", "scipy"}
    tree = ast.parse((ROOT / "engines/testis_tumour/engine.py").read_text("utf-8"))
    third_party = {"dicom_node", "numpy", "scipy", "torch", "monai", "pydicom", "engines"}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names:
                assert name is not None
                assert name.split(".")[0] not in third_party or any(name.startswith(a) for a in allowed), name
    assert all("nyxus" not in ast.dump(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))


# --- select ----------------------------------------------------------------------------------------------------------


def test_selects_the_picture_and_the_region_object_but_not_the_laboratory(
    files: Callable[..., list[Instance]],
) -> None:
    instances = files("us", "seg", "lab")
    selection = engine.select(_study(instances), {})
    assert isinstance(selection, Selection)
    assert [i.header.text("Modality") for i in selection.instances] == ["US", "SEG"]
    assert selection.laterality == "R"


UNSCALED = Header(
    {
        "RegionLocationMinX0": 10, "RegionLocationMinY0": 10, "RegionLocationMaxX1": 200, "RegionLocationMaxY1": 200,
        "RegionSpatialFormat": 1, "RegionDataType": 1, "PhysicalUnitsXDirection": 0, "PhysicalUnitsYDirection": 0,
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"SequenceOfUltrasoundRegions": None}, RefusalCode.NO_SUITABLE_IMAGE),
        ({"SequenceOfUltrasoundRegions": (UNSCALED,)}, RefusalCode.CALIBRATION_MISSING),
        ({"UltrasoundColorDataPresent": 1}, RefusalCode.WRONG_VIEW),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "SCROTAL", "0011")}, RefusalCode.WRONG_VIEW),
    ],
)
def test_refuses_by_header(files: Callable[..., list[Instance]], changes: dict[str, Any], code: RefusalCode) -> None:
    answer = engine.select(_study(files("us", **changes)), {})
    assert isinstance(answer, Refusal)
    assert answer.code == code


# --- predict ---------------------------------------------------------------------------------------------------------


def test_the_drawn_region_is_what_is_described(files: Callable[..., list[Instance]], made: phantom.Still) -> None:
    instances = files("us", "seg")
    answer, models = _predict(instances)
    assert isinstance(answer, Prediction)
    (unit,) = answer.units
    assert unit.roi_source == "SEG"
    assert unit.laterality == "R"
    assert unit.frame_refs[0].sop_instance_uid == instances[0].sop_instance_uid
    x0, y0, x1, y1 = unit.region
    assert unit.frames.shape == (1, y1 - y0 + 1, x1 - x0 + 1)
    rows, columns = np.nonzero(made.roi)
    left, top = made.region[:2]
    assert x0 <= columns.min() + left
    assert y0 <= rows.min() + top
    assert columns.max() + left <= x1
    assert rows.max() + top <= y1
    assert np.array_equal(unit.frames[0], made.picture[y0 : y1 + 1, x0 : x1 + 1])
    area = models.seen["radiomics"][0][0, engine.FEATURES.index("SHAPE_AREA_MM2")]
    assert area == pytest.approx(made.roi.sum() * made.mm_per_px**2, rel=0.02)
    assert models.seen["superres"][0].shape == (1, 1, engine.TILE, engine.TILE)
    assert "locator" not in models.seen


def test_without_a_region_the_locator_is_asked_and_its_place_is_said_to_be_automatic(
    files: Callable[..., list[Instance]], made: phantom.Still
) -> None:
    place = ultrasound.resize(made.tumour.astype(np.float32), engine.LOCATOR_SIZE)
    answer, models = _predict(files("us"), Models(place))
    assert isinstance(answer, Prediction)
    assert answer.units[0].roi_source == "auto"
    assert models.seen["locator"][0].shape == (1, 1, *engine.LOCATOR_SIZE)
    area = models.seen["radiomics"][0][0, engine.FEATURES.index("SHAPE_AREA_MM2")]
    assert area == pytest.approx(made.tumour.sum() * made.mm_per_px**2, rel=0.1)


def test_no_region_and_no_place_is_refused(files: Callable[..., list[Instance]]) -> None:
    answer, models = _predict(files("us"))
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED
    assert "radiomics" not in models.seen


def test_a_package_without_a_locator_means_a_region_is_required(files: Callable[..., list[Instance]]) -> None:
    class OnlyClassifier(Models):
        def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
            if name == "locator":
                raise NoSuchModelError(name)
            return super().__call__(name, inputs)

    answer, _ = _predict(files("us"), OnlyClassifier())
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_the_spacing_of_the_machine_does_not_change_the_size(
    files: Callable[..., list[Instance]], made: phantom.Still
) -> None:
    """The same pixels at half the spacing are a tumour of a quarter of the area."""
    (us,) = files("us")
    region = dict(us.header.items_of("SequenceOfUltrasoundRegions")[0])
    panel = ultrasound.tissue_regions(us.header)[0]
    mask = np.zeros(made.picture.shape, np.bool_)
    panel.crop(mask)[:] = made.roi
    whole = engine.prepare(made.picture, panel, mask)
    half = engine.prepare(
        made.picture,
        ultrasound.Region(*panel.bounds, spacing_mm=(made.mm_per_px / 2, made.mm_per_px / 2)),
        mask,
    )
    assert isinstance(whole, engine.Prepared)
    assert isinstance(half, engine.Prepared)
    assert (half.share > 127).sum() == pytest.approx((whole.share > 127).sum() / 4, rel=0.05)
    assert region["PhysicalDeltaX"] == pytest.approx(made.mm_per_px / 10, abs=1e-5)


def test_the_banner_never_reaches_a_model_or_a_picture(
    files: Callable[..., list[Instance]], made: phantom.Still
) -> None:
    """Whatever is painted outside the panel changes nothing that leaves the engine."""
    x0, y0, x1, y1 = made.region
    outside = np.ones(made.picture.shape, bool)
    outside[y0 : y1 + 1, x0 : x1 + 1] = False

    class Scribbled(PixelDecoder):
        def frames(self, instance: Instance, numbers: Any = None) -> Iterator[NDArray[Any]]:
            for frame in super().frames(instance, numbers):
                changed = frame.copy()
                if changed.shape == outside.shape and instance.header.text("Modality") == "US":
                    changed[outside] = 255
                yield changed

    instances = files("us", "seg")
    (clean, first), (dirty, second) = _predict(instances), _predict(instances, pixels=Scribbled())
    assert isinstance(clean, Prediction)
    assert isinstance(dirty, Prediction)
    assert np.array_equal(clean.units[0].frames, dirty.units[0].frames)
    for name in first.seen:
        assert all(np.array_equal(a, b) for a, b in zip(first.seen[name], second.seen[name], strict=True)), name


def test_the_same_study_gives_the_same_bits(files: Callable[..., list[Instance]]) -> None:
    instances = files("us", "seg")
    (a, _), (b, _) = _predict(instances), _predict(instances)
    assert isinstance(a, Prediction)
    assert isinstance(b, Prediction)
    assert np.array_equal(a.units[0].logits, b.units[0].logits)
    assert a.units[0].cam is not None
    assert b.units[0].cam is not None
    assert np.array_equal(a.units[0].cam, b.units[0].cam)


@pytest.mark.parametrize("encoding", ["jpeg", "rle"])
def test_the_encoding_hardly_changes_the_input(files: Callable[..., list[Instance]], encoding: str) -> None:
    _, raw = _predict(files("us", "seg"))
    _, coded = _predict(files("us", "seg", encoding=encoding))
    difference = np.abs(raw.seen["superres"][0] - coded.seen["superres"][0])
    assert difference.max() == 0 if encoding == "rle" else 0 < difference.mean() < 0.02


def test_a_region_larger_than_a_tile_is_covered_by_tiles_without_a_seam() -> None:
    """30 mm: the picture comes back pixel for pixel when super-resolution only repeats."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 255, (400, 400)).astype(np.uint8)
    panel = ultrasound.Region(0, 0, 399, 399, spacing_mm=(engine.NATIVE_MM, engine.NATIVE_MM))
    mask = np.zeros(frame.shape, np.bool_)
    mask[60:300, 40:230] = True
    prepared = engine.prepare(frame, panel, mask)
    assert isinstance(prepared, engine.Prepared)
    models = Models()
    fine, inside = engine.superresolve(prepared, models)
    assert len(models.seen["superres"][0]) > 4
    assert np.array_equal(fine[::2, ::2], prepared.image)
    assert inside.sum() == 4 * mask.sum()
    y, x = prepared.corner
    ys, xs = prepared.inner
    assert np.array_equal(
        prepared.image[ys, xs], frame[max(y, 0) : y + prepared.image.shape[0], max(x, 0) : x + prepared.image.shape[1]]
    )


def test_a_region_at_the_border_of_the_panel_keeps_to_the_panel(made: phantom.Still) -> None:
    panel = ultrasound.Region(*made.region, spacing_mm=(made.mm_per_px, made.mm_per_px))
    mask = np.zeros(made.picture.shape, np.bool_)
    mask[:120, :90] = True  # over banner, edge and panel
    prepared = engine.prepare(made.picture, panel, mask)
    assert isinstance(prepared, engine.Prepared)
    assert prepared.region[:2] == made.region[:2]
    assert prepared.crop.shape == (
        prepared.region[3] - prepared.region[1] + 1,
        prepared.region[2] - prepared.region[0] + 1,
    )
    inside = prepared.share > 127
    outside = np.ones(inside.shape, np.bool_)
    outside[prepared.inner] = False
    assert not inside[outside].any()


@pytest.mark.parametrize("mask", ["off", "dot"])
def test_a_region_off_the_image_or_too_small_is_refused(made: phantom.Still, mask: str) -> None:
    panel = ultrasound.Region(*made.region, spacing_mm=(made.mm_per_px, made.mm_per_px))
    drawn = np.zeros(made.picture.shape, np.bool_)
    if mask == "off":
        drawn[:20, :] = True
    else:
        drawn[100:106, 100:106] = True
    answer = engine.prepare(made.picture, panel, drawn)
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.ROI_REQUIRED


def test_colour_in_the_panel_is_refused(made: phantom.Still) -> None:
    panel = ultrasound.Region(*made.region, spacing_mm=(made.mm_per_px, made.mm_per_px))
    frame = np.repeat(made.picture[..., None], 3, axis=2)
    frame[120:160, 100:150] = (220, 30, 20)
    answer = engine.prepare(frame, panel, np.ones(made.picture.shape, np.bool_))
    assert isinstance(answer, Refusal)
    assert answer.code == RefusalCode.WRONG_VIEW


@pytest.mark.parametrize("kinds", [("us", "seg"), ("us",)], ids=["drawn", "located"])
def test_coloured_calipers_are_masked_for_every_model_and_the_report_says_so(
    kinds: tuple[str, ...], made: phantom.Still, files: Callable[..., list[Instance]]
) -> None:
    ys, xs = np.nonzero(made.roi)
    y, x = int(ys.mean()) + made.region[1], int(xs.mean()) + made.region[0]

    class Painted(PixelDecoder):
        def __init__(self, colour: tuple[int, int, int]) -> None:
            super().__init__()
            self._colour = colour

        def frames(self, instance: Instance, numbers: Any = None) -> Any:
            for frame in super().frames(instance, numbers):
                if instance.header.text("Modality") != "US":
                    yield frame
                    continue
                painted = np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame.copy()
                painted[y - 8 : y + 9, x] = painted[y, x - 8 : x + 9] = self._colour
                yield painted

    seen, parameters = {}, {}
    for kind, reader in {
        "plain": PixelDecoder(), "yellow": Painted((255, 255, 0)), "white": Painted((255, 255, 255)),
    }.items():  # fmt: skip
        models = Models(np.pad(np.ones((30, 30), np.float32), ((17, 17), (21, 21))))
        answer, run = _predict(files(*kinds), models, reader)
        assert isinstance(answer, Prediction)
        seen[kind], parameters[kind] = run.seen, answer.parameters
    told = "Lesion 1: drawn marks masked"
    assert told not in parameters["plain"] and told not in parameters["white"]
    assert "they may have told where a person looked; coloured marks only" in parameters["yellow"][told]
    for name in ("superres", "locator") if kinds == ("us",) else ("superres",):
        plain, yellow, white = seen["plain"][name][0], seen["yellow"][name][0], seen["white"][name][0]
        assert 0 < abs(float((yellow - plain).sum())) < 0.4 * float((white - plain).sum()), name


# --- sensitivity map -------------------------------------------------------------------------------------------------


def test_the_map_lies_where_the_texture_lies() -> None:
    """The same patient with either label: a picture whose texture is on one side only is painted on that side."""
    mixed, even = phantom.make(8, 1), phantom.make(8, 0)
    panel = ultrasound.Region(*mixed.region, spacing_mm=(mixed.mm_per_px, mixed.mm_per_px))
    mask = np.zeros(mixed.picture.shape, np.bool_)
    panel.crop(mask)[:] = mixed.roi
    middle = int(np.nonzero(mask)[1].mean())
    models, sides = Models(), []
    for textured in (slice(None, middle), slice(middle, None)):
        picture = even.picture.copy()
        picture[:, textured] = mixed.picture[:, textured]
        prepared = engine.prepare(picture, panel, mask)
        assert isinstance(prepared, engine.Prepared)
        fine, inside = engine.superresolve(prepared, models)
        margin = engine.margins(models("radiomics", {"x": engine.features(fine[None], inside)})["logits"])[0]
        shown = np.maximum(engine.sensitivity(fine, inside, float(margin), models), 0)
        columns = np.arange(shown.shape[1])
        sides.append(float((shown.sum(axis=0) * columns).sum() / shown.sum()))
        assert not shown[~(prepared.share > 0)].any()
    assert sides[0] < sides[1] - 3


def test_the_map_takes_little_time_whatever_the_region() -> None:
    rng = np.random.default_rng(1)
    for side in (60, 240, 900):
        fine = rng.integers(60, 180, (side, side)).astype(np.uint8)
        inside = np.zeros(fine.shape, np.bool_)
        inside[side // 10 : -side // 10, side // 10 : -side // 10] = True
        assert 0 < len(engine._windows(inside)) <= engine.MAX_WINDOWS
        started = time.process_time()
        shown = engine.sensitivity(fine, inside, 0.0, Models())
        assert shown.shape == (side // 2, side // 2)
        assert time.process_time() - started < 4.0


# --- the recipe of the README ----------------------------------------------------------------------------------------


def test_the_recipe_of_the_readme_marks_a_region(
    files: Callable[..., list[Instance]], made: phantom.Still, tmp_path: Path, instance_of: MakeInstance
) -> None:
    text = (ROOT / "engines/testis_tumour/README.md").read_text("utf-8")
    recipe = text.split("```python\n")[1].split("```")[0]
    (us,) = files("us")
    image = pydicom.dcmread(us.path)
    mask = np.zeros((image.Rows, image.Columns), np.uint8)
    x0, y0, x1, y1 = made.region
    mask[y0 : y1 + 1, x0 : x1 + 1] = made.roi
    names = {"image": image, "mask": mask, "hd": hd, "CodedConcept": CodedConcept}
    exec(recipe.replace('"region.dcm"', repr(str(tmp_path / "region.dcm"))), names)  # noqa: S102
    answer, _ = _predict([us, replace(instance_of(tmp_path / "region.dcm"), instance_id="1" * 32)])
    assert isinstance(answer, Prediction)
    assert answer.units[0].roi_source == "SEG"

"""Regions of interest: which object is believed, what several of them mean together, and the locator's place."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes
from roi_files import (
    Files,
    annotation,
    derived,
    describe,
    graphic,
    gsps,
    item,
    reference,
    report,
    rtstruct,
    scoord,
)

from dicom_node.pixels import roi
from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header, Study

SQUARE = [[10.0, 5.0], [20.0, 5.0], [20.0, 12.0], [10.0, 12.0], [10.0, 5.0]]
"""Columns 10..19, rows 5..11."""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def box(x0: int, y0: int, x1: int, y1: int, rows: int = 40, columns: int = 50) -> NDArray[np.uint8]:
    mask = np.zeros((rows, columns), np.uint8)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return mask


def found(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...] | Refusal:
    instance = next(i for i in files.instances if i.sop_instance_uid == image.SOPInstanceUID)
    return roi.planar_rois(files.study, instance, PixelDecoder())


def rois(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...]:
    answer = found(files, image)
    assert not isinstance(answer, Refusal), answer
    return answer


def boxes(files: Files, image: Dataset) -> list[tuple[int, tuple[int, int, int, int]]]:
    return [(r.number, r.box()) for r in rois(files, image)]


def refused(files: Files, image: Dataset) -> RefusalCode:
    answer = found(files, image)
    assert isinstance(answer, Refusal), answer
    return answer.code


def seg(files: Files, image: Dataset, mask: NDArray[np.uint8], label: str = "Lesion 1", **options: str) -> Dataset:
    return files.seg([image], mask[None], [describe(1, label, options.pop("tracking", None))], **options)


# --- order of trust --------------------------------------------------------------------------------------------------


def test_the_most_trusted_kind_that_marks_the_image_wins(files: Files) -> None:
    image = files.ultrasound()
    assert rois(files, image) == ()
    gsps(files, [annotation([graphic("POLYLINE", [[1, 1], [5, 1], [5, 5], [1, 1]])])], [image])
    assert rois(files, image)[0].source == "GSPS"
    report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    assert [(r.source, r.box()) for r in rois(files, image)] == [("SR", (10, 5, 19, 11))]
    seg(files, image, box(3, 4, 8, 9))
    assert [(r.source, r.box()) for r in rois(files, image)] == [("SEG", (3, 4, 8, 9))]


def test_a_structure_set_stands_between_segmentation_and_report(files: Files) -> None:
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    (image,) = files.mr(1, 40, 50, affine)
    report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    rtstruct(files, [("tumour", [[[1, 1, 0], [6, 1, 0], [6, 4, 0], [1, 4, 0]]])])  # type: ignore[list-item]
    (only,) = rois(files, image)
    assert (only.source, only.structure) == ("RTSTRUCT", "lesion")
    files.seg([image], box(3, 4, 8, 9)[None])
    assert rois(files, image)[0].source == "SEG"


def test_an_empty_segment_leaves_the_word_to_the_next_kind(files: Files) -> None:
    image = files.ultrasound()
    files.plain_seg([(1, box(1, 1, 0, 0), derived(image))], ["nothing"])
    report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    assert rois(files, image)[0].source == "SR"


def test_what_stands_on_another_image_does_not_count(files: Files) -> None:
    image, other = files.ultrasound(), files.ultrasound()
    seg(files, other, box(3, 4, 8, 9))
    report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    assert [r.source for r in rois(files, image)] == ["SR"]
    assert [r.source for r in rois(files, other)] == ["SEG"]


def test_our_own_objects_never_mark_anything(files: Files) -> None:
    image = files.ultrasound()
    ds = seg(files, image, box(3, 4, 8, 9), add=False)  # type: ignore[arg-type]
    ds.ManufacturerModelName = "dicom-node"
    files.add(ds)
    report(files, [scoord("POLYLINE", SQUARE, reference(image))], ManufacturerModelName="dicom-node")
    assert rois(files, image) == ()
    assert roi.marking(files.study, files.instances[:1]) == ()


def test_an_unreadable_region_is_not_passed_over_for_a_less_trusted_one(files: Files) -> None:
    image = files.ultrasound()
    files.plain_seg([(1, box(1, 1, 5, 5, 30, 30), derived(image))], ["other size"])
    report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    answer = found(files, image)
    assert answer == Refusal(RefusalCode.ROI_UNREADABLE, "SEG: the segmentation has not the size of the image")


def test_the_objects_that_mark_some_images_are_told_from_headers(files: Files) -> None:
    image, other = files.ultrasound(), files.ultrasound()
    seg(files, other, box(3, 4, 8, 9))
    first = seg(files, image, box(3, 4, 8, 9))
    second = report(files, [scoord("POLYLINE", SQUARE, reference(image))])
    marks = roi.marking(files.study, [i for i in files.instances if i.sop_instance_uid == image.SOPInstanceUID])
    assert {i.sop_instance_uid for i in marks} == {first.SOPInstanceUID, second.SOPInstanceUID}


# --- several objects of one kind -------------------------------------------------------------------------------------


def test_a_newer_version_under_the_same_label_replaces_the_older(files: Files) -> None:
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), when="20260102100000")
    seg(files, image, box(4, 4, 9, 9), when="20260101100000")
    assert boxes(files, image) == [(1, (3, 4, 8, 9))]


def test_versions_are_known_by_series_where_labels_differ(files: Files) -> None:
    image = files.ultrasound()
    series = hd.UID()
    seg(files, image, box(3, 4, 8, 9), "old name", when="20260101100000", series=series)
    seg(files, image, box(4, 4, 9, 9), "new name", when="20260101110000", series=series)
    assert [b for _, b in boxes(files, image)] == [(4, 4, 9, 9)]


def test_a_tracked_lesion_may_move_between_versions(files: Files) -> None:
    image = files.ultrasound()
    tracking = hd.UID()
    seg(files, image, box(3, 4, 8, 9), "a", tracking=tracking, when="20260101100000")
    seg(files, image, box(30, 24, 39, 29), "b", tracking=tracking, when="20260101110000")
    assert [b for _, b in boxes(files, image)] == [(30, 24, 39, 29)]


def test_two_observers_on_one_place_are_ambiguous(files: Files) -> None:
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), "observer A", when="20260101100000")
    seg(files, image, box(4, 4, 9, 9), "observer B", when="20260101110000")
    assert refused(files, image) is RefusalCode.ROI_AMBIGUOUS


def test_versions_without_an_order_in_time_are_ambiguous(files: Files) -> None:
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), when="20260101100000")
    seg(files, image, box(4, 4, 9, 9), when="20260101100000")
    assert refused(files, image) is RefusalCode.ROI_AMBIGUOUS


def test_one_label_on_two_places_is_ambiguous(files: Files) -> None:
    """Two lesions, or a corrected one? The objects do not say."""
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), "Segment_1", when="20260101100000")
    seg(files, image, box(30, 24, 39, 29), "Segment_1", when="20260101110000")
    assert refused(files, image) is RefusalCode.ROI_AMBIGUOUS


def test_a_copy_is_no_disagreement(files: Files) -> None:
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), "observer A")
    seg(files, image, box(3, 4, 8, 9), "observer B")
    assert [b for _, b in boxes(files, image)] == [(3, 4, 8, 9)]


def test_other_places_under_other_labels_are_other_lesions(files: Files) -> None:
    image = files.ultrasound()
    seg(files, image, box(3, 4, 8, 9), "upper")
    seg(files, image, box(30, 24, 39, 29), "lower")
    found = boxes(files, image)
    assert [n for n, _ in found] == [1, 2]
    assert {b for _, b in found} == {(3, 4, 8, 9), (30, 24, 39, 29)}


def test_a_lesion_inside_an_organ_of_another_object_is_no_disagreement(files: Files) -> None:
    image = files.ultrasound()
    organ = describe(1, "testis", category=codes.SCT.AnatomicalStructure)
    files.seg([image], box(1, 1, 30, 30)[None], [organ])
    seg(files, image, box(3, 4, 8, 9), "tumour")
    assert {r.structure: r.box() for r in rois(files, image)} == {
        "organ": (1, 1, 30, 30),
        "lesion": (3, 4, 8, 9),
    }


def test_a_report_that_names_its_predecessor_replaces_it(files: Files) -> None:
    image = files.ultrasound()
    old = report(files, [scoord("POLYLINE", SQUARE, reference(image))], when="20260105000000")
    series = item(SeriesInstanceUID=old.SeriesInstanceUID, ReferencedSOPSequence=[reference(old)])
    before = item(StudyInstanceUID=files.study_uid, ReferencedSeriesSequence=[series])
    shifted = [[x + 2, y] for x, y in SQUARE]
    report(files, [scoord("POLYLINE", shifted, reference(image))], PredecessorDocumentsSequence=[before])
    assert [r.box() for r in rois(files, image)] == [(12, 5, 21, 11)]


def test_one_lesion_keeps_its_number_from_image_to_image(files: Files) -> None:
    first, second = files.ultrasound(), files.ultrasound()
    files.plain_seg(
        [(1, box(1, 1, 5, 5), derived(first)), (2, box(10, 10, 15, 15), derived(first)),
         (2, box(11, 11, 16, 16), derived(second))],
        ["upper", "lower"],
    )  # fmt: skip
    assert boxes(files, first) == [(1, (1, 1, 5, 5)), (2, (10, 10, 15, 15))]
    assert boxes(files, second) == [(2, (11, 11, 16, 16))]


def test_one_object_an_image_numbers_lesions_by_label(files: Files) -> None:
    images = [files.ultrasound() for _ in range(3)]
    for image, label in zip(images, ("upper", "lower", "upper"), strict=True):
        seg(files, image, box(1, 1, 5, 5), label)
    numbers = [boxes(files, image)[0][0] for image in images]
    assert numbers[0] == numbers[2] != numbers[1]
    assert set(numbers) == {1, 2}


# --- the answer ------------------------------------------------------------------------------------------------------


def test_masks_are_read_only_and_the_box_spans_all_frames(files: Files) -> None:
    clip = files.ultrasound(frames=4)
    files.plain_seg([(1, box(1, 2, 3, 4), derived(clip, 2)), (1, box(5, 6, 7, 8), derived(clip, 4))], ["a"])
    (only,) = rois(files, clip)
    assert (sorted(only.masks), only.box()) == ([2, 4], (1, 2, 7, 8))
    with pytest.raises(ValueError, match="read-only"):
        only.masks[2][0, 0] = True
    with pytest.raises(TypeError):
        only.masks[3] = only.masks[2]  # type: ignore[index]


# --- whatever stands in a header -------------------------------------------------------------------------------------

JUNK: list[Any] = [
    "",
    "x",
    "\u00b2",
    -1,
    0,
    10**18,
    1e300,
    float(2**40),
    [],
    [1.0],
    ["a", 2],
    [{}],
    "1.2.3",
    [9, 9, 9, 9, 9, 9],
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_no_header_makes_a_reader_fail(files: Files, seed: int) -> None:
    """Objects of every kind with values taken out or replaced: an answer or a refusal, never an error."""
    affine, shape = np.diag([1.0, 1.0, 3.0, 1.0]), (2, 40, 50)
    slices = files.mr(*shape, affine)
    files.seg(slices, np.stack([box(3, 4, 8, 9), box(3, 4, 9, 9)]))
    rtstruct(files, [("a", [np.array([[1, 1, 0], [6, 1, 0], [6, 4, 0], [1, 4, 0]])])], slices[:1])
    report(
        files,
        [scoord("POLYLINE", SQUARE, reference(slices[0])), scoord("CIRCLE", [[9, 9], [9, 12]], reference(slices[0]))],
    )
    shown = item(DisplayedAreaTopLeftHandCorner=[1, 1], DisplayedAreaBottomRightHandCorner=[50, 40])
    drawn = [
        graphic("INTERPOLATED", SQUARE),
        graphic("ELLIPSE", [[0.1, 0.5], [0.3, 0.5], [0.2, 0.4], [0.2, 0.6]], "DISPLAY"),
    ]
    gsps(files, [annotation(drawn)], slices[:1], DisplayedAreaSelectionSequence=[shown], ImageRotation=90)
    rng = np.random.default_rng(seed)
    uids = frozenset(str(s.SOPInstanceUID) for s in slices)
    answers = set()
    for _ in range(150):
        kind = int(rng.integers(2, 6))  # one kind at a time: the most trusted would hide the others
        original = files.instances[kind]
        values = original.header.to_json()
        places = list(leaves(values))
        for place in (places[i] for i in rng.integers(0, len(places), rng.integers(1, 4))):
            with contextlib.suppress(KeyError, IndexError, TypeError):  # what is above it has gone already
                inner: Any = values
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = JUNK[rng.integers(len(JUNK))]
        changed = replace(original, header=Header.from_json(values))
        study = Study.from_instances(files.study_uid, 1, [*files.instances[:2], changed])
        roi.kinds(study.instances)
        roi.marking(study, files.instances[:1])
        with warnings.catch_warnings(), contextlib.suppress(PixelsUndecodableError):
            warnings.simplefilter("ignore", RuntimeWarning)
            found = roi.planar_rois(study, files.instances[0], PixelDecoder())
            stack = roi.volume_rois(study, uids, shape, affine, files.frame_uid, PixelDecoder())
            answers |= {str(a.code) if isinstance(a, Refusal) else f"{len(a)}" for a in (found, stack)}
    assert {"ROI_UNREADABLE", "0", "1"} <= answers


# --- the locator -----------------------------------------------------------------------------------------------------


def blobs(*places: tuple[int, int, int, int, float]) -> NDArray[np.float32]:
    probability = np.full((32, 32), 0.1, np.float32)
    for x0, y0, x1, y1, value in places:
        probability[y0 : y1 + 1, x0 : x1 + 1] = value
    return probability


def test_the_largest_place_is_taken_with_its_exact_pixels() -> None:
    mask = roi.locate(blobs((2, 3, 9, 10, 0.9), (20, 20, 22, 22, 0.99)), 10)
    assert mask is not None
    assert np.array_equal(mask, blobs((2, 3, 9, 10, 0.9)) > 0.5)


@pytest.mark.parametrize(
    "probability",
    [
        blobs(),
        blobs((2, 3, 3, 4, 0.99)),  # too small
        blobs((2, 3, 9, 10, 0.4)),  # too faint
        blobs((2, 3, 9, 10, 0.9), (20, 20, 27, 27, 0.85)),  # two equally good places
    ],
)
def test_a_guess_is_not_a_place(probability: NDArray[np.float32]) -> None:
    assert roi.locate(probability, 10) is None


def test_a_place_may_lie_in_a_volume() -> None:
    probability = np.zeros((4, 16, 16), np.float32)
    probability[1:3, 4:9, 5:9] = 0.8
    mask = roi.locate(probability, 10)
    assert mask is not None
    assert (mask.shape, int(mask.sum())) == ((4, 16, 16), 40)

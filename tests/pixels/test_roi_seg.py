"""Segmentations: what was written comes back, on stills, clips and stacks, from every way to say where a frame lies."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes
from roi_files import Files, coded, derived, describe, item, reference

from dicom_node.pixels import roi
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import is_own_output

Affine = NDArray[np.float64]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def blob(shape: tuple[int, ...], seed: int = 0, share: float = 0.4) -> NDArray[np.uint8]:
    return (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)


def planar(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...] | Refusal:
    instance = next(i for i in files.instances if i.sop_instance_uid == image.SOPInstanceUID)
    return roi.planar_rois(files.study, instance, PixelDecoder())


def rois(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...]:
    answer = planar(files, image)
    assert not isinstance(answer, Refusal), answer
    return answer


def volume(
    files: Files, slices: list[Dataset], shape: tuple[int, int, int], affine: Affine, frame: str = ""
) -> tuple[roi.VolumeRoi, ...]:
    uids = frozenset(str(s.SOPInstanceUID) for s in slices)
    answer = roi.volume_rois(files.study, uids, shape, affine, frame or files.frame_uid, PixelDecoder())
    assert not isinstance(answer, Refusal), answer
    return answer


# --- ultrasound: by reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_still_gets_the_mask_that_highdicom_wrote(files: Files, kind: str) -> None:
    image = files.ultrasound(37, 51)
    masks = np.stack([blob((37, 51), 1), blob((37, 51), 2)], axis=-1)
    if kind == "LABELMAP":
        masks[..., 1] &= 1 - masks[..., 0]
    files.seg([image], masks[None], kind=kind)
    found = rois(files, image)
    assert [(r.source, r.number, sorted(r.masks)) for r in found] == [("SEG", 1, [1]), ("SEG", 2, [1])]
    for n, one in enumerate(found):
        assert np.array_equal(one.masks[1], masks[..., n])


def test_half_and_more_of_a_fraction_is_inside(files: Files) -> None:
    image = files.ultrasound(4, 6)
    share = np.array([[0, 49, 50, 51, 99, 100]] * 4, np.uint8)
    files.plain_seg([(1, share, derived(image))], ["a"], "FRACTIONAL", maximum=100)
    assert rois(files, image)[0].masks[1][0].tolist() == [False, False, True, True, True, True]


def test_a_clip_by_frame_numbers(files: Files) -> None:
    clip = files.ultrasound(37, 51, frames=6)
    a, b, c = (blob((37, 51), n) for n in range(3))
    files.plain_seg([(1, a, derived(clip, 2)), (1, b, derived(clip, [4, 5])), (2, c, derived(clip, 4))], ["a", "b"])
    first, second = rois(files, clip)
    assert {n: m.tobytes() for n, m in first.masks.items()} == {2: a.tobytes(), 4: b.tobytes(), 5: b.tobytes()}
    assert {n: m.tobytes() for n, m in second.masks.items()} == {4: c.tobytes()}


def test_one_mask_without_frame_number_stands_on_the_whole_clip(files: Files) -> None:
    clip = files.ultrasound(frames=5)
    mask = blob((40, 50))
    files.plain_seg([(1, mask, {})], ["a"], SourceImageSequence=[reference(clip)])
    (only,) = rois(files, clip)
    assert sorted(only.masks) == [1, 2, 3, 4, 5]
    assert all(np.array_equal(m, mask) for m in only.masks.values())


def test_as_many_masks_as_frames_without_numbers_are_in_order(files: Files) -> None:
    """As a viewer that segments the clip as a volume writes it: referring to the instance as a whole."""
    clip = files.ultrasound(frames=3)
    masks = [blob((40, 50), n) for n in range(3)]
    whole = item(SeriesInstanceUID=clip.SeriesInstanceUID, ReferencedInstanceSequence=[reference(clip)])
    files.plain_seg([(1, m, {}) for m in masks], ["a"], ReferencedSeriesSequence=[whole])
    (only,) = rois(files, clip)
    assert all(np.array_equal(only.masks[n], m) for n, m in enumerate(masks, start=1))


def test_fewer_masks_than_frames_without_numbers_are_refused(files: Files) -> None:
    clip = files.ultrasound(frames=4)
    files.plain_seg([(1, blob((40, 50), n), derived(clip)) for n in range(3)], ["a"])
    why = "SEG: nothing says which of its frames stands on which frame of the image"
    assert planar(files, clip) == Refusal(RefusalCode.ROI_UNREADABLE, why)


def test_a_frame_that_the_image_does_not_have_is_refused(files: Files) -> None:
    clip = files.ultrasound(frames=4)
    files.plain_seg([(1, blob((40, 50)), derived(clip, 9))], ["a"])
    why = "SEG: a region refers to a frame that the image does not have"
    assert planar(files, clip) == Refusal(RefusalCode.ROI_UNREADABLE, why)


def test_several_images_and_no_word_which_is_meant_are_refused(files: Files) -> None:
    images = [files.ultrasound(), files.ultrasound()]
    files.plain_seg([(1, blob((40, 50)), {})], ["a"], SourceImageSequence=[reference(i) for i in images])
    why = "SEG: its frames name neither the image they were drawn on nor their place in the patient"
    assert planar(files, images[1]) == Refusal(RefusalCode.ROI_UNREADABLE, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"PerFrameFunctionalGroupsSequence": []}, "the functional groups are not as many as the frames"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.5"}, "a surface segmentation holds no pixels"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a label map in colours"),
    ],
)
def test_segmentations_that_cannot_be_read_are_refused(files: Files, change: dict[str, object], why: str) -> None:
    image = files.ultrasound()
    files.plain_seg([(1, blob((40, 50)), {})], ["a"], SourceImageSequence=[reference(image)], **change)
    assert planar(files, image) == Refusal(RefusalCode.ROI_UNREADABLE, f"SEG: {why}")


@pytest.mark.parametrize(
    ("segment", "side"),
    [
        ({"AnatomicRegionSequence": [("24028007", "SCT")]}, "R"),
        ({"AnatomicRegionSequence": [("7771000", "SCT")], "SegmentLabel": "right testis"}, "L"),
        ({"AnatomicRegionSequence": [("51440002", "SCT")]}, ""),
        ({"SegmentedPropertyTypeModifierCodeSequence": [("7771000", "SCT")]}, "L"),
        ({"SegmentLabel": "Left testis"}, "L"),
        ({"SegmentLabel": "both testes"}, ""),
        ({}, ""),
    ],
)
def test_the_side_is_what_the_segment_says(files: Files, segment: dict[str, object], side: str) -> None:
    image = files.ultrasound()
    described = item(SegmentNumber=1, SegmentLabel=segment.get("SegmentLabel", "a"))
    for keyword, value in segment.items():
        if isinstance(value, list):
            modifiers = [coded(v, scheme, "side") for v, scheme in value]
            if keyword == "AnatomicRegionSequence":
                modifiers = [coded("40689003", "SCT", "Testis")]
                modifiers[0].AnatomicRegionModifierSequence = [coded(v, scheme, "side") for v, scheme in value]
            setattr(described, keyword, modifiers)
    files.plain_seg([(1, blob((40, 50)), derived(image))], ["a"], SegmentSequence=[described])
    assert rois(files, image)[0].laterality == side


def test_highdicom_writes_the_side_as_a_modifier_and_we_read_it(files: Files) -> None:
    image = files.ultrasound()
    region = hd.sr.CodedConcept.from_code(codes.SCT.Testis)
    region.AnatomicRegionModifierSequence = [coded("24028007", "SCT", "Right")]
    files.seg([image], blob((1, 40, 50)), [describe(1, "x", anatomic_regions=[region])])
    assert rois(files, image)[0].laterality == "R"


# --- MR: by geometry -------------------------------------------------------------------------------------------------


def oblique(seed: int, steps: tuple[float, float, float] = (1.5, 1.25, 4.0)) -> Affine:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    if np.linalg.det(q) < 0:
        q[:, 2] *= -1
    affine = np.eye(4)
    affine[:3, :3] = q * steps
    affine[:3, 3] = np.random.default_rng(seed).uniform(-80, 80, 3)
    return affine


@pytest.mark.parametrize("affine", [np.diag([1.5, 1.25, 4.0, 1.0]), oblique(1), oblique(2), oblique(3)])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_stack_gets_the_mask_back_voxel_for_voxel(files: Files, affine: Affine, kind: str) -> None:
    shape = (7, 33, 29)
    slices = files.mr(*shape, affine)
    mask = blob(shape, 5)
    mask[[0, 4]] = 0  # empty frames are left out of the object
    files.seg(slices, mask, kind=kind)
    (only,) = volume(files, slices, shape, affine)
    assert (only.source, only.number) == ("SEG", 1)
    assert np.array_equal(only.mask, mask)
    assert not only.mask.flags.writeable


def test_slices_in_the_other_order_are_put_where_they_lie(files: Files) -> None:
    affine, shape = oblique(4), (6, 20, 22)
    slices = files.mr(*shape, affine)
    mask = blob(shape, 6)
    files.seg(slices, mask)
    flipped = affine.copy()
    flipped[:3, 3] += 5 * affine[:3, 2]
    flipped[:3, 2] *= -1
    assert np.array_equal(volume(files, slices, shape, flipped)[0].mask, mask[::-1])


def test_a_finer_grid_takes_the_nearest_voxel(files: Files) -> None:
    """Half the spacing in every direction: each voxel becomes eight."""
    affine, shape = np.diag([2.0, 2.0, 4.0, 1.0]), (4, 10, 12)
    slices = files.mr(*shape, affine)
    mask = blob(shape, 7)
    files.seg(slices, mask)
    fine = np.diag([1.0, 1.0, 2.0, 1.0])
    fine[:3, 3] = [-0.5, -0.5, -1.0]  # the first of two small voxels in each large one
    (only,) = volume(files, slices, (8, 20, 24), fine)
    assert np.array_equal(only.mask, mask.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_another_grid_in_the_same_frame_of_reference_is_close(files: Files) -> None:
    """A ball segmented on one series, asked for on an oblique grid: the same ball, within a voxel of its surface."""
    affine, shape = np.diag([1.0, 1.0, 1.0, 1.0]), (40, 40, 40)
    slices = files.mr(*shape, affine)
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[..., ::-1]
    files.seg(slices, (np.linalg.norm(at - 19.5, axis=-1) < 11).astype(np.uint8))
    other = oblique(9, (1.0, 1.0, 1.0))
    other[:3, 3] = 19.5 - other[:3, :3] @ [19.5, 19.5, 19.5]
    mask = volume(files, [], shape, other)[0].mask
    distance = np.linalg.norm(at - 19.5, axis=-1)
    assert mask[distance < 9.6].all()
    assert not mask[distance > 12.4].any()


def test_other_frames_of_reference_are_ignored(files: Files) -> None:
    affine, shape = oblique(5), (4, 20, 22)
    elsewhere = files.mr(*shape, affine, frame=hd.UID())
    files.seg(elsewhere, blob(shape))
    slices = files.mr(*shape, affine)
    assert volume(files, slices, shape, affine) == ()
    assert volume(files, elsewhere, shape, affine, str(elsewhere[0].FrameOfReferenceUID)) != ()
    assert planar(files, slices[2]) == ()


def test_a_stack_without_frame_of_reference_goes_by_what_is_referred_to(files: Files) -> None:
    affine, shape = oblique(6), (4, 20, 22)
    slices = files.mr(*shape, affine)
    mask = blob(shape)
    files.seg(slices, mask)
    uids = frozenset(str(s.SOPInstanceUID) for s in slices)
    found = roi.volume_rois(files.study, uids, shape, affine, "", PixelDecoder())
    assert not isinstance(found, Refusal)
    assert np.array_equal(found[0].mask, mask)
    assert roi.volume_rois(files.study, frozenset({"1.2.3"}), shape, affine, "", PixelDecoder()) == ()


def test_planes_may_stand_in_the_source_images_only(files: Files) -> None:
    affine, shape = oblique(7), (4, 20, 22)
    slices = files.mr(*shape, affine)
    mask = blob(shape)
    files.plain_seg([(1, mask[k], derived(slices[k])) for k in (3, 1)], ["a"])
    (only,) = volume(files, slices, shape, affine)
    assert np.array_equal(only.mask[[1, 3]], mask[[1, 3]])
    assert not only.mask[[0, 2]].any()


def test_one_slice_of_a_stack_alone_gets_its_mask(files: Files) -> None:
    affine, shape = oblique(8), (4, 20, 22)
    slices = files.mr(*shape, affine)
    mask = blob(shape)
    files.seg(slices, mask)
    (only,) = rois(files, slices[2])
    assert np.array_equal(only.masks[1], mask[2])


def test_a_thousand_frames_survive_the_index_of_headers(files: Files) -> None:
    clip = files.ultrasound(16, 16, frames=1000)
    masks = blob((1000, 16, 16), 3)
    files.plain_seg([(1, m, derived(clip, n)) for n, m in enumerate(masks, start=1)], ["a"])
    assert not any(is_own_output(i.header) for i in files.instances)
    (only,) = rois(files, clip)
    assert np.array_equal(np.stack([only.masks[n] for n in range(1, 1001)]), masks)

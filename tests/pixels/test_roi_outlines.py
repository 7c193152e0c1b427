"""Outlines: rasterised by pixel centres; read from RT Structure Sets, structured reports and presentation states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes
from roi_files import Files, annotation, graphic, gsps, item, reference, report, rtstruct, scoord

from dicom_node.pixels import roi
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.roi_model import UnreadableError
from dicom_node.pixels.roi_raster import draw, polygon
from dicom_node.result import Refusal, RefusalCode

SQUARE = [[10.0, 5.0], [20.0, 5.0], [20.0, 12.0], [10.0, 12.0], [10.0, 5.0]]
"""Columns 10..19, rows 5..11 by the corners of their pixels."""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def planar(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...] | Refusal:
    instance = next(i for i in files.instances if i.sop_instance_uid == image.SOPInstanceUID)
    return roi.planar_rois(files.study, instance, PixelDecoder())


def rois(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...]:
    answer = planar(files, image)
    assert not isinstance(answer, Refusal), answer
    return answer


def volume(
    files: Files, slices: list[Dataset], shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> tuple[roi.VolumeRoi, ...] | Refusal:
    uids = frozenset(str(s.SOPInstanceUID) for s in slices)
    return roi.volume_rois(files.study, uids, shape, affine, files.frame_uid, PixelDecoder())


def unreadable(why: str) -> Refusal:
    return Refusal(RefusalCode.ROI_UNREADABLE, why)


# --- the rule --------------------------------------------------------------------------------------------------------


def test_a_square_around_pixels_holds_these_pixels() -> None:
    mask = draw("POLYLINE", np.array(SQUARE), 40, 50)
    expected = np.zeros((40, 50), np.bool_)
    expected[5:12, 10:20] = True
    assert np.array_equal(mask, expected)


def test_centres_decide_and_shared_edges_belong_to_one_side() -> None:
    left = np.array([[0.0, 0], [5.5, 0], [5.5, 8], [0, 8]])
    right = np.array([[5.5, 0], [9.0, 0], [9, 8], [5.5, 8]])
    a, b = polygon(left, 8, 9), polygon(right, 8, 9)
    assert a[:, :5].all()
    assert not a[:, 5:].any()
    assert np.array_equal(a ^ b, np.ones((8, 9), np.bool_))


@pytest.mark.parametrize("seed", range(20))
def test_any_polygon_agrees_with_an_independent_test_of_every_centre(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 40)))
    radius = rng.uniform(2, 40, len(angle))
    points = np.array([33.0, 27.0]) + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]  # leaves the image
    y, x = np.mgrid[:50, :60] + 0.5
    inside = Polygon(np.vstack([points, points[:1]]), closed=True).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    assert np.array_equal(polygon(points, 50, 60), inside.reshape(50, 60))


def test_an_edge_through_a_centre_counts_on_the_left_and_above_only() -> None:
    mask = polygon(np.array([[1.5, 1.5], [4.5, 1.5], [4.5, 4.5], [1.5, 4.5]]), 7, 7)
    assert [tuple(v) for v in np.argwhere(mask)] == [(r, c) for r in (1, 2, 3) for c in (1, 2, 3)]


def test_circles_and_ellipses_hold_the_centres_within() -> None:
    y, x = np.mgrid[:40, :50] + 0.5
    circle = draw("CIRCLE", np.array([[20.0, 15.0], [20.0, 22.3]]), 40, 50)
    assert np.array_equal(circle, np.hypot(x - 20, y - 15) <= 7.3)
    c, s = np.cos(0.6), np.sin(0.6)
    centre, a, b = np.array([24.0, 18.0]), 14.0, 5.0
    ends = np.array([centre - a * np.array([c, s]), centre + a * np.array([c, s]),
                     centre - b * np.array([-s, c]), centre + b * np.array([-s, c])])  # fmt: skip
    u, v = (x - 24) * c + (y - 18) * s, (y - 18) * c - (x - 24) * s
    assert np.array_equal(draw("ELLIPSE", ends, 40, 50), (u / a) ** 2 + (v / b) ** 2 <= 1)


def test_a_spline_through_eight_points_of_a_circle_is_the_circle() -> None:
    turn = np.linspace(0, 2 * np.pi, 9)
    ring = np.array([25.0, 20.0]) + 14 * np.stack([np.cos(turn), np.sin(turn)], 1)
    y, x = np.mgrid[:40, :50] + 0.5
    smooth, straight = (draw(shape, ring, 40, 50) for shape in ("INTERPOLATED", "POLYLINE"))
    wanted = np.hypot(x - 25, y - 20) <= 14
    assert int((smooth ^ wanted).sum()) < 8 < 40 < int((straight ^ wanted).sum())


def test_a_polygon_outside_of_the_image_is_empty_and_absurd_ones_are_refused() -> None:
    assert not draw("POLYLINE", np.array(SQUARE) + 100, 40, 50).any()
    for points, rows in ((np.array(SQUARE) * 1e6, 40), (np.array(SQUARE), 1 << 26), (np.full((4, 2), np.nan), 40)):
        with pytest.raises(UnreadableError):
            draw("POLYLINE", points, rows, 50)
    for shape, count in (("CIRCLE", 3), ("ELLIPSE", 2), ("POLYLINE", 2), ("POINT", 1)):
        with pytest.raises(UnreadableError):
            draw(shape, np.zeros((count, 2)), 40, 50)


def test_an_outline_that_would_cost_too_much_is_refused() -> None:
    zigzag = np.stack([np.linspace(0, 50, 100_000), np.tile([0.0, 4000.0], 50_000)], axis=1)
    with pytest.raises(UnreadableError, match="too long"):
        polygon(zigzag, 4000, 50)


# --- RT Structure Sets -----------------------------------------------------------------------------------------------


def affine_of(seed: int) -> NDArray[np.float64]:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q[:, 2] *= np.sign(np.linalg.det(q))
    affine = np.eye(4)
    affine[:3, :3] = q * (1.5, 1.25, 4.0)
    affine[:3, 3] = (-30.0, 12.0, 55.0)
    return affine


def outline(affine: NDArray[np.float64], k: float, corners: list[list[float]]) -> NDArray[np.float64]:
    """Corners in outer-corner pixel coordinates of slice k → mm. The origin is the centre of the first voxel."""
    at = np.array([[x - 0.5, y - 0.5, k, 1.0] for x, y in corners])
    return np.asarray((at @ affine.T)[:, :3])


@pytest.mark.parametrize("affine", [np.diag([1.5, 1.25, 4.0, 1.0]), affine_of(1), affine_of(2)])
def test_contours_fill_the_voxels_whose_centres_they_enclose(files: Files, affine: NDArray[np.float64]) -> None:
    shape = (6, 40, 50)
    slices = files.mr(*shape, affine)
    hole = [[12.0, 7.0], [15.0, 7.0], [15.0, 9.0], [12.0, 9.0]]
    contours = [outline(affine, 2, SQUARE[:4]), outline(affine, 3, SQUARE[:4]), outline(affine, 3, hole)]
    rtstruct(files, [("tumour left", contours), ("other", [outline(affine, 5, hole)])])
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    expected = np.zeros((2, *shape), np.bool_)
    expected[0, 2:4, 5:12, 10:20] = True
    expected[0, 3, 7:9, 12:15] = False
    expected[1, 5, 7:9, 12:15] = True
    assert [(r.source, r.number, r.laterality, r.structure) for r in found] == [
        ("RTSTRUCT", 1, "L", "lesion"),
        ("RTSTRUCT", 2, "", "lesion"),
    ]
    assert np.array_equal(np.stack([r.mask for r in found]), expected)
    (one,) = (r for r in rois_of(files, slices[2]) if r.number == 1)
    assert np.array_equal(one.masks[1], expected[0, 2])


def rois_of(files: Files, image: Dataset) -> tuple[roi.PlanarRoi, ...]:
    return rois(files, image)


def test_contours_drawn_on_another_orientation_are_resampled(files: Files) -> None:
    """Sagittal contours of a box, 1 mm apart, on an axial grid of 1 mm."""
    affine, shape = np.eye(4), (30, 40, 50)
    slices = files.mr(*shape, affine)
    square = [[10.0, 8.0], [25.0, 8.0], [25.0, 20.0], [10.0, 20.0]]  # row, slice
    contours = [np.array([[x, y - 0.5, z - 0.5] for y, z in square]) for x in range(20, 33)]
    rtstruct(files, [("a", contours)])
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    expected = np.zeros(shape, np.bool_)
    expected[8:20, 10:25, 20:33] = True
    assert np.array_equal(found[0].mask, expected)


def test_contours_farther_apart_than_slices_fill_the_slices_between(files: Files) -> None:
    affine, shape = np.diag([1.0, 1.0, 2.0, 1.0]), (12, 40, 50)
    slices = files.mr(*shape, affine)
    rtstruct(files, [("a", [outline(affine, k, SQUARE[:4]) for k in (2, 5, 8)])])
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    assert np.flatnonzero(found[0].mask.any(axis=(1, 2))).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_body_outlines_points_and_other_frames_of_reference_are_no_regions(files: Files) -> None:
    affine, shape = np.eye(4), (3, 40, 50)
    slices = files.mr(*shape, affine)
    contour = outline(affine, 1, SQUARE[:4])
    rtstruct(files, [("body", [contour])], interpreted="EXTERNAL")
    rtstruct(files, [("needle", [contour])], kind="POINT")
    rtstruct(files, [("elsewhere", [contour])], frame=hd.UID())
    assert volume(files, slices, shape, affine) == ()


def test_a_structure_set_on_an_image_without_a_place_in_the_patient_is_refused(files: Files) -> None:
    image = files.ultrasound()
    rtstruct(files, [("a", [outline(np.eye(4), 0, SQUARE[:4])])], [image])
    why = "RTSTRUCT: its contours are in mm of the patient, and the image has no place there"
    assert planar(files, image) == unreadable(why)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([[0, 0, 0], [9, 0, 0], [9, 9, 9], [0, 9, 0]], "a contour is not planar"),
        ([[0, 0, 0], [9, 0, 0], [4, 0, 0]], "a contour encloses nothing"),
        ([[0, 0, 0], [9, 0, 0]], "a contour is empty, broken or too long"),
    ],
)
def test_contours_that_are_none_are_refused(files: Files, points: Any, why: str) -> None:
    slices = files.mr(3, 40, 50, np.eye(4))
    rtstruct(files, [("a", [np.array(points, float)])])
    assert volume(files, slices, (3, 40, 50), np.eye(4)) == unreadable(f"RTSTRUCT: {why}")


def test_contours_of_a_realistic_size_survive_the_index_of_headers(files: Files) -> None:
    """40 slices of 1500 points, 1.5 MB in one ROI."""
    affine, shape = np.eye(4), (40, 128, 128)
    slices = files.mr(*shape, affine)
    turn = np.linspace(0, 2 * np.pi, 1500, endpoint=False)
    ring = np.stack([64 + 50 * np.cos(turn), 64 + 50 * np.sin(turn)], 1)
    rtstruct(files, [("a", [outline(affine, k, ring.tolist()) for k in range(40)])])
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    y, x = np.mgrid[:128, :128] + 0.5
    wanted = np.hypot(x - 64, y - 64) <= 50
    assert all(int((m ^ wanted).sum()) < 12 for m in found[0].mask)


# --- structured reports ----------------------------------------------------------------------------------------------


def group(image: Dataset, points: Any, tracking: hd.UID, frames: list[int] | None = None, **more: Any) -> Any:
    """TID 1410 as highdicom writes it."""
    source = hd.sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID, frames)
    region = hd.sr.ImageRegion("POLYLINE", np.array(points, float), source)
    identity = hd.sr.TrackingIdentifier(uid=tracking, identifier="Lesion")
    return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(identity, referenced_region=region, **more)


def write(files: Files, groups: list[Any], evidence: list[Dataset], kind: Any = hd.sr.Comprehensive3DSR) -> Dataset:
    device = hd.sr.ObserverContext(codes.DCM.Person, hd.sr.PersonObserverIdentifyingAttributes("Test^Observer"))
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_person_context=device),
        procedure_reported=hd.sr.CodedConcept("76830-9", "LN", "Ultrasound"),
        imaging_measurements=groups,
    )
    ds: Dataset = kind(
        evidence=evidence, content=content, series_instance_uid=hd.UID(), series_number=9,
        sop_instance_uid=hd.UID(), instance_number=1, manufacturer="Test",
    )  # fmt: skip
    files.add(ds)
    return ds


def test_planar_groups_of_a_measurement_report(files: Files) -> None:
    clip, still = files.ultrasound(frames=5), files.ultrasound()
    one, two = hd.UID(), hd.UID()
    site = hd.sr.FindingSite(codes.SCT.Testis, laterality=codes.SCT.Left)
    shifted = [[x + 20, y + 10] for x, y in SQUARE]
    groups = [
        group(clip, SQUARE, one, [2, 3], finding_sites=[site]),
        group(clip, shifted, two, [3]),
        group(still, shifted, one, finding_sites=[site]),
    ]
    write(files, groups, [clip, still])
    first, second = rois(files, clip)
    assert (first.source, first.number, first.laterality, first.box()) == ("SR", 1, "L", (10, 5, 19, 11))
    assert (second.number, second.laterality, second.box()) == (2, "", (30, 15, 39, 21))
    assert (sorted(first.masks), sorted(second.masks)) == ([2, 3], [3])
    (again,) = rois(files, still)
    assert (again.number, again.laterality, sorted(again.masks)) == (1, "L", [1])  # the lesion that is tracked


def test_a_volumetric_group_fills_its_slices(files: Files) -> None:
    affine, shape = affine_of(3), (5, 40, 50)
    slices = files.mr(*shape, affine)
    regions = [
        hd.sr.ImageRegion(
            "POLYLINE",
            np.array(SQUARE),
            hd.sr.SourceImageForRegion(slices[k].SOPClassUID, slices[k].SOPInstanceUID),
        )
        for k in (1, 2)
    ]
    identity = hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="Lesion")
    sources = hd.sr.SourceImageForSegmentation(slices[0].SOPClassUID, slices[0].SOPInstanceUID)
    assert sources is not None
    write(
        files,
        [hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(identity, referenced_regions=regions)],
        slices,
    )
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    expected = np.zeros(shape, np.bool_)
    expected[1:3, 5:12, 10:20] = True
    assert np.array_equal(found[0].mask, expected)


@pytest.mark.parametrize("shape_3d", ["POLYGON", "ELLIPSE"])
def test_regions_in_the_patient(files: Files, shape_3d: str) -> None:
    affine, shape = affine_of(4), (5, 40, 50)
    slices = files.mr(*shape, affine)
    corners = SQUARE if shape_3d == "POLYGON" else [[10, 20], [30, 20], [20, 15], [20, 25]]
    region = hd.sr.ImageRegion3D(shape_3d, outline(affine, 3, corners), files.frame_uid)
    identity = hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="Lesion")
    groups = [hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(identity, referenced_region=region)]
    write(files, groups, slices)
    found = volume(files, slices, shape, affine)
    assert not isinstance(found, Refusal)
    y, x = np.mgrid[:40, :50] + 0.5
    expected = np.zeros(shape, np.bool_)
    expected[3] = (
        (x > 10) & (x < 20) & (y > 5) & (y < 12)
        if shape_3d == "POLYGON"
        else ((x - 20) / 10) ** 2 + ((y - 20) / 5) ** 2 <= 1
    )
    assert int((found[0].mask ^ expected).sum()) <= (0 if shape_3d == "POLYGON" else 2)


def test_an_ellipsoid_is_refused(files: Files) -> None:
    slices = files.mr(3, 40, 50, np.eye(4))
    ellipsoid = item(
        RelationshipType="CONTAINS", ValueType="SCOORD3D", GraphicType="ELLIPSOID", GraphicData=[0.0] * 18,
        ReferencedFrameOfReferenceUID=files.frame_uid,
    )  # fmt: skip
    report(files, [ellipsoid])
    assert volume(files, slices, (3, 40, 50), np.eye(4)) == unreadable("SR: an ellipsoid")


def test_plain_outlines_are_regions_and_lines_are_not(files: Files) -> None:
    clip = files.ultrasound(frames=4)
    moved = [[x + 1, y + 1] for x, y in SQUARE]
    far = [[x + 25, y + 20] for x, y in SQUARE]
    content = [
        scoord("POLYLINE", [[1, 1], [30, 30]], reference(clip, 1)),
        scoord("POINT", [[4, 4]], reference(clip, 1)),
        scoord("POLYLINE", SQUARE, reference(clip, 1)),
        scoord("CIRCLE", [[40, 30], [40, 34]], reference(clip, 1)),
        scoord("POLYLINE", moved, reference(clip, 2)),
        scoord("POLYLINE", far, reference(clip, 3)),
    ]
    report(files, content)
    found = {r.number: (sorted(r.masks), r.box()) for r in rois(files, clip)}
    assert found == {1: ([1, 2], (10, 5, 20, 12)), 2: ([1, 3], (35, 25, 44, 33))}


def test_an_image_named_elsewhere_in_the_report_is_found_by_reference(files: Files) -> None:
    image = files.ultrasound()
    region = scoord("POLYLINE", SQUARE, reference(image))
    picture = item(RelationshipType="CONTAINS", ValueType="IMAGE", ReferencedSOPSequence=[reference(image)])
    library = item(RelationshipType="CONTAINS", ValueType="CONTAINER", ContentSequence=[picture])
    region.ContentSequence = [item(RelationshipType="SELECTED FROM", ReferencedContentItemIdentifier=[1, 1, 1])]
    report(files, [library, region])
    assert [r.box() for r in rois(files, image)] == [(10, 5, 19, 11)]


def test_a_broken_outline_in_a_report_is_refused(files: Files) -> None:
    image = files.ultrasound()
    broken = scoord("POLYLINE", SQUARE, reference(image))
    broken.GraphicData = [1.0, 2.0, 3.0]
    report(files, [broken])
    assert planar(files, image) == unreadable("SR: an outline is broken")


# --- presentation states ---------------------------------------------------------------------------------------------


def test_closed_graphics_in_pixels(files: Files) -> None:
    image = files.ultrasound()
    turn = np.linspace(0, 2 * np.pi, 9)
    ring = np.array([35.0, 28.0]) + 6 * np.stack([np.cos(turn), np.sin(turn)], 1)
    ring[-1] = ring[0]
    graphics = [
        graphic("POLYLINE", [[1, 1], [9, 1], [9, 9]]),  # open: an arrow
        graphic("POLYLINE", SQUARE),
        graphic("CIRCLE", [[40, 8], [40, 12]]),
        graphic("ELLIPSE", [[2, 30], [12, 30], [7, 27], [7, 33]]),
        graphic("INTERPOLATED", ring),
        graphic("POINT", [[3, 3]]),
    ]
    gsps(files, [annotation(graphics)], [image])
    found = [(r.source, r.number, r.box()) for r in rois(files, image)]
    assert found == [
        ("GSPS", 1, (10, 5, 19, 11)),
        ("GSPS", 2, (36, 4, 43, 11)),
        ("GSPS", 3, (2, 27, 11, 32)),
        ("GSPS", 4, (29, 22, 40, 33)),
    ]


def test_an_open_graphic_that_is_filled_is_a_region(files: Files) -> None:
    image = files.ultrasound()
    filled = graphic("POLYLINE", SQUARE[:4])
    filled.GraphicFilled = "Y"
    gsps(files, [annotation([filled])], [image])
    assert [r.box() for r in rois(files, image)] == [(10, 5, 19, 11)]


def displayed(turn: int, flip: str, points: list[list[float]]) -> list[list[float]]:
    """Where image points (fractions) come to lie on the display: turned clockwise, then flipped (PS3.3 C.10.6)."""
    steps = {0: lambda s, t: (s, t), 90: lambda s, t: (1 - t, s), 180: lambda s, t: (1 - s, 1 - t), 270: lambda s, t: (t, 1 - s)}  # fmt: skip  # noqa: E501
    shown = [steps[turn](s, t) for s, t in points]
    return [[1 - u if flip == "Y" else u, v] for u, v in shown]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["N", "Y"])
def test_graphics_in_display_units_are_turned_back(files: Files, turn: int, flip: str) -> None:
    """Displayed area: columns 6..45, rows 3..32 (counted from 1). An L, so that every turn and flip differs."""
    image = files.ultrasound()
    ell = [[10, 5], [30, 5], [30, 10], [15, 10], [15, 25], [10, 25], [10, 5]]
    area = item(
        DisplayedAreaTopLeftHandCorner=[6, 3], DisplayedAreaBottomRightHandCorner=[45, 32],
        PresentationSizeMode="SCALE TO FIT", ReferencedImageSequence=[reference(image)],
    )  # fmt: skip
    fractions = [[(x - 5) / 40, (y - 2) / 30] for x, y in ell]
    points = displayed(turn, flip, fractions)
    gsps(
        files, [annotation([graphic("POLYLINE", points, "DISPLAY")])], [image],
        DisplayedAreaSelectionSequence=[area], ImageRotation=turn, ImageHorizontalFlip=flip,
    )  # fmt: skip
    expected = np.zeros((40, 50), np.bool_)
    expected[5:10, 10:30] = expected[5:25, 10:15] = True
    (only,) = rois(files, image)
    assert np.array_equal(only.masks[1], expected)


def test_display_units_without_a_displayed_area_are_refused(files: Files) -> None:
    image = files.ultrasound()
    gsps(files, [annotation([graphic("CIRCLE", [[0.5, 0.5], [0.6, 0.5]], "DISPLAY")])], [image])
    assert planar(files, image) == unreadable("GSPS: the presentation state does not say which area it shows")


def test_one_outline_a_frame_is_one_lesion_as_long_as_they_overlap(files: Files) -> None:
    clip = files.ultrasound(frames=6)
    moved = [[[x + n, y] for x, y in SQUARE] for n in range(3)]
    far = [[x + 30, y + 20] for x, y in SQUARE]
    drawn = [annotation([graphic("POLYLINE", p)], [reference(clip, n + 2)]) for n, p in enumerate(moved)]
    gsps(files, [*drawn, annotation([graphic("POLYLINE", far)], [reference(clip, 6)])], [clip])
    assert [(r.number, sorted(r.masks)) for r in rois(files, clip)] == [(1, [2, 3, 4]), (2, [6])]


def test_an_annotation_stands_on_the_images_it_names(files: Files) -> None:
    first, second = files.ultrasound(), files.ultrasound()
    gsps(files, [annotation([graphic("POLYLINE", SQUARE)], [reference(second)])], [first, second])
    assert rois(files, first) == ()
    assert len(rois(files, second)) == 1


def test_the_newest_presentation_state_counts_and_a_broken_one_is_refused(files: Files) -> None:
    image = files.ultrasound()
    series = hd.UID()
    for hour, shift in ((10, 0), (12, 2), (11, 4)):
        points = [[x + shift, y] for x, y in SQUARE]
        when = f"20260101{hour}0000"
        gsps(files, [annotation([graphic("POLYLINE", points)])], [image], when, SeriesInstanceUID=series)
    assert [r.box() for r in rois(files, image)] == [(12, 5, 21, 11)]
    broken = graphic("POLYLINE", SQUARE)
    broken.GraphicData = [1.0, 2.0, 3.0]
    gsps(files, [annotation([broken])], [image])
    assert planar(files, image) == unreadable("GSPS: an outline is broken")

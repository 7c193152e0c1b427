"""Stacks in the patient: order and faults by position alone, several grids on one."""

from __future__ import annotations

from pathlib import Path

import dce
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dicom_node.pixels import dynamic, geometry
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.geometry import Grid, Ordered
from dicom_node.pixels.roi_model import Plane, planes
from dicom_node.result import Refusal, RefusalCode


def plane(z: float, x: float = 0.0, turn: float = 0.0) -> Plane:
    c, s = np.cos(turn), np.sin(turn)
    return Plane(np.array([x, 0.0, z]), np.array([0.8, 0, 0]), 0.7 * np.array([0, c, s]), 3.0)


def refused(found: Ordered | Refusal) -> str:
    assert isinstance(found, Refusal)
    return str(found)


@settings(max_examples=60, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3.0, 3.0)] * 3), gap=st.floats(0.8, 8.0), count=st.integers(2, 40),
    seed=st.integers(0, 2**32), start=st.tuples(*[st.floats(-300, 300)] * 3),
)  # fmt: skip
def test_slices_in_any_order_and_direction_give_the_affine_they_were_made_with(
    angles: tuple[float, float, float], gap: float, count: int, seed: int, start: tuple[float, float, float]
) -> None:
    a, b, c = angles
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tip = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    axes = turn @ tip @ np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    origins = np.array(start) + gap * np.arange(count)[:, None] * axes[:, 2]
    made = [Plane(np.round(o, 4), 0.7 * axes[:, 0], 0.9 * axes[:, 1], 5.0) for o in origins]
    shuffled = np.random.default_rng(seed).permutation(count)
    found = geometry.stack([made[i] for i in shuffled], 11, 13)
    assert isinstance(found, Ordered)
    assert [int(shuffled[i]) for i in found.order] == list(range(count))
    expected = np.eye(4)
    expected[:3] = np.column_stack([0.7 * axes[:, 0], 0.9 * axes[:, 1], gap * axes[:, 2], origins[0]])
    assert np.allclose(found.grid.affine, expected, atol=1e-3)


def test_each_fault_of_a_stack_has_its_name() -> None:
    whole = [plane(3.0 * k) for k in range(10)]
    assert isinstance(geometry.stack(whole, 8, 8), Ordered)
    assert refused(geometry.stack(whole[:4] + whole[5:], 8, 8)).startswith("SLICE_MISSING(nothing between positions 4")
    assert refused(geometry.stack(whole[:4] + whole[7:], 8, 8)).startswith("SLICE_MISSING")
    assert refused(geometry.stack([*whole, plane(9.05)], 8, 8)).startswith("SLICE_DUPLICATE(two slices at position 4")
    assert refused(geometry.stack([plane(0.0)] * 5, 8, 8)) == "SLICE_DUPLICATE(5 slices at one position)"
    assert refused(geometry.stack([*whole, plane(31.4)], 8, 8)).startswith("SLICE_SPACING_UNEVEN(gap 4.40 mm")
    assert refused(geometry.stack([plane(3.0 * k, x=0.6 * k) for k in range(9)], 8, 8)).startswith("GEOMETRY_SHEAR")
    assert refused(geometry.stack([*whole[:9], plane(27.0, x=2.0)], 8, 8)).startswith("GEOMETRY_SHEAR")
    assert refused(geometry.stack([*whole, plane(30.0, turn=0.01)], 8, 8)).startswith("GEOMETRY_MIXED")


def test_rounded_positions_are_no_fault_and_a_slight_drift_is_in_the_affine() -> None:
    jitter = np.random.default_rng(1).uniform(-0.02, 0.02, 30)
    found = geometry.stack([plane(3.0 * k + jitter[k], x=0.1 * k) for k in range(30)], 8, 8)
    assert isinstance(found, Ordered)
    assert found.grid.affine[:3, 2] == pytest.approx([0.1, 0.0, 3.0], abs=0.01)


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("gantrytilting/001", RefusalCode.GEOMETRY_SHEAR), ("notavolume/001", RefusalCode.SLICE_DUPLICATE),
        ("sliceincrement/001", RefusalCode.SLICE_MISSING), ("sliceincrement/002", RefusalCode.SLICE_MISSING),
        ("sliceorientation/001", RefusalCode.GEOMETRY_MIXED),
    ],
)  # fmt: skip
def test_real_stacks_that_fail_are_called_by_their_fault(shared_data: Path, folder: str, code: RefusalCode) -> None:
    files = sorted((shared_data / "mr" / "dicom2nifti" / "failing" / folder).glob("*.dcm"))
    found = [p for i in dce.stored(files).instances for p in planes(i.header)]
    stacked = geometry.stack([p for p in found if p is not None], 8, 8)
    assert isinstance(stacked, Refusal) and stacked.code is code


# --- several grids ---------------------------------------------------------------------------------------------------


def grid(shape: tuple[int, int, int], start: tuple[float, float, float], edges: tuple[float, float, float]) -> Grid:
    affine = np.diag([*edges, 1.0])
    affine[:3, 3] = start
    return Grid(shape, affine)


def plane_values(of: Grid) -> NDArray[np.float32]:
    """A linear function of the place in the patient: linear interpolation must give it back exactly."""
    s, r, c = np.meshgrid(*(np.arange(n) for n in of.shape), indexing="ij")
    mm = of.affine @ np.stack([c, r, s, np.ones_like(c)]).reshape(4, -1)
    return np.asarray((2.0 * mm[0] - 3.0 * mm[1] + 5.0 * mm[2]).reshape(of.shape), dtype=np.float32)


def test_a_function_linear_in_the_patient_survives_resampling_from_a_finer_turned_grid() -> None:
    turn = 0.15
    affine = np.eye(4)
    affine[:3, :3] = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ np.diag(
        [0.9, 1.1, 2.0]
    )
    affine[:3, 3] = [-30.0, -40.0, -20.0]
    source = Grid((50, 80, 90), affine)
    target = grid((20, 24, 30), (-10.0, -8.0, -2.0), (1.25, 1.5, 3.0))
    common = geometry.common(target, [source])
    assert isinstance(common, Grid) and common.shape == target.shape
    moved = geometry.resample(plane_values(source), source, common)
    assert np.abs(moved - plane_values(common)).max() < 1e-3


def test_what_one_phase_does_not_show_is_cut_off_and_never_made_up() -> None:
    reference = grid((20, 24, 30), (0.0, 0.0, 0.0), (1.0, 1.0, 3.0))
    higher = grid((20, 24, 30), (0.0, 0.0, 9.0), (1.0, 1.0, 3.0))
    common = geometry.common(reference, [higher])
    assert isinstance(common, Grid) and common.shape == (17, 24, 30)
    assert common.affine[:3, 3].tolist() == [0.0, 0.0, 9.0]
    assert np.allclose(geometry.resample(plane_values(higher), higher, common), plane_values(common), atol=1e-3)
    far = geometry.common(reference, [grid((20, 24, 30), (0.0, 0.0, 45.0), (1.0, 1.0, 3.0))])
    assert isinstance(far, Refusal) and far.code is RefusalCode.PHASE_COVERAGE


def test_a_phase_of_another_grid_is_laid_on_the_portal_venous_one(tmp_path: Path) -> None:
    """Thinner slices and smaller pixels before contrast, as scanners run it."""
    d = dce.Dce()

    def mark(ds: object, p: int, s: int) -> None:
        ds.SeriesDescription = ("pre", "art", "pv", "delayed")[p]  # type: ignore[attr-defined]
        ds.AcquisitionTime = dce.tm(d.time(p))  # type: ignore[attr-defined]

    coarse = d.datasets(mark, one_series=False)
    of_pre = Grid((36, 18, 16), d.affine() @ np.diag([0.8, 0.8, 0.6, 1.0]))
    s, r, c = np.meshgrid(*(np.arange(n) for n in of_pre.shape), indexing="ij")
    mm = (of_pre.affine @ np.stack([c, r, s, np.ones_like(c)]).reshape(4, -1))[:3]
    fine = (1000 + 10 * mm[0] + 6 * mm[1] + 4 * mm[2]).reshape(of_pre.shape)
    template, pre = coarse[0], []
    for k in range(36):
        ds = d.slice(0, 0, template.SeriesInstanceUID)
        mark(ds, 0, k)
        ds.Rows, ds.Columns, ds.PixelSpacing = 18, 16, [1.2, 1.0]
        ds.ImagePositionPatient = [float(v) for v in (of_pre.affine @ np.array([0, 0, k, 1.0]))[:3]]
        ds.PixelData = np.round(fine[k]).astype(np.uint16).tobytes()
        pre.append(ds)
    found = dynamic.plan(dce.study(tmp_path, pre + coarse[20:]))
    assert not isinstance(found, Refusal), found
    stack = dynamic.load(found, PixelDecoder())
    assert isinstance(stack, dynamic.Stack), stack
    assert stack.notes["resampled"] == "pre" and stack.phases == dce.NAMES
    assert np.allclose(stack.affine, d.affine()) and stack.volume.shape[1:] == (20, 12, 10)
    s, r, c = np.meshgrid(np.arange(20), np.arange(12), np.arange(10), indexing="ij")
    at = (d.affine() @ np.stack([c, r, s, np.ones_like(c)]).reshape(4, -1))[:3]
    expected = (1000 + 10 * at[0] + 6 * at[1] + 4 * at[2]).reshape(20, 12, 10)
    assert np.abs(stack.volume[0] - expected).max() <= 0.51  # half a stored step
    assert np.array_equal(stack.volume[1:], d.values[1:].astype(np.float32))
    assert [ref.sop_instance_uid for ref in stack.frames[0]] == [pre[round(s / 0.6)].SOPInstanceUID for s in range(20)]

"""Every way in which a dynamic series can be broken has a refusal of its own; none gives a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import dce
import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import generate_uid

from dicom_node.pixels import dynamic
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.dynamic import Rules
from dicom_node.result import Refusal, RefusalCode

Break = Callable[[dce.Dce], list[Dataset]]


def temporal(d: dce.Dce) -> list[Dataset]:
    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = p + 1, 4
        ds.AcquisitionTime = dce.tm(d.time(p))

    return d.datasets(mark)


def series(d: dce.Dce, *words: str) -> list[Dataset]:
    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.SeriesDescription = (words or ("pre", "art", "pv", "delayed"))[p]
        ds.AcquisitionTime = dce.tm(d.time(p))

    return d.datasets(mark, one_series=False)


def of(datasets: list[Dataset], p: int) -> list[Dataset]:
    """The images of one phase."""
    return datasets[20 * p : 20 * (p + 1)]


def each(datasets: list[Dataset], **values: object) -> None:
    for ds in datasets:
        for key, value in values.items():
            setattr(ds, key, value)


def without(datasets: list[Dataset], *lost: int) -> list[Dataset]:
    return [ds for i, ds in enumerate(datasets) if i not in lost]


def twice(datasets: list[Dataset], at: int) -> list[Dataset]:
    copy = deepcopy(datasets[at])
    copy.SOPInstanceUID = generate_uid()
    return [*datasets, copy]


def moved(ds: Dataset, x: float = 0.0, z: float = 0.0) -> None:
    place = [float(v) for v in ds.ImagePositionPatient]
    ds.ImagePositionPatient = [place[0] + x, place[1], place[2] + z]


def no_gradient_echo(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(found, ScanningSequence=["GR", "IR"])
    return found


def coronal(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(found, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    return found


def subtractions_only(d: dce.Dce) -> list[Dataset]:
    return series(d, "pre sub", "art sub", "pv sub", "delayed sub")


def fat_only(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(found, ImageType=["DERIVED", "PRIMARY", "DIXON", "FAT"])
    return found


def nothing_tells(d: dce.Dce) -> list[Dataset]:
    found = d.datasets(lambda ds, p, s: None)
    each(found, InstanceNumber=7)
    return found


def shuffled_numbers(d: dce.Dce) -> list[Dataset]:
    """Blocks of Instance Number in which two images of different phases changed places."""
    found = d.datasets(lambda ds, p, s: None)
    found[3].InstanceNumber, found[24].InstanceNumber = found[24].InstanceNumber, found[3].InstanceNumber
    return found


def half_marked(d: dce.Dce) -> list[Dataset]:
    """A key that nearly divides: one image has the number of the next phase."""
    found = d.datasets(lambda ds, p, s: setattr(ds, "AcquisitionNumber", p + 1))
    each(found, InstanceNumber=1)
    found[5].AcquisitionNumber = 2
    return found


def keys_disagree(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    a, b = found[3], found[23]
    a.AcquisitionTime, b.AcquisitionTime = b.AcquisitionTime, a.AcquisitionTime
    return found


def times_backwards(d: dce.Dce) -> list[Dataset]:
    """Temporal positions against the clock; the times differ from slice to slice and divide nothing themselves."""

    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.TemporalPositionIdentifier = p + 1
        ds.AcquisitionTime = dce.tm(d.time(3 - p) + 0.01 * s)

    return d.datasets(mark)


def acquired_twice(d: dce.Dce) -> list[Dataset]:
    """A second reconstruction of the arterial phase in a series of its own."""
    found = series(d, "t1", "t1", "t1", "t1")
    again = deepcopy(of(found, 1))
    uid = generate_uid()
    for ds in again:
        ds.SeriesInstanceUID, ds.SOPInstanceUID = uid, generate_uid()
    return found + again


def no_order(d: dce.Dce) -> list[Dataset]:
    found = series(d, "t1", "t1", "t1", "t1")
    each(found, AcquisitionTime="100000")
    return found


def one_position_short(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(found, NumberOfTemporalPositions=5)
    return found


def too_many_positions(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(found, NumberOfTemporalPositions=3)
    return found


def one_phase(d: dce.Dce) -> list[Dataset]:
    return of(series(d), 0)


def half_of_the_zones(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(of(found, 0), TimezoneOffsetFromUTC="+0100")
    each(of(found, 1), TimezoneOffsetFromUTC="+0200")
    return found


def a_week_apart(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    each(of(found, 3), AcquisitionDate="20260308")
    return found


def uneven_slices(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    for ds in of(found, 2)[10:]:
        moved(ds, z=1.2)
    return found


def sheared(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    for phase in range(4):
        for s, ds in enumerate(of(found, phase)):
            moved(ds, x=0.8 * s)
    return found


def turned(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    of(found, 1)[4].ImageOrientationPatient = [1, 0, 0, 0, 0.995, 0.0998]
    return found


def without_place(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    del of(found, 1)[4].ImagePositionPatient
    return found


def without_reference(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    for ds in found:
        del ds.FrameOfReferenceUID
    return found


def repositioned(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    each(of(found, 3), FrameOfReferenceUID=generate_uid())
    return found


def repositioned_within(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    each(of(found, 3), FrameOfReferenceUID=generate_uid())
    return found


def elsewhere(d: dce.Dce) -> list[Dataset]:
    found = series(d)
    for ds in of(found, 3):
        moved(ds, z=37.0)
    return found


def bits_differ(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    found[30].BitsStored, found[30].HighBit = 12, 11
    return found


def slope_zero(d: dce.Dce) -> list[Dataset]:
    found = temporal(d)
    found[30].RescaleSlope, found[30].RescaleIntercept = 0, 5
    return found


def blank_slice(d: dce.Dce) -> list[Dataset]:
    values = d.values.copy()
    values[2, 19] = 0
    return temporal(dataclasses.replace(d, values=values))


BROKEN: list[tuple[str, Break]] = [
    ("NO_SUITABLE_IMAGE(no axial T1-weighted gradient echo series)", no_gradient_echo),
    ("NO_SUITABLE_IMAGE(no axial T1-weighted gradient echo series)", coronal),
    ("NO_SUITABLE_IMAGE(no axial T1-weighted gradient echo series)", subtractions_only),
    ("NO_SUITABLE_IMAGE(no stack of 20 slices or more)", lambda d: without(temporal(d), 0, 20, 40, 60)),
    ("DIXON_WATER_MISSING(there are fat images only)", fat_only),
    ("PHASES_UNSEPARABLE(4 images at each of 20 positions)", nothing_tells),
    ("PHASES_UNSEPARABLE(4 images at each of 20 positions)", shuffled_numbers),
    ("PHASES_UNSEPARABLE(4 images at each of 20 positions)", half_marked),
    ("PHASES_AMBIGUOUS(TemporalPositionIdentifier and AcquisitionTime divide the images differently)", keys_disagree),
    ("PHASES_AMBIGUOUS(TemporalPositionIdentifier and AcquisitionTime order the phases differently)", times_backwards),
    ("PHASES_AMBIGUOUS(two series were acquired at one time)", acquired_twice),
    ("PHASES_AMBIGUOUS(neither time nor description orders the series)", no_order),
    ("PHASES_AMBIGUOUS(4 temporal positions, not as many as the images say)", too_many_positions),
    ("PHASE_MISSING(4 of 5 temporal positions are there)", one_position_short),
    ("PHASE_MISSING(one phase only)", one_phase),
    ("PHASE_LABEL_CONFLICT(phase 2, portal venous, at 25 s)", lambda d: series(d, "pre", "pv", "t1", "delayed")),
    ("PHASE_LABEL_CONFLICT(phase 1 is called pre, arterial)", lambda d: series(d, "pre art", "t1", "pv", "delayed")),
    ("PHASE_LABEL_CONFLICT(phase 1, arterial, at -20 s)", lambda d: series(d, "art", "pre", "pv", "delayed")),
    ("PHASE_TIME_INVALID(only some images name their time zone, and not one zone)", half_of_the_zones),
    ("PHASE_TIME_INVALID(the images were acquired more than half a day apart)", a_week_apart),
    ("SLICE_MISSING(phase 2: nothing between positions 7 and 8 of 19)",
     lambda d: without(series(d), 27)),
    ("SLICE_MISSING(phase 3: 19 of 20 slices)", lambda d: without(series(d), 59)),
    ("SLICE_MISSING(phase 2: 2 of 20 slices)", lambda d: without(series(d), *range(22, 40))),
    ("SLICE_MISSING(3 images at position 8 of 20, 4 at the others)", lambda d: without(temporal(d), 27)),
    ("SLICE_DUPLICATE(5 images at position 8 of 20, 4 at the others)", lambda d: twice(temporal(d), 27)),
    ("SLICE_DUPLICATE(2 images at position 8 of 20, 1 at the others)", lambda d: twice(series(d), 27)),
    ("SLICE_SPACING_UNEVEN(phase 3: gap 4.20 mm after position 10, else 3.00)", uneven_slices),
    ("GEOMETRY_SHEAR(phase 1: slices are shifted by 0.80 mm across their normal)", sheared),
    ("GEOMETRY_MIXED(one series holds slices of several orientations or sizes)", turned),
    ("GEOMETRY_MIXED(slices do not say where they lie in the patient)", without_place),
    ("FRAME_OF_REFERENCE_MISMATCH(1 frames of reference)", without_reference),
    ("FRAME_OF_REFERENCE_MISMATCH(2 frames of reference)", repositioned),
    ("FRAME_OF_REFERENCE_MISMATCH(several frames of reference in one series)", repositioned_within),
    ("PHASE_COVERAGE(the phases show less than half of the reference in common)", elsewhere),
    ("PIXEL_FORMAT_MISMATCH(slices of one series differ in bits or sign)", bits_differ),
    ("PIXEL_FORMAT_MISMATCH(phase 2, slice 11: rescale slope is zero or not finite)", slope_zero),
    ("SLICE_EMPTY(phase 3, slice 20)", blank_slice),
]  # fmt: skip


@pytest.mark.parametrize(
    ("refusal", "broken"), BROKEN, ids=[f"{i}-{r.split('(')[0]}" for i, (r, _) in enumerate(BROKEN)]
)
def test_a_broken_study_is_refused_by_name(refusal: str, broken: Break, tmp_path: Path) -> None:
    d = dce.Dce()
    found = dynamic.plan(dce.study(tmp_path, broken(d)), Rules())
    if not isinstance(found, Refusal):
        loaded = dynamic.load(found, PixelDecoder())
        assert isinstance(loaded, Refusal), (found.rule, found.names)
        found = loaded
    assert str(found) == refusal
    assert "Secret" not in str(found)


def test_every_code_of_phases_and_stacks_is_reached_above() -> None:
    names = ("PHASE", "SLICE", "GEOMETRY", "FRAME_OF_REFERENCE", "PIXEL_FORMAT", "DIXON")
    assert {c for c in RefusalCode if c.startswith(names)} == {
        r.split("(")[0] for r, _ in BROKEN if not r.startswith("NO_SUITABLE")
    }


def test_a_phase_that_is_not_there_is_not_replaced(tmp_path: Path) -> None:
    found = dynamic.plan(dce.study(tmp_path, series(dce.Dce(), "pre", "art", "t1", "delayed")[:40]))
    assert not isinstance(found, Refusal)
    assert dynamic.choose(found, dce.NAMES) == Refusal(RefusalCode.PHASE_MISSING, "portal venous, delayed")
    backwards = dynamic.choose(found, ("arterial", "pre"))
    assert backwards == Refusal(RefusalCode.PHASE_MISSING, "the phases are not in increasing order")


def test_pixels_of_another_size_than_the_headers_say_are_refused(tmp_path: Path) -> None:
    study = dce.study(tmp_path, temporal(dce.Dce()))
    found = dynamic.plan(study)
    assert not isinstance(found, Refusal)

    class Wrong:
        def frames(self, instance: object, numbers: object = None) -> object:
            yield np.arange(20).reshape(4, 5)

    refused = dynamic.load(found, Wrong())  # type: ignore[arg-type]
    assert refused == Refusal(RefusalCode.PIXEL_FORMAT_MISMATCH, "phase 1, slice 1: not of the size its headers say")

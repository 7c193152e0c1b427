"""One phantom in every encoding gives one stack; order of instances and series is no evidence."""

from __future__ import annotations

import dataclasses
import random
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import dce
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import generate_uid

from dicom_node.pixels import dynamic
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.pixels.dynamic import Rules, Stack
from dicom_node.result import Refusal
from dicom_node.study import Study

Encode = Callable[[dce.Dce], list[Dataset]]
DEPTH = 20


def acquired(ds: Dataset, d: dce.Dce, p: int, s: int, jitter: bool = False) -> None:
    """A time of acquisition; with jitter every slice has its own, so that it divides nothing."""
    ds.AcquisitionTime = dce.tm(d.time(p) + (0.01 * s if jitter else 0.0))


def series_with(words: tuple[str, ...]) -> Encode:
    def encode(d: dce.Dce) -> list[Dataset]:
        def mark(ds: Dataset, p: int, s: int) -> None:
            ds.SeriesDescription = words[p]
            ds.SpecificCharacterSet = "ISO_IR 192"
            acquired(ds, d, p, s)

        return d.datasets(mark, one_series=False)

    return encode


def one_series(write: Callable[[Dataset, dce.Dce, int, int], None]) -> Encode:
    return lambda d: d.datasets(lambda ds, p, s: write(ds, d, p, s))


def temporal_position(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = p + 1, 4
    acquired(ds, d, p, s)


def siemens(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    ds.AcquisitionNumber = p + 1
    acquired(ds, d, p, s, jitter=True)


def date_and_time(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    del ds.AcquisitionTime, ds.AcquisitionDate
    ds.AcquisitionDateTime = "20260301" + dce.tm(d.time(p)) + "+0100"


def ge(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    """All phases bear the time at which the first began; the rest is in the cardiac attribute, ms."""
    ds.TriggerTime = 1000.0 * (d.time(p) - d.time(0))
    ds.InstanceNumber = s * 4 + p + 1


def content_time(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    ds.ContentTime = dce.tm(d.time(3) + 10 * p)
    ds.InstanceNumber = s * 4 + p + 1
    acquired(ds, d, p, s, jitter=True)


def blocks(ds: Dataset, d: dce.Dce, p: int, s: int) -> None:
    ds.ImagesInAcquisition = DEPTH
    acquired(ds, d, p, s, jitter=True)


def philips(d: dce.Dce) -> list[Dataset]:
    """Instance Number shuffled; every phase stored with a slope of its own; times in the private element."""
    numbers = list(range(1, 4 * DEPTH + 1))
    random.Random(5).shuffle(numbers)
    scale = (1.0, 0.5, 0.25, 0.125)

    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.InstanceNumber = numbers[p * DEPTH + s]
        ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = p + 1, 4
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = scale[p], 0.0, "normalized"
        stored = d.values[p, s] / scale[p]
        assert np.array_equal(stored.astype(np.uint16) * scale[p], d.values[p, s])
        ds.PixelData = stored.astype(np.uint16).tobytes()
        block = ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0xA0, "FL", d.time(p) - d.time(0))
        block.add_new(0x0E, "FL", 0.01 / scale[p])

    return d.datasets(mark)


def enhanced(write: Callable[[Dataset, Dataset, dce.Dce, int, int], None], shuffled: bool = False) -> Encode:
    def encode(d: dce.Dce) -> list[Dataset]:
        order = list(range(4 * DEPTH))
        if shuffled:
            random.Random(3).shuffle(order)
        return [d.enhanced(lambda ds, group, p, s: write(ds, group, d, p, s), order)]

    return encode


def frame_time(group: Dataset, d: dce.Dce, p: int) -> None:
    group.FrameContentSequence[0].FrameAcquisitionDateTime = "20260301" + dce.tm(d.time(p))


def temporal_index(ds: Dataset, group: Dataset, d: dce.Dce, p: int, s: int) -> None:
    group.FrameContentSequence[0].TemporalPositionIndex = p + 1
    frame_time(group, d, p)


def dimension(ds: Dataset, group: Dataset, d: dce.Dce, p: int, s: int) -> None:
    ds.DimensionIndexSequence = [
        dce.item(DimensionIndexPointer=0x00209057, FunctionalGroupPointer=0x00209111),
        dce.item(DimensionIndexPointer=0x00189344, FunctionalGroupPointer=0x00189341),
    ]
    group.FrameContentSequence[0].DimensionIndexValues = [s + 1, p + 1]
    kind = ("PRE_CONTRAST", "ARTERIAL", "PORTAL_VENOUS", "DELAYED")[p]
    group.ContrastBolusUsageSequence = [dce.item(ContrastBolusAgentNumber=1, ContrastBolusAgentPhase=kind)]
    frame_time(group, d, p)


def time_offset(ds: Dataset, group: Dataset, d: dce.Dce, p: int, s: int) -> None:
    group.TemporalPositionSequence = [dce.item(TemporalPositionTimeOffset=d.time(p) - d.time(0))]


def rescaled_frames(ds: Dataset, group: Dataset, d: dce.Dce, p: int, s: int) -> None:
    """Pixel Value Transformation of every frame; the shared one is for somebody else."""
    temporal_index(ds, group, d, p, s)
    group.PixelValueTransformationSequence = [dce.item(RescaleSlope=1.0, RescaleIntercept=0.0, RescaleType="US")]
    wrong = dce.item(RescaleSlope=7.0, RescaleIntercept=3.0, RescaleType="US")
    ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [wrong]


def instance_a_phase(d: dce.Dce) -> list[Dataset]:
    """Enhanced MR, one instance for each phase, in one series."""
    series, found = generate_uid(), []
    for p in range(4):
        part = dataclasses.replace(d, values=d.values[p : p + 1])
        ds = part.enhanced(lambda ds, group, _, s, p=p: frame_time(group, d, p))
        ds.SeriesInstanceUID, ds.InstanceNumber = series, p + 1
        found.append(ds)
    return found


def dixon(d: dce.Dce) -> list[Dataset]:
    """Water, fat, in-phase and opposed-phase images of every phase in one series, as scanners number them."""
    water = d.datasets(lambda ds, p, s: temporal_position(ds, d, p, s))
    found = []
    for part, factor in (("WATER", 1), ("FAT", 2), ("IN_PHASE", 3), ("OUT_PHASE", 4)):
        for ds in water:
            copy = deepcopy(ds)
            copy.SOPInstanceUID = generate_uid()
            copy.ImageType = ["DERIVED", "PRIMARY", "DIXON", part]
            copy.PixelData = (np.frombuffer(ds.PixelData, np.uint16) // factor).astype(np.uint16).tobytes()
            found.append(copy)
    return found


def dual_echo(d: dce.Dce) -> list[Dataset]:
    first = d.datasets(lambda ds, p, s: temporal_position(ds, d, p, s))
    found = list(first)
    for ds in first:
        copy = deepcopy(ds)
        copy.SOPInstanceUID = generate_uid()
        copy.EchoTime, copy.EchoNumbers = 3.8, 2
        copy.PixelData = (np.frombuffer(ds.PixelData, np.uint16) // 2).astype(np.uint16).tobytes()
        ds.EchoNumbers = 1
        found.append(copy)
    return found


def echo_series(d: dce.Dce) -> list[Dataset]:
    """The second echo of every phase as a series of its own, sent first."""
    first = series_with(("pre", "art", "pv", "delayed"))(d)
    second = series_with(("pre e2", "art e2", "pv e2", "delayed e2"))(dataclasses.replace(d, values=d.values // 2))
    for ds in second:
        ds.EchoTime = 3.8
    return second + first


def with_derived(d: dce.Dce) -> list[Dataset]:
    """Subtraction, projection, reformat, phase image and localiser beside the phases."""
    found = series_with(("pre", "art", "pv", "delayed"))(d)
    for image_type, words in (
        (["DERIVED", "PRIMARY", "M", "SUB"], "t1 sub"), (["ORIGINAL", "PRIMARY", "M"], "art_SUB"),
        (["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"], "MIP art"), (["DERIVED", "SECONDARY", "MPR"], "cor"),
        (["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"], "art"), (["ORIGINAL", "PRIMARY", "M"], "Localizer"),
        (["DERIVED", "PRIMARY", "M"], "art post processed"), (["ORIGINAL", "PRIMARY", "M"], "动脉 减影"),
    ):  # fmt: skip
        extra = series_with((words,) * 4)(dataclasses.replace(d, values=d.values[:1] // 2))
        for ds in extra:
            ds.ImageType = image_type
        found += extra
    other = series_with(("t2 haste",) * 4)(dataclasses.replace(d, values=d.values[:1]))
    for ds in other:
        ds.ScanningSequence, ds.RepetitionTime = "SE", 900
    return found + other


def mixed(d: dce.Dce) -> list[Dataset]:
    """A series before contrast, and one of the three phases after it, as LAVA and THRIVE are often run."""
    found = d.datasets(lambda ds, p, s: acquired(ds, d, p, s))
    series = generate_uid()
    for ds in found:
        if ds.AcquisitionTime == dce.tm(d.time(0)):
            ds.SeriesInstanceUID, ds.SeriesDescription = series, "Ax LAVA pre"
    return found


def untimed(d: dce.Dce) -> list[Dataset]:
    """An anonymiser has set all times to noon: the descriptions order the series."""
    found = series_with(("hcc pre", "hcc art", "hcc portal venous", "hcc delayed"))(d)
    for ds in found:
        ds.AcquisitionTime = ds.SeriesTime = "120000"
        del ds.ContrastBolusStartTime
    return found


ENCODINGS: dict[str, tuple[Encode, str]] = {
    "English": (series_with(("Ax VIBE pre", "Ax VIBE late arterial", "Ax VIBE portal venous", "Ax VIBE delayed")),
                "series per phase"),
    "German": (series_with(("t1_vibe_nativ", "t1_vibe_spätarteriell", "t1_vibe_portalvenös", "t1_vibe_Spätphase")),
               "series per phase"),
    "Chinese": (series_with(("肝脏平扫", "肝脏动脉晚期", "肝脏门静脉期", "肝脏延迟期")), "series per phase"),
    "no description": (series_with(("t1 tra",) * 4), "series per phase"),
    "TemporalPositionIdentifier": (one_series(temporal_position), "TemporalPositionIdentifier"),
    "Siemens, AcquisitionNumber": (one_series(siemens), "AcquisitionNumber"),
    "AcquisitionTime": (one_series(acquired), "AcquisitionTime"),
    "AcquisitionDateTime": (one_series(date_and_time), "AcquisitionTime"),
    "GE, TriggerTime": (one_series(ge), "TriggerTime"),
    "ContentTime": (one_series(content_time), "ContentTime"),
    "GE, InstanceNumber": (one_series(blocks), "InstanceNumber blocks"),
    "Philips": (philips, "TemporalPositionIdentifier"),
    "Enhanced, TemporalPositionIndex": (enhanced(temporal_index, shuffled=True), "TemporalPositionIndex"),
    "Enhanced, DimensionIndexValues": (enhanced(dimension, shuffled=True), "DimensionIndexValues"),
    "Enhanced, time offset": (enhanced(time_offset), "TemporalPositionTimeOffset"),
    "Enhanced, rescaled frames": (enhanced(rescaled_frames), "TemporalPositionIndex"),
    "Enhanced, instance per phase": (instance_a_phase, "AcquisitionTime"),
    "Dixon": (dixon, "TemporalPositionIdentifier"),
    "two echoes": (dual_echo, "TemporalPositionIdentifier"),
    "two echoes, series each": (echo_series, "series per phase"),
    "derived beside": (with_derived, "series per phase"),
    "pre and multi-phase": (mixed, "series per phase, AcquisitionTime"),
    "no times": (untimed, "series per phase"),
    "big endian": (lambda d: dce.big_endian(one_series(temporal_position)(d)), "TemporalPositionIdentifier"),
}  # fmt: skip


def stack_of(study: Study, rules: Rules | None = None) -> Stack | Refusal:
    found = dynamic.plan(study, rules)
    return found if isinstance(found, Refusal) else dynamic.load(found, PixelDecoder())


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_same_stack(name: str, tmp_path: Path) -> None:
    d = dce.Dce(tilt=12.0)
    encode, rule = ENCODINGS[name]
    datasets = encode(d)
    random.Random(name).shuffle(datasets)
    stack = stack_of(dce.study(tmp_path, datasets))
    assert isinstance(stack, Stack), stack
    assert stack.rule == rule
    assert stack.phases == dce.NAMES
    assert np.array_equal(stack.volume, d.values.astype(np.float32))
    assert np.allclose(stack.affine, d.affine(), atol=1e-5)
    assert not stack.volume.flags.writeable
    if name == "no times":
        assert stack.notes["times"] == "not known"
    else:
        assert stack.times == pytest.approx(dce.SECONDS, abs=0.2)
        assert stack.notes["zero time"] == "ContrastBolusStartTime"


def test_every_voxel_says_where_it_comes_from(tmp_path: Path) -> None:
    d = dce.Dce()
    study = dce.study(tmp_path, enhanced(temporal_index, shuffled=True)(d))
    stack = stack_of(study)
    assert isinstance(stack, Stack)
    pixels = np.stack(list(PixelDecoder().frames(study.instances[0])))
    for p, refs in enumerate(stack.frames):
        for s, ref in enumerate(refs):
            assert ref.sop_instance_uid == study.instances[0].sop_instance_uid and ref.number_of_frames == 4 * DEPTH
            assert np.array_equal(pixels[ref.frame_number - 1], d.values[p, s])


def test_midnight_between_the_phases_with_and_without_a_date_that_follows(tmp_path: Path) -> None:
    d = dce.Dce(injection=86400.0 - 40.0)  # arterial 23:59:45, portal venous 00:00:30
    for number, dated in enumerate((False, True)):
        datasets = d.datasets(lambda ds, p, s: acquired(ds, d, p, s))
        for ds in datasets:
            if dated and ds.AcquisitionTime < "12":
                ds.AcquisitionDate = "20260302"
        stack = stack_of(dce.study(tmp_path / str(number), datasets))
        assert isinstance(stack, Stack), stack
        assert stack.phases == dce.NAMES and stack.times == pytest.approx(dce.SECONDS)
        assert np.array_equal(stack.volume, d.values.astype(np.float32))


def test_time_zones_count_only_where_they_differ(tmp_path: Path) -> None:
    """The clock was put back by an hour between the phases."""
    d = dce.Dce()

    def mark(ds: Dataset, p: int, s: int) -> None:
        shift, zone = (3600, "+0000") if p < 2 else (7200, "+0100")
        ds.AcquisitionDateTime = "20260301" + dce.tm(d.time(p) + shift) + zone
        ds.ContrastBolusStartTime = dce.tm(d.injection + 3600)

    stack = stack_of(dce.study(tmp_path, d.datasets(mark)))
    assert isinstance(stack, Stack), stack
    assert np.array_equal(stack.volume, d.values.astype(np.float32)) and stack.phases == dce.NAMES


def test_slope_and_intercept_of_each_slice_are_applied_exactly(tmp_path: Path) -> None:
    d = dce.Dce()
    slopes = [0.37 + 0.01 * k for k in range(DEPTH)]

    def mark(ds: Dataset, p: int, s: int) -> None:
        temporal_position(ds, d, p, s)
        ds.RescaleSlope, ds.RescaleIntercept = slopes[s], -11.5 * p

    stack = stack_of(dce.study(tmp_path, d.datasets(mark)))
    assert isinstance(stack, Stack)
    offset = np.array([-11.5 * p for p in range(4)])[:, None, None, None]
    expected = d.values * np.array([float(f"{v:.16g}") for v in slopes])[None, :, None, None] + offset
    assert np.array_equal(stack.volume, expected.astype(np.float32))


def test_philips_values_are_compared_as_floating_point_where_the_rescaled_ones_cannot_be(tmp_path: Path) -> None:
    """Rescale slope times scale slope differs between the phases: the display values have no common unit."""
    d = dce.Dce()
    slopes, scales = (2.0, 4.0, 8.0, 1.0), (0.5, 0.5, 0.5, 0.5)

    def mark(ds: Dataset, p: int, s: int) -> None:
        temporal_position(ds, d, p, s)
        ds.RescaleSlope, ds.RescaleIntercept = slopes[p], 0.0
        ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "FL", scales[p])

    stack = stack_of(dce.study(tmp_path, d.datasets(mark)))
    assert isinstance(stack, Stack)
    assert np.array_equal(stack.volume, (d.values / 0.5).astype(np.float32))
    assert stack.notes["values"] == "Philips floating point (2005,100E)"


def test_a_model_gets_the_phases_it_asks_for_and_no_others(tmp_path: Path) -> None:
    found = dynamic.plan(dce.study(tmp_path, one_series(temporal_position)(dce.Dce())))
    assert not isinstance(found, Refusal)
    two = dynamic.choose(found, ("arterial", "delayed"))
    assert not isinstance(two, Refusal) and two.names == ("arterial", "delayed")
    stack = dynamic.load(two, PixelDecoder())
    assert isinstance(stack, Stack) and np.array_equal(stack.volume, dce.Dce().values[[1, 3]].astype(np.float32))


@pytest.mark.long
def test_the_quantitative_imaging_phantom_is_in_order_of_time(shared_data: Path, tmp_path: Path) -> None:
    """661 images of one slice, half a second apart; six maps of other flip angles are no part of it."""
    with zipfile.ZipFile(shared_data / "mr" / "qiba_dce_dro_v4.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".dcm")]
        for name in names:
            archive.extract(name, tmp_path)
    study = dce.stored(sorted(tmp_path.rglob("*.dcm"), key=lambda p: p.name[::-1]))
    longest = max(study.series, key=lambda s: len(s.instances))
    found = dynamic.plan(Study.from_instances("1", 1, reversed(longest.instances)), Rules(minimum_slices=1))
    assert not isinstance(found, Refusal), found
    numbers = [p.frames[0].instance.header.number("InstanceNumber") for p in found.phases]
    assert numbers == list(range(1, 662))
    assert [p.seconds for p in found.phases] == pytest.approx([0.5 * k for k in range(661)])
    assert str(dynamic.plan(study, Rules(minimum_slices=1))) == "FRAME_OF_REFERENCE_MISMATCH(7 frames of reference)"


def test_real_studies_without_a_dynamic_series_are_refused_as_such(shared_data: Path) -> None:
    """Head, functional, diffusion, computed tomography: no phase of anything comes out, and nothing is raised."""
    folders = sorted({p.parent for p in (shared_data / "mr").rglob("*.dcm")})
    assert len(folders) > 15
    for folder in folders:
        for rules in (Rules(), Rules(minimum_slices=2)):
            found = dynamic.plan(dce.stored(sorted(folder.glob("*.dcm"))), rules)
            assert isinstance(found, Refusal) and found.code in ("NO_SUITABLE_IMAGE", "GEOMETRY_MIXED"), folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    names = ("English", "Philips", "Siemens, AcquisitionNumber", "GE, TriggerTime")
    return {n: dce.study(tmp_path_factory.mktemp("dce"), ENCODINGS[n][0](dce.Dce())) for n in names}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), name=st.sampled_from(("English", "Philips", "GE, TriggerTime")))
def test_the_order_in_which_instances_and_series_arrive_changes_nothing(
    written: dict[str, Study], seed: int, name: str
) -> None:
    rng = random.Random(seed)
    instances = list(written[name].instances)
    rng.shuffle(instances)
    study = Study("1", 1, tuple(sorted(Study.from_instances("1", 1, instances).series, key=lambda s: rng.random())))
    shuffled = Study("1", 1, tuple(
        dataclasses.replace(s, instances=tuple(rng.sample(s.instances, len(s.instances)))) for s in study.series
    ))  # fmt: skip
    found = dynamic.plan(shuffled)
    assert not isinstance(found, Refusal), found
    expected = dynamic.plan(written[name])
    assert not isinstance(expected, Refusal)
    uids = [[f.ref for f in p.frames] for p in found.phases]
    assert uids == [[f.ref for f in p.frames] for p in expected.phases]
    assert found.names == dce.NAMES

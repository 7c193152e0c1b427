"""The image library of stacks: described once, in seconds, every image referenced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node import report
from dicom_node.errors import ReportError
from dicom_node.report import Variant, library
from dicom_node.report.normalise import REFERENCED, read_reference, read_source
from dicom_node.result import Code, FrameRef

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def slice_of(clip: Any, phase: int, number: int) -> Dataset:
    ds: Dataset = clip(100 * phase + number, BodyPartExamined="LIVER", Modality="MR", SOPClassUID=MR_IMAGE)
    for keyword in ("NumberOfFrames", "FrameTime", "FrameIncrementPointer", "Laterality", "PlanarConfiguration"):
        del ds[keyword]
    ds.SeriesInstanceUID += f".{phase}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 3 * number], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness, ds.FrameOfReferenceUID = [1.5, 1.5], 3, "1.2.3.9"
    return ds


def document(case: Any, clip: Any, phases: int, slices: int) -> report.BuiltObject:
    """The SR on a dynamic study, one series a phase."""
    for phase in range(1, phases + 1):
        for number in range(1, slices + 1):
            case.add(slice_of(clip, phase, number))
    case.site, case.laterality = Code("10200004", "SCT", "Liver"), None
    made = case.result()
    sources = tuple(FrameRef(MR_IMAGE, uid, 1, 1) for uid in case.sources)
    made = replace(made, findings=(replace(made.findings[0], sources=sources, heatmap=None),))
    context = case.report_context(variants=(Variant(objects=("sr",)),))
    (built,) = report.build(made, case.sources, context)
    return built


def items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence", []):
        yield item
        yield from items(item)


def test_a_stack_is_described_once_and_every_image_is_there(empty_case: Any, clip: Any) -> None:
    ds = empty_case.read(document(empty_case, clip, 2, 3))
    groups = [i for i in items(ds) if i.ConceptNameCodeSequence[0].get("CodeValue") == "126200"]
    assert len(groups) == 2
    for group in groups:
        names = [i.ConceptNameCodeSequence[0].CodeMeaning for i in group.ContentSequence]
        assert names.count("Source") == 3
        assert {"Modality", "Pixel Data Rows", "Slice Thickness", "Frame of Reference UID"} <= set(names)
        assert not any("Position" in name for name in names)
        assert not any("ContentSequence" in i for i in group.ContentSequence)
    study = ds.CurrentRequestedProcedureEvidenceSequence[0]
    evidence = [i.ReferencedSOPInstanceUID for s in study.ReferencedSeriesSequence for i in s.ReferencedSOPSequence]
    assert sorted(evidence) == sorted(empty_case.sources)


def test_phases_that_differ_are_described_each_by_itself(empty_case: Any, clip: Any) -> None:
    thick = slice_of(clip, 8, 1), slice_of(clip, 8, 2)
    for ds in thick:
        ds.SliceThickness = 5
        empty_case.add(ds)
    ds = empty_case.read(document(empty_case, clip, 2, 2))
    said = [i for i in items(ds) if i.ConceptNameCodeSequence[0].CodeMeaning == "Slice Thickness"]
    assert [float(i.MeasuredValueSequence[0].NumericValue) for i in said] == [5, 3, 3]


def test_the_evidence_holds_this_study_by_its_series_and_nothing_twice(clip: Any) -> None:
    other = slice_of(clip, 3, 1)
    other.StudyInstanceUID = "1.2.3.77"
    first, again, second = slice_of(clip, 1, 1), slice_of(clip, 1, 1), slice_of(clip, 2, 1)
    (study,) = library.evidence([first, again, second, other], Dataset(), first.StudyInstanceUID)
    assert study.StudyInstanceUID == first.StudyInstanceUID
    told = [(s.SeriesInstanceUID, len(s.ReferencedSOPSequence)) for s in study.ReferencedSeriesSequence]
    assert told == [(first.SeriesInstanceUID, 1), (second.SeriesInstanceUID, 1)]
    assert library.evidence([other], Dataset(), first.StudyInstanceUID) == []


def test_a_reference_to_an_image_that_is_no_source_is_refused(empty_case: Any, clip: Any) -> None:
    empty_case.add(slice_of(clip, 1, 1))
    made = empty_case.result()
    elsewhere = replace(made.findings[0], sources=(FrameRef(MR_IMAGE, "1.2.3.404", 1, 1),), heatmap=None)
    with pytest.raises(ReportError, match="cannot be built"):
        report.build(
            replace(made, findings=(elsewhere,)),
            empty_case.sources,
            empty_case.report_context(variants=(Variant(objects=("sr",)),)),
        )


def test_an_image_that_is_only_referred_to_is_read_as_the_others_are(empty_case: Any, clip: Any) -> None:
    ds = slice_of(clip, 1, 1)
    ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", ["10", "2"]
    ds.LossyImageCompressionMethod, ds.SpacingBetweenSlices = ["ISO_10918_1", "ISO_15444_1"], 3
    empty_case.add(ds)
    whole, part = read_source(empty_case.first.path), read_reference(empty_case.first.path)
    assert set(part.dir()) == set(REFERENCED)
    assert all(part[keyword] == whole[keyword] for keyword in REFERENCED)


def test_a_lone_image_beside_a_stack_keeps_its_own_description(empty_case: Any, clip: Any) -> None:
    empty_case.add(slice_of(clip, 7, 1))
    ds = empty_case.read(document(empty_case, clip, 1, 2))
    images = [i for i in items(ds) if i.ValueType == "IMAGE" and i.ConceptNameCodeSequence[0].CodeMeaning == "Source"]
    described = [i for i in images if "ContentSequence" in i]
    assert (len(images), len(described)) == (3, 1)
    names = [i.ConceptNameCodeSequence[0].CodeMeaning for i in described[0].ContentSequence]
    assert "Image Position (Patient) Z" in names


def test_validators_accept_it(
    empty_case: Any, clip: Any, dciodvfy: Callable[[Path], list[str]], tool: Callable[..., Any]
) -> None:
    path = empty_case.save(document(empty_case, clip, 2, 2))
    assert dciodvfy(path) == []
    done = tool("dsrdump", path)
    assert done.returncode == 0
    assert [x for x in done.stderr.splitlines() if x and "Specific Character Set" not in x] == []


@pytest.mark.long
def test_pixelmed_accepts_descriptors_at_the_group(empty_case: Any, clip: Any, pixelmed: Any) -> None:
    assert pixelmed(empty_case.save(document(empty_case, clip, 2, 2))) == []


@pytest.mark.long
def test_five_phases_of_eighty_slices_take_no_three_seconds(empty_case: Any, clip: Any) -> None:
    document(empty_case, clip, 5, 80)
    started = time.process_time()
    built = empty_case.build(variants=(Variant(objects=("sr",)),))
    assert time.process_time() - started < 3
    assert len(built[0].data) < 1 << 19

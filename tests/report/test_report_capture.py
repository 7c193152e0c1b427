"""The heatmap Secondary Capture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dicom_node import report
from dicom_node.config import Report as ReportConfig
from dicom_node.report import Variant
from dicom_node.result import Code

LEFT, BOTH = Code("7771000", "SCT", "Left"), Code("51440002", "SCT", "Bilateral")
THYROID = Code("69748006", "SCT", "Thyroid")
RLE, EXPLICIT = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1"


def config(**capture: Any) -> ReportConfig:
    return ReportConfig.model_validate({"capture": capture})


def test_a_multiframe_capture_carries_the_drawn_frames_unchanged(case: Any) -> None:
    from dicom_node.report import caption_of, render_frames

    result = case.result()
    finding = result.findings[0]
    drawn = render_frames(finding.heatmap, case.folder, caption_of(result, finding))
    ds = case.capture()
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7.4" and ds.NumberOfFrames == 12
    assert ds.FrameIncrementPointer == 0x00181063 and float(ds.FrameTime) == 40.0
    assert (ds.pixel_array == drawn).all()
    assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "OTHER", "HEATMAP"]
    assert (ds.Modality, ds.SeriesNumber, ds.ConversionType) == ("US", 9001, "WSD")


def test_the_smaller_encoding_is_chosen(case: Any) -> None:
    assert case.only("capture").transfer_syntax_uid == RLE
    case.noise = True
    noisy = case.only("capture")
    ds = case.read(noisy)
    assert len(noisy.data) <= ds.Rows * ds.Columns * 3 * 12 * 1.01
    assert ds.pixel_array.shape == (12, ds.Rows, ds.Columns, 3)


def test_plain_frames_where_rle_would_be_larger(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.capture().pixel_array
    monkeypatch.setattr("dicom_node.report.rle.encode", lambda frame: bytes(frame.nbytes))
    plain = case.only("capture")
    assert plain.transfer_syntax_uid == EXPLICIT
    assert (case.read(plain).pixel_array == expected).all()


def test_too_many_frames_leaves_the_most_salient_in_the_order_of_time(case: Any) -> None:
    ds = case.read(case.build(config=config(max_frames=3))[1])
    assert ds.NumberOfFrames == 3
    assert list(ds.SourceImageSequence[0].ReferencedFrameNumber) == [10, 11, 12]


def test_the_size_limit_holds_and_leaves_at_least_one_frame(case: Any) -> None:
    full = case.only("capture")
    limit = len(full.data) / 2e6
    half = case.build(config=config(max_mb=limit))[1]
    assert len(half.data) <= limit * 1e6 + 10_000
    assert 1 <= case.read(half).NumberOfFrames < 12
    assert case.read(case.build(config=config(max_mb=0.001))[1]).NumberOfFrames == 1


def test_what_the_size_limit_leaves_out_is_not_drawn(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dicom_node.report import rle

    drawn: list[int] = []
    real = rle.encode
    monkeypatch.setattr("dicom_node.report.rle.encode", lambda frame: (drawn.append(1), real(frame))[1])
    assert case.read(case.build(config=config(max_mb=0.001))[1]).NumberOfFrames == 1
    assert len(drawn) == 2, "the second tells that the limit is reached"


def test_the_size_limit_holds_for_plain_frames(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.report.rle.encode", lambda frame: bytes(frame.nbytes))
    frame_mb = case.capture().pixel_array[0].nbytes / 1e6
    four = case.build(config=config(max_mb=4.5 * frame_mb))[1]
    assert four.transfer_syntax_uid == EXPLICIT and case.read(four).NumberOfFrames == 4
    assert len(four.data) <= 4.5 * frame_mb * 1e6


def test_a_repeated_run_makes_the_same_bytes(case: Any) -> None:
    assert [b.data for b in case.build()] == [b.data for b in case.build()]


def test_keyframes_are_single_images_of_one_series(case: Any) -> None:
    built = case.build(variants=(Variant(objects=("capture",), capture="keyframes"),))
    assert len(built) == 8 and len({b.series_instance_uid for b in built}) == 1
    datasets = [case.read(b) for b in built]
    assert [ds.InstanceNumber for ds in datasets] == list(range(1, 9))
    assert [int(ds.SourceImageSequence[0].ReferencedFrameNumber) for ds in datasets] == list(range(5, 13))
    assert all(ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7" and "NumberOfFrames" not in ds for ds in datasets)
    assert all(ds.pixel_array.ndim == 3 for ds in datasets)


@pytest.mark.parametrize(
    ("site", "side", "expected"),
    [
        (None, Code("24028007", "SCT", "Right"), ("KIDNEY", "R", None)),
        (None, LEFT, ("KIDNEY", "L", None)),
        (None, BOTH, ("KIDNEY", None, "B")),
        (None, None, ("KIDNEY", "", None)),
        (THYROID, None, ("THYROID", None, None)),
    ],
)
def test_laterality_follows_the_finding_and_is_empty_when_unknown(
    case: Any, site: Code | None, side: Code | None, expected: tuple[str, str | None, str | None]
) -> None:
    case.site, case.laterality = site or case.site, side
    ds = case.capture()
    laterality = (ds.Laterality or "") if "Laterality" in ds else None
    assert (ds.BodyPartExamined, laterality, ds.get("ImageLaterality")) == expected


def test_what_it_was_made_from_stands_in_it(case: Any) -> None:
    ds = case.capture()
    (source,) = ds.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == case.first.sop_instance_uid
    assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert source.SpatialLocationsPreserved == "NO" and "ReferencedFrameNumber" not in source, "all frames are shown"
    acquired, processed = ds.ContributingEquipmentSequence
    assert (acquired.PurposeOfReferenceCodeSequence[0].CodeValue, acquired.Manufacturer) == ("109101", "ACME")
    assert processed.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert "class activation map" in ds.DerivationDescription and "not anatomy" in ds.DerivationDescription


def test_the_capture_carries_the_equipment_of_the_image_it_shows(empty_case: Any, clip: Any) -> None:
    """A study of two devices: the SR begins with the first image of the result, the capture with the first shown."""
    empty_case.add(clip(1, StationName="ROOM1"))
    empty_case.add(clip(2, StationName="ROOM2", BodyPartExamined="ABDOMEN"))
    result = empty_case.result()
    second = list(empty_case.sources)[1]
    finding = result.findings[0]
    heatmap = replace(
        finding.heatmap, frame_refs=tuple(replace(r, sop_instance_uid=second) for r in finding.heatmap.frame_refs)
    )
    shown = replace(result, findings=(replace(finding, heatmap=heatmap),))
    sr, capture = (empty_case.read(b) for b in report.build(shown, empty_case.sources, empty_case.report_context()))
    stations = [ds.ContributingEquipmentSequence[0].StationName for ds in (sr, capture)]
    assert stations == ["ROOM1", "ROOM2"]
    assert (str(capture.PatientName), capture.AccessionNumber) == ("Doe^Jane", "A-77")


def test_a_banner_that_may_still_be_there_is_declared(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip())
    assert empty_case.capture().BurnedInAnnotation == "NO", "cropped to the image region"
    empty_case.sources.clear()
    empty_case.add(clip(Rows=60, Columns=80))
    assert empty_case.capture().BurnedInAnnotation == "YES", "the crop is the whole frame"
    empty_case.sources.clear()
    empty_case.add(clip(Rows=60, Columns=80, BurnedInAnnotation="NO"))
    assert empty_case.capture().BurnedInAnnotation == "NO", "the source says so"


def test_lossy_history_never_resets(empty_case: Any, clip: Any) -> None:
    empty_case.add(
        clip(
            LossyImageCompression="01", LossyImageCompressionRatio=["10.5", "2"],
            LossyImageCompressionMethod=["ISO_10918_1", "ISO_15444_1"],
        )
    )  # fmt: skip
    ds = empty_case.capture()
    assert ds.LossyImageCompression == "01"
    assert list(ds.LossyImageCompressionMethod) == ["ISO_10918_1", "ISO_15444_1"]
    assert [float(r) for r in ds.LossyImageCompressionRatio] == [10.5, 2.0]


def test_a_lossy_transfer_syntax_counts_even_if_the_header_is_silent(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(LossyImageCompression=None), transfer_syntax="1.2.840.10008.1.2.4.50")
    ds = empty_case.capture()
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_10918_1")


def test_a_lossless_source_stays_lossless(case: Any) -> None:
    assert case.capture().LossyImageCompression == "00"


def test_a_still_has_no_frame_time(case: Any) -> None:
    case.frames = 1
    ds = case.capture()
    assert ds.NumberOfFrames == 1 and "FrameTime" not in ds


def test_no_patient_text_is_drawn(case: Any, clip: Any) -> None:
    """Two patients, same pixels: the pictures are equal."""
    first = case.capture().pixel_array
    case.sources.clear()
    case.add(clip(PatientName="Roe^Richard", PatientID="P-9", StudyDate="20200101", AccessionNumber="Z"))
    assert np.array_equal(first, case.capture().pixel_array)

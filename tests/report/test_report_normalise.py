"""Source headers as archives hold them, made fit to be copied."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import StoreError
from dicom_node.report.normalise import TYPE_2, clean_text, normalise, read_source
from dicom_node.store.header import read_header

PLACE = "Z" * 40
WANG = b"Wang^XiaoDong=\x1b$)A\xcd\xf5^\x1b$)A\xd0\xa1\xb6\xab"  # GB 2312 with the escapes of ISO 2022 IR 58


def chinese(case: Any, clip: Any) -> Path:
    """pydicom cannot write IR 58, so the bytes are put in by hand."""
    case.add(clip(SpecificCharacterSet=["", "ISO 2022 IR 58"], PatientName=PLACE))
    path: Path = case.first.path
    path.write_bytes(path.read_bytes().replace(PLACE.encode(), WANG.ljust(len(PLACE))))
    return path


def test_simplified_chinese_comes_out_as_utf8_without_escapes(empty_case: Any, clip: Any) -> None:
    source = read_source(chinese(empty_case, clip))
    assert str(source.PatientName) == "Wang^XiaoDong=王^小东"
    for ds in (empty_case.sr(), empty_case.capture()):
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert str(ds.PatientName) == "Wang^XiaoDong=王^小东"
    gb = empty_case.sr(charset="GB18030")
    assert gb.SpecificCharacterSet == "GB18030" and str(gb.PatientName) == "Wang^XiaoDong=王^小东"


@pytest.mark.parametrize(
    ("charset", "raw", "fallback", "name"),
    [
        (None, "Wang^XiaoDong=王^小东".encode("gb18030"), "GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东".encode("gb18030"), "GB18030", "Wang^XiaoDong=王^小东"),
        ("GBK", "Wang^XiaoDong=王^小东".encode("gb18030"), "", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "", "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", "", "Hong^Gildong=洪^吉洞"),
    ],
)
def test_a_report_reads_the_name_as_routing_does(
    clip: Any, empty_case: Any, charset: Any, raw: bytes, fallback: str, name: str
) -> None:
    empty_case.add(clip(SpecificCharacterSet="ISO_IR 6", PatientName=PLACE))
    path: Path = empty_case.first.path
    ds = pydicom.dcmread(path)
    del ds.SpecificCharacterSet
    if charset is not None:
        ds.add_new("SpecificCharacterSet", "CS", charset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path)
    path.write_bytes(path.read_bytes().replace(PLACE.encode(), raw.ljust(len(PLACE))))
    assert str(read_source(path, fallback).PatientName) == name
    assert read_header(path, fallback).text("PatientName") == name


def test_a_name_is_never_written_in_a_character_set_that_lacks_its_letters(empty_case: Any, clip: Any) -> None:
    chinese(empty_case, clip)
    ds = empty_case.sr(charset="ISO_IR 100")
    assert ds.SpecificCharacterSet == "ISO_IR 192" and str(ds.PatientName) == "Wang^XiaoDong=王^小东"


def test_latin_1_is_kept_where_asked_for_and_possible(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(PatientName="Müller^Jürg"))
    ds = empty_case.sr(charset="ISO_IR 100")
    assert ds.SpecificCharacterSet == "ISO_IR 100" and str(ds.PatientName) == "Müller^Jürg"


def test_every_type_2_attribute_is_there_and_empty_when_the_source_lacks_it(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(**dict.fromkeys(TYPE_2)))
    for ds in (empty_case.sr(), empty_case.capture()):
        assert all(keyword in ds and not ds[keyword].value for keyword in TYPE_2)


@pytest.mark.parametrize(("sex", "written"), [("F", "F"), ("O", "O"), ("U", ""), ("female", ""), ("f", "")])
def test_sex_is_one_of_the_enumerated_values_or_empty(clip: Any, sex: str, written: str) -> None:
    ds = clip()
    ds.add_new("PatientSex", "CS", sex.upper() if sex == "f" else sex)
    if sex == "f":
        ds["PatientSex"]._value = "f"
    assert normalise(ds).PatientSex == written


def test_big_endian_is_read_for_what_it_means(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(), big_endian=True)
    source = read_source(empty_case.first.path)
    assert (source.Rows, source.Columns, source.NumberOfFrames) == (96, 128, 12)
    assert empty_case.sr().PatientID == "P-001"


def test_identifiers_and_their_issuers_are_carried_unchanged(empty_case: Any, clip: Any) -> None:
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID, other.TypeOfPatientID = "X9", "OTHER", "TEXT"
    issuer = Dataset()
    issuer.LocalNamespaceEntityID = "RIS"
    empty_case.add(
        clip(
            PatientID="  0042 ", IssuerOfPatientID="HOSP", OtherPatientIDsSequence=[other],
            IssuerOfAccessionNumberSequence=[issuer], TimezoneOffsetFromUTC="+0530",
        )
    )  # fmt: skip
    for ds in (empty_case.sr(), empty_case.capture()):
        assert ds["PatientID"].value.rstrip(" ") == pydicom.dcmread(empty_case.first.path).PatientID.rstrip(" ")
        assert ds.IssuerOfPatientID == "HOSP" and ds.OtherPatientIDsSequence[0].IssuerOfPatientID == "OTHER"
        assert ds.IssuerOfAccessionNumberSequence[0].LocalNamespaceEntityID == "RIS"


def test_retired_other_ids_travel_in_the_sequence_that_replaced_them(clip: Any) -> None:
    clean = normalise(clip(OtherPatientIDs=["A1", "B2"]))
    assert [(i.PatientID, i.TypeOfPatientID) for i in clean.OtherPatientIDsSequence] == [("A1", "TEXT"), ("B2", "TEXT")]


def test_our_time_stands_in_the_zone_of_the_sources_dates(empty_case: Any, clip: Any) -> None:
    empty_case.add(clip(TimezoneOffsetFromUTC="-0330"))
    ds = empty_case.sr()
    assert (ds.ContentDate, ds.ContentTime) == ("20260304", "013607.890000")
    assert ds.ContributingEquipmentSequence[-1].ContributionDateTime == "20260304013607.890000-0330"


def test_values_that_the_standard_does_not_allow_are_left_out_or_repaired() -> None:
    ds = Dataset()
    for keyword, vr, value in (
        ("StudyDate", "DA", "2004.08.26"), ("StudyTime", "TM", "18:05:09"), ("PatientBirthDate", "DA", "unknown"),
        ("PatientWeight", "DS", "heavy"), ("PatientAge", "AS", "60"), ("PatientComments", "LT", "a\x00b\r\nc"),
    ):  # fmt: skip
        ds.add(pydicom.DataElement(keyword, vr, "0" if vr == "DS" else value, validation_mode=0))
    ds["PatientWeight"]._value = "heavy"
    clean = normalise(ds)
    assert (clean.StudyDate, clean.StudyTime, clean.PatientBirthDate) == ("20040826", "180509", None)
    assert "PatientWeight" not in clean and "PatientAge" not in clean
    assert clean.PatientComments == "ab\r\nc"


def test_private_and_incomplete_items_do_not_travel(clip: Any) -> None:
    good, bad = Dataset(), Dataset()
    good.CodeValue, good.CodingSchemeDesignator, good.CodeMeaning = "US1", "99LOCAL", "CEUS"
    good.add_new(0x00091001, "LO", "private")
    bad.CodeValue = "US2"
    ds = clip(ProcedureCodeSequence=[good, bad])
    ds.add_new(0x00090010, "LO", "ACME")
    clean = normalise(ds)
    assert [c.CodeValue for c in clean.ProcedureCodeSequence] == ["US1"]
    assert not any(e.tag.is_private for e in clean.iterall())


def test_escapes_and_controls_go_and_words_stay() -> None:
    assert clean_text("\x1b$)A王\x1b(B ok\x07 ") == "王 ok"


def test_a_file_that_cannot_be_read_is_a_store_error_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(b"Doe^Jane is not DICOM")
    with pytest.raises(StoreError) as e:
        read_source(path)
    assert "Doe" not in str(e.value)
    with pytest.raises(StoreError):
        read_source(tmp_path / "absent.dcm")


def test_real_files_of_all_kinds_become_headers(shared_data: Path) -> None:
    files = [p for kind in ("us", "mr") for p in sorted((shared_data / kind).glob("*.dcm"))]
    assert len(files) > 10
    for path in files:
        clean = read_source(path)
        assert all(keyword in clean for keyword in TYPE_2) and clean.SOPInstanceUID
        assert "PixelData" not in clean


def test_the_time_of_the_job_needs_a_zone(case: Any) -> None:
    with pytest.raises(ValueError, match="time zone"):
        case.report_context(created=datetime(2026, 1, 1))
    assert case.report_context(created=datetime(2026, 1, 1, tzinfo=UTC))

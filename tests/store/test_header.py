"""Headers: text in every character set, numbers as numbers, nothing bulky, and no file that breaks the reader."""

from __future__ import annotations

import struct

import pytest
from pydicom import dcmread
from raw_scu import EXPLICIT, IMPLICIT, explicit, small_data_set

from dicom_node.errors import CannotUnderstandError
from dicom_node.store import header as header_module
from dicom_node.store.charset import charset_of
from dicom_node.store.header import header_of, read_header
from dicom_node.store.part10 import FileMeta, encode_meta
from dicom_node.study import Header


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, syntax: str = EXPLICIT) -> Header:
        path = tmp_path / "x.dcm"
        path.write_bytes(encode_meta(FileMeta("1.2", "1.2", syntax)) + data)
        return read_header(path)

    return read


def implicit(group: int, element: int, value: bytes) -> bytes:
    return struct.pack("<HHL", group, element, len(value)) + value


@pytest.mark.parametrize(
    ("charset", "raw", "text"),
    [
        (b"", b"Yamada^Tarou", "Yamada^Tarou"),
        (b"ISO_IR 100", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
        (b"ISO_IR 192", "王^小东".encode(), "王^小东"),
        (b"GB18030", "王^小东".encode("gb18030"), "王^小东"),
        (b"GBK", "王^小东".encode("gbk"), "王^小东"),
        (b"\\ISO 2022 IR 58", b"\x1b$)A\xcd\xf5^\x1b$)A\xd0\xa1\xb6\xab", "王^小东"),
        (b"\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        (b"ISO 2022 IR 13\\ISO 2022 IR 87", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        (b"\\ISO 2022 IR 149", b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", "Hong^Gildong=洪^吉洞"),
        (b"ISO_IR 144", b"\xbb\xee\xda^\xbb", "Люк^Л".encode("iso8859_5").decode("iso8859_5")),
        (b"ISO_IR_100", b"Andr\xe9", "André"),  # misspelt
        (b"NONSENSE", b"Andr\xe9", "André"),
        (b"", "Müller".encode(), "Müller"),  # absent, but plainly UTF-8
        (b"", b"M\xfcller", "Müller"),  # absent, and no UTF-8
        (b"ISO_IR 192", b"M\xfcller", "Müller"),  # wrong
    ],
)
def test_text_is_decoded_by_its_character_set_and_carries_no_escapes(read, charset, raw, text):
    data = explicit(0x0008, 0x0005, b"CS", charset) if charset else b""
    found = read(data + explicit(0x0010, 0x0010, b"PN", raw)).text("PatientName")
    assert found == text
    assert "\x1b" not in found


@pytest.mark.parametrize(
    ("charset", "raw", "fallback", "text", "guessed"),
    [
        (b"", "睾丸肿瘤".encode("gb18030"), "GB18030", "睾丸肿瘤", True),
        (b"", "Müller".encode(), "GB18030", "Müller", True),  # plainly UTF-8: before the site's own
        (b"ISO_IR 192", "肾".encode("gb18030"), "GB18030", "肾", True),
        (b"ISO_IR 6", "печень".encode("iso8859_5"), "ISO_IR 144", "печень", True),
        (b"ISO_IR 100", b"J\xe9r\xf4me", "GB18030", "Jérôme", False),  # what is declared comes first
        (b"\\ISO 2022 IR 58", b"US \x1b$)A\xc9\xf6", "ISO_IR 100", "US 肾", False),
        (b"\\ISO 2022 IR 58", "肾脏".encode("gb18030"), "", "肾脏", True),  # the escape was forgotten
        (b"\\ISO 2022 IR 58", b"\x1b$)A" + "睾丸\u9555".encode("gb18030"), "", "睾丸\u9555", False),  # beyond GB 2312
        (b"", b"plain", "GB18030", "plain", False),
    ],
)
def test_text_in_no_declared_set_is_guessed_and_told(read, tmp_path, charset, raw, fallback, text, guessed):
    data = explicit(0x0008, 0x0005, b"CS", charset) if charset else b""
    read(data + explicit(0x0008, 0x1030, b"LO", raw))
    found = read_header(tmp_path / "x.dcm", fallback)
    assert (found.text("StudyDescription"), found.text_guessed) == (text, guessed)


def test_a_backslash_byte_inside_a_chinese_character_is_no_delimiter(read):
    text = "誠"  # its second GBK byte is 0x5C
    assert text.encode("gb18030")[1:2] == b"\\"
    data = explicit(0x0008, 0x0005, b"CS", b"GB18030") + explicit(
        0x0008, 0x103E, b"LO", text.encode("gb18030") + b"\\b"
    )
    assert read(data)["SeriesDescription"] == (text, "b")


def test_an_item_may_have_its_own_character_set(read):
    item = explicit(0x0008, 0x0005, b"CS", b"ISO_IR 192") + explicit(0x0008, 0x0104, b"LO", "肝".encode())
    sequence = struct.pack("<HH2sHL", 0x0008, 0x2218, b"SQ", 0, len(item) + 8)
    sequence += struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item
    data = explicit(0x0008, 0x0005, b"CS", b"ISO_IR 100") + sequence + explicit(0x0010, 0x0010, b"PN", b"J\xe9r\xf4me")
    found = read(data)
    assert found.items_of("AnatomicRegionSequence")[0].text("CodeMeaning") == "肝"
    assert found.text("PatientName") == "Jérôme"


def test_numbers_texts_and_lists(read):
    data = (
        explicit(0x0008, 0x0008, b"CS", b"ORIGINAL\\PRIMARY\\\\0001")
        + explicit(0x0008, 0x0060, b"CS", b"US ")
        + explicit(0x0010, 0x4000, b"LT", b"  one\\two  ")
        + explicit(0x0018, 0x0050, b"DS", b"1.5e0 ")
        + explicit(0x0018, 0x1063, b"DS", b"33.3 mm")
        + explicit(0x0018, 0x602C, b"FD", struct.pack("<d", float("nan")))
        + explicit(0x0018, 0x6030, b"UL", struct.pack("<2L", 1, 2))
        + explicit(0x0020, 0x0013, b"IS", b" 7 ")
        + explicit(0x0020, 0x0012, b"IS", b"1_000")
        + explicit(0x0020, 0x0032, b"DS", b"1\\-2.5\\+3")
        + explicit(0x0028, 0x0009, b"AT", struct.pack("<HH", 0x0018, 0x1063))
        + explicit(0x0028, 0x0010, b"US", struct.pack("<H", 480))
        + explicit(0x0040, 0x0254, b"LO", b"    ")
        + explicit(0x7FE0, 0x0010, b"OB", bytes(100))
    )
    found = read(data)
    assert found["ImageType"] == ("ORIGINAL", "PRIMARY", "", "0001")
    assert found["Modality"] == "US"
    assert found["PatientComments"] == "  one\\two"
    assert found["SliceThickness"] == 1.5
    assert found["FrameTime"] == "33.3 mm"
    assert (found["InstanceNumber"], found["AcquisitionNumber"]) == (7, "1_000")
    assert found["ImagePositionPatient"] == (1.0, -2.5, 3.0)
    assert found["FrameIncrementPointer"] == "00181063"
    assert found["Rows"] == 480
    assert {"PhysicalDeltaX", "PerformedProcedureStepDescription", "PixelData"}.isdisjoint(found)
    assert Header.from_json(found.to_json()).to_json() == found.to_json()


def test_implicit_reads_the_same_and_knows_signed_from_unsigned(read):
    signed = implicit(0x0028, 0x0103, b"\1\0") + implicit(0x0028, 0x0106, struct.pack("<h", -5))
    assert read(signed, IMPLICIT)["SmallestImagePixelValue"] == -5
    assert read(signed.replace(b"\2\0\0\0\1\0", b"\2\0\0\0\0\0", 1), IMPLICIT)["SmallestImagePixelValue"] == 65531


def test_private_attributes_stand_under_their_tag(read):
    explicit_ = explicit(0x0019, 0x0010, b"LO", b"SIEMENS MR HEADER") + explicit(0x0019, 0x100C, b"IS", b"800")
    implicit_ = implicit(0x0019, 0x0010, b"SIEMENS MR HEADER ") + implicit(0x0019, 0x100C, b"800 ")
    unknown = explicit(0x0019, 0x0010, b"LO", b"SIEMENS MR HEADER") + explicit(0x0019, 0x100C, b"UN", b"800 ")
    for found in (read(explicit_), read(implicit_, IMPLICIT), read(unknown)):
        assert found["00190010"] == "SIEMENS MR HEADER"
        assert found["0019100C"] == 800
    assert "00191000" not in read(explicit(0x0019, 0x1000, b"OB", b"xx") + explicit(0x0019, 0x1001, b"LO", bytes(300)))


def test_values_beyond_the_budget_are_left_out_not_refused(read, monkeypatch):
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 40)
    found = read(small_data_set())
    assert 0 < len(found) < 4


def test_charset_of_nothing():
    assert charset_of([]).decode(b"\xff\xfe") == "ÿþ"
    assert charset_of(["", " "]).codecs == ()


def test_a_data_set_in_memory_is_read_as_one_in_a_file(read):
    assert header_of(small_data_set(), EXPLICIT).to_json() == read(small_data_set()).to_json()


def test_equal_bytes_in_different_places_are_read_by_their_own_rules(read):
    """Values are remembered by VR, bytes and byte order: neither character set nor sign may come from the last file."""
    umlaut, two = b"M\xfcller", struct.pack("<h", -2)
    latin, cyrillic = explicit(0x0008, 0x0005, b"CS", b"ISO_IR 100"), explicit(0x0008, 0x0005, b"CS", b"ISO_IR 144")
    name = explicit(0x0010, 0x0010, b"PN", umlaut)
    assert [read(c + name).text("PatientName") for c in (latin, cyrillic, latin)] == ["Müller", "Mќller", "Müller"]
    signs = [implicit(0x0028, 0x0103, v) + implicit(0x0028, 0x0106, two) for v in (b"\1\0", b"\0\0", b"\1\0")]
    assert [read(s, IMPLICIT)["SmallestImagePixelValue"] for s in signs] == [-2, 65534, -2]
    big = struct.pack(">HH2sHh", 0x0028, 0x0107, b"SS", 2, -2)
    assert read(explicit(0x0028, 0x0107, b"SS", two))["LargestImagePixelValue"] == -2
    assert read(big, "1.2.840.10008.1.2.2")["LargestImagePixelValue"] == -2
    same = explicit(0x0020, 0x0013, b"IS", b"12") + explicit(0x0020, 0x0010, b"SH", b"12")
    assert (read(same)["InstanceNumber"], read(same)["StudyID"]) == (12, "12")


def test_what_pydicom_reads_we_read_the_same(shared_data):
    compared = 0
    for path in (*shared_data.glob("us/*.dcm"), *list(shared_data.glob("mr/**/*.dcm"))[::4]):
        ours, theirs = read_header(path), dcmread(path, stop_before_pixels=True, force=True)
        for keyword in ("PatientID", "StudyInstanceUID", "Modality", "Manufacturer", "SeriesDescription", "StudyDate"):
            expected = theirs.get(keyword)
            assert ours.text(keyword) == ("" if expected is None else str(expected).strip()), (path.name, keyword)
        for keyword in ("Rows", "NumberOfFrames", "EchoTime", "InstanceNumber", "BitsAllocated"):
            expected = theirs.get(keyword)
            assert ours.number(keyword) == (None if expected in (None, "") else float(expected)), (path.name, keyword)
        for keyword in ("SequenceOfUltrasoundRegions", "PerFrameFunctionalGroupsSequence"):
            assert len(ours.items_of(keyword)) == len(theirs.get(keyword, [])), (path.name, keyword)
        compared += 1
    assert compared > 30


def test_no_malformed_file_breaks_the_reader(shared_data):
    read, refused = 0, 0
    for path in sorted((shared_data / "malformed").rglob("*.dcm")):
        try:
            header = read_header(path)
        except CannotUnderstandError:
            refused += 1
        else:
            header.to_json()
            read += 1
    assert read > 80
    assert refused > 10

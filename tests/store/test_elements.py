"""The bounded walk: sound data sets pass in every encoding, everything else raises one error and nothing worse."""

from __future__ import annotations

import io
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from raw_scu import small_data_set

from dicom_node.errors import CannotUnderstandError
from dicom_node.store import elements
from dicom_node.store.elements import MAX_ELEMENTS, Kind, Walker, check, encoding_of
from dicom_node.store.part10 import read_meta
from dicom_node.store.validate import is_uid

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4.50"
STUDY = 0x0020000D


def nested_data_set() -> Dataset:
    data_set = Dataset()
    data_set.SOPInstanceUID = "1.2.3"
    inner = Dataset()
    inner.CodeValue = "T-1"
    inner.StudyInstanceUID = "9.9.9"  # of an item: not the data set's own
    outer = Dataset()
    outer.PurposeOfReferenceCodeSequence = Sequence([inner, inner])
    data_set.ReferencedImageSequence = Sequence([outer, Dataset()])
    data_set.StudyInstanceUID = "1.2.3.4"
    data_set.Rows = 2
    data_set.PixelData = bytes(4)
    data_set["PixelData"].VR = "OW"
    return data_set


def encoded(data_set: Dataset, syntax: str, *, undefined: bool = False) -> bytes:
    if undefined:
        for element in data_set.iterall():
            if element.VR == "SQ":
                element.is_undefined_length = True
                for item in element.value:
                    item.is_undefined_length_sequence_item = True
    buffer = io.BytesIO()
    from pydicom.filebase import DicomFileLike

    file = DicomFileLike(buffer)
    file.is_implicit_VR, file.is_little_endian = syntax == IMPLICIT, syntax != BIG
    write_dataset(file, data_set)
    return buffer.getvalue()


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_all_encodings_are_walked_to_the_end(syntax, undefined):
    data = encoded(nested_data_set(), syntax, undefined=undefined)
    found = check(data, 0, len(data), syntax, frozenset({STUDY}))
    assert found.values[STUDY].rstrip(b"\0") == b"1.2.3.4"
    events = list(Walker(data, 0, len(data), encoding_of(syntax)))
    assert sum(e[0] is Kind.ITEM for e in events) == sum(e[0] is Kind.ITEM_END for e in events) == 4
    assert sum(e[0] is Kind.SEQUENCE for e in events) == sum(e[0] is Kind.SEQUENCE_END for e in events) == 2


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_every_truncation_is_noticed_or_ends_between_elements(syntax):
    data = encoded(nested_data_set(), syntax, undefined=True)
    top = {offset for offset in range(len(data)) if _is_sound(data[:offset], syntax)}
    assert 0 in top
    assert len(top) <= 6  # only after a whole element of the data set itself


def _is_sound(data: bytes, syntax: str) -> bool:
    try:
        check(data, 0, len(data), syntax, frozenset())
    except CannotUnderstandError:
        return False
    return True


def fragments(*values: bytes) -> bytes:
    head = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    return head + b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(v)) + v for v in values)


END = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


def test_encapsulated_pixels():
    sound = fragments(b"", b"\xff\xd8" * 50) + END
    assert _is_sound(sound, JPEG)
    assert _is_sound(sound + END, JPEG)  # doubled at the end, as one vendor's clips have it
    assert not _is_sound(sound + END + END, JPEG)
    assert not _is_sound(fragments(b"", b"xx"), JPEG)
    assert not _is_sound(fragments(b"")[:-4] + struct.pack("<L", 100) + END, JPEG)
    assert not _is_sound(fragments() + small_data_set(), JPEG)


def test_a_hidden_sequence_is_implicit_whatever_the_syntax():
    item = struct.pack("<HHL", 0x0008, 0x0100, 4) + b"T-1 "
    hidden = struct.pack("<HH2sHL", 0x0009, 0x1001, b"UN", 0, 0xFFFFFFFF)
    hidden += struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item + END
    assert _is_sound(hidden, EXPLICIT)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95"])
def test_deflated_is_refused_without_inflating(syntax):
    with pytest.raises(CannotUnderstandError):
        encoding_of(syntax)


def test_a_flood_of_elements_is_bounded():
    data = struct.pack("<HHL", 0x0009, 0x0001, 0) * (MAX_ELEMENTS + 1)
    items = (
        struct.pack("<HHL", 0x0008, 0x1140, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, len(data)) + data + END
    )
    began = time.monotonic()
    with pytest.raises(CannotUnderstandError, match="too many"):
        check(items, 0, len(items), IMPLICIT, frozenset())
    assert time.monotonic() - began < 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([EXPLICIT, IMPLICIT, BIG, JPEG]))
def test_random_bytes_raise_nothing_else(data, syntax):
    _is_sound(data, syntax)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([EXPLICIT, IMPLICIT, BIG]))
def test_flipped_bytes_raise_nothing_else(seed, syntax):
    data = bytearray(encoded(nested_data_set(), syntax, undefined=bool(seed % 2)))
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.choice((0, 0xFF, 0xFE, 0xE0, 0x7F, chance.randrange(256)))
    _is_sound(bytes(data), syntax)


def _events(data, syntax):
    """What a walk says, and how it ends."""
    walker = Walker(data, 0, len(data), encoding_of(syntax))
    events = []
    try:
        events.extend((*event, walker.offset, walker.depth, walker.elements) for event in walker)
    except CannotUnderstandError as e:
        return events, str(e), e.offending_element, walker.elements
    return events, "", None, walker.elements


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([EXPLICIT, IMPLICIT, BIG]), st.booleans())
def test_the_short_way_for_plain_values_sees_what_the_long_way_sees(seed, syntax, small):
    data_set = nested_data_set()
    data_set.add_new(0x00091010, "UN", b"private")
    data_set.add_new(0x00080119, "UC", "a long one")
    data = bytearray(encoded(data_set, syntax, undefined=bool(seed % 2)))
    chance = random.Random(seed)
    for _ in range(chance.randint(0, 6)):
        data[chance.randrange(len(data))] = chance.choice(
            (0, 0xFF, 0xFE, 0xE0, 0x7F, 0x53, 0x51, chance.randrange(256))
        )
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(elements, "MAX_ELEMENTS", 5)
        short = _events(bytes(data), syntax)
        patch.setattr(Walker, "_values", lambda self, frame: iter(()))
        assert _events(bytes(data), syntax) == short


def test_every_real_file_is_sound(shared_data):
    checked = 0
    for path in (*shared_data.glob("us/*.dcm"), *shared_data.glob("mr/**/*.dcm")):
        meta, data = read_meta(path), path.read_bytes()
        found = check(data, meta.dataset_offset, len(data), meta.transfer_syntax_uid, frozenset({STUDY}))
        assert found.elements > 10, path.name
        checked += 1
    assert checked > 90


@pytest.mark.parametrize(
    ("uid", "ok"),
    [("1", True), ("1.2.840.0010", True), ("1" * 64, True), ("1" * 65, False), ("", False), ("1.", False)]
    + [(bad, False) for bad in (".1", "1..2", "1.2a", "1 2", "١.٢", "1.2\n", "-1.2")],
)
def test_uid_syntax(uid, ok):
    assert is_uid(uid) is ok

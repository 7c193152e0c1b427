"""Command sets: what peers send is parsed within bounds, what we answer is what pynetdicom understands."""

from __future__ import annotations

import contextlib
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dsutils import decode
from raw_scu import SC, echo_command, store_command

from dicom_node.dimse.command import C_ECHO_RQ, C_STORE_RQ, Command, encode_response, parse_command


def test_requests_are_understood():
    assert parse_command(store_command(SC, "1.2.3", 7)) == Command(C_STORE_RQ, 7, True, SC, "1.2.3")
    assert parse_command(store_command(SC, "1.2.3", data_set=0x0101)).has_data_set is False
    assert parse_command(echo_command(9)).field == C_ECHO_RQ


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\0",
        store_command(SC, "1.2")[:-1],
        b"\x08\0" + store_command(SC, "1.2")[2:],
        store_command(SC, "1.2")[12:20],
    ],
)
def test_what_is_no_command_is_a_value_error(broken):
    with pytest.raises(ValueError):
        parse_command(broken)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_error(data):
    with contextlib.suppress(ValueError):
        parse_command(data)


def test_responses_are_read_by_another_implementation():
    request = Command(C_STORE_RQ, 65535, True, SC, "1.2.3")
    answer = decode(
        BytesIO(
            encode_response(request, 0xA900, comment="Study Instance UID is missing", offending_element=0x0020000D)
        ),
        True,
        True,
    )
    assert answer.CommandField == 0x8001
    assert answer.MessageIDBeingRespondedTo == 65535
    assert answer.CommandDataSetType == 0x0101
    assert (answer.Status, answer.ErrorComment) == (0xA900, "Study Instance UID is missing")
    assert answer.OffendingElement == 0x0020000D
    assert (answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID) == (SC, "1.2.3")
    assert (
        answer.CommandGroupLength
        == len(encode_response(request, 0xA900, comment="Study Instance UID is missing", offending_element=0x0020000D))
        - 12
    )


@pytest.mark.parametrize("uid", ["1" * 65, "ÿ", "1.2\n3"])
def test_a_uid_that_is_none_is_not_sent_back(uid):
    answer = decode(BytesIO(encode_response(Command(C_STORE_RQ, 1, True, SC, uid), 0x0117)), True, True)
    assert "AffectedSOPInstanceUID" not in answer


WORDS = st.integers(min_value=0, max_value=65535)
UIDS = st.from_regex(r"[0-9]{1,9}(\.[1-9][0-9]{0,8}){0,4}", fullmatch=True)


@given(WORDS, UIDS, UIDS, st.booleans())
def test_what_another_implementation_asks_is_read_as_it_meant_it(message_id, sop_class, instance, data):
    from pydicom.dataset import Dataset
    from pynetdicom.dsutils import encode

    said = Dataset()
    said.AffectedSOPClassUID, said.AffectedSOPInstanceUID = sop_class, instance
    said.CommandField, said.MessageID = 0x0100, message_id
    said.CommandDataSetType = 0x0001 if data else 0x0101
    said.EventTypeID = 2
    encoded = encode(said, True, True)
    assert encoded is not None
    assert parse_command(encoded) == Command(0x0100, message_id, data, sop_class, instance, 2)


@given(WORDS, WORDS, UIDS, st.text(st.characters(min_codepoint=33, max_codepoint=91), max_size=64))
def test_what_we_answer_is_read_as_we_meant_it(message_id, status, uid, comment):
    answer = decode(
        BytesIO(encode_response(Command(C_STORE_RQ, message_id, True, SC, uid), status, comment=comment)), True, True
    )
    assert (answer.MessageIDBeingRespondedTo, answer.Status) == (message_id, status)
    assert answer.AffectedSOPInstanceUID == uid
    assert answer.get("ErrorComment", "") == comment.rstrip()

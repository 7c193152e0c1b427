"""What is answered to each user information item (PS3.7 annex D.3.3), and who may report to us."""

from __future__ import annotations

import struct
import time

import pytest
from listener_process import listening, wait_for
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role
from raw_scu import EXPLICIT, IMPLICIT, MR, SC, VERIFICATION, RawScu, association_request, item

from dicom_node.config import Receive
from dicom_node.dimse.contexts import INSTANCE_AVAILABILITY, STORAGE_COMMITMENT
from dicom_node.dimse.negotiation import MAX_ITEMS, Negotiator, Request
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID

ONE = [(1, SC, (EXPLICIT,))]


def uid(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def answered(contexts, extra: bytes = b"", **config) -> dict[int, list[bytes]]:
    """The items of the acceptance: 0x21 = context results, 0x5x = user information."""
    request = association_request(contexts, extra=extra)
    _, acceptance = Negotiator(Receive(**config)).negotiate(Request.of(request))
    assert acceptance[0] == 2
    assert acceptance[10:74] == request[10:74]
    found: dict[int, list[bytes]] = {}
    at = 74
    while at < len(acceptance):
        kind, length = struct.unpack_from(">BxH", acceptance, at)
        at += 4
        if kind != 0x50:
            found.setdefault(kind, []).append(acceptance[at : at + length])
            at += length
    return found


def results(contexts, extra: bytes = b"", **config) -> dict[int, int]:
    return {c[0]: c[2] for c in answered(contexts, extra, **config)[0x21]}


def test_who_we_are_and_how_much_we_take():
    said = answered(ONE, max_pdu=65536)
    assert said[0x51] == [struct.pack(">L", 65536)]
    assert said[0x52] == [IMPLEMENTATION_CLASS_UID.encode()]
    assert set(said) == {0x10, 0x21, 0x51, 0x52, 0x55}  # nothing that was not asked for


@pytest.mark.parametrize("proposed", [(1, 1), (0, 0), (8, 8), (5, 0)])
def test_one_operation_at_a_time(proposed):
    assert answered(ONE, item(0x53, struct.pack(">HH", *proposed)))[0x53] == [struct.pack(">HH", 1, 1)]


@pytest.mark.parametrize(
    ("proposed", "result", "answer"),
    [((1, 0), 0, (1, 0)), ((1, 1), 0, (1, 0)), ((0, 1), 1, None), ((0, 0), 1, None)],
)
def test_of_storage_we_are_the_scp(proposed, result, answer):
    said = answered(ONE, item(0x54, uid(SC) + bytes(proposed)))
    assert said[0x21][0][2] == result
    assert (said[0x54][0][-2:] == bytes(answer)) if answer else result == 1


@pytest.mark.parametrize(
    ("roles", "result"),
    [(b"", 1), (item(0x54, uid(STORAGE_COMMITMENT) + b"\1\0"), 1), (item(0x54, uid(STORAGE_COMMITMENT) + b"\0\1"), 0)],
)
def test_of_storage_commitment_we_are_only_the_scu(roles, result):
    contexts = [(1, STORAGE_COMMITMENT, (IMPLICIT,)), (3, SC, (EXPLICIT,))]
    assert results(contexts, roles) == {1: result, 3: 0}


def test_extended_negotiation_of_storage_says_that_everything_is_kept():
    """PS3.4 table B.3-1: level 2, no coercion; and nothing for a class that has no such item."""
    extra = item(0x56, uid(SC) + bytes(6)) + item(0x56, uid(VERIFICATION) + b"\1")
    extra += item(0x56, uid("1.2.3.4") + b"\1\1")
    assert answered(ONE, extra)[0x56] == [uid(SC) + b"\2\0\0\0\0\0"]


def test_common_extended_negotiation_has_no_answer_and_changes_nothing():
    service, related = uid("1.2.840.10008.4.2"), uid(MR)
    extra = item(0x57, uid(SC) + service + struct.pack(">H", len(related)) + related)
    said = answered(ONE, extra)
    assert 0x57 not in said
    assert said[0x21][0][2] == 0


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("asks", [0, 1])
def test_an_identity_that_nobody_verifies_is_not_confirmed(kind, asks):
    body = bytes((kind, asks)) + struct.pack(">H", 4) + b"USER" + struct.pack(">H", 4 if kind == 2 else 0)
    said = answered(ONE, item(0x58, body + (b"WORD" if kind == 2 else b"")))
    assert 0x59 not in said
    assert said[0x21][0][2] == 0


def test_the_answer_to_the_same_request_is_remembered_but_not_whose_it_was():
    negotiator = Negotiator(Receive())
    first, one = negotiator.negotiate(Request.of(association_request(ONE, calling="ONE")))
    second, two = negotiator.negotiate(Request.of(association_request(ONE, calling="TWO")))
    assert first is second
    assert (one[26:42], two[26:42]) == (b"ONE".ljust(16), b"TWO".ljust(16))
    assert one[42:] == two[42:]


def broken() -> list[bytes]:
    sound = association_request(ONE)
    twice = association_request([(1, SC, (EXPLICIT,)), (1, MR, (EXPLICIT,))])
    even = association_request([(2, SC, (EXPLICIT,))])
    crowd = association_request([(1, SC, [IMPLICIT[:1]] * (MAX_ITEMS + 1))])
    inner = bytearray(sound)
    at = inner.index(b"\x30\0")
    inner[at + 2 : at + 4] = b"\xff\xff"
    return [sound[:-1], twice, even, crowd, bytes(inner), sound[:10] + b" " * 16 + sound[26:], sound[:60]]


@pytest.mark.parametrize("pdu", broken())
def test_what_cannot_be_read_is_a_value_error(pdu):
    with pytest.raises(ValueError):
        Negotiator(Receive()).negotiate(Request.of(pdu))


def test_a_request_of_many_items_is_refused_before_it_costs_anything(tmp_path):
    flood = association_request([(1, SC, ["1"] * 12_000)])
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        began = time.monotonic()
        scu.send(flood)
        assert scu.receive_pdu() == (7, bytes((0, 0, 2, 6)))
        assert time.monotonic() - began < 0.5
        wait_for(lambda: node.messages.of("event"))
        assert "association_request_unreadable" in node.messages.of("event")[0]["text"]


@pytest.mark.parametrize("title", ["\x1b[2JEVIL", "ÄRZTE", 'A"B\\C'])
def test_titles_are_printable_where_they_are_told(tmp_path, title):
    request = bytearray(association_request(ONE))
    request[26:42] = title.encode("latin-1").ljust(16)
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.send(bytes(request))
        assert scu.receive_pdu()[0] == 2
        (opened,) = wait_for(lambda: node.messages.of("association_opened"))
        assert opened["calling_ae"].isprintable()
        assert opened["calling_ae"].isascii()


# N-EVENT-REPORT, from a PACS that opens the association itself


def report(port: int, *, event_type: int = 1, transaction: str = "1.2.3", failed: int = 0) -> int | None:
    ae = AE("PACS")
    ae.add_requested_context(STORAGE_COMMITMENT, IMPLICIT)
    role = build_role(STORAGE_COMMITMENT, scp_role=True)
    association = ae.associate("127.0.0.1", port, ae_title="DICOM_NODE", ext_neg=[role])
    assert association.is_established
    said = Dataset()
    said.TransactionUID = transaction
    said.ReferencedSOPSequence = [instance(), instance()]
    if failed:
        said.FailedSOPSequence = [instance() for _ in range(failed)]
    status, _ = association.send_n_event_report(said, event_type, STORAGE_COMMITMENT, "1.2.840.10008.1.20.1.1")
    association.release()
    return status.get("Status")


def instance() -> Dataset:
    made = Dataset()
    made.ReferencedSOPClassUID, made.ReferencedSOPInstanceUID = SC, generate_uid()
    return made


def test_a_commitment_is_answered_and_counted(tmp_path):
    with listening(tmp_path) as node:
        assert report(node.port) == 0x0000
        assert report(node.port, event_type=2, failed=1) == 0x0000
        wait_for(lambda: node.messages.counts("dicom_node_commitments_total") == 5)
        (event,) = node.messages.of("event")
        assert event["code"] == "COMMITMENT_FAILED"
        assert event["text"].endswith("(1)")
        assert node.files() == []


def test_a_report_that_makes_no_sense_is_refused_as_the_standard_says(tmp_path):
    with listening(tmp_path) as node:
        assert report(node.port, event_type=7) == 0x0113
        assert report(node.port, transaction="") == 0x0115
        assert report(node.port) == 0x0000


def test_an_echo_a_store_and_two_notifications_on_one_association(tmp_path):
    contexts = [
        (1, VERIFICATION, (IMPLICIT,)),
        (3, SC, (EXPLICIT,)),
        (5, INSTANCE_AVAILABILITY, (IMPLICIT,)),
        (7, STORAGE_COMMITMENT, (IMPLICIT,)),
    ]
    roles = item(0x54, uid(STORAGE_COMMITMENT) + b"\0\1")
    with listening(tmp_path, availability=True) as node, RawScu(node.port) as scu:
        scu.associate(contexts, extra=roles)
        assert scu.results == {1: 0, 3: 0, 5: 0, 7: 0}
        assert scu.echo() == 0
        scu.release()

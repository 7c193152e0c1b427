"""The port: negotiation, admission, bounds and ends of associations, seen from the wire."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time

import pytest
from listener_process import listening, wait_for
from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    MR,
    SC,
    VERIFICATION,
    AbortedError,
    RawScu,
    RejectedError,
    association_request,
    command_element,
    echo_command,
    item,
    pdata,
    small_data_set,
    store_command,
)

from dicom_node.dimse.contexts import ALL, SOP_CLASSES, TRANSFER_SYNTAXES

DEFLATED = "1.2.840.10008.1.2.1.99"
UID = "1.2.826.0.1.3680043.9.1"


def test_an_echo_is_answered(tmp_path):
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        assert scu.associate().echo() == 0x0000
        scu.release()


def test_every_class_is_accepted_with_each_of_its_syntaxes_and_no_other(tmp_path):
    others = [DEFLATED, "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.94", "1.2.840.113619.5.2"]
    with listening(tmp_path, availability=True) as node:
        for sop_class in SOP_CLASSES:
            proposed = [*(t.uid for t in TRANSFER_SYNTAXES), *others]
            contexts = [(2 * i + 1, sop_class.uid, (uid,)) for i, uid in enumerate(proposed)]
            with RawScu(node.port) as scu:
                scu.associate(contexts)
                accepted = {uid for i, uid in enumerate(proposed) if scu.results[2 * i + 1] == 0}
                assert accepted == set(sop_class.transfer_syntaxes), sop_class.name
                rejected = {scu.results[2 * i + 1] for i, uid in enumerate(proposed) if uid not in accepted}
                assert rejected == {4}
                scu.release()


def test_a_class_of_nobody_is_rejected_by_its_abstract_syntax_and_reported_once(tmp_path):
    with listening(tmp_path) as node:
        for _ in range(3):
            with RawScu(node.port) as scu:
                scu.associate([(1, "1.2.3.4.5", (EXPLICIT,)), (3, VERIFICATION, (IMPLICIT,))])
                assert scu.results == {1: 3, 3: 0}
                scu.release()
        wait_for(lambda: node.messages.counts("dicom_node_contexts_rejected_total") == 3)
    reported = [m for m in node.messages.of("event") if m["code"] == "CONTEXT_REJECTED"]
    assert len(reported) == 1
    assert "1.2.3.4.5" in reported[0]["text"]


def test_an_operator_can_add_a_vendor_class(tmp_path):
    private = "1.3.46.670589.5.0.1"
    with listening(tmp_path, also_accept=[private]) as node, RawScu(node.port) as scu:
        scu.associate([(1, private, (EXPLICIT,))])
        assert scu.store(small_data_set(private), private, UID).status == 0


def test_when_one_context_offers_several_syntaxes_ours_decides_and_prefers_uncompressed(tmp_path):
    jpeg = "1.2.840.10008.1.2.4.50"
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (jpeg, IMPLICIT, EXPLICIT)), (3, SC, (jpeg,)), (5, SC, tuple(reversed(ALL)))])
        assert scu.accepted == {1: EXPLICIT, 3: jpeg, 5: EXPLICIT}


@pytest.mark.parametrize("retired", ["1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6"])
def test_retired_ultrasound_classes_are_stored(tmp_path, retired):
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, retired, (EXPLICIT,))])
        assert scu.store(small_data_set(retired), retired, UID).status == 0
        assert len(node.files(suffix=".dcm")) == 1


def test_called_ae_title(tmp_path):
    with listening(tmp_path, extra_ae_titles=["THY_AI"]) as node:
        for called in ("DICOM_NODE", "THY_AI", " THY_AI"):
            with RawScu(node.port) as scu:
                scu.associate(called=called).release()
        with RawScu(node.port) as scu, pytest.raises(RejectedError) as rejected:
            scu.associate(called="dicom_node")
        assert rejected.value.args == (1, 1, 7)


def test_protocol_version(tmp_path):
    request = bytearray(association_request([(1, VERIFICATION, (IMPLICIT,))]))
    with listening(tmp_path) as node:
        for version, ok in ((1, True), (3, True), (2, False), (0, False)):
            request[7] = version
            with RawScu(node.port) as scu:
                scu.send(bytes(request))
                kind, body = scu.receive_pdu()
                assert (kind == 2) if ok else (kind == 3 and tuple(body[1:4]) == (1, 2, 2))
        wait_for(lambda: not node.listener._server.open_associations)


ALLOW = [{"ae_title": "SCANNER", "address": "127.0.0.0/30"}]


@pytest.mark.parametrize(
    ("calling", "source", "ok"),
    [("SCANNER", "127.0.0.1", True), ("STRANGER", "127.0.0.1", False), ("SCANNER", "127.0.0.9", False)],
)
def test_allow_binds_the_calling_ae_title_to_its_address(tmp_path, calling, source, ok):
    with listening(tmp_path, allow=ALLOW) as node, RawScu(node.port, source=source) as scu:
        if ok:
            scu.associate(calling=calling).release()
        else:
            with pytest.raises(RejectedError) as rejected:
                scu.associate(calling=calling)
            assert rejected.value.args == (1, 1, 3)


def test_a_rejection_is_reported_once_and_counted_each_time(tmp_path):
    with listening(tmp_path) as node:
        for _ in range(5):
            with RawScu(node.port) as scu, pytest.raises(RejectedError):
                scu.associate(called="NOBODY")
        wait_for(lambda: node.messages.counts("dicom_node_associations_rejected_total") == 5)
    assert len([m for m in node.messages.of("event") if m["code"] == "ASSOCIATION_REJECTED"]) == 1


def test_full_is_transient_and_a_place_is_kept_for_others(tmp_path):
    with listening(tmp_path, max_associations=8, max_associations_per_peer=16) as node:
        held = [RawScu(node.port, source="127.0.0.2").associate() for _ in range(7)]
        with RawScu(node.port, source="127.0.0.2") as scu, pytest.raises(RejectedError) as rejected:
            scu.associate()
        assert rejected.value.args == (2, 3, 2)
        with RawScu(node.port, source="127.0.0.3") as scu:
            assert scu.associate().echo() == 0  # the last place is not for one who holds seven
        for scu in held:
            scu.release()
        wait_for(lambda: not node.listener._server.open_associations)
        with RawScu(node.port, source="127.0.0.2") as scu:
            scu.associate().release()


def test_one_peer_has_its_own_limit(tmp_path):
    with listening(tmp_path, max_associations_per_peer=2) as node:
        held = [RawScu(node.port).associate() for _ in range(2)]
        with RawScu(node.port) as scu, pytest.raises(RejectedError) as rejected:
            scu.associate()
        assert rejected.value.args == (2, 3, 2)
        with RawScu(node.port, source="127.0.0.2") as scu:
            scu.associate().release()
        for scu in held:
            scu.socket.close()


@pytest.mark.parametrize(
    "garbage",
    [
        os.urandom(2048),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x01\x00\xff\xff\xff\xff" + bytes(4096),
        b"\x01\x00\x00\x00\x00\x01\x00",
        b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00",
        struct.pack(">BBL", 1, 0, 80) + bytes(80),
    ],
)
def test_what_is_no_request_is_cut_and_the_next_peer_is_served(tmp_path, garbage):
    with listening(tmp_path) as node:
        with RawScu(node.port, timeout=3) as scu:
            scu.send(garbage)
            with pytest.raises((AbortedError, RejectedError)):
                scu.associate() if garbage[:1] == b"\x02" else scu._not_aborted()
        with RawScu(node.port) as scu:
            assert scu.associate().echo() == 0


@pytest.mark.parametrize(
    "attack",
    [
        b"\x04\x00\xff\xff\xff\xff" + bytes(1000),  # a PDU longer than negotiated
        struct.pack(">BBL", 4, 0, 131072 + 100) + bytes(1000),
        b"\x04\x00\x00\x00\x00\x0a\x00\x00\x00\x64\x01\x03\x00\x00\x00\x00",  # a PDV longer than its PDU
        b"\x04\x00\x00\x00\x00\x05\x00\x00\x00\x01\x01",  # a PDV without a control header
        b"\x09\x00\x00\x00\x00\x04\x00\x00\x00\x00",  # no such PDU
        b"\x02\x00\x00\x00\x00\x44" + bytes(68),  # an acceptance, to an acceptor
        pdata(1, 0, b"data before its command"),
        pdata(1, 3, b"\x08\x00\x05\x00\x02\x00\x00\x00xx"),  # not group 0000
        pdata(
            1,
            3,
            command_element(0x0100, b"\x20\x00") + command_element(0x0110, b"\1\0") + command_element(0x0800, b"\1\1"),
        ),  # C-FIND
        pdata(99, 3, store_command(SC, UID)),  # a context that was not accepted
        pdata(1, 1, bytes(60000)) + pdata(1, 1, bytes(60000)),  # a command without end
        pdata(1, 3, store_command(SC, UID)) + pdata(3, 0, b"x"),  # data of another context
        pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, b"xx") + pdata(1, 3, store_command(SC, UID)),
        association_request([(1, VERIFICATION, (IMPLICIT,))]),  # a second request
    ],
)
def test_a_broken_rule_ends_the_association_and_leaves_nothing(tmp_path, attack):
    with listening(tmp_path) as node:
        with RawScu(node.port, timeout=5) as scu:
            scu.associate([(1, SC, (EXPLICIT,)), (3, MR, (EXPLICIT,))])
            scu.send(attack)
            with pytest.raises(AbortedError):
                scu.response()
        wait_for(lambda: not node.listener._server.open_associations)
        assert node.files() == []
        with RawScu(node.port) as scu:
            assert scu.associate().echo() == 0


def test_a_flood_of_requests_is_answered_one_by_one_and_queues_nothing(tmp_path):
    """No asynchronous operations are negotiated. A peer that does not care is slowed by TCP, not stored in memory."""
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate()
        scu.send(pdata(1, 3, echo_command()) * 2000)
        assert {scu.response().status for _ in range(2000)} == {0}


def test_a_silent_association_is_ended(tmp_path):
    with listening(tmp_path, idle_timeout=0.5) as node, RawScu(node.port) as scu:
        scu.associate()
        began = time.monotonic()
        with pytest.raises(AbortedError):
            scu.response()
        assert 0.4 < time.monotonic() - began < 3
        wait_for(lambda: not node.listener._server.open_associations)


@pytest.mark.parametrize(
    "pieces", [[b"\x04\x00\x00"], [pdata(1, 3, store_command(SC, UID)), pdata(1, 0, bytes(50))[:20]]]
)
def test_half_a_pdu_is_not_waited_for_for_ever(tmp_path, pieces):
    with listening(tmp_path, idle_timeout=0.5) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))])
        for piece in pieces:
            scu.send(piece)
        with pytest.raises(AbortedError):
            scu.response()
        wait_for(lambda: not node.listener._server.open_associations)
        assert node.files() == []


def test_a_message_that_trickles_is_cut(tmp_path):
    with listening(tmp_path, idle_timeout=0.6) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))])
        scu.send(pdata(1, 3, store_command(SC, UID)))
        began = time.monotonic()
        with pytest.raises((AbortedError, ConnectionError)):
            while time.monotonic() - began < 5:
                scu.send(pdata(1, 0, b"x"))
                time.sleep(0.1)
        assert time.monotonic() - began < 3
        wait_for(lambda: node.files() == [])


def test_a_peer_with_a_tiny_pdu_gets_its_answer_in_fragments(tmp_path):
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))], max_pdu=40)
        assert scu.store(small_data_set(), SC, UID).status == 0


def test_many_pdvs_in_one_pdu_and_one_byte_fragments(tmp_path):
    data = small_data_set()
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))])
        values = b"".join(
            struct.pack(">LBB", 3, 1, 2 if i == len(data) - 1 else 0) + data[i : i + 1] for i in range(len(data))
        )
        command = store_command(SC, UID)
        values = struct.pack(">LBB", len(command) + 2, 1, 3) + command + values
        scu.send(struct.pack(">BBL", 4, 0, len(values)) + values)
        assert scu.response().status == 0
        assert node.files(suffix=".dcm")[0].read_bytes().endswith(data)


def test_stop_lets_the_instance_in_hand_finish(tmp_path):
    with listening(tmp_path) as node:
        idle = RawScu(node.port).associate()
        scu = RawScu(node.port).associate([(1, SC, (EXPLICIT,))])
        data = small_data_set()
        scu.send(pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, data[:50]))
        wait_for(lambda: node.files(suffix=".part"))
        stopping = threading.Thread(target=node.listener.stop, args=(5.0,))
        stopping.start()
        with pytest.raises(AbortedError):
            idle.response()
        with pytest.raises(OSError):
            for _ in range(100):
                socket.create_connection(("127.0.0.1", node.port), 1).close()
                time.sleep(0.02)
        scu.send(pdata(1, 2, data[50:]))
        assert scu.response().status == 0
        with pytest.raises(AbortedError):
            scu.response()
        stopping.join(5)
        assert len(node.files(suffix=".dcm")) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_mutated_conversations_leave_nothing_behind(tmp_path, monkeypatch, seed):
    """Each negotiation item, a C-STORE, a C-ECHO and a release, with bytes changed, lost and added at random."""
    died: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_type.__name__))
    chance = random.Random(seed)

    def mutate(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at, what = chance.randrange(len(changed)), chance.random()
            if what < 0.85:
                changed[at] = chance.choice((0, 1, 2, 0x7F, 0xFF, chance.randrange(256)))
            elif what < 0.92:
                del changed[at : at + chance.randint(1, 8)]
            else:
                changed[at:at] = chance.randbytes(chance.randint(1, 8))
        return bytes(changed)

    sop = struct.pack(">H", len(SC)) + SC.encode()
    extra = item(0x54, sop + b"\1\1") + item(0x53, b"\0\0\0\0") + item(0x56, sop + b"\1\2") + item(0x55, b"NAME")
    extra += item(0x58, b"\1\0" + struct.pack(">H", 3) + b"abc" + b"\0\0")
    request = association_request([(1, SC, (EXPLICIT, IMPLICIT)), (3, MR, (EXPLICIT,))], extra=extra)
    rest = pdata(1, 3, store_command(SC, UID)) + pdata(1, 2, small_data_set()) + pdata(1, 3, echo_command())
    rest += b"\5\0\0\0\0\4\0\0\0\0"
    established = 0
    with listening(tmp_path, max_associations_per_peer=64) as node:
        for number in range(100):
            with RawScu(node.port, timeout=0.3) as scu:
                sent = mutate(request) if number % 2 else request
                scu.send(sent)
                if len(sent) < 6 + struct.unpack(">L", sent[2:6])[0]:
                    scu.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(AbortedError, OSError):
                    if scu.receive_pdu()[0] == 2:
                        established += 1
                        scu.send(mutate(rest))
                        scu.socket.shutdown(socket.SHUT_WR)
                    while True:
                        scu.receive_pdu()
        wait_for(lambda: not node.listener._server.open_associations)
        with RawScu(node.port) as scu:
            assert scu.associate().echo() == 0
        assert node.files(suffix=".part") == []
    assert established >= 50
    assert died == []

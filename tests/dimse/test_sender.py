"""The node as SCU: what it says of a peer that cannot be reached, and mutual TLS."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time

import pytest
from certificates import Authority
from pynetdicom import AE
from raw_scu import SC, explicit, small_data_set

from dicom_node.config import Destination, Tls
from dicom_node.dimse.pacs import Behaviour, ReceivingPacs
from dicom_node.dimse.sender import VERIFICATION, Sender
from dicom_node.dimse.status import Outcome
from dicom_node.dimse.tls import server_context
from dicom_node.store.part10 import FileMeta, encode_meta

INSTANCE = "1.2.826.0.1.3680043.9.1"


def identity(ca: Authority, name: str) -> Tls:
    cert, key = ca.issue(name, name)
    return Tls(cert=cert, key=key, ca=ca.pem)


@pytest.fixture
def tls_peer(tmp_path):
    """An SCP that demands a certificate of its CA."""
    ca = Authority(tmp_path)
    ae = AE("PACS")
    ae.add_supported_context(VERIFICATION)
    server = ae.start_server(("127.0.0.1", 0), block=False, ssl_context=server_context(identity(ca, "pacs")))
    yield ca, server.socket.getsockname()[1]
    server.shutdown()


def test_mutual_tls_with_certificates_of_one_ca(tls_peer):
    ca, port = tls_peer
    to = Destination(ae_title="PACS", host="127.0.0.1", port=port, tls=identity(ca, "node"))
    assert Sender("NODE").echo(to).ok


def test_a_certificate_of_another_ca_is_a_matter_for_a_person_and_says_so(tls_peer, tmp_path):
    _, port = tls_peer
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    to = Destination(ae_title="PACS", host="127.0.0.1", port=port, tls=identity(stranger, "node"))
    sender = Sender("NODE")
    answer = sender.echo(to)
    assert not answer.ok and "TLS handshake fails" in answer.reason
    outcome = sender._open(to, {(VERIFICATION, "1.2.840.10008.1.2")})
    assert outcome.kind is Outcome.PAUSE


def test_nobody_there_is_tried_again_and_named(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answer = Sender("NODE").echo(Destination(ae_title="PACS", host="127.0.0.1", port=port))
    assert not answer.ok and f"no connection to 127.0.0.1:{port}" in answer.reason


def test_a_peer_that_does_not_know_us_says_what_to_do(tmp_path):
    with ReceivingPacs(tmp_path / "pacs", behaviour=Behaviour(known_callers=["SOMEBODY"])) as pacs:
        answer = Sender("NODE").echo(Destination(ae_title="PACS", host="127.0.0.1", port=pacs.port))
    assert not answer.ok and "our AE title is not known there" in answer.reason


def stored(path, data: bytes, syntax: str = "1.2.840.10008.1.2.1", meta_instance: str = INSTANCE):
    """A Part 10 file of exactly these bytes."""
    meta = FileMeta(SC, meta_instance, syntax, "A", "B", "127.0.0.1", "0" * 32, 1.0)
    path.write_bytes(encode_meta(meta) + data)
    return path


def odd_data_set() -> bytes:
    """What a library would write another way: a sequence of undefined length, and an odd private element."""
    sequence = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    sequence += struct.pack("<HHLHHLHHL", 0xFFFE, 0xE000, 0xFFFFFFFF, 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    private = explicit(0x0009, 0x0010, b"LO", b"ODD") + explicit(0x0009, 0x1001, b"UN", b"\1\2\3\4")
    return small_data_set(sop_instance=INSTANCE, extra=sequence + private, pixels=500_000)


def destination(pacs: ReceivingPacs) -> Destination:
    return Destination(ae_title="PACS", host="127.0.0.1", port=pacs.port)


def test_what_is_sent_is_what_is_stored_and_in_pieces(tmp_path, monkeypatch):
    data = odd_data_set()
    path = stored(tmp_path / "a.dcm", data)
    monkeypatch.setattr("pynetdicom.association.encode", None)  # nothing may encode it
    with ReceivingPacs(tmp_path / "pacs") as pacs:
        sender = Sender("NODE")
        assert sender.send_file(destination(pacs), path).kind is Outcome.DELIVERED
        association = sender._association
        assert sender.send_file(destination(pacs), path).kind is Outcome.DELIVERED
        assert sender._association is association  # one for the batch
        sender.close()
    monkeypatch.undo()
    assert [r.sha256 for r in pacs.received] == [hashlib.sha256(data).hexdigest()] * 2


def test_a_file_whose_meta_group_says_something_else_goes_by_its_data_set(tmp_path):
    path = stored(tmp_path / "a.dcm", odd_data_set(), meta_instance="1.2.3.9")
    with ReceivingPacs(tmp_path / "pacs") as pacs:
        sender = Sender("NODE")
        assert sender.send_file(destination(pacs), path).kind is Outcome.DELIVERED
        sender.close()
    assert [r.sop_instance_uid for r in pacs.received] == [INSTANCE]


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")
def test_while_an_answer_is_waited_for_it_will_be_acknowledged_at_once(tmp_path):
    """Else a peer that leaves Nagle on (DCMTK as Debian ships it) holds the rest of it back for 40 ms.

    A small object: of a large one the kernel may still hold a part when it is asked, and forgets as that part goes out.
    """
    path = stored(tmp_path / "a.dcm", small_data_set())
    behaviour = Behaviour()
    with ReceivingPacs(tmp_path / "pacs", behaviour=behaviour) as pacs:
        sender = Sender("NODE")
        assert sender.send_file(destination(pacs), path).kind is Outcome.DELIVERED
        transport = sender._association.dul.socket.socket
        transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)  # as the kernel does after a while
        behaviour.delay_seconds = 3.0
        sending = threading.Thread(target=sender.send_file, args=(destination(pacs), path))
        sending.start()
        deadline = time.monotonic() + 2.5
        while not transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 1
        assert transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        sending.join()
        sender.close()

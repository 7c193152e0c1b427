"""The node as SCU: what it says of a peer that cannot be reached, and mutual TLS."""

from __future__ import annotations

import socket

import pytest
from certificates import Authority
from pynetdicom import AE

from dicom_node.config import Destination, Tls
from dicom_node.dimse.pacs import Behaviour, ReceivingPacs
from dicom_node.dimse.sender import VERIFICATION, Sender
from dicom_node.dimse.status import Outcome
from dicom_node.dimse.tls import server_context


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

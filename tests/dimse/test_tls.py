"""TLS: both sides show a certificate, a silent client delays nobody, a renewed certificate needs no restart."""

from __future__ import annotations

import socket
import ssl
import time

import pytest
from certificates import Authority
from listener_process import listening, wait_for
from raw_scu import AbortedError, RawScu, RejectedError

from dicom_node.config import Tls
from dicom_node.dimse.tls import ReloadingContext, client_context, server_context, subject_common_name
from dicom_node.errors import ConfigError


@pytest.fixture
def authority(tmp_path):
    folder = tmp_path / "pki"
    folder.mkdir()
    authority = Authority(folder)
    authority.issue("node", "node.hospital")
    authority.issue("scanner", "scanner.hospital")
    return authority


def tls(authority: Authority, name: str) -> Tls:
    return Tls(cert=authority.folder / f"{name}.pem", key=authority.folder / f"{name}.key", ca=authority.pem)


@pytest.fixture
def node(tmp_path, authority):
    with listening(tmp_path / "root", tls=tls(authority, "node").model_dump()) as node:
        yield node


def test_mutual_tls(node, authority):
    with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as scu:
        assert scu.associate().echo() == 0
        assert scu.socket.version() in ("TLSv1.2", "TLSv1.3")
        scu.release()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_certificate_a_foreign_one_old_tls_and_plain_are_refused(node, authority, tmp_path):
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.load_verify_locations(authority.pem)
    other = tmp_path / "other"
    other.mkdir()
    foreign = Authority(other, "other")
    foreign.issue("evil", "scanner.hospital")
    stranger = client_context(Tls(cert=other / "evil.pem", key=other / "evil.key", ca=authority.pem))
    old = client_context(tls(authority, "scanner"))
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    for context in (anonymous, stranger, old, None):
        with pytest.raises((OSError, AbortedError)):  # noqa: SIM117
            with RawScu(node.port, tls=context, timeout=3) as scu:
                scu.associate()
    wait_for(lambda: node.messages.counts("dicom_node_associations_rejected_total") >= 4)
    with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as scu:
        assert scu.associate().echo() == 0


def test_tls_1_2_has_forward_secrecy(node, authority):
    context = client_context(tls(authority, "scanner"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with RawScu(node.port, tls=context) as scu:
        assert scu.associate().echo() == 0
        assert scu.socket.cipher()[0].startswith("ECDHE-")
    context.set_ciphers("AES256-GCM-SHA384:AES128-SHA")
    with pytest.raises((OSError, ssl.SSLError)):
        RawScu(node.port, tls=context)


def test_clients_that_do_not_shake_hands_delay_nobody(node, authority):
    silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(5)]
    silent[0].sendall(b"\x16\x03\x01")  # a record begun and never ended
    began = time.monotonic()
    with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as scu:
        assert scu.associate().echo() == 0
    assert time.monotonic() - began < 1.0
    for s in silent:
        s.close()


def test_allow_can_bind_the_title_to_the_certificate(tmp_path, authority):
    authority.issue("thief", "thief.hospital")
    allow = [{"ae_title": "SCANNER", "address": "127.0.0.0/8", "subject": "scanner.hospital"}]
    with listening(tmp_path / "root", tls=tls(authority, "node").model_dump(), allow=allow) as node:
        with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as scu:
            scu.associate(calling="SCANNER").release()
        with RawScu(node.port, tls=client_context(tls(authority, "thief"))) as scu, pytest.raises(RejectedError) as e:
            scu.associate(calling="SCANNER")
        assert e.value.args == (1, 1, 3)


def test_a_renewed_certificate_is_shown_to_the_next_peer_and_cuts_nobody(node, authority):
    with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as before:
        before.associate()
        authority.issue("node", "renewed.hospital")
        with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as after:
            after.associate()
            assert subject_common_name(after.socket.getpeercert()) == "renewed.hospital"
        assert before.echo() == 0
        assert subject_common_name(before.socket.getpeercert()) == "node.hospital"


def test_half_a_renewal_keeps_the_old_certificate(authority):
    failures: list[ConfigError] = []
    context = ReloadingContext(tls(authority, "node"), server_context, failures.append)
    first = context.get()
    assert context.get() is first
    key = (authority.folder / "node.key").read_bytes()
    (authority.folder / "node.key").write_bytes(b"")
    assert context.get() is first
    assert context.get() is first
    assert [f.key for f in failures] == ["tls.cert"]
    (authority.folder / "node.key").write_bytes(key)
    assert context.get() is not first


def test_files_that_do_not_load_name_the_key_of_the_configuration(authority):
    missing = Tls(cert=authority.folder / "none.pem", key=authority.folder / "none.key", ca=authority.pem)
    with pytest.raises(ConfigError, match=r"tls\.cert"):
        server_context(missing)
    section = tls(authority, "node").model_copy(update={"ca": authority.folder / "node.key"})
    with pytest.raises(ConfigError, match=r"tls\.ca"):
        client_context(section)


def test_a_handshake_that_does_not_end_is_ended(tmp_path, authority):
    section = tls(authority, "node").model_dump()
    with listening(tmp_path / "root", tls=section, handshake_timeout=0.4, request_timeout=60) as node:
        with socket.create_connection(("127.0.0.1", node.port)) as silent:
            silent.sendall(b"\x16\x03\x01")
            began = time.monotonic()
            silent.settimeout(10)
            assert silent.recv(10) == b""
            assert time.monotonic() - began < 5
        wait_for(lambda: node.messages.of("event"))
        assert "no_tls_handshake_in_time" in node.messages.of("event")[0]["text"]
        with RawScu(node.port, tls=client_context(tls(authority, "scanner"))) as scu:
            assert scu.associate().echo() == 0

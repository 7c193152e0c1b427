"""The audit trail: messages of PS3.15 A.5 in a file and at a collector, and never in the way."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_node.audit import Audit

STUDY = "1.2.826.0.1.3680043.8.498.1"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
TITLES = ("DICOM_NODE", "RENAL_AI")

# What the schema of PS3.15 A.5.1 allows: per element its mandatory and optional attributes, and its children in order
# with how often they may stand.
CODED = ({"csd-code", "codeSystemName", "originalText"}, {"displayName"}, [])
SCHEMA: dict[str, tuple[set[str], set[str], list[tuple[str, int, int]]]] = {
    "AuditMessage": (
        set(),
        set(),
        [
            ("EventIdentification", 1, 1),
            ("ActiveParticipant", 1, 99),
            ("AuditSourceIdentification", 1, 1),
            ("ParticipantObjectIdentification", 0, 99),
        ],
    ),
    "EventIdentification": (
        {"EventDateTime", "EventOutcomeIndicator"},
        {"EventActionCode"},
        [("EventID", 1, 1), ("EventTypeCode", 0, 99), ("EventOutcomeDescription", 0, 1)],
    ),
    "EventID": CODED,
    "EventTypeCode": CODED,
    "RoleIDCode": CODED,
    "ParticipantObjectIDTypeCode": CODED,
    "EventOutcomeDescription": (set(), set(), []),
    "ActiveParticipant": (
        {"UserID", "UserIsRequestor"},
        {"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"},
        [("RoleIDCode", 0, 99)],
    ),
    "AuditSourceIdentification": ({"AuditSourceID"}, {"AuditEnterpriseSiteID"}, [("AuditSourceTypeCode", 0, 99)]),
    "AuditSourceTypeCode": ({"csd-code"}, {"codeSystemName", "originalText", "displayName"}, []),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID"},
        {"ParticipantObjectTypeCode", "ParticipantObjectTypeCodeRole", "ParticipantObjectDataLifeCycle"},
        [
            ("ParticipantObjectIDTypeCode", 1, 1),
            ("ParticipantObjectName", 1, 1),
            ("ParticipantObjectDescription", 0, 99),
        ],
    ),
    "ParticipantObjectName": (set(), set(), []),
    "ParticipantObjectDescription": (set(), set(), [("SOPClass", 0, 99)]),
    "SOPClass": ({"NumberOfInstances"}, {"UID"}, []),
}
VALUES = {
    "EventActionCode": "[CRUDE]",
    "EventDateTime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
    "EventOutcomeIndicator": "0|4|8|12",
    "UserIsRequestor": "true|false",
    "NetworkAccessPointTypeCode": "[1-5]",
    "ParticipantObjectTypeCode": "[1-4]",
    "ParticipantObjectTypeCodeRole": "[1-9]|1[0-9]|2[0-6]",
    "NumberOfInstances": r"\d+",
}


def parse(message: bytes) -> ET.Element:
    return ET.fromstring(message)  # noqa: S314  our own messages


def check(element: ET.Element) -> None:
    mandatory, optional, children = SCHEMA[element.tag]
    assert mandatory <= set(element.keys()) <= mandatory | optional, element.tag
    for name, value in element.items():
        assert re.fullmatch(VALUES.get(name, "(?s).+"), value), f"{name}={value!r}"
    order = [name for name, _, _ in children]
    tags = [child.tag for child in element]
    assert tags == sorted(tags, key=order.index), element.tag
    for name, least, most in children:
        assert least <= tags.count(name) <= most, f"{element.tag}/{name}"
    for child in element:
        check(child)


def say_everything(audit: Audit) -> None:
    audit.started()
    audit.association_rejected("UNKNOWN", "10.1.2.3", "calling AE title is not allowed")
    audit.study_received(STUDY, "4711", {"1.2.840.10008.5.1.4.1.1.3.1": 2}, calling_ae="US1", address="10.1.2.4")
    audit.study_sent(STUDY, "4711", {SR: 1}, called_ae="PACS", address="pacs.example")
    audit.accessed("operator", "retry", STUDY, "4711")
    audit.stopped()


EXPECTED = [
    ("110100", "110120", "E", "0"),
    ("110113", "110126", "E", "8"),
    ("110104", "", "C", "0"),
    ("110104", "", "R", "0"),
    ("110103", "", "U", "0"),
    ("110100", "110121", "E", "0"),
]


def summary(message: ET.Element) -> tuple[str, str, str, str]:
    event = message.find("EventIdentification")
    assert event is not None
    kind = event.find("EventTypeCode")
    return (
        event[0].get("csd-code", ""),
        kind.get("csd-code", "") if kind is not None else "",
        event.get("EventActionCode", ""),
        event.get("EventOutcomeIndicator", ""),
    )


def test_every_event_is_a_valid_message_on_a_line_of_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "audit.xml"
    audit = Audit(path, None, ae_titles=TITLES)
    say_everything(audit)
    audit.close()
    messages = [parse(line) for line in path.read_bytes().splitlines()]
    for message in messages:
        check(message)
        assert len([p for p in message.iter("ActiveParticipant") if p.get("UserIsRequestor") == "true"]) <= 1
    assert [summary(message) for message in messages] == EXPECTED
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_transfer_names_source_destination_study_and_patient(tmp_path: Path) -> None:
    """PS3.15 table A.5.3.7-1."""
    audit = Audit(tmp_path / "a", None, ae_titles=TITLES)
    audit.study_received(STUDY, "4711", {SR: 3}, calling_ae="US1", address="10.1.2.4")
    audit.close()
    message = parse((tmp_path / "a").read_bytes())
    source, destination = message.findall("ActiveParticipant")
    assert (source.get("UserID"), source.get("NetworkAccessPointID"), source.get("NetworkAccessPointTypeCode")) == (
        "US1", "10.1.2.4", "2",
    )  # fmt: skip
    assert source[0].get("csd-code") == "110153"
    assert destination.get("AlternativeUserID") == "AETITLES=DICOM_NODE;RENAL_AI"
    assert destination[0].get("csd-code") == "110152"
    study, patient = message.findall("ParticipantObjectIdentification")
    assert (study.get("ParticipantObjectID"), study.get("ParticipantObjectTypeCodeRole")) == (STUDY, "3")
    assert [dict(c.items()) for c in study.iter("SOPClass")] == [{"UID": SR, "NumberOfInstances": "3"}]
    assert (patient.get("ParticipantObjectID"), patient.get("ParticipantObjectTypeCodeRole")) == ("4711", "1")
    assert patient[0].get("codeSystemName") == "RFC-3881"


def test_hostile_values_stay_inside_their_message(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a", None, ae_titles=TITLES)
    audit.association_rejected('"/>\n<x\x00\x1b\ud800', "10.0.0.1", "bad\x00<reason>")
    audit.study_received(STUDY, "", {SR: 1}, calling_ae="王", address="10.0.0.1")
    audit.close()
    first, second = (tmp_path / "a").read_bytes().splitlines()
    check(parse(first))
    check(parse(second))
    assert "王" in second.decode()


def test_without_a_place_to_write_it_does_nothing(tmp_path: Path) -> None:
    threads = threading.active_count()
    audit = Audit(None, None, ae_titles=TITLES)
    say_everything(audit)
    audit.close()
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


class Collector:
    """A syslog collector that reads octet-counted messages (RFC 5425 section 4.3)."""

    def __init__(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.messages: list[bytes] = []
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                self._open.append(client)
                if self._context is not None:
                    client = self._context.wrap_socket(client, server_side=True)
                    self._open.append(client)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            threading.Thread(target=self._read, args=(client,), daemon=True).start()

    def _read(self, client: socket.socket) -> None:
        data = b""
        while True:
            try:
                more = client.recv(65536)
            except OSError:
                return
            if not more:
                return
            data += more
            while (match := re.match(rb"(\d+) ", data)) and len(data) >= match.end() + int(match[1]):
                end = match.end() + int(match[1])
                self.messages.append(data[match.end() : end])
                data = data[end:]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._open:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)  # a thread is reading it: closing alone would send nothing
            client.close()


def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    with contextlib.suppress(OSError):
        collector.close()


SYSLOG = re.compile(rb"<(8[45])>1 \S+ \S+ dicom-node \d+ DICOM\+RFC3881 - \xef\xbb\xbf(<AuditMessage>.*)", re.DOTALL)


def test_a_collector_gets_rfc_5424_messages_over_tcp(collector: Collector) -> None:
    audit = Audit(None, f"tcp://127.0.0.1:{collector.port}", ae_titles=TITLES)
    say_everything(audit)
    wait(lambda: len(collector.messages) == 6)
    audit.close()
    matches = [SYSLOG.fullmatch(message) for message in collector.messages]
    assert [match and match[1] for match in matches] == [b"85", b"84", b"85", b"85", b"85", b"85"]
    assert [summary(parse(match[2])) for match in matches if match] == EXPECTED


def test_a_collector_gets_one_datagram_a_message_over_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        audit = Audit(None, f"udp://127.0.0.1:{receiver.getsockname()[1]}", ae_titles=TITLES)
        say_everything(audit)
        datagrams = [receiver.recv(65536) for _ in range(6)]
        audit.close()
    assert all(SYSLOG.fullmatch(datagram) for datagram in datagrams)


def test_messages_wait_for_a_collector_that_is_away_and_the_file_has_them_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    lost: list[str] = []
    audit = Audit(tmp_path / "a", f"tcp://127.0.0.1:{port}", ae_titles=TITLES, on_loss=lost.append)
    started = time.monotonic()
    say_everything(audit)
    assert time.monotonic() - started < 0.5  # the line does not wait
    wait(lambda: (tmp_path / "a").exists() and len((tmp_path / "a").read_bytes().splitlines()) == 6)
    wait(lambda: bool(lost))
    collector = Collector(port=port)
    wait(lambda: len(collector.messages) == 6)
    audit.close()
    collector.close()
    assert lost == ["the audit collector does not take messages (ConnectionRefusedError)"]


def test_a_collector_that_restarts_loses_nothing(collector: Collector) -> None:
    audit = Audit(None, f"tcp://127.0.0.1:{collector.port}", ae_titles=TITLES)
    audit.started()
    wait(lambda: len(collector.messages) == 1)
    collector.close()
    time.sleep(0.05)  # its end of file must have arrived: a message written before it would be lost with any TCP syslog
    second = Collector(port=collector.port)
    audit.stopped()
    wait(lambda: len(second.messages) == 1)
    audit.close()
    second.close()


def test_a_disk_that_refuses_is_told_once_and_does_not_stop_the_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lost: list[str] = []
    audit = Audit(tmp_path / "a", None, ae_titles=TITLES, on_loss=lost.append)
    say_everything(audit)
    audit.close()
    assert lost == ["the audit file cannot be written (Is a directory)"]


def test_a_rotated_file_is_left_alone(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a", None, ae_titles=TITLES)
    audit.started()
    wait(lambda: (tmp_path / "a").exists() and (tmp_path / "a").stat().st_size > 0)
    (tmp_path / "a").rename(tmp_path / "a.1")
    audit.stopped()
    audit.close()
    assert summary(parse((tmp_path / "a.1").read_bytes()))[1] == "110120"
    assert summary(parse((tmp_path / "a").read_bytes()))[1] == "110121"


@pytest.mark.parametrize("url", ["http://x", "host:514", "tcp://", "file:///etc/passwd"])
def test_a_collector_that_is_not_one_is_an_error_at_start(url: str) -> None:
    with pytest.raises(ValueError, match=r"audit\.syslog"):
        Audit(None, url, ae_titles=TITLES)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A CA, and one certificate for 127.0.0.1 that both sides use."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    name = tmp_path / "node"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", f"{name}.key", "-out", f"{name}.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return name


def test_a_collector_over_tls_knows_the_node_and_the_node_knows_the_collector(certificates: Path) -> None:
    """PS3.15 A.6: both sides present a certificate; without a trusted one nothing is sent."""
    files = (f"{certificates}.pem", f"{certificates}.key")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files[0])
    server.load_cert_chain(*files)
    server.verify_mode = ssl.CERT_REQUIRED
    collector = Collector(server)
    client = ssl.create_default_context(cafile=files[0])
    client.load_cert_chain(*files)
    url = f"tls://127.0.0.1:{collector.port}"

    audit = Audit(None, url, ae_titles=TITLES, tls=client)
    audit.started()
    audit.stopped()
    wait(lambda: len(collector.messages) == 2)
    audit.close()

    lost: list[str] = []
    stranger = Audit(None, url, ae_titles=TITLES, on_loss=lost.append)
    stranger.started()
    wait(lambda: bool(lost))
    stranger.close(0.1)
    assert lost == ["the audit collector does not take messages (SSLCertVerificationError)"]
    assert len(collector.messages) == 2
    collector.close()

"""The audit trail: who moved which study, as DICOM audit messages (PS3.15 A.5), to a file and a syslog collector.

The one place of the node that names patients on purpose: a patient's identifier is mandatory in these messages. So it
is off until `audit.path` or `audit.syslog` is set, the file is 0600, and nothing here is logged.
Stands under the stages, imports none; only the stages process owns one. It never holds up the line: a message goes into
a bounded queue, one thread writes the file (append, fsync) and then sends by syslog (RFC 5424; octet counting on TCP
and TLS, PS3.15 A.6; one datagram on UDP, A.7). While a collector is away the newest messages wait in memory; the file
has all.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

_ILLEGAL = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 (2.2) does not allow, and line breaks: one message is one line of the file."""
_CODES = {
    "110100": "Application Activity",
    "110103": "DICOM Instances Accessed",
    "110104": "DICOM Instances Transferred",
    "110113": "Security Alert",
    "110120": "Application Start",
    "110121": "Application Stop",
    "110126": "Node Authentication",
    "110150": "Application",
    "110152": "Destination Role ID",
    "110153": "Source Role ID",
    "110180": "Study Instance UID",
    "110182": "Node ID",
}  # PS3.16 annex D
_QUEUE = 10_000
_WAITING = 10_000
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def _attributes(**values: str) -> dict[str, str]:
    return {name.replace("csd_", "csd-"): _clean(value) for name, value in values.items()}


def _code(parent: ET.Element, tag: str, value: str, scheme: str = "DCM", meaning: str = "") -> None:
    ET.SubElement(
        parent, tag, _attributes(csd_code=value, codeSystemName=scheme, originalText=meaning or _CODES[value])
    )


def _participant(
    message: ET.Element, user: str, *, requestor: bool, role: str = "", ae_titles: Sequence[str] = (), address: str = ""
) -> None:
    """A process by its identifier and AE titles (PS3.15 A.5.2.1, A.5.2.2), or a person."""
    values = {"UserID": user, "UserIsRequestor": "true" if requestor else "false"}
    if ae_titles:
        values["AlternativeUserID"] = "AETITLES=" + ";".join(ae_titles)
    if address:
        values |= {"NetworkAccessPointID": address, "NetworkAccessPointTypeCode": "2" if _is_ip(address) else "1"}
    element = ET.SubElement(message, "ActiveParticipant", _attributes(**values))
    if role:
        _code(element, "RoleIDCode", role)


def _is_ip(address: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, address)
            return True
    return False


def _study(message: ET.Element, study_uid: str, sop_classes: Mapping[str, int]) -> None:
    element = ET.SubElement(
        message,
        "ParticipantObjectIdentification",
        _attributes(ParticipantObjectID=study_uid, ParticipantObjectTypeCode="2", ParticipantObjectTypeCodeRole="3"),
    )
    _code(element, "ParticipantObjectIDTypeCode", "110180")
    ET.SubElement(element, "ParticipantObjectName").text = "Study"  # a name or a query is mandatory (schema, A.5.1)
    description = ET.SubElement(element, "ParticipantObjectDescription")
    for uid, count in sop_classes.items():
        ET.SubElement(description, "SOPClass", _attributes(UID=uid, NumberOfInstances=str(count)))


def _patient(message: ET.Element, patient_id: str) -> None:
    element = ET.SubElement(
        message,
        "ParticipantObjectIdentification",
        _attributes(
            ParticipantObjectID=patient_id or "<none>",
            ParticipantObjectTypeCode="1",
            ParticipantObjectTypeCodeRole="1",
        ),
    )
    _code(element, "ParticipantObjectIDTypeCode", "2", "RFC-3881", "Patient Number")
    ET.SubElement(element, "ParticipantObjectName").text = ""  # the identifier is enough; the name stays out


class Audit:
    """Says what happened; returns at once. Without `path` and `syslog` it does nothing.

    `ae_titles`: ours. `tls`: for `tls://` collectors (our certificate as a node, PS3.15 A.6); None = verify only.
    `on_loss(reason)`: called from the writing thread, once per outage, with a sentence free of PHI.
    """

    def __init__(
        self,
        path: Path | None,
        syslog: str | None,
        *,
        ae_titles: Sequence[str],
        tls: ssl.SSLContext | None = None,
        on_loss: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._path, self._ae_titles, self._on_loss = path, tuple(ae_titles), on_loss
        self._sender = _Syslog(syslog, tls) if syslog else None
        self._queue: queue.Queue[tuple[bytes, int] | None] = queue.Queue(_QUEUE)
        self._host = socket.gethostname()
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=_WAITING)
        self._told = False
        self._thread: threading.Thread | None = None
        if path is not None or syslog:
            self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
            self._thread.start()

    @property
    def enabled(self) -> bool:
        """False = nothing is written anywhere."""
        return self._thread is not None

    def started(self) -> None:
        """Application Start (A.5.3.1)."""
        self._activity("110120")

    def stopped(self) -> None:
        """Application Stop (A.5.3.1)."""
        self._activity("110121")

    def association_rejected(self, calling_ae: str, address: str, reason: str) -> None:
        """Security Alert, Node Authentication (A.5.3.11): a peer that is not allowed, or failed the TLS handshake."""
        message = self._message("110113", "E", outcome="8", event_type="110126", description=reason)
        self._us(message, requestor=False)
        _participant(
            message,
            calling_ae or address,
            requestor=False,
            ae_titles=[calling_ae] if calling_ae else (),
            address=address,
        )
        self._source(message)
        subject = ET.SubElement(
            message,
            "ParticipantObjectIdentification",
            _attributes(ParticipantObjectID=address, ParticipantObjectTypeCode="2", ParticipantObjectTypeCodeRole="25"),
        )
        _code(subject, "ParticipantObjectIDTypeCode", "110182")
        ET.SubElement(subject, "ParticipantObjectName").text = _clean(calling_ae)
        self._put(message, severity=4)

    def study_received(
        self, study_uid: str, patient_id: str, sop_classes: Mapping[str, int], *, calling_ae: str, address: str
    ) -> None:
        """DICOM Instances Transferred, Create (A.5.3.7). `sop_classes`: SOP Class UID → number of instances."""
        message = self._message("110104", "C")
        _participant(message, calling_ae, requestor=True, role="110153", ae_titles=[calling_ae], address=address)
        self._us(message, requestor=False, role="110152")
        self._source(message)
        _study(message, study_uid, sop_classes)
        _patient(message, patient_id)
        self._put(message)

    def study_sent(
        self,
        study_uid: str,
        patient_id: str,
        sop_classes: Mapping[str, int],
        *,
        called_ae: str,
        address: str,
        success: bool = True,
    ) -> None:
        """DICOM Instances Transferred, Read (A.5.3.7): our objects, to one destination."""
        message = self._message("110104", "R", outcome="0" if success else "8")
        self._us(message, requestor=True, role="110153")
        _participant(message, called_ae, requestor=False, role="110152", ae_titles=[called_ae], address=address)
        self._source(message)
        _study(message, study_uid, sop_classes)
        _patient(message, patient_id)
        self._put(message, severity=5 if success else 4)

    def accessed(self, user: str, action: str, study_uid: str, patient_id: str = "") -> None:
        """DICOM Instances Accessed (A.5.3.6): an operator looked at or moved a study. `action`: explain, retry, …"""
        message = self._message("110103", "R" if action == "explain" else "U", description=action)
        _participant(message, user, requestor=True)
        self._us(message, requestor=False)
        self._source(message)
        _study(message, study_uid, {})
        _patient(message, patient_id)
        self._put(message)

    def close(self, timeout: float = 3.0) -> None:
        """Write what is queued, send what the collector takes within `timeout`."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=timeout)
            self._thread.join(timeout)

    def _activity(self, event_type: str) -> None:
        message = self._message("110100", "E", event_type=event_type)
        self._us(message, requestor=False, role="110150")
        self._source(message)
        self._put(message)

    def _message(
        self, event: str, action: str, *, outcome: str = "0", event_type: str = "", description: str = ""
    ) -> ET.Element:
        message = ET.Element("AuditMessage")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        identification = ET.SubElement(
            message,
            "EventIdentification",
            _attributes(EventActionCode=action, EventDateTime=at, EventOutcomeIndicator=outcome),
        )
        _code(identification, "EventID", event)
        if event_type:
            _code(identification, "EventTypeCode", event_type)
        if description:
            ET.SubElement(identification, "EventOutcomeDescription").text = _clean(description)
        return message

    def _us(self, message: ET.Element, *, requestor: bool, role: str = "") -> None:
        _participant(
            message, str(os.getpid()), requestor=requestor, role=role, ae_titles=self._ae_titles, address=self._host
        )

    def _source(self, message: ET.Element) -> None:
        source = ET.SubElement(message, "AuditSourceIdentification", _attributes(AuditSourceID=self._ae_titles[0]))
        ET.SubElement(source, "AuditSourceTypeCode", _attributes(csd_code="4"))  # application server process

    def _put(self, message: ET.Element, severity: int = 5) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait((ET.tostring(message, encoding="utf-8"), severity))
        except queue.Full:
            self._lost("audit messages are written too slowly and were dropped")

    def _lost(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._on_loss(reason)

    def _write(self) -> None:
        """The thread: file first, then the collector."""
        pause, next_try = _FIRST_RETRY, 0.0
        while True:
            try:
                item = self._queue.get(timeout=pause if self._waiting else None)
            except queue.Empty:
                item = (b"", 5)
            if item is not None and item[0]:
                self._keep(*item)
            if self._waiting and (item is None or time.monotonic() >= next_try):
                pause = _FIRST_RETRY if self._send() else min(2 * pause, _LAST_RETRY)
                next_try = time.monotonic() + (pause if self._waiting else 0.0)
            if item is None:
                return

    def _keep(self, xml: bytes, severity: int) -> None:
        if self._path is not None:
            try:
                _append(self._path, xml + b"\n")
            except OSError as e:
                self._lost(f"the audit file cannot be written ({e.strerror})")
        if self._sender is not None:
            if len(self._waiting) == _WAITING:
                self._lost("the audit collector is away too long: its oldest messages were dropped")
            self._waiting.append(_syslog_message(xml, severity, self._host))

    def _send(self) -> bool:
        assert self._sender is not None  # noqa: S101  _waiting is filled only then
        while self._waiting:
            try:
                self._sender.send(self._waiting[0])
            except OSError as e:
                self._lost(f"the audit collector does not take messages ({type(e).__name__})")
                return False
            self._waiting.popleft()
        self._told = False
        return True


def _append(path: Path, line: bytes) -> None:
    """Reopened each time, so that a rotated file is left alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        left = memoryview(line)
        while left:  # a write may be short when the disk is nearly full
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _syslog_message(xml: bytes, severity: int, host: str) -> bytes:
    """RFC 5424: facility 10 and the MSGID of PS3.15 A.6; the BOM says that MSG is UTF-8."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    header = f"<{10 * 8 + severity}>1 {at} {host[:255]} dicom-node {os.getpid()} DICOM+RFC3881 - "
    return header.encode("ascii", "replace") + b"\xef\xbb\xbf" + xml


class _Syslog:
    """One connection to tcp://, tls:// or udp://host:port, opened when needed, dropped on any error."""

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("tcp", "tls", "udp") or not parts.hostname:
            raise ValueError(f"audit.syslog: tcp://host:port, tls://host:port or udp://host:port, not {url!r}")
        self._scheme, self._host = parts.scheme, parts.hostname
        self._port = parts.port or (514 if parts.scheme == "udp" else 6514)
        self._tls = tls
        self._socket: socket.socket | None = None

    def send(self, message: bytes) -> None:
        """Raises OSError (ssl.SSLError is one)."""
        if self._socket is None:
            self._socket = self._open()
        try:
            if self._scheme == "udp":
                self._socket.send(message)
            else:
                self._refuse_half_closed(self._socket)
                self._socket.sendall(str(len(message)).encode() + b" " + message)
        except OSError:
            self._socket.close()
            self._socket = None
            raise

    def _open(self) -> socket.socket:
        if self._scheme == "udp":
            family, _, _, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)[0]
            datagrams = socket.socket(family, socket.SOCK_DGRAM)
            datagrams.connect(address)
            return datagrams
        stream = socket.create_connection((self._host, self._port), timeout=10)
        if self._scheme == "tcp":
            return stream
        context = self._tls or ssl.create_default_context()
        try:
            return context.wrap_socket(stream, server_hostname=self._host)
        except OSError:
            stream.close()
            raise

    @staticmethod
    def _refuse_half_closed(stream: socket.socket) -> None:
        """A collector never speaks: something to read is its end of file, and what we write now would be lost."""
        stream.settimeout(0)
        try:
            stream.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        finally:
            stream.settimeout(10)
        raise ConnectionResetError("the collector closed the connection")

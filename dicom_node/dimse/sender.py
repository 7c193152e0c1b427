"""The node as SCU: C-STORE of persisted files and C-ECHO, over one association that is kept for a batch.

The stored bytes are what is sent, from the file in pieces. Where a peer does not take their transfer syntax, the data
set is encoded anew (and decompressed) for that association only, under the same SOP Instance UID; the file stays as it
is. Stands under deliver and the command line; decides nothing about retries, only says what happened (`SendOutcome`).
"""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from dicom_node.config import Destination
from dicom_node.dimse.requestor import Peer, associate
from dicom_node.dimse.status import Outcome, classify
from dicom_node.dimse.tls import client_context
from dicom_node.errors import ConfigError

VERIFICATION = "1.2.840.10008.1.1"
UNCOMPRESSED: list[str | UID] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
CONNECT_SECONDS, ACSE_SECONDS, DIMSE_SECONDS = 10.0, 30.0, 60.0
BATCH, IDLE_SECONDS = 50, 30.0
"""One association carries at most so many objects, unless its user says otherwise, and is not kept longer than this
without work."""
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", None)

_REJECT_PERMANENT: dict[tuple[int | None, int | None], str] = {
    (1, 1): "rejected without a reason given",
    (1, 2): "rejected: application context not supported",
    (1, 3): "our AE title is not known there: enter it in its configuration",
    (1, 7): "its AE title is another than the one configured here (ae_title)",
    (2, 1): "rejected by its upper layer",
    (2, 2): "rejected: protocol version not supported",
}


@dataclass(frozen=True, slots=True)
class SendOutcome:
    """What became of one object."""

    kind: Outcome
    status: int | None
    """Of the C-STORE response; None = there was none."""
    reason: str
    """Free of PHI."""
    connection: bool = False
    """True = the association failed, not this object: nothing else will get through either."""


@dataclass(frozen=True, slots=True)
class EchoOutcome:
    """What became of a C-ECHO."""

    ok: bool
    reason: str


class Sender:
    """Not thread-safe: one sender a destination worker."""

    def __init__(self, calling_ae_title: str, *, objects_per_association: int = BATCH) -> None:
        self._calling, self._limit = calling_ae_title, objects_per_association
        _config.STORE_SEND_CHUNKED_DATASET = True  # of files that are given by their path, as `_store` does
        self._association: Association | None = None
        self._key: tuple[Any, ...] = ()
        self._sent, self._used = 0, 0.0

    def send_file(self, to: Destination, path: Path, *, batch: Iterable[tuple[str, str]] = ()) -> SendOutcome:
        """C-STORE one Part 10 file. `batch`: (SOP Class, Transfer Syntax) of what else this association will carry."""
        try:
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
            wanted = (str(head.SOPClassUID), str(head.file_meta.TransferSyntaxUID))
        except (OSError, pydicom.errors.InvalidDicomError, AttributeError) as e:
            return SendOutcome(Outcome.DEAD, None, f"the object's file cannot be read ({type(e).__name__})")
        failed = self._open(to, {wanted, *batch})
        if failed is not None:
            return failed
        return self._store(path, head, wanted)

    def echo(self, to: Destination) -> EchoOutcome:
        """C-ECHO on an association of its own."""
        self.close()
        failed = self._open(to, {(VERIFICATION, str(ImplicitVRLittleEndian))})
        if failed is not None or self._association is None:
            return EchoOutcome(False, failed.reason if failed else "no association")
        try:
            answer = self._association.send_c_echo()
        except (RuntimeError, ValueError):
            answer = Dataset()
        self.close()
        if "Status" not in answer:
            return EchoOutcome(False, "the association opens, but C-ECHO is not answered")
        ok = answer.Status == 0
        return EchoOutcome(ok, "" if ok else f"C-ECHO answered with 0x{answer.Status:04X}")

    def close_if_idle(self) -> None:
        """Let go of an association nobody used for a while."""
        if self._association is not None and time.monotonic() - self._used > IDLE_SECONDS:
            self.close()

    def close(self) -> None:
        """Release the association, if there is one."""
        association, self._association = self._association, None
        if association is not None and association.is_established:
            association.release()

    def _open(self, to: Destination, wanted: set[tuple[str, str]]) -> SendOutcome | None:
        """An association that carries `wanted`; None = there is one now."""
        key = (to.ae_title, to.host, to.port)
        open_now = self._association
        if open_now is not None and open_now.is_established and self._sent < self._limit and self._key[:3] == key:
            if wanted <= self._key[3]:
                return None
            wanted |= self._key[3]
        self.close()
        try:
            association = self._associate(to, wanted)
        except ConfigError as e:
            return SendOutcome(Outcome.PAUSE, None, str(e), connection=True)
        if not association.is_established:
            return why_not(association, to)
        self._association, self._key, self._sent, self._used = association, (*key, wanted), 0, time.monotonic()
        return None

    def _associate(self, to: Destination, wanted: set[tuple[str, str]]) -> Association:
        ae = AE(self._calling)
        ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout = CONNECT_SECONDS, ACSE_SECONDS, DIMSE_SECONDS
        ae.network_timeout = DIMSE_SECONDS
        contexts = []
        for sop_class in sorted({c for c, _ in wanted}):
            contexts.append(build_context(sop_class, UNCOMPRESSED))
            # A context of its own: in a shared one the peer would choose, and might choose against what we hold.
            compressed = sorted({t for c, t in wanted if c == sop_class and UID(t).is_compressed})
            contexts += [build_context(sop_class, [syntax]) for syntax in compressed]
        return associate(ae, to, contexts, [(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_DATA_SENT, _quick_ack)])

    def _store(self, path: Path, head: Dataset, wanted: tuple[str, str]) -> SendOutcome:
        association = self._association
        assert association is not None  # noqa: S101  _open made it
        accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts}
        if not any(a == wanted[0] for a, _ in accepted):
            return SendOutcome(Outcome.PAUSE, None, f"the peer takes no {UID(wanted[0]).name}", connection=False)
        try:
            if wanted in accepted and _says_what_it_is(head):
                answer = association.send_c_store(path)
            else:
                answer = association.send_c_store(_readable(path, wanted[1], wanted in accepted))
        except (RuntimeError, ValueError, OSError) as e:
            self.close()
            return SendOutcome(Outcome.RETRY, None, f"the association broke ({type(e).__name__})", connection=True)
        self._sent, self._used = self._sent + 1, time.monotonic()
        if "Status" not in answer:  # time-out or abort: pynetdicom returns an empty data set
            association.abort()
            self._association = None
            return SendOutcome(Outcome.RETRY, None, "no answer: time-out, abort or connection lost", connection=True)
        return SendOutcome(classify(answer.Status), int(answer.Status), _said(int(answer.Status)))


def _no_delay(event: Any) -> None:
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _quick_ack(event: Any) -> None:
    """A peer with Nagle on holds its response back until we acknowledge: do that at once (Linux).

    After each PDU, for sending one ends the mode: what waits for the answer must be asked for last.
    """
    transport = event.assoc.dul.socket
    if TCP_QUICKACK is not None and transport is not None and transport.socket is not None:
        with contextlib.suppress(OSError):
            transport.socket.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)


def _says_what_it_is(head: Dataset) -> bool:
    """The command is made of the meta group; a peer compares it with the data set."""
    meta = head.file_meta
    named = (meta.get("MediaStorageSOPClassUID"), meta.get("MediaStorageSOPInstanceUID"))
    return named == (head.get("SOPClassUID"), head.get("SOPInstanceUID"))


def _readable(path: Path, syntax: str, as_it_is: bool) -> Dataset:
    """For a peer that takes another transfer syntax than the file's."""
    dataset = pydicom.dcmread(path)
    return _decompressed(dataset) if UID(syntax).is_compressed and not as_it_is else dataset


def _decompressed(dataset: Dataset) -> Dataset:
    """A copy in Explicit VR Little Endian, same UIDs; our captures are RLE Lossless, so nothing is lost."""
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    buffer.seek(0)
    copy = pydicom.dcmread(buffer)
    copy.decompress(generate_instance_uid=False)
    return copy


def _said(status: int) -> str:
    return "" if status == 0 else f"C-STORE answered with 0x{status:04X}"


def why_not(association: Association, to: Peer, seconds: float = CONNECT_SECONDS) -> SendOutcome:
    """Why an association did not come about (PS3.8 table 9-21: result 1 = permanent, 2 = transient)."""
    primitive = association.acceptor.primitive
    if association.is_rejected and primitive is not None:
        result, source, reason = primitive.result, primitive.result_source, primitive.diagnostic
        if result == 1:
            said = _REJECT_PERMANENT.get((source, reason), f"rejected for good (source {source}, reason {reason})")
            return SendOutcome(Outcome.PAUSE, None, said, connection=True)
        text = f"rejected for now (source {source}, reason {reason})"
        return SendOutcome(Outcome.RETRY, None, text, connection=True)
    if primitive is not None and not association.accepted_contexts:
        return SendOutcome(Outcome.PAUSE, None, "the peer takes none of our SOP Classes", connection=True)
    return _diagnose(to, seconds)


def _diagnose(to: Peer, seconds: float) -> SendOutcome:
    """pynetdicom tells no reason for a connection that never was; look once more, without DICOM."""
    try:
        with socket.create_connection((to.host, to.port), seconds) as plain:
            if to.tls is not None:
                client_context(to.tls).wrap_socket(plain, server_hostname=to.host).close()
    except ssl.SSLError as e:
        text = f"the TLS handshake fails ({e.reason or 'no reason given'}): certificates and CA on both sides"
        return SendOutcome(Outcome.PAUSE, None, text, connection=True)
    except OSError as e:
        text = f"no connection to {to.host}:{to.port} ({e.strerror or type(e).__name__})"
        return SendOutcome(Outcome.RETRY, None, text, connection=True)
    text = "the connection opens, but no association comes about: no answer, or aborted by the peer"
    return SendOutcome(Outcome.RETRY, None, text, connection=True)

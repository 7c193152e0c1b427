"""The node as SCU: C-STORE of persisted files and C-ECHO, over one association that is kept for a batch.

The stored bytes are what is sent, unread. Only where a peer does not take their transfer syntax is the data set encoded
anew for that association, under the same SOP Instance UID and the same way each time; the file stays as it is. Stands
under deliver and the command line; decides nothing about retries, only says what happened (`SendOutcome`).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from dicom_node.config import Destination
from dicom_node.dimse.refusal import diagnose, rejected
from dicom_node.dimse.status import Outcome, classify
from dicom_node.dimse.tls import client_context
from dicom_node.errors import ConfigError
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

VERIFICATION = "1.2.840.10008.1.1"
UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
BATCH, IDLE_SECONDS = 50, 30.0
"""One association carries at most so many objects and is not kept longer than this without work."""
SLOWEST_BYTES_PER_SECOND = 125_000
"""A large object over a thin line gets the time it needs before its response is missed."""
MEDIUM, HIGH = 0, 1
"""Priority (0000,0700), PS3.7 E.1."""
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


@dataclass(frozen=True, slots=True)
class TimeOuts:
    """Seconds."""

    connect: float = 10.0
    associate: float = 30.0
    respond: float = 60.0
    """For a DIMSE response, and for a peer that takes no more bytes."""


class Scope(StrEnum):
    """What an outcome says something about."""

    OBJECT = "OBJECT"
    SOP_CLASS = "SOP_CLASS"
    """Every object of this SOP Class would meet the same."""
    DESTINATION = "DESTINATION"
    """Nothing at all gets through."""


@dataclass(frozen=True, slots=True)
class SendOutcome:
    """What became of one object."""

    kind: Outcome
    status: int | None
    """Of the C-STORE response; None = there was none."""
    reason: str
    """Free of PHI."""
    scope: Scope = Scope.OBJECT


@dataclass(frozen=True, slots=True)
class EchoOutcome:
    """What became of a C-ECHO."""

    ok: bool
    reason: str


class Sender:
    """One thread sends; another may `close`, which cuts short what is under way."""

    def __init__(self, calling_ae_title: str, time_outs: TimeOuts | None = None) -> None:
        self._calling, self._time_outs = calling_ae_title, time_outs or TimeOuts()
        self._association: Association | None = None
        self._opening: Association | None = None
        self._peer: tuple[str, str, int] = ("", "", 0)
        self._proposed: set[tuple[str, str]] = set()
        self._sent, self._used, self._at_work = 0, 0.0, False
        _config.STORE_SEND_CHUNKED_DATASET = True  # of pynetdicom: a path is sent as it is, not decoded and encoded

    def send_file(
        self, to: Destination, path: Path, *, batch: Iterable[tuple[str, str]] = (), urgent: bool = False
    ) -> SendOutcome:
        """C-STORE one Part 10 file. `batch`: (SOP Class, Transfer Syntax) of what else this association will carry."""
        try:
            meta = read_file_meta_info(path)
            wanted = (str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID))
        except (OSError, pydicom.errors.InvalidDicomError, AttributeError) as e:
            return SendOutcome(Outcome.DEAD, None, f"the object's file cannot be read ({type(e).__name__})")
        self._at_work = True
        try:
            used_before = self._is_open(to, {wanted})
            outcome = self._send(to, path, {wanted, *batch}, wanted, urgent)
            if used_before and self._association is None and outcome.status is None and outcome.kind is Outcome.RETRY:
                # The peer may have let go of an association that was idle: that is no failure of this object.
                outcome = self._send(to, path, {wanted, *batch}, wanted, urgent)
            return outcome
        finally:
            self._at_work = False

    def echo(self, to: Destination) -> EchoOutcome:
        """C-ECHO on an association of its own."""
        self.close()
        self._at_work = True
        try:
            failed = self._open(to, {(VERIFICATION, str(ImplicitVRLittleEndian))})
            if failed is not None or self._association is None:
                return EchoOutcome(False, failed.reason if failed else "no association")
            if not self._association.accepted_contexts:
                return EchoOutcome(False, "the association opens, but C-ECHO (Verification) is not offered there")
            try:
                answer = self._association.send_c_echo()
            except (RuntimeError, ValueError):
                answer = Dataset()
        finally:
            self._at_work = False
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
        """Release the association, if there is one; cut it, if it is at work in another thread."""
        association, self._association = self._association, None
        if self._at_work:
            for busy in (association, self._opening):
                _cut(busy)
        elif association is not None and association.is_established:
            association.release()

    # -- association

    def _is_open(self, to: Destination, wanted: set[tuple[str, str]]) -> bool:
        return (
            self._association is not None
            and self._association.is_established
            and self._sent < BATCH
            and self._peer == (to.ae_title, to.host, to.port)
            and wanted <= self._proposed
        )

    def _open(self, to: Destination, wanted: set[tuple[str, str]]) -> SendOutcome | None:
        """An association on which `wanted` was proposed; None = there is one now."""
        if self._is_open(to, wanted):
            return None
        if self._is_open(to, set()):  # open, but something new came: do not forget what it was opened for
            wanted = wanted | self._proposed
        self._release()
        started = time.monotonic()
        connected = False

        def on_open(event: Any) -> None:
            nonlocal connected
            connected = True
            self._opening = event.assoc
            raw = event.assoc.dul.socket.socket
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.settimeout(self._time_outs.respond)  # pynetdicom waits for ever on a peer that stops reading

        try:
            association = self._associate(to, wanted, on_open)
        except ConfigError as e:
            return SendOutcome(Outcome.PAUSE, None, str(e), Scope.DESTINATION)
        except OSError as e:
            text = f"{to.host} cannot be resolved or reached ({e.strerror or type(e).__name__})"
            return SendOutcome(Outcome.RETRY, None, text, Scope.DESTINATION)
        finally:
            self._opening = None
        nothing_taken = association.acceptor.primitive is not None and not association.is_rejected
        if not association.is_established and not nothing_taken:
            seconds = time.monotonic() - started
            refusal = rejected(association, self._calling) or diagnose(
                to, connected=connected, seconds=seconds, connect_seconds=self._time_outs.connect
            )
            kind = Outcome.PAUSE if refusal.permanent else Outcome.RETRY
            return SendOutcome(kind, None, refusal.reason, Scope.DESTINATION)
        self._association, self._peer, self._proposed = association, (to.ae_title, to.host, to.port), wanted
        self._sent, self._used = 0, time.monotonic()
        return None

    def _associate(self, to: Destination, wanted: set[tuple[str, str]], on_open: Any) -> Association:
        ae = AE(self._calling)
        ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.connection_timeout, ae.acse_timeout = self._time_outs.connect, self._time_outs.associate
        ae.dimse_timeout = ae.network_timeout = self._time_outs.respond
        contexts = []
        for sop_class in sorted({c for c, _ in wanted}):
            contexts.append(build_context(sop_class, list(UNCOMPRESSED)))
            # A context of its own: in a shared one the peer would choose, and might choose against what we hold.
            compressed = sorted({t for c, t in wanted if c == sop_class and t not in UNCOMPRESSED})
            contexts += [build_context(sop_class, [syntax]) for syntax in compressed]
        return ae.associate(
            to.host,
            to.port,
            contexts,
            ae_title=to.ae_title,
            tls_args=(client_context(to.tls), to.host) if to.tls is not None else None,
            evt_handlers=[(evt.EVT_CONN_OPEN, on_open)],
        )

    def _release(self) -> None:
        association, self._association = self._association, None
        if association is not None and association.is_established:
            association.release()

    # -- C-STORE

    def _send(
        self, to: Destination, path: Path, proposed: set[tuple[str, str]], wanted: tuple[str, str], urgent: bool
    ) -> SendOutcome:
        failed = self._open(to, proposed)
        association = self._association
        if failed is not None or association is None:
            return failed or SendOutcome(Outcome.RETRY, None, "closed", Scope.DESTINATION)
        sop_class, syntax = wanted
        accepted = {c.transfer_syntax[0] for c in association.accepted_contexts if c.abstract_syntax == sop_class}
        if not accepted:
            text = f"the peer takes no {UID(sop_class).name}"
            return SendOutcome(Outcome.PAUSE, None, text, Scope.SOP_CLASS)
        if syntax in accepted:
            return self._store(association, path, path, urgent)
        if accepted.isdisjoint(UNCOMPRESSED):
            text = f"the peer takes {UID(sop_class).name} in no transfer syntax we can send"
            return SendOutcome(Outcome.PAUSE, None, text, Scope.SOP_CLASS)
        try:
            dataset = _uncompressed(path)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, LookupError) as e:
            text = f"the peer takes it only uncompressed, and it cannot be decompressed ({type(e).__name__})"
            return SendOutcome(Outcome.DEAD, None, text)
        return self._store(association, dataset, path, urgent)

    def _store(self, association: Association, what: Path | Dataset, path: Path, urgent: bool) -> SendOutcome:
        patience = self._time_outs.respond + path.stat().st_size / SLOWEST_BYTES_PER_SECOND
        association.dimse_timeout = patience
        started = time.monotonic()
        try:
            _acknowledge_at_once(association)
            answer = association.send_c_store(what, msg_id=self._sent + 1, priority=HIGH if urgent else MEDIUM)
        except (RuntimeError, OSError) as e:
            answer, text = Dataset(), f"the association broke ({type(e).__name__})"
        except (ValueError, AttributeError) as e:  # our own object: it would be so at every peer
            return SendOutcome(Outcome.DEAD, None, f"the object cannot be encoded ({type(e).__name__})")
        else:
            late = time.monotonic() - started >= patience
            text = f"no answer within {patience:.0f} s" if late else "aborted or closed by the peer in the transfer"
        self._sent, self._used = self._sent + 1, time.monotonic()
        if "Status" not in answer:  # time-out or abort: pynetdicom returns an empty data set
            self._association = None
            association.abort()
            return SendOutcome(Outcome.RETRY, None, text)
        status = int(answer.Status)
        kind = classify(status)
        return SendOutcome(kind, status, _said(status), _scope(kind, status))


NOT_AUTHORISED = (0x0124, 0x0214)


def _scope(kind: Outcome, status: int) -> Scope:
    if kind is not Outcome.PAUSE:
        return Scope.OBJECT
    return Scope.DESTINATION if status in NOT_AUTHORISED else Scope.SOP_CLASS


def _said(status: int) -> str:
    return "" if status == 0 else f"C-STORE answered with 0x{status:04X}"


def _uncompressed(path: Path) -> Dataset:
    """The data set in an uncompressed syntax, same UIDs; our captures are RLE Lossless, so nothing is lost."""
    dataset = pydicom.dcmread(path)
    if UID(dataset.file_meta.TransferSyntaxUID).is_compressed:
        dataset.decompress(generate_instance_uid=False)
    return dataset


def _acknowledge_at_once(association: Association) -> None:
    """A peer with Nagle on holds its response back until we acknowledge: do that at once (Linux)."""
    transport = association.dul.socket
    if TCP_QUICKACK is not None and transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)


def _cut(association: Association | None) -> None:
    transport = association.dul.socket if association is not None else None
    if transport is not None and transport.socket is not None:
        with contextlib.suppress(OSError):
            transport.socket.shutdown(socket.SHUT_RDWR)

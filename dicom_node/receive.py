"""Receive: the first stage. An instance comes by C-STORE, is validated, made durable, and only then acknowledged.

The listener is its own process and knows files only; the ledger belongs to the stages process, which finds the files by
itself. What is sent over the `Link` are hints, counts and words for the operator, never something the line depends on.

    0x0000 leaves after: bytes written as received -> validated -> fsync(file) -> rename -> fsync(folder)

A refusal names its reason in Status, Error Comment and Offending Element, and leaves no file in `incoming/`; what could
not be understood is kept in quarantine. Nothing said to a peer, to the log or to the link describes a patient.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dicom_node import errors
from dicom_node.config import Receive, Store
from dicom_node.dimse.admission import Rejection
from dicom_node.dimse.notification import (
    Availability,
    Commitment,
    NotificationSink,
    availability_of,
    commitment_sink,
)
from dicom_node.dimse.seam import Association, Sink, StoreRequest, StoreResponse
from dicom_node.dimse.server import Server
from dicom_node.dimse.status import PROCESSING_FAILURE
from dicom_node.dimse.tls import ReloadingContext, server_context
from dicom_node.log import Log
from dicom_node.metrics import Deltas, known
from dicom_node.store.files import Files, PartFile, RootLock, Watermark, lock_root
from dicom_node.store.part10 import FileMeta
from dicom_node.store.validate import check_command, check_data_set

MAX_INCOMING = 10_000
"""Acknowledged files the index has not taken yet. More, and it is not keeping up: the peers shall wait."""
HEARTBEAT_SECONDS = 1.0
ROOM_SECONDS = 0.5
"""How long an answer to "is there room?" holds."""


class Link(Protocol):
    """The way to the stages process. Never waits long; drops what cannot be sent."""

    def send(self, message: dict[str, Any]) -> None:
        """One JSON-able message."""


class Room:
    """May another instance come in? Asks the disk and the index, not more often than every `ROOM_SECONDS`."""

    def __init__(self, files: Files, watermark: Watermark, max_incoming: int = MAX_INCOMING) -> None:
        self._files, self._watermark, self._max_incoming = files, watermark, max_incoming
        self._lock = threading.Lock()
        self._asked = float("-inf")
        self._reason = ""

    def check(self) -> None:
        """Raises OutOfResourcesError: the peer sends again later, and we recover by ourselves."""
        with self._lock:
            now = time.monotonic()
            if now - self._asked >= ROOM_SECONDS:
                self._asked, self._reason = now, self._ask()
            if self._reason:
                raise errors.OutOfResourcesError(self._reason)

    def _ask(self) -> str:
        try:
            if self._watermark.is_low():
                return "disk is low; send again later"
            if self._files.count_incoming() >= self._max_incoming:
                return "indexing is behind; send again later"
        except OSError:
            return "storage does not answer; send again later"
        return ""


class Reports:
    """Says a thing once for each peer and reason, then at every tenfold: no flood of strangers in log or ledger."""

    MAX_KEYS = 1000
    MAX_PER_MINUTE = 60

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}
        self._minute, self._said = 0, 0

    def due(self, peer: str, reason: str) -> int:
        """How often this happened, if it is time to say so; else 0."""
        with self._lock:
            key = (peer, reason)
            count = self._counts.pop(key, 0) + 1
            self._counts[key] = count  # the newest stands last
            if len(self._counts) > self.MAX_KEYS:
                del self._counts[next(iter(self._counts))]
            minute = int(time.monotonic() // 60)
            if minute != self._minute:
                self._minute, self._said = minute, 0
            if str(count).strip("0") != "1" or self._said >= self.MAX_PER_MINUTE:
                return 0
            self._said += 1
            return count


@dataclass(slots=True)
class _Tally:
    stored: int = 0
    refused: int = 0
    stored_bytes: int = 0


class StorageReceiver:
    """What the transport tells and asks (`dimse/seam.py`), turned into files, counts and words."""

    def __init__(self, config: Receive, files: Files, room: Room, link: Link, log: Log, deltas: Deltas) -> None:
        self.files, self.room, self.link, self.log, self.deltas = files, room, link, log, deltas
        self.max_bytes = config.max_instance_mb * 1_000_000
        self._configured = frozenset(peer.ae_title for peer in config.allow)
        self._reports = Reports()
        self._lock = threading.Lock()
        self._tallies: dict[str, _Tally] = {}

    def opened(self, association: Association, rejected_contexts: list[tuple[str, int]]) -> None:
        """See seam.Receiver."""
        with self._lock:
            self._tallies[association.association_id] = _Tally()
            count = len(self._tallies)
        label = self.label(association)
        self.deltas.inc("dicom_node_associations_accepted_total", calling_ae=label)
        self.deltas.set("dicom_node_associations_open", count)
        self.log.info("association_opened", association=association.association_id, **_names(association))
        self.link.send(
            {
                "kind": "association_opened",
                "id": association.association_id,
                "calling_ae": association.calling_ae_title,
                "called_ae": association.called_ae_title,
                "peer": association.peer,
            }
        )
        for abstract_syntax, result in rejected_contexts:
            reason = "transfer_syntax" if result == 4 else "abstract_syntax"
            self.deltas.inc("dicom_node_contexts_rejected_total", calling_ae=label, reason=reason)
            what = "none of its transfer syntaxes is" if result == 4 else "it is not"
            self.report(
                association.peer,
                f"context:{abstract_syntax[:64]}:{result}",
                "CONTEXT_REJECTED",
                f"{association.calling_ae_title} offered {abstract_syntax[:64]}: {what} accepted here",
            )

    def begin(self, request: StoreRequest) -> Sink:
        """See seam.Receiver."""
        return _InstanceSink(self, request)

    def notify(self, request: StoreRequest) -> Sink:
        """See seam.Receiver."""

        def told(said: Availability) -> None:
            self.deltas.inc("dicom_node_notifications_total", calling_ae=self.label(request.association))
            instances = list(said.sop_instance_uids)
            self.link.send({"kind": "available", "study": said.study_instance_uid, "instances": instances})

        return NotificationSink(request.transfer_syntax_uid, availability_of, told)

    def commitment(self, request: StoreRequest) -> Sink:
        """See seam.Receiver. This node asks for no commitment itself; who reports one is heard, and counted."""

        def told(said: Commitment) -> None:
            association = request.association
            label = self.label(association)
            self.deltas.inc("dicom_node_commitments_total", said.committed, calling_ae=label, outcome="committed")
            self.deltas.inc("dicom_node_commitments_total", said.failed, calling_ae=label, outcome="failed")
            if said.failed:
                text = f"{association.calling_ae_title} does not answer for instances it was sent ({said.failed})"
                self.report(association.peer, "commitment", "COMMITMENT_FAILED", text)

        return commitment_sink(request, told)

    def closed(self, association: Association, *, released: bool) -> None:
        """See seam.Receiver."""
        with self._lock:
            tally = self._tallies.pop(association.association_id, _Tally())
            count = len(self._tallies)
        self.deltas.set("dicom_node_associations_open", count)
        if not released:
            self.deltas.inc("dicom_node_associations_aborted_total", calling_ae=self.label(association))
        self.log.info(
            "association_closed",
            association=association.association_id,
            released=released,
            stored=tally.stored,
            refused=tally.refused,
            stored_bytes=tally.stored_bytes,
            **_names(association),
        )
        self.link.send({"kind": "association_closed", "id": association.association_id})

    def rejected(self, rejection: Rejection, peer: str, calling: str, called: str) -> None:
        """See seam.Receiver."""
        self.deltas.inc("dicom_node_associations_rejected_total", reason=rejection.reason)
        text = f"association of {calling!r} at {peer} with {called!r} rejected: {rejection.reason}"
        self.report(peer, f"rejected:{rejection.reason}", "ASSOCIATION_REJECTED", text)

    def dropped(self, reason: str, peer: str) -> None:
        """See seam.Receiver."""
        self.deltas.inc("dicom_node_associations_rejected_total", reason=reason)
        self.report(peer, f"dropped:{reason}", "CONNECTION_DROPPED", f"connection of {peer} cut: {reason}")

    def lingered(self, peer: str) -> None:  # noqa: ARG002  no label names a stranger, and nobody needs to act
        """See seam.Receiver."""
        self.deltas.inc("dicom_node_connections_lingering_total")

    def stored(self, request: StoreRequest, instance_id: str, size: int, seconds: float) -> None:
        """An instance is durable and will be acknowledged now."""
        association = request.association
        label = self.label(association)
        self.deltas.inc("dicom_node_instances_received_total", calling_ae=label)
        self.deltas.inc("dicom_node_received_bytes_total", size, calling_ae=label)
        self.deltas.observe("dicom_node_store_seconds", seconds)
        with self._lock:
            tally = self._tallies.setdefault(association.association_id, _Tally())
            tally.stored += 1
            tally.stored_bytes += size
        self.link.send({"kind": "stored", "id": instance_id, "association": association.association_id})

    def refused(self, request: StoreRequest, status: int, reason: str) -> None:
        """An instance is refused. A scanner will send it again and again: the operator must hear of it, once."""
        association = request.association
        code = f"{status:04X}"
        self.deltas.inc("dicom_node_instances_refused_total", calling_ae=self.label(association), status=code)
        with self._lock:
            self._tallies.setdefault(association.association_id, _Tally()).refused += 1
        text = f"{association.calling_ae_title} at {association.peer}: instance refused with 0x{code}: {reason}"
        self.report(association.peer, f"refused:{code}:{reason}", "INSTANCE_REFUSED", text)

    def report(self, peer: str, key: str, code: str, text: str) -> None:
        """To the log and the ledger's events, if it is due."""
        count = self._reports.due(peer, key)
        if count:
            self.log.warning(code.lower(), peer=peer, text=text, count=count)
            more = f" ({count} times so far)" if count > 1 else ""
            self.link.send({"kind": "event", "code": code, "peer": peer, "text": text + more})

    def label(self, association: Association) -> str:
        """Metrics label of the peer."""
        return known(association.calling_ae_title, self._configured)


def _names(association: Association) -> dict[str, str]:
    return {
        "calling_ae": association.calling_ae_title,
        "called_ae": association.called_ae_title,
        "peer": association.peer,
    }


class _InstanceSink:
    """One instance on its way into `incoming/` (`seam.Sink`)."""

    def __init__(self, receiver: StorageReceiver, request: StoreRequest) -> None:
        self._receiver, self._request = receiver, request
        self._size = 0
        self._part: PartFile | None = None
        self._refusal: errors.ReceiveError | None = None
        association = request.association
        try:
            check_command(request.sop_class_uid, request.sop_instance_uid)
            receiver.room.check()
            self._part = receiver.files.new_part(
                FileMeta(
                    sop_class_uid=request.sop_class_uid,
                    sop_instance_uid=request.sop_instance_uid,
                    transfer_syntax_uid=request.transfer_syntax_uid,
                    calling_ae_title=association.calling_ae_title,
                    called_ae_title=association.called_ae_title,
                    peer=association.peer,
                    association_id=association.association_id,
                    received_at=time.time(),
                )
            )
        except errors.ReceiveError as e:
            self._refusal = e
        except errors.StoreError as e:
            self._fail(e)

    def write(self, data: memoryview) -> None:
        """See seam.Sink."""
        self._size += len(data)
        if self._size > self._receiver.max_bytes:
            self.abandon()
            refusal = errors.TooLargeError()
            self._receiver.refused(self._request, refusal.status, str(refusal))
            raise refusal
        if self._part is not None:
            try:
                self._part.write(data)
            except errors.StoreError as e:
                self._fail(e)

    def finish(self) -> StoreResponse:
        """See seam.Sink."""
        began = time.monotonic()
        try:
            instance_id = self._store()
        except errors.ReceiveError as e:
            return self._refuse(e.status, str(e), e.offending_element)
        except errors.StoreError as e:
            self._fail(e)
            return self._refuse(errors.OutOfResourcesError.status, "storage does not answer; send again later", None)
        except Exception as e:  # noqa: BLE001  the request handler: whatever it is, no file stays, and the peer is told
            self._receiver.log.error("request_handler_failed", error=type(e).__name__)
            return self._refuse(PROCESSING_FAILURE, "processing failure", None)
        finally:
            self.abandon()
        self._receiver.stored(self._request, instance_id, self._size, time.monotonic() - began)
        return StoreResponse(0x0000)

    def abandon(self) -> None:
        """See seam.Sink."""
        part, self._part = self._part, None
        if part is not None:
            part.discard()

    def _store(self) -> str:
        if self._refusal is not None:
            raise self._refusal
        part = self._part
        if part is None:  # a request handler's own fault; answered as one
            raise RuntimeError("no file to store")
        try:
            check_data_set(part.fd, part.meta)
        except errors.ReceiveError as e:
            self._part = None
            if self._receiver.files.quarantine(part.release(), str(e)) is not None:
                self._receiver.deltas.inc("dicom_node_quarantined_total")
            raise
        part.commit(time.time())
        self._part = None
        return part.instance_id

    def _fail(self, error: errors.StoreError) -> None:
        """The file system refused (ENOSPC, EIO). Never tried again on this file: after EIO a second fsync may lie."""
        self._part = None
        self._refusal = errors.OutOfResourcesError("storage does not answer; send again later")
        self._receiver.log.error("store_failed", reason=str(error))
        self._receiver.report("", f"store:{error}", "STORE_FAILED", str(error))

    def _refuse(self, status: int, reason: str, offending_element: int | None) -> StoreResponse:
        self._receiver.refused(self._request, status, reason)
        return StoreResponse(status, reason, offending_element)


class Listener:
    """The listener process: `start`, `serve_forever` or whatever the caller waits for, `stop`."""

    def __init__(
        self,
        config: Receive,
        store: Store,
        link: Link,
        log: Log,
        deltas: Deltas | None = None,
        *,
        room: Callable[[Files], Room] | None = None,
    ) -> None:
        self._config, self._store, self._link, self._log = config, store, link, log
        self._deltas = deltas if deltas is not None else Deltas()
        self._make_room = room or (lambda files: Room(files, Watermark(store.root, store.min_free_gb)))
        self._server: Server | None = None
        self._files: Files | None = None
        self._lock: RootLock | None = None
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._address: tuple[str, int] = (config.host, config.port)

    def start(self) -> tuple[str, int]:
        """Listen. Returns the bound address. Raises RootInUseError, ConfigError (TLS files), OSError (the port)."""
        self._lock = lock_root(self._store.root, "listen")
        # What it has to say of a peer we count and report ourselves, bounded; its errors come once for each bad packet.
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
        try:
            files = self._files = Files(self._store.root, self._store.fallback_charset or "")
            files.hold_incoming()
            swept = files.sweep_parts()
            receiver = StorageReceiver(self._config, files, self._make_room(files), self._link, self._log, self._deltas)
            self._server = Server(self._config, receiver, self._tls())
            self._address = self._server.start()
        except BaseException:
            self._lock.close()
            raise
        self._log.info("listening", ae_title=self._config.ae_title, port=self._address[1], parts_removed=swept)
        self._say_listening()
        self._heartbeat.start()
        return self._address

    def serve_forever(self) -> None:
        """Until `stop` is called, from a signal handler or another thread."""
        self._stop.wait()

    def stop(self, grace: float = 10.0) -> None:
        """Refuse new associations, answer what is in hand, abort the rest. Safe to call twice."""
        self._stop.set()
        if self._server is not None:
            self._server.stop(grace)
            self._server = None
            self._send_counts()
        if self._files is not None:
            self._files.let_go()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _tls(self) -> Callable[[], Any] | None:
        if self._config.tls is None:
            return None

        def failed(error: errors.ConfigError) -> None:
            self._log.error("certificate_not_loaded", key=error.key)

        return ReloadingContext(self._config.tls, server_context, failed).get

    def _say_listening(self) -> None:
        self._link.send({"kind": "listening", "address": list(self._address), "ae_title": self._config.ae_title})

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # Said again and again, because the stages process may come and go while we stay.
            self._say_listening()
            if self._server is not None:
                self._link.send({"kind": "associations", "open": self._server.open_associations})
            self._send_counts()

    def _send_counts(self) -> None:
        deltas = self._deltas.drain()
        if deltas:
            self._link.send({"kind": "metrics", "deltas": deltas})

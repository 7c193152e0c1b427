"""A small PACS that receives: for the demo, for engine authors' tests and those of destinations. Not durable.

`with ReceivingPacs(folder, ae_title="PACS") as pacs:` listens on a free loopback port; `pacs.received` lists what came.
`behaviour` scripts what a real PACS does on a bad day.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.presentation import StoragePresentationContexts

from dicom_node.dimse.sender import VERIFICATION

UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)


@dataclass(frozen=True, slots=True)
class Received:
    """One C-STORE whose object was kept."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    modality: str
    transfer_syntax_uid: str
    sha256: str
    """Of the encoded data set."""
    status: int
    calling_ae_title: str
    path: Path
    at: float
    """Seconds since the epoch."""


@dataclass
class Behaviour:
    """What to do instead of storing. Change it while the PACS runs; only the last two are read at its start."""

    status: Callable[[str], int] = lambda _sop_class: 0x0000
    """C-STORE status by SOP Class UID."""
    delay_seconds: float = 0.0
    abort: bool = False
    """A-ABORT instead of a C-STORE response."""
    silent: bool = False
    """No C-STORE response at all, until the PACS stops."""
    cut_after_bytes: int | None = None
    """The connection ends after so many bytes of P-DATA, in the middle of an object."""
    known_callers: list[str] = field(default_factory=list)
    """[] = everybody."""
    transfer_syntaxes: Sequence[str] = (*UNCOMPRESSED, RLELossless)
    sop_classes: Sequence[str] | None = None
    """None = the Storage SOP Classes."""


class ReceivingPacs:
    """Stores what it accepts under names of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "PACS",
        port: int = 0,
        behaviour: Behaviour | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.folder = folder
        self.behaviour = behaviour or Behaviour()
        self._ae_title, self.port, self._tls = ae_title, port, tls
        self._received: list[Received] = []
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._stopping = threading.Event()
        self._ae: Any = None
        self._server: Any = None

    @property
    def received(self) -> list[Received]:
        """What was stored, in order; a repeated send counts again."""
        with self._lock:
            return list(self._received)

    @property
    def asked(self) -> Counter[str]:
        """How often each SOP Instance UID was sent, whatever became of it; "" counts the associations asked for."""
        with self._lock:
            return Counter(self._asked)

    def __enter__(self) -> ReceivingPacs:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; `port` says where."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stopping.clear()
        self._ae = AE(self._ae_title)
        self._ae.maximum_associations = 32
        offered = self.behaviour.sop_classes
        if offered is None:
            offered = [str(context.abstract_syntax) for context in StoragePresentationContexts]
        for sop_class in offered:
            self._ae.add_supported_context(sop_class, list(self.behaviour.transfer_syntaxes))
        self._ae.add_supported_context(VERIFICATION)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_PDU_RECV, self._pdu),
            (evt.EVT_C_STORE, self._store),
        ]
        address = ("127.0.0.1", self.port)
        self._server = self._ae.start_server(address, block=False, evt_handlers=handlers, ssl_context=self._tls)
        self.port = int(self._server.socket.getsockname()[1])

    def stop(self) -> None:
        """Close the port and every association."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _opened(self, event: Any) -> None:
        with self._lock:
            self._asked[""] += 1
        event.assoc.bytes_seen = 0
        self._ae.require_calling_aet = self.behaviour.known_callers  # looked at when the A-ASSOCIATE-RQ comes

    def _pdu(self, event: Any) -> None:
        limit = self.behaviour.cut_after_bytes
        if limit is None or not isinstance(event.pdu, P_DATA_TF):
            return
        event.assoc.bytes_seen += event.pdu.pdu_length
        if event.assoc.bytes_seen >= limit:
            with suppress(OSError):
                event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    def _store(self, event: Any) -> int:
        behaviour = self.behaviour
        data, dataset = event.request.DataSet.getvalue(), event.dataset
        with self._lock:
            self._asked[str(dataset.SOPInstanceUID)] += 1
        self._stopping.wait(behaviour.delay_seconds)
        if behaviour.silent:
            self._stopping.wait()
        if behaviour.abort or behaviour.silent:
            event.assoc.abort()
            return 0xC000
        status = behaviour.status(str(dataset.SOPClassUID))
        if status != 0 and status >> 12 != 0xB:
            return status
        with self._lock:
            path = self._free_name()
            path.write_bytes(event.encoded_dataset())
            self._received.append(
                Received(
                    str(dataset.SOPClassUID),
                    str(dataset.SOPInstanceUID),
                    str(dataset.StudyInstanceUID),
                    str(dataset.get("Modality", "")),
                    str(event.context.transfer_syntax),
                    hashlib.sha256(data).hexdigest(),
                    status,
                    event.assoc.requestor.ae_title.strip(),
                    path,
                    time.time(),
                )
            )
        return status

    def _free_name(self) -> Path:
        """Counted, so that no name comes from the wire; what an earlier run left in the folder stays."""
        paths = (self.folder / f"{number:05d}.dcm" for number in self._numbers)
        return next(path for path in paths if not path.exists())

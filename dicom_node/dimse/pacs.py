"""A small PACS that receives: for the demo, for engine authors' tests and those of destinations. Not durable.

`with ReceivingPacs(folder, ae_title="PACS") as pacs:` listens on a free loopback port; `pacs.received` lists what came.
`behaviour` scripts what a real PACS does on a bad day.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.presentation import StoragePresentationContexts

from dicom_node.dimse.sender import VERIFICATION


@dataclass(frozen=True, slots=True)
class Received:
    """One C-STORE that was answered."""

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
    """What to do instead of storing. Change it while the PACS runs."""

    status: Callable[[str], int] = lambda _sop_class: 0x0000
    """C-STORE status by SOP Class UID."""
    delay_seconds: float = 0.0
    abort: bool = False
    known_callers: list[str] = field(default_factory=list)
    """[] = everybody."""
    uncompressed_only: bool = False


class ReceivingPacs:
    """Stores what it accepts under names of its own."""

    def __init__(
        self, folder: Path, *, ae_title: str = "PACS", port: int = 0, behaviour: Behaviour | None = None
    ) -> None:
        self.folder = folder
        self.behaviour = behaviour or Behaviour()
        self._ae_title, self.port = ae_title, port
        self._received: list[Received] = []
        self._lock = threading.Lock()
        self._server: Any = None

    @property
    def received(self) -> list[Received]:
        """What was stored, in order; a repeated send counts again."""
        with self._lock:
            return list(self._received)

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
        ae = AE(self._ae_title)
        ae.maximum_associations = 32
        syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
        if not self.behaviour.uncompressed_only:
            syntaxes.append(RLELossless)
        for context in StoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), syntaxes)
        ae.add_supported_context(VERIFICATION)
        ae.require_calling_aet = self.behaviour.known_callers
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store)]
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        self.port = int(self._server.socket.getsockname()[1])

    def stop(self) -> None:
        """Close the port and every association."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _store(self, event: Any) -> int:
        behaviour = self.behaviour
        time.sleep(behaviour.delay_seconds)
        if behaviour.abort:
            event.assoc.abort()
            return 0xC000
        data, dataset = event.request.DataSet.getvalue(), event.dataset
        status = behaviour.status(str(dataset.SOPClassUID))
        if status != 0 and status >> 12 != 0xB:
            return status
        with self._lock:
            path = self.folder / f"{len(self._received) + 1:05d}.dcm"
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

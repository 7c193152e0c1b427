"""Associations that the node asks for: pynetdicom's, with one race in it closed.

pynetdicom's association has a thread that takes whatever messages come. Before a request it is paused, but the flag
that says so is taken back only some time after the pause has ended: if the next request is made meanwhile, thread and
requester both wait for the response. The thread takes one now and then, drops it ("Received unexpected C-STORE service
message"), and the requester waits for its time-out (3.0.4; one of some thousand C-STORE on a busy machine).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from dicom_node.config import Tls
from dicom_node.dimse.tls import client_context


class Peer(Protocol):
    """Where an association is to go."""

    @property
    def ae_title(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def tls(self) -> Tls | None: ...


def associate(
    ae: AE, peer: Peer, contexts: list[PresentationContext], handlers: Sequence[tuple[Any, Any]] = ()
) -> Association:
    """As `AE.associate`. Raises ConfigError when the peer's certificates cannot be read."""
    tls = (client_context(peer.tls), peer.host) if peer.tls is not None else None
    return ae.associate(
        peer.host,
        peer.port,
        contexts,
        ae_title=peer.ae_title,
        tls_args=tls,
        evt_handlers=[(evt.EVT_CONN_OPEN, _close_the_race), *handlers],
    )


def _close_the_race(event: evt.Event) -> None:
    """Connected: pynetdicom's thread does not look for messages before the association is accepted."""
    event.assoc._reactor_checkpoint = _Checkpoint(event.assoc)


class _Checkpoint(threading.Event):
    """Where pynetdicom's thread pauses while it is cleared. To go on and to say so is one step here."""

    def __init__(self, association: Association) -> None:
        super().__init__()
        self._association, self._mutex = association, threading.Lock()
        self.set()

    def clear(self) -> None:
        """From now on the thread is paused, or says that it is not."""
        with self._mutex:
            super().clear()

    def wait(self, timeout: float | None = None) -> bool:
        while super().wait(timeout):
            with self._mutex:
                if self.is_set():
                    self._association._is_paused = False
                    return True
        return False

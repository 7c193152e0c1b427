"""The Storage SCP's port: accepts connections and gives each a thread; knows which are open, and ends them in order.

The accept loop only accepts. TLS handshake, A-ASSOCIATE-RQ and everything after happen in the connection's own thread
(`association.py`), under deadlines and under the bounds of `admission.py`, so a silent or slow peer costs one place and
no time of others. Nothing here knows files; see `seam.py`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable

from dicom_node.config import Receive
from dicom_node.dimse.admission import Admission, plain_address
from dicom_node.dimse.association import Port, StorageAssociation
from dicom_node.dimse.negotiation import Negotiator
from dicom_node.dimse.seam import Receiver

BACKLOG = 128


class Server:
    """`start`, then `stop`. `tls` hands out the context for each new connection; None = plain TCP."""

    def __init__(self, config: Receive, receiver: Receiver, tls: Callable[[], ssl.SSLContext] | None) -> None:
        self._config, self._receiver = config, receiver
        self._admission = Admission(config)
        self._port = Port(config, receiver, self._admission, Negotiator(config), tls)
        self._lock = threading.Lock()
        self._connections: set[StorageAssociation] = set()
        self._listening: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def open_associations(self) -> list[str]:
        """Ids of the associations open now."""
        return [c.info.association_id for c in self._all() if c.info is not None]

    def start(self) -> tuple[str, int]:
        """Bind and serve. Returns the address; the port is a free one where 0 was asked for. Raises OSError."""
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        listening = socket.create_server(
            (self._config.host, self._config.port),
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=self._config.host == "::" and socket.has_dualstack_ipv6(),
        )
        self._listening = listening
        self._thread = threading.Thread(target=self._accept_loop, args=(listening,), name="accept", daemon=True)
        self._thread.start()
        host, port = listening.getsockname()[:2]
        return str(host), int(port)

    def stop(self, grace: float = 10.0) -> None:
        """No new connections; messages in hand are answered within `grace` seconds; then everybody is cut."""
        self._stopping.set()
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._listening.close()
        if self._thread is not None:
            self._thread.join(5)
        for connection in self._all():
            connection.stop()
        self._wait_until_empty(grace)
        for connection in self._all():
            connection.cut()
        self._wait_until_empty(5.0)

    def _all(self) -> list[StorageAssociation]:
        with self._lock:
            return list(self._connections)

    def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._all() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _accept_loop(self, listening: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = listening.accept()
            except OSError:
                self._stopping.wait(0.1)  # out of file descriptors, or the peer was gone already: others may still come
                continue
            peer = plain_address(str(address[0]))
            if not self._admission.connecting(peer):
                self._receiver.dropped("too_many_connections", peer)
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock, peer), name="association", daemon=True).start()
            except RuntimeError:  # no more threads to be had
                self._admission.connected(peer)
                sock.close()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        connection = StorageAssociation(self._port, sock, peer)
        with self._lock:
            self._connections.add(connection)
        try:
            if self._stopping.is_set():
                connection.stop()
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)

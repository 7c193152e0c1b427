"""The Storage SCP's port: accepts connections, shakes hands, reads the association request, admits or rejects.

The accept loop only accepts. TLS handshake and A-ASSOCIATE-RQ happen in a thread of the connection, under a deadline
and under the bounds of `admission.py`, so a silent or slow peer costs one place and no time of others. An admitted
request becomes a `StorageAssociation`. Nothing here knows files; see `seam.py`.
"""

from __future__ import annotations

import contextlib
import copy
import select
import socket
import ssl
import struct
import threading
import time
import uuid
from collections.abc import Callable

from pynetdicom import AE, build_context
from pynetdicom.pdu import A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.presentation import PresentationContext

from dicom_node.config import Receive
from dicom_node.dimse.admission import Admission, Rejection, plain_address
from dicom_node.dimse.association import StorageAssociation
from dicom_node.dimse.contexts import accepted
from dicom_node.dimse.seam import Association, Receiver
from dicom_node.dimse.tls import subject_common_name
from dicom_node.dimse.upper_layer import ABORT_UNRECOGNISED, MAX_OTHER_PDU, PeerError, abort_pdu, drain, read_exactly
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

REQUEST_SECONDS = 10.0
"""From accepting the connection to its whole A-ASSOCIATE-RQ, the TLS handshake included."""
BACKLOG = 128

_MIN_REQUEST = 68
_DECODE_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    NotImplementedError,
    struct.error,
)


class Server:
    """`start`, then `stop`. `tls` hands out the context for each new connection; None = plain TCP."""

    def __init__(
        self,
        config: Receive,
        receiver: Receiver,
        tls: Callable[[], ssl.SSLContext] | None,
        *,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        self._config, self._receiver, self._tls = config, receiver, tls
        self._request_seconds = request_seconds
        self._admission = Admission(config)
        table = accepted(config.also_accept, availability=config.availability)
        self._contexts = {c.uid: build_context(c.uid, list(c.transfer_syntaxes)) for c in table}
        self._ae = AE(config.ae_title)
        self._ae.maximum_pdu_size = config.max_pdu
        self._ae.network_timeout = config.idle_timeout
        self._ae.maximum_associations = 1 << 30  # admission counts, with a reserve and by peer
        self._ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._lock = threading.Lock()
        self._open: dict[str, StorageAssociation] = {}
        self._listening: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def open_associations(self) -> list[str]:
        """Ids of the associations open now."""
        with self._lock:
            return list(self._open)

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
        """No new connections; messages in hand are answered within `grace` seconds; then everybody is aborted."""
        self._stopping.set()
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._listening.close()
        if self._thread is not None:
            self._thread.join(5)
        self._each(StorageAssociation.stop)
        self._wait_until_empty(grace)
        self._each(StorageAssociation.cut)
        self._wait_until_empty(5.0)

    def _each(self, action: Callable[[StorageAssociation], None]) -> None:
        with self._lock:
            associations = list(self._open.values())
        for association in associations:
            action(association)

    def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.open_associations and time.monotonic() < deadline:
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
                threading.Thread(target=self._connection, args=(sock, peer), name="connection", daemon=True).start()
            except RuntimeError:  # no more threads to be had
                self._admission.connected(peer)
                sock.close()

    def _connection(self, sock: socket.socket, peer: str) -> None:
        """From accepted to an association, or closed. Runs in a thread of its own, under one deadline."""
        association: StorageAssociation | None = None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = time.monotonic() + self._request_seconds
            sock = self._shake_hands(sock, deadline)
            association = self._request(sock, peer, deadline)
        except ssl.SSLError:
            self._receiver.dropped("tls_handshake_failed", peer)
        except TimeoutError:
            self._receiver.dropped("no_request_in_time", peer)
        except PeerError as e:
            self._receiver.dropped(str(e), peer)
        except OSError:
            pass  # connected and gone: a port scan, a probe of a load balancer
        finally:
            if association is None:
                sock.close()
            self._admission.connected(peer)
        if association is not None:
            try:
                association.start()
            except RuntimeError:
                sock.close()
                self._ended(association)

    def _shake_hands(self, sock: socket.socket, deadline: float) -> socket.socket:
        if self._tls is None:
            return sock
        secure = self._tls().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        secure.setblocking(False)
        try:
            while True:
                events = select.POLLIN
                try:
                    secure.do_handshake()
                    return secure
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
                poll = select.poll()
                poll.register(secure, events)
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise TimeoutError("no TLS handshake in time")
        except OSError:
            secure.close()
            raise

    def _request(self, sock: socket.socket, peer: str, deadline: float) -> StorageAssociation | None:
        """Read and judge the A-ASSOCIATE-RQ. None = rejected, and told so."""
        header = read_exactly(sock, 6, deadline)
        kind, length = struct.unpack(">BxL", header)
        if kind != 1 or not _MIN_REQUEST <= length <= MAX_OTHER_PDU:
            raise self._refusal(sock, "not_an_association_request")
        pdu = bytes(header + read_exactly(sock, length, deadline))
        request = A_ASSOCIATE_RQ()
        try:
            request.decode(pdu)
            primitive = request.to_primitive()
            calling, called = str(request.calling_ae_title).strip(), str(request.called_ae_title).strip()
            proposed = [str(c.abstract_syntax) for c in primitive.presentation_context_definition_list]
        except _DECODE_ERRORS:
            raise self._refusal(sock, "association_request_unreadable") from None
        if not request.protocol_version & 1:
            self._reject(sock, Rejection.PROTOCOL_VERSION, peer, calling, called)
            return None
        pdu = pdu[:6] + b"\x00\x01" + pdu[8:]  # only bit 0 is tested (PS3.8 table 9-11); the library wants no other set
        subject = subject_common_name(sock.getpeercert()) if isinstance(sock, ssl.SSLSocket) else None
        rejection = self._admission.admit(peer, calling, called, subject)
        if rejection is not None:
            self._reject(sock, rejection, peer, calling, called)
            return None
        info = Association(uuid.uuid4().hex, calling, called, peer)
        return self._associate(sock, info, pdu, proposed)

    def _associate(self, sock: socket.socket, info: Association, pdu: bytes, proposed: list[str]) -> StorageAssociation:
        contexts = [copy.deepcopy(self._contexts[uid]) for uid in dict.fromkeys(proposed) if uid in self._contexts]
        try:
            association = StorageAssociation(
                self._ae, info, sock, pdu, contexts or [_never()], self._receiver, self._ended
            )
        except OSError:
            self._admission.left(info.peer)
            raise
        with self._lock:
            self._open[info.association_id] = association
        return association

    def _refusal(self, sock: socket.socket, reason: str) -> PeerError:
        with contextlib.suppress(OSError):
            sock.settimeout(1.0)
            sock.sendall(abort_pdu(ABORT_UNRECOGNISED))
        drain(sock)
        return PeerError(reason)

    def _reject(self, sock: socket.socket, rejection: Rejection, peer: str, calling: str, called: str) -> None:
        self._receiver.rejected(rejection, peer, calling, called)
        pdu = A_ASSOCIATE_RJ()
        pdu.result, pdu.source, pdu.reason_diagnostic = rejection.value
        with contextlib.suppress(OSError):
            sock.settimeout(1.0)
            sock.sendall(bytes(pdu.encode()))
        drain(sock)

    def _ended(self, association: StorageAssociation) -> None:
        with self._lock:
            self._open.pop(association.info.association_id, None)
        self._admission.left(association.info.peer)


def _never() -> PresentationContext:
    """The library wants at least one supported context, also for a peer that proposes none of ours."""
    return build_context("1.2.840.10008.1.1")

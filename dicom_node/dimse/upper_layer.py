"""pynetdicom's DICOM upper layer (PS3.8 section 9) with what it lacks: bounds, deadlines, waiting instead of polling.

The library reads a PDU of any length, waits for one for ever, and looks for work a thousand times a second in each of
two threads. Here, by subclassing and per instance, so nothing of the library is patched: `BoundedSocket` caps the
length of each PDU type, gives each PDU a deadline and acknowledges at once; `UpperLayer` sleeps until the peer or we
have something to say, and hands P-DATA on without copying it five times.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu import A_ABORT_RQ
from pynetdicom.transport import AssociationSocket

MAX_OTHER_PDU = 64 * 1024
"""Everything but P-DATA-TF, the A-ASSOCIATE-RQ above all."""
PDATA_SLACK = 16
"""Some peers count a header into the maximum length, some out of it."""
ABORT_UNRECOGNISED, ABORT_INVALID_PARAMETER = 1, 6
"""Reasons of an A-ABORT by the service provider (PS3.8 table 9-26)."""

_WAIT = 0.5
_DRAIN_BYTES, _DRAIN_SECONDS = 1 << 20, 1.0


class PeerError(OSError):
    """The peer broke the protocol or a bound. An OSError: that is what the library ends an association for."""


def abort_pdu(reason: int) -> bytes:
    """A-ABORT by the service provider."""
    pdu = A_ABORT_RQ()
    pdu.source, pdu.reason_diagnostic = 2, reason
    return bytes(pdu.encode())


def read_exactly(sock: socket.socket, count: int, deadline: float) -> bytearray:
    """`count` bytes before `deadline` (monotonic). Raises OSError; TimeoutError when the peer is too slow."""
    buffer = bytearray(count)
    view, got = memoryview(buffer), 0
    while got < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the peer is too slow")
        sock.settimeout(left)
        n = sock.recv_into(view[got:])
        if not n:
            raise PeerError("connection_cut") if got else ConnectionResetError
        got += n
    _quick_ack(sock)
    return buffer


def wait_readable(descriptors: Iterable[int], seconds: float) -> set[int]:
    """Those that can be read, or have ended. By poll: select ends at descriptor 1023, a busy node does not."""
    poll = select.poll()
    for descriptor in descriptors:
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(seconds * 1000)}


def _quick_ack(sock: socket.socket) -> None:
    # Linux forgets the flag after a while. Without it a sender that leaves Nagle on (DCMTK's default) waits 40 ms for
    # our delayed acknowledgement with every message.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def drain(sock: socket.socket) -> None:
    """Say that nothing more comes, and throw away what the peer still sends: closing at once would reset the connection
    and lose our last PDU on its way. Not for ever, and not more than a megabyte."""
    deadline, total = time.monotonic() + _DRAIN_SECONDS, 0
    with contextlib.suppress(OSError, ValueError):
        sock.shutdown(socket.SHUT_WR)
        while total < _DRAIN_BYTES and (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            chunk = sock.recv(65536)
            if not chunk:
                return
            total += len(chunk)


class BoundedSocket(AssociationSocket):
    """Reads whole PDUs within bounds. The A-ASSOCIATE-RQ was read before there was an association: `first`."""

    def __init__(
        self,
        assoc: Association,
        sock: socket.socket,
        first: bytes,
        *,
        max_pdu: int,
        timeout: float,
        complain: Callable[[str], None],
    ) -> None:
        super().__init__(assoc, client_socket=sock)
        self._sock, self._first = sock, memoryview(first)
        self._max_pdu, self._timeout, self._complain = max_pdu, timeout, complain
        self._in_body = False

    @property
    def ready(self) -> bool:
        """There is something to read, or the end of it."""
        if self._first:
            return True
        if self.socket is None or not self._is_connected:
            return False
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return True
        return bool(wait_readable((self._sock.fileno(),), 0.0))

    def recv(self, nr_bytes: int) -> bytearray:
        """The library asks for the six bytes of a header, then for the length that stands there."""
        if self._first:
            head, self._first = self._first[:nr_bytes], self._first[nr_bytes:]
            return bytearray(head)
        deadline = time.monotonic() + self._timeout
        if self._in_body:
            self._in_body = False
            return read_exactly(self._sock, nr_bytes, deadline)
        header = read_exactly(self._sock, nr_bytes, deadline)
        self._check(header)
        return header

    def send(self, bytestream: bytes) -> None:
        """With the whole time-out: the last read left less of it."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(self._timeout)
        super().send(bytestream)

    def _check(self, header: bytearray) -> None:
        kind, length = struct.unpack(">BxL", header)
        if length > (self._max_pdu + PDATA_SLACK if kind == 4 else MAX_OTHER_PDU):
            self._complain("pdu_too_long")
            with contextlib.suppress(OSError):
                self._sock.settimeout(1.0)
                self._sock.sendall(abort_pdu(ABORT_INVALID_PARAMETER))
            raise PeerError("pdu_too_long")
        self._in_body = 1 <= kind <= 7


class DataTF:
    """P-DATA-TF parsed in place: context id, message control header and fragment of each PDV (PS3.8 9.3.5, annex E)."""

    __slots__ = ("values",)

    def __init__(self, pdu: bytearray) -> None:
        view, at, end = memoryview(pdu).toreadonly(), 6, len(pdu)
        self.values: list[tuple[int, int, memoryview]] = []
        while at < end:
            if end - at < 6:
                raise ValueError("PDV item cut short")
            length, context_id, control = struct.unpack_from(">LBB", pdu, at)
            if length < 2 or length > end - at - 4:
                raise ValueError("PDV item longer than its PDU")
            self.values.append((context_id, control, view[at + 6 : at + 4 + length]))
            at += 4 + length

    def to_primitive(self) -> DataTF:
        """The state machine hands this to the DIMSE provider."""
        return self


class _SignallingQueue(queue.Queue[Any]):
    """Wakes whoever waits for more than this queue."""

    def __init__(self, signal: Callable[[], None]) -> None:
        super().__init__()
        self._signal = signal

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._signal()


class UpperLayer(DULServiceProvider):
    """The state machine's thread: an idle association costs nothing, and an answer leaves at once."""

    def __init__(self, assoc: Association, work: threading.Event) -> None:
        super().__init__(assoc)
        self.daemon = True
        self._run_loop_delay = 0  # the waiting is done in _is_transport_event
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.to_user_queue = _SignallingQueue(work.set)
        self.to_provider_queue = _SignallingQueue(self.wake)

    def wake(self) -> None:
        """There is something to send, or to end."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """After the thread has ended."""
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def send_data(self, context_id: int, fragment: bytes, *, command: bool, last: bool) -> None:
        """One P-DATA-TF with one PDV, from this layer's own thread: DT-1 of PS3.8 table 9-8 without a queue between."""
        control = (1 if command else 0) | (2 if last else 0)
        head = struct.pack(">BxLLBB", 4, len(fragment) + 6, len(fragment) + 2, context_id, control)
        if self.socket is not None:
            self.socket.send(head + fragment)

    def busy_until_now(self) -> None:
        """The time we took to make an instance durable is not the peer's silence."""
        self._idle_timer.restart()

    def stop_dul(self) -> bool:
        """Called until it is true: ends the thread once the connection is closed."""
        if self.state_machine.current_state == "Sta1":
            self._kill_thread = True
        self.wake()
        self.join(_WAIT if self._kill_thread else 0.0)
        return not self.is_alive()

    def _process_recv_primitive(self) -> bool:
        # What already happened goes first, and what is asked of an association that is over (to abort it, say) is moot:
        # the library's state machine knows no such event and its thread would die.
        if not self.event_queue.empty():
            return False
        if self.state_machine.current_state in ("Sta1", "Sta13"):
            with contextlib.suppress(queue.Empty):
                self.to_provider_queue.get(block=False)
            return False
        return super()._process_recv_primitive()

    def _is_transport_event(self) -> bool:
        sock = self.socket.socket if self.socket is not None else None
        if self.state_machine.current_state == "Sta13" and self.socket is not None:
            if sock is not None:
                drain(sock)
            self.socket.close()
            return True
        if super()._is_transport_event():
            return True
        if not self.event_queue.empty():
            return False
        # Read at once when it is there: between two turns the library sleeps, and even a sleep of nothing gives the
        # processor away, on a busy machine for milliseconds.
        self._wait(sock)
        return super()._is_transport_event()

    def _wait(self, sock: socket.socket | None) -> None:
        if self._wake_fd in wait_readable((self._wake_fd, sock.fileno() if sock is not None else -1), _WAIT):
            os.eventfd_read(self._wake_fd)

    def _decode_pdu(self, bytestream: bytearray) -> tuple[Any, str]:
        if bytestream[0] == 4:
            return DataTF(bytestream), "Evt10"
        return super()._decode_pdu(bytestream)

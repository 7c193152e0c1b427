"""One association as SCP: pynetdicom's negotiation and responses over `upper_layer.py`; C-ECHO and C-STORE only.

The library collects a data set in memory, or in a temporary file that outlives a dead peer. Here fragments go
straight to a `Sink`; commands and messages in hand are bounded; a thread ends in exactly one place, where nothing is
left behind.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pynetdicom import AE, evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.association import Association as _Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.dimse.command import C_ECHO_RQ, C_STORE_RQ, Command, encode_response, parse_command
from dicom_node.dimse.seam import Association, Receiver, Sink, StoreRequest, StoreResponse
from dicom_node.dimse.status import ERROR_COMMENT_LENGTH, OUT_OF_RESOURCES, SUCCESS
from dicom_node.dimse.upper_layer import BoundedSocket, DataTF, PeerError, UpperLayer
from dicom_node.errors import TooLargeError

MAX_COMMAND = 64 * 1024
MAX_WAITING_MESSAGES = 8
"""Complete messages not answered yet. We negotiate no asynchronous operations (PS3.7 D.3.3.3), so 1 is what is due."""
MIN_BYTES_PER_SECOND = 1024
"""A message slower than this over a whole idle_timeout is a stall that pretends to be alive."""

_WAIT = 0.5
_NEGOTIATION_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(slots=True)
class _Message:
    """A message from its command to its answer."""

    context_id: int
    command: Command
    sink: Sink | None = None
    cut: StoreResponse | None = None
    """Answer this and abort: the peer sends more than we take."""


class _Messages(DIMSEServiceProvider):
    """Reassembles messages (PS3.7 6.3.1): commands in memory, data sets into a Sink as they come."""

    def __init__(self, assoc: StorageAssociation, timeout: float) -> None:
        super().__init__(assoc)
        self.waiting: deque[_Message] = deque()
        self._owner, self._timeout = assoc, timeout
        self._partial = bytearray()
        self._current: _Message | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._began = 0.0
        self._bytes = 0

    @property
    def busy(self) -> bool:
        """A data set is on its way in, or waits for its answer."""
        return self._current is not None or bool(self.waiting)

    def receive_primitive(self, primitive: Any) -> None:
        """Runs in the upper layer's thread, for each P-DATA-TF."""
        data: DataTF = primitive
        try:
            for context_id, control, fragment in data.values:
                if control & 1:
                    self._command(context_id, fragment, last=bool(control & 2))
                else:
                    self._data(context_id, fragment, last=bool(control & 2))
        except PeerError as e:
            self._owner.complain(str(e))
            self.abandon()
            self.dul.event_queue.put("Evt19")  # the state machine aborts

    def _command(self, context_id: int, fragment: memoryview, *, last: bool) -> None:
        if self._current is not None or len(self._partial) + len(fragment) > MAX_COMMAND:
            raise PeerError("command_out_of_place")
        self._partial += fragment
        if not last:
            return
        try:
            command = parse_command(bytes(self._partial))
        except ValueError:
            raise PeerError("command_unreadable") from None
        self._partial.clear()
        if len(self.waiting) >= MAX_WAITING_MESSAGES:
            raise PeerError("too_many_messages")
        message = _Message(context_id, command)
        if command.field == C_STORE_RQ:
            message.sink = self._owner.begin(context_id, command)
        elif command.field != C_ECHO_RQ or command.has_data_set:
            raise PeerError("operation_not_offered")
        if command.has_data_set:
            self._current, self._began, self._bytes = message, time.monotonic(), 0
        else:
            self._complete(message)

    def _data(self, context_id: int, fragment: memoryview, *, last: bool) -> None:
        message = self._current
        if message is None or message.context_id != context_id:
            raise PeerError("data_out_of_place")
        self._check_progress(len(fragment))
        with self._lock:
            if self._ended or message.sink is None:
                return  # what still comes of a message that was cut is thrown away
            try:
                message.sink.write(fragment)
            except TooLargeError as e:
                message.sink, message.cut = None, StoreResponse(OUT_OF_RESOURCES, str(e))
        if message.cut is not None:
            self._complete(message)
        elif last:
            self._current = None
            self._complete(message)

    def _check_progress(self, count: int) -> None:
        self._bytes += count
        took = time.monotonic() - self._began
        if took > self._timeout and self._bytes < took * MIN_BYTES_PER_SECOND:
            raise PeerError("message_too_slow")

    def _complete(self, message: _Message) -> None:
        self.waiting.append(message)
        self._owner.work.set()

    def abandon(self) -> None:
        """The association is over: every sink that was not finished cleans up. May be called twice."""
        with self._lock:
            self._ended = True
            unfinished = [*self.waiting, *([self._current] if self._current is not None else [])]
            self.waiting.clear()
            self._current = None
        for message in unfinished:
            sink, message.sink = message.sink, None
            if sink is not None:
                sink.abandon()


class StorageAssociation(_Association):
    """A thread that answers C-ECHO and C-STORE until the peer releases, aborts, goes silent, or breaks a rule."""

    def __init__(
        self,
        ae: AE,
        info: Association,
        sock: socket.socket,
        request: bytes,
        contexts: list[PresentationContext],
        receiver: Receiver,
        on_end: Callable[[StorageAssociation], None],
    ) -> None:
        self.work = threading.Event()
        super().__init__(ae, MODE_ACCEPTOR)
        self.info, self._receiver, self._on_end = info, receiver, on_end
        self._raw, self._stopping, self._opened = sock, False, False
        timeout = float(ae.network_timeout or 60)
        self.dul = self._layer = UpperLayer(self, self.work)
        self.dimse = self._messages = _Messages(self, timeout)
        self.acse_timeout, self.network_timeout = ae.acse_timeout, timeout  # again: they set the new layer's timers
        max_pdu = ae.maximum_pdu_size
        self.set_socket(BoundedSocket(self, sock, request, max_pdu=max_pdu, timeout=timeout, complain=self.complain))
        self.acceptor.maximum_length = max_pdu
        self.acceptor.ae_title = info.called_ae_title
        self.acceptor.address_info = AddressInformation.from_tuple(sock.getsockname())
        self.acceptor.implementation_class_uid = ae.implementation_class_uid
        self.acceptor.implementation_version_name = ae.implementation_version_name
        self.acceptor.supported_contexts = contexts
        self.requestor.address_info = AddressInformation.from_tuple(sock.getpeername())
        self.name = f"association-{info.association_id[:8]}"

    def run_reactor(self) -> None:
        """The thread: negotiate, serve, and leave nothing behind whatever happened."""
        try:
            super().run_reactor()
        except _NEGOTIATION_ERRORS:  # the library on a hostile request
            self.complain("negotiation_failed")
        finally:
            with contextlib.suppress(OSError):
                self._raw.settimeout(1.0)
            self.kill()
            with contextlib.suppress(OSError):
                self._raw.shutdown(socket.SHUT_RDWR)
            self._raw.close()
            self._layer.close()
            self._messages.abandon()
            if self._opened:
                self._receiver.closed(self.info, released=self.is_released)
            self._on_end(self)

    def _bind_defaults(self) -> None:
        # Without the library's logging handlers: they describe data sets.
        for event in evt._INTERVENTION_EVENTS:
            self.bind(event, evt.get_default_handler(event))

    def _run_reactor(self) -> None:
        self._opened = True
        self._receiver.opened(self.info, [(str(c.abstract_syntax), c.result or 0) for c in self.rejected_contexts])
        while not self._kill:
            self.work.wait(_WAIT)
            self.work.clear()
            while self._messages.waiting and not self._kill:
                self._answer(self._messages.waiting[0])
            if self._over():
                self.kill()

    def _over(self) -> bool:
        if self.acse.is_release_requested():
            self.acse.send_release(is_response=True)
            self.is_released, self.is_established = True, False
            return True
        if self.acse.is_aborted() or not self.dul.is_alive():
            self.is_aborted, self.is_established = True, False
            return True
        if self.dul.idle_timer_expired() and not self._stopping:
            self.complain("idle")
            self.abort(block=False)
            return True
        if self._stopping and not self._messages.busy:
            self.abort(block=False)
            return True
        return False

    def _answer(self, message: _Message) -> None:
        """One message; it leaves the queue only then, so that `busy` is true meanwhile."""
        if message.command.field == C_ECHO_RQ:
            self._respond(message, StoreResponse(SUCCESS))
        elif message.cut is not None:
            self._respond(message, message.cut)
            self.complain("instance_too_large")
            self.abort(block=False)
            self._kill = True
        elif (sink := message.sink) is not None:
            message.sink = None
            self._respond(message, sink.finish())
        self._layer.busy_until_now()
        with contextlib.suppress(IndexError):
            self._messages.waiting.popleft()

    def _respond(self, message: _Message, answer: StoreResponse) -> None:
        command = encode_response(
            message.command,
            answer.status,
            comment=answer.comment[:ERROR_COMMENT_LENGTH],
            offending_element=answer.offending_element,
        )
        room = max(1, (self.requestor.maximum_length or len(command) + 6) - 6)  # 0 = the peer takes any length
        for at in range(0, len(command), room):
            last = at + room >= len(command)
            primitive = P_DATA()
            fragment = (b"\x03" if last else b"\x01") + command[at : at + room]
            primitive.presentation_data_value_list.append((message.context_id, fragment))
            self.dul.send_pdu(primitive)

    # Called from other threads

    def begin(self, context_id: int, command: Command) -> Sink:
        """A C-STORE-RQ is complete; where its data set goes."""
        context = self._accepted_cx.get(context_id)
        if context is None:
            raise PeerError("context_not_accepted")
        syntax = str(context.transfer_syntax[0])
        return self._receiver.begin(StoreRequest(self.info, command.sop_class_uid, command.sop_instance_uid, syntax))

    def complain(self, reason: str) -> None:
        """The association ends by the peer's fault."""
        self._receiver.dropped(reason, self.info.peer)

    def stop(self) -> None:
        """Abort as soon as the message in hand is answered."""
        self._stopping = True
        self.work.set()

    def cut(self) -> None:
        """Now, whatever is in hand: wakes every blocked read."""
        self._kill = True
        self.work.set()
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

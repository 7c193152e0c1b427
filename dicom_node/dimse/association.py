"""One association as SCP: pynetdicom's negotiation and responses over `upper_layer.py`; C-ECHO, C-STORE, N-CREATE.

The library collects a data set in memory, or in a temporary file that outlives a dead peer. Here fragments go
straight to a `Sink`; commands and messages in hand are bounded; a thread ends in exactly one place, where nothing is
left behind.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pynetdicom import AE, evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.association import Association as _Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.dimse.command import C_ECHO_RQ, C_STORE_RQ, N_CREATE_RQ, Command, encode_response, parse_command
from dicom_node.dimse.contexts import INSTANCE_AVAILABILITY
from dicom_node.dimse.seam import Association, Receiver, Sink, StoreRequest, StoreResponse
from dicom_node.dimse.status import ERROR_COMMENT_LENGTH, OUT_OF_RESOURCES, SUCCESS
from dicom_node.dimse.upper_layer import BoundedSocket, DataTF, PeerError, UpperLayer
from dicom_node.errors import TooLargeError

MAX_COMMAND = 64 * 1024
MIN_BYTES_PER_SECOND = 1024
"""A message slower than this over a whole idle_timeout is a stall that pretends to be alive."""

_WAIT = 0.5
_NEGOTIATION_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    NotImplementedError,
)


@dataclass(slots=True)
class _Message:
    """A message whose data set is on its way in."""

    context_id: int
    command: Command
    sink: Sink
    began: float
    size: int = 0


class _Messages(DIMSEServiceProvider):
    """Reassembles messages (PS3.7 6.3.1): commands in memory, data sets into a Sink as they come; and answers them.

    All of it runs in the upper layer's thread: from the last fragment to the response there is no other thread to wait
    for, and while one message is made durable the next is not read. That is what bounds the messages in hand to one.
    """

    def __init__(self, assoc: StorageAssociation, timeout: float) -> None:
        super().__init__(assoc)
        self._owner, self._timeout = assoc, timeout
        self._partial = bytearray()
        self._current: _Message | None = None
        self._lock = threading.Lock()
        self._ended = False
        self.answering = False

    @property
    def busy(self) -> bool:
        """A data set is on its way in, or waits for its answer."""
        return self.answering or self._current is not None

    def receive_primitive(self, primitive: Any) -> None:
        """For each P-DATA-TF."""
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
        if command.field == C_ECHO_RQ and not command.has_data_set:
            self._owner.respond(context_id, command, StoreResponse(SUCCESS))
        elif command.field in (C_STORE_RQ, N_CREATE_RQ):
            self._current = _Message(context_id, command, self._owner.begin(context_id, command), time.monotonic())
            if not command.has_data_set:
                self._answer(self._current)
        else:
            raise PeerError("operation_not_offered")

    def _data(self, context_id: int, fragment: memoryview, *, last: bool) -> None:
        message = self._current
        if message is None or message.context_id != context_id:
            raise PeerError("data_out_of_place")
        message.size += len(fragment)
        took = time.monotonic() - message.began
        if took > self._timeout and message.size < took * MIN_BYTES_PER_SECOND:
            raise PeerError("message_too_slow")
        try:
            with self._lock:
                if self._ended:
                    return
                message.sink.write(fragment)
        except TooLargeError as e:
            self._current = None
            self._owner.respond(context_id, message.command, StoreResponse(OUT_OF_RESOURCES, str(e)))
            raise PeerError("instance_too_large") from None
        if last:
            self._answer(message)

    def _answer(self, message: _Message) -> None:
        self.answering, self._current = True, None
        self._owner.respond(message.context_id, message.command, message.sink.finish())
        self.answering = False

    def abandon(self) -> None:
        """The association is over: a data set that did not come to its end leaves nothing. May be called twice."""
        with self._lock:
            self._ended = True
            message, self._current = self._current, None
        if message is not None:
            message.sink.abandon()


class StorageAssociation(_Association):
    """A thread that answers C-ECHO, C-STORE and N-CREATE until the peer ends it, is silent, or breaks a rule."""

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
                self._raw.shutdown(
                    socket.SHUT_RDWR
                )  # the upper layer ends with its connection, in whatever state it is
            self.kill()
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
        if self._messages.answering:
            self._layer.busy_until_now()
        elif self.dul.idle_timer_expired():
            self.complain("idle")
            self.abort(block=False)
            return True
        if self._stopping and not self._messages.busy:
            self.abort(block=False)
            return True
        return False

    # Called from the upper layer's thread, and from the server

    def begin(self, context_id: int, command: Command) -> Sink:
        """A C-STORE-RQ or N-CREATE-RQ is complete; where its data set goes."""
        context = self._accepted_cx.get(context_id)
        if context is None:
            raise PeerError("context_not_accepted")
        syntax = str(context.transfer_syntax[0])
        request = StoreRequest(self.info, command.sop_class_uid, command.sop_instance_uid, syntax)
        notifies = str(context.abstract_syntax) == INSTANCE_AVAILABILITY
        if notifies != (command.field == N_CREATE_RQ):
            raise PeerError("operation_not_offered")
        return self._receiver.notify(request) if notifies else self._receiver.begin(request)

    def respond(self, context_id: int, command: Command, answer: StoreResponse) -> None:
        """Send the response in as many P-DATA-TF as the peer's maximum length asks for (PS3.8 annex D.1)."""
        data = encode_response(
            command,
            answer.status,
            comment=answer.comment[:ERROR_COMMENT_LENGTH],
            offending_element=answer.offending_element,
        )
        room = max(1, (self.requestor.maximum_length or len(data) + 6) - 6)  # 0 = the peer takes any length
        for at in range(0, len(data), room):
            self._layer.send_data(context_id, data[at : at + room], command=True, last=at + room >= len(data))
        self._layer.busy_until_now()

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

"""One association as SCP, from the connection to its end, in one thread: all that an instance passes on its way in.

    socket -> one buffer -> PDU -> (state, event) -> P-DATA-TF in place -> message (PS3.7 6.3.1) -> Sink

From here the bytes go to `receive.py` and its file; these two files are the whole receive path. Written by hand are
framing, reassembly and dispatch only: the states are a table (`upper_layer.py`), negotiation is pynetdicom's
(`negotiation.py`). Everything waits under a deadline and grows under a bound, and while one message is made durable
the next is not read: TCP holds the peer back, nothing is queued.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dicom_node.config import Receive
from dicom_node.dimse.admission import Admission, Rejection
from dicom_node.dimse.command import (
    C_ECHO_RQ,
    C_STORE_RQ,
    N_CREATE_RQ,
    N_EVENT_REPORT_RQ,
    Command,
    encode_response,
    parse_command,
)
from dicom_node.dimse.contexts import COMMITMENT, INSTANCE_AVAILABILITY
from dicom_node.dimse.negotiation import APPLICATION_CONTEXT, Context, Negotiator, Request
from dicom_node.dimse.seam import Association, Receiver, Sink, StoreRequest, StoreResponse
from dicom_node.dimse.status import ERROR_COMMENT_LENGTH, OUT_OF_RESOURCES, SUCCESS
from dicom_node.dimse.tls import subject_common_name
from dicom_node.dimse.upper_layer import (
    FOUR_BYTES,
    HEADER,
    MIN_REQUEST,
    PDATA,
    PDATA_SLACK,
    PDU_EVENTS,
    PDV,
    TABLE,
    Action,
    Event,
    MessageError,
    PeerError,
    Progress,
    Reason,
    State,
    abort_pdu,
    data_pdus,
    reject_pdu,
    release_pdu,
)
from dicom_node.errors import TooLargeError

MAX_COMMAND = 64 * 1024
"""Bytes of a command set; those of ours have a few hundred."""
MAX_IGNORED = 1 << 20
"""Bytes a peer may still send after our last word."""

_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


@dataclass(frozen=True, slots=True)
class Port:
    """What the associations of one port share."""

    config: Receive
    receiver: Receiver
    admission: Admission
    negotiator: Negotiator
    tls: Callable[[], ssl.SSLContext] | None
    """Hands out the context for each new connection; None = plain TCP."""


@dataclass(slots=True)
class _Message:
    """A message whose data set is on its way in."""

    context_id: int
    command: Command
    sink: Sink


class StorageAssociation:
    """`run` in a thread of its own; `stop` and `cut` from any other. `info` is None until it is accepted."""

    def __init__(self, port: Port, sock: socket.socket, peer: str) -> None:
        self._port, self._sock, self._peer = port, sock, peer
        self._config, self._receiver = port.config, port.receiver
        self.info: Association | None = None
        self._state = State.IDLE
        self._artim: float | None = None
        self._pending, self._admitted = True, False
        self._stopping = self._answering = self._released = self._deaf = False
        self._contexts: Mapping[int, Context] = {}
        self._peer_max_pdu = self._pdvs = self._ignored = 0
        self._command, self._command_context = bytearray(), 0
        self._message: _Message | None = None

    def run(self) -> None:
        """The thread: serve, and leave nothing behind whatever happened."""
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._shake_hands() and not self._stopping:
                self._step(Event.CONNECTED)
                self._receive()
        except OSError:
            pass  # connected and gone: a port scan, a probe of a load balancer
        finally:
            self._abandon()
            self._sock.close()
            if self.info is not None:
                self._receiver.closed(self.info, released=self._released)
            self._asked()
            if self._admitted:
                self._port.admission.left(self._peer)

    def stop(self) -> None:
        """Abort as soon as the message in hand is answered."""
        self._stopping = True
        if not (self._answering or self._message is not None or self._command):
            self._shut(socket.SHUT_RD)  # wakes the read; what we have to say still leaves

    def cut(self) -> None:
        """Now, whatever is in hand."""
        self._stopping = True
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, how)  # the method of an SSLSocket would end TLS under our thread

    def _shake_hands(self) -> bool:
        if self._port.tls is None:
            return True
        try:
            self._sock = self._port.tls().wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
            self._sock.settimeout(self._config.handshake_timeout)  # for the handshake as a whole
            self._sock.do_handshake()
            return True
        except ssl.SSLError:
            self._complain("tls_handshake_failed")
        except TimeoutError:
            self._complain("no_tls_handshake_in_time")
        return False

    # The connection: bytes to PDUs

    def _receive(self) -> None:
        """Until the state machine is idle again."""
        room = max(self._config.max_pdu + PDATA_SLACK, self._config.max_request_bytes) + HEADER.size
        buffer = memoryview(bytearray(2 * room))
        progress = Progress(self._config.idle_timeout, self._config.min_bytes_per_second)
        have = 0
        while self._state is not State.IDLE:
            began = time.monotonic()
            try:
                count = self._read(buffer[have:])
            except TimeoutError:
                self._silence(unfinished=self._is_unfinished(have))
                continue
            waited = time.monotonic() - began
            if not count:
                self._step(Event.ABORT if self._stopping and self._state is State.DATA else Event.CLOSED)
                continue
            have += count
            used = self._pdus(buffer[:have])
            buffer[: have - used] = buffer[used:have]
            have -= used
            if self._state is not State.DATA:
                self._ignore(count)
            elif not self._is_unfinished(have):
                progress.restart()
            elif progress.is_too_slow(waited, count):
                self._fail(MessageError("message_too_slow"))
            if self._stopping and self._state is State.DATA and not (self._message is not None or self._command):
                self._step(Event.ABORT)

    def _read(self, into: memoryview) -> int:
        """How many bytes came; 0 = the connection has ended. Raises TimeoutError."""
        if self._artim is not None:
            left = self._artim - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
        try:
            count = self._sock.recv_into(into)
            if _QUICKACK is not None:
                # Linux forgets the flag after a while. Without it a sender that leaves Nagle on (DCMTK as Debian
                # ships it) waits 40 ms for our delayed acknowledgement with every message.
                self._sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            return count
        except TimeoutError:
            raise
        except OSError:
            return 0

    def _is_unfinished(self, have: int) -> bool:
        return bool(have or self._command or self._message is not None)

    def _silence(self, *, unfinished: bool) -> None:
        """The peer's time is up: ARTIM, or the silence of an open association."""
        if self._state is State.DATA:
            self._fail(MessageError("message_too_slow" if unfinished else "idle"))
            return
        if self._state is State.AWAIT_CLOSE:
            self._receiver.lingered(self._peer)
        else:
            self._complain("no_request_in_time")
        self._step(Event.ARTIM_EXPIRED)

    def _ignore(self, count: int) -> None:
        """After our last word."""
        self._ignored += count
        if self._state is State.AWAIT_CLOSE and self._ignored > MAX_IGNORED:
            self._receiver.lingered(self._peer)
            self._step(Event.ARTIM_EXPIRED)

    def _pdus(self, data: memoryview) -> int:
        """Take every whole PDU. Returns how many bytes are done with."""
        at, end = 0, len(data)
        while end - at >= HEADER.size and not self._deaf and self._state is not State.IDLE:
            kind, length = HEADER.unpack_from(data, at)
            try:
                self._check(kind, length)
                if end - at < HEADER.size + length:
                    break
                self._take(PDU_EVENTS[kind], data[at : at + HEADER.size + length])
            except PeerError as e:
                self._fail(e)
            at += HEADER.size + length
        return end if self._deaf else at

    def _check(self, kind: int, length: int) -> None:
        """Of a header, before its PDU is waited for."""
        if kind == PDATA:
            sound = length <= self._config.max_pdu + PDATA_SLACK
        elif kind in FOUR_BYTES:
            sound = length == 4
        else:
            sound = MIN_REQUEST <= length <= self._config.max_request_bytes
        if kind not in PDU_EVENTS or not sound:
            self._deaf = True  # where the next PDU would begin is not known any more
            if self._state is State.AWAIT_CLOSE and kind in PDU_EVENTS:
                return  # AA-6 whatever its length
            if kind not in PDU_EVENTS:
                raise PeerError(self._unexpected(), diagnostic=Reason.UNRECOGNISED_PDU)
            raise PeerError("pdu_too_long" if length > MIN_REQUEST else "pdu_malformed")

    def _take(self, event: Event, pdu: memoryview) -> None:
        if TABLE[self._state][event][0] in (Action.AA_1, Action.AA_7, Action.AA_8):
            raise PeerError(self._unexpected(), event, Reason.UNEXPECTED_PDU)
        self._step(event, pdu)

    def _unexpected(self) -> str:
        return "not_an_association_request" if self._state is State.AWAIT_REQUEST else "unexpected_pdu"

    def _fail(self, error: PeerError) -> None:
        """By the peer's fault."""
        if self._state is State.IDLE:
            return  # and gone already
        if self._state is not State.AWAIT_CLOSE:
            self._complain(str(error))
        self._step(error.event, diagnostic=error.diagnostic)

    def _complain(self, reason: str) -> None:
        self._receiver.dropped(reason, self._peer)

    # The state machine

    def _step(self, event: Event, pdu: bytes | memoryview = b"", *, diagnostic: Reason = Reason.NOT_SPECIFIED) -> None:
        """`pdu` is the one that came, or the one to send."""
        action, self._state = TABLE[self._state][event]
        if self._state is not State.DATA:
            self._abandon()
        match action:
            case Action.AE_5:
                self._start_artim(self._config.request_timeout)
            case Action.AE_6:
                self._artim = None
                self._judge(bytes(pdu))
            case Action.DT_2:
                self._data(pdu)
            case Action.AE_7 | Action.DT_1 | Action.AR_7:
                self._send(pdu)
            case Action.AR_2:
                self._released = True
                self._step(Event.RELEASE, release_pdu())
            case Action.AE_8 | Action.AR_4:
                self._last_word(pdu)
            case Action.AA_1 | Action.AA_8:
                self._last_word(abort_pdu(diagnostic if action is Action.AA_8 else None))
            case Action.AA_7:
                self._send(abort_pdu(diagnostic))

    def _start_artim(self, seconds: float) -> None:
        self._artim = time.monotonic() + seconds

    def _last_word(self, pdu: bytes | memoryview) -> None:
        # The peer closes: doing it at once would reset the connection and lose this PDU on its way.
        self._leave()
        self._start_artim(self._config.release_timeout if self._pending else 0.0)
        self._sock.settimeout(self._config.release_timeout)
        self._send(pdu)

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._sock.sendall(data)
        except OSError:
            self._step(Event.CLOSED)

    def _leave(self) -> None:
        """Before the last word: who hears it may be back at once. What lingers is a pending connection again."""
        if self._admitted:
            self._admitted = False
            self._port.admission.left(self._peer)
            self._pending = self._port.admission.connecting(self._peer)

    def _asked(self) -> None:
        """The connection is no longer pending."""
        if self._pending:
            self._pending = False
            self._port.admission.connected(self._peer)

    def _judge(self, pdu: bytes) -> None:
        """Accept or reject the request. Who is rejected stays pending until his connection is closed."""
        try:
            request = Request.of(pdu)
            application = request.application_context
        except ValueError:
            raise PeerError("association_request_unreadable") from None
        calling, called = request.calling_ae_title, request.called_ae_title
        subject = subject_common_name(self._sock.getpeercert()) if isinstance(self._sock, ssl.SSLSocket) else None
        if not request.protocol_version & 1:  # only bit 0 is tested (PS3.8 table 9-11)
            rejection: Rejection | None = Rejection.PROTOCOL_VERSION
        elif application not in ("", APPLICATION_CONTEXT):
            rejection = Rejection.APPLICATION_CONTEXT
        else:
            rejection = self._port.admission.admit(self._peer, calling, called, subject)
        if rejection is not None:
            self._receiver.rejected(rejection, self._peer, calling, called)
            self._step(Event.REJECT, reject_pdu(*rejection.value))
            return
        self._admitted = True
        self._asked()
        try:
            negotiated, acceptance = self._port.negotiator.negotiate(request)
        except ValueError:
            raise PeerError("association_request_unreadable") from None
        self._contexts, self._peer_max_pdu = negotiated.contexts, negotiated.peer_max_pdu
        self.info = Association(uuid.uuid4().hex, calling, called, self._peer)
        self._sock.settimeout(self._config.idle_timeout)
        self._step(Event.ACCEPT, acceptance)
        self._receiver.opened(self.info, list(negotiated.rejected))

    # Messages: P-DATA-TF to Sink

    def _data(self, pdu: bytes | memoryview) -> None:
        """PDVs in place (PS3.8 9.3.5, annex E.2)."""
        at, end = HEADER.size, len(pdu)
        if at == end:
            raise PeerError("pdu_malformed")
        while at < end and self._state is State.DATA:
            if end - at < PDV.size:
                raise PeerError("pdv_malformed")
            length, context_id, control = PDV.unpack_from(pdu, at)
            if not 2 <= length <= end - at - 4:
                raise PeerError("pdv_malformed")
            if context_id not in self._contexts:
                raise PeerError("context_not_accepted")
            self._pdvs += 1
            if self._pdvs > self._config.max_pdvs:
                raise MessageError("too_many_pdvs")
            take = self._take_command if control & 1 else self._take_data
            take(context_id, pdu[at + PDV.size : at + 4 + length], last=bool(control & 2))
            at += 4 + length

    def _take_command(self, context_id: int, fragment: bytes | memoryview, *, last: bool) -> None:
        if self._message is not None or (self._command and context_id != self._command_context):
            raise MessageError("command_out_of_place")
        if len(self._command) + len(fragment) > MAX_COMMAND:
            raise MessageError("command_too_long")
        self._command += fragment
        self._command_context = context_id
        if not last:
            return
        try:
            command = parse_command(bytes(self._command))
        except ValueError:
            raise MessageError("command_unreadable") from None
        self._command.clear()
        if command.field == C_ECHO_RQ and not command.has_data_set:
            self._answer(context_id, command, StoreResponse(SUCCESS))
            return
        self._message = _Message(context_id, command, self._begin(self._contexts[context_id], command))
        if not command.has_data_set:
            self._finish(self._message)

    def _begin(self, context: Context, command: Command) -> Sink:
        """Where the data set of a request goes: what is offered depends on the context's SOP Class."""
        field, begin = {
            INSTANCE_AVAILABILITY: (N_CREATE_RQ, self._receiver.notify),
            COMMITMENT.uid: (N_EVENT_REPORT_RQ, self._receiver.commitment),
        }.get(context.abstract_syntax, (C_STORE_RQ, self._receiver.begin))
        if command.field != field or self.info is None:
            raise MessageError("operation_not_offered")
        uids = (command.sop_class_uid, command.sop_instance_uid)
        return begin(StoreRequest(self.info, *uids, context.transfer_syntax, command.event_type_id))

    def _take_data(self, context_id: int, fragment: bytes | memoryview, *, last: bool) -> None:
        message = self._message
        if message is None or message.context_id != context_id:
            raise MessageError("data_out_of_place")
        try:
            message.sink.write(memoryview(fragment))
        except TooLargeError as e:
            self._message = None
            self._answer(context_id, message.command, StoreResponse(OUT_OF_RESOURCES, str(e)))
            raise MessageError("instance_too_large") from None
        if last:
            self._finish(message)

    def _finish(self, message: _Message) -> None:
        self._answering, self._message = True, None
        self._answer(message.context_id, message.command, message.sink.finish())
        self._answering = False

    def _answer(self, context_id: int, command: Command, answer: StoreResponse) -> None:
        data = encode_response(
            command,
            answer.status,
            comment=answer.comment[:ERROR_COMMENT_LENGTH],
            offending_element=answer.offending_element,
        )
        self._pdvs = 0
        self._step(Event.SEND_DATA, data_pdus(context_id, data, self._peer_max_pdu))

    def _abandon(self) -> None:
        """A data set that did not come to its end leaves nothing."""
        message, self._message = self._message, None
        if message is not None:
            message.sink.abandon()

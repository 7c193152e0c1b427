"""The DICOM upper layer of an acceptor (PS3.8 section 9): its states, its events, and what each pair asks for.

A table and the words on the wire, no socket: `association.py` carries the actions out. The PDUs of association control
are pynetdicom's; P-DATA-TF alone is framed by hand, because every byte of every instance passes through it.

States in which only a requestor can be (Sta4, Sta5) or an acceptor that asks for a release itself (Sta7, Sta9 to
Sta12) do not occur: this node ends an association on its own account by A-ABORT only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum, StrEnum

from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ, A_RELEASE_RP

HEADER = struct.Struct(">BxL")
"""PDU type and length (PS3.8 9.3.1)."""
PDV = struct.Struct(">LBB")
"""Item length, presentation context ID, message control header (PS3.8 9.3.5.1 and annex E.2)."""
PDATA = 4
PDATA_SLACK = 16
"""Some peers count a header into the maximum length, some out of it."""
MIN_REQUEST = 68
"""The fixed fields of an A-ASSOCIATE-RQ (PS3.8 table 9-11)."""


class State(StrEnum):
    """PS3.8 tables 9-1 to 9-5."""

    IDLE = "Sta1"
    AWAIT_REQUEST = "Sta2"
    AWAIT_ANSWER = "Sta3"
    """Our own answer to the request."""
    DATA = "Sta6"
    AWAIT_RELEASE = "Sta8"
    """Our own answer to the A-RELEASE-RQ."""
    AWAIT_CLOSE = "Sta13"


class Event(StrEnum):
    """PS3.8 table 9-10, as far as an acceptor meets them. From the peer, from its connection, or from ourselves."""

    ASSOCIATE_AC = "Evt3"
    ASSOCIATE_RJ = "Evt4"
    CONNECTED = "Evt5"
    ASSOCIATE_RQ = "Evt6"
    ACCEPT = "Evt7"
    REJECT = "Evt8"
    SEND_DATA = "Evt9"
    DATA_TF = "Evt10"
    RELEASE_RQ = "Evt12"
    RELEASE_RP = "Evt13"
    RELEASE = "Evt14"
    ABORT = "Evt15"
    ABORT_PDU = "Evt16"
    CLOSED = "Evt17"
    ARTIM_EXPIRED = "Evt18"
    INVALID = "Evt19"
    """An unrecognised or invalid PDU."""


class Action(StrEnum):
    """PS3.8 tables 9-6 to 9-9."""

    AE_5 = "AE-5"
    """Take the connection, start ARTIM."""
    AE_6 = "AE-6"
    """Stop ARTIM, judge the request."""
    AE_7 = "AE-7"
    """Send the A-ASSOCIATE-AC."""
    AE_8 = "AE-8"
    """Send the A-ASSOCIATE-RJ, start ARTIM."""
    DT_1 = "DT-1"
    """Send P-DATA-TF."""
    DT_2 = "DT-2"
    """Take P-DATA-TF."""
    AR_2 = "AR-2"
    """The peer asks for a release."""
    AR_4 = "AR-4"
    """Send the A-RELEASE-RP, start ARTIM."""
    AR_5 = "AR-5"
    """Stop ARTIM: the peer has closed."""
    AR_7 = "AR-7"
    """Send P-DATA-TF although the peer asked for a release."""
    AA_1 = "AA-1"
    """Send an A-ABORT of the service user, start ARTIM."""
    AA_2 = "AA-2"
    """Stop ARTIM, close."""
    AA_3 = "AA-3"
    """Aborted by the peer: close."""
    AA_4 = "AA-4"
    """The connection is gone."""
    AA_5 = "AA-5"
    """Stop ARTIM: gone before it asked for anything."""
    AA_6 = "AA-6"
    """Take no notice."""
    AA_7 = "AA-7"
    """Send an A-ABORT, stay."""
    AA_8 = "AA-8"
    """Send an A-ABORT of the service provider, start ARTIM."""


class Reason(IntEnum):
    """Of an A-ABORT by the service provider (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNISED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNISED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


PDU_EVENTS: Mapping[int, Event] = {
    1: Event.ASSOCIATE_RQ,
    2: Event.ASSOCIATE_AC,
    3: Event.ASSOCIATE_RJ,
    PDATA: Event.DATA_TF,
    5: Event.RELEASE_RQ,
    6: Event.RELEASE_RP,
    7: Event.ABORT_PDU,
}
"""By PDU type; any other type is `Event.INVALID`."""
FOUR_BYTES = frozenset({3, 5, 6, 7})
"""Types of PDU whose length is always 4."""

_Row = dict[Event, tuple[Action, State]]


def _each(action: Action, state: State, *events: Event) -> _Row:
    return dict.fromkeys(events, (action, state))


_NOT_FOR_US = (Event.ASSOCIATE_AC, Event.ASSOCIATE_RJ, Event.RELEASE_RP)
"""PDUs that answer what an acceptor never asked."""
_ENDED: _Row = {Event.ABORT_PDU: (Action.AA_3, State.IDLE), Event.CLOSED: (Action.AA_4, State.IDLE)}
_ABORTED: _Row = {Event.ABORT: (Action.AA_1, State.AWAIT_CLOSE)}

TABLE: Mapping[State, Mapping[Event, tuple[Action, State]]] = {
    State.IDLE: {Event.CONNECTED: (Action.AE_5, State.AWAIT_REQUEST)},
    State.AWAIT_REQUEST: {
        Event.ASSOCIATE_RQ: (Action.AE_6, State.AWAIT_ANSWER),
        **_each(Action.AA_1, State.AWAIT_CLOSE, *_NOT_FOR_US, Event.DATA_TF, Event.RELEASE_RQ, Event.INVALID),
        **_each(Action.AA_2, State.IDLE, Event.ABORT_PDU, Event.ARTIM_EXPIRED),
        Event.CLOSED: (Action.AA_5, State.IDLE),
    },
    State.AWAIT_ANSWER: {
        Event.ACCEPT: (Action.AE_7, State.DATA),
        Event.REJECT: (Action.AE_8, State.AWAIT_CLOSE),
        **_each(Action.AA_8, State.AWAIT_CLOSE, *_NOT_FOR_US, Event.ASSOCIATE_RQ, Event.DATA_TF),
        **_each(Action.AA_8, State.AWAIT_CLOSE, Event.RELEASE_RQ, Event.INVALID),
        **_ABORTED,
        **_ENDED,
    },
    State.DATA: {
        Event.DATA_TF: (Action.DT_2, State.DATA),
        Event.SEND_DATA: (Action.DT_1, State.DATA),
        Event.RELEASE_RQ: (Action.AR_2, State.AWAIT_RELEASE),
        **_each(Action.AA_8, State.AWAIT_CLOSE, *_NOT_FOR_US, Event.ASSOCIATE_RQ, Event.INVALID),
        **_ABORTED,
        **_ENDED,
    },
    State.AWAIT_RELEASE: {
        Event.RELEASE: (Action.AR_4, State.AWAIT_CLOSE),
        Event.SEND_DATA: (Action.AR_7, State.AWAIT_RELEASE),
        **_each(Action.AA_8, State.AWAIT_CLOSE, *_NOT_FOR_US, Event.ASSOCIATE_RQ, Event.DATA_TF),
        **_each(Action.AA_8, State.AWAIT_CLOSE, Event.RELEASE_RQ, Event.INVALID),
        **_ABORTED,
        **_ENDED,
    },
    State.AWAIT_CLOSE: {
        **_each(Action.AA_6, State.AWAIT_CLOSE, *_NOT_FOR_US, Event.DATA_TF, Event.RELEASE_RQ),
        **_each(Action.AA_7, State.AWAIT_CLOSE, Event.ASSOCIATE_RQ, Event.INVALID),
        **_each(Action.AA_2, State.IDLE, Event.ABORT_PDU, Event.ARTIM_EXPIRED),
        Event.CLOSED: (Action.AR_5, State.IDLE),
    },
}
"""PS3.8 table 9-10. What the peer or its connection can do is there for every state but the first; of what we do
ourselves only what makes sense, so a pair that is missing is a fault of ours."""


class PeerError(Exception):
    """The peer broke a rule or a bound: the association ends. `event` says which end it takes."""

    def __init__(
        self, reason: str, event: Event = Event.INVALID, diagnostic: Reason = Reason.INVALID_PARAMETER
    ) -> None:
        super().__init__(reason)
        self.event, self.diagnostic = event, diagnostic


class MessageError(PeerError):
    """What the PDUs carry is no message of ours (PS3.7): aborted by us as the user of the upper layer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, Event.ABORT, Reason.NOT_SPECIFIED)


class Progress:
    """Is the peer still sending, or does it only pretend? Judged by bytes over the time we waited for them."""

    def __init__(self, seconds: float, bytes_per_second: float) -> None:
        self._seconds, self._rate = seconds, bytes_per_second
        self._waited, self._bytes = 0.0, 0

    def restart(self) -> None:
        """Nothing is under way."""
        self._waited, self._bytes = 0.0, 0

    def is_too_slow(self, waited: float, count: int) -> bool:
        """After each read. A window of its own every `seconds`: a fast beginning does not pay for a slow rest."""
        self._waited, self._bytes = self._waited + waited, self._bytes + count
        if self._waited <= self._seconds:
            return False
        slow = self._bytes < self._waited * self._rate
        self.restart()
        return slow


def abort_pdu(reason: Reason | None) -> bytes:
    """A-ABORT by the service provider; None = by the service user, which gives no reason."""
    pdu = A_ABORT_RQ()
    pdu.source, pdu.reason_diagnostic = (0, 0) if reason is None else (2, int(reason))
    return bytes(pdu.encode())


def reject_pdu(result: int, source: int, diagnostic: int) -> bytes:
    """A-ASSOCIATE-RJ."""
    pdu = A_ASSOCIATE_RJ()
    pdu.result, pdu.source, pdu.reason_diagnostic = result, source, diagnostic
    return bytes(pdu.encode())


def release_pdu() -> bytes:
    """A-RELEASE-RP."""
    return bytes(A_RELEASE_RP().encode())


def data_pdus(context_id: int, command: bytes, peer_max_pdu: int) -> bytes:
    """A command set in as many P-DATA-TF as the peer's maximum length asks for (PS3.8 annex D.1); 0 = any length."""
    room = max(1, (peer_max_pdu or len(command) + 6) - 6)
    pdus = bytearray()
    for at in range(0, len(command), room):
        fragment = command[at : at + room]
        pdus += HEADER.pack(PDATA, len(fragment) + 6)
        pdus += PDV.pack(len(fragment) + 2, context_id, 3 if at + room >= len(command) else 1) + fragment
    return bytes(pdus)

"""Association negotiation as acceptor: A-ASSOCIATE-RQ in, A-ASSOCIATE-AC out (PS3.8 9.3.2 and 9.3.3, PS3.7 annex D.3).

The PDU classes and the negotiation of contexts and roles are pynetdicom's, and slow: so the items are counted first,
and the answer to a request that came before is remembered (a modality asks the same each time). Policy, who may
associate at all, is `admission.py`'s. No sockets here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicom_node.config import Receive
from dicom_node.dimse.contexts import COMMITMENT, accepted
from dicom_node.dimse.upper_layer import HEADER, MIN_REQUEST
from dicom_node.store.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

MAX_ITEMS = 4096
"""Items and sub-items of one request: 128 contexts of 30 transfer syntaxes, and what else there is to say."""
REMEMBERED = 64
"""Requests whose answer is kept; at most 64 KB each."""
STORAGE_SUPPORT = bytes((2, 0, 0, 0, 0, 0))
"""PS3.4 table B.3-1: level 2 (every element is kept, private ones too), signature level unspecified, no coercion."""

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_APPLICATION, _PRESENTATION_CONTEXT, _USER_INFORMATION = 0x10, 0x20, 0x50
_UNDERSTOOD: Mapping[int, frozenset[int]] = {
    _APPLICATION: frozenset(),
    _PRESENTATION_CONTEXT: frozenset((0x30, 0x40)),
    _USER_INFORMATION: frozenset(range(0x51, 0x59)),
}
"""Items of a request and the sub-items they may have (PS3.8 9.3.2, PS3.7 annex D.3.3)."""
_USER_REJECTION = 1
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


@dataclass(frozen=True, slots=True)
class Context:
    """One accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str
    as_scu: bool
    """The roles are reversed (PS3.7 D.3.3.4): the peer reports to us."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What came of the items of one request."""

    contexts: Mapping[int, Context]
    rejected: tuple[tuple[str, int], ...]
    """Abstract syntax and result of the others."""
    peer_max_pdu: int
    """0 = any."""
    acceptance: bytes
    """The A-ASSOCIATE-AC, the fields that repeat the request's not yet filled in."""


@dataclass(frozen=True, slots=True)
class Request:
    """The fixed fields of an A-ASSOCIATE-RQ."""

    calling_ae_title: str
    called_ae_title: str
    protocol_version: int
    pdu: bytes

    @classmethod
    def of(cls, pdu: bytes) -> Request:
        """Raises ValueError: an AE title of spaces only (PS3.8 table 9-11)."""
        if len(pdu) < 6 + MIN_REQUEST:
            raise ValueError("an A-ASSOCIATE-RQ cut short")
        called, calling = _title(pdu[10:26]), _title(pdu[26:42])
        if not called or not calling:
            raise ValueError("an AE title is missing")
        return cls(calling, called, int.from_bytes(pdu[6:8], "big"), pdu)

    @property
    def application_context(self) -> str:
        """Application Context Name (PS3.8 9.3.2.1). Raises ValueError: the items cannot be walked."""
        start = 6 + MIN_REQUEST
        names = (self.pdu[a:b] for kind, a, b in _items(self.pdu, start, len(self.pdu)) if kind == _APPLICATION)
        return next(names, b"").rstrip(b"\0").decode("ascii", "replace")


class Negotiator:
    """One for the port: what it offers does not change while it runs."""

    def __init__(self, config: Receive) -> None:
        self._max_pdu = config.max_pdu
        self._supported: dict[str, PresentationContext] = {}
        self._storage: set[str] = set()
        for sop_class in accepted(config.also_accept, availability=config.availability):
            context = build_context(sop_class.uid, list(sop_class.transfer_syntaxes))
            context.scu_role, context.scp_role = True, False  # the requestor's
            self._supported[sop_class.uid] = context
            if sop_class.use not in ("verification", "notification"):
                self._storage.add(sop_class.uid)
        context = build_context(COMMITMENT.uid, list(COMMITMENT.transfer_syntaxes))
        context.scu_role, context.scp_role = False, True
        self._supported[COMMITMENT.uid] = context
        self._of: Callable[[bytes], Negotiated] = lru_cache(maxsize=REMEMBERED)(self._negotiate)

    def negotiate(self, request: Request) -> tuple[Negotiated, bytes]:
        """The outcome, and the A-ASSOCIATE-AC that says so. Raises ValueError: the request cannot be read."""
        negotiated = self._of(request.pdu[6 + MIN_REQUEST :])
        acceptance = bytearray(negotiated.acceptance)
        acceptance[10:74] = request.pdu[10:74]  # repeated as they came (PS3.8 table 9-17)
        return negotiated, bytes(acceptance)

    def _negotiate(self, items: bytes) -> Negotiated:
        items = _understood(items)
        fixed = struct.pack(">HH", 1, 0) + b"CALLED".ljust(16) + b"CALLING".ljust(16) + bytes(32)
        pdu = A_ASSOCIATE_RQ()
        try:
            pdu.decode(HEADER.pack(1, len(fixed) + len(items)) + fixed + items)
            primitive = pdu.to_primitive()
            proposed = primitive.presentation_context_definition_list
            if len({c.context_id for c in proposed}) != len(proposed):
                raise ValueError("a presentation context ID stands twice")
            return self._answer(primitive, proposed)
        except _DECODE_ERRORS as e:  # the library on a hostile request
            raise ValueError(f"the request cannot be read ({type(e).__name__})") from None

    def _answer(self, primitive: Any, proposed: list[PresentationContext]) -> Negotiated:
        said = primitive.user_information
        roles = {i.sop_class_uid: (i.scu_role, i.scp_role) for i in _of(said, SCP_SCU_RoleSelectionNegotiation)}
        ours = [self._supported[uid] for uid in {str(c.abstract_syntax) for c in proposed} if uid in self._supported]
        results, role_answers = negotiate_as_acceptor(proposed, ours or [_NEVER], roles)
        for context in results:
            # The library falls back to the default roles; as SCP of commitments we have nothing to say.
            if context.abstract_syntax == COMMITMENT.uid and context.result == 0 and not context.as_scu:
                context.result = _USER_REJECTION
        answer = A_ASSOCIATE()
        answer.application_context_name = APPLICATION_CONTEXT
        answer.calling_ae_title, answer.called_ae_title = "CALLING", "CALLED"
        answer.result, answer.result_source = 0, 1
        answer.presentation_context_definition_results_list = results
        answer.user_information = [*self._user_information(said), *role_answers]
        taken = {
            int(c.context_id or 0): Context(str(c.abstract_syntax), str(c.transfer_syntax[0]), bool(c.as_scu))
            for c in results
            if c.result == 0
        }
        rejected = tuple((str(c.abstract_syntax), c.result) for c in results if c.result)
        lengths = [i.maximum_length_received for i in _of(said, MaximumLengthNotification)]
        return Negotiated(taken, rejected, lengths[0] if lengths else 0, bytes(A_ASSOCIATE_AC(answer).encode()))

    def _user_information(self, said: list[Any]) -> Iterator[Any]:
        """PS3.7 annex D.3.3. What has no item here takes no answer: the common extended negotiation never does, and a
        user identity is answered only by who verifies it (D.3.3.7); the certificate is what we verify."""
        length = MaximumLengthNotification()
        length.maximum_length_received = self._max_pdu
        implementation = ImplementationClassUIDNotification()
        implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        version = ImplementationVersionNameNotification()
        version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        yield from (length, implementation, version)
        if any(_of(said, AsynchronousOperationsWindowNegotiation)):
            window = AsynchronousOperationsWindowNegotiation()
            window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 1
            yield window
        for uid in dict.fromkeys(i.sop_class_uid for i in _of(said, SOPClassExtendedNegotiation)):
            if uid in self._storage:
                support = SOPClassExtendedNegotiation()
                support.sop_class_uid, support.service_class_application_information = uid, STORAGE_SUPPORT
                yield support


_NEVER = build_context("1.2.840.10008.1.1")
"""The library wants at least one supported context, also for a peer that proposes none of ours."""


def _of(said: list[Any], kind: type) -> list[Any]:
    return [item for item in said if isinstance(item, kind)]


def _title(field: bytes) -> str:
    """An AE title as it goes into logs and metrics: no spaces around it, and nothing that is not printable ASCII."""
    text = field.strip(b" \0").decode("ascii", "replace")
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def _understood(items: bytes) -> bytes:
    """The items without those of a type nobody here knows, which later editions may add (PS3.8 9.3.1, PS3.7 D.3.3).

    In front of the library: it fails on an unknown type, takes a tenth of a millisecond for an item, and checks lengths
    by `assert`. Raises ValueError: an item is longer than what encloses it, or there are too many.
    """
    kept, count = bytearray(), 0
    for kind, start, end in _items(items, 0, len(items)):
        count += 1
        body = items[start:end]
        if kind in (_PRESENTATION_CONTEXT, _USER_INFORMATION):
            inner = start + (4 if kind == _PRESENTATION_CONTEXT else 0)  # the context's ID and reserved bytes
            parts = list(_items(items, inner, end))
            count += len(parts)
            body = items[start:inner] + b"".join(items[a - 4 : b] for k, a, b in parts if k in _UNDERSTOOD[kind])
        if count > MAX_ITEMS:
            raise ValueError("too many items")
        if kind in _UNDERSTOOD:
            kept += struct.pack(">BxH", kind, len(body)) + body
    return bytes(kept)


def _items(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    while at != end:
        if end - at < 4:
            raise ValueError("an item cut short")
        kind, length = struct.unpack_from(">BxH", data, at)
        at += 4
        if length > end - at:
            raise ValueError("an item longer than what encloses it")
        yield kind, at, at + length
        at += length

"""What a PACS tells us without being asked: Instance Availability Notification (PS3.4 annex R, an N-CREATE that says
which instances of a study exist) and the results of Storage Commitment (PS3.4 J.3.3, an N-EVENT-REPORT).

Parsed within bounds, answered, and handed on as a hint; nothing is stored here, and nothing depends on it. The data set
comes from the network: the same walker reads it that reads every received file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dicom_node.dimse.seam import StoreRequest, StoreResponse
from dicom_node.dimse.status import SUCCESS
from dicom_node.errors import CannotUnderstandError, TooLargeError
from dicom_node.store.header import header_of
from dicom_node.store.validate import is_uid
from dicom_node.study import Header

MAX_BYTES = 4 << 20
MAX_INSTANCES = 5000
"""A study of more is not hurried: the link to the stages process carries one line a notification."""
INVALID_ATTRIBUTE = 0x0106
"""PS3.7 annex C.4.2: the answer to a data set that cannot be read or names no study."""
INVALID_ARGUMENT_VALUE = 0x0115
NO_SUCH_EVENT_TYPE = 0x0113
"""PS3.7 10.1.1.1.8: the answers to an N-EVENT-REPORT."""
COMMITTED, FAILURES_EXIST = 1, 2
"""Event Type IDs of the Storage Commitment Push Model (PS3.4 J.3.3.1)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Availability:
    """What a notification says: these instances of one study can be had."""

    study_instance_uid: str
    sop_instance_uids: tuple[str, ...]
    """Empty = more than `MAX_INSTANCES`, or some are off line: no hint."""


def availability_of(data: bytes, transfer_syntax_uid: str) -> Availability:
    """Raises CannotUnderstandError."""
    header = header_of(data, transfer_syntax_uid)
    study = header.text("StudyInstanceUID").strip()
    if not is_uid(study):
        raise CannotUnderstandError("the notification names no study")
    named = [
        i for series in header.items_of("ReferencedSeriesSequence") for i in series.items_of("ReferencedSOPSequence")
    ]
    uids = tuple(dict.fromkeys(i.text("ReferencedSOPInstanceUID").strip() for i in named))
    if not all(map(is_uid, uids)):
        raise CannotUnderstandError("the notification holds a malformed UID")
    complete = len(uids) <= MAX_INSTANCES and all(_online(i) for i in named)
    return Availability(study, uids if complete else ())


def _online(item: Header) -> bool:
    return item.text("InstanceAvailability").strip() == "ONLINE"


@dataclass(frozen=True, slots=True)
class Commitment:
    """The result of one storage commitment request: how many instances the peer answers for, and how many not."""

    committed: int
    failed: int


def commitment_of(data: bytes, transfer_syntax_uid: str) -> Commitment:
    """Raises CannotUnderstandError."""
    header = header_of(data, transfer_syntax_uid)
    if not is_uid(header.text("TransactionUID").strip()):
        raise CannotUnderstandError("the report names no transaction")
    return Commitment(len(header.items_of("ReferencedSOPSequence")), len(header.items_of("FailedSOPSequence")))


class NotificationSink(Generic[T]):
    """Collects one data set in memory (`seam.Sink`); `told` hears what it says before it is answered."""

    def __init__(
        self,
        transfer_syntax_uid: str,
        read: Callable[[bytes, str], T],
        told: Callable[[T], None],
        *,
        unreadable: int = INVALID_ATTRIBUTE,
    ) -> None:
        self._syntax, self._read, self._told, self._unreadable = transfer_syntax_uid, read, told, unreadable
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        """See seam.Sink."""
        if len(self._data) + len(data) > MAX_BYTES:
            self._data.clear()
            raise TooLargeError("notification larger than accepted")
        self._data += data

    def finish(self) -> StoreResponse:
        """See seam.Sink."""
        try:
            said = self._read(bytes(self._data), self._syntax)
        except CannotUnderstandError as e:
            return StoreResponse(self._unreadable, str(e))
        self._told(said)
        return StoreResponse(SUCCESS)

    def abandon(self) -> None:
        """See seam.Sink."""
        self._data.clear()


def commitment_sink(request: StoreRequest, told: Callable[[Commitment], None]) -> NotificationSink[Commitment]:
    """For one N-EVENT-REPORT."""
    if request.event_type_id in (COMMITTED, FAILURES_EXIST):
        return NotificationSink(request.transfer_syntax_uid, commitment_of, told, unreadable=INVALID_ARGUMENT_VALUE)
    return NotificationSink(request.transfer_syntax_uid, _no_such_event, told, unreadable=NO_SUCH_EVENT_TYPE)


def _no_such_event(_data: bytes, _syntax: str) -> Commitment:
    raise CannotUnderstandError("no such event type")

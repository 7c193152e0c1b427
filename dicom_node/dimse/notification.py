"""Instance Availability Notification as SCP (PS3.4 annex R): an N-CREATE that says which instances of a study exist.

Parsed within bounds, answered, and handed on as a hint; nothing is stored here, and nothing depends on it. The data set
comes from the network: the same walker reads it that reads every received file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dicom_node.dimse.seam import StoreResponse
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


class NotificationSink:
    """Collects one data set in memory (`seam.Sink`); `told` hears of it before it is answered."""

    def __init__(self, transfer_syntax_uid: str, told: Callable[[Availability], None]) -> None:
        self._syntax, self._told, self._data = transfer_syntax_uid, told, bytearray()

    def write(self, data: memoryview) -> None:
        """See seam.Sink."""
        if len(self._data) + len(data) > MAX_BYTES:
            self._data.clear()
            raise TooLargeError("notification larger than accepted")
        self._data += data

    def finish(self) -> StoreResponse:
        """See seam.Sink."""
        try:
            said = availability_of(bytes(self._data), self._syntax)
        except CannotUnderstandError as e:
            return StoreResponse(INVALID_ATTRIBUTE, str(e))
        self._told(said)
        return StoreResponse(SUCCESS)

    def abandon(self) -> None:
        """See seam.Sink."""
        self._data.clear()

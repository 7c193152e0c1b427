"""Is this data set what its command said, and can it be read? Asked of a received file before it is acknowledged.

Structure within bounds (`elements.py`), SOP Class and Instance as in the command, Study and Series named, UIDs of
digits and dots. No value is decoded but the identifying UIDs; nothing of the content is judged. Raises ReceiveError
leaves.
"""

from __future__ import annotations

import re
from pathlib import Path

from dicom_node.errors import DataSetMismatchError, MalformedUidError, StoreError
from dicom_node.store.elements import check, mapped
from dicom_node.store.part10 import FileMeta

SOP_CLASS, SOP_INSTANCE = 0x00080016, 0x00080018
STUDY, SERIES = 0x0020000D, 0x0020000E
_IDENTIFYING = {
    SOP_CLASS: "SOP Class UID",
    SOP_INSTANCE: "SOP Instance UID",
    STUDY: "Study Instance UID",
    SERIES: "Series Instance UID",
}
AFFECTED_SOP_CLASS, AFFECTED_SOP_INSTANCE = 0x00000002, 0x00001000

MAX_UID = 64
# Components with leading zeros break PS3.5 9.1, but archives hold them for ever: they are tolerated.
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """PS3.5 section 9, but leading zeros are let through."""
    return len(text) <= MAX_UID and _UID.fullmatch(text) is not None


def check_command(sop_class_uid: str, sop_instance_uid: str) -> None:
    """Before the data set comes: the UIDs of the C-STORE command. Raises MalformedUidError."""
    for element, uid in ((AFFECTED_SOP_CLASS, sop_class_uid), (AFFECTED_SOP_INSTANCE, sop_instance_uid)):
        if not is_uid(uid):
            raise MalformedUidError("malformed UID in the command", offending_element=element)


def check_data_set(file: Path | int, meta: FileMeta) -> None:
    """The received file (or its descriptor), `meta` from its command.

    Raises CannotUnderstand-, DataSetMismatch- or MalformedUidError.
    """
    try:
        with mapped(file) as data:
            found = check(data, meta.dataset_offset, len(data), meta.transfer_syntax_uid, frozenset(_IDENTIFYING))
    except OSError as e:
        raise StoreError(f"a received file cannot be read ({e.strerror})") from e
    uids = {tag: value.rstrip(b"\x00 ").decode("ascii", "replace") for tag, value in found.values.items()}
    for tag, name in _IDENTIFYING.items():
        if not uids.get(tag):
            raise DataSetMismatchError(f"{name} is missing", offending_element=tag)
        if not is_uid(uids[tag]):
            raise MalformedUidError(f"{name} is malformed", offending_element=tag)
    for tag, expected in ((SOP_CLASS, meta.sop_class_uid), (SOP_INSTANCE, meta.sop_instance_uid)):
        if uids[tag] != expected:
            raise DataSetMismatchError(f"{_IDENTIFYING[tag]} differs from the command", offending_element=tag)

"""DIMSE command sets (PS3.7 section 6.3.1 and annex E): implicit little endian, group 0000. Requests in, responses out.

Parsed and written here rather than by way of a pydicom Dataset: hostile bytes meet no more code than this, a UID that
breaks PS3.5 is not complained about in the log for each instance, and a response costs microseconds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

C_STORE_RQ = 0x0001
C_ECHO_RQ = 0x0030
N_EVENT_REPORT_RQ = 0x0100
N_CREATE_RQ = 0x0140
RESPONSE = 0x8000
NO_DATA_SET = 0x0101


@dataclass(frozen=True, slots=True)
class Command:
    """The elements of a request that this node looks at."""

    field: int
    message_id: int
    has_data_set: bool
    sop_class_uid: str
    sop_instance_uid: str
    event_type_id: int | None = None
    """Of an N-EVENT-REPORT-RQ."""


def parse_command(data: bytes) -> Command:
    """One complete command set. Raises ValueError when it is not one."""
    values: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise ValueError("the command ends within an element")
        group, element, length = struct.unpack_from("<HHL", data, at)
        at += 8
        if group != 0 or length > len(data) - at:
            raise ValueError("not a command element, or longer than the command")
        values[element] = data[at : at + length]
        at += length
    return Command(
        field=_number(values, 0x0100),
        message_id=_number(values, 0x0110),
        has_data_set=_number(values, 0x0800) != NO_DATA_SET,
        sop_class_uid=_uid(values, 0x0002),
        sop_instance_uid=_uid(values, 0x1000),
        event_type_id=_number(values, 0x1002) if 0x1002 in values else None,
    )


def encode_response(request: Command, status: int, *, comment: str = "", offending_element: int | None = None) -> bytes:
    """The response to a request. A UID that cannot be one is left out (they are optional)."""
    body = b"".join(
        (
            _element(0x0002, _echoed(request.sop_class_uid)),
            _element(0x0100, struct.pack("<H", request.field | RESPONSE)),
            _element(0x0120, struct.pack("<H", request.message_id)),
            _element(0x0800, struct.pack("<H", NO_DATA_SET)),
            _element(0x0900, struct.pack("<H", status)),
            _element(
                0x0901, b"" if offending_element is None else struct.pack("<HH", *divmod(offending_element, 65536))
            ),
            _element(0x0902, comment.encode("ascii", "replace"), b" "),
            _element(0x1000, _echoed(request.sop_instance_uid)),
        )
    )
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def _element(element: int, value: bytes, pad: bytes = b"\0") -> bytes:
    if not value:
        return b""
    value += pad * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value


def _echoed(uid: str) -> bytes:
    return uid.encode("ascii") if len(uid) <= 64 and uid.isascii() and uid.isprintable() else b""


def _number(values: dict[int, bytes], element: int) -> int:
    value = values.get(element, b"")
    if len(value) != 2:
        raise ValueError(f"element (0000,{element:04X}) is missing, or not one number")
    return int.from_bytes(value, "little")


def _uid(values: dict[int, bytes], element: int) -> str:
    return values.get(element, b"").rstrip(b"\x00 ").decode("ascii", "replace")

"""The File Meta Information of a stored instance (PS3.10 section 7), written and read by us.

A stored file is a preamble, "DICM", group 0002 and the data set exactly as it came over the wire. Group 0002 also says
who sent it to whom, so the file alone is enough to index it: AE titles in (0002,0016) to (0002,0018), association, peer
and time in a private information item, (0002,0100) and (0002,0102). Nothing here decodes a data set.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from typing import Any

from dicom_node.errors import CannotUnderstandError, StoreError
from dicom_node.store.elements import Buffer, mapped

IMPLEMENTATION_CLASS_UID = "2.25.309477082441411176053179536836556028423"
IMPLEMENTATION_VERSION_NAME = "DICOM_NODE_1"
PRIVATE_CREATOR_UID = "2.25.137745174703146249082272466297415805785"
"""Private Information Creator UID (0002,0100): says that (0002,0102) is our JSON."""

_PREAMBLE = 128
_MAX_META = 64 * 1024
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_ELEMENT, _LENGTH = Struct("<HH2sH"), Struct("<L")


@dataclass(frozen=True, slots=True)
class FileMeta:
    """Group 0002 of one file, and where its data set begins."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae_title: str = ""
    called_ae_title: str = ""
    peer: str = ""
    association_id: str = ""
    received_at: float = 0.0
    """Seconds since the epoch; the file's time where the file is not ours."""
    dataset_offset: int = 0


def encode_meta(meta: FileMeta) -> bytes:
    """Preamble and group 0002. Its length does not depend on `received_at`, so the time can be set in place later."""
    private = json.dumps(
        {
            "association": meta.association_id,
            "peer": meta.peer,
            "received_at": _time(meta.received_at),
            "calling": meta.calling_ae_title,
            "called": meta.called_ae_title,
        },
        separators=(",", ":"),
    ).encode("ascii")
    body = b"".join(
        (
            _long(0x0001, b"OB", b"\x00\x01"),
            _uid(0x0002, meta.sop_class_uid),
            _uid(0x0003, meta.sop_instance_uid),
            _uid(0x0010, meta.transfer_syntax_uid),
            _uid(0x0012, IMPLEMENTATION_CLASS_UID),
            _short(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode(), b" "),
            _short(0x0016, b"AE", _ae(meta.calling_ae_title), b" "),
            _short(0x0017, b"AE", _ae(meta.calling_ae_title), b" "),
            _short(0x0018, b"AE", _ae(meta.called_ae_title), b" "),
            _uid(0x0100, PRIVATE_CREATOR_UID),
            _long(0x0102, b"OB", private + b" " * (len(private) % 2)),
        )
    )
    return b"\x00" * _PREAMBLE + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(body)) + body


class Time:
    """Where `received_at` stands in an encoded meta group: its text has always the same length."""

    _KEY = b'"received_at":"'

    def __init__(self, head: bytes) -> None:
        self._offset = head.find(self._KEY) + len(self._KEY)

    def at(self, received_at: float) -> tuple[bytes, int]:
        """Bytes and offset, as `os.pwrite` takes them."""
        return _time(received_at).encode(), self._offset


def read_meta(path: Path) -> FileMeta:
    """Group 0002 of any Part 10 file; also of a bare data set: its transfer syntax is then taken from its first bytes.

    Raises CannotUnderstandError when it is neither, StoreError when the file cannot be read.
    """
    try:
        with mapped(path) as data:
            return meta_of(data, path)
    except OSError as e:
        raise StoreError(f"the file cannot be read ({e.strerror})") from e


def meta_of(data: Buffer, path: Path) -> FileMeta:
    """The same of the file's bytes. Raises CannotUnderstandError, OSError."""
    meta = _read(data)
    return meta if meta.received_at else replace(meta, received_at=path.stat().st_mtime)


def _read(data: Buffer) -> FileMeta:
    start = bytes(data[: _PREAMBLE + 4])
    if start[_PREAMBLE:] == b"DICM":
        offset = len(start)
    elif start[:2] in (b"\x02\x00", b"\x08\x00"):  # some archives drop the preamble, old ones the meta group as well
        offset = 0
    else:
        raise CannotUnderstandError("not a DICOM file")
    values: dict[int, bytes] = {}
    for element, value, end in _elements(data, offset):
        values[element], offset = value, end
    if 0x0010 not in values:
        return FileMeta("", "", _guess(start), dataset_offset=offset)

    def text(element: int) -> str:
        return values.get(element, b"").rstrip(b"\x00 ").decode("ascii", "replace").strip()

    ours = _private(values) if text(0x0100) == PRIVATE_CREATOR_UID else {}
    return FileMeta(
        sop_class_uid=text(0x0002),
        sop_instance_uid=text(0x0003),
        transfer_syntax_uid=text(0x0010),
        calling_ae_title=str(ours.get("calling", text(0x0017))),
        called_ae_title=str(ours.get("called", text(0x0018))),
        peer=str(ours.get("peer", "")),
        association_id=str(ours.get("association", "")),
        received_at=float(ours.get("received_at", 0.0)),
        dataset_offset=offset,
    )


def _elements(data: Buffer, at: int) -> Iterator[tuple[int, bytes, int]]:
    """Elements of group 0002, their values and where those end.

    Always explicit little endian (PS3.10 7.1). The stated group length is not trusted.
    """
    total, size = 0, len(data)
    while size - at >= 8:
        group, element, vr, length = _ELEMENT.unpack_from(data, at)
        if group != 2:
            return
        at += 8
        if vr in _LONG:
            length = _LENGTH.unpack_from(data, at)[0] if size - at >= 4 else _MAX_META
            at += 4
        total += length
        if total > _MAX_META:
            raise CannotUnderstandError("the file meta information is too long")
        if length > size - at:
            raise CannotUnderstandError("the file ends within its meta information")
        at += length
        yield element, bytes(data[at - length : at]), at


def _private(values: dict[int, bytes]) -> dict[str, Any]:
    """Our private information; a creator UID with anything else behind it is somebody's forgery, and ignored."""
    try:
        data = json.loads(values.get(0x0102, b""))
        float(data["received_at"])
    except (ValueError, KeyError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


def _time(seconds: float) -> str:
    return f"{seconds:017.6f}"


def _guess(start: bytes) -> str:
    """A bare data set: explicit little endian if a VR stands where one must, else implicit."""
    return "1.2.840.10008.1.2.1" if start[4:6].isalpha() and start[4:6].isupper() else "1.2.840.10008.1.2"


def _short(element: int, vr: bytes, value: bytes, pad: bytes) -> bytes:
    value += pad * (len(value) % 2)
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value


def _long(element: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sHL", 2, element, vr, 0, len(value)) + value


def _uid(element: int, uid: str) -> bytes:
    return _short(element, b"UI", uid.encode("ascii", "replace"), b"\x00")


def _ae(title: str) -> bytes:
    return title.encode("ascii", "replace")[:16]

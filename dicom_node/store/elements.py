"""Walks the encoded elements of a data set (PS3.5 section 7) within bounds, without decoding a value.

This is the guard in front of all that trusts a data set: no element beyond the end of what encloses it, sequences at
most `MAX_DEPTH` deep, at most `MAX_ITEMS` items and `MAX_ELEMENTS` elements or fragments. It does not recurse, reads
nothing but element headers (bulk data are stepped over), and raises only `CannotUnderstandError`. The listener walks
before it acknowledges; `header.py` walks again to build a Header, so the two can never disagree on what is readable.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from struct import Struct

from pydicom.datadict import DicomDictionary  # type: ignore[attr-defined]

from dicom_node.errors import CannotUnderstandError

MAX_DEPTH = 32
MAX_ITEMS = 100_000
MAX_ELEMENTS = 1_000_000

Buffer = bytes | memoryview | mmap.mmap

UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_NAMES = {vr: vr.decode() for vr in _SHORT | _LONG}

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_GE_PRIVATE = "1.2.840.113619.5.2"  # implicit little endian with big endian pixels: as a file only, never negotiated
_DEFLATED = frozenset(
    {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205", "1.2.840.10008.1.2.8.1"}
)


class Kind(IntEnum):
    """What the walker met."""

    VALUE = 0
    SEQUENCE = 1
    ITEM = 2
    ITEM_END = 3
    SEQUENCE_END = 4


@dataclass(frozen=True, slots=True)
class Encoding:
    """How element headers and binary values are written."""

    implicit: bool
    little: bool


_EXPLICIT_LE = Encoding(False, True)
_EXPLICIT_BE = Encoding(False, False)
_IMPLICIT_LE = Encoding(True, True)

Event = tuple[Kind, int, str, int, int, Encoding]
"""Kind, tag, VR ("" = not known: implicit and not in the dictionary), offset and length of the value, encoding."""


def encoding_of(transfer_syntax_uid: str) -> Encoding:
    """The encoding of a Transfer Syntax (PS3.5 annex A). Deflated ones are refused: 2 MB can inflate to gigabytes."""
    if transfer_syntax_uid in _DEFLATED:
        raise CannotUnderstandError("deflated transfer syntax")
    if transfer_syntax_uid in (IMPLICIT_LITTLE, _GE_PRIVATE):
        return _IMPLICIT_LE
    return _EXPLICIT_BE if transfer_syntax_uid == EXPLICIT_BIG else _EXPLICIT_LE


@contextmanager
def mapped(file: Path | int) -> Iterator[Buffer]:
    """The file's bytes without reading them in. An open file may be given by its descriptor; it stays open."""
    fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size == 0:
            yield b""
            return
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
            yield view
    finally:
        if not isinstance(file, int):
            os.close(fd)


@dataclass(slots=True)
class _Frame:
    """One open data set (the root or an item) or sequence."""

    is_sequence: bool
    end: int
    """Nothing inside may pass this offset."""
    delimited: bool
    """Ends with a delimitation item, not by its length."""
    encoding: Encoding


@lru_cache(maxsize=4096)
def _plain_explicit(head: bytes) -> tuple[int, str, bool] | None:
    """Tag, VR and whether 32 bits of length follow, of a head that can only be a value's; None = look closer."""
    vr = head[4:]
    if head[:2] in _NOT_IN_DATA_SET or vr not in _NAMES or vr == b"SQ":
        return None
    return _tag(head), _NAMES[vr], vr in _LONG


@lru_cache(maxsize=4096)
def _plain_implicit(head: bytes) -> tuple[int, str, bool] | None:
    """The same where no VR is written."""
    vr = dictionary_vr(_tag(head))
    return None if head[:2] in _NOT_IN_DATA_SET or vr == "SQ" else (_tag(head), vr, False)


def _tag(head: bytes) -> int:
    return int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")


_NOT_IN_DATA_SET = frozenset((b"\x00\x00", b"\x02\x00", b"\xfe\xff"))
_PLAIN = {False: (Struct("<6sH").unpack_from, _plain_explicit), True: (Struct("<4sL").unpack_from, _plain_implicit)}
"""By Encoding.implicit, little endian."""

_HEADERS = {True: Struct("<HHL"), False: Struct(">HHL")}
_SHORTS = {True: Struct("<H"), False: Struct(">H")}
_LONGS = {True: Struct("<L"), False: Struct(">L")}


class Walker:
    """One walk over `data[start:end]`; iterate it once. `offset` says how far it came."""

    def __init__(self, data: Buffer, start: int, end: int, encoding: Encoding) -> None:
        self._data = data
        self.offset = start
        self._stack = [_Frame(False, end, False, encoding)]
        self._depth = self._items = self._elements = 0

    def __iter__(self) -> Iterator[Event]:
        while self._stack:
            frame = self._stack[-1]
            if not frame.delimited and self.offset == frame.end:
                self._stack.pop()
                if self._stack:
                    yield self._closed(frame)
            elif frame.is_sequence:
                yield self._in_sequence(frame)
            else:
                yield from self._values(frame)
                if frame.delimited or self.offset != frame.end:
                    yield self._in_data_set(frame)

    @property
    def depth(self) -> int:
        """Sequences open now; 0 = the elements of the data set itself."""
        return self._depth

    @property
    def elements(self) -> int:
        """Elements and fragments met so far."""
        return self._elements

    def _closed(self, frame: _Frame) -> Event:
        if frame.is_sequence:
            self._depth -= 1
            return Kind.SEQUENCE_END, _SEQUENCE_END, "", self.offset, 0, frame.encoding
        return Kind.ITEM_END, _ITEM_END, "", self.offset, 0, frame.encoding

    def _values(self, frame: _Frame) -> Iterator[Event]:
        """Values that nothing can be said against, which are nearly all: a way past `_in_data_set`, for speed only.

        It stops before the first element that is anything else, sound or not, and never judges one itself.
        """
        if not frame.encoding.little:
            return
        data, at, end, encoding = self._data, self.offset, frame.end, frame.encoding
        unpack, known = _PLAIN[encoding.implicit]
        kind = Kind.VALUE
        while end - at >= 8 and self._elements < MAX_ELEMENTS:
            head, length = unpack(data, at)
            plain = known(head)
            if plain is None:
                return
            at += 8
            tag, vr, long = plain
            if long:
                if end - at < 4:
                    return
                (length,) = _LONGS[True].unpack_from(data, at)
                at += 4
            if length == UNDEFINED or length > end - at:
                return
            at += length
            self._elements += 1
            self.offset = at
            yield kind, tag, vr, at - length, length, encoding

    def _header(self, frame: _Frame) -> tuple[int, int]:
        if frame.end - self.offset < 8:
            raise CannotUnderstandError("the data set ends within an element")
        group, element, length = _HEADERS[frame.encoding.little].unpack_from(self._data, self.offset)
        return group << 16 | element, length

    def _in_sequence(self, frame: _Frame) -> Event:
        tag, length = self._header(frame)
        if tag == _SEQUENCE_END:
            self.offset += 8
            # Some writers end a sequence of defined length with a delimiter all the same; nothing may follow it.
            if not frame.delimited and self.offset != frame.end:
                raise CannotUnderstandError("a sequence ends before its length", offending_element=tag)
            self._stack.pop()
            return self._closed(frame)
        if tag != _ITEM:
            raise CannotUnderstandError("no item where a sequence must have one", offending_element=tag)
        self._items += 1
        if self._items > MAX_ITEMS:
            raise CannotUnderstandError("too many sequence items")
        self.offset += 8
        self._push(frame, False, tag, length, frame.encoding)
        return Kind.ITEM, tag, "", self.offset, length, frame.encoding

    def _in_data_set(self, frame: _Frame) -> Event:
        tag, length = self._header(frame)
        group = tag >> 16
        if group in (0x0000, 0x0002, 0xFFFE):
            if tag == _ITEM_END and frame.delimited:
                self.offset += 8
                self._stack.pop()
                return self._closed(frame)
            # PS3.5 7.1: no command or file meta group in a data set; a reader of the file would take them for its own.
            raise CannotUnderstandError("an element that may not stand in a data set", offending_element=tag)
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise CannotUnderstandError("too many elements")
        vr, length, value = self._vr(frame, tag, length)
        if length == UNDEFINED:
            return self._undefined(frame, tag, vr, value)
        if value + length > frame.end:
            raise CannotUnderstandError("an element is longer than what holds it", offending_element=tag)
        if vr == "SQ":
            self.offset = value
            self._push(frame, True, tag, length, frame.encoding)
            return Kind.SEQUENCE, tag, vr, value, length, frame.encoding
        self.offset = value + length
        return Kind.VALUE, tag, vr, value, length, frame.encoding

    def _vr(self, frame: _Frame, tag: int, length: int) -> tuple[str, int, int]:
        """VR, value length and value offset of the element at `offset`."""
        at, little = self.offset, frame.encoding.little
        if frame.encoding.implicit:
            return dictionary_vr(tag), length, at + 8
        raw = bytes(self._data[at + 4 : at + 6])
        if raw in _LONG:
            if frame.end - at < 12:
                raise CannotUnderstandError("the data set ends within an element", offending_element=tag)
            return _NAMES[raw], _LONGS[little].unpack_from(self._data, at + 8)[0], at + 12
        if raw in _SHORT or (raw.isalpha() and raw.isupper()):
            return _NAMES.get(raw, "UN"), _SHORTS[little].unpack_from(self._data, at + 6)[0], at + 8
        # Not a VR: some writers switch to implicit within an explicit data set. Read it as pydicom does.
        return dictionary_vr(tag), length, at + 8

    def _undefined(self, frame: _Frame, tag: int, vr: str, value: int) -> Event:
        """Undefined length: a sequence, encapsulated fragments (PS3.5 A.4), or UN that hides an implicit sequence."""
        if tag == PIXEL_DATA or vr in ("OB", "OW"):
            self.offset = self._fragments(frame, tag, value)
            return Kind.VALUE, tag, vr or "OB", value, self.offset - value, frame.encoding
        if vr not in ("SQ", "UN", ""):
            raise CannotUnderstandError("undefined length where none is allowed", offending_element=tag)
        # PS3.5 6.2.2: the items of a UN sequence are implicit little endian whatever the transfer syntax.
        encoding = _IMPLICIT_LE if vr == "UN" else frame.encoding
        self.offset = value
        self._push(frame, True, tag, UNDEFINED, encoding)
        return Kind.SEQUENCE, tag, "SQ", value, UNDEFINED, encoding

    def _fragments(self, frame: _Frame, tag: int, at: int) -> int:
        unpack = _HEADERS[frame.encoding.little].unpack_from
        while True:
            if frame.end - at < 8:
                raise CannotUnderstandError("the data set ends within a fragment", offending_element=tag)
            group, element, length = unpack(self._data, at)
            at += 8
            if (group, element) == (0xFFFE, 0xE0DD):
                return self._doubled_end(frame, at)
            if (group, element) != (0xFFFE, 0xE000) or length > frame.end - at:
                raise CannotUnderstandError("a fragment is not an item, or too long", offending_element=tag)
            at += length
            self._elements += 1
            if self._elements > MAX_ELEMENTS:
                raise CannotUnderstandError("too many fragments", offending_element=tag)

    def _doubled_end(self, frame: _Frame, at: int) -> int:
        """Some clips close their fragments twice at the very end (seen from an echocardiography system): harmless."""
        marker = _HEADERS[frame.encoding.little].pack(0xFFFE, 0xE0DD, 0)
        return frame.end if bytes(self._data[at : min(at + 9, frame.end)]) == marker else at

    def _push(self, frame: _Frame, is_sequence: bool, tag: int, length: int, encoding: Encoding) -> None:
        if is_sequence:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise CannotUnderstandError("sequences are nested too deep", offending_element=tag)
        delimited = length == UNDEFINED
        if not delimited and self.offset + length > frame.end:
            raise CannotUnderstandError("an item is longer than what holds it", offending_element=tag)
        self._stack.append(_Frame(is_sequence, frame.end if delimited else self.offset + length, delimited, encoding))


def dictionary_vr(tag: int) -> str:
    """VR of a public tag (PS3.6); "" for private and unknown ones."""
    entry = DicomDictionary.get(tag)
    return entry[0] if entry is not None else ""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a structural check found: the asked-for elements of the data set itself (not of its items)."""

    values: dict[int, bytes]
    elements: int


def check(data: Buffer, start: int, end: int, transfer_syntax_uid: str, wanted: frozenset[int]) -> Checked:
    """Walk the whole data set; raise CannotUnderstandError unless it is sound. Values are cut at 256 bytes."""
    walker = Walker(data, start, end, encoding_of(transfer_syntax_uid))
    values: dict[int, bytes] = {}
    seen: set[int] = set()
    for kind, tag, _vr, offset, length, _encoding in walker:
        if walker.depth > (kind is Kind.SEQUENCE) or kind is Kind.SEQUENCE_END:
            continue
        # PS3.5 7.1; which of the two is meant would depend on who reads. Of private elements nobody here reads either.
        if tag in seen and not tag & 0x10000:
            raise CannotUnderstandError("an element stands twice", offending_element=tag)
        seen.add(tag)
        if kind is Kind.VALUE and tag in wanted:
            values[tag] = bytes(data[offset : offset + min(length, 256)])
    return Checked(values, walker.elements)

"""Reads the attributes of a stored file into a `study.Header`: text decoded, numbers as numbers, bulk data left out.

It accepts exactly what the listener's structural check accepts (same walker, same bounds): an acknowledged instance can
always be indexed. A value that makes no sense never fails the file; it stays text, or is left out.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from types import MappingProxyType

from pydicom.datadict import DicomDictionary, private_dictionary_VR  # type: ignore[attr-defined]

from dicom_node.errors import StoreError
from dicom_node.store.charset import Charset, charset_of
from dicom_node.store.elements import Buffer, Encoding, Kind, Walker, encoding_of, mapped
from dicom_node.store.part10 import read_meta
from dicom_node.study import Header, Scalar, Value

MAX_VALUE_BYTES = 1 << 20
"""A longer value is bulk data, whatever its VR says."""
MAX_HEADER_BYTES = 32 << 20
"""Beyond this the rest of the values is left out: memory is bounded, the instance still indexed."""
MAX_PRIVATE_BYTES = 256

_ONE_VALUE = frozenset(["LT", "ST", "UR", "UT"])
_LOCALISED = frozenset(["LO", "LT", "PN", "SH", "ST", "UC", "UT"])  # ruled by Specific Character Set (PS3.5 6.1.2.3)
_TEXT = _LOCALISED | {"AE", "AS", "CS", "DA", "DT", "TM", "UI", "UR"}
_BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d", "SV": "q", "UV": "Q"}
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")

_CHARSET, _PIXEL_REPRESENTATION = 0x00080005, 0x00280103


def read_header(path: Path, fallback_charset: str = "") -> Header:
    """All attributes of the file but its bulk data. Raises CannotUnderstandError, StoreError.

    `fallback_charset`: a defined term of Specific Character Set, for text that the declared one does not take.
    """
    meta = read_meta(path)
    encoding = encoding_of(meta.transfer_syntax_uid)
    try:
        with mapped(path) as data:
            return _Reader(data, fallback_charset).read(meta.dataset_offset, len(data), encoding)
    except OSError as e:
        raise StoreError(f"a stored file cannot be read ({e.strerror})") from e


def header_of(data: bytes, transfer_syntax_uid: str) -> Header:
    """The same of a data set in memory, without a meta group. Raises CannotUnderstandError."""
    return _Reader(data, "").read(0, len(data), encoding_of(transfer_syntax_uid))


class _Level:
    """One data set or item under construction."""

    __slots__ = ("charset", "keyword", "sequences", "values")

    def __init__(self, keyword: str, charset: Charset) -> None:
        self.keyword = keyword
        """Of the sequence this item belongs to; "" = a private sequence, left out."""
        self.charset = charset
        self.values: dict[str, Value] = {}
        self.sequences: list[tuple[str, list[Header]]] = []


class _Reader:
    """Follows one walk and builds the Header; keeps no recursion, as the walker does not."""

    def __init__(self, data: Buffer, fallback_charset: str) -> None:
        self._data, self._fallback = data, fallback_charset
        self._guessed = False
        self._budget = MAX_HEADER_BYTES
        self._signed = False
        self._creators: dict[int, str] = {}

    def read(self, start: int, end: int, encoding: Encoding) -> Header:
        levels = [_Level("", charset_of((), self._fallback))]
        for kind, tag, vr, offset, length, how in Walker(self._data, start, end, encoding):
            level = levels[-1]
            if kind is Kind.VALUE:
                self._take(level, tag, vr, offset, length, how)
            elif kind is Kind.SEQUENCE:
                level.sequences.append((_keyword(tag), []))
            elif kind is Kind.ITEM:
                levels.append(_Level(level.sequences[-1][0], level.charset))
            elif kind is Kind.ITEM_END:
                levels.pop()
                if level.keyword:
                    levels[-1].sequences[-1][1].append(Header(MappingProxyType(level.values)))
            else:
                keyword, items = level.sequences.pop()
                if keyword and items:
                    level.values.setdefault(keyword, tuple(items))
        return Header(MappingProxyType(levels[0].values), self._guessed)

    def _take(self, level: _Level, tag: int, vr: str, offset: int, length: int, encoding: Encoding) -> None:
        private = bool(tag >> 16 & 1)
        if not length or length > (MAX_PRIVATE_BYTES if private else MAX_VALUE_BYTES):
            return
        name = f"{tag:08X}" if private else _keyword(tag)
        if not name or name in level.values:
            return
        self._budget -= length
        if self._budget < 0:
            return
        raw = bytes(self._data[offset : offset + length])
        if private:
            vr, encoding = self._private_vr(tag, vr, raw, encoding)
        elif vr == "UN":
            # PS3.5 6.2.2: somebody on the way did not know the VR, and kept the implicit little endian bytes.
            vr, encoding = DicomDictionary[tag][0], Encoding(True, True)
        value = self._decode(level, tag, vr, raw, encoding)
        if value is not None:
            level.values[name] = value

    def _private_vr(self, tag: int, vr: str, raw: bytes, encoding: Encoding) -> tuple[str, Encoding]:
        """VR of a private element: as written, else from pydicom's private dictionaries by its creator."""
        group, block = tag & 0xFFFF0000, tag >> 8 & 0xFF
        if block == 0 and tag & 0xFF >= 0x10:
            self._creators[tag] = raw.decode("ascii", "replace").strip(" \x00")
            return "LO", encoding
        if vr not in ("", "UN"):
            return vr, encoding
        creator = self._creators.get(group | block, "")
        try:
            known = private_dictionary_VR(tag, creator)
        except KeyError:
            known = ""
        return known, encoding if vr == "" else Encoding(True, True)

    def _decode(self, level: _Level, tag: int, vr: str, raw: bytes, encoding: Encoding) -> Value | None:
        if " or " in vr:  # the implicit reader's dictionary: "US or SS", decided by Pixel Representation (PS3.5 A.1)
            vr = ("SS" if self._signed else "US") if "SS" in vr else ""
        if vr in _BINARY:
            value = _numbers(_BINARY[vr], raw, encoding)
            if tag == _PIXEL_REPRESENTATION and value is not None:
                self._signed = value == 1
            return value
        if vr == "AT":
            return _tags(raw, encoding)
        if vr == "IS":
            return _collapse([_integer(v) for v in _ascii(raw).split("\\")])
        if vr == "DS":
            return _collapse([_decimal(v) for v in _ascii(raw).split("\\")])
        if vr not in _TEXT:
            return None
        if tag == _CHARSET:
            level.charset = charset_of(_ascii(raw).split("\\"), self._fallback)
        text = self._localised(level, tag, raw) if vr in _LOCALISED else _ascii(raw)
        if vr in _ONE_VALUE:
            return _collapse([text.rstrip(" \x00\r\n")])
        return _collapse([v.strip(" \x00") for v in text.split("\\")])

    def _localised(self, level: _Level, tag: int, raw: bytes) -> str:
        text, guessed = level.charset.read(raw)
        self._guessed |= guessed and not tag >> 16 & 1  # nobody reads the text of private attributes
        return text


def _keyword(tag: int) -> str:
    entry = DicomDictionary.get(tag)
    return str(entry[4]) if entry is not None else ""


def _ascii(raw: bytes) -> str:
    return raw.decode("ascii", "replace") if raw.isascii() else raw.decode("latin-1")


def _collapse(values: list[Scalar]) -> Value | None:
    """One value as itself, several as a tuple (empty ones kept: position has a meaning), none at all as absent."""
    if all(v == "" for v in values):
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _integer(text: str) -> Scalar:
    text = text.strip(" \x00")
    if _INTEGER.fullmatch(text):
        return int(text)
    number = _decimal(text)
    return int(number) if isinstance(number, float) and number.is_integer() and abs(number) < 2**53 else text


def _decimal(text: str) -> Scalar:
    text = text.strip(" \x00")
    if len(text) > 64 or not _DECIMAL.fullmatch(text):
        return text
    number = float(text)
    return number if math.isfinite(number) else text


def _numbers(code: str, raw: bytes, encoding: Encoding) -> Value | None:
    size = struct.calcsize("=" + code)
    count = len(raw) // size
    values = struct.unpack_from(("<" if encoding.little else ">") + str(count) + code, raw)
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        return None  # NaN is not a measurement, and not JSON
    return _collapse(list(values))


def _tags(raw: bytes, encoding: Encoding) -> Value | None:
    count = len(raw) // 4
    pairs = struct.unpack_from(("<" if encoding.little else ">") + "HH" * count, raw)
    return _collapse([f"{pairs[i]:04X}{pairs[i + 1]:04X}" for i in range(0, len(pairs), 2)])

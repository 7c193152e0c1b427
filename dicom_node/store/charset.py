"""Specific Character Set (0008,0005): bytes of a text value to `str`. Never fails (PS3.5 6.1.2, PS3.3 C.12.1.1.2).

Scanners declare wrong sets, none, or several. What is declared first is tried first, then UTF-8, the other declared
ones, the site's own (`store.fallback_charset`), and Latin-1, which takes any byte; what none of the declared ones
takes is told as a guess. Escape sequences of ISO 2022 never reach the reader: left in the text, as pydicom does with
the one of IR 58 (Simplified Chinese), they end up in reports and break every comparison. Routing, the ledger and the
reports read text here and nowhere else, so that they cannot disagree.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_CODECS = {
    "6": "ascii",
    "13": "shift_jis",
    "58": "gb18030",
    "87": "iso2022_jp",
    "100": "latin_1",
    "101": "iso8859_2",
    "109": "iso8859_3",
    "110": "iso8859_4",
    "126": "iso8859_7",
    "127": "iso8859_6",
    "138": "iso8859_8",
    "144": "iso8859_5",
    "148": "iso8859_9",
    "149": "cp949",
    "159": "iso2022_jp_2",
    "166": "tis_620",
    "192": "utf_8",
    "203": "iso8859_15",
}
"""By the ISO registration number: spelling errors (ISO_IR_100, ISO-IR 100, ISO 2022 100) do not matter. Where a
superset exists (GB 18030 of GB 2312, CP949 of KS X 1001) it decodes the same bytes alike, and takes the
characters that devices send beyond what they declare."""
_STAND_ALONE = {"GB18030": "gb18030", "GBK": "gb18030", "GB2312": "gb18030", "UTF-8": "utf_8", "UTF8": "utf_8"}
_REGISTERED = re.compile(r"ISO.*?([0-9]+)$", re.IGNORECASE)

_ESCAPES = {
    b"(B": "ascii",
    b"(J": "shift_jis",
    b")I": "shift_jis",
    b"-A": "latin_1",
    b"-B": "iso8859_2",
    b"-C": "iso8859_3",
    b"-D": "iso8859_4",
    b"-F": "iso8859_7",
    b"-G": "iso8859_6",
    b"-H": "iso8859_8",
    b"-L": "iso8859_5",
    b"-M": "iso8859_9",
    b"-T": "tis_620",
    b"-b": "iso8859_15",
    b"$)C": "cp949",
    b"$)A": "gb18030",
}
"""Escape sequences of PS3.3 tables C.12-3 and C.12-4, without ESC. The Japanese `$B`, `$@` and `$(D` are states of a
Python codec and go to it as they are."""
_ESCAPE = re.compile(rb"\x1b([\x20-\x2f]*[\x30-\x7e])")
_LEFT_OVER = re.compile("\x1b([\x20-\x2f]*[\x30-\x7e])?")


@dataclass(frozen=True, slots=True)
class Charset:
    """How the localised text of one data set is encoded."""

    codecs: tuple[str, ...]
    """Python codecs, the first is in force until an escape sequence; () = none declared."""
    fallback_name: str = ""
    """The site's own, for what was not declared, as a defined term; "" = none."""

    def decode(self, raw: bytes) -> str:
        """The text. Split it at backslashes only now: inside GB18030 a byte 0x5C is half a character."""
        return self.read(raw)[0]

    def read(self, raw: bytes) -> tuple[str, bool]:
        """The text, and whether its character set had to be guessed."""
        if raw.isascii() and 0x1B not in raw:
            return raw.decode("ascii"), False
        if 0x1B not in raw:
            return self._fragment(raw, "", b"")
        parts: list[tuple[str, bool]] = []
        at, codec, escape = 0, "", b""
        for match in _ESCAPE.finditer(raw):
            parts.append(self._fragment(raw[at : match.start()], codec, escape))
            at, escape = match.end(), match[0]
            codec = _ESCAPES.get(match[1], "iso2022_jp_2")
        parts.append(self._fragment(raw[at:], codec, escape))
        return _LEFT_OVER.sub("", "".join(text for text, _ in parts)), any(guessed for _, guessed in parts)

    def _fragment(self, raw: bytes, codec: str, escape: bytes) -> tuple[str, bool]:
        if not raw:
            return "", False
        if codec == "iso2022_jp_2":
            return _first_that_takes(escape + raw, (codec,), ())
        if codec:
            return _first_that_takes(raw, (codec,), ())
        fallback = (_codec(self.fallback_name),) if self.fallback_name else ()
        return _first_that_takes(raw, self.codecs[:1], ("utf_8", *self.codecs[1:], *fallback))


def _first_that_takes(raw: bytes, declared: Iterable[str], guesses: Iterable[str]) -> tuple[str, bool]:
    for codecs, guessed in ((declared, False), (guesses, True)):
        for codec in codecs:
            with contextlib.suppress(UnicodeDecodeError):
                return raw.decode(codec), guessed
    return raw.decode("latin_1"), True


@lru_cache(maxsize=64)
def _charset(names: tuple[str, ...], fallback: str) -> Charset:
    return Charset(tuple(codec for name in names if (codec := _codec(name))), fallback)


def _codec(name: str) -> str:
    if not name:
        return "ascii"  # an empty first value is the default repertoire
    if name.upper() in _STAND_ALONE:
        return _STAND_ALONE[name.upper()]
    registered = _REGISTERED.fullmatch(name)
    return _CODECS.get(registered[1], "") if registered else ""


def charset_of(names: Iterable[str], fallback: str = "") -> Charset:
    """From the values of Specific Character Set; none, or nonsense = guess, the site's `fallback` before Latin-1."""
    cleaned = tuple(name.strip(" \x00") for name in names)
    return _charset(cleaned if any(cleaned) else (), fallback)

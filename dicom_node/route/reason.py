"""One piece of evidence, and what of it may be shown to whom.

`sensitive` values (descriptions, comments: free text that may hold a name) are for the operator's own terminal; logs,
metrics, audit and error texts get `redacted` ones. Identifiers are withheld everywhere: nothing needs them to
understand a routing decision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

MAX_SHOWN = 80
WITHHELD: Final = "(withheld)"
FREE_TEXT: Final = "(text)"

_TECHNICAL_TEXT: Final = frozenset(
    {"Manufacturer", "ManufacturerModelName", "SoftwareVersions", "StationName", "TransducerData", "ProcessingFunction"}
    | {"ContrastBolusAgent", "SOPClassUID", "TransducerType", "SequenceName", "PatientAge", "PatientSex"}
)
_SHOWN_VR: Final = frozenset({"CS", "IS", "DS", "US", "SS", "UL", "SL", "UV", "SV", "FD", "FL", "AE", "SQ", "AT"})
_TEXT_VR: Final = frozenset({"LO", "SH", "ST", "LT", "UT", "UC"})
_NAMES_OF_NOBODY: Final = frozenset({"ProtocolName", "ViewName", "InstitutionalDepartmentName"})
_IDENTIFIER: Final = re.compile(r"(ID|IDs|Number|Identifier|Name|Address|Phone|Telephone\w*|Serial\w*)$")


@dataclass(frozen=True, slots=True)
class Reason:
    """One attribute value that speaks for something."""

    says: str
    """A body part, ELSEWHERE, EXCLUDED; or WITH, WITHOUT (contrast)."""
    weight: int
    kind: str
    """The class of evidence it counts in."""
    attribute: str
    actual: str
    reason: str
    sensitive: bool

    def to_json(self) -> dict[str, Any]:
        return {f: getattr(self, f) for f in self.__dataclass_fields__}


def redacted(reason: Reason) -> Reason:
    """For logs: the attribute and what it says, without its text."""
    return replace(reason, actual=FREE_TEXT, sensitive=False) if reason.sensitive else reason


def shown(keyword: str, values: Sequence[object]) -> tuple[str, bool]:
    """The values of an attribute as the operator may see them, and whether they are sensitive (operator only)."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword  # pydicom is slow to import; only matching needs it

    tag = tag_for_keyword(keyword)
    vr = "UN" if tag is None else dictionary_VR(tag).split(" or ")[0]
    text = summary(values)
    if keyword in _TECHNICAL_TEXT:
        return text, False
    if tag is not None and tag >> 16 == 0x0010:  # the patient group
        return WITHHELD, False
    if vr in _SHOWN_VR:
        return text, vr == "CS" and not all(map(_is_code_string, values))
    if vr in _TEXT_VR and (keyword in _NAMES_OF_NOBODY or not _IDENTIFIER.search(keyword)):
        return text, True
    return WITHHELD, False  # names, dates, times, UIDs, identifiers, unknown


def _is_code_string(value: object) -> bool:
    """PS3.5 6.2 CS. Anything else in a CS attribute was typed by hand and is treated as free text."""
    return re.fullmatch(r"[A-Z0-9_ ]{0,16}", str(value)) is not None


def summary(values: Iterable[object]) -> str:
    """Up to three values on one line, without control characters: this text goes to a terminal."""
    texts = [printable(str(v)[:MAX_SHOWN]) for v in values]
    more = f" (+{len(texts) - 3} more)" if len(texts) > 3 else ""
    return " | ".join(texts[:3]) + more


def printable(text: str) -> str:
    """Without control and formatting characters: text from the wire must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)

"""One condition of config.yaml against the values of a study: YES, NO or MISSING. Pure functions, bounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from dicom_node.config import Exists, Matcher, Range, Regex, Scalar
from dicom_node.route.facts import Fact, SeriesFacts
from dicom_node.route.reason import shown, summary
from dicom_node.route.text import fold, regex_found
from dicom_node.route.verdict import Answer, Check

MAX_SEARCHED: Final = 1000
"""Distinct values of one attribute that a regular expression is tried on."""

_YES: Final = frozenset({"yes", "y", "true", "1"})
_NO: Final = frozenset({"no", "n", "false", "0"})
_AGE_UNITS: Final = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def compare(expected: Matcher, values: Sequence[Fact]) -> Answer:
    """Any value will do. Nothing there is MISSING, whatever was expected, except for `{exists: false}`."""
    if isinstance(expected, Exists):
        if not values:
            return "MISSING" if expected.exists else "YES"
        return "YES" if expected.exists else "NO"
    if not values:
        return "MISSING"
    if isinstance(expected, Regex):
        values = values[:MAX_SEARCHED]
    return "YES" if any(_holds(expected, v) for v in values) else "NO"


def _holds(expected: Matcher, value: Fact) -> bool:
    if isinstance(expected, Regex):
        return regex_found(expected.regex, str(value))
    if isinstance(expected, Range):
        number = to_number(value)
        return number is not None and expected.range[0] <= number <= expected.range[1]
    if isinstance(expected, list):
        return any(_equal(e, value) for e in expected)
    if isinstance(expected, Exists):
        return expected.exists
    return _equal(expected, value)


def _equal(expected: Scalar, value: Fact) -> bool:
    """Text case-folded, numbers as numbers. YAML reads an unquoted YES as true, so true also means YES."""
    if isinstance(expected, bool):
        return fold(str(value)) in (_YES if expected else _NO)
    if isinstance(expected, int | float):
        return to_number(value) == float(expected)
    if isinstance(value, int | float) and (number := to_number(expected)) is not None:
        return number == float(value)
    return fold(expected) == fold(str(value))


def to_number(value: Fact) -> float | None:
    """A number, or an Age String (PS3.5 6.2 AS, "065Y") in years; None when it is neither."""
    if isinstance(value, str):
        if age := re.fullmatch(r"\s*([0-9]{3})([DWMY])\s*", value):
            return int(age[1]) * _AGE_UNITS[age[2]]
        if not re.fullmatch(r"\s*[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?\s*", value):
            return None
    return float(value)


def in_words(expected: Matcher) -> str:
    """The condition as the operator reads it."""
    if isinstance(expected, Regex):
        return f"matches /{expected.regex}/"
    if isinstance(expected, Range):
        return f"is {expected.range[0]:g} to {expected.range[1]:g}"
    if isinstance(expected, Exists):
        return "is present" if expected.exists else "is absent"
    if isinstance(expected, list):
        return "is one of " + ", ".join(map(_scalar, expected))
    return f"is {_scalar(expected)}"


def _scalar(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_when(key: str, expected: Matcher, series: SeriesFacts) -> Check:
    """One key of `when` on one series."""
    if key == "body_part":
        return _check_body_part(expected, series)
    if key == "contrast":
        return _check_contrast(expected, series)
    return check_values("when", key, expected, series.values(key), series.number)


def check_values(where: str, key: str, expected: Matcher, values: Sequence[Fact], series: int | None) -> Check:
    """A DICOM keyword, `modality`, `calling_ae` or `called_ae`."""
    answer = compare(expected, values)
    actual, sensitive = "", False
    if values:
        technical = key in ("modality", "calling_ae", "called_ae")
        actual, sensitive = (summary(values), False) if technical else shown(key, values)
    return Check(
        "when" if where == "when" else "indication",
        key,
        in_words(expected),
        actual,
        answer,
        series,
        sensitive=sensitive,
    )


def _check_body_part(expected: Matcher, series: SeriesFacts) -> Check:
    """A series that does not say is MISSING; one that is ambiguous, excluded or of another organ is NO."""
    found = series.body_part
    silent = found.state == "NONE" and all(e.kind == "region" for e in found.evidence)
    answer: Answer = "MISSING" if silent else "NO"
    if found.body_part:
        answer = compare(expected, (found.body_part,))
    elif isinstance(expected, Exists) and not expected.exists:
        answer = "YES"
    return Check("when", "body_part", in_words(expected), str(found), answer, series.number, reasons=found.evidence)


def _check_contrast(expected: Matcher, series: SeriesFacts) -> Check:
    """`contrast: false` holds unless something says that contrast was given: headers seldom say that none was."""
    found = series.contrast
    values: tuple[Fact, ...] = () if found.given is None else ("YES" if found.given else "NO",)
    answer = compare(expected, values)
    if expected is False and found.given is None:
        answer = "YES"
    return Check("when", "contrast", in_words(expected), str(found), answer, series.number, reasons=found.evidence)

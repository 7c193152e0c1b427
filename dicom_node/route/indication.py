"""What establishes an indication: matchers over the whole study. A body part is not an indication.

A model answers one question about patients who had one condition. Nothing here guesses that condition from images: a
called AE title, an order's words or codes, a region of interest, a clinical value or a coded finding says it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dicom_node.config import Matcher, Regex
from dicom_node.route.body_part import codes
from dicom_node.route.facts import StudyFacts
from dicom_node.route.match import check_values, check_when, compare, in_words
from dicom_node.route.text import fold, regex_found
from dicom_node.route.verdict import Answer, Check
from dicom_node.study import Header

STRUCTURED_REPORTS: Final = "1.2.840.10008.5.1.4.1.1.88."
KEY_OBJECT_SELECTION: Final = "1.2.840.10008.5.1.4.1.1.88.59"
MAX_CONTENT_ITEMS: Final = 20_000
_ABSENT: Final = frozenset({"272519000|SCT", "373067005|SCT", "2667000|SCT"})
"""Absence findings, No, Absent: a finding with such a modifier or property was looked for and not seen."""


def check_matcher(number: int, matcher: dict[str, Matcher], study: StudyFacts) -> tuple[Check, ...]:
    """All keys of one matcher, each on the study as a whole."""
    return tuple(_numbered(_check(key, expected, study), number) for key, expected in matcher.items())


def _numbered(check: Check, number: int) -> Check:
    return Check(
        "indication",
        check.key,
        check.expected,
        check.actual,
        check.verdict,
        None,
        number,
        check.sensitive,
        check.reasons,
    )


def _check(key: str, expected: Matcher, study: StudyFacts) -> Check:
    if key == "roi":
        return _check_roi(expected, study)
    if key == "clinical":
        return _check_clinical(expected, study)
    if key == "sr_finding":
        return _check_finding(expected, study)
    if key in ("body_part", "contrast"):
        return _best([check_when(key, expected, series) for series in study.series], key, expected)
    return check_values("indication", key, expected, study.values(key), None)


def _best(checks: list[Check], key: str, expected: Matcher) -> Check:
    """On the study a condition holds when it holds on any series."""
    order: tuple[Answer, ...] = ("YES", "NO", "MISSING")
    none = Check("indication", key, in_words(expected), "", "MISSING")
    return min(checks, key=lambda c: order.index(c.verdict), default=none)


def _check_roi(expected: Matcher, study: StudyFacts) -> Check:
    from dicom_node.pixels import roi  # the one reader of regions; numpy is loaded where a route asks for it

    found = sorted(roi.kinds(study.instances))
    answer: Answer = compare(expected, ("YES",) if found else ())
    if expected is False:
        answer = "NO" if found else "YES"
    expected_words = "is drawn" if expected is True else in_words(expected)
    return Check("indication", "roi", expected_words, ", ".join(found), answer)


def is_report(sop_class_uid: str) -> bool:
    """A structured report with findings; a Key Object Selection has none."""
    return sop_class_uid.startswith(STRUCTURED_REPORTS) and sop_class_uid != KEY_OBJECT_SELECTION


def content_items(header: Header) -> Iterator[Header]:
    """Every content item of an SR tree (PS3.3 C.17.3), at most MAX_CONTENT_ITEMS. A loop: depth comes from the wire."""
    waiting = list(reversed(header.items_of("ContentSequence")))
    for _ in range(MAX_CONTENT_ITEMS):
        if not waiting:
            return
        item = waiting.pop()
        yield item
        waiting.extend(reversed(item.items_of("ContentSequence")))


def _check_clinical(expected: Matcher, study: StudyFacts) -> Check:
    """A name, or a list of names that must all be there: half of a nomogram's inputs establish nothing."""
    known = {fold(name) for name in study.clinical}
    if isinstance(expected, str | list):
        names = [expected] if isinstance(expected, str) else [str(name) for name in expected]
        absent = [name for name in names if fold(name) not in known]
        words = "has " + ", ".join(names)
        answer: Answer = "MISSING" if absent else "YES"
    else:
        words = in_words(expected)
        answer = compare(expected, sorted(known))
    return Check("indication", "clinical", words, ", ".join(sorted(study.clinical)), answer)


def _check_finding(expected: Matcher, study: StudyFacts) -> Check:
    """A coded finding: "value|scheme" by code, anything else by its Code Meaning."""
    reports = [i.header for i in study.instances if is_report(i.sop_class_uid)]
    found = {code: meaning for header in reports for code, meaning in _findings(header)}
    hits = [code for code, meaning in found.items() if _finding_holds(expected, code, meaning)]
    shown = ", ".join(hits or list(found)[:5])
    answer: Answer = "YES" if hits else "NO" if found else "MISSING"
    return Check("indication", "sr_finding", in_words(expected), shown, answer)


def _findings(header: Header) -> Iterator[tuple[str, str]]:
    """(code, meaning) of the CODE items that state something; modifiers and context of other items state nothing."""
    for item in content_items(header):
        if item.text("ValueType") != "CODE" or item.text("RelationshipType") in ("HAS CONCEPT MOD", "HAS OBS CONTEXT"):
            continue
        children = item.items_of("ContentSequence")
        if any(_ABSENT.intersection(codes(child.items_of("ConceptCodeSequence"))) for child in children):
            continue
        for concept in item.items_of("ConceptCodeSequence"):
            for code in codes([concept]):
                yield code, concept.text("CodeMeaning")


def _finding_holds(expected: Matcher, code: str, meaning: str) -> bool:
    if isinstance(expected, Regex):
        return regex_found(expected.regex, meaning)
    if isinstance(expected, list):
        return any(_finding_holds(e, code, meaning) for e in expected)
    if isinstance(expected, str) and "|" in expected:
        return fold(expected) == fold(code)
    return compare(expected, (meaning,)) == "YES"

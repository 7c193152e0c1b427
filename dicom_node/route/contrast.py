"""Was contrast agent given? From headers only: three levels, the first that says anything decides.

    agent         Contrast/Bolus Agent (0018,0010), its code sequence, Contrast/Bolus Usage: the device says so
    series words  Series Description, Protocol Name, Processing Function: the operator's preset says so
    study words   Study and procedure descriptions: the order says so

Within one level "with" wins: a study "without and with contrast" holds a series with. Two panels side by side, the
other sign of a contrast ultrasound clip, are in the pixels only, and pixels are not looked at here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from dicom_node.route import terms
from dicom_node.route.body_part import MAX_VALUES, SERIES_TEXT, STEP_TEXT, STUDY_TEXT, codes
from dicom_node.route.reason import Reason
from dicom_node.route.text import normalise, terms_pattern, words
from dicom_node.study import Header, Series

LEVELS: Final = ("agent", "series words", "study words")
MAX_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class ContrastVerdict:
    """True, False, or None: nothing in the headers says either."""

    given: bool | None
    evidence: tuple[Reason, ...]

    def __str__(self) -> str:
        return {True: "with contrast", False: "without contrast", None: ""}[self.given]


def judge(series: Series) -> ContrastVerdict:
    """Read the distinct values of all instances of one series."""
    values = dict.fromkeys(v for i in series.instances for v in _values(i.header))
    found = tuple(dict.fromkeys(r for v in itertools.islice(values, MAX_VALUES) if (r := _weigh(*v)) is not None))
    for level in LEVELS:
        said = {r.says for r in found if r.kind == level}
        if said:
            return ContrastVerdict("WITH" in said, found[:MAX_SHOWN])
    return ContrastVerdict(None, ())


def _values(header: Header) -> Iterable[tuple[str, str, str]]:
    yield from (("agent", "ContrastBolusAgent", v) for v in header.texts("ContrastBolusAgent"))
    agents = codes(header.items_of("ContrastBolusAgentSequence"))
    yield from (("agent", "ContrastBolusAgentSequence", code) for code in agents)
    for group in header.items_of("SharedFunctionalGroupsSequence"):  # Enhanced MR: PS3.3 C.8.13.5.13
        for usage in group.items_of("ContrastBolusUsageSequence"):
            administered = "ContrastBolusAgentAdministered"
            yield from (("agent", administered, v) for v in usage.texts(administered))
    for keyword in (*SERIES_TEXT, "ProcessingFunction"):
        yield from (("series words", keyword, v) for v in header.texts(keyword))
    for keyword in STUDY_TEXT:
        yield from (("study words", keyword, v) for v in header.texts(keyword))
    for item in header.items_of("RequestAttributesSequence"):
        yield from (("study words", keyword, v) for keyword in STEP_TEXT for v in item.texts(keyword))


def load_tables() -> None:
    """Compile the words now, so that the first study is as fast as the others."""
    _patterns()


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    return (
        terms_pattern(terms.CONTRAST_BOTH),
        terms_pattern(terms.CONTRAST_BLANKED),
        terms_pattern(terms.NO_CONTRAST_WORDS),
        terms_pattern(terms.CONTRAST_WORDS),
    )


def _weigh(level: str, attribute: str, value: str) -> Reason | None:
    if level != "agent":
        return _by_words(level, attribute, value)
    if attribute == "ContrastBolusAgentSequence":
        return Reason("WITH", 1, level, attribute, value, "an agent is coded", False)
    none = normalise(value) in terms.NO_AGENT
    given = "no agent" if none else "an agent is named"
    return Reason("WITHOUT" if none else "WITH", 1, level, attribute, value[:80], given, False)


def _by_words(level: str, attribute: str, value: str) -> Reason | None:
    both, blanked, without, with_ = _patterns()
    text = blanked.sub(" ", both.sub(" contrast ", words(value)))
    no = without.search(text)
    yes = with_.search(without.sub(" ", text))
    match = yes or no
    if match is None:
        return None
    said = f"the word “{match.group().strip()}”"
    return Reason("WITH" if yes else "WITHOUT", 1, level, attribute, value[:80], said, True)

"""Which body part a series shows: an evidence table that is added up, never a single attribute that is believed.

No one attribute can be trusted: Body Part Examined is often the preset of the last patient, the code may be missing,
the description is in the site's language. So every attribute that names a body part is evidence with a weight, one
count per class (a description copied into five attributes is still one description), and the answer is

    CLEAR      one part reaches THRESHOLD and leads every other, and ELSEWHERE, by MARGIN
    AMBIGUOUS  one reaches THRESHOLD but does not lead by MARGIN, or contradicts an anatomic code
    EXCLUDED   the words say that it is another kind of examination (biopsy, transplant, guided puncture)
    NONE       nothing names a body part

Why these weights: they are the order of PS3.3's own strength (a code is chosen, a word is typed, a preset is left
over), and the numbers make the pairs come out right. A code (8) beats one description (4 or 5) but not two (9), which
is then AMBIGUOUS. Two descriptions (9) beat a left-over preset (4); one (4) against a preset (4) does not. A study
named "liver and kidney" (4, 4) is decided by the series' own words (5). A region fits several organs (1) and, in all
its three classes together (3), decides nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from dicom_node.route import terms
from dicom_node.route.reason import Reason
from dicom_node.route.terms import ELSEWHERE, Codes
from dicom_node.route.text import normalise, terms_pattern, words
from dicom_node.study import Header, Series

State: TypeAlias = Literal["CLEAR", "AMBIGUOUS", "EXCLUDED", "NONE"]

WEIGHTS: Final[Mapping[str, int]] = {
    "anatomic code": 8,
    "procedure code": 6,
    "series words": 5,
    "study words": 4,
    "image type": 4,
    "body part examined": 4,
    "region": 1,
}
"""Weight of one class of evidence; within a class the strongest counts, once."""
MAX_VALUES: Final = 500
"""Differing values that one series may have in the attributes read here: a real one has a handful."""
MAX_SHOWN: Final = 24
"""Pieces of evidence kept for `explain`, strongest first; all are added up."""
THRESHOLD: Final = 4
MARGIN: Final = 3

SERIES_TEXT: Final = ("SeriesDescription", "ProtocolName")
STUDY_TEXT: Final = ("StudyDescription", "RequestedProcedureDescription", "PerformedProcedureStepDescription")
STEP_TEXT: Final = ("RequestedProcedureDescription", "ScheduledProcedureStepDescription")
"""In the items of Request Attributes Sequence (0040,0275)."""
ANATOMY_SEQUENCES: Final = ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence")
PROCEDURE_SEQUENCES: Final = (
    "ProcedureCodeSequence",
    "RequestedProcedureCodeSequence",
    "PerformedProtocolCodeSequence",
)


@dataclass(frozen=True, slots=True)
class BodyPartVerdict:
    """What the evidence of one series adds up to."""

    state: State
    body_part: str
    """"" unless CLEAR."""
    scores: Mapping[str, int]
    """Parts that got any, highest first."""
    evidence: tuple[Reason, ...]

    @property
    def candidates(self) -> frozenset[str]:
        """What an AMBIGUOUS series may show: every body part that reaches the threshold by itself."""
        return frozenset(p for p, s in self.scores.items() if s >= THRESHOLD and p != ELSEWHERE)

    def __str__(self) -> str:
        others = ", ".join(f"{part} {score}" for part, score in self.scores.items() if part != self.body_part)
        if self.body_part:
            return f"{self.body_part} {self.scores[self.body_part]}" + (f" ({others})" if others else "")
        return f"{self.state} ({others})" if others else self.state


def judge(series: Series, site_codes: Codes | None = None) -> BodyPartVerdict:
    """Add up the evidence of one series: the distinct values of all its instances. `site_codes` extends PROCEDURES."""
    found: dict[Reason, None] = {}
    values = dict.fromkeys(v for i in series.instances for v in _values(i.header))
    if len(values) > MAX_VALUES:
        found[
            Reason("EXCLUDED", 0, "excluded", "", "", f"more than {MAX_VALUES} differing values in one series", False)
        ] = None
    for kind, attribute, value in itertools.islice(values, MAX_VALUES):
        found.update(dict.fromkeys(_weigh(kind, attribute, value, site_codes or {})))
    return add_up(tuple(found))


def _values(header: Header) -> Iterable[tuple[str, str, str]]:
    """(class, attribute, value) of everything the table reads; a code is "value|scheme"."""
    for keyword in SERIES_TEXT:
        yield from (("series words", keyword, v) for v in header.texts(keyword))
    for keyword in STUDY_TEXT:
        yield from (("study words", keyword, v) for v in header.texts(keyword))
    requests = header.items_of("RequestAttributesSequence")
    for item in requests:
        yield from (("study words", keyword, v) for keyword in STEP_TEXT for v in item.texts(keyword))
    for holder in (header, *requests):
        for keyword in PROCEDURE_SEQUENCES:
            yield from (("procedure code", keyword, c) for c in codes(holder.items_of(keyword)))
    for holder in (header, *_shared_anatomy(header)):
        for keyword in ANATOMY_SEQUENCES:
            yield from (("anatomic code", keyword, c) for c in codes(holder.items_of(keyword)))
    image_type = header.texts("ImageType")
    if len(image_type) > 2 and header.text("Modality") == "US":
        yield "image type", "ImageType", image_type[2]
    yield from (("body part examined", "BodyPartExamined", v) for v in header.texts("BodyPartExamined"))


def _shared_anatomy(header: Header) -> list[Header]:
    """Enhanced multi-frame objects keep the code in the Frame Anatomy functional group (PS3.3 C.7.6.16.2.8)."""
    shared = header.items_of("SharedFunctionalGroupsSequence")
    return [anatomy for group in shared for anatomy in group.items_of("FrameAnatomySequence")]


def codes(items: Iterable[Header]) -> list[str]:
    """Each item of a code sequence as "value|scheme", SNOMED-RT style values as SCT. The meaning is not looked at."""
    found = []
    for item in items:
        value = item.text("CodeValue") or item.text("LongCodeValue") or item.text("URNCodeValue")
        value, scheme = value.strip(), item.text("CodingSchemeDesignator").strip().upper()
        if scheme in terms.SRT_SCHEMES and value.upper() in terms.SRT_TO_SCT:
            value, scheme = terms.SRT_TO_SCT[value.upper()], "SCT"
        if value:
            found.append(f"{value}|{scheme}")
    return found


def _weigh(kind: str, attribute: str, value: str, site_codes: Codes) -> list[Reason]:
    if kind == "anatomic code":
        return _by_code(kind, attribute, value, terms.ANATOMY) + _by_code("region", attribute, value, terms.REGIONS)
    if kind == "procedure code":
        return _by_code(kind, attribute, value, {**terms.PROCEDURES, **site_codes})
    if kind == "image type":
        return _by_image_type(value)
    if kind == "body part examined":
        return _by_body_part_examined(value)
    return _by_words(kind, attribute, value)


def _by_code(kind: str, attribute: str, value: str, table: Codes) -> list[Reason]:
    code, _, scheme = value.rpartition("|")
    parts = table.get((code, scheme), frozenset())
    reason = "the code of a region that fits" if kind == "region" else "the code stands for it"
    return [Reason(p, WEIGHTS[kind], kind, attribute, value, reason, False) for p in sorted(parts)]


def _by_image_type(value: str) -> list[Reason]:
    term = value.strip().upper()
    if term in terms.IMAGE_TYPES:
        part = terms.IMAGE_TYPES[term]
        return [Reason(part, WEIGHTS["image type"], "image type", "ImageType", term, "value 3 names it", False)]
    parts = sorted(terms.IMAGE_TYPE_REGIONS.get(term, ()))
    return [Reason(p, WEIGHTS["region"], "region", "ImageType", term, "value 3 fits", False) for p in parts]


def _by_body_part_examined(value: str) -> list[Reason]:
    """The defined terms and vendors' short forms, without left or right; else the words, some sites type them here."""
    kind, name = "body part examined", "BodyPartExamined"
    term = " ".join(w for w in normalise(value).split() if w not in terms.SIDES)
    if term in terms.BODY_PART_TERMS:
        part = terms.BODY_PART_TERMS[term]
        return [Reason(part, WEIGHTS[kind], kind, name, value, "the term stands for it", False)]
    if term in terms.BODY_PART_REGIONS:
        parts = sorted(terms.BODY_PART_REGIONS[term])
        return [Reason(p, WEIGHTS["region"], "region", name, value, "the region fits", False) for p in parts]
    return _by_words(kind, name, value)


def load_tables() -> None:
    """Compile the words now, so that the first study is as fast as the others."""
    _patterns()


@lru_cache(maxsize=1)
def _patterns() -> tuple[Mapping[str, re.Pattern[str]], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Compiled once, on first use: our parts, elsewhere, blanked, excluded."""
    ours: dict[str, re.Pattern[str]] = {part: terms_pattern(terms.WORDS[part]) for part in terms.BODY_PARTS}
    others = (terms.WORDS_ELSEWHERE, terms.WORDS_BLANKED, terms.WORDS_EXCLUDED)
    elsewhere, blanked, excluded = (terms_pattern(t) for t in others)
    return ours, elsewhere, blanked, excluded


def _by_words(kind: str, attribute: str, value: str) -> list[Reason]:
    """Our words, after the names of other organs that hold them are blanked: "parathyroid" names no thyroid.

    Other organs count only where the text names none of ours: "liver, known breast cancer" is about the liver.
    """
    ours, elsewhere, blanked, excluded = _patterns()
    text = blanked.sub(" ", words(value))

    def found(part: str, match: str) -> Reason:
        weight = WEIGHTS.get(kind, 0) if part != "EXCLUDED" else 0
        return Reason(part, weight, kind if weight else "excluded", attribute, value[:80], f"the word “{match}”", True)

    says = [found("EXCLUDED", match.group().strip())] if (match := excluded.search(text)) else []
    other = elsewhere.search(text)
    text = elsewhere.sub(" ", text)
    named = [found(part, m.group().strip()) for part, pattern in ours.items() if (m := pattern.search(text))]
    if not named and other:
        named = [found(ELSEWHERE, other.group().strip())]
    return says + named


def add_up(evidence: tuple[Reason, ...]) -> BodyPartVerdict:
    best: dict[tuple[str, str, str], int] = {}
    for e in evidence:
        # a region counts once per attribute: three attributes that fit are three independent hints
        key = (e.says, e.kind, e.attribute if e.kind == "region" else "")
        best[key] = max(best.get(key, 0), e.weight)
    totals: dict[str, int] = {}
    for (part, _, _), weight in best.items():
        totals[part] = totals.get(part, 0) + weight
    excluded = totals.pop("EXCLUDED", None) is not None
    scores = dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
    state, part = _decide(scores, evidence)
    if excluded:
        state, part = "EXCLUDED", ""
    order = {"EXCLUDED": -1} | {p: rank for rank, p in enumerate(scores)}
    told = sorted(evidence, key=lambda e: (order[e.says], -e.weight, e.attribute, e.actual))
    return BodyPartVerdict(state, part, scores, tuple(told[:MAX_SHOWN]))


def _decide(scores: Mapping[str, int], evidence: tuple[Reason, ...]) -> tuple[State, str]:
    ranked = list(scores.items())
    if not any(score >= THRESHOLD for part, score in ranked if part != ELSEWHERE):
        return "NONE", ""
    (first, top), *rest = ranked
    second = rest[0][1] if rest else 0
    coded = {e.says for e in evidence if e.kind == "anatomic code"}
    if first == ELSEWHERE:
        # clearly another organ, with a word or a preset of ours besides: no route's business, and not in doubt
        return ("NONE", "") if top - second >= MARGIN else ("AMBIGUOUS", "")
    if top - second < MARGIN or (coded and first not in coded):
        return "AMBIGUOUS", ""
    return "CLEAR", first

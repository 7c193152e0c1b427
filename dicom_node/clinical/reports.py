"""Clinical values in the Structured Reports of the study, and the patient's age. Reads headers only.

Any template whose items are NUM with a concept name is read alike (PS3.16: TID 1500, 5100, 12000). What an item does
not say of itself, its containers say: side, Finding Site, time. A container may be named by its anatomy (TID 5104), and
what a measurement group calls its Finding (TID 1501) is what was measured: a hydrocele of the testis is not the testis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dicom_node.clinical.codes import CodeMap, canonical, side_of
from dicom_node.clinical.model import CodeKey, Observation
from dicom_node.clinical.times import iso
from dicom_node.study import Header, Instance, Study, is_own_output

MAX_ITEMS = 20_000
"""Content items looked at in one study."""
MAX_DEPTH = 24
PATIENT_AGE: CodeKey = ("PatientAge", "")
"""Stands for the attribute (0010,1010), which is no coded item."""

_LATERALITY, _FINDING_SITE = ("272741003", "SCT"), ("363698007", "SCT")
_SELECTION, _DERIVATION, _MEAN = ("121404", "DCM"), ("121401", "DCM"), ("373098007", "SCT")
_GROUP, _FINDING = ("125007", "DCM"), ("121071", "DCM")
_AGE_UNITS = {"Y": "a", "M": "mo", "W": "wk", "D": "d"}


@dataclass(frozen=True, slots=True)
class _Around:
    """What the containers of an item say of it."""

    time: str
    side: str = ""
    site: CodeKey = ("", "")
    finding: CodeKey | None = None
    """Of the measurement group: this was measured, wherever it lies."""


def in_reports(study: Study, codes: CodeMap) -> list[Observation]:
    """Every number of the study's reports; none of a report that a dicom-node wrote."""
    reports = [i for i in study.instances if i.header.text("Modality") == "SR" and not is_own_output(i.header)]
    return [
        replace(found, group=f"report {number}")
        for number, report in enumerate(reports)
        for found in _numbers(report, codes)
    ]


def ages(study: Study) -> Iterator[Observation]:
    """Patient's Age (0010,1010): nnnD, nnnW, nnnM or nnnY (PS3.5 6.2, AS)."""
    for text in dict.fromkeys(i.header.text("PatientAge").strip() for i in study.instances):
        if match := re.fullmatch(r"(\d{3})([DWMY])", text):
            value, unit = float(match[1]), _AGE_UNITS[match[2]]
            yield Observation(PATIENT_AGE, value, unit, "", "", ("", ""), "sr", "Patient's Age")


def _numbers(report: Instance, codes: CodeMap) -> Iterator[Observation]:
    header = report.header
    model = header.text("ManufacturerModelName")
    around = _Around(iso(header.text("ContentDate"), header.text("ContentTime")))
    stack = [(item, around, 0) for item in reversed(header.items_of("ContentSequence"))]
    seen = 0
    while stack and seen < MAX_ITEMS:
        item, around, depth = stack.pop()
        seen += 1
        around = _around(item, around, codes)
        if item.text("ValueType") == "NUM" and (number := _number(item, around, codes, model)) is not None:
            yield number
        if depth < MAX_DEPTH:
            stack += [(child, around, depth + 1) for child in reversed(item.items_of("ContentSequence"))]


def _around(item: Header, outer: _Around, codes: CodeMap) -> _Around:
    site, side = _site(item, codes)
    stated = _side(item)
    observed = item.text("ObservationDateTime")  # (0040,A032)
    return _Around(
        iso(observed[:8], observed[8:]) or outer.time,
        side or (outer.side if stated is None else stated),
        site or outer.site,
        _finding(item) or outer.finding,
    )


def _number(item: Header, around: _Around, codes: CodeMap, model: str) -> Observation | None:
    names, measured = item.items_of("ConceptNameCodeSequence"), item.items_of("MeasuredValueSequence")
    if not names or not measured:
        return None
    units = measured[0].items_of("MeasurementUnitsCodeSequence")
    value = measured[0].number("NumericValue")
    if value is None or not math.isfinite(value):
        return None
    quantity = codes.quantity(_raw(names[0]), model)
    in_ucum = bool(units) and units[0].text("CodingSchemeDesignator").strip() == "UCUM"
    unit = quantity.unit or (units[0].text("CodeValue").strip() if in_ucum else "")
    return Observation(
        code=quantity.code,
        value=value,
        unit=unit,
        side=quantity.side or around.side,
        time=around.time,
        site=around.finding or around.site,
        origin="sr",
        source="DICOM SR",
        chosen=_chosen(item),
    )


def _chosen(item: Header) -> str:
    """Selection Status, or the derivation mean (TID 300): one of several measurements that stands for all."""
    for child in item.items_of("ContentSequence"):
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said:
            if _code(concept[0]) == _SELECTION:
                return "selected"
            if _code(concept[0]) == _DERIVATION and _code(said[0]) == _MEAN:
                return "mean"
    return ""


def _site(item: Header, codes: CodeMap) -> tuple[CodeKey | None, str]:
    """The Finding Site that an item's modifiers say, and the side where its code names that too; None = unsaid."""
    for child in item.items_of("ContentSequence"):
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said and _code(concept[0]) == _FINDING_SITE:
            return codes.site(_raw(said[0]))
    named = item.items_of("ConceptNameCodeSequence")
    if named and item.text("ValueType") == "CONTAINER" and codes.names_site(_raw(named[0])):
        return codes.site(_raw(named[0]))  # TID 5104, 5025, 5026: the group is named by its anatomy
    return None, ""


def _finding(item: Header) -> CodeKey | None:
    """What a measurement group is about; None = it is no such group, or does not say."""
    named = item.items_of("ConceptNameCodeSequence")
    if not named or _code(named[0]) != _GROUP:
        return None
    for child in item.items_of("ContentSequence"):
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said and _code(concept[0]) == _FINDING:
            return _code(said[0])
    return None


def _side(item: Header, depth: int = 0) -> str | None:
    """The side that an item's modifiers say (Laterality, or Finding Site with Laterality below it).

    None = they say nothing; "" = something that is not one side, which what is around may not turn into one.
    """
    for child in item.items_of("ContentSequence"):
        if child.text("RelationshipType") != "HAS CONCEPT MOD" or child.text("ValueType") != "CODE":
            continue
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said and _code(concept[0]) == _LATERALITY:
            return side_of(_code(said[0]))
        if depth == 0 and (below := _side(child, 1)) is not None:
            return below
    return None


def _raw(item: Header) -> CodeKey:
    return item.text("CodeValue").strip(), item.text("CodingSchemeDesignator").strip()


def _code(item: Header) -> CodeKey:
    return canonical(*_raw(item))

"""Clinical values of a study: laboratory and measurement results in its Structured Reports, and the patient's age.

A value counts only with a code the task declares, a UCUM unit that converts to the task's, a plausible size, an age
within the task's limit and, for one of paired organs, a side. Everything else is a stated problem, never a guess; two
values that disagree are one. Reads headers only (PS3.16: any template whose items are NUM with a concept name, so TID
1500, 5100 and 12000 alike). No PHI in what it says.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from dicom_node.result import ClinicalInput, Code
from dicom_node.study import Header, Instance, Study, is_own_output

if TYPE_CHECKING:
    from ucumvert import PintUcumRegistry

AGREE = 0.05
"""Two values that differ by less, relative to the larger, say the same."""
MAX_ITEMS = 20_000
"""Content items looked at in one study."""
MAX_DEPTH = 24

_RIGHT = {("24028007", "SCT"), ("G-A100", "SRT"), ("G-A100", "SNM3")}
_LEFT = {("7771000", "SCT"), ("G-A101", "SRT"), ("G-A101", "SNM3")}
_LATERALITY = {("272741003", "SCT"), ("G-C171", "SRT"), ("G-C171", "SNM3")}
_AGE_CODES = {("30525-0", "LN"), ("121033", "DCM"), ("424144002", "SCT")}
"""Age, Subject Age, Current chronological age: what Patient's Age (0010,1010) answers."""
_FINDING_SITE = {("363698007", "SCT"), ("G-C0E3", "SRT"), ("G-C0E3", "SNM3")}
_AGE_UNITS = {"Y": "a", "M": "mo", "W": "wk", "D": "d"}


class _Coded(Protocol):
    @property
    def value(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def meaning(self) -> str: ...


class Wanted(Protocol):
    """A clinical value that a task can use (`packages.ClinicalEntry`)."""

    @property
    def name(self) -> str: ...
    @property
    def code(self) -> _Coded: ...
    @property
    def also(self) -> Sequence[_Coded]: ...
    @property
    def unit(self) -> str: ...
    @property
    def range(self) -> tuple[float, float]: ...
    @property
    def max_age_days(self) -> float: ...
    @property
    def per_side(self) -> bool: ...
    @property
    def site(self) -> _Coded | None: ...


@dataclass(frozen=True, slots=True)
class Collected:
    """What is known, by `ClinicalInput.key`, and what was there and could not be used."""

    values: dict[str, ClinicalInput] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Number:
    """A NUM content item with what its containers say of it."""

    code: tuple[str, str]
    value: float
    unit: str
    side: str
    when: datetime | None
    site: tuple[str, str] = ("", "")
    """Finding Site, of the item or of what holds it."""


class Ucum:
    """Conversion of units. The registry is built at the first unit that is not the wanted one (two seconds, once)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def _registry(self) -> PintUcumRegistry:
        from ucumvert import PintUcumRegistry

        return PintUcumRegistry()

    def convert(self, value: float, unit: str, wanted: str) -> float | None:
        """None where the units are unknown or of different kinds: an amount of substance is no mass."""
        if unit == wanted:
            return value
        with self._lock:  # several stages ask, each in its thread
            return self._converted(value, unit, wanted)

    def _converted(self, value: float, unit: str, wanted: str) -> float | None:
        from lark.exceptions import LarkError
        from pint.errors import DimensionalityError, PintError

        registry = self._registry
        try:
            given, asked = registry.from_ucum(unit), registry.from_ucum(wanted)  # "10*9/L" has a factor of its own
            quantity = registry.Quantity(value * given.magnitude, given.units)
            return float(quantity.to(asked.units).magnitude / asked.magnitude)
        except (LarkError, DimensionalityError, PintError, ValueError, OverflowError):
            return None


class ClinicalValues:
    """What the stages ask: the clinical values of a study for an engine. `wanted_of` gives a task's entries."""

    def __init__(self, wanted_of: Callable[[str], Sequence[Wanted]]) -> None:
        self._wanted_of, self._ucum = wanted_of, Ucum()

    def for_engine(self, study: Study, engine: str) -> Collected:
        """By `ClinicalInput.key`."""
        return collect(study, self._wanted_of(engine), self._ucum)

    def known(self, study: Study, engines: Iterable[str]) -> Mapping[str, ClinicalInput]:
        """By name, over all engines: for conditions of routes, which name no side."""
        found = [v for engine in dict.fromkeys(engines) for v in self.for_engine(study, engine).values.values()]
        return {v.name: v for v in found}


def collect(study: Study, wanted: Iterable[Wanted], ucum: Ucum) -> Collected:
    """The values of a study. Two calls on the same study give the same answer."""
    entries = list(wanted)
    if not entries:
        return Collected()
    reports = [i for i in study.instances if i.header.text("Modality") == "SR" and not is_own_output(i.header)]
    numbers = [number for report in reports for number in _numbers(report)]
    reference = _reference(study)
    values: dict[str, ClinicalInput] = {}
    problems: list[str] = []
    for entry in entries:
        codes = {(c.value, c.scheme) for c in (entry.code, *entry.also)}
        found = [n for n in numbers if n.code in codes and _of_site(n, entry)]
        if codes & _AGE_CODES and not found:
            found = list(_ages(study))
        usable: list[ClinicalInput] = []
        for number in found:
            made = _usable(entry, number, reference, ucum)
            if isinstance(made, str):
                problems.append(made)
            else:
                usable.append(made)
        for key in dict.fromkeys(v.key for v in usable):
            one = _agreed([v for v in usable if v.key == key])
            if isinstance(one, str):
                problems.append(one)
            else:
                values[key] = one
    return Collected(values, tuple(dict.fromkeys(problems)))


def _usable(entry: Wanted, number: _Number, reference: datetime | None, ucum: Ucum) -> ClinicalInput | str:
    value = ucum.convert(number.value, number.unit, entry.unit)
    if value is None:
        return f"{entry.name}: its unit cannot be converted to {entry.unit}"
    low, high = entry.range
    if not low <= value <= high:
        return f"{entry.name}: outside the plausible range {low:g} to {high:g} {entry.unit}"
    if entry.per_side and not number.side:
        return f"{entry.name}: the report does not say of which side"
    if number.when is not None and reference is not None:
        age = reference - number.when
        if abs(age) > timedelta(days=entry.max_age_days):
            side = "older" if age > timedelta() else "newer"
            return f"{entry.name}: {abs(age).days} days {side} than the images, at most {entry.max_age_days:g} allowed"
    return ClinicalInput(
        name=entry.name,
        code=Code(entry.code.value, entry.code.scheme, entry.code.meaning),
        value=float(f"{value:.6g}"),
        unit=entry.unit,
        time="" if number.when is None else number.when.strftime("%Y-%m-%dT%H:%M:%S"),  # zone not known
        source="Patient's Age" if number.code == ("", "") else "DICOM SR",
        laterality=number.side if entry.per_side else "",
    )


def _agreed(values: list[ClinicalInput]) -> ClinicalInput | str:
    """The newest; where the newest disagree, nothing."""
    newest = max(v.time for v in values)
    latest = [v for v in values if v.time == newest]
    low, high = min(v.value for v in latest), max(v.value for v in latest)
    if high - low > AGREE * max(abs(low), abs(high)):
        return f"{latest[0].key}: several values of the same time disagree"
    return replace(latest[0], value=float(f"{sum(v.value for v in latest) / len(latest):.6g}"))


def _reference(study: Study) -> datetime | None:
    """When the images were made: the newest study or content time that is not a report's."""
    times = [
        _moment(i.header.text("StudyDate"), i.header.text("StudyTime"))
        for i in study.instances
        if i.header.text("Modality") != "SR"
    ]
    return max((t for t in times if t is not None), default=None)


def _ages(study: Study) -> Iterator[_Number]:
    """Patient's Age (0010,1010): nnnD, nnnW, nnnM or nnnY (PS3.5 6.2, AS)."""
    for text in dict.fromkeys(i.header.text("PatientAge").strip() for i in study.instances):
        if match := re.fullmatch(r"(\d{3})([DWMY])", text):
            yield _Number(("", ""), float(match[1]), _AGE_UNITS[match[2]], "", None)


# -- the content tree


def _numbers(report: Instance) -> Iterator[_Number]:
    header = report.header
    when = _moment(header.text("ContentDate"), header.text("ContentTime"))
    stack = [(item, "", ("", ""), when, 0) for item in reversed(header.items_of("ContentSequence"))]
    seen = 0
    while stack and seen < MAX_ITEMS:
        item, side, site, when, depth = stack.pop()
        seen += 1
        side, site = _side(item) or side, _site(item) or site
        when = _observed(item) or when
        if item.text("ValueType") == "NUM":
            number = _number(item, side, site, when)
            if number is not None:
                yield number
        if depth < MAX_DEPTH:
            stack += [(child, side, site, when, depth + 1) for child in reversed(item.items_of("ContentSequence"))]


def _number(item: Header, side: str, site: tuple[str, str], when: datetime | None) -> _Number | None:
    names, measured = item.items_of("ConceptNameCodeSequence"), item.items_of("MeasuredValueSequence")
    if not names or not measured:
        return None
    units = measured[0].items_of("MeasurementUnitsCodeSequence")
    value = measured[0].number("NumericValue")
    if value is None or not math.isfinite(value):
        return None
    in_ucum = bool(units) and units[0].text("CodingSchemeDesignator") == "UCUM"
    return _Number(_code(names[0]), value, units[0].text("CodeValue") if in_ucum else "", side, when, site)


def _of_site(number: _Number, entry: Wanted) -> bool:
    """A hydrocele has a volume and a side too: where the code names no organ, the Finding Site must."""
    return entry.site is None or number.site == (entry.site.value, entry.site.scheme)


def _site(item: Header) -> tuple[str, str] | None:
    """The Finding Site that an item's modifiers say."""
    for child in item.items_of("ContentSequence"):
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said and _code(concept[0]) in _FINDING_SITE:
            return _code(said[0])
    return None


def _side(item: Header, depth: int = 0) -> str:
    """The side that an item's modifiers say (Laterality, or Finding Site with Laterality below it)."""
    for child in item.items_of("ContentSequence"):
        if child.text("RelationshipType") != "HAS CONCEPT MOD" or child.text("ValueType") != "CODE":
            continue
        concept, said = child.items_of("ConceptNameCodeSequence"), child.items_of("ConceptCodeSequence")
        if concept and said and _code(concept[0]) in _LATERALITY:
            return "R" if _code(said[0]) in _RIGHT else "L" if _code(said[0]) in _LEFT else ""
        if depth == 0 and (below := _side(child, 1)):
            return below
    return ""


def _code(item: Header) -> tuple[str, str]:
    return item.text("CodeValue").strip(), item.text("CodingSchemeDesignator").strip()


def _observed(item: Header) -> datetime | None:
    """Observation DateTime (0040,A032)."""
    text = item.text("ObservationDateTime")
    return _moment(text[:8], text[8:])


def _moment(date: str, time: str) -> datetime | None:
    """DICOM date and time, both sides of a comparison without a zone: the time zone of one site is one."""
    digits = re.match(r"\d{0,6}", time.replace(":", ""))
    clock = (digits[0] if digits else "").ljust(6, "0")
    parts: Any = re.fullmatch(r"(\d{4})\.?(\d{2})\.?(\d{2})", date.strip())
    if parts is None:
        return None
    try:
        return datetime(
            int(parts[1]),
            int(parts[2]),
            int(parts[3]),
            int(clock[:2]),
            int(clock[2:4]),
            min(int(clock[4:]), 59),
            tzinfo=UTC,
        )
    except ValueError:
        return None

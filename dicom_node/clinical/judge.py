"""From what sources say to what a model may use: unit, range, side, age, agreement, priority. Pure: no I/O.

Two calls on the same study and the same answers of the sources give the same result. What is ambiguous is not used,
and the problem says why; a value is never replaced by another's guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from dicom_node.clinical.codes import CodeMap, canonical
from dicom_node.clinical.model import ClinicalCode, CodeKey, Collected, Gathered, Observation, Wanted, problem
from dicom_node.clinical.reports import ages, in_reports
from dicom_node.clinical.times import moment, reference, zone_of
from dicom_node.clinical.units import Ucum
from dicom_node.config_clinical import ORIGINS, Origin
from dicom_node.result import ClinicalInput, Code
from dicom_node.study import Study

AGREE = 0.05
"""Two values that differ by less, relative to the larger, say the same."""
MEAN_SPREAD = 0.5
"""Repeated measurements that differ by more, relative to the largest, are not of one thing."""
SAME_TIME = timedelta(days=1)
"""Sources write down one event at different times of a day, some only its day."""
AGE_CODES = frozenset({("30525-0", "LN"), ("121033", "DCM"), ("424144002", "SCT")})
"""Age, Subject Age, Current chronological age: what Patient's Age (0010,1010) answers."""
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_NAMES: dict[Origin, str] = {"sr": "DICOM SR", "fhir": "FHIR", "sidecar": "sidecar"}


@dataclass(frozen=True, slots=True)
class _Usable:
    """A value that stands on its own; whether it stands beside the others is still open."""

    value: ClinicalInput
    said: Observation
    when: datetime | None


def codes_of(entry: Wanted) -> set[CodeKey]:
    """All codes of a wanted value, canonical."""
    return {canonical(c.value, c.scheme) for c in (entry.code, *entry.also)}


def collect(
    study: Study,
    wanted: Iterable[Wanted],
    ucum: Ucum,
    gathered: Gathered | None = None,
    *,
    codes: CodeMap | None = None,
    priority: Sequence[Origin] = ORIGINS,
) -> Collected:
    """The values of a study. `gathered`: what sources outside it said."""
    entries, outside = list(wanted), gathered or Gathered()
    if not entries:
        return Collected()
    said = [*in_reports(study, codes or CodeMap()), *outside.observations]
    judge = _Judge(ucum, reference(study), zone_of(study))
    values: dict[str, ClinicalInput] = {}
    problems: list[str] = list(outside.problems)
    for entry in entries:
        names = codes_of(entry)
        found = [o for o in said if o.code in names and _of_site(o, entry)]
        if names & AGE_CODES and not found:
            found = list(ages(study))
        usable: list[_Usable] = []
        for one in found:
            made = judge.usable(entry, one)
            if isinstance(made, str):
                problems.append(made)
            else:
                usable.append(made)
        for key in dict.fromkeys(u.value.key for u in usable):
            value, said_of_it = _chosen([u for u in usable if u.value.key == key], entry, priority)
            problems += said_of_it
            if value is not None:
                values[key] = value
    return Collected(values, tuple(dict.fromkeys(problems)))


def _of_site(said: Observation, entry: Wanted) -> bool:
    """A hydrocele has a volume and a side too: where the code names no organ, the Finding Site must."""
    if entry.site is not None:
        return said.site == canonical(entry.site.value, entry.site.scheme)
    allowed = [canonical(s.value, s.scheme) for s in entry.sites]
    return not allowed or said.site in (("", ""), *allowed)


class _Judge:
    """Each value on its own."""

    def __init__(self, ucum: Ucum, images: datetime | None, zone: timedelta | None) -> None:
        self._ucum, self._images, self._zone = ucum, images, zone

    def usable(self, entry: Wanted, said: Observation) -> _Usable | str:
        if said.inexact:
            return problem(ClinicalCode.CLINICAL_INPUT_INEXACT, entry.name, "the source gives a bound, not a value")
        value = self._ucum.convert(said.value, said.unit, entry.unit)
        if value is None:
            text = f"its unit cannot be converted to {entry.unit}"
            return problem(ClinicalCode.CLINICAL_INPUT_UNIT, entry.name, text)
        low, high = entry.range
        if not low <= value <= high:
            text = f"outside the plausible range {low:g} to {high:g} {entry.unit}"
            return problem(ClinicalCode.CLINICAL_INPUT_IMPLAUSIBLE, entry.name, text)
        if entry.per_side and not said.side:
            return problem(ClinicalCode.CLINICAL_INPUT_SIDE, entry.name, "the source does not say of which side")
        when = moment(said.time, self._zone)
        if (why := self._too_far(entry, said, when)) is not None:
            return why
        made = ClinicalInput(
            name=entry.name,
            code=Code(entry.code.value, entry.code.scheme, entry.code.meaning),
            value=float(f"{value:.6g}"),
            unit=entry.unit,
            time=said.time,
            source=said.source,
            laterality=said.side if entry.per_side else "",
        )
        return _Usable(made, said, when)

    def _too_far(self, entry: Wanted, said: Observation, when: datetime | None) -> str | None:
        if when is None or self._images is None:
            if said.origin == "sr":  # it came with the images: it belongs to them
                return None
            whose = "the images do" if when is not None else "the source does"
            return problem(ClinicalCode.CLINICAL_INPUT_TIME, entry.name, f"{whose} not say of which day")
        age = self._images - when
        if abs(age) <= timedelta(days=entry.max_age_days):
            return None
        side = "older" if age > timedelta() else "newer"
        text = f"{abs(age).days} days {side} than the images, at most {entry.max_age_days:g} allowed"
        return problem(ClinicalCode.CLINICAL_INPUT_AGE, entry.name, text)


def _chosen(
    values: list[_Usable], entry: Wanted, priority: Sequence[Origin]
) -> tuple[ClinicalInput | None, tuple[str, ...]]:
    """One value of all sources: the first source's, unless another contradicts it that is as new or newer."""
    by_source = [(origin, own) for origin in priority if (own := [v for v in values if v.said.origin == origin])]
    (first, own), *others = by_source
    best = _agreed(own, entry)
    if best is None:
        return None, (_conflict(values[0], f"several values of the same time disagree ({_NAMES[first]})"),)
    agreeing, problems = [], []
    for origin, theirs in others:
        second = _agreed(theirs, entry)
        if second is None:
            problems.append(_conflict(best, f"several values of the same time disagree ({_NAMES[origin]})"))
        elif not _differ([best.value.value, second.value.value], AGREE):
            agreeing.append(_NAMES[origin])
        elif _not_older(second, best):
            return None, (*problems, _conflict(best, f"{_NAMES[first]} and {_NAMES[origin]} disagree"))
    source = best.value.source + (f", agrees with {' and '.join(agreeing)}" if agreeing else "")
    return replace(best.value, source=source), tuple(problems)


def _conflict(about: _Usable, text: str) -> str:
    return problem(ClinicalCode.CLINICAL_INPUT_CONFLICT, about.value.key, text)


def _not_older(one: _Usable, other: _Usable) -> bool:
    return one.when is None or other.when is None or one.when > other.when - SAME_TIME


def _agreed(values: list[_Usable], entry: Wanted) -> _Usable | None:
    """One source's newest value; None where the newest disagree.

    Of several measurements in one report the selected one holds, else their mean as derived (TID 300); where the task
    allows it (`repeated: mean`) also the mean of them all.
    """
    newest = max(values, key=lambda v: v.when or _EARLIEST)
    together = [v for v in values if v.said.group and v.said.group == newest.said.group]
    latest = [v for v in values if v.when == newest.when]
    if entry.repeated == "mean":
        latest = together or latest
    for chosen in ("mean", "selected"):
        latest = [v for v in together if v.said.chosen == chosen] or latest
    numbers = [v.value.value for v in latest]
    if _differ(numbers, AGREE):
        if entry.repeated != "mean" or not together or _differ(numbers, MEAN_SPREAD):
            return None
        source = f"{newest.value.source}, mean of {len(numbers)} measurements"
        newest = replace(newest, value=replace(newest.value, source=source))
    elif newest not in latest:
        newest = latest[0]
    return replace(newest, value=replace(newest.value, value=float(f"{sum(numbers) / len(numbers):.6g}")))


def _differ(numbers: Sequence[float], limit: float) -> bool:
    low, high = min(numbers), max(numbers)
    return high - low > limit * max(abs(low), abs(high))


def is_age(entry: Wanted) -> bool:
    """Age is the study's own to say: nobody is asked for it."""
    return bool(codes_of(entry) & AGE_CODES)

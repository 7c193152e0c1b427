"""Judges a study against the routes of config.yaml: each route on its own, several may run. Pure functions, no ledger.

`when` asks what the images are: every key must hold on one series. `indication` asks why they were made: on the study.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Final

from dicom_node.config import Matcher, Require, Route
from dicom_node.config_phases import Rules as PhaseRules
from dicom_node.errors import ConfigError
from dicom_node.result import ClinicalInput, Refusal, RefusalCode
from dicom_node.route.facts import SeriesFacts, StudyFacts, lookup
from dicom_node.route.indication import check_matcher
from dicom_node.route.match import check_when, compare
from dicom_node.route.terms import Codes
from dicom_node.route.text import unsafe_regex
from dicom_node.route.verdict import Check, Verdict
from dicom_node.study import Study, is_own_output

MAX_SERIES_SHOWN: Final = 40
STAT: Final = 9
_ORDER_PRIORITIES: Final = {"STAT": STAT, "ASAP": 5, "HIGH": 5}
"""Requested Procedure Priority (0040,1003): STAT, HIGH, ROUTINE, MEDIUM, LOW; ASAP from HL7."""


def evaluate(
    route: Route, study: Study, clinical: Mapping[str, ClinicalInput], site_codes: Codes | None = None
) -> Verdict:
    """One route. `site_codes`: the site's own procedure codes, (value, scheme) -> body parts."""
    return _judge(route, StudyFacts(study, clinical, site_codes))


def evaluate_all(
    routes: Iterable[Route], study: Study, clinical: Mapping[str, ClinicalInput], site_codes: Codes | None = None
) -> tuple[Verdict, ...]:
    """Every route, in the order of config.yaml; the study is read once."""
    facts = StudyFacts(study, clinical, site_codes)
    return tuple(_judge(route, facts) for route in routes)


def _judge(route: Route, study: StudyFacts) -> Verdict:
    seen = [(series, tuple(check_when(key, m, series) for key, m in route.when.items())) for series in study.series]
    matched = [series for series, checks in seen if all(c.verdict == "YES" for c in checks)]
    established, indication = _indication(route, study)
    shown = sorted(seen, key=lambda s: (-sum(c.verdict == "YES" for c in s[1]), s[0].number))[:MAX_SERIES_SHOWN]
    shown.sort(key=lambda s: s[0].number)
    refusal = None
    if matched and not established:
        refusal = Refusal(RefusalCode.INDICATION_NOT_ESTABLISHED, _looked_for(route, indication))
    elif not matched:
        refusal = _ambiguity(route.when, seen)
    return Verdict(
        route=route.name,
        matched=bool(matched),
        refusal=refusal,
        series=tuple(series.series.series_instance_uid for series in matched),
        evidence=tuple(c for _, checks in shown for c in checks) + indication,
        indication="any" if route.indication.any else "all",
        established=established,
        series_left_out=len(seen) - len(shown),
    )


def _indication(route: Route, study: StudyFacts) -> tuple[bool, tuple[Check, ...]]:
    """Whether it is established, and every check: also those after the first that held, the operator wants all."""
    matchers = route.indication.any or route.indication.all
    checked = [check_matcher(number, matcher, study) for number, matcher in enumerate(matchers, start=1)]
    held = [bool(checks) and all(c.verdict == "YES" for c in checks) for checks in checked]
    established = any(held) if route.indication.any else all(held)
    return established, tuple(c for checks in checked for c in checks)


def _looked_for(route: Route, indication: tuple[Check, ...]) -> str:
    """Keys and verdicts only: the text goes into logs and reports, so neither values nor patterns stand in it."""
    matchers: dict[int, list[str]] = {}
    for check in indication:
        matchers.setdefault(check.matcher or 0, []).append(f"{check.key} {check.verdict}")
    which = "any" if route.indication.any else "all"
    return f"{which} of: " + "; ".join(" and ".join(keys) for keys in matchers.values())


def _ambiguity(when: dict[str, Matcher], seen: list[tuple[SeriesFacts, tuple[Check, ...]]]) -> Refusal | None:
    """A route that only an ambiguous body part keeps from matching says so, instead of silently not matching."""
    expected = when.get("body_part")
    if expected is None:
        return None
    for series, checks in seen:
        others = all(c.verdict == "YES" for c in checks if c.key != "body_part")
        found = series.body_part
        if others and found.state == "AMBIGUOUS" and compare(expected, sorted(found.candidates)) == "YES":
            return Refusal(RefusalCode.BODY_PART_AMBIGUOUS, f"series {series.number}: {found}")
    return None


def say_rejected(
    verdicts: Iterable[Verdict], whole: Iterable[Verdict], rejected: Mapping[str, str]
) -> tuple[Verdict, ...]:
    """A route that only rejected images would have matched says so, instead of silently not matching.

    `whole`: the verdicts with the rejected images. `rejected`: SOP Instance UID to the title that rejects it.
    """
    refusal = Refusal(
        RefusalCode.IMAGE_REJECTED, f"{len(rejected)} instances: {', '.join(sorted(set(rejected.values())))}"
    )
    return tuple(
        replace(with_them, refusal=refusal) if with_them.matched and not verdict.matched else verdict
        for verdict, with_them in zip(verdicts, whole, strict=True)
    )


def unrouted_code(verdicts: Iterable[Verdict]) -> RefusalCode:
    """Why a study that no route matches goes nowhere: BODY_PART_AMBIGUOUS where only that kept one from it."""
    ambiguous = any(v.refusal is not None and v.refusal.code is RefusalCode.BODY_PART_AMBIGUOUS for v in verdicts)
    return RefusalCode.BODY_PART_AMBIGUOUS if ambiguous else RefusalCode.NO_ROUTE


def select_priority(route: Route, study: Study, priority_ae: Collection[str]) -> int:
    """0..9: the highest of the route's priority, `receive.priority_ae` (STAT), and what the order says."""
    urgent = any(i.calling_ae_title.strip() in priority_ae for i in study.instances)
    orders = {str(v).strip().upper() for i in study.instances for v in lookup(i.header, "RequestedProcedurePriority")}
    return max([route.priority, STAT if urgent else 0, *(_ORDER_PRIORITIES.get(order, 0) for order in orders)])


def missing_requirements(
    require: Require,
    study: Study,
    clinical: Mapping[str, ClinicalInput],
    series: Collection[str] = (),
    phases: PhaseRules | None = None,
) -> list[str]:
    """What `require` asks for and the study lacks, in words without PHI; [] = complete.

    `series` limits it to the series that matched (`Verdict.series`). `min_frames` is about the longest clip: two half
    clips are not a whole one. `min_instances` counts the instances together. `phases`: the section of config.yaml.
    """
    instances = [
        i
        for s in study.series
        if not series or s.series_instance_uid in series
        for i in s.instances
        if not is_own_output(i.header)
    ]
    longest = max((i.number_of_frames for i in instances), default=0)
    missing = []
    if require.min_frames is not None and longest < require.min_frames:
        missing.append(f"min_frames {require.min_frames} (the longest clip has {longest})")
    if require.min_instances is not None and len(instances) < require.min_instances:
        missing.append(f"min_instances {require.min_instances} (there are {len(instances)})")
    if require.phases:
        missing += _missing_phases(require.phases, study, series, phases)
    missing += [f"clinical {name}" for name in missing_values(require, clinical)]
    return missing


def missing_values(require: Require, clinical: Mapping[str, ClinicalInput]) -> list[str]:
    """Clinical values that `require` names and nobody has said."""
    known = {name.casefold() for name in clinical}
    return [name for name in require.clinical if name.casefold() not in known]


def _missing_phases(
    wanted: Iterable[str], study: Study, series: Collection[str], rules: PhaseRules | None
) -> list[str]:
    """Contrast phases that the headers do not establish. What cannot be told apart counts as missing, and says why."""
    from dicom_node.pixels import dynamic  # imported late: numpy, for the routes that ask for phases only

    matched = tuple(s for s in study.series if not series or s.series_instance_uid in series)
    found = dynamic.plan(replace(study, series=matched), rules)
    if isinstance(found, Refusal):
        return [f"phases {', '.join(wanted)} ({found})"]
    return [f"phase {name}" for name in wanted if name not in found.names]


def check_routes(routes: Iterable[Route], file: str) -> None:
    """Refuse regular expressions that hostile text can make run for ever. Raises ConfigError. Call it at start."""
    for index, route in enumerate(routes):
        for key, matcher in _matchers(route):
            pattern = getattr(matcher, "regex", None)
            if pattern is not None and (why := unsafe_regex(pattern)):
                raise ConfigError(file, f"routes.{index}.{key}.regex", f"a safe regular expression: {why}")


def _matchers(route: Route) -> Iterable[tuple[str, Matcher]]:
    yield from ((f"when.{key}", matcher) for key, matcher in route.when.items())
    for which, matchers in (("any", route.indication.any), ("all", route.indication.all)):
        for number, entry in enumerate(matchers):
            yield from ((f"indication.{which}.{number}.{key}", matcher) for key, matcher in entry.items())

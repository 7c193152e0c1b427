"""What changed rules would change: two sets of verdicts on one study, compared. Pure; no ledger, no files.

Both sides are what `Verdict.to_json` gave, so a verdict that the ledger keeps compares with a fresh one. It shows what
`explain` shows and nothing more: descriptions, for the operator's own terminal; identifiers never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from dicom_node.route.reason import printable

UNDEFINED: Final = "UNDEFINED"
"""The route is not in this set of rules."""
_MAX_SHOWN: Final = 72

Verdicts = Iterable[Mapping[str, Any]]


def differences(before: Verdicts, after: Verdicts) -> list[dict[str, Any]]:
    """The routes whose answer differs, in the order of the new rules, then those that are gone; [] = the same.

    The answer is whether the route runs, why not, and on which series; evidence that leads to the same is no
    difference.
    """
    old, new = ({str(v["route"]): v for v in side} for side in (before, after))
    found = []
    for route in dict.fromkeys((*new, *old)):
        was, now = _answer(old.get(route)), _answer(new.get(route))
        if was == now or {was["verdict"], now["verdict"]} == {UNDEFINED, "NO_MATCH"}:
            continue  # a route that is new, or gone, and takes nothing changes nothing
        conditions = _conditions(old.get(route), new.get(route))
        found.append({"route": route, "before": _told(was), "after": _told(now), "because": conditions})
    return found


def _answer(verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    if verdict is None:
        return {"verdict": UNDEFINED, "code": None, "series": frozenset()}
    if verdict["runs"]:
        return {"verdict": "RUNS", "code": None, "series": frozenset(verdict["series"])}
    refusal = verdict["refusal"]
    if refusal is None:
        return {"verdict": "NO_MATCH", "code": None, "series": frozenset()}
    return {"verdict": "REFUSED", "code": str(refusal["code"]), "series": frozenset()}


def _told(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {"verdict": answer["verdict"], "code": answer["code"], "series": len(answer["series"])}


def _conditions(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The conditions that are answered otherwise, or stand on one side only: each once, however many series."""
    was, now = _by_condition(old), _by_condition(new)
    told = []
    for condition in dict.fromkeys((*was, *now)):
        before, after = was.get(condition, {}), now.get(condition, {})
        if list(before) == list(after):
            continue
        where, key, expected = condition
        actual = next((text for side in (after, before) for text in side.values() if text), "")
        told.append(
            {
                "where": where,
                "key": key,
                "expected": expected,
                "actual": actual,
                "before": "/".join(before) or None,
                "after": "/".join(after) or None,
            }
        )
    return told


def _by_condition(verdict: Mapping[str, Any] | None) -> dict[tuple[str, str, str], dict[str, str]]:
    """(where, key, expected) to its answers over the series, in the order YES, NO, MISSING, with what was found."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for check in verdict["evidence"] if verdict is not None else ():
        answers = found.setdefault((check["where"], check["key"], check["expected"]), {})
        answers[check["verdict"]] = answers.get(check["verdict"]) or check["actual"]
    order = ("YES", "NO", "MISSING")
    return {c: dict(sorted(a.items(), key=lambda item: order.index(item[0]))) for c, a in found.items()}


def format_differences(study: str, routes: Sequence[Mapping[str, Any]]) -> list[str]:
    """One study, for a terminal."""
    lines = [f"study {printable(study)}"]
    for route in routes:
        lines += [f"  {route['route']}: {_words(route['before'])} -> {_words(route['after'])}"]
        for c in route["because"]:
            condition = f"{c['where']}: {c['key']} {_cut(c['expected'])}"
            lines += [f"    {c['before'] or 'not asked'} -> {c['after'] or 'not asked'}  {condition}"]
            if c["actual"]:
                lines += [f"      found {_cut(c['actual'])}"]
    return lines


def format_summary(studies: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many studies change in which way, the most frequent first."""
    kinds = Counter(
        f"{route['route']}: {_words(route['before'], short=True)} -> {_words(route['after'], short=True)}"
        for study in studies
        for route in study["routes"]
    )
    return [f"  {count:>6}  {kind}" for kind, count in kinds.most_common()]


def _words(side: Mapping[str, Any], *, short: bool = False) -> str:
    if side["verdict"] == "RUNS":
        return "RUNS" if short else f"RUNS on {side['series']} series"
    if side["verdict"] == "REFUSED":
        return f"REFUSED({side['code']})"
    return {"NO_MATCH": "does not match", UNDEFINED: "no such route"}[side["verdict"]]


def _cut(text: str) -> str:
    return printable(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…")

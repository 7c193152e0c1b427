"""Routing decisions for people: `dicom-node explain`, attribute by attribute and rule by rule.

For the operator's own terminal: descriptions are shown, identifiers never (see `reason.shown`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dicom_node.config import Route
from dicom_node.errors import NodeError
from dicom_node.result import ClinicalInput, RefusalCode
from dicom_node.route.body_part import WEIGHTS
from dicom_node.route.facts import StudyFacts
from dicom_node.route.reason import printable, summary
from dicom_node.route.rules import evaluate_all
from dicom_node.route.verdict import Verdict
from dicom_node.study import Header, Instance, Study

WIDTH: Final = 110
_MAX_ACTUAL: Final = 72
_CONDITION: Final = 30


def explain_files(
    routes: Sequence[Route],
    paths: Iterable[Path],
    read_header: Callable[[Path], Header],
    *,
    calling_ae: str = "",
    called_ae: str = "",
    clinical: Callable[[Study], Mapping[str, ClinicalInput]] = lambda _study: {},
) -> dict[str, Any]:
    """`explain --file`: what would happen if these files came in, as if sent by and to the given AE titles.

    `read_header` raises a NodeError for a file that it cannot read; the others are explained all the same.
    `clinical` gives the clinical values that the study itself holds.
    """
    instances: dict[str, list[Instance]] = {}
    unreadable = []
    for number, path in enumerate(paths):
        try:
            header = read_header(path)
        except NodeError as e:
            unreadable.append({"file": str(path), "error": str(e)})
            continue
        instance = Instance(f"{number:032x}", header, "", "", path, calling_ae, called_ae, "", "", 0.0)
        instances.setdefault(instance.study_instance_uid, []).append(instance)
    studies = [Study.from_instances(uid, 1, group) for uid, group in instances.items()]
    return {"studies": [_explain(routes, study, clinical(study)) for study in studies], "unreadable": unreadable}


def _explain(routes: Sequence[Route], study: Study, clinical: Mapping[str, ClinicalInput]) -> dict[str, Any]:
    facts = StudyFacts(study, {})
    series = [
        {
            "series": s.number,
            "modality": summary(s.values("Modality")),
            "instances": len(s.series.instances),
            "description": summary(s.values("SeriesDescription")),
            "body_part": str(s.body_part),
        }
        for s in facts.series
    ]
    own = len(study.instances) - len(facts.instances)
    verdicts = [v.to_json() for v in evaluate_all(routes, study, clinical)]
    guessed = sum(i.header.text_guessed for i in study.instances)
    return {
        "study": study.study_instance_uid,
        "series": series,
        "own_objects": own,
        "text_guessed": guessed,
        "verdicts": verdicts,
    }


def format_explanation(explanation: Mapping[str, Any]) -> str:
    """The text of `explain --file` for a terminal."""
    lines: list[str] = []
    for study in explanation["studies"]:
        lines += [f"Study {printable(study['study'])}"]
        for s in study["series"]:
            count = f"{s['instances']} instance" + ("s" if s["instances"] != 1 else "")
            described = f", “{s['description']}”" if s["description"] else ""
            lines += [f"  series {s['series']}: {s['modality'] or 'no modality'}, {count}{described}"]
        if study["own_objects"]:
            lines += [f"  {study['own_objects']} of our own objects are left out"]
        if study["text_guessed"]:
            lines += [f"  text of {study['text_guessed']} is not in the declared character set and was guessed"]
        lines += [f"  {_overview(study['verdicts'])}"]
        for verdict in study["verdicts"]:
            lines += ["", format_verdict(verdict)]
        lines += [""]
    lines += [printable(f"{u['file']}: cannot be read: {u['error']}") for u in explanation["unreadable"]]
    return "\n".join(lines).rstrip()


def _overview(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What became of it, before the reasons: they fill screens."""
    runs = [v["route"] for v in verdicts if v["runs"]]
    refused = [f"{v['route']} ({v['refusal']['code']})" for v in verdicts if not v["runs"] and v["refusal"]]
    said = f"taken by: {', '.join(runs) or 'no route'}"
    return said + (f"; refused by: {', '.join(refused)}" if refused else "")


def format_verdict(verdict: Verdict | Mapping[str, Any]) -> str:
    """One route, for a terminal. Takes a Verdict or what `Verdict.to_json` gave (as the ledger keeps it)."""
    v = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    checks: list[Mapping[str, Any]] = v["evidence"]
    when = [c for c in checks if c["where"] == "when"]
    lines = [f"Route {v['route']}: {_conclusion(v)}"]
    if not when:
        lines += ["  when: the study holds no series"]
    for number in dict.fromkeys(c["series"] for c in when):
        group = [c for c in when if c["series"] == number]
        lines += [f"  when, all on one series; series {number}: {_tally(group)}", *_table(group)]
    if v["series_left_out"]:
        lines += [f"  … and {v['series_left_out']} more series, on which fewer conditions hold"]
    lines += _indication_lines(v, [c for c in checks if c["where"] == "indication"])
    return "\n".join(lines)


def _indication_lines(v: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> list[str]:
    which = v["indication"]
    lines = [f"  indication, {which} of these on the study: {'established' if v['established'] else 'not established'}"]
    for matcher in dict.fromkeys(c["matcher"] for c in checks):
        group = [c for c in checks if c["matcher"] == matcher]
        if len(group) > 1:
            lines += [f"    matcher {matcher}, all {len(group)} together: {_tally(group)}"]
        lines += _table(group)
    return lines


def _conclusion(v: Mapping[str, Any]) -> str:
    refusal = v["refusal"]
    if v["runs"]:
        return f"RUNS, on {len(v['series'])} series"
    if refusal is None:
        return "does not match"
    sentence = f"{RefusalCode(refusal['code']).sentence} ({refusal['detail']})"
    text = textwrap.fill(sentence, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return f"REFUSED, {refusal['code']}\n{text}"


def _tally(checks: Sequence[Mapping[str, Any]]) -> str:
    failing = [f"{c['key']} is {c['verdict']}" for c in checks if c["verdict"] != "YES"]
    return "holds" if not failing else "does not hold, " + ", ".join(failing)


def _table(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """`YES      modality is US          found US`, and below it the evidence that was added up."""
    lines = []
    for check in checks:
        condition = f"{check['key']} {_cut(check['expected'])}"
        found = f"found {_cut(check['actual'])}" if check["actual"] else "not in the study"
        if check["verdict"] == "YES" and not check["actual"]:
            found = ""
        if len(condition) > _CONDITION:
            lines += [f"    {check['verdict']:8} {condition}", f"{'':{13 + _CONDITION}}  {found}"]
        else:
            lines += [f"    {check['verdict']:8} {condition:{_CONDITION}}  {found}"]
        lines += _reason_lines(check["reasons"])
    return [line.rstrip() for line in lines]


def _reason_lines(reasons: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a class of evidence, because a class counts once, however many attributes repeat it."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for reason in reasons:
        by = reason["attribute"] if reason["kind"] == "region" else ""
        groups.setdefault((reason["says"], reason["kind"], by), []).append(reason)
    lines = []
    for (says, kind, _), group in groups.items():
        first = group[0]
        weight = f" +{first['weight']}" if kind in WEIGHTS else ""
        others = f"; so do {len(group) - 1} more" if len(group) > 1 else ""
        because = f"{first['attribute']} “{_cut(first['actual'])}”, {first['reason']}{others}"
        lines += [f"{'':15}{says + weight:13} {kind}: {because}"]
    return lines


def _cut(text: str) -> str:
    return printable(text if len(text) <= _MAX_ACTUAL else text[: _MAX_ACTUAL - 1] + "…")

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
from dicom_node.result import RefusalCode
from dicom_node.route.facts import StudyFacts
from dicom_node.route.reason import summary
from dicom_node.route.rules import evaluate_all
from dicom_node.route.verdict import Verdict
from dicom_node.study import Header, Instance, Study

WIDTH: Final = 110
_MAX_ACTUAL: Final = 60


def explain_files(
    routes: Sequence[Route],
    paths: Iterable[Path],
    read_header: Callable[[Path], Header],
    *,
    calling_ae: str = "",
    called_ae: str = "",
) -> dict[str, Any]:
    """`explain --file`: what would happen if these files came in, as if sent by and to the given AE titles.

    `read_header` raises a NodeError for a file that it cannot read; the others are explained all the same.
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
    return {"studies": [_explain(routes, study) for study in studies], "unreadable": unreadable}


def _explain(routes: Sequence[Route], study: Study) -> dict[str, Any]:
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
    verdicts = [v.to_json() for v in evaluate_all(routes, study, {})]
    return {"study": study.study_instance_uid, "series": series, "own_objects": own, "verdicts": verdicts}


def format_explanation(explanation: Mapping[str, Any]) -> str:
    """The text of `explain --file` for a terminal."""
    lines: list[str] = []
    for study in explanation["studies"]:
        lines += [f"Study {study['study']}"]
        for s in study["series"]:
            count = f"{s['instances']} instance" + ("s" if s["instances"] != 1 else "")
            described = f", “{s['description']}”" if s["description"] else ""
            lines += [f"  series {s['series']}: {s['modality'] or 'no modality'}, {count}{described}"]
        if study["own_objects"]:
            lines += [f"  {study['own_objects']} of our own objects are left out"]
        for verdict in study["verdicts"]:
            lines += ["", format_verdict(verdict)]
        lines += [""]
    lines += [f"{u['file']}: cannot be read: {u['error']}" for u in explanation["unreadable"]]
    return "\n".join(lines).rstrip()


def format_verdict(verdict: Verdict | Mapping[str, Any]) -> str:
    """One route, for a terminal. Takes a Verdict or what `Verdict.to_json` gave (as the ledger keeps it)."""
    v = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    lines = [f"Route {v['route']}: {_conclusion(v)}"]
    checks: list[Mapping[str, Any]] = v["evidence"]
    width = max((len(c["key"]) for c in checks), default=0)
    for number in dict.fromkeys(c["series"] for c in checks if c["where"] == "when"):
        group = [c for c in checks if c["where"] == "when" and c["series"] == number]
        lines += [f"  when, on series {number}: {_tally(group)}"]
        lines += [line for check in group for line in _check_lines(check, width)]
    if v["series_left_out"]:
        lines += [f"  … and {v['series_left_out']} more series on which fewer conditions hold"]
    lines += ["  indication, on the study:"]
    matchers = list(dict.fromkeys(c["matcher"] for c in checks if c["where"] == "indication"))
    for matcher in matchers:
        group = [c for c in checks if c["where"] == "indication" and c["matcher"] == matcher]
        if len(group) > 1:
            lines += [f"    {matcher}. all of these together: {_tally(group)}"]
        lines += [line for check in group for line in _check_lines(check, width)]
    return "\n".join(lines)


def _conclusion(v: Mapping[str, Any]) -> str:
    refusal = v["refusal"]
    if v["runs"]:
        count = len(v["series"])
        return f"RUNS on {count} series" if count > 1 else "RUNS"
    if refusal is None:
        return "does not match"
    return f"REFUSED, {refusal['code']}\n" + textwrap.fill(
        f"{RefusalCode(refusal['code']).sentence} {refusal['detail']}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
    )


def _tally(checks: Sequence[Mapping[str, Any]]) -> str:
    failing = [c["key"] for c in checks if c["verdict"] != "YES"]
    return "holds" if not failing else "does not hold (" + ", ".join(failing) + ")"


def _check_lines(check: Mapping[str, Any], width: int) -> list[str]:
    """`YES      modality   is US    found: US`, and the evidence below it."""
    found = f"found: {_cut(check['actual'])}" if check["actual"] else "found: nothing"
    if check["verdict"] == "YES" and not check["actual"]:
        found = ""
    condition = f"{check['key']:{width}}  {_cut(check['expected'])}"
    lines = [f"    {check['verdict']:8} {condition:{width + 24}}  {found}".rstrip()]
    for reason in check["reasons"]:
        said = f"{reason['says']} {reason['weight'] or ''}".strip()
        lines += [f"{'':17}{said:14} {reason['attribute']} = {_cut(reason['actual'])} ({reason['reason']})"]
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_ACTUAL else text[: _MAX_ACTUAL - 1] + "…"

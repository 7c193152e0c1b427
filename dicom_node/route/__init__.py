"""Route: which engines a study goes to, and why. Stands between assemble and infer.

    rules.py       a study against the routes: evaluate, evaluate_all, priority, completeness
    match.py       one condition against the values of one series      indication.py  the matchers of `indication`
    body_part.py   the evidence table      contrast.py  with contrast or not      terms.py  their words and codes
    facts.py       what is read of a study      text.py  normalisation and bounded regular expressions
    verdict.py     Check and Verdict      reason.py  evidence, and what of it may be shown
    explain.py     the same verdicts for people      changes.py  two sets of them compared
    tables.py      the tables of docs/routing.md, from the data
    stage.py       the stage: claims route jobs and commits what follows (imported from there, not from here)

Everything but the stage is pure: no ledger, no files, no network; values in, values out.
"""

from dicom_node.route.changes import differences, format_differences, format_summary
from dicom_node.route.explain import explain_files, format_explanation, format_verdict
from dicom_node.route.rules import (
    check_routes,
    evaluate,
    evaluate_all,
    missing_requirements,
    say_rejected,
    select_priority,
    unrouted_code,
)
from dicom_node.route.verdict import Check, Verdict, redact

__all__ = [
    "Check",
    "Verdict",
    "check_routes",
    "differences",
    "evaluate",
    "evaluate_all",
    "explain_files",
    "format_differences",
    "format_explanation",
    "format_summary",
    "format_verdict",
    "missing_requirements",
    "redact",
    "say_rejected",
    "select_priority",
    "unrouted_code",
]

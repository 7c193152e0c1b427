"""What routing says of one study and one route: the verdict and every check behind it, as frozen values. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from dicom_node.result import Refusal
from dicom_node.route.reason import FREE_TEXT, Reason
from dicom_node.route.reason import redacted as redacted_reason

Answer: TypeAlias = Literal["YES", "NO", "MISSING"]
"""MISSING is not NO: the study does not say, and the operator must see the difference."""


@dataclass(frozen=True, slots=True)
class Check:
    """One condition, looked at once."""

    where: Literal["when", "indication"]
    key: str
    expected: str
    """The condition in words, from config.yaml."""
    actual: str
    """What the study says; never an identifier."""
    verdict: Answer
    series: int | None = None
    """From 1, in the order of the study; None = the study as a whole."""
    matcher: int | None = None
    """Which matcher of `indication`, from 1."""
    sensitive: bool = False
    """`actual` is free text: for the operator's terminal, not for logs or metrics."""
    reasons: tuple[Reason, ...] = ()
    """The evidence that was added up, for `body_part` and `contrast`."""

    def to_json(self) -> dict[str, Any]:
        own = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "reasons"}
        return own | {"reasons": [r.to_json() for r in self.reasons]}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One route, judged on its own. It runs when `matched` and `refusal is None`."""

    route: str
    matched: bool
    """`when` holds on at least one series."""
    refusal: Refusal | None
    """INDICATION_NOT_ESTABLISHED on a matching route; BODY_PART_AMBIGUOUS on one that would match otherwise."""
    series: tuple[str, ...]
    """Series Instance UIDs on which every condition of `when` holds."""
    evidence: tuple[Check, ...]
    indication: Literal["any", "all"]
    """How many of the matchers must hold."""
    established: bool
    """The indication, whether or not the route matches."""
    series_left_out: int = 0
    """How many series are judged but not shown in `evidence` (a study may have hundreds)."""

    @property
    def runs(self) -> bool:
        return self.matched and self.refusal is None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready. Holds the operator's view: `redact` first where it may reach a log."""
        return {
            "route": self.route,
            "matched": self.matched,
            "runs": self.runs,
            "refusal": None
            if self.refusal is None
            else {"code": self.refusal.code.value, "detail": self.refusal.detail},
            "series": list(self.series),
            "indication": self.indication,
            "established": self.established,
            "evidence": [check.to_json() for check in self.evidence],
            "series_left_out": self.series_left_out,
        }


def redact(verdict: Verdict) -> Verdict:
    """The same verdict without any free text: fit for logs, metrics and audit."""
    return replace(verdict, evidence=tuple(map(_redact_check, verdict.evidence)))


def _redact_check(check: Check) -> Check:
    reasons = tuple(map(redacted_reason, check.reasons))
    if check.sensitive:
        return replace(check, actual=FREE_TEXT, sensitive=False, reasons=reasons)
    return replace(check, reasons=reasons)

"""What clinical values are before and after they are judged: frozen values, and the public codes of what goes wrong."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dicom_node.config_clinical import Origin
from dicom_node.result import ClinicalInput

CodeKey = tuple[str, str]
"""Code Value and Coding Scheme Designator. The meaning is never compared."""


class ClinicalCode(enum.StrEnum):
    """Why a clinical value is not used. Public: documented, stable, each reachable (tested)."""

    CLINICAL_INPUT_MISSING = "CLINICAL_INPUT_MISSING"
    CLINICAL_INPUT_UNIT = "CLINICAL_INPUT_UNIT"
    CLINICAL_INPUT_IMPLAUSIBLE = "CLINICAL_INPUT_IMPLAUSIBLE"
    CLINICAL_INPUT_INEXACT = "CLINICAL_INPUT_INEXACT"
    CLINICAL_INPUT_SIDE = "CLINICAL_INPUT_SIDE"
    CLINICAL_INPUT_TIME = "CLINICAL_INPUT_TIME"
    CLINICAL_INPUT_AGE = "CLINICAL_INPUT_AGE"
    CLINICAL_INPUT_CONFLICT = "CLINICAL_INPUT_CONFLICT"
    CLINICAL_PATIENT_UNKNOWN = "CLINICAL_PATIENT_UNKNOWN"
    CLINICAL_PATIENT_AMBIGUOUS = "CLINICAL_PATIENT_AMBIGUOUS"
    CLINICAL_PATIENT_MISMATCH = "CLINICAL_PATIENT_MISMATCH"
    CLINICAL_SOURCE_UNREACHABLE = "CLINICAL_SOURCE_UNREACHABLE"
    CLINICAL_SOURCE_DENIED = "CLINICAL_SOURCE_DENIED"
    CLINICAL_SOURCE_INVALID = "CLINICAL_SOURCE_INVALID"

    @property
    def sentence(self) -> str:
        """One sentence for the operator."""
        return _SENTENCES[self]


_SENTENCES: dict[ClinicalCode, str] = {
    ClinicalCode.CLINICAL_INPUT_MISSING: "No source holds a value that the engine of the route can use.",
    ClinicalCode.CLINICAL_INPUT_UNIT: "The unit is not UCUM, or does not convert to the one the engine wants.",
    ClinicalCode.CLINICAL_INPUT_IMPLAUSIBLE: "The value lies outside the plausible range of engine.yaml.",
    ClinicalCode.CLINICAL_INPUT_INEXACT: 'The source gives a bound ("< 0.3"), not a value.',
    ClinicalCode.CLINICAL_INPUT_SIDE: "The value is of one of paired organs, and the source does not say which.",
    ClinicalCode.CLINICAL_INPUT_TIME: "The source or the images do not say of which day they are.",
    ClinicalCode.CLINICAL_INPUT_AGE: "The value is further from the images in time than engine.yaml allows.",
    ClinicalCode.CLINICAL_INPUT_CONFLICT: "Values that should agree do not, and nothing says which holds.",
    ClinicalCode.CLINICAL_PATIENT_UNKNOWN: "The study does not say whom to ask for, or the source has no such patient.",
    ClinicalCode.CLINICAL_PATIENT_AMBIGUOUS: "The source has several patients of that identifier.",
    ClinicalCode.CLINICAL_PATIENT_MISMATCH: "The source's patient has another identifier or birth date than the study.",
    ClinicalCode.CLINICAL_SOURCE_UNREACHABLE: "The source did not answer in time.",
    ClinicalCode.CLINICAL_SOURCE_DENIED: "The source refuses our credentials.",
    ClinicalCode.CLINICAL_SOURCE_INVALID: "The source answered something that cannot be used.",
}


def problem(code: ClinicalCode, about: str, text: str) -> str:
    """One line for report and `explain`. `about` is the name of a value or of a source; free of PHI."""
    return f"{code}({about}): {text}"


class Coded(Protocol):
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
    def code(self) -> Coded: ...
    @property
    def also(self) -> Sequence[Coded]: ...
    @property
    def unit(self) -> str: ...
    @property
    def range(self) -> tuple[float, float]: ...
    @property
    def max_age_days(self) -> float: ...
    @property
    def per_side(self) -> bool: ...
    @property
    def site(self) -> Coded | None: ...
    @property
    def sites(self) -> Sequence[Coded]: ...
    @property
    def repeated(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Observation:
    """A number as a source states it, before anything is judged. Its codes are canonical (`CodeMap`)."""

    code: CodeKey
    value: float
    unit: str
    """UCUM; "" = the source's unit is not UCUM."""
    side: str
    """R, L or ""."""
    time: str
    """ISO 8601 as the source writes it, with or without an offset, perhaps a day only; "" = not stated."""
    site: CodeKey
    """Finding site or body site; ("", "") = not stated."""
    origin: Origin
    source: str
    """For the report: "DICOM SR", "FHIR", "sidecar"."""
    group: str = ""
    """What was measured together, for example the report it stands in."""
    chosen: str = ""
    """"selected" or "mean", where the report says that this one of several stands for all (TID 300)."""
    inexact: bool = False
    """A bound, not a value."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, v: Mapping[str, Any]) -> Observation:
        return cls(**(dict(v) | {"code": tuple(v["code"]), "site": tuple(v["site"])}))


@dataclass(frozen=True, slots=True)
class Gathered:
    """What sources outside the study said of it: kept with the study's jobs, so that each sees the same."""

    observations: tuple[Observation, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"observations": [o.to_json() for o in self.observations], "problems": list(self.problems)}

    @classmethod
    def from_json(cls, v: Mapping[str, Any] | None) -> Gathered:
        if not v:
            return cls()
        return cls(tuple(map(Observation.from_json, v["observations"])), tuple(v["problems"]))


@dataclass(frozen=True, slots=True)
class Collected:
    """What is known, by `ClinicalInput.key`, and what was there and could not be used."""

    values: dict[str, ClinicalInput] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

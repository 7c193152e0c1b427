"""Image score and clinical values in one logistic model (a nomogram), as `Manifest.fusion` says. Pure: no I/O.

Every unit takes the values that belong to it: of its side, of both sides (their mean), or of the patient. A value that
is missing is never replaced; then there is no fusion, and the report says which value was missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from dicom_node.packages import ClinicalEntry, FusionSpec, Task
from dicom_node.result import ClinicalInput, Fusion, FusionTerm

LEVEL = 0.95


def fuse(
    spec: FusionSpec, task: Task, margin: float, laterality: str, clinical: Mapping[str, ClinicalInput]
) -> Fusion | str:
    """The fused probability, or why there is none. `margin` is the image's calibrated log-odds.

    Interval: delta method, linear predictor +- z * sqrt(v' S v) with v = (1, standardised terms), S the covariance of
    the coefficients, carried through the logistic function.
    """
    entries = {entry.name: entry for entry in task.clinical}
    terms: list[FusionTerm] = []
    missing: list[str] = []
    for term in spec.terms:
        entry = entries.get(term.name)
        value = margin if entry is None else _value(entry, laterality, clinical)
        if value is None:
            missing.append(_key(term.name, entry, laterality))
            continue
        unit = "" if entry is None else entry.unit
        terms.append(FusionTerm(term.name, unit, value, term.transform, term.centre, term.scale, term.beta, *term.axis))
    if missing:
        return f"fusion not computed: {', '.join(missing)} missing"
    standardised = np.array([1.0, *map(_standard, terms)])
    linear = spec.intercept + sum(map(contribution, terms))
    spread = math.sqrt(max(float(standardised @ np.array(spec.covariance) @ standardised), 0.0))
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * spread
    return Fusion(
        tuple(terms), spec.intercept, linear, _logistic(linear), _logistic(linear - half), _logistic(linear + half)
    )


def contribution(term: FusionTerm) -> float:
    """What this term adds to the linear predictor."""
    return term.beta * _standard(term)


def _standard(term: FusionTerm) -> float:
    value = math.log(term.value) if term.transform == "log" else term.value
    return (value - term.centre) / term.scale


def _value(entry: ClinicalEntry, laterality: str, clinical: Mapping[str, ClinicalInput]) -> float | None:
    sides = {"R": ("R",), "L": ("L",), "B": ("R", "L")}.get(laterality, ()) if entry.per_side else ("",)
    found = [clinical.get(f"{entry.name} {side}".strip()) for side in sides]
    values = [f.value for f in found if f is not None]
    return sum(values) / len(values) if sides and len(values) == len(sides) else None


def _key(name: str, entry: ClinicalEntry | None, laterality: str) -> str:
    if entry is None or not entry.per_side:
        return name
    return {"R": f"{name} (right)", "L": f"{name} (left)", "B": f"{name} (right and left)"}.get(
        laterality, f"{name} (side unknown)"
    )


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

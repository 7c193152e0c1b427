"""A Structured Report as text a person can read: the content tree, indented. Knows pydicom and nothing else.

Shows no patient data: nothing above the content tree but what kind of document it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.dataset import Dataset

# Contained items, modifiers and contexts read well by their names alone; only a derivation needs to be told.
_DERIVATIONS = {"INFERRED FROM": "inferred from ", "SELECTED FROM": "selected from "}


def readable_tree(dataset: Dataset) -> str:
    """The whole document; one line for each content item, two spaces for each level."""
    if "ConceptNameCodeSequence" not in dataset:
        raise ValueError("not a Structured Report: it has no document title")
    flags = (str(dataset.get(k, "")) for k in ("CompletionFlag", "PreliminaryFlag", "VerificationFlag"))
    lines = [
        f"{_concept(dataset.ConceptNameCodeSequence[0])}  [{', '.join(f for f in flags if f)}]",
        f'  series "{dataset.get("SeriesDescription", "")}"',
        *_children(dataset, 1),
    ]
    return "\n".join(lines) + "\n"


def _children(item: Dataset, depth: int) -> Iterator[str]:
    for child in item.get("ContentSequence", []):
        yield "  " * depth + _line(child)
        yield from _children(child, depth + 1)


def _line(item: Dataset) -> str:
    prefix = _DERIVATIONS.get(item.get("RelationshipType", ""), "")
    names = item.get("ConceptNameCodeSequence", [])
    name = str(names[0].CodeMeaning) if names else str(item.get("ValueType", "item")).lower()
    value = _value(item)
    return f"{prefix}{name}{': ' + value if value else ''}"


def _value(item: Dataset) -> str:
    kind = item.get("ValueType", "")
    if kind == "CODE" and item.get("ConceptCodeSequence"):
        return _concept(item.ConceptCodeSequence[0])
    if kind == "NUM":
        return _number(item)
    if kind in ("IMAGE", "COMPOSITE") and item.get("ReferencedSOPSequence"):
        return _reference(item.ReferencedSOPSequence[0])
    if kind in ("SCOORD", "SCOORD3D"):
        return f"{item.get('GraphicType', '')}, {len(item.get('GraphicData') or ()) // 2} points"
    plain = {"TEXT": "TextValue", "UIDREF": "UID", "DATE": "Date", "TIME": "Time", "DATETIME": "DateTime"}
    if kind in plain or kind == "PNAME":
        return str(item.get(plain.get(kind, "PersonName"), ""))
    return ""


def _number(item: Dataset) -> str:
    measured = item.get("MeasuredValueSequence") or []
    if not measured:
        return "no value"
    units = measured[0].get("MeasurementUnitsCodeSequence") or []
    unit = f" {units[0].CodeMeaning}" if units else ""
    names = item.get("ConceptNameCodeSequence") or []
    code = f"   ({names[0].CodeValue}, {names[0].CodingSchemeDesignator})" if names and "CodeValue" in names[0] else ""
    number = str(measured[0].get("NumericValue", "")).removesuffix(".0")
    return f"{number}{unit}{code}"


def _reference(reference: Dataset) -> str:
    uid = reference.get("ReferencedSOPClassUID")
    kind = uid.name if uid is not None else "object"
    frames = reference.get("ReferencedFrameNumber")
    numbers = [] if frames is None else [int(n) for n in (frames if hasattr(frames, "append") else [frames])]
    shown = f", frames {_ranges(numbers)}" if numbers else ""
    return f"{kind} {reference.get('ReferencedSOPInstanceUID', '')}{shown}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _concept(code: Dataset) -> str:
    value = code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue") or ""
    return f"{code.get('CodeMeaning', '')} ({value}, {code.get('CodingSchemeDesignator', '')})"

"""What `engines bench` found, as values: rows, the ratio of paired rounds, the targets, and the text of it all. No I/O.

A ratio is torch's time over the backend's in the same round, so that what else the machine does falls on both; the
median round counts. Only ratios can hold or miss a target that gates; absolute times are printed beside theirs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CPU_BACKENDS = frozenset({"onnx", "openvino"})
TORCH = "torch eager"
ACCEPTED, REFUSED, NOT_HERE, FAILED = "accepted", "refused", "not here", "failed"
SLOWER, MEAN, PAPER = 1.0, 2.0, 2.0
"""Least ratio of each demonstration graph, of their geometric mean, and of each network of `PAPER_TASKS`."""
PAPER_TASKS = ("thyroid_cine", "testis_noa")
AIMS = {
    ("thyroid_cine", "result"): 150.0, ("renal_ceus", "result"): 60.0, ("liver_dce", "result"): 120.0,
    ("testis_tumour", "score"): 300.0, ("testis_tumour", "map"): 2000.0, ("testis_noa", "result"): 60.0,
}  # fmt: skip
"""Milliseconds from decoded input, on two cores. `map`: what the result takes beyond its score."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of paired rounds."""

    median: float
    least: float
    most: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """One engine on one backend, every model once for a case."""

    task: str
    preset: str
    backend: str
    precision: str
    status: str
    """accepted | refused | not here | failed; torch, which nothing is accepted on, is "reference"."""
    reason: str = ""
    version: str = ""
    p50_ms: float | None = None
    p95_ms: float | None = None
    samples: int = 0
    per_second: float | None = None
    best_batch: int | None = None
    rss_mb: float | None = None
    pss_mb: float | None = None
    first_load_s: float | None = None
    build_s: float | None = None
    """Of a compiled plan, within the first load; None: this backend keeps none."""
    off: float | None = None
    """Largest difference from a golden answer, over its tolerance."""
    ratio: Ratio | None = None
    ratio_reason: str = ""
    """Why there is no ratio."""


@dataclass(frozen=True, slots=True)
class Case:
    """Decoded input to result, or to the first score, of a phantom study on one backend."""

    task: str
    what: str
    """result | score | map."""
    backend: str
    precision: str
    reason: str = ""
    p50_ms: float | None = None
    p95_ms: float | None = None
    samples: int = 0
    aim_ms: float | None = None
    rss_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """A target on ratios."""

    target: str
    held: bool | None
    """None: cannot be judged."""
    said: str


# -- arithmetic


def ratio_of(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Ratio:
    """Of rounds of milliseconds, paired in their order."""
    found = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found), len(found))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def best_batch(per_case_ms: Mapping[int, float]) -> tuple[int, float]:
    """Batch with the most cases a second, and how many, of milliseconds for a pass by batch."""
    batch = max(per_case_ms, key=lambda b: (b / per_case_ms[b], -b))
    return batch, 1000 * batch / per_case_ms[batch]


def best_cpu(rows: Iterable[Row], task: str, preset: str) -> Row | None:
    """The accepted CPU backend that the node would take: the fastest."""
    mine = [
        r
        for r in rows
        if (r.task, r.preset, r.status) == (task, preset, ACCEPTED) and r.backend in CPU_BACKENDS and r.p50_ms
    ]
    return min(mine, key=lambda r: r.p50_ms or math.inf, default=None)


# -- targets


def gates(rows: Sequence[Row], *, every_task: bool) -> list[Gate]:
    """What the rows say about the targets on ratios; a target that was not asked about is left out."""
    found = []
    demo = list(dict.fromkeys(r.task for r in rows if r.preset == "demo"))
    best = {task: best_cpu(rows, task, "demo") for task in demo}
    found += [_gate(f"{task}: best CPU backend against {TORCH}", best[task], SLOWER) for task in demo]
    if every_task and demo:
        found.append(_mean(best))
    for task in PAPER_TASKS:
        if any((r.task, r.preset) == (task, "paper") for r in rows):
            found.append(_gate(f"{task}, paper preset", best_cpu(rows, task, "paper"), PAPER))
    return found


def _gate(about: str, row: Row | None, least: float) -> Gate:
    target = f"{about} >= {least:g} x"
    if row is None or row.ratio is None:
        return Gate(target, None, "no CPU backend was accepted" if row is None else row.ratio_reason)
    return Gate(target, row.ratio.median >= least, f"{row.ratio.median:.2f} x ({row.backend})")


def _mean(best: Mapping[str, Row | None]) -> Gate:
    target = f"geometric mean over {len(best)} engines >= {MEAN:g} x"
    ratios = [row.ratio.median for row in best.values() if row is not None and row.ratio is not None]
    if len(ratios) < len(best):
        return Gate(target, None, f"{len(best) - len(ratios)} of them have no ratio")
    mean = statistics.geometric_mean(ratios)
    return Gate(target, mean >= MEAN, f"{mean:.2f} x")


# -- text


def text(answer: Mapping[str, Any]) -> str:
    """For a terminal, and for docs/performance.md as it is."""
    lines = [f"{what}: {answer[what]}" for what in ("machine", "versions", "graphs")]
    lines += [f"not here: {a['backend']} {a['precision']}: {a['reason']}" for a in answer["absent"]]
    lines += ["", "every model once, one case", *_table(_HEADS, map(_cells, answer["rows"]))]
    lines += [f"{r['task']} {r['preset']}: no ratio: {r['ratio_reason']}" for r in _first_reasons(answer["rows"])]
    if answer["cases"]:
        lines += ["", "decoded input to result, phantom study"]
        lines += _table(_CASE_HEADS, map(_case_cells, answer["cases"]))
    if answer["gates"]:
        lines += ["", "targets", *(_gate_line(gate) for gate in answer["gates"])]
    return "\n".join(lines)


def line(found: Row | Case) -> str:
    """As soon as it is known: a bench takes minutes, and may be stopped."""
    cells = _cells(asdict(found)) if isinstance(found, Row) else _case_cells(asdict(found))
    return "  " + "  ".join(cell for cell in cells if cell)


_HEADS = (
    "engine", "preset", "backend", "p50 ms", "p95 ms", "best /s", "batch", "RSS MB", "PSS MB", "first load s",
    "build s", "x torch eager", "(range)",
)  # fmt: skip
_CASE_HEADS = ("engine", "to", "backend", "p50 ms", "p95 ms", "n", "aim ms", "", "RSS MB")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{row['backend']} {row['precision']}"
    if row["p50_ms"] is None:
        return (row["task"], row["preset"], name, f"{row['status']}: {row['reason']}")
    ratio = row["ratio"]
    compared = ("", "") if ratio is None else (f"{ratio['median']:.2f}", f"{ratio['least']:.2f}-{ratio['most']:.2f}")
    build = "" if row["status"] == "reference" else "none"
    return (
        row["task"], row["preset"], name, _ms(row["p50_ms"]), _ms(row["p95_ms"]), f"{row['per_second']:.1f}",
        str(row["best_batch"]), f"{row['rss_mb']:.0f}", f"{row['pss_mb']:.0f}", _or(row["first_load_s"], ".2f"),
        _or(row["build_s"], ".1f", build), *compared,
    )  # fmt: skip


def _case_cells(case: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{case['backend']} {case['precision']}".strip()
    if case["p50_ms"] is None:
        return (case["task"], case["what"], name, case["reason"])
    aim = case["aim_ms"]
    met = "" if aim is None else "met" if case["p50_ms"] <= aim else "MISSED"
    return (
        case["task"], case["what"], name, _ms(case["p50_ms"]), _ms(case["p95_ms"]), str(case["samples"]),
        _or(aim, ".0f"), met, _or(case["rss_mb"], ".0f"),
    )  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _or(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their cells; a row that ends early says why in its last cell, which spans the rest."""
    whole = [heads, *rows]
    widths = [max(len(r[i]) for r in whole if len(r) == len(heads)) for i in range(len(heads))]
    for row in whole:
        for i, cell in enumerate(row[:-1] if len(row) < len(heads) else row):
            widths[i] = max(widths[i], len(cell))
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=False)).rstrip() for r in whole]


def _first_reasons(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row of each engine and preset that was timed and not compared."""
    missing = [r for r in rows if r["p50_ms"] is not None and r["ratio"] is None and r["ratio_reason"]]
    return list({(r["task"], r["preset"], r["ratio_reason"]): r for r in missing}.values())


def _gate_line(gate: Mapping[str, Any]) -> str:
    held = {True: "holds", False: "DOES NOT HOLD", None: "cannot be judged"}[gate["held"]]
    return f"  {gate['target']}: {held}: {gate['said']}"


def plain(values: Iterable[Row | Case | Gate]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(value) for value in values]

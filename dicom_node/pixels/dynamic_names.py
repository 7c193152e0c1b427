"""What the phases are called: by description, by contrast attribute, by seconds after the injection. No I/O.

What is written beats what is computed, but the two may not contradict each other, nor may the order of the names
contradict the order in time: that is a refusal. A phase that nothing names stays "phase k"; none is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dicom_node.config_phases import PhaseName
from dicom_node.pixels.dynamic_frames import moment
from dicom_node.pixels.dynamic_model import ARTERIAL, DELAYED, HEPATOBILIARY, ORDER, PORTAL, PRE, Frame, Rules
from dicom_node.pixels.dynamic_split import Part
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header

_WORDS: dict[PhaseName, tuple[str, ...]] = {
    PRE: (
        "pre", "prec", "precontrast", "nativ", "native", "nativphase", "plain", "unenhanced", "noncontrast",
        "nonenhanced", "non contrast", "ohne km", "vor km", "nativo", "sans contraste", "sans injection", "basal",
        "sin contraste", "senza contrasto", "prekontrast", "平扫", "平掃", "造影前", "単純",
    ),
    ARTERIAL: (
        "art", "arterial", "arteriell", "arterielle", "artphase", "arterielphase", "artériel", "artérielle",
        "arteriel", "arteriosa", "arterioso", "hap", "spätarteriell", "spaetarteriell", "früharteriell",
        "frueharteriell", "动脉", "動脈", "動脉",
    ),
    PORTAL: (
        "pv", "pvp", "portal", "portalvenous", "portvenous", "portovenous", "ven", "venous", "venös", "venoes",
        "venoese", "venöse", "portalvenös", "portalvenoes", "portvenös", "portvenoes", "pvenös", "portale", "porto",
        "veineux", "venosa", "venoso", "门脉", "门静脉", "門脈", "門靜脈", "静脉期", "靜脈期",
    ),
    DELAYED: (
        "delay", "delayed", "equilibrium", "equil", "eq", "transitional", "equilibrio", "spätphase", "spaetphase",
        "延迟", "延遲", "平衡期", "平衡相", "移行期", "late", "spät", "spaet", "tardif", "tardive", "tardía", "tardia",
        "tardivo",
    ),
    HEPATOBILIARY: (
        "hbp", "hepatobiliary", "hepatobiliär", "hepatobiliaer", "hepatobiliaire", "hepatobiliar", "epatobiliare",
        "leberspezifisch", "hepatocyte", "肝胆", "肝膽", "肝细胞", "肝細胞",
    ),
}  # fmt: skip
"""Whole words or phrases of a series description, folded; Chinese and Japanese ones wherever they stand."""
_LATE = {"late", "spät", "spaet", "tardif", "tardive", "tardía", "tardia", "tardivo"}
_ATTRIBUTE = {
    "PRE_CONTRAST": PRE, "ARTERIAL": ARTERIAL, "PORTAL_VENOUS": PORTAL, "VENOUS": PORTAL, "DELAYED": DELAYED,
}  # fmt: skip
"""Contrast/Bolus Agent Phase (0018,9344); its other terms name no phase of the liver."""
_GADOXETATE = re.compile(r"gadoxet|primovist|eovist|gd-?eob|eob-?dtpa|普美显|普美顯", re.IGNORECASE)
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Named:
    """The phases of a plan, named."""

    names: tuple[str, ...]
    named_by: tuple[str, ...]
    seconds: tuple[float, ...]
    notes: Mapping[str, str]


def words_of(description: str, rules: Rules | None = None) -> set[str]:
    """The phases a series description names."""
    text = " ".join(re.findall(r"[^\W\d_]+", description.casefold()))
    found: dict[str, set[str]] = {}
    for name, words in _WORDS.items():
        for word in (*words, *(rules.words.get(name, ()) if rules else ())):
            folded = word.casefold()
            hit = folded in text if _ideographic(folded) else re.search(rf"\b{re.escape(folded)}\b", text)
            if hit:
                found.setdefault(name, set()).add(folded)
    # "late arterial": the word beside a vessel says which of its passes; a hepatobiliary phase is always a late one.
    if HEPATOBILIARY in found or (len(found) > 1 and found.get(DELAYED, set()) <= _LATE):
        found.pop(DELAYED, None)
    return set(found)


def _ideographic(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def name(parts: Sequence[Part], rules: Rules) -> Named | Refusal:
    """Names and times of the phases, which are in order already."""
    written: list[tuple[str, str]] = []
    for index, part in enumerate(parts, start=1):
        of_part = _written(part, index, rules)
        if isinstance(of_part, Refusal):
            return of_part
        written.append(of_part)
    first = parts[0].clock
    clocks = [math.nan if p.clock is None or first is None else p.clock for p in parts]
    zero, note = _zero(parts, clocks, written, rules)
    after = [c - zero for c in clocks] if zero is not None else [math.nan] * len(parts)
    names = [said for said, _ in written]
    named_by = [how for _, how in written]
    windows = _windows(parts, rules)
    refusal = _conflict(names, after, windows)
    if refusal is not None:
        return refusal
    for index, seconds in enumerate(after):
        if not names[index] and (by_time := _window(seconds, windows)):
            names[index], named_by[index] = by_time, "time"
    names, note["several phases of one name"] = _one_of_each(names, named_by)
    refusal = _out_of_order(names)
    if refusal is not None:
        return refusal
    shown = after if zero is not None else [c - (first or 0.0) for c in clocks]
    return Named(
        tuple(n or f"phase {i}" for i, n in enumerate(names, start=1)),
        tuple(by if n else "" for n, by in zip(names, named_by, strict=True)),
        tuple(round(s, 3) for s in shown),
        {k: v for k, v in note.items() if v},
    )


def _written(part: Part, index: int, rules: Rules) -> tuple[str, str] | Refusal:
    """The name that the headers give, and by what. A description of a series with several phases names none."""
    described = words_of(part.frames[0].instance.header.text("SeriesDescription"), rules) if part.of == 1 else set()
    coded = {_ATTRIBUTE.get(f.label, "") or (PRE if f.administered == "NO" else "") for f in part.frames} - {""}
    if len(described) > 1 or len(coded) > 1 or (described and coded and described != coded):
        said = ", ".join(n for n in ORDER if n in described | coded)
        return Refusal(RefusalCode.PHASE_LABEL_CONFLICT, f"phase {index} is called {said}")
    if described:
        return described.pop(), "description"
    return (coded.pop(), "attribute") if coded else ("", "")


# --- seconds after the injection -------------------------------------------------------------------------------------


def _zero(
    parts: Sequence[Part], clocks: Sequence[float], written: Sequence[tuple[str, str]], rules: Rules
) -> tuple[float | None, dict[str, str]]:
    """When the injection was, on the scale of the clocks, and how that is known."""
    if any(map(math.isnan, clocks)):
        return None, {"zero time": "not known: the phases have no times"}
    start = _bolus_start(parts, clocks) if all(p.absolute for p in parts) else None
    if start is not None:
        return start, {"zero time": "ContrastBolusStartTime"}
    said = [n for n, _ in written]
    after_pre = said.index(PRE) + 1 if PRE in said else 0
    while after_pre and after_pre < len(said) and said[after_pre] == PRE:
        after_pre += 1
    # A first phase that nobody calls arterial may as well be a late one: the delay would be a guess.
    if after_pre and after_pre < len(parts) and said[after_pre] == ARTERIAL:
        delay = rules.arm_to_liver_seconds
        return clocks[after_pre] - delay, {"zero time": f"{delay:g} s before the first arterial phase"}
    return None, {"zero time": "first phase"}


def _bolus_start(parts: Sequence[Part], clocks: Sequence[float]) -> float | None:
    """Contrast/Bolus Start Time (0018,1042), a time of day: taken on the day that puts it between first and last phase.

    One time, said by all who say any; it must lie after the first phase began or shortly before it.
    """
    said = {t for p in parts for f in (p.frames[0], p.frames[-1]) for t in _bolus_times(f)}
    if len(said) != 1:
        return None
    of_day = moment("", said.pop())
    if of_day is None:
        return None
    midnight = math.floor(clocks[0] / _DAY) * _DAY
    for day in (midnight, midnight + _DAY, midnight - _DAY):
        if clocks[0] - 120.0 <= day + of_day < clocks[-1]:
            return day + of_day
    return None


def _bolus_times(frame: Frame) -> set[str]:
    header = frame.instance.header
    agents = header.items_of("ContrastBolusAgentSequence")
    profiles = [p for a in agents for p in a.items_of("ContrastBolusAdministrationProfileSequence")]
    return {h.text("ContrastBolusStartTime") for h in (header, *profiles)} - {""}


def _windows(parts: Sequence[Part], rules: Rules) -> Mapping[str, tuple[float, float]]:
    """Without gadoxetate there is no hepatobiliary phase, however late the images are."""
    agent = any(_GADOXETATE.search(t) for p in parts for t in _agents(p.frames[0].instance.header))
    return {n: w for n, w in rules.windows.items() if agent or n != HEPATOBILIARY}


def _agents(header: Header) -> tuple[str, ...]:
    coded = header.items_of("ContrastBolusAgentSequence")
    return (header.text("ContrastBolusAgent"), *(i.text("CodeMeaning") for i in coded))


def _window(seconds: float, windows: Mapping[str, tuple[float, float]]) -> str:
    for label, (low, high) in windows.items():
        if low <= seconds <= high and not (label == PRE and seconds >= 0.0):
            return label
    return ""


# --- contradictions --------------------------------------------------------------------------------------------------


def _conflict(
    names: Sequence[str], after: Sequence[float], windows: Mapping[str, tuple[float, float]]
) -> Refusal | None:
    """A written name that is off its window by more than the window is wide, or stands in another's."""
    for index, (label, seconds) in enumerate(zip(names, after, strict=True), start=1):
        if label not in windows or math.isnan(seconds):
            continue
        low, high = windows[label]
        width = high - low if label != PRE else 0.0
        off = max(low - seconds, seconds - high, 0.0)
        elsewhere = off > 0 and _window(seconds, windows) not in ("", label)
        if off > width or elsewhere:
            return Refusal(RefusalCode.PHASE_LABEL_CONFLICT, f"phase {index}, {label}, at {seconds:.0f} s")
    return None


def _one_of_each(names: Sequence[str], named_by: Sequence[str]) -> tuple[list[str], str]:
    """The latest of several phases in one window bears its name: the late arterial one, the last before contrast.

    One that is called so beats those that only fall into the window.
    """
    kept, several = list(names), set()
    for label in ORDER:
        at = [i for i, n in enumerate(names) if n == label]
        called = [i for i in at if named_by[i] != "time"] or at
        for i in at:
            if i != called[-1]:
                kept[i] = ""
                several.add(label)
    return kept, ", ".join(f"{label}: the latest" for label in ORDER if label in several)


def _out_of_order(names: Sequence[str]) -> Refusal | None:
    found = [n for n in names if n]
    if found == sorted(found, key=ORDER.index):
        return None
    return Refusal(RefusalCode.PHASE_LABEL_CONFLICT, f"in time the phases are {', '.join(found)}")

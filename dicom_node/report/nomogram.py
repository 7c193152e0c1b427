"""The nomogram of one finding with this patient's points: the same numbers as in the SR, as a reader can check by eye.

Each axis is as long as its term can move the score over the range it was fitted on; the longest is 100 points. A value
beyond that range is marked at the end of the axis and said to lie beyond. Nothing on it names the patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from dicom_node.report import objects, picture, rle
from dicom_node.report.capture import (
    SOP_CLASS,
    Frames,
    Reported,
    add_equipment,
    add_pixels,
    add_side,
    source_images,
)
from dicom_node.report.context import ReportContext, Variant
from dicom_node.report.uids import Uids
from dicom_node.report.wording import mark_of, series_description
from dicom_node.result import Finding, Fusion, FusionTerm, Result

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 900, 250, 60, 62, 84
_TICK = 5
_ABBREVIATION: Final = 5
"""Letters of FSH, EDV, B_HCG; a longer name is words."""
SERIES_OFFSET: Final = 50
"""Clear of the heatmaps of a report: a patient has not so many lesions."""
_PROBABILITIES: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MARK = (252, 166, 54)
_NOT_AN_IMAGE: Final = "A figure, not an image of the patient."
_STEPS: Final = (1, 2, 2.5, 5)


@dataclass(frozen=True, slots=True)
class Points:
    """One term on the scale of points."""

    term: FusionTerm
    longest: float
    """The largest movement of any term, in units of the linear predictor: 100 points."""

    def of(self, value: float) -> float:
        """Points of a value; 0 at the end of the axis that speaks least for the outcome."""
        ends = [_contribution(self.term, v) for v in (self.term.low, self.term.high)]
        return 100 * (_contribution(self.term, value) - min(ends)) / self.longest


def points_of(fusion: Fusion) -> list[Points]:
    """All terms on a common scale."""
    spans = [abs(_contribution(t, t.high) - _contribution(t, t.low)) for t in fusion.terms]
    return [Points(t, max(*spans, 1e-9)) for t in fusion.terms]


def linear_of(fusion: Fusion, total: float) -> float:
    """The linear predictor that belongs to a total of points."""
    points = points_of(fusion)
    floor = sum(min(_contribution(p.term, p.term.low), _contribution(p.term, p.term.high)) for p in points)
    return fusion.intercept + floor + total * points[0].longest / 100


def total_of(fusion: Fusion, linear: float) -> float:
    """The inverse of `linear_of`."""
    return (linear - linear_of(fusion, 0)) / (linear_of(fusion, 1) - linear_of(fusion, 0))


def draw(result: Result, finding: Finding, fusion: Fusion) -> NDArray[np.uint8]:
    """RGB (height, width, 3)."""
    caption = picture.caption_of(result, finding)
    points = points_of(fusion)
    totals = max(sum(max(p.of(p.term.low), p.of(p.term.high)) for p in points), 1e-6)
    height = _TOP + _ROW * (len(points) + 3) + 96
    image = Image.new("RGB", (_WIDTH, height + height % 2), picture.PAPER)
    if caption.across:  # under the axes: they stay readable
        rows, marked = _ROW * (len(points) + 3), np.array(image)
        picture.mark_of_area((_WIDTH, rows), caption.across, faint=True).over(marked[_TOP : _TOP + rows])
        image = Image.fromarray(marked)
    pen = ImageDraw.Draw(image)
    pen.text((20, 16), caption.title, picture.INK, picture.font(19), anchor="lt")
    pen.text((20, 44), f"Nomogram: {finding.scores[0].outcome.meaning}", picture.DIM, picture.font(14), anchor="lt")
    y = _TOP + 20
    _axis(pen, y, "Points", [(float(p), f"{p:d}") for p in range(0, 101, 10)], lambda v: v / 100)
    for p in points:
        y += _ROW
        _term(pen, y, p)
    y += _ROW
    total = total_of(fusion, fusion.linear_predictor)
    step = _step(0, totals)
    _axis(
        pen, y, "Total points", [(float(v), f"{v:g}") for v in np.arange(0, totals + 1e-6, step)], lambda v: v / totals
    )
    _mark(pen, y, total / totals, f"{total:.0f} points")
    y += _ROW
    shown = [(p, total_of(fusion, math.log(p / (1 - p)))) for p in _PROBABILITIES]
    ticks = [(at, f"{p:g}") for p, at in shown if 0 <= at <= totals]
    _axis(pen, y, "Probability", ticks, lambda v: v / totals)
    low, high = (total_of(fusion, math.log(p / (1 - p))) / totals for p in _inside(fusion.low, fusion.high))
    pen.line((_x(low), y - 9, _x(high), y - 9), _MARK, 3)
    _mark(pen, y, total / totals, f"{fusion.probability:.2f} ({fusion.low:.2f} to {fusion.high:.2f})")
    _footer(pen, y + 40, caption)
    return np.asarray(image)


def build(
    subject: Reported, figure: NDArray[np.uint8], context: ReportContext, uids: Uids, variant: Variant
) -> Dataset:
    """The figure as one more capture of the finding, in a series of its own."""
    name, provenance = variant.name("capture"), subject.result.provenance
    frames = Frames((0,), (0,), (figure,), (rle.encode(figure),))
    packed = frames.smaller_packed
    identity = objects.Identity(
        sop_class_uid=SOP_CLASS[variant.capture],
        sop_instance_uid=uids.instance("nomogram", name, subject.index, 1),
        series_instance_uid=uids.series("nomogram", name, subject.index),
        modality=str(subject.source.get("Modality") or "OT"),
        series_number=context.config.series_number + SERIES_OFFSET + subject.index,
        instance_number=1,
        series_description=series_description(f"Nomogram, {subject.result.title}", provenance.intended_use),
    )
    software = f"{provenance.task} {provenance.package_version}"[:64]
    syntax = str(RLELossless if packed else ExplicitVRLittleEndian)
    made = objects.new_object(identity, subject.source, context, uids, syntax, software)
    add_side(made, subject)
    add_equipment(made, subject, context)
    made.ImageType = ["DERIVED", "SECONDARY", "OTHER", "NOMOGRAM"]
    made.PatientOrientation = None
    made.BurnedInAnnotation = "NO"  # clinical values stand on it, nothing that identifies the patient
    made.DerivationDescription = (
        f"Nomogram of {provenance.algorithm_name} {provenance.package_version} with the values of this examination; "
        "the same numbers are in the structured report."
    )
    made.ImageComments = mark_of(provenance.intended_use) or _NOT_AN_IMAGE
    made.SourceImageSequence = list(source_images(subject.finding.sources))
    made.LossyImageCompression = "00"
    add_pixels(made, frames, packed)
    if variant.capture == "multiframe":
        made.NumberOfFrames = 1
    return made


def _inside(*values: float) -> list[float]:
    return [min(max(v, 1e-6), 1 - 1e-6) for v in values]


def _contribution(term: FusionTerm, value: float) -> float:
    moved = math.log(value) if term.transform == "log" else value
    return term.beta * (moved - term.centre) / term.scale


def _term(pen: ImageDraw.ImageDraw, y: int, p: Points) -> None:
    """The axis of one term, in its own unit, over the points scale above."""
    t = p.term
    words = t.name.replace("_", " ") if len(t.name) <= _ABBREVIATION else t.name.replace("_", " ").capitalize()
    name = "Image score (log-odds)" if t.name == "logit" else f"{words} ({t.unit})"
    ends = sorted(p.of(v) / 100 for v in (t.low, t.high))
    pen.line((_x(ends[0]), y, _x(ends[1]), y), picture.DIM, 2)
    pen.text((20, y), name, picture.INK, picture.font(15), anchor="lm")
    last = -1e9
    for value in _ticks(t):
        x = _x(p.of(value) / 100)
        pen.line((x, y, x, y + _TICK), picture.DIM, 1)
        if abs(x - last) > 30:
            pen.text((x, y + _TICK + 3), f"{value:g}", picture.DIM, picture.font(12), anchor="mt")
            last = x
    points = p.of(t.value)
    _mark(pen, y, points / 100, f"{t.value:.3g}  ({points:.0f} points)", ends[0], ends[1])


def _ticks(term: FusionTerm) -> list[float]:
    if term.transform == "log":
        decades = range(math.floor(math.log10(term.low)), math.ceil(math.log10(term.high)) + 1)
        values = [float(f"{m * 10.0**d:.6g}") for d in decades for m in (1, 2, 5)]
    else:
        step = _step(term.low, term.high)
        values = [float(f"{k * step:.6g}") for k in range(math.ceil(term.low / step), math.floor(term.high / step) + 1)]
    return [v for v in values if term.low <= v <= term.high]


def _step(low: float, high: float) -> float:
    """A round step that gives at most ten."""
    raw = max(high - low, 1e-9) / 10
    base = 10.0 ** math.floor(math.log10(raw))
    return next((s * base for s in _STEPS if s * base >= raw), 10 * base)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _axis(
    pen: ImageDraw.ImageDraw, y: int, name: str, ticks: list[tuple[float, str]], share: Callable[[float], float]
) -> None:
    pen.text((20, y), name, picture.INK, picture.font(15), anchor="lm")
    pen.line((_x(0), y, _x(1), y), picture.DIM, 2)
    last = -1e9
    for at, text in ticks:
        x = _x(share(at))
        pen.line((x, y, x, y + _TICK), picture.DIM, 1)
        if x - last > 28:
            pen.text((x, y + _TICK + 3), text, picture.DIM, picture.font(12), anchor="mt")
            last = x


def _mark(pen: ImageDraw.ImageDraw, y: int, share: float, text: str, low: float = 0.0, high: float = 1.0) -> None:
    """This patient: a triangle on the axis; at its end, and said so, where the value lies beyond."""
    at = min(max(share, low), high)
    x = _x(at)
    pen.polygon([(x, y - 2), (x - 6, y - 13), (x + 6, y - 13)], fill=_MARK)
    words = text if low - 1e-6 <= share <= high + 1e-6 else f"{text}, beyond the axis"
    half = picture.font(13).getlength(words) / 2
    pen.text((min(max(x, _LEFT + half), _WIDTH - 8 - half), y - 16), words, _MARK, picture.font(13), anchor="ms")


def _footer(pen: ImageDraw.ImageDraw, y: int, caption: picture.Caption) -> None:
    lines = (
        f"Model: {caption.model}.",
        f"Orange: this patient; bar: 95 % interval of the probability (delta method). {_NOT_AN_IMAGE}",
        caption.mark,
    )
    for line in filter(None, lines):
        colour = picture.WARNING if line == caption.mark else picture.DIM
        pen.text((20, y), line, colour, picture.font(14), anchor="lt")
        y += 22

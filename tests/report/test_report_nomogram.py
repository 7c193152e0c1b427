"""The nomogram: points that add up to the probability, axes that end where the data ended, a capture that validates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_node.report import Variant, nomogram
from dicom_node.result import Fusion, FusionTerm

TERMS = (
    FusionTerm("logit", "", 1.4, "none", 0.1, 2.0, 1.5, -5, 5),
    FusionTerm("FSH", "[IU]/L", 18.0, "log", 2.2, 0.6, 0.9, 1.5, 60),
    FusionTerm("TESTICULAR_VOLUME", "mL", 9.0, "none", 13, 4, -0.8, 3, 25),
    FusionTerm("EDV", "cm/s", 3.0, "none", 4, 1.5, -0.5, 1, 9),
)


def fusion(terms: tuple[FusionTerm, ...] = TERMS, intercept: float = -0.3) -> Fusion:
    linear = intercept + sum(
        t.beta * ((math.log(t.value) if t.transform == "log" else t.value) - t.centre) / t.scale for t in terms
    )
    low, p, high = (1 / (1 + math.exp(-x)) for x in (linear - 0.8, linear, linear + 0.8))
    return Fusion(terms, intercept, linear, p, low, high)


def test_points_of_the_values_add_up_to_the_probability() -> None:
    f = fusion()
    total = sum(p.of(p.term.value) for p in nomogram.points_of(f))
    assert nomogram.linear_of(f, total) == pytest.approx(f.linear_predictor)
    assert nomogram.total_of(f, f.linear_predictor) == pytest.approx(total)


def test_the_strongest_term_spans_a_hundred_points_and_every_axis_begins_at_none() -> None:
    spans = [sorted((p.of(p.term.low), p.of(p.term.high))) for p in nomogram.points_of(fusion())]
    assert max(high for _, high in spans) == pytest.approx(100)
    assert [low for low, _ in spans] == pytest.approx([0] * 4)


def test_a_capture_of_its_own_that_validators_accept(case: Any, dciodvfy: Callable[[Path], list[str]]) -> None:
    case.fusion = fusion()
    for kind in ("multiframe", "keyframes"):
        built = case.build(variants=(Variant(objects=("capture",), capture=kind),))
        figure = case.read(built[0])
        assert figure.ImageType[3] == "NOMOGRAM"
        assert figure.SeriesInstanceUID not in {b.series_instance_uid for b in built[1:]}
        assert {case.read(b).ImageType[3] for b in built[1:]} == {"HEATMAP"}
        assert figure.pixel_array.shape[-1] == 3
        assert dciodvfy(case.save(built[0])) == []


def test_no_figure_without_fusion(case: Any) -> None:
    built = case.build(variants=(Variant(objects=("capture",)),))
    assert [case.read(b).ImageType[3] for b in built] == ["HEATMAP"]


def test_a_value_beyond_the_axis_is_drawn_at_its_end(case: Any) -> None:
    """A log-odds of 40 must not be painted outside the figure, nor move another mark."""
    far = (FusionTerm("logit", "", 40.0, "none", 0.1, 2.0, 1.5, -5, 5), *TERMS[1:])
    at_end = (FusionTerm("logit", "", 5.0, "none", 0.1, 2.0, 1.5, -5, 5), *TERMS[1:])
    pictures = [nomogram.draw(case.result(), case.finding(None), fusion(t)) for t in (far, at_end)]
    assert pictures[0].shape == pictures[1].shape
    row = slice(0, 84 + 20 + 2 * 62 + 20)  # down to the second term: only the words of the first differ
    changed = np.nonzero((pictures[0][row] != pictures[1][row]).any(axis=2))
    assert changed[0].size
    assert changed[1].min() > 560  # the words "beyond the axis" end at the right border


def test_notes_stand_in_the_report(case: Any) -> None:
    case.notes = ("fusion not computed: FSH missing",)
    texts = {str(e.value) for e in case.sr().iterall() if e.keyword == "TextValue"}
    assert "fusion not computed: FSH missing" in texts


def test_the_demonstration_mark_lies_across_the_figure(case: Any) -> None:
    case.intended_use = "demonstration"
    marked = nomogram.draw(case.result(), case.finding(None), fusion())
    case.intended_use = "research"
    plain = nomogram.draw(case.result(), case.finding(None), fusion())
    rows, columns = np.nonzero((marked[84:480] != plain[84:480]).any(axis=2))
    assert np.ptp(columns) > 700
    assert np.ptp(rows) > 300
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # from the lower left to the upper right


def test_every_term_may_be_without_influence(case: Any) -> None:
    """Coefficients of zero are a legal model; nothing is divided by their span."""
    flat = tuple(FusionTerm(t.name, t.unit, t.value, "none", 0.0, 1.0, 0.0, t.low, t.high) for t in TERMS)
    assert nomogram.draw(case.result(), case.finding(None), fusion(flat)).shape[2] == 3

"""The side: explicit attributes, codes and words; conflicts and silence are never a side."""

from __future__ import annotations

import pytest

from dicom_node.pixels.laterality import laterality, side_of_text
from dicom_node.study import Header


def modifier(value: str, scheme: str = "SCT") -> dict[str, object]:
    code = {"CodeValue": value, "CodingSchemeDesignator": scheme}
    return {"AnatomicRegionSequence": [{"AnatomicRegionModifierSequence": [code]}]}


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ({"ImageLaterality": "R"}, "R"),
        ({"ImageLaterality": "l"}, "L"),
        ({"ImageLaterality": "B"}, "B"),
        ({"ImageLaterality": "U"}, ""),
        ({"ImageLaterality": "X"}, ""),
        ({"Laterality": "L"}, "L"),
        ({"SharedFunctionalGroupsSequence": [{"FrameAnatomySequence": [{"FrameLaterality": "R"}]}]}, "R"),
        (modifier("24028007"), "R"),
        (modifier("7771000"), "L"),
        (modifier("51440002"), "B"),
        (modifier("G-A101", "SRT"), "L"),
        (modifier("24028007", "99SITE"), ""),
        ({"SeriesDescription": "CEUS LEFT KIDNEY"}, "L"),
        ({"StudyDescription": "US Hoden bds."}, "B"),
        ({}, ""),
        # the same side said twice
        ({"ImageLaterality": "R", "SeriesDescription": "right kidney", "Laterality": "R"}, "R"),
        # a bilateral examination holds images of one side
        ({"ImageLaterality": "R", "StudyDescription": "US kidneys both"}, "R"),
    ],
)
def test_side(values: dict[str, object], side: str) -> None:
    assert laterality(Header.from_json(values))[0] == side


@pytest.mark.parametrize(
    "values",
    [
        {"ImageLaterality": "R", "Laterality": "L"},
        {"ImageLaterality": "R", "SeriesDescription": "left kidney"},
        {"Laterality": "L", "StudyDescription": "right scrotum"},
        {"ImageLaterality": "L"} | modifier("24028007"),
        {"ImageLaterality": "U", "SeriesDescription": "left"},
        {"SeriesDescription": "right", "ProtocolName": "left"},
    ],
)
def test_a_conflict_is_no_side_and_the_note_names_attributes_but_no_text(values: dict[str, object]) -> None:
    side, note = laterality(Header.from_json(values))
    assert side == ""
    assert note.startswith("conflict: ")
    for word in ("kidney", "scrotum", "left", "right"):
        assert word not in note


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("L TESTIS", "L"), ("TESTIS RT", "R"), ("Niere re.", "R"), ("Niere li", "L"), ("Hoden links", "L"),
        ("linke Niere", "L"), ("REIN GAUCHE", "L"), ("rein droit", "R"), ("riñón izquierdo", "L"), ("rene dx", "R"),
        ("RENE SIN.", "L"), ("左肾造影", "L"), ("右肾", "R"), ("双侧阴囊", "B"), ("両側", "B"), ("правая почка", "R"),
        ("левая почка", "L"), ("left and right kidney", "B"), ("R/L kidney", "B"), ("KIDNEY_LEFT_CEUS", "L"),
        ("Ｌ　kidney", "L"),
        # words that only look like a side
        ("PEDIATRIC/MURMUR, R/O VSD", ""), ("abdomen sin contraste", ""), ("adrenal", ""), ("BRIGHT", ""),
        ("right upper quadrant", ""), ("re-evaluation", ""), ("L3 level", ""), ("recto", ""), ("", ""),
    ],
)  # fmt: skip
def test_words_for_sides_in_several_languages(text: str, side: str) -> None:
    assert side_of_text(text) == side

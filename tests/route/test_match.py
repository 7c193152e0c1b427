"""Single conditions: what YES, NO and MISSING mean for each kind of value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dicom_node.config import Exists, Matcher, Range, Regex
from dicom_node.route.match import compare, to_number

Build = Callable[..., Any]


@pytest.mark.parametrize(
    ("expected", "values", "answer"),
    [
        ("us", ("US",), "YES"),
        ("US", ("MR",), "NO"),
        ("US", (), "MISSING"),
        ("US", ("MR", "US"), "YES"),  # any value of a multi-valued attribute
        (["CT", "MR"], ("MR",), "YES"),
        (["CT", "MR"], ("US",), "NO"),
        (3, ("3.0",), "YES"),
        (3, (3.0,), "YES"),
        (1.5, (1.5,), "YES"),
        ("1.50", (1.5,), "YES"),
        (3, ("three",), "NO"),
        (True, ("YES",), "YES"),  # YAML reads an unquoted YES as true
        (False, ("NO",), "YES"),
        (True, ("NO",), "NO"),
        (Regex(regex="mass"), ("Renal MASS",), "YES"),
        (Regex(regex="mass"), ("cyst",), "NO"),
        (Regex(regex="mass"), (), "MISSING"),
        (Range(range=(1.4, 3.1)), (3.0,), "YES"),
        (Range(range=(1.4, 3.1)), ("1.5",), "YES"),
        (Range(range=(1.4, 3.1)), (7,), "NO"),
        (Range(range=(1.4, 3.1)), ("abc",), "NO"),
        (Range(range=(18, 120)), ("065Y",), "YES"),
        (Range(range=(18, 120)), ("011M",), "NO"),
        (Range(range=(0, 10)), ("nan",), "NO"),
        (Exists(exists=True), ("x",), "YES"),
        (Exists(exists=True), (), "MISSING"),
        (Exists(exists=False), (), "YES"),
        (Exists(exists=False), ("x",), "NO"),
    ],
)
def test_compare(expected: Matcher, values: tuple[Any, ...], answer: str) -> None:
    assert compare(expected, values) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("065Y", 65.0),
        ("006M", 0.5),
        ("1e3", 1000.0),
        (" 7 ", 7.0),
        ("1_000", None),
        ("٣", None),
        ("", None),
        ("inf", None),
    ],
)
def test_to_number(text: str, number: float | None) -> None:
    assert to_number(text) == number


@pytest.mark.parametrize(
    ("when", "attributes", "matched"),
    [
        ({"Manufacturer": "philips medical systems"}, {"Manufacturer": "Philips Medical Systems"}, True),
        ({"NumberOfFrames": {"range": [16, 2000]}}, {"NumberOfFrames": 65}, True),
        ({"NumberOfFrames": {"range": [16, 2000]}}, {}, False),
        ({"ImageType": "THYROID"}, {"ImageType": ["ORIGINAL", "PRIMARY", "THYROID"]}, True),
        (
            {"RequestedProcedureDescription": {"regex": "kidney"}},
            {"RequestAttributesSequence": [{"RequestedProcedureDescription": "US kidney"}]},
            True,
        ),
        (
            {"StudyDescription": {"regex": "kidney"}},
            {"StudyDescription": "liver", "ReferencedStudySequence": [{"StudyDescription": "kidney"}]},
            False,  # nested only where it is absent at the top
        ),
        (
            {"ProcedureCodeSequence": "TOU0065|99RIS"},
            {"ProcedureCodeSequence": [{"CodeValue": "TOU0065", "CodingSchemeDesignator": "99RIS"}]},
            True,
        ),
        ({"ProcedureCodeSequence": {"exists": True}}, {"ProcedureCodeSequence": [{"CodeMeaning": "US"}]}, True),
        ({"StudyDescription": {"exists": False}}, {}, True),
        ({"calling_ae": "MOD"}, {}, True),
        ({"called_ae": ["THY_AI", "node"]}, {}, True),
        ({"called_ae": "OTHER"}, {}, False),
    ],
)
def test_keywords_ae_titles_and_nested_attributes(
    make_study: Build, make_route: Build, when: dict[str, Any], attributes: dict[str, Any], matched: bool
) -> None:
    from dicom_node.route import evaluate

    assert evaluate(make_route(when), make_study(attributes), {}).matched is matched


@pytest.mark.parametrize(
    ("attributes", "given"),
    [
        ({"ContrastBolusAgent": "SonoVue"}, True),
        ({"ContrastBolusAgent": "NONE"}, False),
        ({"ContrastBolusAgentSequence": [{"CodeValue": "125906", "CodingSchemeDesignator": "DCM"}]}, True),
        ({"StudyDescription": "CEUS renal"}, True),
        ({"StudyDescription": "双肾超声造影"}, True),
        ({"SeriesDescription": "Niere KONTRASTMITTEL"}, True),
        ({"ProcessingFunction": "ABD_CONTRAST"}, True),
        ({"StudyDescription": "MRT Leber nativ und KM"}, True),
        ({"StudyDescription": "MRI LIVER W/WO CONTRAST"}, True),
        ({"StudyDescription": "MRI liver with and without contrast"}, True),
        ({"StudyDescription": "MRI liver w/o contrast"}, False),
        ({"StudyDescription": "MRT Leber ohne Kontrastmittel"}, False),
        ({"StudyDescription": "肝脏平扫"}, False),
        ({"StudyDescription": "肝脏平扫+增强"}, True),
        ({"StudyDescription": "MRI liver with contrast", "SeriesDescription": "t1 vibe pre contrast"}, False),
        ({"SeriesDescription": "phase contrast flow"}, None),
        ({"StudyDescription": "US kidney"}, None),
        ({}, None),
    ],
)
def test_contrast(make_study: Build, make_route: Build, attributes: dict[str, Any], given: bool | None) -> None:
    """`contrast: false` also holds where nothing says: headers seldom say that none was given."""
    from dicom_node.route import evaluate

    study = make_study(attributes)
    (yes,) = [c for c in evaluate(make_route({"contrast": True}), study, {}).evidence if c.key == "contrast"]
    (no,) = [c for c in evaluate(make_route({"contrast": False}), study, {}).evidence if c.key == "contrast"]
    assert yes.verdict == {True: "YES", False: "NO", None: "MISSING"}[given]
    assert no.verdict == {True: "NO", False: "YES", None: "YES"}[given]

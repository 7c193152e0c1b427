"""Regions of interest, clinical values and coded findings as what establishes an indication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dicom_node.result import ClinicalInput, Code
from dicom_node.route import evaluate

Build = Callable[..., Any]
US = {"Modality": "US"}
SR = "1.2.840.10008.5.1.4.1.1.88.34"


def answer(route: Any, study: Any, clinical: Any = None) -> str:
    (check,) = [c for c in evaluate(route, study, clinical or {}).evidence if c.where == "indication"]
    return str(check.verdict)


def report(*items: dict[str, Any], sop_class: str = SR) -> dict[str, Any]:
    return {"SOPClassUID": sop_class, "Modality": "SR", "ContentSequence": list(items)}


def finding(value: str, scheme: str, meaning: str, *children: dict[str, Any], how: str = "CONTAINS") -> dict[str, Any]:
    concept = [{"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning}]
    item = {"ValueType": "CODE", "RelationshipType": how, "ConceptCodeSequence": concept}
    return item | ({"ContentSequence": list(children)} if children else {})


GROUP = {"ValueType": "CONTAINER", "RelationshipType": "CONTAINS"}
REGION = {
    "ValueType": "SCOORD", "RelationshipType": "INFERRED FROM", "GraphicType": "POLYLINE",
    "GraphicData": [1.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0, 1.0],
}  # fmt: skip
LINE = REGION | {"GraphicData": [1.0, 1.0, 9.0, 1.0]}
CONTOUR = {"ContourGeometricType": "CLOSED_PLANAR", "ContourData": [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 9.0, 9.0, 0.0]}
STRUCTURES = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3", "Modality": "RTSTRUCT",
    "StructureSetROISequence": [{"ROINumber": 1, "ROIName": "lesion"}],
    "ROIContourSequence": [{"ReferencedROINumber": 1, "ContourSequence": [CONTOUR]}],
}  # fmt: skip


def presentation_state(shape: str, *points: float) -> dict[str, Any]:
    graphic = {"GraphicType": shape, "GraphicAnnotationUnits": "PIXEL", "GraphicData": list(points)}
    return {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1",
        "Modality": "PR",
        "GraphicAnnotationSequence": [{"GraphicObjectSequence": [graphic]}],
        "ReferencedSeriesSequence": [{"ReferencedImageSequence": [{"ReferencedSOPInstanceUID": "1.2"}]}],
    }


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ([], False),
        ([{"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "SegmentSequence": [{"SegmentNumber": 1}]}], True),
        ([STRUCTURES], True),
        (
            [
                STRUCTURES
                | {"RTROIObservationsSequence": [{"ReferencedROINumber": 1, "RTROIInterpretedType": "EXTERNAL"}]}
            ],
            False,
        ),
        ([report({**GROUP, "ContentSequence": [{**GROUP, "ContentSequence": [REGION]}]})], True),
        ([report({**GROUP, "ContentSequence": [LINE]})], False),  # a caliper encloses nothing
        ([report({**GROUP, "ContentSequence": [finding("27925004", "SCT", "Nodule")]})], False),
        ([report(REGION, sop_class="1.2.840.10008.5.1.4.1.1.88.59")], False),  # a Key Object Selection
        ([presentation_state("CIRCLE", 5.0, 5.0, 5.0, 9.0)], True),
        ([presentation_state("POLYLINE", 5.0, 5.0, 5.0, 9.0)], False),  # an arrow
        ([{"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1", "Modality": "PR"}], False),  # window and level only
    ],
)
def test_roi(make_study: Build, make_route: Build, objects: list[dict[str, Any]], found: bool) -> None:
    study = make_study(US, *objects)
    assert answer(make_route(US, any=[{"roi": True}]), study) == ("YES" if found else "MISSING")
    assert answer(make_route(US, any=[{"roi": False}]), study) == ("NO" if found else "YES")


def test_a_deeply_nested_report_is_read(make_study: Build, make_route: Build) -> None:
    item = dict(REGION)
    for _ in range(150):
        item = {**GROUP, "ContentSequence": [item]}
    assert answer(make_route(US, any=[{"roi": True}]), make_study(US, report(item))) == "YES"


def test_a_list_of_clinical_names_asks_for_all_of_them(make_study: Build, make_route: Build) -> None:
    code = Code("15067-2", "LN", "FSH")
    known = {name: ClinicalInput(name, code, 4.0, "IU/L", "", "FHIR") for name in ("fsh", "volume")}
    study = make_study(US)
    assert answer(make_route(US, any=[{"clinical": "FSH"}]), study, known) == "YES"
    assert answer(make_route(US, any=[{"clinical": ["fsh", "volume"]}]), study, known) == "YES"
    assert answer(make_route(US, any=[{"clinical": ["fsh", "edv"]}]), study, known) == "MISSING"
    assert answer(make_route(US, any=[{"clinical": "fsh"}]), study) == "MISSING"


@pytest.mark.parametrize(
    ("matcher", "items", "expected"),
    [
        ("702391001|SCT", [finding("702391001", "SCT", "Renal cell carcinoma")], "YES"),
        ("702391001|SCT", [finding("702391001", "99X", "Renal cell carcinoma")], "NO"),
        ("702391001|SCT", [], "MISSING"),
        ({"regex": "nodule"}, [{**GROUP, "ContentSequence": [finding("237495005", "SCT", "Thyroid Nodule")]}], "YES"),
        ("Thyroid nodule", [finding("237495005", "SCT", "Thyroid Nodule")], "YES"),
        (["1|A", "27925004|SCT"], [finding("27925004", "SCT", "Nodule")], "YES"),
        # what modifies or describes another item states nothing
        ({"regex": "nodule"}, [finding("27925004", "SCT", "Nodule", how="HAS CONCEPT MOD")], "MISSING"),
        # looked for and not seen
        (
            "27925004|SCT",
            [finding("27925004", "SCT", "Nodule", finding("272519000", "SCT", "Absent", how="HAS PROPERTIES"))],
            "NO",
        ),
        ("27925004|SCT", [{"ValueType": "TEXT", "TextValue": "27925004|SCT"}], "MISSING"),
    ],
)
def test_sr_finding(
    make_study: Build, make_route: Build, matcher: Any, items: list[dict[str, Any]], expected: str
) -> None:
    route = make_route(US, any=[{"sr_finding": matcher}])
    assert answer(route, make_study(US, report(*items))) == expected


def test_the_same_keys_as_in_when_hold_on_any_series(make_study: Build, make_route: Build) -> None:
    study = make_study({**US, "StudyDescription": "US kidney"}, {"Modality": "MR", "SeriesDescription": "Leber mit KM"})
    for matcher in ({"body_part": "KIDNEY"}, {"contrast": True}, {"modality": "MR"}, {"calling_ae": "MOD"}):
        assert answer(make_route(US, any=[matcher]), study) == "YES"
    assert answer(make_route(US, any=[{"body_part": "THYROID"}]), study) == "NO"
    assert answer(make_route(US, any=[{"ReasonForStudy": {"regex": "mass"}}]), study) == "MISSING"

"""The evidence table: languages, codes, contradictions, and real headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.route import body_part, terms
from dicom_node.store.header import read_header
from dicom_node.study import Header, Instance, Series

Build = Callable[..., Any]


def code(value: str, scheme: str, meaning: str = "") -> list[dict[str, str]]:
    return [{"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning}]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        # English
        ("US THYROID W DOPPLER", "THYROID"),
        ("US KIDNEYS AND BLADDER", "KIDNEY"),
        ("Renal CEUS lt", "KIDNEY"),
        ("MRI LIVER W WO CONTRAST", "LIVER"),
        ("Hepatic protocol", "LIVER"),
        ("US Scrotum/Testicles", "SCROTUM"),
        # German
        ("Sono Schilddrüse", "THYROID"),
        ("SCHILDDRUESENSONOGRAPHIE", "THYROID"),
        ("Nierensonographie bds.", "KIDNEY"),
        ("MRT Leber nativ und KM", "LIVER"),
        ("Hodensonographie", "SCROTUM"),
        # French
        ("Échographie thyroïdienne", "THYROID"),
        ("Echo du rein gauche", "KIDNEY"),
        ("Écho rénale", "KIDNEY"),
        ("IRM du foie", "LIVER"),
        ("Échographie testiculaire", "SCROTUM"),
        # Spanish, Italian, Portuguese
        ("Ecografía de tiroides", "THYROID"),
        ("ECO RIÑÓN DERECHO", "KIDNEY"),
        ("RM hígado dinámica", "LIVER"),
        ("Ecografía escrotal", "SCROTUM"),
        ("Ecografia tiroide", "THYROID"),
        ("Ecografia reni", "KIDNEY"),
        ("RM fegato con mdc", "LIVER"),
        ("Ecografia testicolare", "SCROTUM"),
        ("USG tireoide", "THYROID"),
        ("Ultrassom dos rins", "KIDNEY"),
        ("RM fígado", "LIVER"),
        ("USG bolsa escrotal", "SCROTUM"),
        # Dutch, Swedish, Danish, Norwegian
        ("Echo schildklier", "THYROID"),
        ("Echo nieren", "KIDNEY"),
        ("MRI lever", "LIVER"),
        ("Ultraljud sköldkörtel", "THYROID"),
        ("Ultraljud njurar", "KIDNEY"),
        ("UL nyrer", "KIDNEY"),
        # Polish, Czech, Turkish, Russian, Ukrainian, Greek
        ("USG tarczycy", "THYROID"),
        ("USG nerek", "KIDNEY"),
        ("MR wątroby", "LIVER"),
        ("USG jąder i moszny", "SCROTUM"),
        ("UZ štítné žlázy", "THYROID"),
        ("UZ ledvin", "KIDNEY"),
        ("MR jater", "LIVER"),
        ("Böbrek ultrasonu", "KIDNEY"),
        ("Karaciğer MR", "LIVER"),
        ("УЗИ щитовидной железы", "THYROID"),
        ("УЗИ почек", "KIDNEY"),
        ("МРТ печени", "LIVER"),
        ("УЗИ мошонки", "SCROTUM"),
        ("Υπερηχογράφημα θυρεοειδούς", "THYROID"),
        ("MRI ήπατος", "LIVER"),
        # Chinese (simplified, traditional), Japanese, Korean
        ("甲状腺彩超", "THYROID"),
        ("双肾超声造影", "KIDNEY"),
        ("肝脏MR动态增强", "LIVER"),
        ("阴囊及睾丸超声", "SCROTUM"),
        ("甲狀腺超音波", "THYROID"),
        ("腎臟超音波", "KIDNEY"),
        ("肝臓造影MRI", "LIVER"),
        ("陰嚢エコー", "SCROTUM"),
        ("갑상선 초음파", "THYROID"),
        ("신장 초음파", "KIDNEY"),
        ("간 MRI", "LIVER"),
        ("음낭 초음파", "SCROTUM"),
        # protocol names
        ("t1_vibe_LiverDyn", "LIVER"),
        ("abdomen^liver", "LIVER"),
        ("KIDNEY_L^CEUS", "KIDNEY"),
    ],
)
def test_descriptions_in_many_languages(judge_words: Build, description: str, expected: str) -> None:
    """Without Body Part Examined and without codes, as ultrasound often comes."""
    verdict = judge_words({"StudyDescription": description})
    assert (verdict.state, verdict.body_part) == ("CLEAR", expected)


@pytest.mark.parametrize(
    "description",
    [
        *("US PARATHYROID", "Adrenal glands MRI", "Nebenniere", "Nebenschilddrüse", "échographie surrénale"),
        *("肾上腺CT", "甲状旁腺超声", "副甲状腺エコー", "副腎", "부갑상선", "УЗИ надпочечников", "suprarrenales"),
        *("CT HEAD, RENAL IMPAIRMENT", "Niereninsuffizienz, Thorax", "肝素", "MRT rein nativ", "rim enhancing lesion"),
        *("deliver", "MRT-Kopf", "Echocardiogram", "status post thyroidectomy", "Testing", "RENE MUELLER", "心脏彩超"),
    ],
)
def test_what_only_looks_like_one_of_ours(judge_words: Build, description: str) -> None:
    assert judge_words({"StudyDescription": description}).body_part == ""


@pytest.mark.parametrize(
    "description",
    [
        *("US guided kidney biopsy", "Kidney transplant Doppler", "Nierentransplantat", "Leberbiopsie", "FNA thyroid"),
        *("肾穿刺活检", "肾移植超声", "肝生検", "Trasplante renal", "Биопсия почки", "greffon rénal", "Liver RFA"),
    ],
)
def test_other_kinds_of_examination_are_excluded(judge_words: Build, description: str) -> None:
    """Whatever the body part, and whatever a preset says: the engines' studies had no such patients."""
    verdict = judge_words({"StudyDescription": description, "BodyPartExamined": "KIDNEY"})
    assert (verdict.state, verdict.body_part) == ("EXCLUDED", "")


def test_history_is_not_another_kind_of_examination(judge_words: Build) -> None:
    assert judge_words({"StudyDescription": "MRI liver, post biopsy"}).body_part == "LIVER"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("THYROID", "THYROID"), ("THYR", "THYROID"), ("L TESTIS", "SCROTUM"), ("TESTIS_R", "SCROTUM")),
        *(("RT KIDNEY", "KIDNEY"), ("kidney", "KIDNEY"), ("KIDNEYS", "KIDNEY"), ("LIVER", "LIVER"), ("Leber", "LIVER")),
        *(("甲状腺", "THYROID"), ("EPIDIDYMIS", "SCROTUM"), ("SCROTUM", "SCROTUM")),
        *(("ABDOMEN", ""), ("NECK", ""), ("HEAD", ""), ("PARATHYROID", ""), ("", ""), ("TEST", "")),
    ],
)
def test_body_part_examined_and_what_vendors_write_into_it(judge_words: Build, value: str, expected: str) -> None:
    assert judge_words({"BodyPartExamined": value}).body_part == expected


@pytest.mark.parametrize(
    ("value", "scheme", "expected"),
    [
        *(("69748006", "SCT", "THYROID"), ("64033007", "SCT", "KIDNEY"), ("10200004", "SCT", "LIVER")),
        *(("303270005", "SCT", "LIVER"), ("40689003", "SCT", "SCROTUM"), ("20233005", "SCT", "SCROTUM")),
        *(("T-B6000", "SRT", "THYROID"), ("T-71000", "SNM3", "KIDNEY"), ("T-62000", "99SDM", "LIVER")),
        *(("T-94000", "SRT", "SCROTUM"), ("87644002", "SCT", "SCROTUM")),
        *(("69748006", "LN", ""), ("T-B6000", "SCT", ""), ("69748006", "", ""), ("76752008", "SCT", "")),
    ],
)
def test_codes_are_compared_with_their_scheme(judge_words: Build, value: str, scheme: str, expected: str) -> None:
    for keyword in ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"):
        assert judge_words({keyword: code(value, scheme)}).body_part == expected


def test_the_meaning_of_a_code_is_not_read(judge_words: Build) -> None:
    """64033007 is "Endo-renal" in CID 4, and a private code may mean anything."""
    assert judge_words({"AnatomicRegionSequence": code("64033007", "SCT", "Endo-renal")}).body_part == "KIDNEY"
    assert judge_words({"AnatomicRegionSequence": code("X1", "99SITE", "Liver")}).body_part == ""


def test_the_code_of_an_enhanced_object_stands_in_its_functional_groups(judge_words: Build) -> None:
    anatomy = {"AnatomicRegionSequence": code("10200004", "SCT")}
    groups = [{"FrameAnatomySequence": [anatomy]}]
    assert judge_words({"Modality": "MR", "SharedFunctionalGroupsSequence": groups}).body_part == "LIVER"


def test_procedure_codes_of_the_site_come_on_top(make_study: Build) -> None:
    (series,) = make_study({"ProcedureCodeSequence": code("TOU0065", "99RIS")}).series
    assert body_part.judge(series).body_part == ""
    site = {("TOU0065", "99RIS"): frozenset({"KIDNEY"})}
    assert body_part.judge(series, site).body_part == "KIDNEY"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("THYROID", "THYROID"), ("SCROTAL", "SCROTUM"), ("SMALL PARTS", ""), ("ABDOMINAL", ""), ("CARDIOLOGY", "")],
)
def test_image_type_value_3_of_ultrasound(judge_words: Build, value: str, expected: str) -> None:
    image_type = ["ORIGINAL", "PRIMARY", value, "0001"]
    assert judge_words({"ImageType": image_type}).body_part == expected
    assert judge_words({"ImageType": image_type, "Modality": "MR"}).body_part == ""


@pytest.mark.parametrize(
    ("attributes", "state", "expected"),
    [
        # a preset that was left over: two descriptions beat it, one does not
        ({"BodyPartExamined": "THYROID", "StudyDescription": "US kidney"}, "AMBIGUOUS", ""),
        ({"BodyPartExamined": "THYROID", "StudyDescription": "US breast"}, "AMBIGUOUS", ""),
        (
            {"BodyPartExamined": "THYROID", "StudyDescription": "US kidney", "SeriesDescription": "Kidney left"},
            "CLEAR",
            "KIDNEY",
        ),
        # a description copied into five attributes is one description
        (
            {
                "BodyPartExamined": "THYROID",
                "StudyDescription": "US kidney",
                "RequestedProcedureDescription": "US kidney",
                "PerformedProcedureStepDescription": "US kidney",
            },
            "AMBIGUOUS",
            "",
        ),
        # the series' own words decide a study of several organs
        ({"StudyDescription": "US liver and kidneys"}, "AMBIGUOUS", ""),
        ({"StudyDescription": "US liver and kidneys", "SeriesDescription": "Kidney R"}, "CLEAR", "KIDNEY"),
        # a code beats one description, two descriptions make it ambiguous, and nothing turns it round
        ({"AnatomicRegionSequence": code("10200004", "SCT"), "StudyDescription": "US kidney"}, "CLEAR", "LIVER"),
        (
            {
                "AnatomicRegionSequence": code("10200004", "SCT"),
                "StudyDescription": "US kidney",
                "SeriesDescription": "kidney",
                "BodyPartExamined": "KIDNEY",
            },
            "AMBIGUOUS",
            "",
        ),
        # regions fit several organs and never decide, however many agree
        (
            {
                "BodyPartExamined": "ABDOMEN",
                "ImageType": ["ORIGINAL", "PRIMARY", "RETROPERITONEAL"],
                "AnatomicRegionSequence": code("818981001", "SCT"),
            },
            "NONE",
            "",
        ),
        # known disease elsewhere is no contradiction
        ({"StudyDescription": "MR LIVER, KNOWN BREAST CA"}, "CLEAR", "LIVER"),
        ({"Modality": "MR", "BodyPartExamined": "HEAD", "StudyDescription": "MRT Leber"}, "AMBIGUOUS", ""),
        (
            {"BodyPartExamined": "KIDNEY", "StudyDescription": "Nebenniere", "SeriesDescription": "Nebenniere"},
            "NONE",
            "",
        ),
        ({}, "NONE", ""),
    ],
)
def test_contradictions(judge_words: Build, attributes: dict[str, Any], state: str, expected: str) -> None:
    verdict = judge_words(attributes)
    assert (verdict.state, verdict.body_part) == (state, expected)


def test_one_series_with_images_of_two_organs_is_ambiguous(judge_words: Build) -> None:
    liver = {"AnatomicRegionSequence": code("10200004", "SCT")}
    kidney = {"AnatomicRegionSequence": code("64033007", "SCT")}
    verdict = judge_words(liver, kidney)
    assert verdict.state == "AMBIGUOUS"
    assert verdict.candidates == {"LIVER", "KIDNEY"}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("us/philips_kidney_still_gray.dcm", "KIDNEY"),
        ("us/ge_logiqe_thyroidpreset_j2k.dcm", ""),  # the thyroid is in the picture only: SMALL PARTS in the header
        ("us/OBXXXX1A.dcm", ""),
        ("us/esaote_ybr422_raw.dcm", ""),
        ("us/JPGLosslessP14SV1_1s_1f_8b.dcm", ""),
        ("us/gdcm-US-ALOKA-16.dcm", ""),
        ("us/acuson_echo_65f_jpegbaseline.dcm", ""),
        ("mr/MR-SIEMENS-DICOM-WithOverlays.dcm", "LIVER"),
        ("mr/emri_small.dcm", ""),
    ],
)
def test_real_headers(shared_data: Path, file: str, expected: str) -> None:
    assert _of_files([shared_data / file]).body_part == expected


def test_the_real_head_study_is_never_liver(shared_data: Path) -> None:
    files = sorted((shared_data / "mr/adit_samples").rglob("*.dcm"))
    assert files
    for verdict in [_of_files([f]) for f in files]:
        assert verdict.state == "NONE"
        assert "LIVER" not in verdict.scores


def _of_files(paths: list[Path]) -> body_part.BodyPartVerdict:
    read = [Instance(f"{n:032x}", read_header(p), "", "", p, "", "", "", "", 0.0) for n, p in enumerate(paths)]
    return body_part.judge(Series("1.2", tuple(read)))


_READ = {*body_part.SERIES_TEXT, *body_part.STUDY_TEXT, *body_part.ANATOMY_SEQUENCES, *body_part.PROCEDURE_SEQUENCES}
_READ |= {"RequestAttributesSequence", "SharedFunctionalGroupsSequence", "ImageType", "BodyPartExamined", "Modality"}
_DESCRIPTIONS = st.sampled_from(["US kidney", "Leber", "甲状腺", "scrotum", "breast", "US abdomen", "", "adrenal"])
_ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "StudyDescription": _DESCRIPTIONS,
        "SeriesDescription": _DESCRIPTIONS,
        "BodyPartExamined": st.sampled_from(["KIDNEY", "LIVER", "THYR", "TESTIS", "HEAD", "ABDOMEN", "NECK"]),
        "ImageType": st.sampled_from(
            [["ORIGINAL", "PRIMARY", v] for v in ("THYROID", "SCROTAL", "SMALL PARTS", "TEE")]
        ),
        "AnatomicRegionSequence": st.sampled_from([code(v, "SCT") for v in ("69748006", "10200004", "818981001")]),
    },
)
_IRRELEVANT = st.dictionaries(
    st.sampled_from(["PatientComments", "ReasonForStudy", "InstitutionName", "PatientName", "StationName", "StudyID"]),
    st.sampled_from(["kidney", "liver 肝", "thyroid", "biopsy", "x"]),
)


@given(_ATTRIBUTES, _IRRELEVANT)
@settings(max_examples=200, deadline=None)
def test_attributes_that_are_no_evidence_never_change_the_verdict(
    attributes: dict[str, Any], irrelevant: dict[str, str]
) -> None:
    assert not _READ & irrelevant.keys()
    plain, noisy = _judge(attributes), _judge(attributes | irrelevant)
    assert plain == noisy


@given(_ATTRIBUTES)
@settings(max_examples=300, deadline=None)
def test_never_two_body_parts(attributes: dict[str, Any]) -> None:
    """CLEAR means: one part, at the threshold, ahead of all others by the margin, against no anatomic code."""
    verdict = _judge(attributes)
    assert (verdict.state == "CLEAR") == (verdict.body_part in terms.BODY_PARTS)
    if verdict.state == "CLEAR":
        others = [score for part, score in verdict.scores.items() if part != verdict.body_part]
        assert verdict.scores[verdict.body_part] >= body_part.THRESHOLD
        assert all(verdict.scores[verdict.body_part] - score >= body_part.MARGIN for score in others)
    assert all(e.attribute in attributes for e in verdict.evidence)


@given(_ATTRIBUTES, st.text(alphabet="qxzj 0123456789_-^/", max_size=20))
@settings(max_examples=100, deadline=None)
def test_words_that_name_nothing_never_change_the_verdict(attributes: dict[str, Any], noise: str) -> None:
    noisy = {k: f"{noise} {v}" if k.endswith("Description") else v for k, v in attributes.items()}
    assert _judge(attributes).scores == _judge(noisy).scores


def _judge(attributes: dict[str, Any]) -> body_part.BodyPartVerdict:
    header = Header.from_json({"Modality": "US", **attributes})
    return body_part.judge(Series("1.2", (Instance("0" * 32, header, "", "", Path(), "", "", "", "", 0.0),)))


def test_evidence_is_bounded_and_every_piece_of_text_is_sensitive(judge_words: Build) -> None:
    verdict = judge_words(*({"SeriesDescription": f"kidney {n} " + "x" * 5000} for n in range(100)))
    assert verdict.body_part == "KIDNEY"
    assert len(verdict.evidence) <= body_part.MAX_SHOWN
    assert all(e.sensitive and len(e.actual) <= 80 for e in verdict.evidence)


def test_a_series_with_hundreds_of_descriptions_is_not_trusted(judge_words: Build) -> None:
    verdict = judge_words(*({"SeriesDescription": f"kidney {n}"} for n in range(body_part.MAX_VALUES + 1)))
    assert verdict.state == "EXCLUDED"

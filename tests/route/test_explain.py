"""What the operator reads; and that docs/routing.md says what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node import config
from dicom_node.errors import CannotUnderstandError
from dicom_node.route import evaluate, explain_files, format_explanation, format_verdict, tables
from dicom_node.route.explain import WIDTH
from dicom_node.store.header import read_header
from dicom_node.study import Header

Build = Callable[..., Any]
REPOSITORY = Path(__file__).parent.parent.parent
PAGE = REPOSITORY / "docs" / "routing.md"
RENAL = {"modality": "US", "body_part": "KIDNEY", "contrast": True}
MATCHERS = [{"called_ae": "RENAL_AI"}, {"StudyDescription": {"regex": "renal mass"}}]


def test_the_tables_of_the_page_are_the_data() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table:") == 5
    assert tables.render(page) == page, "run: python -m dicom_node.route.tables docs/routing.md"


def test_the_example_of_the_page_is_what_the_command_prints(make_study: Build, make_route: Build) -> None:
    attributes = {
        "StudyDescription": "US KIDNEY",
        "SeriesDescription": "US KIDNEY",
        "ImageType": ["ORIGINAL", "PRIMARY", "SMALL PARTS"],
    }
    route = make_route(RENAL, any=MATCHERS).model_copy(update={"name": "renal-ceus"})
    printed = format_verdict(evaluate(route, make_study(attributes, called=""), {}))
    example = re.search(r"<!-- example -->\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    assert printed + "\n" == example[1]


def test_every_condition_is_printed_with_its_answer(make_study: Build, make_route: Build) -> None:
    study = make_study({"StudyDescription": "CEUS kidney", "Modality": "MR"})
    text = format_verdict(evaluate(make_route({**RENAL, "StationName": "X"}, any=MATCHERS), study, {}))
    answers = re.findall(r"^    (YES|NO|MISSING) +(\w+)", text, re.MULTILINE)
    assert answers == [
        ("NO", "modality"),
        ("YES", "body_part"),
        ("YES", "contrast"),
        ("MISSING", "StationName"),
        ("NO", "called_ae"),
        ("NO", "StudyDescription"),
    ]


def test_a_refusal_stands_at_the_top_with_its_reason(make_study: Build, make_route: Build) -> None:
    text = format_verdict(
        evaluate(make_route(RENAL, any=MATCHERS), make_study({"StudyDescription": "CEUS kidney"}), {})
    )
    assert text.startswith("Route test: REFUSED, INDICATION_NOT_ESTABLISHED\n")
    assert "(any of: called_ae NO; StudyDescription NO)" in " ".join(text.split())


def test_stored_verdicts_print_like_fresh_ones(make_study: Build, make_route: Build) -> None:
    verdict = evaluate(make_route(RENAL, any=MATCHERS), make_study({"StudyDescription": "CEUS kidney renal mass"}), {})
    assert format_verdict(json.loads(json.dumps(verdict.to_json()))) == format_verdict(verdict)
    assert format_verdict(verdict).startswith("Route test: RUNS, on 1 series\n")


def test_text_from_the_wire_cannot_steer_the_terminal(make_study: Build, make_route: Build) -> None:
    study = make_study({"StudyDescription": "kidney \x1b[2J\x07 ceus\nroot", "SeriesDescription": "\x9bkidney"})
    text = format_verdict(evaluate(make_route(RENAL, any=MATCHERS), study, {}))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "\nroot" not in text


def test_lines_fit_a_terminal(make_study: Build, make_route: Build) -> None:
    long = make_study({"StudyDescription": "kidney ceus " + "x" * 500, "SeriesDescription": "y" * 500})
    matchers = [{"StudyDescription": {"regex": "|".join(f"term{n}" for n in range(99))}}]
    text = format_verdict(evaluate(make_route(RENAL, any=matchers), long, {}))
    assert max(map(len, text.splitlines())) <= WIDTH + 50


def read_fake(path: Path) -> Header:
    if path.name == "broken.dcm":
        raise CannotUnderstandError
    number, series = path.stem.split("-")
    attributes = {"StudyInstanceUID": f"1.2.{number}", "SeriesInstanceUID": f"1.2.{number}.{series}", "Modality": "US"}
    return Header.from_json(attributes | {"SeriesDescription": "kidney", "SOPInstanceUID": f"1.3.{path.stem}"})


def test_files_are_grouped_into_studies_and_unreadable_ones_are_named(make_route: Build) -> None:
    paths = [Path(n) for n in ("1-1.dcm", "2-1.dcm", "broken.dcm", "1-2.dcm")]
    route = make_route({"body_part": "KIDNEY"}, any=[{"called_ae": "RENAL_AI"}])
    explained = explain_files([route], paths, read_fake)
    assert [(s["study"], len(s["series"])) for s in explained["studies"]] == [("1.2.1", 2), ("1.2.2", 1)]
    assert explained["unreadable"] == [{"file": "broken.dcm", "error": "The data set cannot be parsed."}]
    assert json.loads(json.dumps(explained)) == explained
    text = format_explanation(explained)
    assert text.count("REFUSED, INDICATION_NOT_ESTABLISHED") == 2
    assert "broken.dcm: cannot be read" in text
    assert text.count(f"  taken by: no route; refused by: {route.name} (INDICATION_NOT_ESTABLISHED)\n\n") == 2
    as_called = explain_files([route], paths[:1], read_fake, called_ae="RENAL_AI")
    assert as_called["studies"][0]["verdicts"][0]["runs"]


def test_real_files(shared_data: Path) -> None:
    routes = config.load(REPOSITORY / "config.yaml").routes
    files = [shared_data / "us/philips_kidney_still_gray.dcm", *(shared_data / "mr/adit_samples").rglob("*.dcm")]
    explained = explain_files(routes, files, read_header)
    text = format_explanation(explained)
    assert "found KIDNEY 9 (SCROTUM 1, THYROID 1)" in text
    assert not any(v["matched"] for study in explained["studies"] for v in study["verdicts"])
    for header in (read_header(f) for f in files):
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"):
            value = header.text(keyword).strip()
            assert not value or value not in text, keyword


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        tables.render("<!-- table: nothing -->\n<!-- end of table -->")

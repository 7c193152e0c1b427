"""A FHIR server over real sockets: what is asked, what is believed, and what every bad answer comes to."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fhir_server
import pytest
from certificates import Authority
from fhir_server import EDV, FSH, LEFT, RIGHT, SYSTEM, TESTIS, VOLUME, FhirServer, drip, observation, patient, send

from dicom_node import config
from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.fhir import FhirSource
from dicom_node.clinical.identity import Subject
from dicom_node.clinical.model import ClinicalCode, Gathered
from dicom_node.config_clinical import Clinical, Fhir
from dicom_node.errors import ClinicalSourceError, ConfigError

SUBJECT = Subject("1.2.3", "PID1", "", "1990-02-03", "A1", datetime(2024, 6, 1, 12, tzinfo=UTC))
CODES = (("15067-2", "LN"), ("11653-3", "LN"), ("118565006", "SCT"))


def source(url: str, codes: CodeMap | None = None, **more: Any) -> FhirSource:
    settings = {"base_url": url, "identifier_systems": {"": SYSTEM, "LAB": "urn:lab"}, "timeout_seconds": 5} | more
    return FhirSource(Fhir.model_validate(settings), codes or CodeMap())


def ask(server: FhirServer, subject: Subject = SUBJECT, **more: Any) -> Gathered:
    return source(server.url, **more).ask(subject, CODES, 180)


@pytest.fixture
def server() -> Iterator[FhirServer]:
    with FhirServer(patient(), observation(FSH, 12.5, "[IU]/L")) as made:
        yield made


def test_a_laboratory_value_comes_with_unit_time_and_source(server: FhirServer) -> None:
    (found,) = ask(server).observations
    assert (found.code, found.value, found.unit) == (("15067-2", "LN"), 12.5, "[IU]/L")
    assert (found.time, found.origin, found.source) == ("2024-05-20T08:30:00+02:00", "fhir", "FHIR")


def test_the_patient_stands_in_no_address(server: FhirServer) -> None:
    """What stands in an address stands in the log of every proxy."""
    ask(server)
    assert [method for method, _, _, _ in server.asked] == ["POST", "POST"]
    assert "PID1" not in "".join(path for _, path, _, _ in server.asked)
    assert server.searches("Patient")[0]["identifier"] == [f"{SYSTEM}|PID1"]


def test_only_what_an_engine_wants_is_asked_for_and_only_around_the_images(server: FhirServer) -> None:
    ask(server)
    (form,) = server.searches("Observation")
    assert form["code"] == ["http://loinc.org|15067-2,http://loinc.org|11653-3,http://snomed.info/sct|118565006"]
    assert form["date"] == ["ge2023-12-03", "le2024-11-29"]
    assert form["patient"] == ["p1"]


def test_sides_sites_and_components_are_read() -> None:
    doppler = observation(EDV, 3.5, "cm/s", site=(TESTIS, RIGHT))
    panel = observation((fhir_server.LOINC, "99999-9"), 0, "1", site=(TESTIS, LEFT))
    del panel["valueQuantity"]
    panel["component"] = [
        {"code": fhir_server.concept(VOLUME), "valueQuantity": {"value": 14, "system": fhir_server.UCUM, "code": "mL"}}
    ]
    with FhirServer(patient(), doppler, panel) as server:
        found = {o.code: o for o in ask(server).observations}
    edv, volume = found["11653-3", "LN"], found["118565006", "SCT"]
    assert (edv.side, edv.site) == ("R", ("40689003", "SCT"))
    assert (volume.value, volume.unit, volume.side, volume.site) == (14, "mL", "L", ("40689003", "SCT"))


def test_the_sites_own_codes_are_asked_for_and_read() -> None:
    section = Clinical.model_validate(
        {
            "codes": [{"code": {"value": "FSH", "scheme": "http://lab"}, "unit": "m[IU]/mL",
                       "means": {"value": "15067-2", "scheme": "LN"}}],
            "sites": [{"code": {"value": "RTE", "scheme": "http://lab"}, "laterality": "R",
                       "means": {"value": "40689003", "scheme": "SCT"}}],
        }
    )  # fmt: skip
    local = observation(("http://lab", "FSH"), 7, "mIU/ml", site=(("http://lab", "RTE"),))
    local["valueQuantity"] = {"value": 7, "unit": "mIU/ml"}
    with FhirServer(patient(), local) as server:
        (found,) = ask(server, codes=CodeMap(section.codes, section.sites)).observations
    assert (found.code, found.unit, found.side, found.site) == (("15067-2", "LN"), "m[IU]/mL", "R", ("40689003", "SCT"))


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"status": "preliminary"}, 0),
        ({"status": "entered-in-error"}, 0),
        ({"status": "corrected"}, 1),
        ({"subject": {"reference": "Patient/p2"}}, 0),
        ({"subject": {"reference": "https://elsewhere/fhir/Patient/p1/_history/3"}}, 1),
        ({"subject": {}}, 0),
        ({"valueQuantity": {"value": "12", "code": "[IU]/L", "system": fhir_server.UCUM}}, 0),
        ({"valueQuantity": {"value": True, "code": "[IU]/L", "system": fhir_server.UCUM}}, 0),
        ({"valueQuantity": {"value": 10**400, "code": "[IU]/L", "system": fhir_server.UCUM}}, 0),
        ({"valueQuantity": None, "valueString": "12 IU/L"}, 0),
        ({"resourceType": "Procedure"}, 0),
    ],
)
def test_an_observation_is_believed_only_as_far_as_it_goes(
    server: FhirServer, change: dict[str, Any], kept: int
) -> None:
    """Whatever the server filtered by: what is no final number of this patient is not used."""
    told = observation(FSH, 12.5, "[IU]/L") | change
    bundle = {"resourceType": "Bundle", "entry": [{"resource": told}]}
    server.answer = lambda handler: "Observation" in handler.path and send(handler, bundle)
    assert len(ask(server).observations) == kept


@pytest.mark.parametrize(
    ("change", "unit", "time", "inexact"),
    [
        ({}, "[IU]/L", "2024-05-20T08:30:00+02:00", False),
        ({"valueQuantity": {"value": 1, "unit": "IU/L"}}, "", "2024-05-20T08:30:00+02:00", False),
        ({"valueQuantity": {"value": 1, "code": "x", "system": "http://lab"}}, "", "2024-05-20T08:30:00+02:00", False),
        ({"effectiveDateTime": "2024-05"}, "[IU]/L", "", False),
        ({"effectiveDateTime": None}, "[IU]/L", "", False),
        ({"effectiveDateTime": "2024-05-20"}, "[IU]/L", "2024-05-20", False),
        ({"effectiveDateTime": None, "effectivePeriod": {"start": "2024-05-01", "end": "2024-05-03"}}, "[IU]/L",
         "2024-05-03", False),
        ({"valueQuantity": {"value": 0.3, "comparator": "<", "code": "[IU]/L", "system": fhir_server.UCUM}}, "[IU]/L",
         "2024-05-20T08:30:00+02:00", True),
    ],
)  # fmt: skip
def test_what_is_not_said_is_not_made_up(
    server: FhirServer, change: dict[str, Any], unit: str, time: str, inexact: bool
) -> None:
    told = observation(FSH, 12.5, "[IU]/L") | change
    bundle = {"resourceType": "Bundle", "entry": [{"resource": told}]}
    server.answer = lambda handler: "Observation" in handler.path and send(handler, bundle)
    (found,) = ask(server).observations
    assert (found.unit, found.time, found.inexact) == (unit, time, inexact)


@pytest.mark.parametrize(
    ("patients", "subject", "code"),
    [
        ([], {}, "CLINICAL_PATIENT_UNKNOWN"),
        ([patient(), patient(logical="p2")], {}, "CLINICAL_PATIENT_AMBIGUOUS"),
        ([patient(active=False)], {}, "CLINICAL_PATIENT_UNKNOWN"),
        ([patient()], {"birth_date": "1990-02-04"}, "CLINICAL_PATIENT_MISMATCH"),
        ([patient()], {"issuer": "OTHER"}, "CLINICAL_PATIENT_UNKNOWN"),
        ([patient()], {"patient_id": ""}, "CLINICAL_PATIENT_UNKNOWN"),
        ([patient()], {"issuer": "LAB"}, "CLINICAL_PATIENT_UNKNOWN"),
    ],
)
def test_a_patient_who_is_not_surely_the_studys_is_not_asked_about(
    patients: list[dict[str, Any]], subject: dict[str, str], code: str
) -> None:
    values = {n: getattr(SUBJECT, n) for n in SUBJECT.__dataclass_fields__} | subject
    with FhirServer(*patients, observation(FSH, 12.5, "[IU]/L")) as server:
        found = ask(server, Subject(**values))
    assert not found.observations and server.searches("Observation") == []
    (said,) = found.problems
    assert said.startswith(f"{code}(FHIR)") and "PID1" not in said and "1990" not in said


def test_a_server_that_answers_another_patient_is_not_believed(server: FhirServer) -> None:
    wrong = {"resourceType": "Bundle", "entry": [{"resource": patient("PID2")}]}
    server.answer = lambda handler: "Patient" in handler.path and send(handler, wrong)
    assert ask(server).problems[0].startswith("CLINICAL_PATIENT_MISMATCH")


def test_the_year_of_birth_alone_does_not_contradict(server: FhirServer) -> None:
    server.resources[0]["birthDate"] = "1990"
    assert len(ask(server).observations) == 1


def test_a_patient_id_is_no_part_of_the_query_language() -> None:
    """A comma would ask for two patients (R4 3.1.1.4.1.1)."""
    odd = "A,B|C$D\\E"
    with FhirServer(patient(odd), observation(FSH, 1, "[IU]/L")) as server:
        values = {n: getattr(SUBJECT, n) for n in SUBJECT.__dataclass_fields__} | {"patient_id": odd}
        assert len(ask(server, Subject(**values)).observations) == 1
        assert server.searches("Patient")[0]["identifier"] == [SYSTEM + r"|A\,B\|C\$D\\E"]


def test_pages_are_followed_on_the_same_server_and_not_for_ever() -> None:
    values = [observation(FSH, n, "[IU]/L") for n in range(1, 13)]
    with FhirServer(patient(), *values) as server:
        server.page = 5
        assert len(ask(server).observations) == 12
        server.page = 1
        with pytest.raises(ClinicalSourceError, match="pages"):
            ask(server)


def test_the_token_goes_to_no_other_server(server: FhirServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with FhirServer() as thief:
        bundle = {"resourceType": "Bundle", "link": [{"relation": "next", "url": thief.url + "?from=0"}], "entry": []}
        server.answer = lambda handler: "Observation" in handler.path and send(handler, bundle)
        with pytest.raises(ClinicalSourceError, match="another server"):
            ask(server, token_file=tmp_path / "token")

        def redirect(handler: Any) -> bool:
            handler.send_response(307)
            handler.send_header("Location", thief.url + "/Patient/_search")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return True

        server.answer = redirect
        with pytest.raises(ClinicalSourceError, match="answers 307"):
            ask(server, token_file=tmp_path / "token")
        assert thief.asked == []


def test_the_token_is_read_for_every_question(server: FhirServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    server.token = "new"  # noqa: S105
    asking = source(server.url, token_file=token)
    with pytest.raises(ClinicalSourceError) as caught:
        asking.ask(SUBJECT, CODES, 180)
    assert (caught.value.code, caught.value.again) == (ClinicalCode.CLINICAL_SOURCE_DENIED, True)
    assert "old" not in str(caught.value)
    token.write_text("new\n")
    assert len(asking.ask(SUBJECT, CODES, 180).observations) == 1
    token.unlink()
    with pytest.raises(ClinicalSourceError, match="token_file"):
        asking.ask(SUBJECT, CODES, 180)


def _refuse(status: int) -> Callable[[Any], bool]:
    return lambda handler: send(handler, {"resourceType": "OperationOutcome"}, status)


@pytest.mark.parametrize(
    ("answer", "code", "again"),
    [
        (_refuse(401), "DENIED", True),
        (_refuse(403), "DENIED", True),
        (_refuse(503), "UNREACHABLE", True),
        (_refuse(429), "UNREACHABLE", True),
        (_refuse(404), "INVALID", False),
        (_refuse(405), "INVALID", False),
        (lambda h: send(h, b"<html>Log in</html>", kind="text/html"), "INVALID", False),
        (lambda h: send(h, b"{not json"), "INVALID", False),
        (lambda h: send(h, b"[" * 100_000), "INVALID", False),
        (lambda h: send(h, ["a list"]), "INVALID", False),
        (lambda h: send(h, {"resourceType": "OperationOutcome"}), "INVALID", False),
        (lambda h: send(h, b'{"resourceType":"Bundle","x":"' + b"x" * 2_000_000 + b'"}'), "INVALID", False),
        (lambda h: bool(h.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")), "UNREACHABLE", True),
    ],
    ids=["401", "403", "503", "429", "404", "405", "login", "no-json", "deep", "list", "outcome", "huge", "no-http"],
)
def test_every_bad_answer_has_its_name(
    server: FhirServer, answer: Callable[[Any], bool], code: str, again: bool
) -> None:
    server.answer = answer
    with pytest.raises(ClinicalSourceError) as caught:
        ask(server, max_answer_mb=1)
    assert (caught.value.code, caught.value.again) == (f"CLINICAL_SOURCE_{code}", again)
    assert "PID1" not in str(caught.value) and server.url not in str(caught.value)


def test_a_huge_answer_is_not_read_to_its_end(server: FhirServer) -> None:
    """Also where it never ends and does not say how long it is."""

    def endless(handler: Any) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/fhir+json\r\n\r\n{")
        with contextlib.suppress(OSError):
            while not server.stopping.is_set():
                handler.wfile.write(b" " * 65536)
        return True

    server.answer = endless
    with pytest.raises(ClinicalSourceError, match="more than 1 MB"):
        ask(server, max_answer_mb=1)


def test_a_compressed_answer_is_refused(server: FhirServer) -> None:
    def bomb(handler: Any) -> bool:
        handler.send_response(200)
        for name, value in (
            ("Content-Type", "application/fhir+json"),
            ("Content-Encoding", "gzip"),
            ("Content-Length", "3"),
        ):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"abc")
        return True

    server.answer = bomb
    with pytest.raises(ClinicalSourceError, match="compressed"):
        ask(server)


@pytest.mark.parametrize("how", ["silent", "headers", "body"])
def test_a_slow_server_costs_the_time_limit_and_no_more(server: FhirServer, how: str) -> None:
    """A byte now and then trips no time-out between bytes."""
    server.answer = lambda handler: (
        server.stopping.wait(5) or True if how == "silent" else drip(handler, server.stopping, headers=how == "headers")
    )
    started = time.monotonic()
    with pytest.raises(ClinicalSourceError) as caught:
        ask(server, timeout_seconds=0.5)
    assert time.monotonic() - started < 2
    assert (caught.value.code, caught.value.again) == (ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, True)


def test_nobody_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(ClinicalSourceError, match="no connection") as caught:
            source(f"http://127.0.0.1:{held.getsockname()[1]}/fhir").ask(SUBJECT, CODES, 180)
    assert caught.value.again


def test_over_tls_the_certificate_and_its_name_count(tmp_path: Path) -> None:
    hospital, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    good = hospital.issue("server", "fhir", addresses=[ipaddress.ip_address("127.0.0.1")])
    with FhirServer(patient(), observation(FSH, 12.5, "[IU]/L"), tls=good) as server:
        assert len(ask(server, ca=hospital.pem).observations) == 1
        for settings in ({"ca": stranger.pem}, {}):
            with pytest.raises(ClinicalSourceError, match="certificate") as caught:
                ask(server, **settings)
            assert caught.value.code == ClinicalCode.CLINICAL_SOURCE_UNREACHABLE
    with (
        FhirServer(patient(), tls=hospital.issue("other", "elsewhere")) as server,
        pytest.raises(ClinicalSourceError, match="names another host"),
    ):
        ask(server, ca=hospital.pem)


def test_a_server_may_ask_for_our_certificate(tmp_path: Path) -> None:
    hospital = Authority(tmp_path)
    pem, key = hospital.issue("server", "fhir", addresses=[ipaddress.ip_address("127.0.0.1")])
    ours = dict(zip(("cert", "key"), hospital.issue("node", "node"), strict=True))
    with FhirServer(patient(), observation(FSH, 12.5, "[IU]/L"), tls=(pem, key)) as server:
        context = server._server.socket.context  # type: ignore[attr-defined]
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(hospital.pem)
        assert len(ask(server, ca=hospital.pem, **ours).observations) == 1
        with pytest.raises(ClinicalSourceError):
            ask(server, ca=hospital.pem)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "http://fhir.hospital.example/r4"}, "https"),
        ({"base_url": "https://user:s3cret@fhir/r4"}, "token_file"),
        ({"base_url": "ftp://fhir/r4"}, "a URL"),
        ({"base_url": "https://fhir/r4", "cert": "a.pem"}, "cert and key together"),
        ({"base_url": "https://fhir/r4", "identifier_systems": {}}, "at least 1"),
        ({"base_url": "https://fhir/r4", "identifier_systems": {"": "no uri"}}, "pattern"),
        ({"base_url": "https://fhir/r4", "tokken": "x"}, "no such key"),
    ],
)
def test_a_configuration_that_would_give_something_away_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    data = {"clinical": {"fhir": {"identifier_systems": {"": SYSTEM}} | settings}}
    with pytest.raises(ConfigError, match=said) as caught:
        config.parse(data, file="x", base=tmp_path)
    assert caught.value.key.startswith("clinical.fhir") and "s3cret" not in str(caught.value)


def test_paths_of_the_section_are_relative_to_the_file(tmp_path: Path) -> None:
    fhir = {"base_url": "https://fhir/r4", "identifier_systems": {"": SYSTEM}, "token_file": "t", "ca": "c.pem"}
    made = config.parse({"clinical": {"fhir": fhir, "sidecar": "s"}}, file="x", base=tmp_path).clinical
    assert made.fhir is not None
    assert (made.sidecar, made.fhir.token_file, made.fhir.ca) == (tmp_path / "s", tmp_path / "t", tmp_path / "c.pem")
    with pytest.raises(ConfigError, match="each of"):
        config.parse({"clinical": {"priority": ["sr", "sr", "fhir"]}}, file="x", base=tmp_path)

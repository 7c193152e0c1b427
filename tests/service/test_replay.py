"""`replay`: changed rules against the headers that the ledger keeps; and the shapes of what it and `explain` print."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node import assemble
from dicom_node.cli import main
from dicom_node.clinical import ClinicalValues, Gathered, Observation
from dicom_node.config import load
from dicom_node.log import Log
from dicom_node.metrics import NullRecorder
from dicom_node.packages import wanted_of
from dicom_node.route import evaluate_all
from dicom_node.route.stage import RouteStage
from dicom_node.service.replay import seconds_of
from dicom_node.store import inspect, jobs, rejections, studies
from dicom_node.store.jobs import Ending
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Outcome, Stage, job
from dicom_node.study import Header, Instance, Study

REPOSITORY = Path(__file__).parent.parent.parent
SCHEMAS = REPOSITORY / "docs" / "schemas"
TIMING = studies.Timing(60, 600, "rerun", 3)
SECRETS = {"PatientName": "Secret^Name", "PatientID": "SECRET-ID", "AccessionNumber": "SECRET-ACC"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    settings["engines"]["path"] = [str(REPOSITORY / "engines")]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return path


@pytest.fixture
def ledger(config: Path, make_instance: Any) -> Ledger:
    """A thyroid study without an indication, a kidney study with one, and one of a month ago."""
    (config.parent / "var").mkdir()
    made, now = Ledger(config.parent / "var"), time.time()
    for uid, text, at in (
        ("1.2.3", "Sono Schilddrüse, Knoten", now - 3600),
        ("1.2.4", "CEUS Niere, Nierentumor", now - 3500),
        ("1.2.5", "Sono Schilddrüse, Knoten", now - 30 * 86400),
    ):
        instance = make_instance(
            at=at, digest=uid, StudyInstanceUID=uid, SOPInstanceUID=f"{uid}.1", StudyDescription=text, **SECRETS
        )
        with made.write() as tx:
            studies.add_instance(tx, instance, own=False, priority=0, timing=TIMING, now=at)
    return made


@pytest.fixture
def new(config: Path) -> Path:
    """The shipped rules, and the word Knoten establishes the indication of the thyroid."""
    settings = yaml.safe_load(config.read_text())
    route = next(r for r in settings["routes"] if r["name"] == "thyroid-cine")
    route["indication"]["any"].append({"StudyDescription": {"regex": "Knoten"}})
    path = config.parent / "new.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return path


def asked(capsys: Any, config: Path, *arguments: str) -> dict[str, Any]:
    assert main(["replay", *arguments, "--json", "--config", str(config)]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((SCHEMAS / "replay.v1.schema.json").read_text()))
    return answer


def test_only_the_study_that_changes_is_told_and_why(config: Path, ledger: Ledger, new: Path, capsys: Any) -> None:
    answer = asked(capsys, config, "--since", "7d", "--with", str(new))
    assert (answer["compared"], answer["different"], answer["against"]) == (2, 1, "rules")
    (study,) = answer["studies"]
    (route,) = study["routes"]
    assert (study["study"], route["route"]) == ("1.2.3", "thyroid-cine")
    assert route["before"] == {"verdict": "REFUSED", "code": "INDICATION_NOT_ESTABLISHED", "series": 0}
    assert route["after"] == {"verdict": "RUNS", "code": None, "series": 1}
    (because,) = route["because"]
    assert (because["key"], because["before"], because["after"]) == ("StudyDescription", None, "YES")
    assert main(["replay", "--since", "7d", "--with", str(new), "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "thyroid-cine: REFUSED(INDICATION_NOT_ESTABLISHED) -> RUNS on 1 series" in text
    assert "1 of 2 studies" in text and "1.2.4" not in text
    assert not any(secret in text + json.dumps(answer) for secret in SECRETS.values())


def test_many_changes_are_counted_by_kind(config: Path, ledger: Ledger, new: Path, capsys: Any) -> None:
    assert main(["replay", "--since", "8w", "--with", str(new), "--config", str(config)]) == 0
    tail = capsys.readouterr().out.splitlines()[-3:]
    assert tail[:2] == ["in all", "       2  thyroid-cine: REFUSED(INDICATION_NOT_ESTABLISHED) -> RUNS"]
    assert tail[2].startswith("2 of 3 studies")


def test_since_is_how_far_back(config: Path, ledger: Ledger, new: Path, capsys: Any) -> None:
    assert asked(capsys, config, "--since", "8w", "--with", str(new))["different"] == 2
    assert asked(capsys, config, "--since", "6h", "--with", str(new))["compared"] == 2


def test_the_same_rules_differ_in_nothing(config: Path, ledger: Ledger, capsys: Any) -> None:
    answer = asked(capsys, config, "--with", str(config))
    assert (answer["compared"], answer["studies"]) == (2, [])


def test_a_route_that_is_gone_is_told_where_it_took_something(config: Path, ledger: Ledger, capsys: Any) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["routes"] = [r for r in settings["routes"] if r["name"] != "renal-ceus"]
    fewer = config.parent / "fewer.yaml"
    fewer.write_text(yaml.safe_dump(settings, allow_unicode=True))
    (study,) = asked(capsys, config, "--with", str(fewer))["studies"]
    assert [(r["before"]["verdict"], r["after"]["verdict"]) for r in study["routes"]] == [("RUNS", "UNDEFINED")]


def test_without_new_rules_it_compares_with_what_was_decided(config: Path, ledger: Ledger, capsys: Any) -> None:
    undecided = asked(capsys, config)
    assert (undecided["against"], undecided["compared"], undecided["undecided"]) == ("decided", 0, 2)
    with ledger.write() as tx:
        study = studies.load_study(tx, "1.2.4", 0, Path)
        verdicts = [v.to_json() for v in evaluate_all(load(config).routes, study, {})]
        verdicts[0] |= {"runs": False, "matched": False, "refusal": None, "series": []}
        ending = Ending(Outcome.UNROUTED, "NO_ROUTE", "", output={"verdicts": verdicts})
        jobs.put(
            tx,
            study_uid="1.2.4",
            revision=0,
            stage=Stage.ROUTE,
            route="",
            priority=0,
            now=1.0,
            payload={},
            ending=ending,
        )
    (found,) = asked(capsys, config)["studies"]
    assert [(r["before"]["verdict"], r["after"]["verdict"]) for r in found["routes"]] == [("NO_MATCH", "RUNS")]


def test_values_from_outside_and_rejected_images_count_as_they_did_then(
    config: Path, ledger: Ledger, make_instance: Any, capsys: Any
) -> None:
    """What only a FHIR server said then, and what a rejection note took out, are no difference of the rules."""
    rules = yaml.safe_load(config.read_text())
    route = next(r for r in rules["routes"] if r["name"] == "testis-noa")
    route["indication"] = {"any": [{"clinical": "FSH"}]}
    config.write_text(yaml.safe_dump(rules, allow_unicode=True))
    said = Observation(("15067-2", "LN"), 12.5, "[IU]/L", "", "2025-12-20", ("", ""), "fhir", "FHIR")
    image = make_instance(
        at=time.time(), StudyInstanceUID="1.2.6", SOPInstanceUID="1.2.6.1", StudyDescription="Hoden",
        StudyDate="20260101", Modality="US",
    )  # fmt: skip
    with ledger.write() as tx:
        studies.add_instance(tx, image, own=False, priority=0, timing=TIMING, now=time.time())
        note = rejections.Note("1.2.7.9", "113001", frozenset({"1.2.4.1"}))
        rejections.apply(tx, note, "1.2.4", time.time())
        for uid in ("1.2.4", "1.2.6"):
            assemble.complete(tx, uid, 1.0)
        waiting = job.c.study_uid == "1.2.6", job.c.stage == Stage.ROUTE
        payload = json.dumps({"clinical": Gathered((said,)).to_json()})
        tx.execute(job.update().where(*waiting).values(payload=payload))
    loaded = load(config)
    values = ClinicalValues(wanted_of(loaded.engines.path), loaded.clinical)
    stage = RouteStage(loaded, ledger, Path, values.known, Log.null(), NullRecorder())
    while stage.run_once():
        pass
    with ledger.read() as tx:
        codes = {v["route"]: v["refusal"] for v in inspect.verdicts(tx, "1.2.4", 1)}
        runs = {v["route"]: v["runs"] for v in inspect.verdicts(tx, "1.2.6", 1)}
    assert codes["renal-ceus"]["code"] == "IMAGE_REJECTED" and runs["testis-noa"]
    answer = asked(capsys, config)
    assert (answer["compared"], answer["studies"]) == (2, [])


def test_it_writes_nothing(config: Path, ledger: Ledger, new: Path, capsys: Any) -> None:
    with ledger.read() as tx:
        before = list(tx.connection.dbapi_connection.iterdump())  # type: ignore[union-attr]
    asked(capsys, config, "--with", str(new))
    with ledger.read() as tx:
        assert list(tx.connection.dbapi_connection.iterdump()) == before  # type: ignore[union-attr]


def test_a_study_whose_headers_are_gone_is_counted(config: Path, ledger: Ledger, new: Path, capsys: Any) -> None:
    with ledger.write() as tx:
        studies.expire(tx, "1.2.3", time.time())
    answer = asked(capsys, config, "--with", str(new))
    assert (answer["compared"], answer["without_headers"]) == (1, 1)


@pytest.mark.parametrize("since", ["7", "d", "0d", "-1d", "1y", "7 d", "99999999d"])
def test_a_wrong_time_is_wrong_usage(config: Path, since: str, capsys: Any) -> None:
    assert main(["replay", f"--since={since}", "--config", str(config)]) == 2
    assert "--since" in capsys.readouterr().err


def test_times() -> None:
    assert [seconds_of(t) for t in ("30m", "12h", "7d", "2w")] == [1800, 43200, 604800, 1209600]


def test_faulty_new_rules_and_no_ledger(config: Path, new: Path, capsys: Any) -> None:
    assert main(["replay", "--with", str(new), "--config", str(config)]) == 1
    assert "no ledger" in capsys.readouterr().err
    new.write_text(new.read_text().replace("Knoten\n", "(a+)+$\n", 1))
    assert main(["replay", "--with", str(new), "--config", str(config)]) == 78
    assert "regex" in capsys.readouterr().err


def test_explain_file_keeps_its_shape_and_says_as_whom_it_was_sent(
    config: Path, shared_data: Path, capsys: Any
) -> None:
    file = shared_data / "us" / "philips_kidney_still_gray.dcm"
    shape = json.loads((SCHEMAS / "explain-files.v1.schema.json").read_text())
    command = ["explain", "--json", "--config", str(config), "--called-ae", "RENAL_AI", "--file", str(file)]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, shape)
    renal = next(v for v in answer["studies"][0]["verdicts"] if v["route"] == "renal-ceus")
    assert renal["established"]
    assert "MISSING" in {check["verdict"] for check in renal["evidence"]}
    assert main([*command, str(config)]) == 1
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, shape)
    assert [u["file"] for u in answer["unreadable"]] == [str(config)]


def test_the_head_study_never_reaches_the_liver(config: Path, shared_data: Path) -> None:
    """Not even sent to the liver's own AE title, in any order."""
    from dicom_node.store.header import read_header

    headers = [h for p in sorted((shared_data / "mr").rglob("*.dcm")) if _is_head(h := read_header(p))]
    assert len(headers) > 1
    instances = [_instance(n, header, called="LIVER_AI") for n, header in enumerate(headers)]
    for uid in {i.study_instance_uid for i in instances}:
        group = [i for i in instances if i.study_instance_uid == uid]
        verdicts = {v.route: v for v in evaluate_all(load(config).routes, Study.from_instances(uid, 1, group), {})}
        assert not verdicts["liver-dce"].matched, uid


def _is_head(header: Header) -> bool:
    said = " ".join(header.text(k) for k in ("BodyPartExamined", "StudyDescription", "SeriesDescription")).casefold()
    return any(word in said for word in ("head", "brain", "hirn", "kopf"))


def _instance(number: int, header: Header, called: str = "NODE") -> Instance:
    return Instance(f"{number:032x}", header, "", "", Path(f"{number}"), "MOD", called, "", "", 0.0)


TEXTS = st.sampled_from(
    [
        "CEUS kidney renal mass",
        "Sono Schilddrüse, verkalkter Knoten",
        "肝脏增强 肝癌",
        "MRI brain",
        "biopsy",
        "Hoden",
        "",
        "US",
    ]
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), TEXTS, TEXTS, st.sampled_from(["US", "MR"])), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_a_verdict_never_depends_on_the_order_of_the_instances(said: list[Any], chance: Any) -> None:
    routes = load(REPOSITORY / "config.yaml").routes
    instances = [
        _instance(
            n,
            Header.from_json(
                {"StudyInstanceUID": "1.2", "SeriesInstanceUID": f"1.2.{series}", "SOPInstanceUID": f"1.2.9.{n}"}
                | {k: v for k, v in (("StudyDescription", study), ("SeriesDescription", text)) if v}
                | {"Modality": modality, "InstanceNumber": 1}
            ),
        )
        for n, (series, study, text, modality) in enumerate(said)
    ]
    shuffled = list(instances)
    chance.shuffle(shuffled)
    first, second = (
        [v.to_json() for v in evaluate_all(routes, Study.from_instances("1.2", 1, group), {})]
        for group in (instances, shuffled)
    )
    assert first == second

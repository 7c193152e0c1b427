"""Completeness by content: run, hold and give up, by an operator's word, by time, by what the PACS says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dce
import pytest
from pydicom.dataset import Dataset

from dicom_node import config
from dicom_node.errors import QueryError
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.result import ClinicalInput, Code
from dicom_node.route import body_part, contrast, missing_requirements
from dicom_node.route.complete import RECHECK_SECONDS, CompleteStage
from dicom_node.route.stage import RouteStage
from dicom_node.service.orders import apply_command
from dicom_node.store import inspect, jobs, studies
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Stage

UID, SERIES = "1.2.3", "1.2.3.0"
TIMING = studies.Timing(60, 6000, "rerun", 3)
QUERY = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104, "attempts": 2, "retry_seconds": 30}


class Pacs:
    """Answers in turn; the last one again and again."""

    def __init__(self, *answers: Mapping[str, int | None] | QueryError) -> None:
        self.answers, self.asked = list(answers), 0

    def series_counts(self, study_uid: str) -> Mapping[str, int | None]:
        assert study_uid == UID
        self.asked += 1
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(said, QueryError):
            raise said
        return said


class Room:
    """One study of one instance, routed; the complete stage with a clock moved by hand."""

    def __init__(self, root: Path, clock, make_instance, pacs: Pacs | None = None, **route: Any) -> None:
        values = {
            "name": "r", "when": {"modality": "US"}, "indication": {"any": [{"called_ae": "NODE"}]}, "engine": "t",
            "deliver": ["near"], "assemble": {"quiet_seconds": 0},
        }  # fmt: skip
        near = {"ae_title": "N", "host": "127.0.0.1", "port": 104}
        data = {"routes": [values | route], "deliver": {"destinations": {"near": near}}, "query": QUERY}
        settings = config.parse(data, file="x", base=root)
        self.clock, self.ledger, self.metrics = clock, Ledger(root, clock=clock), Metrics()
        self.make, self.timing = make_instance, TIMING
        self.clinical: dict[str, ClinicalInput] = {}
        known = lambda _study, _engines, _gathered: self.clinical  # noqa: E731
        self.route = RouteStage(settings, self.ledger, Path, known, Log.null(), self.metrics)
        self.stage = CompleteStage(settings, self.ledger, Path, known, pacs, Log.null(), self.metrics)
        self.add("1.2.3.1")
        self.assemble()

    def add(self, sop: str, **header: object) -> None:
        with self.ledger.write() as tx:
            made = self.make(self.clock(), SOPInstanceUID=sop, **header)
            studies.add_instance(tx, made, own=False, priority=0, timing=self.timing, now=self.clock())

    def assemble(self) -> None:
        from dicom_node import assemble

        with self.ledger.write() as tx:
            assemble.complete(tx, UID, self.clock())
        while self.route.run_once() or self.stage.run_once():
            pass

    def later(self, seconds: float) -> None:
        self.clock.advance(seconds)
        while self.stage.run_once():
            pass

    def told(self) -> dict[str, Any]:
        with self.ledger.read() as tx:
            answer = inspect.explain(tx, UID)
        assert answer is not None
        return answer

    def last(self) -> tuple[str, str | None, str | None]:
        """Stage, outcome (or the state while it waits) and code of the newest answer."""
        newest = self.told()["outcomes"][-1]
        return newest["stage"], newest["outcome"] or newest["state"], newest["code"]

    def events(self) -> list[str]:
        return [e["code"] for e in self.told()["events"]]

    def infer(self) -> jobs.Job | None:
        with self.ledger.write() as tx:
            return jobs.claim(tx, Stage.INFER, self.clock(), 60)

    def report(self) -> jobs.Job | None:
        with self.ledger.write() as tx:
            return jobs.claim(tx, Stage.REPORT, self.clock(), 60)


@pytest.fixture
def make_room(tmp_path, clock, make_instance):
    return lambda pacs=None, **route: Room(tmp_path, clock, make_instance, pacs, **route)


TWO = {"min_instances": 2}


def test_what_is_complete_goes_to_inference(make_room):
    room = make_room(require={"min_instances": 1})
    job = room.infer()
    assert job is not None and job.payload == {"series": [SERIES]}


def test_give_up_is_an_answer_with_a_notice_a_metric_and_the_sr(make_room):
    room = make_room(require=TWO, if_incomplete="give_up", not_assessable="sr")
    assert room.last() == ("infer", "REFUSED", "INCOMPLETE")
    assert "GIVEN_UP_INCOMPLETE" in room.events()
    assert room.metrics.value("dicom_node_incomplete_total", route="r", decision="given_up") == 1
    assert room.metrics.value("dicom_node_refusals_total", route="r", code="INCOMPLETE") == 1
    report = room.report()
    assert report is not None and report.payload["refusal"]["code"] == "INCOMPLETE"
    assert room.told()["state"] == "PROCESSING"


def test_run_goes_on_and_says_what_was_missing(make_room):
    room = make_room(require=TWO, if_incomplete="run")
    job = room.infer()
    assert job is not None and job.payload["incomplete"] == ["min_instances 2 (there are 1)"]
    assert "RUN_INCOMPLETE" in room.events()


def test_a_held_study_waits_and_more_instances_free_it(make_room):
    room = make_room(require=TWO, if_incomplete="hold")
    assert room.last() == ("complete", "READY", "HELD_INCOMPLETE")
    assert room.told()["state"] == "HELD" and room.infer() is None
    room.later(5 * RECHECK_SECONDS)
    assert room.events().count("HELD_INCOMPLETE") == 1  # said once, not every minute
    room.add("1.2.3.2")
    room.assemble()
    assert room.infer() is not None
    assert room.told()["state"] == "PROCESSING"


def test_late_instances_free_a_held_study_even_where_late_ones_are_ignored(make_room):
    room = make_room(require=TWO, if_incomplete="hold")
    room.timing = studies.Timing(60, 6000, "ignore", 3)
    room.add("1.2.3.2")
    with room.ledger.read() as tx:
        assert studies.next_due(tx) == room.clock() + 60


def test_an_operator_frees_a_held_study(make_room):
    room = make_room(require=TWO, if_incomplete="hold")
    assert "1 held jobs go on" in apply_command(room.ledger, {"kind": "complete", "study": UID})["text"]
    room.later(0)
    job = room.infer()
    assert job is not None and job.payload["incomplete"]
    assert "an operator said so" in str(room.told()["events"])


def test_a_hold_is_bounded(make_room):
    room = make_room(require=TWO, if_incomplete="hold", hold_hours=2)
    room.later(7000)
    assert room.last()[2] == "HELD_INCOMPLETE"
    room.later(300)
    assert room.last() == ("infer", "REFUSED", "INCOMPLETE")
    assert "held for 2 h" in room.told()["outcomes"][-1]["detail"]


def test_a_clinical_value_that_comes_later_frees_a_held_study(make_room):
    room = make_room(require={"clinical": ["FSH"]}, if_incomplete="hold")
    assert room.told()["state"] == "HELD"
    room.clinical = {"FSH": ClinicalInput("FSH", Code("15067-2", "LN", "Follitropin"), 12.0, "[IU]/L", "", "FHIR")}
    room.later(RECHECK_SECONDS)
    assert room.infer() is not None


def test_phases_that_the_headers_do_not_establish_are_missing(make_room):
    room = make_room(require={"phases": ["arterial"]})
    assert room.last() == ("infer", "REFUSED", "INCOMPLETE")
    assert "phases arterial (NO_SUITABLE_IMAGE" in room.told()["outcomes"][-1]["detail"]


def test_phases_are_told_from_the_headers(tmp_path):
    d = dce.Dce()

    def mark(ds: Dataset, phase: int, _slice: int) -> None:
        ds.SeriesDescription = ("native", "arterial", "portal venous", "delayed")[phase]
        ds.AcquisitionTime = dce.tm(d.time(phase))

    study = dce.study(tmp_path, d.datasets(mark, one_series=False))
    wanted = config.Require(phases=("Arterial", "delayed", "hepatobiliary"))
    assert missing_requirements(wanted, study, {}) == ["phase hepatobiliary"]
    first = [study.series[0].series_instance_uid]
    (said,) = missing_requirements(wanted, study, {}, first)
    assert said.startswith("phases arterial, delayed, hepatobiliary (PHASE_MISSING")


def test_phases_are_named_by_the_rules_of_the_site(tmp_path):
    d = dce.Dce()

    def mark(ds: Dataset, phase: int, _slice: int) -> None:
        ds.AcquisitionTime = dce.tm(d.time(phase))

    study = dce.study(tmp_path, d.datasets(mark, one_series=False))
    wanted = config.Require(phases=("delayed",))
    assert missing_requirements(wanted, study, {}) == []
    later = config.Config.model_validate({"phases": {"windows": {"delayed": [200, 330]}}}).phases
    assert missing_requirements(wanted, study, {}, (), later) == ["phase delayed"]


# -- the PACS


@pytest.mark.parametrize("there", [{SERIES: 1}, {SERIES: 0}, {SERIES: None}, {}, {SERIES: 1, "1.9": 500}])
def test_a_pacs_that_has_no_more_or_does_not_say_is_no_reason_to_wait(make_room, there):
    room = make_room(Pacs(there), require={"series_count": True})
    assert room.infer() is not None


def test_more_in_the_pacs_is_asked_again_and_then_counts(make_room):
    pacs = Pacs({SERIES: 4})
    room = make_room(pacs, require={"series_count": True})
    assert room.infer() is None and pacs.asked == 1 and "COUNT_DIFFERS" in room.events()
    room.later(30)
    assert pacs.asked == 2 and room.last() == ("infer", "REFUSED", "INCOMPLETE")
    assert "4 instances in the PACS, 1 here" in room.told()["outcomes"][-1]["detail"]


def test_what_arrives_while_it_waits_frees_it(make_room):
    room = make_room(Pacs({SERIES: 2}), require={"series_count": True})
    room.add("1.2.3.2")
    room.assemble()
    assert room.infer() is not None


def test_a_pacs_that_does_not_answer_is_asked_a_bounded_number_of_times_and_never_taken_for_a_yes(make_room):
    pacs = Pacs(QueryError("no association"))
    room = make_room(pacs, require={"series_count": True}, if_incomplete="hold")
    room.later(30)
    assert room.last() == ("complete", "READY", "HELD_INCOMPLETE") and "COUNT_UNKNOWN" in room.events()
    pacs.answers = [{SERIES: 1}]
    room.later(RECHECK_SECONDS)
    assert room.infer() is not None


def test_a_check_without_anybody_to_ask_is_a_configuration_error(tmp_path):
    route = {
        "name": "r", "when": {"modality": "US"}, "indication": {"any": [{"roi": True}]}, "engine": "t",
        "require": {"series_count": True},
    }  # fmt: skip
    with pytest.raises(config.ConfigError, match=r"routes\.0\.require\.series_count.*query"):
        config.parse({"routes": [route]}, file="x", base=tmp_path)


def test_what_the_first_study_would_load_is_loaded_before_it_comes(tmp_path, clock, make_instance):
    tables = (body_part._patterns, contrast._patterns)
    for table in tables:
        table.cache_clear()
    assert not Room(tmp_path, clock, make_instance).route.run_once()  # an idle turn
    assert [table.cache_info().currsize for table in tables] == [1, 1]

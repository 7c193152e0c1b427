"""Infer: an answer is not a fault, a fault costs one attempt, and no demonstration result slips out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dicom_node import config
from dicom_node.clinical import Collected
from dicom_node.errors import NodeStoppingError, WorkerError
from dicom_node.infer import InferStage
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.result import ClinicalInput, Code, Finding, Provenance, Result, Score
from dicom_node.store import inspect, jobs, studies
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Stage
from dicom_node.store.schema import job as job_table
from dicom_node.worker import Reply

ABOUT = {"version": "1", "digest": "d" * 64, "intended_use": "demonstration", "algorithm": "A"}


def result(intended_use: str = "demonstration") -> Result:
    code = Code("1", "99INFER", "x")
    finding = Finding("Lesion 1", code, code, None, "", code, code, (Score(code, 0.9),), (), None, "none")
    return Result(
        "r", (finding,), Provenance("t", "1", "d" * 64, intended_use, "onnx", "fp32", "A"), (), ("1.2.3.1",), "in", "AI"
    )


def said(intended_use: str = "demonstration") -> Reply:
    return Reply("RESULT", result(intended_use).to_json(), None, ABOUT, "", "in")


class Room:
    def __init__(self, root: Path, clock, make_instance, **route: object) -> None:
        destinations = {
            "near": {"ae_title": "N", "host": "127.0.0.1", "port": 104},
            "far": {"ae_title": "F", "host": "10.0.0.1", "port": 104},
        }
        values = {"name": "r", "when": {"modality": "US"}, "indication": {"any": [{"roi": True}]}, "engine": "t"}
        data = {"routes": [values | route], "deliver": {"destinations": destinations}, "infer": {"max_attempts": 2}}
        settings = config.parse(data, file="x", base=root)
        self.clock, self.ledger, self.answers = clock, Ledger(root, clock=clock), []
        self.previous: list[str | None] = []
        self.metrics = Metrics()
        self.known = Collected()
        self.given: tuple[ClinicalInput, ...] = ()
        self.stage = InferStage(
            settings,
            self.ledger,
            Path,
            self._predict,
            lambda _study, _engine, _gathered: self.known,
            Log.null(),
            self.metrics,
        )
        with self.ledger.write() as tx:
            timing = studies.Timing(60, 600, "rerun", 3)
            studies.add_instance(tx, make_instance(clock()), own=False, priority=0, timing=timing, now=clock())
        self.put(1)

    def put(self, revision: int) -> None:
        with self.ledger.write() as tx:
            jobs.put(
                tx, study_uid="1.2.3", revision=revision, stage=Stage.INFER, route="r", priority=0, now=self.clock()
            )

    def _predict(self, _job, _route, _study, previous, clinical):
        self.previous.append(previous)
        self.given = clinical
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, *answers) -> dict:
        self.answers = list(answers)
        for _ in answers:
            self.stage.run_once()
            self.clock.advance(10)
        with self.ledger.read() as tx:
            return inspect.explain(tx, "1.2.3")["outcomes"][-1]

    def report(self) -> jobs.Job | None:
        with self.ledger.write() as tx:
            return jobs.claim(tx, Stage.REPORT, self.clock(), 60)


@pytest.fixture
def make_room(tmp_path, clock, make_instance):
    return lambda **route: Room(tmp_path, clock, make_instance, **route)


def test_a_result_goes_to_report_with_its_provenance(make_room):
    room = make_room(deliver=["near"])
    outcome = room.run(said())
    assert (outcome["outcome"], outcome["engine"], outcome["package"]) == ("RESULT", "t", "1")
    assert room.report().payload["destinations"] == ["near"]


@pytest.mark.parametrize(
    ("intended_use", "deliver", "outcome", "code", "sent"),
    [
        ("demonstration", ["far"], "SHADOW", "DEMONSTRATION_PACKAGE", None),
        ("demonstration", ["near", "far"], "RESULT", None, ["near"]),
        ("research", ["near", "far"], "RESULT", None, ["near", "far"]),
    ],
)
def test_demonstration_results_stay_on_the_machine(make_room, intended_use, deliver, outcome, code, sent):
    room = make_room(deliver=deliver)
    answer = room.run(said(intended_use))
    assert (answer["outcome"], answer["code"]) == (outcome, code)
    report = room.report()
    assert (None if report is None else report.payload["destinations"]) == sent


def test_the_answer_wakes_the_stages_and_the_claim_does_not(make_room):
    room = make_room(deliver=["near"])
    woken = []
    room.ledger.on_commit = lambda stages: woken.append((stages, len(room.answers)))
    room.run(said())
    assert woken == [(("report",), 0)], "once, after the answer: each stage that is woken holds up the one with work"


def test_shadow_mode_sends_nothing_whatever_the_package(make_room):
    room = make_room(deliver=["near"], mode="shadow")
    assert room.run(said("research"))["code"] == "ROUTE_SHADOW"
    assert room.report() is None


def test_a_refusal_is_an_answer(make_room):
    refused = Reply("REFUSED", None, {"code": "OUT_OF_DISTRIBUTION", "detail": "far"}, ABOUT, "", "in")
    room = make_room(deliver=["near"], not_assessable="sr")
    outcome = room.run(refused)
    assert (outcome["state"], outcome["outcome"], outcome["code"]) == ("DONE", "REFUSED", "OUT_OF_DISTRIBUTION")
    assert room.report().payload["package"] == ABOUT


def test_a_fault_costs_one_attempt_and_the_last_one_is_dead(make_room):
    room = make_room(deliver=["near"])
    assert room.run(WorkerError("crash"))["state"] == "READY"
    room.clock.advance(60)
    outcome = room.run(Reply("FAULT", error="NaN"))
    assert (outcome["state"], outcome["detail"]) == ("DEAD", "NaN")


def test_stopping_costs_no_attempt(make_room):
    room = make_room(deliver=["near"])
    room.run(NodeStoppingError())
    with room.ledger.write() as tx:
        assert jobs.recover(tx) == 1
    outcome = room.run(said())
    assert outcome["outcome"] == "RESULT"


def test_a_later_revision_is_given_the_earlier_input_and_may_be_unchanged(make_room):
    room = make_room(deliver=["near"])
    room.run(said())
    assert room.report() is not None
    room.put(2)
    outcome = room.run(Reply("UNCHANGED", package=ABOUT, input_digest="in"))
    assert room.previous == [None, "in"]
    assert (outcome["revision"], outcome["outcome"], outcome["code"]) == (2, "RESULT", "UNCHANGED")
    assert room.report() is None


def test_drift_is_watched_on_the_score_that_was_judged(make_room):
    room = make_room(deliver=["near"])
    body = result()
    code = Code("2", "99INFER", "image")
    two = replace(body.findings[0], scores=(Score(Code("1", "99INFER", "x"), 0.9), Score(code, 0.1)))
    room.run(Reply("RESULT", replace(body, findings=(two,)).to_json(), None, ABOUT, "", "in"))
    assert room.metrics.value("dicom_node_probability", route="r") == 1
    assert 'dicom_node_probability_sum{route="r"} 0.9' in room.metrics.exposition().decode()


def test_clinical_values_reach_the_engine_and_what_was_not_usable_reaches_the_report(tmp_path, clock, make_instance):
    room = Room(tmp_path, clock, make_instance, deliver=["near"])
    fsh = ClinicalInput("FSH", Code("15067-2", "LN", "Follitropin"), 12.0, "[IU]/L", "", "DICOM SR")
    room.known = Collected({"FSH": fsh}, ("EDV: the report does not say of which side",))
    room.run(said())
    assert room.given == (fsh,)
    job = room.report()
    assert job is not None
    parameters = job.payload["result"]["provenance"]["parameters"]
    assert parameters["clinical values not used"] == "EDV: the report does not say of which side"


def test_what_the_route_requires_and_the_study_lacked_stands_in_the_report(make_room):
    room = make_room(deliver=["near"])
    with room.ledger.write() as tx:
        tx.execute(job_table.update().values(payload='{"incomplete": ["min_instances 2 (there are 1)"]}'))
    room.run(said())
    job = room.report()
    assert job is not None
    parameters = job.payload["result"]["provenance"]["parameters"]
    assert parameters["required and missing"] == "min_instances 2 (there are 1)"

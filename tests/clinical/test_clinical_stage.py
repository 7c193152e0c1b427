"""Asking outside while the study waits: for whom, how long at most, and that nobody is lost or asked for needlessly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dicom_node import assemble, config
from dicom_node.clinical import ClinicalCode, ClinicalValues, Gathered, Observation
from dicom_node.clinical.stage import ClinicalStage, sources_of
from dicom_node.config_clinical import Clinical
from dicom_node.errors import ClinicalSourceError
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.packages import ClinicalEntry
from dicom_node.route.complete import CompleteStage
from dicom_node.route.stage import RouteStage
from dicom_node.service.operate import explain_text
from dicom_node.service.orders import apply_command
from dicom_node.store import inspect, jobs, rejections, studies
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Stage, job

FSH = ClinicalEntry.model_validate(
    {"name": "FSH", "code": {"value": "15067-2", "scheme": "LN", "meaning": "FSH"}, "unit": "[IU]/L",
     "range": [0.1, 200], "max_age_days": 180}
)  # fmt: skip
AGE = FSH.model_copy(update={"name": "AGE", "code": FSH.code.model_copy(update={"value": "30525-0"})})
SAID = Observation(("15067-2", "LN"), 12.5, "[IU]/L", "", "2025-12-20", ("", ""), "fhir", "FHIR")
DOWN = ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, "no connection", again=True)
BROKEN = ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_INVALID, "a login page", again=False)


class Room:
    """Route, clinical and complete stage on one ledger; `answer` is what the source does."""

    def __init__(
        self, root: Path, clock: Any, make_instance: Any, wanted: Any = (FSH,), wait: float = 600, **route: Any
    ):
        values = {"name": "r", "when": {"modality": "US"}, "indication": {"any": [{"modality": "US"}]}, "engine": "t"}
        self.clock, self.ledger = clock, Ledger(root, clock=clock)
        section = Clinical(sidecar=root, wait_seconds=wait)
        settings = config.parse({"routes": [values | route]}, file="x", base=root)
        clinical = ClinicalValues(lambda engine: wanted if engine == "t" else (), section)
        self.metrics, self.make = Metrics(), make_instance
        self.answer: Any = Gathered((SAID,))
        self.asked: list[float] = []
        path_of = Path
        self.route = RouteStage(
            settings, self.ledger, path_of, clinical.known, Log.null(), self.metrics, asks=clinical.asks
        )
        self.gather = ClinicalStage(
            section, self.ledger, path_of, clinical, Log.null(), self.metrics, sources=[("FHIR", self._ask)]
        )
        self.complete = CompleteStage(
            settings, self.ledger, path_of, clinical.known, None, Log.null(), self.metrics, asks=clinical.asks
        )
        self.clinical = clinical

    def _ask(self, subject: Any, codes: Any, days: float) -> Gathered:
        self.asked.append(self.clock())
        assert (codes, days) == ((("15067-2", "LN"),), 180)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def study(self, uid: str = "1.2.3", also: str = "", **header: Any) -> None:
        """One image, and one of a series of its own if `also`."""
        with self.ledger.write() as tx:
            timing = studies.Timing(60, 600, "rerun", 3)
            for sop in filter(None, (f"{uid}.1", also)):
                values = {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{sop}.0", "SOPInstanceUID": sop}
                made = self.make(self.clock(), **(values | {"StudyDate": "20260101"} | header))
                studies.add_instance(tx, made, own=False, priority=0, timing=timing, now=self.clock())
            assemble.complete(tx, uid, self.clock())

    def reject(self, sop: str) -> None:
        note = rejections.Note(f"{sop}.9", "113001", frozenset({sop}))
        with self.ledger.write() as tx:
            rejections.apply(tx, note, "1.9", self.clock())

    def work(self) -> None:
        while self.route.run_once() or self.gather.run_once() or self.complete.run_once():
            pass

    def infer_job(self, uid: str = "1.2.3") -> Any:
        """The infer job of a study once there is one."""
        with self.ledger.write() as tx:
            row = tx.execute(job.select().where(job.c.study_uid == uid, job.c.stage == Stage.INFER)).mappings().first()
            return None if row is None else dict(row)

    def values(self, uid: str = "1.2.3") -> Any:
        with self.ledger.read() as tx:
            study = studies.load_study(tx, uid, 1, Path)
        return self.clinical.for_engine(study, "t", json.loads(self.infer_job(uid)["payload"])["clinical"])

    def told(self, uid: str = "1.2.3") -> Any:
        with self.ledger.read() as tx:
            return inspect.explain(tx, uid)

    def open_jobs(self, uid: str = "1.2.3") -> list[str]:
        with self.ledger.read() as tx:
            query = job.select().where(job.c.study_uid == uid, job.c.state != "DONE")
            return sorted(row.stage for row in tx.execute(query))

    def parked(self, uid: str) -> int:
        with self.ledger.read() as tx:
            query = job.select().where(job.c.study_uid == uid, job.c.run_at >= jobs.PARKED, job.c.state == "READY")
            return len(list(tx.execute(query)))

    def events(self, uid: str = "1.2.3") -> dict[str, str]:
        with self.ledger.read() as tx:
            return {e["code"]: e["text"] for e in inspect.explain(tx, uid)["events"]}


@pytest.fixture
def room(tmp_path: Path, clock: Any, make_instance: Any) -> Any:
    return lambda **how: Room(tmp_path, clock, make_instance, **how)


def test_the_study_is_inferred_with_what_the_source_said(room: Any) -> None:
    r = room()
    r.study()
    r.work()
    assert r.values().values["FSH"].value == 12.5
    assert r.events()["CLINICAL_GATHERED"] == "FHIR: 1 values"
    assert len(r.asked) == 1


@pytest.mark.parametrize(
    "how",
    [
        {"when": {"modality": "MR"}},
        {"indication": {"any": [{"called_ae": "OTHER"}]}},
        {"engine": "u"},
        {"wanted": (AGE,)},
    ],
    ids=["no route", "no indication", "engine wants nothing", "age is the study's own"],
)
def test_nobody_is_asked_for_a_patient_without_need(room: Any, how: dict[str, Any]) -> None:
    r = room(**how)
    r.study()
    r.work()
    assert r.asked == [] and r.events().keys() & {"ROUTED", "UNROUTED"}


def test_a_value_from_outside_may_establish_the_indication(room: Any) -> None:
    r = room(indication={"any": [{"clinical": "FSH"}]})
    r.study()
    r.work()
    assert r.events()["ROUTED"] == "r: taken"


def test_a_source_that_comes_back_within_the_wait_is_used(room: Any, clock: Any) -> None:
    r = room()
    r.answer = DOWN
    r.study()
    r.work()
    assert r.infer_job() is None
    assert "CLINICAL_SOURCE_UNREACHABLE(FHIR): no connection" in r.events()["CLINICAL_WAITING"]
    r.answer = Gathered((SAID,))
    clock.advance(6)
    r.work()
    assert r.values().values["FSH"].value == 12.5


def test_a_source_that_stays_away_delays_to_the_bound_and_is_named(room: Any, clock: Any) -> None:
    r = room()
    r.answer = DOWN
    r.study()
    started = clock()
    while r.infer_job() is None:
        r.work()
        clock.advance(10)
        assert clock() - started < 620
    found = r.values()
    assert clock() - started >= 600 and found.values == {}
    assert found.problems == ("CLINICAL_SOURCE_UNREACHABLE(FHIR): no connection",)
    assert len(r.asked) <= 16  # 5, 10, 20, 40, 60, 60, ...


def test_many_studies_do_not_wait_for_one_anothers_time_limits(room: Any, clock: Any) -> None:
    """A question that runs into its limit costs 10 s; asked for every study, the last would wait for two minutes."""
    r = room(wait=60)
    r.answer = DOWN
    ask = r.gather._sources[0].ask

    def slow(*question: Any) -> Gathered:
        clock.advance(10)
        return ask(*question)

    r.gather._sources[0].ask = slow
    uids = [f"1.2.{n}" for n in range(12)]
    for uid in uids:
        r.study(uid)
    started = clock()
    while any(r.infer_job(uid) is None for uid in uids):
        r.work()
        clock.advance(5)
        assert clock() - started < 90


def test_an_answer_that_will_not_be_better_is_not_waited_for(room: Any) -> None:
    r = room()
    r.answer = BROKEN
    r.study()
    r.work()
    assert r.values().problems == ("CLINICAL_SOURCE_INVALID(FHIR): a login page",)


def test_whether_a_source_answers_is_measured(room: Any, clock: Any) -> None:
    r = room()

    def answering() -> float:
        return float(r.metrics.value("dicom_node_clinical_source_answering", source="FHIR"))

    r.answer = DOWN
    r.study()
    r.work()
    assert answering() == 0
    r.answer = Gathered((SAID,))
    clock.advance(6)
    r.work()
    assert answering() == 1
    r.answer = BROKEN
    r.study("1.2.9")
    r.work()
    assert answering() == 0


def test_without_a_wait_the_source_is_asked_once(room: Any) -> None:
    r = room(wait=0)
    r.answer = DOWN
    r.study()
    r.work()
    assert len(r.asked) == 1 and r.values().problems != ()


def test_an_operator_may_let_the_study_go_on(room: Any, clock: Any) -> None:
    r = room()
    r.answer = DOWN
    r.study()
    r.work()
    assert apply_command(r.ledger, {"kind": "complete", "study": "1.2.3"})["text"] == "1 held jobs go on"
    r.work()
    assert r.infer_job()["state"] == "READY"
    clock.advance(700)
    r.work()
    assert len(r.asked) == 1
    with r.ledger.read() as tx:
        left = [row.stage for row in tx.execute(job.select().where(job.c.state != "DONE"))]
    assert left == ["infer"]


def test_a_required_value_is_looked_for_again_then_the_route_decides(room: Any, clock: Any) -> None:
    r = room(require={"clinical": ["fsh"]}, wait=100)
    r.answer = Gathered()
    r.study()
    r.work()
    assert r.infer_job() is None and "CLINICAL_INPUT_MISSING(fsh)" in r.events()["CLINICAL_WAITING"]
    clock.advance(31)
    r.work()
    assert len(r.asked) == 2
    r.answer = Gathered((SAID,))
    clock.advance(31)
    r.work()
    assert r.infer_job()["state"] == "READY"

    r.answer = Gathered()
    r.study("1.2.9")
    r.work()
    clock.advance(101)
    r.work()
    made = r.infer_job("1.2.9")
    assert (made["outcome"], made["code"], made["detail"]) == ("REFUSED", "INCOMPLETE", "missing: clinical fsh")
    assert "CLINICAL_INPUT_MISSING(fsh)" in r.events("1.2.9")["CLINICAL_GATHERED"]


def test_the_wait_is_told_and_an_operator_keeps_what_was_said_so_far(room: Any) -> None:
    r = room(require={"clinical": ["FSH", "other"]}, if_incomplete="hold")
    r.study()
    r.work()
    (told,) = r.told()["outcomes"]
    assert (told["stage"], told["state"], told["code"]) == ("clinical", "READY", "CLINICAL_WAITING")
    assert "CLINICAL_INPUT_MISSING(other)" in told["detail"]
    assert "every route, revision 1: READY (CLINICAL_WAITING)" in explain_text(r.told())
    assert r.told()["state"] == "PROCESSING"
    assert apply_command(r.ledger, {"kind": "complete", "study": "1.2.3"})["text"] == "1 held jobs go on"
    r.clock.advance(60)
    r.work()
    assert len(r.asked) == 1 and r.values().values["FSH"].value == 12.5
    assert json.loads(r.infer_job()["payload"])["incomplete"] == ["clinical other"]
    assert "an operator said so" in r.events()["RUN_INCOMPLETE"]


def test_a_held_study_is_asked_for_until_the_value_is_there(room: Any, clock: Any) -> None:
    r = room(require={"clinical": ["FSH"]}, if_incomplete="hold", hold_hours=2, wait=60)
    r.answer = Gathered()
    r.study()
    for _ in range(10):
        r.work()
        clock.advance(31)
    (told,) = r.told()["outcomes"]
    assert (told["stage"], told["code"], r.told()["state"]) == ("complete", "HELD_INCOMPLETE", "HELD")
    asked = len(r.asked)
    r.study("1.2.9")  # whoever comes meanwhile is asked for first
    r.answer = Gathered((SAID,))
    clock.advance(301)
    r.route.run_once()
    r.gather.run_once()
    assert r.parked("1.2.9") == 0 and r.told()["state"] == "HELD"
    r.work()
    assert len(r.asked) == asked + 2
    assert r.values().values["FSH"].value == 12.5 and r.told()["state"] == "PROCESSING"
    assert r.open_jobs() == ["infer"]


@pytest.mark.parametrize("end", ["time", "operator", "rejected"])
def test_nobody_is_asked_for_a_study_that_is_not_held_any_more(room: Any, clock: Any, end: str) -> None:
    r = room(require={"clinical": ["FSH"]}, if_incomplete="hold", hold_hours=1, wait=0)
    r.answer = DOWN
    r.study()
    r.work()
    clock.advance(60)
    r.work()
    assert r.open_jobs() == ["clinical", "complete"] and r.told()["state"] == "HELD"
    if end == "time":
        clock.advance(3600)
    elif end == "operator":
        apply_command(r.ledger, {"kind": "complete", "study": "1.2.3"})
    else:
        r.reject("1.2.3.1")
    asked = len(r.asked)
    while r.complete.run_once():
        pass
    assert "clinical" not in r.open_jobs()
    clock.advance(7200)
    r.work()
    assert len(r.asked) == asked


def test_rejected_images_are_left_out_before_anybody_is_asked_and_while_it_waits(room: Any, clock: Any) -> None:
    """Of two series one is rejected before: the other goes on. Rejected while a value is waited for: nothing runs."""
    r = room(require={"clinical": ["FSH"]})
    r.reject("1.2.3.1")
    r.study(also="1.2.3.2")
    r.answer = DOWN
    r.work()
    assert len(r.asked) == 1 and r.infer_job() is None
    r.answer = Gathered((SAID,))
    clock.advance(61)
    r.work()
    assert r.infer_job()["state"] == "READY" and json.loads(r.infer_job()["payload"])["series"] == ["1.2.3.2.0"]

    r.reject("1.2.8.1")
    r.study("1.2.8")
    r.work()
    assert r.infer_job("1.2.8")["code"] == "IMAGE_REJECTED" and len(r.asked) == 2

    r.answer = DOWN
    r.study("1.2.9")
    r.work()
    r.reject("1.2.9.1")
    clock.advance(601)
    r.work()
    assert r.infer_job("1.2.9")["code"] == "IMAGE_REJECTED" and r.open_jobs("1.2.9") == []


def test_a_newer_revision_takes_the_waiting_study_over(room: Any, clock: Any) -> None:
    r = room()
    r.answer = DOWN
    r.study()
    r.work()
    with r.ledger.write() as tx:
        jobs.supersede(tx, "1.2.3", 2, clock())
        jobs.put(tx, study_uid="1.2.3", revision=2, stage=Stage.ROUTE, route="", priority=0, now=clock())
    r.answer = Gathered((SAID,))
    clock.advance(6)
    r.work()
    assert r.infer_job()["revision"] == 2


def test_what_a_crash_interrupts_is_asked_again(room: Any, clock: Any) -> None:
    r = room()
    r.study()
    r.route.run_once()
    with r.ledger.write() as tx:
        assert jobs.claim(tx, Stage.CLINICAL, clock(), 90) is not None  # and here the process ends
    with r.ledger.write() as tx:
        assert jobs.recover(tx) == 1
    r.work()
    assert r.values().values["FSH"].value == 12.5


def test_every_code_has_a_sentence_and_no_source_is_asked_that_is_not_configured(tmp_path: Path) -> None:
    assert all(code.sentence.endswith(".") for code in ClinicalCode)
    assert sources_of(Clinical()) == []
    fhir = {"base_url": "https://x/r4", "identifier_systems": {"": "urn:x"}}
    both = Clinical.model_validate({"sidecar": tmp_path, "fhir": fhir})
    assert [name for name, _ in sources_of(both)] == ["FHIR", "sidecar"]
    assert not ClinicalValues(lambda _engine: (FSH,)).asks("t")

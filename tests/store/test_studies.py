"""Studies: timers, duplicates, patient identity, loop guard, retention."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.service.operate import status_text
from dicom_node.store import deliveries, inspect, jobs, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.jobs import Ending
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Outcome, Stage, delivery, job, study, withdrawal
from dicom_node.store.studies import Timing
from dicom_node.study import Instance

TIMING = Timing(quiet_seconds=60, force_after_seconds=600, late="rerun", max_revisions=2)


@pytest.fixture
def instance(make_instance):
    def make(
        sop: str = "1.2.3.1", digest: str = "a", patient: str = "P1", at: float = 0.0, association: str = "A1"
    ) -> Instance:
        return make_instance(at, digest, association, SOPInstanceUID=sop, PatientID=patient)

    return make


@pytest.fixture
def ledger(tmp_path, clock) -> Ledger:
    return Ledger(tmp_path, clock=clock)


def add(ledger: Ledger, new: Instance, *, own: bool = False, timing: Timing = TIMING) -> str:
    with ledger.write() as tx:
        return studies.add_instance(tx, new, own=own, priority=0, timing=timing, now=ledger.clock())


def row(ledger: Ledger):
    with ledger.read() as tx:
        return tx.execute(study.select()).mappings().one()


def events(ledger: Ledger) -> list[str]:
    with ledger.read() as tx:
        return [e["code"] for e in inspect.explain(tx, "1.2.3")["events"]]


def assembled(ledger: Ledger, revision: int, *, ran: bool = True) -> None:
    with ledger.write() as tx:
        tx.execute(study.update().values(revision=revision, due_at=None, armed_at=None))
        if ran:
            ending = Ending(Outcome.RESULT, input_digest=f"d{revision}")
            jobs.put(
                tx, study_uid="1.2.3", revision=revision, stage=Stage.INFER, route="r", priority=0, now=0, ending=ending
            )


def test_each_instance_moves_the_timer_but_never_past_the_cap(ledger, instance):
    add(ledger, instance("1.1", at=100.0))
    assert row(ledger)["due_at"] == 160.0
    add(ledger, instance("1.2", at=130.0))
    assert row(ledger)["due_at"] == 190.0
    add(ledger, instance("1.3", at=690.0))
    assert row(ledger)["due_at"] == 700.0  # 100 + force_after


def test_the_same_bytes_again_are_no_event_and_do_not_rearm(ledger, instance):
    assert add(ledger, instance(at=100.0)) == "new"
    assembled(ledger, 1)
    before = events(ledger)
    assert add(ledger, instance(at=500.0)) == "duplicate"
    assert row(ledger)["due_at"] is None and events(ledger) == before


def test_other_bytes_under_the_same_uid_newest_is_used_older_is_kept(ledger, tmp_path, instance):
    add(ledger, instance(digest="a", at=100.0))
    assert add(ledger, instance(digest="b", at=110.0)) == "changed"
    with ledger.read() as tx:
        current = studies.load_study(tx, "1.2.3", 1, lambda i: tmp_path / i)
        assert [i.digest for i in current.instances] == ["b"]
        assert len(studies.known_ids(tx)) == 2


def test_instances_that_disagree_on_the_patient_stop_the_study_until_they_agree(ledger, instance):
    add(ledger, instance("1.1", patient="P1", at=100.0))
    add(ledger, instance("1.2", patient="P2", at=101.0))
    assert row(ledger)["hold"] == "PATIENT_CONFLICT"
    with ledger.read() as tx:
        assert studies.due_studies(tx, 1e9) == []
    add(ledger, instance("1.2", digest="corrected", patient="P1", at=102.0))
    assert row(ledger)["hold"] is None
    assert "PATIENT_AGREED" in events(ledger)


def test_an_operator_may_decide_a_conflict_once_and_for_all(ledger, instance):
    add(ledger, instance("1.1", patient="P1"))
    add(ledger, instance("1.2", patient="P2"))
    with ledger.write() as tx:
        studies.set_hold(tx, "1.2.3", None, accept_conflict=True)
    add(ledger, instance("1.3", patient="P1"))
    assert row(ledger)["hold"] is None


def test_our_own_object_coming_back_is_stored_and_does_not_arm(ledger, instance):
    add(ledger, instance("1.1", at=100.0))
    assembled(ledger, 1)
    assert add(ledger, instance("9.9", at=200.0), own=True) == "own"
    assert row(ledger)["due_at"] is None
    with ledger.read() as tx:
        assert len(studies.load_study(tx, "1.2.3", 1, Path).instances) == 1
        assert len(studies.known_ids(tx)) == 2


def test_a_study_of_our_own_objects_only_is_ignored(ledger, instance):
    add(ledger, instance("9.9"), own=True)
    with ledger.read() as tx:
        assert inspect.explain(tx, "1.2.3")["state"] == "IGNORED"


@pytest.mark.parametrize(("late", "armed"), [("rerun", True), ("ignore", False)])
def test_a_late_instance_arms_again_only_if_configured(ledger, late, armed, instance):
    timing = Timing(60, 600, late, 2)
    add(ledger, instance("1.1", at=100.0), timing=timing)
    assembled(ledger, 1)
    add(ledger, instance("1.2", at=1000.0), timing=timing)
    assert (row(ledger)["due_at"] is not None) is armed


def test_revisions_are_bounded_and_only_those_that_ran_count(ledger, instance):
    add(ledger, instance("1.1", at=100.0))
    assembled(ledger, 1, ran=False)
    for n, expected in ((2, True), (3, True), (4, False)):
        add(ledger, instance(f"1.{n}", at=1000.0 * n))
        assert (row(ledger)["due_at"] is not None) is expected
        assembled(ledger, n)
    assert "REVISIONS_EXHAUSTED" in events(ledger)


def test_a_study_waits_for_the_associations_that_delivered_to_it(ledger, instance):
    add(ledger, instance("1.1", at=100.0, association="A1"))
    add(ledger, instance("1.2", at=101.0, association="A2"))
    with ledger.read() as tx:
        (due,) = studies.due_studies(tx, 1000.0)
    assert due.associations == {"A1", "A2"}


def test_retention_spares_what_is_pending_or_dead(ledger, clock, instance):
    now = clock()
    add(ledger, instance("1.1", at=now))
    assembled(ledger, 1)
    with ledger.write() as tx:
        made = Output("5.5", "1.2.3", 1, "r", "sr", "comprehensive3d", "c", "t", "1.5", "f.dcm", "s")
        deliveries.add_output(tx, made, now)
        deliveries.add_delivery(tx, to="pacs", sop_uid="5.5", study_uid="1.2.3", priority=0, now=now)
    clock.advance(30 * 86400)
    with ledger.read() as tx:
        assert studies.expirable(tx, clock()) == []
        (sent,) = deliveries.pending(tx, "pacs", clock())
    with ledger.write() as tx:
        deliveries.dead(tx, sent, 0xA900, "refused", clock())
    with ledger.read() as tx:
        assert studies.expirable(tx, clock() + 1) == []
    with ledger.write() as tx:
        deliveries.retry(tx, "1.2.3", clock())
        deliveries.delivered(tx, sent, 0, clock())
    clock.advance(86400)
    with ledger.write() as tx:
        assert studies.expirable(tx, clock() - 10) == ["1.2.3"]
        ids, outputs, _ = studies.expire(tx, "1.2.3", clock())
    assert len(ids) == 1 and outputs == ["f.dcm"]
    with ledger.read() as tx:
        assert inspect.explain(tx, "1.2.3")["state"] == "DONE"
        assert studies.expirable(tx, clock() + 1e9) == []


def test_status_counts_studies_and_names_the_oldest_undelivered(ledger, clock, instance):
    add(ledger, instance("1.1", at=clock()))
    with ledger.write() as tx:
        deliveries.add_output(tx, Output("5.5", "1.2.3", 1, "r", "sr", "v", "c", "t", "1.5", "f", "s"), clock())
        deliveries.add_delivery(tx, to="pacs", sop_uid="5.5", study_uid="1.2.3", priority=0, now=clock())
        deliveries.pause(tx, "pacs", "calling AE title not recognised", clock(), clock() + 900)
    clock.advance(90)
    with ledger.read() as tx:
        answer = inspect.status(tx, ["pacs", "other"], clock())
    assert answer["states"]["RECEIVING"] == 1
    assert answer["oldest_undelivered_seconds"] == 90.0
    by_name = {d["name"]: d for d in answer["destinations"]}
    assert by_name["pacs"]["paused"] and by_name["pacs"]["pending"] == 1 and not by_name["other"]["paused"]


def test_status_names_every_study_that_needs_a_person_the_longest_waiting_first(ledger, clock, make_instance):
    """Nobody can act on a count; and what needs nobody is not named."""
    reasons = ("HELD_INCOMPLETE", "JOB_DEAD", "DELIVERY_HELD", "DELIVERY_DEAD", "WITHDRAWAL_NEEDED", "PATIENT_CONFLICT")
    for number, why in enumerate(("none", *reasons)):
        uid = f"1.2.{number}"
        add(ledger, make_instance(clock(), uid, StudyInstanceUID=uid, SOPInstanceUID=f"{uid}.1"))
        with ledger.write() as tx:
            if why in ("HELD_INCOMPLETE", "JOB_DEAD"):
                jobs.put(tx, study_uid=uid, revision=1, stage=Stage.COMPLETE, route="r", priority=0, now=clock())
                state = "DEAD" if why == "JOB_DEAD" else "READY"
                tx.execute(job.update().where(job.c.study_uid == uid).values(state=state, code=why))
            elif why != "PATIENT_CONFLICT":
                sop = f"{uid}.5"
                deliveries.add_output(tx, Output(sop, uid, 1, "r", "sr", "v", "c", "t", "1.5", "f", "s"), clock())
                deliveries.add_delivery(tx, to="pacs", sop_uid=sop, study_uid=uid, priority=0, now=clock())
                state = why.removeprefix("DELIVERY_") if why.startswith("DELIVERY") else "DELIVERED"
                tx.execute(delivery.update().where(delivery.c.study_uid == uid).values(state=state))
            if why == "WITHDRAWAL_NEEDED":
                row = {"study_uid": uid, "sop_uid": sop, "destination": "pacs", "code": "113001", "at": clock()}
                tx.execute(withdrawal.insert().values(**row))
            if why == "PATIENT_CONFLICT":
                studies.set_hold(tx, uid, why)
        clock.advance(60)
    with ledger.read() as tx:
        found = inspect.status(tx, ["pacs"], clock())
        fewer, more = inspect.attention(tx, most=2)
    assert [a["why"] for a in found["attention"]] == list(reasons)
    assert [a["study"] for a in found["attention"]] == [f"1.2.{n}" for n in range(1, 7)]
    assert found["attention_left_out"] == 0
    assert ([a["study"] for a in fewer], more) == (["1.2.1", "1.2.2"], 4)
    text = status_text(found)
    assert "PATIENT_CONFLICT" in text and "1.2.6" in text and "1.2.0" not in text

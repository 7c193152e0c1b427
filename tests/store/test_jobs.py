"""Jobs: claimed once, ended fenced, superseded, retried."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.errors import LedgerError
from dicom_node.store import jobs, studies
from dicom_node.store.jobs import Ending
from dicom_node.store.ledger import LEDGER_FILE, Ledger, add_event
from dicom_node.store.schema import JobState, Outcome, Stage, event, job, study


def a_study(ledger: Ledger, uid: str = "1.2.3", hold: str | None = None) -> None:
    with ledger.write() as tx:
        tx.execute(
            study.insert().values(
                uid=uid, revision=1, last_received=0.0, hold=hold, accepted_conflict=False, priority=0, expired=False
            )
        )


def put(
    ledger: Ledger, route: str = "r", *, uid: str = "1.2.3", priority: int = 0, revision: int = 1, age: float = 0
) -> None:
    with ledger.write() as tx:
        jobs.put(
            tx,
            study_uid=uid,
            revision=revision,
            stage=Stage.INFER,
            route=route,
            priority=priority,
            now=ledger.clock() - age,
        )


def claim(ledger: Ledger) -> jobs.Job | None:
    with ledger.write() as tx:
        return jobs.claim(tx, Stage.INFER, ledger.clock(), 60)


@pytest.fixture
def ledger(tmp_path: Path, clock) -> Ledger:
    made = Ledger(tmp_path, clock=clock)
    a_study(made)
    return made


def test_a_job_is_claimed_by_one_hand_only(ledger):
    put(ledger)
    assert claim(ledger) is not None
    assert claim(ledger) is None


def test_a_lost_lease_comes_back_and_the_late_first_run_changes_nothing(ledger, clock):
    put(ledger)
    first = claim(ledger)
    clock.advance(61)
    second = claim(ledger)
    assert second is not None and second.id == first.id and second.attempts == 2
    with ledger.write() as tx:
        assert not jobs.finish(tx, first, Ending(Outcome.RESULT), clock())
    with ledger.write() as tx:
        assert jobs.finish(tx, second, Ending(Outcome.REFUSED, "OUT_OF_DISTRIBUTION"), clock())
    with ledger.read() as tx:
        assert tx.execute(job.select()).mappings().one()["outcome"] == "REFUSED"


def test_a_new_revision_fences_out_the_running_job(ledger, clock):
    put(ledger)
    running = claim(ledger)
    with ledger.write() as tx:
        assert jobs.supersede(tx, "1.2.3", 2, clock()) == 1
        assert not jobs.finish(tx, running, Ending(Outcome.RESULT), clock())


def test_urgent_first_but_a_job_that_waited_long_enough_overtakes(ledger):
    put(ledger, "routine")
    put(ledger, "stat", priority=9)
    put(ledger, "old", age=10 * jobs.AGEING_SECONDS)
    assert [claim(ledger).route for _ in range(3)] == ["old", "stat", "routine"]


def test_nothing_of_a_held_study_moves(ledger, clock):
    a_study(ledger, "9.9", hold="PATIENT_CONFLICT")
    put(ledger, uid="9.9")
    assert claim(ledger) is None
    with ledger.write() as tx:
        studies.set_hold(tx, "9.9", None)
    assert claim(ledger).study_uid == "9.9"


def test_faults_end_in_dead_and_a_person_may_try_again(ledger, clock):
    put(ledger)
    for attempt in range(1, 4):
        claimed = claim(ledger)
        with ledger.write() as tx:
            state = jobs.fail(tx, claimed, "worker died", clock(), max_attempts=3, retry_seconds=5)
        assert state is (JobState.DEAD if attempt == 3 else JobState.READY)
        assert claim(ledger) is None
        clock.advance(6)
    assert claim(ledger) is None
    with ledger.write() as tx:
        assert jobs.retry(tx, "1.2.3", clock()) == 1
    assert claim(ledger).attempts == 1


def test_a_restart_takes_its_leases_back_at_once_and_counts_no_attempt(ledger, tmp_path, clock):
    put(ledger)
    claim(ledger)
    ledger.close()
    again = Ledger(tmp_path, clock=clock)
    with again.write() as tx:
        assert jobs.recover(tx) == 1
    assert claim(again).attempts == 1


def test_putting_a_job_twice_changes_nothing(ledger):
    put(ledger)
    put(ledger)
    assert claim(ledger) is not None and claim(ledger) is None


def test_a_failed_transaction_leaves_nothing(ledger):
    with pytest.raises(ZeroDivisionError), ledger.write() as tx:
        jobs.put(tx, study_uid="1.2.3", revision=1, stage=Stage.INFER, route="x", priority=0, now=0)
        raise ZeroDivisionError
    assert claim(ledger) is None


def test_a_damaged_ledger_is_refused_with_a_text(tmp_path):
    ledger = Ledger(tmp_path)
    for n in range(300):
        put(ledger, f"r{n}")
    ledger.checkpoint()
    ledger.close()
    path = tmp_path / LEDGER_FILE
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 12] = b"\xa5" * (4096 * 9)
    path.write_bytes(bytes(data))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(LedgerError, match=r"damaged|cannot be opened"):
        Ledger(tmp_path)


def test_a_ledger_of_a_newer_version_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.write() as tx:
        tx.exec_driver_sql("UPDATE meta SET value='99' WHERE key='schema'")
    ledger.close()
    with pytest.raises(LedgerError, match="newer version"):
        Ledger(tmp_path)


def test_commits_are_durable_and_one_connection_writes(ledger):
    with ledger.read() as tx:
        assert tx.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert tx.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_claim_that_finds_nothing_wakes_nobody(ledger):
    """Each empty claim once woke all loops, which claimed in turn: half a core on an idle node."""
    woken = []
    ledger.on_commit = woken.append
    assert claim(ledger) is None
    assert woken == []
    put(ledger)
    assert woken == [None], "all"


def test_a_transaction_that_leaves_nothing_to_do_wakes_nobody_and_is_as_durable(ledger):
    put(ledger)
    woken = []
    ledger.on_commit = woken.append
    with ledger.write(wakes=()) as tx:
        add_event(tx, 1.0, None, "TOLD", "x")
    assert woken == []
    with ledger.read() as tx:
        assert tx.execute(event.select().where(event.c.code == "TOLD")).first() is not None
    with ledger.write(wakes=("route",)) as tx:
        add_event(tx, 1.0, None, "TOLD", "x")
    assert woken == [("route",)]

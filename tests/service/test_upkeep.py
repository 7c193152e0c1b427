"""Upkeep: what is finished and old goes, what is pending or dead stays, what a kill left behind is found."""

from __future__ import annotations

import os

import pytest

from dicom_node import config
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.service.upkeep import Upkeep
from dicom_node.store import deliveries, inspect, jobs, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.files import Files
from dicom_node.store.jobs import Ending
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Outcome, Stage, study

DAY = 86400.0


class Room:
    def __init__(self, root, clock, make_instance) -> None:
        self.files, self.ledger, self.clock = Files(root), Ledger(root, clock=clock), clock
        self.metrics = Metrics()
        data = {
            "store": {"keep_days": 7},
            "deliver": {"destinations": {"pacs": {"ae_title": "P", "host": "::1", "port": 1}}},
        }
        settings = config.parse(data, file="x", base=root)
        self.upkeep = Upkeep(settings, self.ledger, self.files, Log.null(), self.metrics)
        instance = make_instance(clock())
        self.object = self.files.objects / instance.instance_id[:2] / f"{instance.instance_id}.dcm"
        self.object.parent.mkdir()
        self.output, self.spool = self.files.outputs / "made.dcm", self.files.spool / ("a" * 32 + ".npy")
        for path in (self.object, self.output, self.spool):
            path.write_bytes(b"x")
        spilled = {"map": {"name": self.spool.name, "digest": "", "shape": [], "dtype": ""}}
        with self.ledger.write() as tx:
            timing = studies.Timing(60, 600, "rerun", 3)
            studies.add_instance(tx, instance, own=False, priority=0, timing=timing, now=clock())
            tx.execute(study.update().values(revision=1, due_at=None))
            ending = Ending(Outcome.RESULT, output=spilled)
            jobs.put(tx, study_uid="1.2.3", revision=1, stage=Stage.INFER, route="r", priority=0, now=0, ending=ending)
            made = Output("5.5", "1.2.3", 1, "r", "sr", "v", "c", "t", "1.5", self.output.name, "s")
            deliveries.add_output(tx, made, clock())
            deliveries.add_delivery(tx, to="pacs", sop_uid="5.5", study_uid="1.2.3", priority=0, now=clock())

    def delivered(self) -> None:
        with self.ledger.write() as tx:
            (waiting,) = deliveries.pending(tx, "pacs", self.clock())
            deliveries.delivered(tx, waiting, 0, self.clock())

    def present(self) -> list[bool]:
        return [path.exists() for path in (self.object, self.output, self.spool)]


@pytest.fixture
def room(tmp_path, clock, make_instance) -> Room:
    return Room(tmp_path, clock, make_instance)


def test_a_finished_study_goes_after_keep_days_and_its_story_stays(room, clock):
    room.delivered()
    clock.advance(6 * DAY)
    room.upkeep.run_once()
    assert room.present() == [True, True, True]
    clock.advance(2 * DAY)
    room.upkeep.run_once()
    assert room.present() == [False, False, False]
    with room.ledger.read() as tx:
        answer = inspect.explain(tx, "1.2.3")
    assert answer["state"] == "DONE" and answer["events"][-1]["code"] == "EXPIRED"


def test_what_is_pending_stays_whatever_its_age(room, clock):
    clock.advance(60 * DAY)
    room.upkeep.run_once()
    assert room.present() == [True, True, True]


def test_files_that_a_kill_left_without_a_row_are_removed_and_no_others(room, clock):
    orphans = [room.files.spool / ("b" * 32 + ".npy"), room.files.outputs / "never-committed.dcm"]
    for path in orphans:
        path.write_bytes(b"x")
    for path in (*orphans, room.output, room.spool):
        os.utime(path, (clock(), clock()))
    clock.advance(2 * DAY)
    young = room.files.spool / ("c" * 32 + ".npy")
    young.write_bytes(b"x")
    os.utime(young, (clock(), clock()))
    room.upkeep.run_once()
    assert not any(path.exists() for path in orphans)
    assert young.exists() and room.present() == [True, True, True]


def test_what_waits_is_measured(room):
    room.upkeep.run_once()
    assert room.metrics.value("dicom_node_delivery_queue", destination="pacs") == 1
    assert room.metrics.value("dicom_node_studies", state="DELIVERING") == 1
    assert room.metrics.value("dicom_node_disk_free_bytes") > 0


def test_how_long_the_oldest_held_study_waits_is_measured(room, clock, make_instance):
    def oldest(why: str) -> float:
        room.upkeep.run_once()
        return room.metrics.value("dicom_node_oldest_held_seconds", why=why)

    assert (oldest("incomplete"), oldest("patient_conflict")) == (0, 0)
    with room.ledger.write() as tx:
        jobs.put(tx, study_uid="1.2.3", revision=1, stage=Stage.COMPLETE, route="r", priority=0, now=clock())
        held = jobs.claim(tx, Stage.COMPLETE, clock(), 60)
        assert jobs.wait(tx, held, until=clock() + 60, payload={}, code=jobs.HELD, detail="missing: view")
    clock.advance(5000)
    assert (oldest("incomplete"), oldest("patient_conflict")) == (5000, 0)
    with room.ledger.write() as tx:
        jobs.release(tx, "1.2.3", clock())
        timing = studies.Timing(60, 600, "rerun", 3)
        other = make_instance(clock(), digest="other", PatientID="OTHER", SOPInstanceUID="1.2.3.9")
        studies.add_instance(tx, other, own=False, priority=0, timing=timing, now=clock())
    clock.advance(700)
    assert (oldest("incomplete"), oldest("patient_conflict")) == (0, 700)

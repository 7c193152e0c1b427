"""Assemble: the timer is a row; an open association holds it; the cap ends all waiting."""

from __future__ import annotations

import pytest

from dicom_node import config
from dicom_node.assemble import AssembleStage, timing
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.store import inspect, jobs, studies
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Stage

ROUTE = {"when": {"modality": "US"}, "indication": {"any": [{"roi": True}]}, "engine": "x"}


@pytest.fixture
def settings() -> config.Config:
    return config.parse(
        {"assemble": {"quiet_seconds": 60, "force_after_seconds": 600}}, file="x", base=config.shipped()
    )


class Room:
    def __init__(self, root, clock, settings) -> None:
        self.ledger = Ledger(root, clock=clock)
        self.timing = timing(settings)
        self.open: set[str] = set()
        self.told: list[str] = []
        self.stage = AssembleStage(
            self.ledger,
            self.timing,
            lambda: frozenset(self.open),
            Log.null(),
            Metrics(),
            on_complete=self.told.append,
        )

    def add(self, instance) -> None:
        with self.ledger.write() as tx:
            studies.add_instance(tx, instance, own=False, priority=0, timing=self.timing, now=self.ledger.clock())

    def revision(self) -> int:
        with self.ledger.read() as tx:
            return inspect.explain(tx, "1.2.3")["revision"]


@pytest.fixture
def room(tmp_path, clock, settings) -> Room:
    return Room(tmp_path, clock, settings)


def test_a_study_is_complete_after_its_quiet_time(room, clock, make_instance):
    room.add(make_instance(clock()))
    clock.advance(59)
    assert not room.stage.run_once()
    clock.advance(2)
    assert room.stage.run_once() and room.told == ["1.2.3"]
    assert not room.stage.run_once()
    with room.ledger.write() as tx:
        job = jobs.claim(tx, Stage.ROUTE, clock(), 60)
    assert (job.study_uid, job.revision) == ("1.2.3", 1)


def test_it_waits_for_an_association_that_delivered_to_it_but_not_past_the_cap(room, clock, make_instance):
    room.add(make_instance(clock(), association="A1"))
    room.open = {"A1", "B2"}
    clock.advance(300)
    assert not room.stage.run_once()
    room.open = {"B2"}  # another study's
    assert room.stage.run_once()
    room.add(make_instance(clock(), association="B2", digest="b"))
    clock.advance(599)
    assert not room.stage.run_once()
    clock.advance(2)
    assert room.stage.run_once() and room.revision() == 2


def test_a_restart_resumes_the_timer(room, tmp_path, clock, settings, make_instance):
    room.add(make_instance(clock()))
    clock.advance(50)
    room.ledger.close()
    again = Room(tmp_path, clock, settings)
    assert not again.stage.run_once()
    clock.advance(11)
    assert again.stage.run_once() and again.revision() == 1


def test_an_instance_that_comes_between_look_and_fire_wins(room, clock, make_instance):
    room.add(make_instance(clock()))
    clock.advance(61)
    with room.ledger.read() as tx:
        (due,) = studies.due_studies(tx, clock())
    room.add(make_instance(clock(), SOPInstanceUID="1.2.3.2"))
    room.stage._fire(due, clock())
    assert room.revision() == 0


def test_the_shortest_quiet_time_of_any_route_runs_the_timer():
    routes = [
        ROUTE | {"name": "slow", "assemble": {"quiet_seconds": 300}},
        ROUTE | {"name": "stat", "assemble": {"quiet_seconds": 5}},
    ]
    settings = config.parse({"routes": routes}, file="x", base=config.shipped())
    assert timing(settings).quiet_seconds == 5

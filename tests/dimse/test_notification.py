"""Instance Availability Notification: only where it is configured, within bounds, and only ever a hint."""

from __future__ import annotations

from typing import Any

import pytest
from listener_process import listening, wait_for
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE

from dicom_node.dimse.contexts import INSTANCE_AVAILABILITY
from dicom_node.dimse.notification import MAX_INSTANCES, availability_of
from dicom_node.errors import CannotUnderstandError
from dicom_node.store import availability, inspect, studies
from dicom_node.store.ledger import Ledger

STUDY = "1.2.3"
US = "1.2.840.10008.5.1.4.1.1.6.1"


def notification(*uids: str, state: str = "ONLINE", study: str = STUDY) -> Dataset:
    """PS3.4 table R.3.2-1."""
    made, series = Dataset(), Dataset()
    made.ReferencedPerformedProcedureStepSequence, made.StudyInstanceUID = [], study
    series.SeriesInstanceUID = "1.2.3.0"
    series.ReferencedSOPSequence = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = US, uid
        item.InstanceAvailability, item.RetrieveAETitle = state, "PACS"
        series.ReferencedSOPSequence.append(item)
    made.ReferencedSeriesSequence = [series]
    return made


def encoded(dataset: Dataset) -> bytes:
    from pynetdicom.dsutils import encode

    data = encode(dataset, True, True)
    assert data is not None
    return data


def send(port: int, dataset: Dataset) -> tuple[bool, int | None]:
    ae = AE("PACS")
    ae.add_requested_context(INSTANCE_AVAILABILITY, "1.2.840.10008.1.2")
    association = ae.associate("127.0.0.1", port, ae_title="DICOM_NODE")
    if not association.is_established:
        return False, None
    status, _ = association.send_n_create(dataset, INSTANCE_AVAILABILITY, generate_uid())
    association.release()
    return True, status.get("Status")


def said(node: Any) -> list[dict[str, Any]]:
    return list(node.messages.of("available"))


def test_a_notification_is_answered_and_handed_on(tmp_path):
    with listening(tmp_path, availability=True) as node:
        assert send(node.port, notification("1.2.3.1", "1.2.3.2")) == (True, 0x0000)
        wait_for(lambda: said(node))
        assert said(node) == [{"kind": "available", "study": STUDY, "instances": ["1.2.3.1", "1.2.3.2"]}]


def test_it_is_not_offered_unless_configured(tmp_path):
    with listening(tmp_path) as node:
        assert send(node.port, notification("1.2.3.1")) == (False, None)


def test_one_that_names_no_study_is_refused_and_the_next_is_served(tmp_path):
    with listening(tmp_path, availability=True) as node:
        assert send(node.port, notification("1.2.3.1", study="")) == (True, 0x0106)
        assert send(node.port, notification("1.2.3.1")) == (True, 0x0000)


@pytest.mark.parametrize(
    "dataset", [notification("1.2.3.1", state="OFFLINE"), notification(*map(str, range(MAX_INSTANCES + 1)))]
)
def test_what_is_off_line_or_too_many_is_no_hint(dataset):
    assert availability_of(encoded(dataset), "1.2.840.10008.1.2").sop_instance_uids == ()


@pytest.mark.parametrize("data", [b"\xff" * 40, encoded(notification("not a uid"))])
def test_hostile_bytes_are_refused(data):
    with pytest.raises(CannotUnderstandError):
        availability_of(data, "1.2.840.10008.1.2")


class Timer:
    """A study whose quiet time is far away."""

    def __init__(self, root, clock, make_instance) -> None:
        self.ledger, self.clock, self.make = Ledger(root, clock=clock), clock, make_instance
        self.add("1.2.3.1")

    def add(self, uid: str) -> None:
        with self.ledger.write() as tx:
            made = self.make(self.clock(), SOPInstanceUID=uid)
            timing = studies.Timing(600, 6000, "rerun", 3)
            studies.add_instance(tx, made, own=False, priority=0, timing=timing, now=self.clock())
            availability.hurry(tx, STUDY, self.clock())

    def announce(self, *uids: str) -> None:
        with self.ledger.write() as tx:
            availability.announce(tx, STUDY, uids, self.clock())

    def due_in(self) -> float:
        with self.ledger.read() as tx:
            due = studies.next_due(tx)
        assert due is not None
        return due - self.clock()


@pytest.fixture
def timer(tmp_path, clock, make_instance) -> Timer:
    return Timer(tmp_path, clock, make_instance)


def test_when_everything_named_is_here_nothing_is_waited_for(timer):
    timer.announce("1.2.3.1")
    assert timer.due_in() == 0
    with timer.ledger.read() as tx:
        assert "AVAILABLE" in [e["code"] for e in inspect.explain(tx, STUDY)["events"]]


def test_what_is_named_and_not_here_is_waited_for(timer):
    timer.announce("1.2.3.1", "1.2.3.2")
    assert timer.due_in() == 600
    timer.clock.advance(60)
    timer.add("1.2.3.2")
    assert timer.due_in() == 0


def test_an_empty_one_or_one_of_another_study_hurries_nothing(timer):
    timer.announce()
    with timer.ledger.write() as tx:
        availability.announce(tx, "1.9", ["1.2.3.1"], timer.clock())
    assert timer.due_in() == 600

"""The identity check before delivery: agreed, held, put off, released; a scripted Query SCP and a receiving PACS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_node import free_port
from notes import US, image
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from dicom_node import assemble
from dicom_node.config import Destination, Query, Retry
from dicom_node.deliver import AGREED_SECONDS, DeliverStage
from dicom_node.dimse.pacs import ReceivingPacs
from dicom_node.dimse.query import STUDY_ROOT_FIND
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.service.orders import apply_command
from dicom_node.store import deliveries, inspect, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import job

STUDY = "1.2.3"
RETRY = Retry(first_seconds=5, max_seconds=900, give_up_hours=72)


class Registry:
    """A Query SCP: `known` are (Patient ID, Accession Number) of the study there."""

    def __init__(self) -> None:
        self.known: list[tuple[str, str]] = []
        self.asked = 0
        ae = AE("PACS")
        ae.add_supported_context(STUDY_ROOT_FIND)
        handlers: list[Any] = [(evt.EVT_C_FIND, self._find)]
        self.server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = int(self.server.socket.getsockname()[1])

    def _find(self, event: Any) -> Iterator[Any]:
        self.asked += 1
        for patient, accession in self.known:
            answer = Dataset()
            answer.QueryRetrieveLevel, answer.StudyInstanceUID = "STUDY", event.identifier.StudyInstanceUID
            answer.PatientID, answer.AccessionNumber = patient, accession
            yield 0xFF00, answer


class Line:
    def __init__(self, root: Path, clock, make_instance, port: int, query_port: int) -> None:
        self.root, self.clock, self.metrics = root, clock, Metrics()
        self.ledger = Ledger(root, clock=clock)
        with self.ledger.write() as tx:
            timing = studies.Timing(60, 600, "rerun", 3)
            studies.add_instance(tx, make_instance(clock()), own=False, priority=0, timing=timing, now=clock())
            assemble.complete(tx, STUDY, clock())
            tx.execute(job.delete())
        to = Destination(ae_title="PACS", host="127.0.0.1", port=port, check_identity=True)
        query = Query(
            ae_title="PACS", host="127.0.0.1", port=query_port, attempts=2, retry_seconds=60, timeout_seconds=2
        )
        self.stage = DeliverStage(
            self.ledger, root, "pacs", to, RETRY, "NODE", Log.null(), self.metrics, chance=lambda: 0.5, query=query
        )

    def queue(self, revision: int = 1, **changes: object) -> str:
        name = f"{generate_uid(None)}.dcm"
        made = image(self.root / name, STUDY, "1.9", **changes)
        digest = hashlib.sha256((self.root / name).read_bytes()).hexdigest()
        syntax = str(made.file_meta.TransferSyntaxUID)
        new = Output(made.SOPInstanceUID, STUDY, revision, "r", "sr", "v", US, syntax, "1.9", name, digest)
        with self.ledger.write() as tx:
            deliveries.add_output(tx, new, self.clock())
            deliveries.drop_held(tx, STUDY, "r", revision, self.clock())
            deliveries.add_delivery(tx, to="pacs", sop_uid=new.sop_uid, study_uid=STUDY, priority=0, now=self.clock())
        return new.sop_uid

    def drain(self) -> None:
        while self.stage.run_once():
            pass
        self.stage.close()

    def told(self) -> dict[str, Any]:
        with self.ledger.read() as tx:
            answer = inspect.explain(tx, STUDY)
        assert answer is not None
        return answer

    def states(self) -> list[str]:
        return [d["state"] for d in self.told()["deliveries"]]


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    yield made
    made.server.shutdown()


@pytest.fixture
def line(tmp_path, clock, make_instance, registry) -> Iterator[tuple[Line, ReceivingPacs]]:
    (tmp_path / "root").mkdir()
    with ReceivingPacs(tmp_path / "pacs") as pacs:
        yield Line(tmp_path / "root", clock, make_instance, pacs.port, registry.port), pacs


def test_what_agrees_is_sent_and_one_question_serves_a_study(line, registry):
    node, pacs = line
    registry.known = [("GATE-1 ", "ACC-1")]
    node.queue()
    node.queue()
    node.drain()
    assert len(pacs.received) == 2 and registry.asked == 1
    node.clock.advance(AGREED_SECONDS + 1)
    node.queue()
    node.drain()
    assert registry.asked == 2


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([("OTHER", "ACC-1")], "another Patient ID"),
        ([("GATE-1", "ACC-2")], "another Accession Number"),
        ([("GATE-1", "")], "another Accession Number"),
        ([("OTHER", "ACC-2")], "another Patient ID and another Accession Number"),
        ([("GATE-1", "ACC-1"), ("OTHER", "ACC-1")], "more than one identity"),
    ],
)
def test_another_identity_holds_and_says_which_attribute_but_no_value(line, registry, known, said):
    node, pacs = line
    registry.known = known
    node.queue()
    node.queue()
    node.drain()
    told = node.told()
    assert pacs.received == [] and node.states() == ["HELD", "HELD"] and told["state"] == "HELD"
    assert said in told["deliveries"][0]["reason"]
    (event,) = [e for e in told["events"] if e["code"] == "DELIVERY_HELD"]
    assert not any(value in str(told) for value in ("GATE-1", "OTHER", "ACC-1", "ACC-2")), event
    assert node.metrics.value("dicom_node_identity_checks_total", destination="pacs", outcome="differs") == 1


def test_an_operator_sends_it_as_it_is(line, registry):
    node, pacs = line
    registry.known = [("OTHER", "ACC-1")]
    node.queue()
    node.drain()
    assert "1 held objects are sent" in apply_command(node.ledger, {"kind": "complete", "study": STUDY})["text"]
    node.drain()
    assert len(pacs.received) == 1 and node.states() == ["DELIVERED"] and registry.asked == 1


def test_retry_asks_again(line, registry):
    node, pacs = line
    registry.known = [("OTHER", "ACC-1")]
    node.queue()
    node.drain()
    registry.known = [("GATE-1", "ACC-1")]
    assert "checked again" in apply_command(node.ledger, {"kind": "retry", "study": STUDY})["text"]
    node.drain()
    assert len(pacs.received) == 1 and registry.asked == 2


def test_an_acceptance_is_for_that_identity_only(line, registry):
    node, _ = line
    registry.known = [("OTHER", "ACC-1")]
    node.queue()
    node.drain()
    apply_command(node.ledger, {"kind": "complete", "study": STUDY})
    node.drain()
    node.queue(2, PatientID="THIRD")
    node.drain()
    assert node.states() == ["DELIVERED", "HELD"]


def test_a_corrected_revision_takes_the_place_of_what_is_held(line, registry):
    node, pacs = line
    registry.known = [("NEW", "ACC-1")]
    node.queue(1)
    node.drain()
    corrected = node.queue(2, PatientID="NEW")
    node.drain()
    assert node.states() == ["WITHDRAWN", "DELIVERED"]
    assert [r.sop_instance_uid for r in pacs.received] == [corrected]


def test_a_study_the_pacs_does_not_know_yet_is_asked_for_again_then_held(line, registry):
    node, pacs = line
    node.queue()
    node.drain()
    assert node.states() == ["PENDING"]
    node.clock.advance(61)
    node.drain()
    assert node.states() == ["HELD"] and "does not know the study" in node.told()["deliveries"][0]["reason"]
    assert pacs.received == []


def test_without_an_answer_nothing_is_sent_and_nothing_is_held(tmp_path, clock, make_instance):
    (tmp_path / "root").mkdir()
    with ReceivingPacs(tmp_path / "pacs") as pacs:
        node = Line(tmp_path / "root", clock, make_instance, pacs.port, free_port())
        node.queue()
        node.drain()
        (delivery,) = node.told()["deliveries"]
        assert delivery["state"] == "PENDING" and "no association for C-FIND" in delivery["reason"]
        clock.advance(73 * 3600)
        node.drain()
        assert node.states() == ["DEAD"] and pacs.received == []

"""Rejection notes from real files: in effect at once, jobs cancelled, results withdrawn or listed, notes revoked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from notes import image, rejection_note
from pydicom.uid import generate_uid

from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.result import RefusalCode
from dicom_node.store import deliveries, inspect, jobs, rejections, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.files import Files
from dicom_node.store.header import read_header
from dicom_node.store.index import IndexStage
from dicom_node.store.jobs import Ending
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import Outcome, Stage

STUDY, SERIES = generate_uid(), generate_uid()
TIMING = studies.Timing(60, 6000, "ignore", 3)  # "ignore": a rejection must not depend on late instances being welcome


class Store:
    """Files of a study, indexed as the node does it."""

    def __init__(self, root: Path, clock) -> None:
        self.root, self.clock = root, clock
        self.files, self.ledger, self.metrics = Files(root), Ledger(root, clock=clock), Metrics()
        self.index = IndexStage(self.ledger, self.files, TIMING, (), Log.null(), self.metrics)
        self.images = [image(root / f"{n}.dcm", STUDY, SERIES, n) for n in (1, 2)]
        for n in (1, 2):
            self.take(root / f"{n}.dcm")
        with self.ledger.write() as tx:
            from dicom_node import assemble

            assemble.complete(tx, STUDY, clock())

    def take(self, path: Path) -> None:
        meta = self.files.read_meta(path)
        part = self.files.new_part(meta)
        part.write(memoryview(path.read_bytes()[meta.dataset_offset :]))
        part.commit(self.clock())
        assert self.index.run_once()

    def reject(self, *images: Any, code: str = "113001") -> Any:
        path = self.root / f"{generate_uid()}.dcm"
        note = rejection_note(path, images or self.images[:1], code)
        self.take(path)
        return note

    def job(self, stage: Stage, payload: dict[str, Any], ending: Ending | None = None) -> None:
        with self.ledger.write() as tx:
            jobs.put(
                tx, study_uid=STUDY, revision=1, stage=stage, route="r", priority=0, now=self.clock(),
                payload=payload, ending=ending,
            )  # fmt: skip

    def result(self, *sources: str) -> str:
        """A result made from these images, with one object queued for "pacs"."""
        output = {"source_instances": list(sources)}
        self.job(Stage.INFER, {"series": [SERIES]}, Ending(Outcome.RESULT, input_digest="d", output=output))
        new = Output(generate_uid(), STUDY, 1, "r", "sr", "v", "1.2", "1.2", "1.9", "f.dcm", "0")
        with self.ledger.write() as tx:
            deliveries.add_output(tx, new, self.clock())
            deliveries.add_delivery(tx, to="pacs", sop_uid=new.sop_uid, study_uid=STUDY, priority=0, now=self.clock())
        return new.sop_uid

    def pending(self) -> list[deliveries.Delivery]:
        with self.ledger.read() as tx:
            return deliveries.pending(tx, "pacs", self.clock())

    def deliver(self, sent: deliveries.Delivery) -> None:
        with self.ledger.write() as tx:
            deliveries.delivered(tx, sent, 0, self.clock())

    def told(self) -> dict[str, Any]:
        with self.ledger.read() as tx:
            answer = inspect.explain(tx, STUDY)
        assert answer is not None
        return answer

    def used(self) -> set[str]:
        with self.ledger.read() as tx:
            study = studies.load_study(tx, STUDY, 1, Path)
        return {i.sop_instance_uid for i in study.instances if i.header.text("Modality") == "US"}


@pytest.fixture
def store(tmp_path: Path, clock) -> Store:
    return Store(tmp_path, clock)


@pytest.mark.parametrize("code", sorted(rejections.TITLES))
def test_every_title_of_rejection_takes_the_image_out_of_use(store, code):
    store.reject(code=code)
    assert store.used() == {store.images[1].SOPInstanceUID}
    assert store.metrics.value("dicom_node_rejected_images_total") == 1
    assert any(e["code"] == "IMAGES_REJECTED" and code in e["text"] for e in store.told()["events"])


@pytest.mark.parametrize("code", ["113000", "113010", "113018"])
def test_other_key_object_selections_reject_nothing(store, code):
    store.reject(code=code)
    assert len(store.used()) == 2


def test_a_title_of_another_scheme_is_no_rejection(store, tmp_path):
    note = rejection_note(tmp_path / "n.dcm", store.images[:1])
    note.ConceptNameCodeSequence[0].CodingSchemeDesignator = "99VENDOR"
    note.save_as(tmp_path / "n.dcm")
    assert rejections.note_of(read_header(tmp_path / "n.dcm")) is None


def test_a_note_without_a_content_tree_speaks_by_its_evidence(store, tmp_path):
    note = rejection_note(tmp_path / "n.dcm", store.images)
    del note.ContentSequence
    note.save_as(tmp_path / "n.dcm")
    found = rejections.note_of(read_header(tmp_path / "n.dcm"))
    assert found is not None and found.sop_uids == {i.SOPInstanceUID for i in store.images}


@pytest.mark.parametrize("stage", [Stage.COMPLETE, Stage.INFER])
def test_an_open_job_ends_a_running_one_is_fenced_out_and_the_study_is_judged_again(store, stage):
    store.job(stage, {"series": [SERIES]})
    with store.ledger.write() as tx:
        running = jobs.claim(tx, stage, store.clock(), 600)
    store.reject(code="113037")
    (outcome,) = store.told()["outcomes"]
    assert (outcome["outcome"], outcome["code"]) == ("REFUSED", RefusalCode.IMAGE_REJECTED)
    with store.ledger.write() as tx:
        assert not jobs.finish(tx, running, Ending(Outcome.RESULT), store.clock())
        assert studies.next_due(tx) == store.clock() + TIMING.quiet_seconds


def test_a_job_on_another_series_goes_on(store):
    store.job(Stage.INFER, {"series": ["1.2.3.4"]})
    store.reject()
    assert store.told()["outcomes"][0]["state"] == "READY"


def test_a_result_that_waits_to_be_reported_is_not(store):
    store.job(Stage.REPORT, {"result": {"source_instances": [store.images[0].SOPInstanceUID]}})
    store.reject()
    with store.ledger.write() as tx:
        assert jobs.claim(tx, Stage.REPORT, store.clock(), 60) is None
    assert "JOB_CANCELLED" in [e["code"] for e in store.told()["events"]]


def test_an_unsent_result_is_never_sent(store):
    store.result(store.images[0].SOPInstanceUID)
    store.reject()
    assert store.pending() == []
    told = store.told()
    assert [d["state"] for d in told["deliveries"]] == ["WITHDRAWN"] and told["withdrawals"] == []


def test_a_delivered_result_is_listed_for_withdrawal_until_it_is_rejected_itself(store, tmp_path):
    uid = store.result(store.images[0].SOPInstanceUID)
    store.deliver(*store.pending())
    store.reject(code="113038")
    (listed,) = store.told()["withdrawals"]
    assert (listed["destination"], listed["sop_instance_uid"], listed["done"]) == ("pacs", uid, False)
    assert listed["reason"] == "Incorrect Modality Worklist Entry"
    with store.ledger.read() as tx:
        assert rejections.open_withdrawals(tx) == 1
    store.reject(image(tmp_path / "ours.dcm", STUDY, "1.9", SOPInstanceUID=uid))
    assert store.told()["withdrawals"][0]["done"] is True


def test_a_result_from_other_images_stands(store):
    store.result(store.images[1].SOPInstanceUID)
    store.reject()
    assert len(store.pending()) == 1


def test_an_object_on_its_way_while_the_note_comes_is_listed(store):
    store.result(store.images[0].SOPInstanceUID)
    (sent,) = store.pending()
    store.reject()
    store.deliver(sent)
    assert len(store.told()["withdrawals"]) == 1


def test_a_note_that_is_rejected_itself_counts_no_longer_in_either_order(store, tmp_path):
    note = store.reject()
    assert len(store.used()) == 1
    store.reject(note)
    assert len(store.used()) == 2
    again = rejection_note(tmp_path / "a.dcm", store.images[:1])
    store.reject(again)
    store.take(tmp_path / "a.dcm")
    assert len(store.used()) == 2


def test_a_note_that_comes_before_its_image_holds(store, tmp_path):
    late = image(tmp_path / "late.dcm", STUDY, SERIES, 3)
    store.reject(late)
    store.take(tmp_path / "late.dcm")
    assert late.SOPInstanceUID not in store.used()

"""Deliver: every row of the outcome table, against a PACS that misbehaves on order, with a clock moved by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from dicom_node.config import Destination, Retry
from dicom_node.deliver import DeliverStage
from dicom_node.dimse.pacs import Behaviour, ReceivingPacs
from dicom_node.dimse.sender import Sender
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.store import deliveries, inspect, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.ledger import Ledger

SR, CAPTURE = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.7.4"
RETRY = Retry(first_seconds=5, max_seconds=900, give_up_hours=72)


def an_object(path: Path, sop_class: str = CAPTURE, *, compressed: bool = True) -> pydicom.Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = "1.2.3", generate_uid(), "P1"
    ds.Modality = "SR" if sop_class == SR else "US"
    if sop_class == CAPTURE:
        ds.NumberOfFrames, ds.SamplesPerPixel, ds.PhotometricInterpretation = 2, 3, "RGB"
        ds.PlanarConfiguration, ds.Rows, ds.Columns = 0, 16, 16
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = np.arange(2 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).tobytes()
        if compressed:
            ds.compress(RLELossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return ds


class Line:
    """A ledger with outputs, one destination, one stage."""

    def __init__(self, root: Path, clock, make_instance) -> None:
        self.root, self.clock = root, clock
        self.ledger = Ledger(root, clock=clock)
        self.metrics = Metrics()
        with self.ledger.write() as tx:
            timing = studies.Timing(60, 600, "rerun", 3)
            studies.add_instance(tx, make_instance(clock()), own=False, priority=0, timing=timing, now=clock())

    def queue(self, sop_class: str = CAPTURE, *, compressed: bool = True, priority: int = 0) -> str:
        name = f"{generate_uid(None)}.dcm"
        made = an_object(self.root / name, sop_class, compressed=compressed)
        digest = hashlib.sha256((self.root / name).read_bytes()).hexdigest()
        syntax = str(made.file_meta.TransferSyntaxUID)
        new = Output(made.SOPInstanceUID, "1.2.3", 1, "r", "sr", "v", sop_class, syntax, "1.9", name, digest)
        with self.ledger.write() as tx:
            deliveries.add_output(tx, new, self.clock())
            deliveries.add_delivery(
                tx, to="pacs", sop_uid=new.sop_uid, study_uid="1.2.3", priority=priority, now=self.clock()
            )
        return str(made.SOPInstanceUID)

    def stage(self, port: int, *, calling: str = "NODE", host: str = "127.0.0.1") -> DeliverStage:
        to = Destination(ae_title="PACS", host=host, port=port)
        return DeliverStage(
            self.ledger, self.root, "pacs", to, RETRY, calling, Log.null(), self.metrics, chance=lambda: 0.5
        )

    def rows(self) -> dict[str, dict]:
        with self.ledger.read() as tx:
            return {d["sop_instance_uid"]: d for d in inspect.explain(tx, "1.2.3")["deliveries"]}

    def paused(self) -> deliveries.Pause | None:
        with self.ledger.read() as tx:
            return deliveries.paused(tx, "pacs")


@pytest.fixture
def line(tmp_path, clock, make_instance) -> Line:
    (tmp_path / "root").mkdir()
    return Line(tmp_path / "root", clock, make_instance)


@pytest.fixture
def pacs(tmp_path):
    with ReceivingPacs(tmp_path / "pacs") as running:
        yield running


def drain(stage: DeliverStage) -> None:
    while stage.run_once():
        pass


def test_objects_arrive_as_they_are_most_urgent_first_over_one_association(line, pacs):
    routine, stat = line.queue(), line.queue(SR, priority=9)
    stage = line.stage(pacs.port)
    drain(stage)
    stage.close()
    assert [r.sop_instance_uid for r in pacs.received] == [stat, routine]
    assert pacs.received[1].transfer_syntax_uid == RLELossless
    assert {r["state"] for r in line.rows().values()} == {"DELIVERED"}


def test_what_was_delivered_wakes_no_other_stage(line, pacs):
    line.queue(), line.queue(SR)
    stage, woken = line.stage(pacs.port), []
    line.ledger.on_commit = woken.append
    drain(stage)
    stage.close()
    assert {r["state"] for r in line.rows().values()} == {"DELIVERED"} and woken == []


def test_a_peer_without_rle_gets_the_same_pixels_uncompressed_and_the_file_stays(line, tmp_path):
    uid = line.queue()
    (stored,) = line.root.glob("*.dcm")
    before = stored.read_bytes()
    with ReceivingPacs(tmp_path / "old", behaviour=Behaviour(uncompressed_only=True)) as old:
        stage = line.stage(old.port)
        drain(stage)
        stage.close()
        (received,) = old.received
    assert received.sop_instance_uid == uid and received.transfer_syntax_uid == ExplicitVRLittleEndian
    sent = pydicom.dcmread(received.path)
    assert np.array_equal(sent.pixel_array, pydicom.dcmread(stored).pixel_array)
    assert stored.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "state", "next_seconds"),
    [
        (0x0000, "DELIVERED", None),
        (0xB000, "DELIVERED", None),
        (0xB007, "DELIVERED", None),
        (0x0111, "DELIVERED", None),
        (0xA700, "PENDING", 5.0),
        (0xA7FF, "PENDING", 5.0),
        (0xA900, "DEAD", None),
        (0x0117, "DEAD", None),
        (0xC000, "PENDING", 21600.0),
        (0x0110, "PENDING", 21600.0),
        (0x0122, "PENDING", 900.0),
        (0x0124, "PENDING", 0.0),
    ],
)
def test_what_a_status_does(line, pacs, status, state, next_seconds):
    uid = line.queue()
    pacs.behaviour.status = lambda _sop_class: status
    stage = line.stage(pacs.port)
    stage.run_once()
    stage.close()
    row = line.rows()[uid]
    assert (row["state"], row["status"]) == (state, f"0x{status:04X}")
    assert (line.paused() is not None) is (status == 0x0124)
    if next_seconds is not None:
        with line.ledger.read() as tx:
            assert deliveries.next_at(tx, "pacs") == line.clock() + next_seconds


def test_an_unclear_status_is_tried_five_times_over_a_day_then_dead(line, pacs):
    uid = line.queue()
    pacs.behaviour.status = lambda _sop_class: 0xC123
    stage = line.stage(pacs.port)
    for _ in range(4):
        stage.run_once()
        assert line.rows()[uid]["state"] == "PENDING"
        line.clock.advance(21600)
    stage.run_once()
    stage.close()
    assert line.rows()[uid]["state"] == "DEAD" and "0xC123" in line.rows()[uid]["reason"]


def test_a_class_the_peer_refuses_does_not_hold_the_others_back(line, pacs):
    capture, report = line.queue(priority=9), line.queue(SR)
    pacs.behaviour.status = lambda sop_class: 0x0122 if sop_class == CAPTURE else 0
    stage = line.stage(pacs.port)
    for _ in range(3):
        stage.run_once()
    stage.close()
    assert line.rows()[capture]["state"] == "PENDING" and line.rows()[report]["state"] == "DELIVERED"


def test_an_unknown_calling_ae_pauses_the_destination_then_all_flows_by_itself(line, tmp_path):
    with ReceivingPacs(tmp_path / "strict", behaviour=Behaviour(known_callers=["SOMEBODY"])) as strict:
        line.queue()
        line.queue(SR)
        stage = line.stage(strict.port)
        drain(stage)
        assert "our AE title is not known there" in line.paused().reason
        for _ in range(20):
            assert not stage.run_once()  # paused: no storm of associations
        port = strict.port
    with ReceivingPacs(tmp_path / "entered", port=port) as entered:
        line.clock.advance(901)
        drain(stage)
        stage.close()
        assert len(entered.received) == 2 and line.paused() is None


def test_days_of_a_dead_pacs_cost_little_and_lose_nothing(line, tmp_path):
    for _ in range(50):
        line.queue(SR)
    with ReceivingPacs(tmp_path / "x") as probe:
        port = probe.port
    attempts = 0
    stage = line.stage(port)
    sender = Sender("NODE")
    real = sender.send_file

    def counted(*arguments, **keywords):
        nonlocal attempts
        attempts += 1
        return real(*arguments, **keywords)

    sender.send_file = counted
    stage._sender = sender
    for _ in range(48 * 4):  # two days, looked at every 15 minutes
        for _ in range(5):
            stage.run_once()
        line.clock.advance(900)
    assert attempts < 48 * 4 * 2, "one failed association must not cost an attempt for each object"
    assert {r["state"] for r in line.rows().values()} == {"PENDING"}
    with ReceivingPacs(tmp_path / "back", port=port) as back:
        line.clock.advance(901)
        for _ in range(200):
            stage.run_once()
            line.clock.advance(10)
        assert len({r.sop_instance_uid for r in back.received}) == len(back.received) == 50
    stage.close()


def test_after_days_it_is_given_up_with_a_reason(line, tmp_path):
    uid = line.queue()
    with ReceivingPacs(tmp_path / "x") as probe:
        port = probe.port
    stage = line.stage(port)
    line.clock.advance(73 * 3600)
    stage.run_once()
    assert line.rows()[uid]["state"] == "DEAD" and "given up after 72 h" in line.rows()[uid]["reason"]


def test_no_answer_is_tried_again_with_the_same_bytes(line, pacs):
    uid = line.queue()
    pacs.behaviour.abort = True
    stage = line.stage(pacs.port)
    stage.run_once()
    assert line.rows()[uid]["state"] == "PENDING" and line.rows()[uid]["status"] is None
    pacs.behaviour.abort = False
    line.clock.advance(10)
    drain(stage)
    stage.close()
    assert [r.sop_instance_uid for r in pacs.received] == [uid]


def test_a_crash_after_the_answer_sends_the_same_object_again(line, pacs):
    """The destination answered, we died before the record: the second send is byte-identical."""
    uid = line.queue()
    with line.ledger.read() as tx:
        (waiting,) = deliveries.pending(tx, "pacs", line.clock())
    sender = Sender("NODE")
    to = Destination(ae_title="PACS", host="127.0.0.1", port=pacs.port)
    assert sender.send_file(to, line.root / waiting.file).status == 0
    sender.close()
    stage = line.stage(pacs.port)
    drain(stage)
    stage.close()
    assert [r.sop_instance_uid for r in pacs.received] == [uid, uid]
    assert len({r.sha256 for r in pacs.received}) == 1


def test_a_file_that_was_changed_on_disk_is_not_sent(line, pacs):
    uid = line.queue()
    (stored,) = line.root.glob("*.dcm")
    stored.write_bytes(stored.read_bytes() + b"\0\0")
    stage = line.stage(pacs.port)
    stage.run_once()
    assert line.rows()[uid]["state"] == "DEAD" and pacs.received == []


def test_nothing_of_a_held_study_is_sent(line, pacs):
    line.queue()
    with line.ledger.write() as tx:
        studies.set_hold(tx, "1.2.3", "PATIENT_CONFLICT")
    stage = line.stage(pacs.port)
    assert not stage.run_once()
    assert pacs.received == []

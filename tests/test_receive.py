"""Receive: what is stored, what is refused and how the peer is told; nothing is acknowledged that is not durable."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
import threading
import time

import pytest
from listener_process import listening, wait_for
from pydicom import dcmread
from raw_scu import EXPLICIT, IMPLICIT, MR, SC, AbortedError, RawScu, explicit, pdata, small_data_set, store_command

from dicom_node.log import Log
from dicom_node.receive import Reports, Room
from dicom_node.store.files import Files, Watermark

UID = "1.2.826.0.1.3680043.9.1"
CONTEXTS = [(1, SC, (EXPLICIT,)), (3, SC, (IMPLICIT,)), (5, MR, (EXPLICIT,))]


@pytest.fixture
def node(tmp_path):
    with listening(tmp_path) as node:
        yield node


@pytest.fixture
def scu(node):
    with RawScu(node.port) as scu:
        yield scu.associate(CONTEXTS)


def test_an_instance_is_stored_as_it_came_and_its_file_says_who_sent_it(node, scu):
    data = small_data_set(pixels=300_000)
    before = time.time()
    assert scu.store(data, SC, UID).status == 0x0000
    (path,) = node.files()
    meta = Files(node.root).read_meta(path)
    assert path.read_bytes()[meta.dataset_offset :] == data
    assert (meta.sop_class_uid, meta.sop_instance_uid, meta.transfer_syntax_uid) == (SC, UID, EXPLICIT)
    assert (meta.calling_ae_title, meta.called_ae_title, meta.peer) == ("RAWSCU", "DICOM_NODE", "127.0.0.1")
    assert before - 1 <= meta.received_at <= time.time()
    assert dcmread(path).SOPInstanceUID == UID
    (opened,) = node.messages.of("association_opened")
    (stored,) = node.messages.of("stored")
    assert meta.association_id == opened["id"] == stored["association"]
    assert stored["id"] == path.stem


def test_wire_values_never_form_a_path(node, scu):
    for uid in ("../../../tmp/evil", "1.2/3", "..", "1.2.3\0.dcm"):
        assert scu.store(small_data_set(sop_instance=uid), SC, uid).status == 0x0117
    assert node.files() == []


@pytest.mark.parametrize(
    ("data", "status", "offending"),
    [
        (small_data_set(sop_class=MR), 0xA900, 0x00080016),
        (small_data_set(sop_instance=UID + ".7"), 0xA900, 0x00080018),
        (small_data_set(sop_class=""), 0xA900, 0x00080016),
        (small_data_set(sop_instance=""), 0xA900, 0x00080018),
        (small_data_set(study=""), 0xA900, 0x0020000D),
        (small_data_set(series=""), 0xA900, 0x0020000E),
        (small_data_set(study="1.2.x"), 0x0117, 0x0020000D),
        (small_data_set(series="1." + "2" * 63), 0x0117, 0x0020000E),
        (small_data_set(study="1..2"), 0x0117, 0x0020000D),
        (small_data_set(study=".1.2"), 0x0117, 0x0020000D),
        (b"", 0xA900, 0x00080016),
        (os.urandom(4096), 0xC000, "any"),
        (small_data_set()[:-10], 0xC000, 0x7FE00010),
        (small_data_set() + b"\0", 0xC000, None),
        (small_data_set() + explicit(0x7FE0, 0x0010, b"OB", b"xx"), 0xC000, 0x7FE00010),
        (explicit(0x0002, 0x0010, b"UI", b"1.2") + small_data_set(), 0xC000, 0x00020010),
    ],
)
def test_a_refusal_says_why_with_the_element_to_blame(node, scu, data, status, offending):
    response = scu.store(data, SC, UID)
    assert response.status == status
    assert offending == "any" or response.offending == offending
    assert 0 < len(response.comment) <= 64
    assert response.elements[0x1000].rstrip(b"\0").decode() == UID
    assert node.files() == []
    assert scu.store(small_data_set(), SC, UID).status == 0  # the association goes on
    if data:
        assert len(node.files("quarantine", ".dcm")) == 1
        assert node.files("quarantine", ".txt")[0].read_text().strip() == response.comment


@pytest.mark.parametrize("uid", ["1.2.840.00113619.2", "1.4.13.3.1.0.19.544194620.9411.768994.0104484", "0", "2.25.0"])
def test_leading_zeros_in_uids_are_tolerated(node, scu, uid):
    assert scu.store(small_data_set(sop_instance=uid), SC, uid).status == 0


def test_a_malformed_uid_in_the_command(node, scu):
    response = scu.store(small_data_set(), SC, "1." * 40 + "1")
    assert (response.status, response.offending) == (0x0117, 0x00001000)
    assert 0x1000 not in response.elements  # nothing malformed is sent back
    assert node.files() == []


def nested(depth: int) -> bytes:
    return (
        struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ) * depth + (struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)) * depth


@pytest.mark.parametrize("depth", [33, 500, 5_000, 100_000])
def test_a_tower_of_sequences_is_refused(node, scu, depth):
    assert scu.store(small_data_set(extra=nested(depth)), SC, UID).status == 0xC000


def test_depth_within_the_bound_is_stored_and_read(node, scu):
    assert scu.store(small_data_set(extra=nested(32)), SC, UID).status == 0
    assert Files(node.root).read_header(node.files()[0])["SOPInstanceUID"] == UID


def test_a_sequence_of_too_many_items_is_refused_soon(node, scu):
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 200_000
    began = time.monotonic()
    data = small_data_set(extra=struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(items)) + items)
    assert scu.store(data, SC, UID).status == 0xC000
    assert time.monotonic() - began < 3


def test_too_large_is_refused_and_cut(tmp_path):
    with listening(tmp_path, max_instance_mb=1) as node, RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        assert scu.store(small_data_set(pixels=900_000), SC, UID).status == 0
        scu.send(pdata(1, 3, store_command(SC, UID)))
        with pytest.raises((AbortedError, ConnectionError)):
            for _ in range(100):
                scu.send(pdata(1, 0, bytes(120_000)))
            scu.response()
            scu.response()
        wait_for(lambda: len(node.files()) == 1)
        wait_for(lambda: node.messages.counts("dicom_node_instances_refused_total") == 1)
        assert [m["code"] for m in node.messages.of("event")] == ["INSTANCE_REFUSED", "CONNECTION_DROPPED"]


def test_a_patient_sender_reads_why_it_was_too_large(tmp_path):
    with listening(tmp_path, max_instance_mb=1) as node, RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(pdata(1, 3, store_command(SC, UID)))
        scu.send_data(bytes(1_000_001), last=False)
        assert scu.response().status == 0xA700
        with pytest.raises(AbortedError):
            scu.response()


class Disk:
    def __init__(self) -> None:
        self.free = 10_000_000_000

    def __call__(self, _path):
        return os.statvfs_result((4096, 4096, 0, 0, self.free // 4096, 0, 0, 0, 0, 255))


def test_a_low_disk_refuses_and_recovers_by_itself(tmp_path):
    disk = Disk()
    room = lambda files: Room(files, Watermark(tmp_path, 2, disk))  # noqa: E731
    with listening(tmp_path, room=room) as node, RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        assert scu.store(small_data_set(), SC, UID).status == 0
        disk.free = 1_900_000_000
        wait_for(lambda: scu.store(small_data_set(), SC, UID).status == 0xA700, 3)
        stored = len(node.files())
        response = scu.store(small_data_set(pixels=100_000), SC, UID)
        assert (response.status, response.comment) == (0xA700, "disk is low; send again later")
        disk.free = 2_100_000_000  # above the mark, but not by a tenth
        time.sleep(0.6)
        assert scu.store(small_data_set(), SC, UID).status == 0xA700
        disk.free = 2_300_000_000
        wait_for(lambda: scu.store(small_data_set(), SC, UID).status == 0, 3)
        assert len(node.files()) == stored + 1
        assert node.files("quarantine") == []


def test_when_the_index_is_behind_the_peers_wait(tmp_path):
    room = lambda files: Room(files, Watermark(tmp_path, 0), max_incoming=3)  # noqa: E731
    with listening(tmp_path, room=room) as node, RawScu(node.port) as scu:
        scu.associate(CONTEXTS)

        def refused() -> bool:
            return scu.store(small_data_set(), SC, UID).status == 0xA700

        wait_for(refused, 5)
        for path in node.files():
            path.unlink()
        wait_for(lambda: not refused(), 3)


def test_a_full_disk_in_the_middle_leaves_no_file(node, scu, monkeypatch):
    real = os.write

    def full(fd, data):
        if len(data) > 5000:
            return real(fd, bytes(data[:100]))  # short writes first, as a full disk does
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dicom_node.store.files.os.write", full)
    monkeypatch.setattr("dicom_node.store.files.part10.encode_meta", lambda meta: bytes(6000))
    assert scu.store(small_data_set(pixels=50_000), SC, UID).status == 0xA700
    monkeypatch.undo()
    assert node.files() == []
    assert scu.store(small_data_set(), SC, UID).status == 0
    wait_for(lambda: any(m["code"] == "STORE_FAILED" for m in node.messages.of("event")))


@pytest.mark.parametrize("nth", [1, 2])
def test_an_fsync_that_fails_is_never_tried_again_and_never_acknowledged(node, scu, monkeypatch, nth):
    calls = []

    def fsync(_fd):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dicom_node.store.files.os.fsync", fsync)
    assert scu.store(small_data_set(), SC, UID).status == 0xA700
    assert len(calls) == nth
    assert node.files() == []


def test_an_unexpected_error_is_a_refusal_without_a_file(node, scu, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("dicom_node.receive.check_data_set", bug)
    response = scu.store(small_data_set(), SC, UID)
    assert response.status == 0xC211
    assert node.files() == []
    monkeypatch.undo()
    assert scu.store(small_data_set(), SC, UID).status == 0


def test_acknowledged_only_after_file_and_folder_are_synced(node, scu, monkeypatch):
    order = []
    fsync, rename = os.fsync, type(node.root).rename

    def note_fsync(fd):
        order.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def note_rename(self, target):
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr("dicom_node.store.files.os.fsync", note_fsync)
    monkeypatch.setattr(type(node.root), "rename", note_rename)
    monkeypatch.setattr(
        "dicom_node.dimse.association.encode_response",
        lambda *a, **k: order.append("answer") or encode(*a, **k),
    )
    from dicom_node.dimse.command import encode_response as encode

    assert scu.store(small_data_set(), SC, UID).status == 0
    assert order == ["fsync file", "rename", "fsync folder", "answer"]


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_peer_that_dies_leaves_nothing(node, scu, how):
    scu.send(pdata(1, 3, store_command(SC, UID)))
    scu.send_data(bytes(400_000), last=False)
    wait_for(lambda: node.files(suffix=".part"))
    scu.reset() if how == "reset" else scu.socket.close()
    wait_for(lambda: node.files() == [])
    wait_for(lambda: node.messages.of("association_closed"))


def test_parts_of_a_crash_are_swept_at_start_and_instances_are_not(tmp_path):
    files = Files(tmp_path)
    (files.incoming / ("a" * 32 + ".part")).write_bytes(b"half")
    (files.incoming / ("b" * 32 + ".dcm")).write_bytes(b"whole")
    with listening(tmp_path) as node:
        assert [p.name for p in node.files()] == ["b" * 32 + ".dcm"]


def test_four_clips_at_once_are_stored_whole(node):
    data = {i: small_data_set(sop_instance=f"{UID}.{i}", pixels=5_000_000 + i) for i in range(4)}
    failed = []

    def send(i: int) -> None:
        with RawScu(node.port) as scu:
            scu.associate(CONTEXTS)
            if scu.store(data[i], SC, f"{UID}.{i}").status != 0:
                failed.append(i)

    threads = [threading.Thread(target=send, args=(i,)) for i in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    files = Files(node.root)
    stored = {
        (meta := files.read_meta(p)).sop_instance_uid: p.read_bytes()[meta.dataset_offset :] for p in node.files()
    }
    assert stored == {f"{UID}.{i}": d for i, d in data.items()}


def test_the_stages_process_hears_what_it_needs(node, scu):
    scu.store(small_data_set(), SC, UID)
    wait_for(lambda: any(m["open"] for m in node.messages.of("associations")), 4)
    scu.release()
    (closed,) = wait_for(lambda: node.messages.of("association_closed"))
    assert closed["id"] == node.messages.of("association_opened")[0]["id"]
    wait_for(lambda: node.messages.of("associations")[-1]["open"] == [], 4)
    assert node.messages.of("listening")[0] == {
        "kind": "listening",
        "address": ["127.0.0.1", node.port],
        "ae_title": "DICOM_NODE",
    }
    wait_for(lambda: node.messages.counts("dicom_node_instances_received_total") == 1, 4)
    json.dumps(node.messages.all)


def test_nothing_said_names_a_patient(tmp_path):
    planted = ["Planted^Name", "PAT-4711", "19440101", "ACC-0815", "Planted description"]
    stream = io.StringIO()
    log = Log.open(level="debug", secret=b"secret", stream=stream)
    extra = b"".join(
        [
            explicit(0x0008, 0x0050, b"SH", b"ACC-0815"),
            explicit(0x0008, 0x1030, b"LO", b"Planted description"),
            explicit(0x0010, 0x0010, b"PN", b"Planted^Name"),
            explicit(0x0010, 0x0020, b"LO", b"PAT-4711"),
            explicit(0x0010, 0x0030, b"DA", b"19440101"),
        ]
    )
    with listening(tmp_path, log=log, max_instance_mb=1) as node, RawScu(node.port) as scu:
        scu.associate([*CONTEXTS, (7, "1.2.3.4", (EXPLICIT,))])
        said = [
            scu.store(data, SC, UID)
            for data in (
                small_data_set(extra=extra),
                small_data_set(extra=extra, study=""),
                small_data_set(extra=extra)[:-9],
                small_data_set(extra=extra, study="Planted^Name"),
                extra,
            )
        ]
        scu.send(pdata(1, 3, b"Planted^Name PAT-4711"))
        with pytest.raises(AbortedError):
            scu.response()
    assert [r.status for r in said] == [0, 0xA900, 0xC000, 0x0117, 0xA900]
    text = stream.getvalue() + json.dumps(node.messages.all) + "".join(r.comment for r in said)
    text += "".join(p.name for p in tmp_path.rglob("*")) + "".join(p.read_text() for p in tmp_path.rglob("*.txt"))
    assert "association_closed" in text
    assert [word for word in planted if word in text] == []
    assert UID not in stream.getvalue()


def test_a_second_listener_on_the_root_is_refused(node):
    from dicom_node.errors import RootInUseError

    with pytest.raises(RootInUseError), listening(node.root):
        pass


def test_reports_come_at_every_tenfold_and_a_flood_is_capped():
    reports = Reports()
    assert [n for n in range(1, 1001) if reports.due("10.0.0.1", "x")] == [1, 10, 100, 1000]
    assert sum(bool(reports.due(f"10.0.{i // 256}.{i % 256}", "x")) for i in range(5000)) <= Reports.MAX_PER_MINUTE
    assert len(reports._counts) <= Reports.MAX_KEYS

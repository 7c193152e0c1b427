"""kill -9 at any moment: no acknowledged instance is missing; each destination ends with one copy of each object."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pydicom
import pytest
from e2e_node import make_phantom, peer, storescu, study_uid, wait_for
from pydicom.uid import generate_uid

from dicom_node.dimse.pacs import ReceivingPacs

CLIPS = 6


def variants(folder: Path, count: int) -> list[Path]:
    """Small studies that all differ: one phantom under fresh UIDs."""
    phantom = pydicom.dcmread(make_phantom(folder / "base", "--encoding", "jpeg"))
    made = []
    for n in range(count):
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(phantom, keyword, generate_uid())
        phantom.file_meta.MediaStorageSOPInstanceUID = phantom.SOPInstanceUID
        phantom.PatientID = f"KILL-{n}"
        path = folder / f"{n}.dcm"
        phantom.save_as(path)
        made.append(path)
    return made


class Modality(threading.Thread):
    """Sends each file until it is acknowledged, whatever happens to the node; remembers what was acknowledged."""

    def __init__(self, port: int, files: list[Path]) -> None:
        super().__init__(daemon=True)
        self.port, self.files = port, files
        self.acknowledged: list[Path] = []

    def run(self) -> None:
        for path in self.files:
            while storescu(self.port, path) != 0:
                time.sleep(0.2)
            self.acknowledged.append(path)


def dataset_bytes(path: Path) -> bytes:
    """The data set as encoded, without preamble and meta group."""
    with path.open("rb") as f:
        pydicom.filereader.read_preamble(f, force=True)
        pydicom.filereader._read_file_meta_info(f)
        return f.read()


MANY_ATTEMPTS = {"max_attempts": 20}
"""Thirty kills may hit one job more often than the shipped three times: it is then DEAD, as it must be, not lost."""


def check_invariant(node, pacs: ReceivingPacs, sent: list[Path]) -> None:
    stored = {hashlib.sha256(dataset_bytes(p)).hexdigest() for p in (node.root / "objects").rglob("*.dcm")}
    for path in sent:
        assert hashlib.sha256(dataset_bytes(path)).hexdigest() in stored, "an acknowledged instance is missing"
    assert not list((node.root / "incoming").glob("*")), "a file was left in incoming"
    expected = defaultdict(set)
    for path in sent:
        answer = node.explain(study_uid(path))
        assert [o["outcome"] for o in answer["outcomes"]][-1:] == ["RESULT"], answer
        expected[study_uid(path)] = {d["sop_instance_uid"] for d in answer["deliveries"]}
        assert len(expected[study_uid(path)]) == 2
    received = defaultdict(set)
    bytes_of = defaultdict(set)
    for r in pacs.received:
        received[r.study_instance_uid].add(r.sop_instance_uid)
        bytes_of[r.sop_instance_uid].add(r.sha256)
    assert received == expected
    assert all(len(digests) == 1 for digests in bytes_of.values()), "two sends of one UID differ"


def rounds(node, pacs, files, kill, count: int, seed: int) -> None:
    chance = random.Random(seed)
    node.start()
    modality = Modality(node.port, files)
    modality.start()
    for _ in range(count):
        time.sleep(chance.uniform(0.1, 2.0))
        kill(node, chance)
    modality.join(240)
    assert len(modality.acknowledged) == len(files)
    for path in files:
        node.wait_state(study_uid(path), "DONE", seconds=90)
    check_invariant(node, pacs, files)


def kill_everything(node, _chance) -> None:
    node.kill()
    node.start()


def kill_a_child(node, chance) -> None:
    child = node.child(chance.choice(["listen", "dicom_node.worker"]))
    if child is not None:
        with contextlib.suppress(psutil.Error):
            child.kill()


@pytest.mark.parametrize(("kill", "count"), [(kill_everything, 4), (kill_a_child, 4)])
def test_a_few_kills_lose_nothing(make_node, tmp_path, kill, count):
    with ReceivingPacs(tmp_path / "pacs", ae_title="PACS") as pacs:
        files = variants(tmp_path / "files", CLIPS)
        rounds(make_node(pacs.port), pacs, files, kill, count, seed=7)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kill", "count"), [(kill_everything, 30), (kill_a_child, 30)])
def test_thirty_kills_lose_nothing(make_node, tmp_path, kill, count):
    with ReceivingPacs(tmp_path / "pacs", ae_title="PACS") as pacs:
        files = variants(tmp_path / "files", 40)
        rounds(
            make_node(pacs.port, infer=MANY_ATTEMPTS),
            pacs,
            files,
            kill,
            count,
            seed=int(os.environ.get("KILL_SEED", "11")),
        )


def test_the_ledger_may_be_lost_the_files_say_all(make_node, tmp_path):
    """The durable file is the truth: without a ledger the next start adopts what is stored and works on it."""
    with ReceivingPacs(tmp_path / "pacs", ae_title="PACS") as pacs:
        node = make_node(pacs.port).start()
        (path,) = variants(tmp_path / "files", 1)
        assert storescu(node.port, path) == 0
        node.wait_state(study_uid(path), "DONE")
        first = {r.sop_instance_uid: r.sha256 for r in pacs.received}
        node.kill()
        for file in node.root.glob("ledger.sqlite*"):
            file.unlink()
        node.start()
        answer = node.wait_state(study_uid(path), "DONE")
        assert [o["outcome"] for o in answer["outcomes"]] == ["RESULT"]
        assert {r.sop_instance_uid for r in pacs.received} >= set(first)


def test_disk_full_is_refused_and_mends_itself(make_node, tmp_path):
    """A file system of its own, filled and freed: 0xA700 in between, no acknowledged instance lost."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with ReceivingPacs(tmp_path / "pacs", ae_title="PACS") as pacs:
            node = make_node(pacs.port, store={"root": str(mount / "var"), "min_free_gb": 0.05})
            node.start()
            first, second = variants(tmp_path / "files", 2)
            assert storescu(node.port, first) == 0
            node.wait_state(study_uid(first), "DONE")
            ballast = mount / "ballast"
            free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
            ballast.write_bytes(bytes(free - 20_000_000))
            refused = subprocess.run(
                [peer("storescu"), "-v", "-R", "-xy", "-aec", "DICOM_NODE", "127.0.0.1", str(node.port), str(second)],
                capture_output=True,
                text=True,
            )
            assert "Refused: OutOfResources" in refused.stdout + refused.stderr
            ballast.unlink()
            wait_for(lambda: storescu(node.port, second) == 0, 20, every=0.5)
            node.wait_state(study_uid(second), "DONE")
            assert {r.study_instance_uid for r in pacs.received} == {study_uid(first), study_uid(second)}
            node.stop()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)

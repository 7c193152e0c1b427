"""Acknowledged = on stable storage, with many associations at once that share the fsync of the folder.

Every system call that matters is noted when it begins and when it ends. An instance may be answered only after: its
file's fsync ended, then its rename, then an fsync of the folder that *began* after that rename.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from listener_process import listening
from raw_scu import EXPLICIT, SC, RawScu, small_data_set

from dicom_node.receive import StorageReceiver

UID = "1.2.826.0.1.3680043.9.1"
ASSOCIATIONS, EACH = 8, 12


class Notes:
    """What happened, in order."""

    def __init__(self, monkeypatch) -> None:
        self._lock = threading.Lock()
        self.all: list[tuple[str, str]] = []
        fsync, rename, stored = os.fsync, Path.rename, StorageReceiver.stored

        def noted_fsync(fd: int) -> None:
            name = Path(f"/proc/self/fd/{fd}").readlink().stem
            what = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
            self.add(f"{what} begins", name)
            fsync(fd)
            self.add(f"{what} ends", name)

        def noted_rename(path: Path, target: Path) -> Path:
            renamed = rename(path, target)
            self.add("renamed", path.stem)
            return renamed

        def noted_stored(receiver, request, instance_id, *rest) -> None:
            self.add("answered", instance_id)
            stored(receiver, request, instance_id, *rest)

        monkeypatch.setattr("dicom_node.store.files.os.fsync", noted_fsync)
        monkeypatch.setattr(Path, "rename", noted_rename)
        monkeypatch.setattr(StorageReceiver, "stored", noted_stored)

    def add(self, what: str, name: str) -> None:
        with self._lock:
            self.all.append((what, name))


def test_nobody_is_answered_before_an_fsync_that_began_after_his_rename(tmp_path, monkeypatch):
    notes = Notes(monkeypatch)
    failed: list[object] = []

    def send(port: int, number: int) -> None:
        with RawScu(port, source=f"127.0.0.{number + 2}") as scu:
            scu.associate([(1, SC, (EXPLICIT,))])
            for i in range(EACH):
                uid = f"{UID}.{number}.{i}"
                if scu.store(small_data_set(sop_instance=uid, pixels=20_000), SC, uid).status != 0:
                    failed.append(uid)
            scu.release()

    with listening(tmp_path) as node:
        threads = [threading.Thread(target=send, args=(node.port, n)) for n in range(ASSOCIATIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        names = [p.stem for p in node.files(suffix=".dcm")]
    assert not failed
    assert len(names) == ASSOCIATIONS * EACH
    for name in names:
        at = {what: i for i, (what, n) in enumerate(notes.all) if n == name}
        assert at["file ends"] < at["renamed"] < at["answered"]
        between = notes.all[at["renamed"] : at["answered"]]
        began = next(i for i, (what, _) in enumerate(between) if what == "folder begins")
        assert any(what == "folder ends" for what, _ in between[began:])
    assert sum(what == "folder begins" for what, _ in notes.all) <= len(names)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_when_the_folder_cannot_be_synced_nobody_of_that_group_is_acknowledged(tmp_path, monkeypatch, failing):
    """After EIO nothing may be believed: refused, and no file stays that looks acknowledged."""
    real, count, lock = os.fsync, [0], threading.Lock()

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            with lock:
                count[0] += 1
                if count[0] == failing:
                    raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr("dicom_node.store.files.os.fsync", fsync)
    statuses: dict[str, int] = {}

    def send(port: int, number: int) -> None:
        with RawScu(port) as scu:
            scu.associate([(1, SC, (EXPLICIT,))])
            for i in range(4):
                uid = f"{UID}.{number}.{i}"
                statuses[uid] = scu.store(small_data_set(sop_instance=uid), SC, uid).status
            scu.release()

    with listening(tmp_path) as node:
        threads = [threading.Thread(target=send, args=(node.port, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = len(node.files(suffix=".dcm"))
        assert node.files(suffix=".part") == []
    assert set(statuses.values()) == {0x0000, 0xA700}
    assert stored == sum(s == 0 for s in statuses.values())

"""Group commit of a folder's names: nobody is told before an fsync that began after he asked."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from listener_process import wait_for

from dicom_node.store.sync import FolderSync


class Disk:
    """An fsync that takes as long as the test wants."""

    def __init__(self, monkeypatch) -> None:
        self.began, self.ended, self.fail = 0, 0, set()
        self.gate = threading.Semaphore(0)
        self._real = os.fsync
        monkeypatch.setattr("dicom_node.store.sync.os.fsync", self)

    def __call__(self, fd: int) -> None:
        self.began += 1
        number = self.began
        assert self.gate.acquire(timeout=5)
        self._real(fd)
        self.ended = number
        if number in self.fail:
            raise OSError(errno.EIO, "Input/output error")


class Caller(threading.Thread):
    """Notes which fsync had ended when it was told."""

    def __init__(self, sync: FolderSync, disk: Disk) -> None:
        super().__init__(daemon=True)
        self._sync, self._disk = sync, disk
        self.told_after = 0
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._sync.sync()
        except OSError as e:
            self.error = e
        self.told_after = self._disk.ended


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def sync(tmp_path):
    return FolderSync(tmp_path)


def crowd(sync: FolderSync, disk: Disk, size: int) -> tuple[Caller, list[Caller]]:
    """One whose fsync is under way, and others who came too late for it."""
    first = Caller(sync, disk)
    wait_for(lambda: disk.began == 1)
    others = [Caller(sync, disk) for _ in range(size)]
    wait_for(lambda: len(sync._condition._waiters) == size)
    return first, others


def test_who_comes_too_late_waits_for_the_next_and_all_of_them_for_one(sync, disk):
    first, others = crowd(sync, disk, 7)
    disk.gate.release()
    first.join(5)
    assert first.told_after == 1
    wait_for(lambda: disk.began == 2)
    assert not any(c.told_after for c in others)
    disk.gate.release()
    for caller in others:
        caller.join(5)
    assert {c.told_after for c in others} == {2}
    assert disk.began == 2


@pytest.mark.parametrize(("failing", "first_fails", "others_fail"), [(1, True, False), (2, False, True)])
def test_a_failure_is_everybodys_it_was_for_and_nobody_elses(sync, disk, failing, first_fails, others_fail):
    disk.fail = {failing}
    first, others = crowd(sync, disk, 3)
    disk.gate.release()
    disk.gate.release()
    for caller in (first, *others):
        caller.join(5)
    assert (first.error is not None) is first_fails
    assert [c.error is not None for c in others] == [others_fail] * 3
    assert disk.began == 2  # none was tried again


def test_alone_it_costs_one_fsync_each(sync, disk):
    for number in (1, 2, 3):
        disk.gate.release()
        sync.sync()
        assert disk.began == number


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(OSError):
        FolderSync(tmp_path / "gone").sync()


def test_many_at_once_on_a_real_disk(sync, monkeypatch):
    calls, real = [], os.fsync
    monkeypatch.setattr("dicom_node.store.sync.os.fsync", lambda fd: calls.append(real(fd)))
    threads = [threading.Thread(target=lambda: [sync.sync() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 50 <= len(calls) <= 400
    assert sync._waiting.done is False
    assert sync._busy is False


def test_the_folder_may_be_held_open(tmp_path):
    sync = FolderSync(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    sync.open()
    sync.open()
    sync.sync()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    sync.close()
    sync.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    sync.sync()

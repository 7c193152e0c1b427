"""Durable files: whole or not there; their meta group says all; quarantine and retention stay inside their folders."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys

import pytest
from pydicom import dcmread
from raw_scu import SC, small_data_set

from dicom_node.errors import CannotUnderstandError, RootInUseError, StoreError
from dicom_node.store import files as files_module
from dicom_node.store.files import Files, Watermark, lock_root, new_instance_id, write_durable
from dicom_node.store.part10 import FileMeta, encode_meta, read_meta

EXPLICIT = "1.2.840.10008.1.2.1"
META = FileMeta(
    sop_class_uid=SC,
    sop_instance_uid="1.2.826.0.1.3680043.9.1",
    transfer_syntax_uid=EXPLICIT,
    calling_ae_title="SCANNER",
    called_ae_title="THY_AI",
    peer="10.1.2.3",
    association_id="f" * 32,
    received_at=1.0,
)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "root")


def store(files: Files, data: bytes = small_data_set(), at: float = 1_800_000_000.25) -> str:
    part = files.new_part(META)
    part.write(data[:100])
    part.write(memoryview(data)[100:])
    part.commit(at)
    return part.instance_id


def fail_at(monkeypatch, name: str, nth: int, code: int = errno.EIO) -> list[int]:
    """The n-th call of os.<name> fails."""
    real, calls = getattr(os, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(files_module.os, name, call)
    return calls


def test_folders_and_files_are_for_this_user_only(files):
    path = files.object_path(store(files))
    assert path.stat().st_mode & 0o777 == 0o600
    for name in ("", "incoming", "objects", "quarantine", "spool", "outputs", "run"):
        assert (files.root / name).stat().st_mode & 0o077 == 0


def test_the_file_is_part_10_and_says_who_sent_what_to_whom_and_when(files):
    data = small_data_set()
    path = files.object_path(store(files, data))
    meta = files.read_meta(path)
    assert path.read_bytes()[meta.dataset_offset :] == data
    assert meta == FileMeta(
        **{f: getattr(META, f) for f in META.__dataclass_fields__}
        | {"received_at": 1_800_000_000.25, "dataset_offset": meta.dataset_offset}
    )
    read = dcmread(path)
    assert read.file_meta.TransferSyntaxUID == EXPLICIT
    assert read.file_meta.SendingApplicationEntityTitle == "SCANNER"
    assert read.file_meta.ReceivingApplicationEntityTitle == "THY_AI"
    assert read.file_meta.FileMetaInformationGroupLength == meta.dataset_offset - 144
    assert read.file_meta.PrivateInformation.startswith(b'{"association"')


@pytest.mark.parametrize("calling", ["A", "AB", 'Q"UO\\TE', "X" * 16])
@pytest.mark.parametrize("at", [0.0, 12.5, 1_795_241_492.495_079_5, 9_999_999_999.0])
def test_the_meta_group_has_one_length_whatever_the_time(calling, at, tmp_path):
    from dataclasses import replace

    meta = replace(META, calling_ae_title=calling)
    encoded = encode_meta(replace(meta, received_at=at))
    assert len(encoded) == len(encode_meta(meta))
    assert len(encoded) % 2 == 0
    (tmp_path / "x").write_bytes(encoded)
    assert read_meta(tmp_path / "x").calling_ae_title == calling


def test_digest_is_of_the_data_set_alone(files):
    data = small_data_set(pixels=3_000_000)
    assert files.dataset_digest(files.object_path(store(files, data))) == hashlib.sha256(data).hexdigest()


def test_files_of_others_are_read_too(tmp_path):
    path = tmp_path / "x.dcm"
    data = small_data_set()
    path.write_bytes(data)  # neither preamble nor meta group
    assert read_meta(path).transfer_syntax_uid == EXPLICIT
    assert read_meta(path).dataset_offset == 0
    path.write_bytes(encode_meta(META)[132:] + data)  # no preamble
    assert read_meta(path).sop_instance_uid == META.sop_instance_uid
    for rubbish in (
        b"",
        b"DICM",
        b"%PDF-1.4" + bytes(200),
        bytes(128) + b"DICM" + b"\x02\x00\x01\x00OB\0\0\xff\xff\xff\xff",
    ):
        path.write_bytes(rubbish)
        with pytest.raises(CannotUnderstandError):
            read_meta(path)


@pytest.mark.parametrize("name", ["write", "fsync", "pwrite", "open"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_whatever_call_fails_there_is_no_half_instance(files, monkeypatch, name, nth):
    calls = fail_at(monkeypatch, name, nth)
    stored = ""
    try:
        stored = store(files)
    except StoreError:
        assert list(files.incoming.iterdir()) == []
    else:
        assert len(calls) < nth
        monkeypatch.undo()
        assert files.object_path(stored).read_bytes().endswith(small_data_set())


def test_short_writes_are_completed(files, monkeypatch):
    real = os.write
    monkeypatch.setattr(files_module.os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    assert files.object_path(store(files)).read_bytes().endswith(small_data_set())


def test_a_full_tmpfs_never_loses_what_was_stored(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        files = Files(small / "root")
        stored, refused = {}, 0
        for i in range(100):
            data = small_data_set(pixels=40_000 + i)
            try:
                stored[store(files, data)] = data
            except StoreError:
                refused += 1
                if refused == 20:  # the operator makes room
                    for instance_id in list(stored)[:20]:
                        files.remove_incoming(instance_id)
                        del stored[instance_id]
        assert refused >= 20
        assert len(stored) > 50
        assert {p.stem for p in files.incoming.iterdir()} == set(stored)
        assert all(files.object_path(i).read_bytes().endswith(d) for i, d in stored.items())
    finally:
        subprocess.run(["umount", small], check=True)


def test_watermark_has_hysteresis(tmp_path):
    free = iter((3_000_000_000, 1_999_999_999, 2_000_000_001, 2_199_999_999, 2_200_000_000, 2_000_000_001))
    mark = Watermark(tmp_path, 2, lambda _: os.statvfs_result((1, 1, 0, 0, next(free), 0, 0, 0, 0, 255)))
    assert [mark.is_low() for _ in range(6)] == [False, True, True, True, False, False]


def test_filing_away_is_durable_and_may_be_repeated(files):
    instance_id = store(files)
    another = store(files)
    files.move_to_objects(instance_id, another)
    files.move_to_objects(instance_id)
    first = files.object_path(instance_id)
    assert first.parent.name == instance_id[:2]
    files.remove_object(another)
    assert files.list_incoming() == []
    assert files.list_objects() == [first]
    files.remove_object(instance_id)
    with pytest.raises(StoreError):
        files.object_path(instance_id)
    with pytest.raises(StoreError):
        files.move_to_objects(instance_id)


def test_incoming_is_listed_oldest_first(files):
    ids = [store(files) for _ in range(5)]
    for age, instance_id in enumerate(reversed(ids)):
        os.utime(files.object_path(instance_id), ns=(age, age))
    files.new_part(META)
    assert [p.stem for p in files.list_incoming()] == list(reversed(ids))
    assert files.count_incoming() == 5


def test_a_large_instance_is_on_its_way_to_the_disk_while_it_comes_in(files, monkeypatch):
    """Else all of it would wait for the fsync at its end, and the disk for all of it."""
    begun, real = [], os.posix_fadvise

    def advise(fd, offset, length, advice):
        begun.append((offset, length, advice))
        real(fd, offset, length, advice)

    monkeypatch.setattr(files_module.os, "posix_fadvise", advise)
    piece = bytes(range(256)) * 512
    part = files.new_part(META)
    for _ in range(2 * files_module.FLUSH_BYTES // len(piece) + 3):
        part.write(piece)
    assert begun == [(n * files_module.FLUSH_BYTES, files_module.FLUSH_BYTES, os.POSIX_FADV_DONTNEED) for n in (0, 1)]
    stored = part.commit(0.0).read_bytes()
    assert stored[part.meta.dataset_offset :] == piece * (2 * files_module.FLUSH_BYTES // len(piece) + 3)
    store(files)
    assert len(begun) == 2


def test_quarantine_keeps_the_newest_and_the_reasons(files, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_QUARANTINE_FILES", 3)
    for i in range(5):
        part = files.new_part(META)
        part.write(small_data_set())
        kept = files.quarantine(part.release(), f"reason {i}")
        os.utime(kept, ns=(i, i))
    assert files.count_quarantine() == 3
    assert sorted(p.read_text() for p in files.quarantine_folder.glob("*.txt")) == [f"reason {i}\n" for i in (2, 3, 4)]
    monkeypatch.setattr(files_module, "MAX_QUARANTINE_BYTES", 10)
    part = files.new_part(META)
    assert files.quarantine(part.release(), "x") is None
    assert files.count_quarantine() == 0


@pytest.mark.parametrize("evil", ["../../etc/passwd", "", "A" * 32, "0" * 31, "0" * 32 + "/x"])
def test_an_id_is_no_path(files, evil):
    for action in (files.object_path, files.move_to_objects, files.remove_object, files.remove_incoming):
        with pytest.raises(StoreError):
            action(evil)
    with pytest.raises(StoreError):
        files.remove_study([], ["../ledger.sqlite"], [])


def test_retention_removes_everything_of_a_study(files):
    instance_id = store(files)
    files.move_to_objects(instance_id)
    write_durable(files.outputs / "sr.dcm", b"x")
    write_durable(files.spool / "map.npy", b"x")
    files.remove_study([instance_id, new_instance_id()], ["sr.dcm", "gone.dcm"], ["map.npy"])
    assert [p for name in ("objects", "outputs", "spool") for p in (files.root / name).rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_write_durable_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch, name):
    path = tmp_path / "x"
    write_durable(path, b"old")
    fail_at(monkeypatch, name, 1, errno.ENOSPC)
    with pytest.raises(StoreError):
        write_durable(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_write_durable_shares_the_fsync_of_the_folder_it_is_given(tmp_path, monkeypatch):
    from dicom_node.store.sync import FolderSync

    folder, synced = FolderSync(tmp_path), []

    def sync():
        synced.append(sorted(p.name for p in tmp_path.iterdir()))
        folder.sync()

    write_durable(tmp_path / "x", b"new", sync)
    assert synced == [["x"]], "after the rename, before the return"
    fail_at(monkeypatch, "fsync", 2)  # of the file; of the folder
    with pytest.raises(StoreError):
        write_durable(tmp_path / "y", b"new", folder.sync)


def test_one_process_a_role(tmp_path):
    with lock_root(tmp_path, "work"):
        with pytest.raises(RootInUseError):
            lock_root(tmp_path, "work")
        lock_root(tmp_path, "listen").close()
        code = (
            "import sys; from pathlib import Path; from dicom_node.store.files import lock_root\n"
            "try: lock_root(Path(sys.argv[1]), 'work')\n"
            "except Exception as e: print(type(e).__name__)"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "RootInUseError"
    lock_root(tmp_path, "work").close()

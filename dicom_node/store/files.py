"""Durable files under the store root: the truth of the node. The ledger is only their index.

    incoming/<id>.part     being received             incoming/<id>.dcm    acknowledged, waits for the index
    objects/<xx>/<id>.dcm  indexed                    quarantine/<id>.dcm  cannot be understood; bounded
    spool/  outputs/  models/  run/                   of other stages; made here so that their modes are right

A file is written, fsynced, renamed, and its folder fsynced: only then may its instance be acknowledged. An id is ours,
never the wire's. The listener and the stages process both use this file; neither needs the other to be there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from dicom_node.errors import RootInUseError, StoreError
from dicom_node.store import header, part10
from dicom_node.store.part10 import FileMeta
from dicom_node.store.sync import FolderSync, fsync_path
from dicom_node.study import Header

FOLDERS = ("incoming", "objects", "quarantine", "spool", "outputs", "models", "run")
MAX_QUARANTINE_FILES = 200
MAX_QUARANTINE_BYTES = 2 << 30
WATERMARK_HYSTERESIS = 1.1
"""After a refusal the free space must rise by a tenth before instances are taken again, or the answer would flap."""

FLUSH_BYTES = 4 << 20
"""A large instance is on its way to the disk while it still comes in, this much at a time."""

_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_BLOCK = 1 << 20

StatVfs = Callable[[Path], os.statvfs_result]


def new_instance_id() -> str:
    """A name for one stored instance: random, so nothing of the wire can be in it."""
    return uuid.uuid4().hex


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:  # a short write is normal on a full disk; the next one says ENOSPC
        view = view[os.write(fd, view) :]


def write_durable(path: Path, data: bytes, sync: Callable[[], None] | None = None) -> None:
    """The file is there whole, or not at all: temporary file, fsync, rename, fsync of the folder. Raises StoreError.

    `sync` makes the names in the folder durable, in place of an fsync of its own (store/sync.py).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        fsync_path(path.parent) if sync is None else sync()
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(f"a file cannot be written ({e.strerror})") from e


class PartFile:
    """One instance on its way in: `write` the data set, then `commit`, or `discard`. Never both, never twice."""

    def __init__(self, folder: Path, meta: FileMeta, sync: Callable[[], None]) -> None:
        """`sync` makes the names in the folder durable."""
        self.instance_id = new_instance_id()
        self.path = folder / f"{self.instance_id}.part"
        self.size = 0
        """Bytes of the data set so far."""
        head = part10.encode_meta(meta)
        self._time = part10.Time(head)
        self._meta, self._sync = replace(meta, dataset_offset=len(head)), sync
        self._fd, self._flushing = -1, 0
        try:
            self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            _write_all(self._fd, head)
        except OSError as e:
            self.discard()
            raise StoreError(f"an instance cannot be written ({e.strerror})") from e

    @property
    def fd(self) -> int:
        """To read it before it is committed."""
        return self._fd

    @property
    def meta(self) -> FileMeta:
        """What stands in front of the data set."""
        return self._meta

    def write(self, data: bytes | memoryview) -> None:
        """Append to the data set. On StoreError the file is gone."""
        try:
            _write_all(self._fd, data)
            self.size += len(data)
            if self.size - self._flushing >= FLUSH_BYTES:
                # Advice, which makes Linux begin to write: when the rest has come, the disk has done most of its part.
                # What fails there is told by the fsync of `commit`, as ever.
                os.posix_fadvise(self._fd, self._flushing, self.size - self._flushing, os.POSIX_FADV_DONTNEED)
                self._flushing = self.size
        except OSError as e:
            self.discard()
            raise StoreError(f"an instance cannot be written ({e.strerror})") from e

    def commit(self, received_at: float) -> Path:
        """Make it durable under its final name. Only after this may 0x0000 be sent. On StoreError the file is gone."""
        final = self.path.with_suffix(".dcm")
        try:
            os.pwrite(self._fd, *self._time.at(received_at))
            os.fsync(self._fd)
            self.path.rename(final)
            self._sync()
        except OSError as e:
            with contextlib.suppress(OSError):
                final.unlink()
            self.discard()
            raise StoreError(f"an instance cannot be made durable ({e.strerror})") from e
        self._close()
        return final

    def release(self) -> Path:
        """Give the file away as it is, not durable: to quarantine."""
        self._close()
        return self.path

    def discard(self) -> None:
        """Leave nothing behind."""
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class Watermark:
    """Is there room? Says no below `min_free_gb`, and yes again only a tenth above it."""

    def __init__(self, root: Path, min_free_gb: float, statvfs: StatVfs = os.statvfs) -> None:
        self._root, self._statvfs = root, statvfs
        self.reserve_bytes = int(min_free_gb * 1e9)
        self._low = False

    def free_bytes(self) -> int:
        """Bytes this user may still write."""
        stat = self._statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def is_low(self) -> bool:
        """True = refuse new instances."""
        limit = self.reserve_bytes * (WATERMARK_HYSTERESIS if self._low else 1.0)
        self._low = self.free_bytes() < limit
        return self._low


class RootLock:
    """Holds `run/<role>.lock`; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Give the role free."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RootLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_root(root: Path, role: str) -> RootLock:
    """One process a role on one root. Raises RootInUseError when there is one already."""
    folder = root / "run"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / f"{role}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise RootInUseError(f"another process of this node ({role}) works on {root}") from e
    return RootLock(fd)


def node_namespace(root: Path) -> str:
    """A random UUID that is this root's for ever: what UIDs are derived from. Losing it would give new UIDs."""
    path = root / "run" / "namespace"
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        write_durable(path, str(uuid.uuid4()).encode())
        return path.read_text(encoding="ascii").strip()


class Files:
    """The folders of one store root and what may be done in them."""

    def __init__(self, root: Path, fallback_charset: str = "") -> None:
        self.root, self.fallback_charset = root, fallback_charset
        for folder in (root, *(root / name for name in FOLDERS)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.incoming = root / "incoming"
        self._incoming_names = FolderSync(self.incoming)
        self.objects = root / "objects"
        self.spool = root / "spool"
        self.outputs = root / "outputs"
        self.quarantine_folder = root / "quarantine"

    # Receiving

    def new_part(self, meta: FileMeta) -> PartFile:
        """Begin to receive one instance. Raises StoreError."""
        return PartFile(self.incoming, meta, self._incoming_names.sync)

    def hold_incoming(self) -> None:
        """Keep the folder open for as long as instances come: one system call less each. Raises StoreError."""
        try:
            self._incoming_names.open()
        except OSError as e:
            raise StoreError(f"the store cannot be opened ({e.strerror})") from e

    def let_go(self) -> None:
        """After `hold_incoming`."""
        self._incoming_names.close()

    def sweep_parts(self) -> int:
        """Remove what a crash left half received; only the listener may, and only before it listens."""
        parts = list(self.incoming.glob("*.part"))
        for path in parts:
            path.unlink(missing_ok=True)
        return len(parts)

    def count_incoming(self) -> int:
        """How many acknowledged instances wait for the index."""
        with os.scandir(self.incoming) as entries:
            return sum(entry.name.endswith(".dcm") for entry in entries)

    # Indexing

    def list_incoming(self) -> list[Path]:
        """Acknowledged instances that wait for the index, oldest first."""
        found: list[tuple[int, Path]] = []
        with os.scandir(self.incoming) as entries:
            for entry in entries:
                if entry.name.endswith(".dcm"):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime_ns, Path(entry.path)))
        return [path for _, path in sorted(found)]

    def list_objects(self) -> list[Path]:
        """All indexed instances."""
        return sorted(self.objects.glob("[0-9a-f][0-9a-f]/*.dcm"))

    def object_path(self, instance_id: str) -> Path:
        """Where the instance lies now. Raises StoreError when it is gone."""
        for path in (self._object(instance_id), self._incoming(instance_id)):
            if path.exists():
                return path
        raise StoreError(f"instance {instance_id} is gone from the disk")

    def path_of(self, instance_id: str) -> Path:
        """As `object_path`; of an instance that is gone, where it would lie: whoever opens it finds out."""
        waiting = self._incoming(instance_id)
        return waiting if waiting.exists() else self._object(instance_id)

    def move_to_objects(self, *instance_ids: str) -> None:
        """After their rows are committed. Durable, and harmless when repeated.

        The folders are synced once for all: until then a power loss leaves a file in `incoming/`, where the next sweep
        finds it and sees that its row is there.
        """
        touched = set()
        for instance_id in instance_ids:
            source, target = self._incoming(instance_id), self._object(instance_id)
            try:
                if not target.parent.is_dir():
                    target.parent.mkdir(mode=0o700, exist_ok=True)
                    touched.add(self.objects)
                try:
                    source.rename(target)
                except FileNotFoundError:
                    if not target.exists():
                        raise
                touched.add(target.parent)
            except OSError as e:
                raise StoreError(f"instance {instance_id} cannot be filed away ({e.strerror})") from e
        try:
            for folder in (*sorted(touched), self.incoming):
                fsync_path(folder)
        except OSError as e:
            raise StoreError(f"folders of the store cannot be synced ({e.strerror})") from e

    def remove_incoming(self, instance_id: str) -> None:
        """A duplicate: the same bytes are stored already."""
        self._incoming(instance_id).unlink(missing_ok=True)

    def remove_object(self, instance_id: str) -> None:
        """Retention, or a duplicate found at start."""
        self._object(instance_id).unlink(missing_ok=True)

    def remove_study(self, instance_ids: Iterable[str], outputs: Iterable[str], spool: Iterable[str]) -> None:
        """Retention: everything the ledger has just forgotten. What is gone already is no news."""
        for instance_id in instance_ids:
            self.remove_object(instance_id)
            self.remove_incoming(instance_id)
        for folder, names in ((self.outputs, outputs), (self.spool, spool)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise StoreError("not a file name of ours")
                (folder / name).unlink(missing_ok=True)

    def list_made(self, older_than: float) -> list[Path]:
        """Files of spool and outputs that were written before `older_than` (seconds since the epoch)."""
        found = []
        for folder in (self.spool, self.outputs):
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than:
                        found.append(path)
        return found

    def free_bytes(self) -> int:
        """Bytes this user may still write."""
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize

    def quarantine(self, path: Path, reason: str) -> Path | None:
        """Put a file aside for a person, the reason beside it. Bounded: the oldest go first. It holds patient data.

        None = it could not be kept (the disk is full, for one): the file is removed, the refusal stands.
        """
        target = self.quarantine_folder / f"{path.stem}.dcm"
        try:
            path.rename(target)
            target.with_suffix(".txt").write_text(reason + "\n", encoding="utf-8")
        except OSError:
            path.unlink(missing_ok=True)
            return None
        self._trim_quarantine()
        return target if target.exists() else None

    def count_quarantine(self) -> int:
        """Files in quarantine."""
        return sum(1 for _ in self.quarantine_folder.glob("*.dcm"))

    def _trim_quarantine(self) -> None:
        found: list[tuple[int, int, Path]] = []
        for path in self.quarantine_folder.glob("*.dcm"):
            with contextlib.suppress(FileNotFoundError):  # the other process may trim at the same time
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        files, total = len(found), sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if files <= MAX_QUARANTINE_FILES and total <= MAX_QUARANTINE_BYTES:
                return
            path.unlink(missing_ok=True)
            path.with_suffix(".txt").unlink(missing_ok=True)
            files, total = files - 1, total - size

    # Reading

    def read_meta(self, path: Path) -> FileMeta:
        """Group 0002: who sent it to whom, when, by which association; where the data set begins."""
        return part10.read_meta(path)

    def read_header(self, path: Path) -> Header:
        """All attributes but bulk data."""
        return header.read_header(path, self.fallback_charset)

    def read_stored(self, path: Path) -> tuple[FileMeta, Header]:
        """Both, in one pass over the file."""
        return header.read_stored(path, self.fallback_charset)

    def dataset_digest(self, path: Path) -> str:
        """SHA-256 (hex) of the encoded data set as received."""
        return dataset_digest(path)

    def _incoming(self, instance_id: str) -> Path:
        return self.incoming / f"{_checked(instance_id)}.dcm"

    def _object(self, instance_id: str) -> Path:
        return self.objects / _checked(instance_id)[:2] / f"{instance_id}.dcm"


def _checked(instance_id: str) -> str:
    if not _ID.fullmatch(instance_id):
        raise StoreError("not an instance id")
    return instance_id


def dataset_digest(path: Path) -> str:
    """SHA-256 (hex) of the data set's bytes: without preamble and group 0002. Raises StoreError."""
    offset = part10.read_meta(path).dataset_offset
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as e:
        raise StoreError(f"a stored file cannot be read ({e.strerror})") from e
    return digest.hexdigest()

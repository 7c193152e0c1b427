"""The node's own cache of compiled plans. A plan is code that runs on the GPU: one is taken from here and nowhere else.

    <key>.plan  the plan        <key>.json  what it was built for, its bytes and SHA-256        <key>.lock  who builds

The key is the SHA-256 of everything a plan depends on; a part that changes makes another key, so an old plan is never
even looked at. The folder is ours alone (0700). A file that is a link, not ours, open to others, of other bytes than
recorded, or recorded for another key is removed and told in `notes`; the caller builds again. This protects against
others of this machine and against damage, not against somebody who already acts as the node's own user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import BackendError

SCHEMA = 1
MAX_PLANS = 64
"""Those used last are kept."""
MAX_RECORD_BYTES = 1 << 16
_POLL_SECONDS = 0.2
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Key:
    """Everything a plan depends on."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the parts: the file's name."""
        text = json.dumps({"schema": str(SCHEMA), **self.parts}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def replaces(self, other: Mapping[str, str], same: tuple[str, ...]) -> bool:
        """Whether a plan for `other` is stale once there is one for this: alike in `same`, not alike altogether."""
        return dict(other) != dict(self.parts) and all(other.get(name) == self.parts.get(name) for name in same)


class _RefusedError(Exception):
    """Why a file of the cache is not used."""


class Plans:
    """One folder. `notes` tells what an operator should know: a plan that was refused, a cache that cannot be used.

    Without a usable folder nothing is kept and everything is built again. Not thread-safe; several processes may use
    the same folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.notes: list[str] = []
        self._fd = -1
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
            about = os.fstat(self._fd)
            if about.st_uid != os.geteuid():
                raise _RefusedError("the folder belongs to another user")
            if stat.S_IMODE(about.st_mode) & 0o077:
                os.fchmod(self._fd, 0o700)
                self._clear()
                self.notes.append("plan cache: its folder was open to others; it was emptied and closed to them")
        except (OSError, _RefusedError) as e:
            self.close()
            said = e.strerror if isinstance(e, OSError) else e
            self.notes.append(f"plan cache: not used, plans are built at every start ({said})")

    def close(self) -> None:
        """Let go of the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- plans

    def get(self, key: Key) -> bytes | None:
        """The plan as it was put here, or None: then there is none any more. Hold `lock`."""
        if self._fd < 0:
            return None
        name = key.digest
        try:
            data = self._checked(name, key)
        except FileNotFoundError:
            data = None
        except (_RefusedError, OSError) as e:
            data = None
            said = e.strerror if isinstance(e, OSError) else e
            self.notes.append(f"plan cache: a plan was refused and is built again ({said})")
        if data is None:
            self.remove(key)  # what is left of it, silently: a crash between two writes is no attack
        else:
            with contextlib.suppress(OSError):
                os.utime(f"{name}.plan", dir_fd=self._fd)
        return data

    def put(self, key: Key, data: bytes, same: tuple[str, ...] = ()) -> None:
        """Keep a plan; those that it replaces go. What cannot be kept is told, and built again at the next start."""
        if self._fd < 0:
            return
        record = {
            "schema": SCHEMA,
            "key": dict(key.parts),
            "plan": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
        }
        try:
            self._write(f"{key.digest}.plan", data)
            self._write(f"{key.digest}.json", json.dumps(record, indent=1, sort_keys=True).encode())
            self._tidy(key, same)
        except OSError as e:
            self.remove(key)
            self.notes.append(f"plan cache: a plan cannot be kept ({e.strerror})")

    def remove(self, key: Key) -> None:
        """The plan and its record, if they are there."""
        if self._fd >= 0:
            self._unlink(key.digest)

    @contextlib.contextmanager
    def lock(self, key: Key, seconds: float) -> Iterator[None]:
        """One builder at a time for a key, in whatever process. Raises BackendError after `seconds`."""
        if self._fd < 0:
            yield
            return
        try:
            fd = os.open(f"{key.digest}.lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o600, dir_fd=self._fd)
        except OSError as e:
            self.notes.append(f"plan cache: cannot be locked ({e.strerror})")
            yield
            return
        try:
            _acquire(fd, time.monotonic() + seconds, seconds)
            yield
        finally:
            os.close(fd)

    # -- files

    def _checked(self, name: str, key: Key) -> bytes:
        record = self._record(f"{name}.json")
        if record.get("schema") != SCHEMA or record.get("key") != dict(key.parts):
            raise _RefusedError("its record is another plan's")
        promised = record.get("plan")
        if not isinstance(promised, dict) or not isinstance(promised.get("bytes"), int):
            raise _RefusedError("its record is damaged")
        data = self._read(f"{name}.plan", promised["bytes"])
        if len(data) != promised["bytes"] or hashlib.sha256(data).hexdigest() != promised.get("sha256"):
            raise _RefusedError("its bytes are not those that were recorded")
        return data

    def _record(self, name: str) -> dict[str, object]:
        try:
            record = json.loads(self._read(name, MAX_RECORD_BYTES))
        except (ValueError, RecursionError):
            raise _RefusedError("its record is damaged") from None
        if not isinstance(record, dict):
            raise _RefusedError("its record is damaged")
        return record

    def _read(self, name: str, limit: int) -> bytes:
        """A regular file that only we can have written; no more than `limit` and one bytes of it."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            raise
        except OSError:
            raise _RefusedError("it is a link, or cannot be opened") from None
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
                raise _RefusedError("it is no plain file of its own")
            if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise _RefusedError("it belongs to another user or is open to others")
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read(min(max(limit, 0), about.st_size) + 1)  # a damaged limit must not ask for memory
        finally:
            os.close(fd)

    def _write(self, name: str, data: bytes) -> None:
        """There whole, or not at all, also after a power cut."""
        temporary = f".{uuid.uuid4().hex}.part"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=self._fd)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._fd)
            raise

    def _unlink(self, stem: str) -> None:
        for suffix in ("json", "plan"):  # the record first: a plan without one is never used
            try:
                os.unlink(f"{stem}.{suffix}", dir_fd=self._fd)
            except FileNotFoundError:
                continue
            except OSError as e:  # a folder of that name, for one: it is refused each time, and told
                self.notes.append(f"plan cache: a refused plan cannot be removed ({e.strerror})")

    def _tidy(self, key: Key, same: tuple[str, ...]) -> None:
        """Stale plans, plans beyond the bound, and what crashed writers left."""
        found: list[tuple[int, str]] = []
        for entry in os.scandir(self._fd):
            stem, _, suffix = entry.name.rpartition(".")
            with contextlib.suppress(FileNotFoundError):
                age = entry.stat(follow_symlinks=False).st_mtime
                if suffix == "part" and age < time.time() - 3600:
                    os.unlink(entry.name, dir_fd=self._fd)
                elif suffix == "plan" and stem != key.digest:
                    if same and self._stale(stem, key, same):
                        self._unlink(stem)
                    else:
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, stem))
        for _, stem in sorted(found, reverse=True)[MAX_PLANS - 1 :]:
            self._unlink(stem)

    def _stale(self, stem: str, key: Key, same: tuple[str, ...]) -> bool:
        try:
            parts = self._record(f"{stem}.json").get("key")
        except (_RefusedError, OSError):
            return False  # perhaps another worker is just writing it
        return isinstance(parts, dict) and key.replaces(parts, same)

    def _clear(self) -> None:
        for entry in os.scandir(self._fd):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=self._fd)


def _acquire(fd: int, deadline: float, seconds: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise BackendError(f"another worker builds this plan, for more than {seconds:.0f} s now") from None
            time.sleep(_POLL_SECONDS)

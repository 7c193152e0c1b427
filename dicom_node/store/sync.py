"""Names on stable storage: one fsync of a folder for all that were renamed into it before it began.

Nothing leaves sooner than it would alone. Who asks returns only after an fsync that *began* after it asked has ended;
while one is under way those who ask meanwhile wait for the next, which serves them all. An fsync that fails fails
everybody it was for, and is not tried again for them: after EIO a second one may lie.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Make durable the names in a folder, or what was written to a file that is closed by now.

    An error is final: after EIO a second fsync may lie (the page is clean).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Group:
    """Those who wait for the same fsync."""

    def __init__(self) -> None:
        self.done = False
        self.error: OSError | None = None


class FolderSync:
    """For one folder; any thread may call `sync`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._condition = threading.Condition()
        self._waiting = _Group()
        self._busy = False
        self._fd = -1

    def open(self) -> None:
        """Keep the folder open from now on. Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of it; `sync` may still be called. Not while one is under way."""
        with self._condition:
            while self._busy:
                self._condition.wait()
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def sync(self) -> None:
        """Make every name that is in the folder now durable. Raises OSError."""
        with self._condition:
            group = self._waiting
            while self._busy and not group.done:
                self._condition.wait()
            if not group.done:
                self._lead(group)
        if group.error is not None:
            raise OSError(group.error.errno, group.error.strerror)

    def _lead(self, group: _Group) -> None:
        """The fsync, without the lock: who asks from here on is too late for it."""
        self._busy, self._waiting = True, _Group()
        self._condition.release()
        try:
            if self._fd < 0:
                fsync_path(self._folder)
            else:
                os.fsync(self._fd)
        except OSError as e:
            group.error = e
        finally:
            self._condition.acquire()
            group.done, self._busy = True, False
            self._condition.notify_all()

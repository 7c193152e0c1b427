"""The Unix control socket: how the command line and a separately supervised listener talk to the stages process.

One JSON object a line. Mode 0600 in a 0700 folder: who may connect may operate the node.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOCKET_NAME = "control.sock"
MAX_LINE = 1 << 20
Message = dict[str, Any]


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A path below 108 bytes for a socket in `folder` (sun_path), however deep the root lies."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)


def connect(folder: Path, timeout: float | None = 10.0) -> socket.socket:
    """Raises OSError when no node listens there."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(timeout)
    try:
        with _short(folder) as path:
            s.connect(path)
    except OSError:
        s.close()
        raise
    return s


def ask(folder: Path, message: Message, *, patience: float = 10.0) -> Message:
    """One question, one answer; {} where none came. Raises OSError when no node runs on this root."""
    with connect(folder) as s:
        s.settimeout(patience)
        s.sendall(json.dumps(message).encode() + b"\n")
        return next(lines(s), {})


def lines(s: socket.socket) -> Iterator[Message]:
    """JSON objects, one a line, until the peer closes; a line too long or not JSON ends it."""
    buffer = b""
    while True:
        try:
            chunk = s.recv(65536)
        except OSError:
            return
        if not chunk:
            return
        buffer += chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            try:
                value = json.loads(line)
            except ValueError:
                return
            if not isinstance(value, dict):
                return
            yield value
        if len(buffer) > MAX_LINE:
            return


class ControlServer:
    """Accepts on `<folder>/control.sock`. `answer` serves operators, `on_listener` a listener."""

    def __init__(
        self, folder: Path, answer: Callable[[Message], Message], on_listener: Callable[[Iterator[Message]], None]
    ) -> None:
        self._answer, self._on_listener = answer, on_listener
        with contextlib.suppress(FileNotFoundError):
            (folder / SOCKET_NAME).unlink()  # a dead node's; the lock on the root proves that no live one has it
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            with _short(folder) as path:
                self._server.bind(path)
        finally:
            os.umask(previous)
        self._server.listen(16)
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def stop(self) -> None:
        """Accept no more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                s, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(s,), name="control-client", daemon=True).start()

    def _serve(self, s: socket.socket) -> None:
        s.settimeout(10.0)
        with s:
            messages = lines(s)
            for message in messages:
                if message.get("kind") == "listener":
                    s.settimeout(None)
                    self._on_listener(messages)
                    return
                with contextlib.suppress(OSError):
                    s.sendall(json.dumps(self._answer(message)).encode() + b"\n")

"""JSON lines over a socket pair, with one deadline for a whole message and a limit to its size. Both ends trust
neither the other's speed nor its length: the child runs native decoders on foreign bytes.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

MAX_LINE = 64 << 20
"""Bytes of one message: the headers of a study of some thousand instances are a few megabytes."""
_BLOCK = 1 << 16


class EndedError(OSError):
    """The other end is gone."""


class GarbageError(OSError):
    """A line that is too long, or no JSON object."""


class Wire:
    """One end of the pair."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = bytearray()
        self._sending = threading.Lock()  # engines that load side by side all say where they are

    def send(self, message: Mapping[str, Any], deadline: float | None = None) -> None:
        """Raises TimeoutError, EndedError; GarbageError for what is too long to send."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise GarbageError(f"a message of more than {MAX_LINE >> 20} MB")
        with self._sending:
            self._channel.settimeout(_left(deadline))
            try:
                self._channel.sendall(line)
            except TimeoutError:
                raise
            except OSError:
                raise EndedError from None

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        """The next message. Raises TimeoutError, EndedError, GarbageError."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE:
                raise GarbageError(f"a message of more than {MAX_LINE >> 20} MB")
            self._channel.settimeout(_left(deadline))
            try:
                block = self._channel.recv(_BLOCK)
            except TimeoutError:
                raise
            except OSError:
                raise EndedError from None
            if not block:
                raise EndedError
            self._buffer += block
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return _parsed(line)

    def close(self) -> None:
        """The other end reads the end of the stream."""
        self._channel.close()


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise GarbageError("a message that is no JSON object")
    return message

"""A peer's byte stream, sent to any Storage SCP, and what came back in words: the form in which two SCPs are compared.

A stream begins with an A-ASSOCIATE-RQ, or does not; its answer is waited for, and the rest is sent at once. When the
SCP has no more to say the sending side is closed, and everything is read until the SCP closes too. Shares no code with
the node.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

from raw_scu import RawScu

COMMANDS = {0x8001: "C-STORE", 0x8030: "C-ECHO", 0x8140: "N-CREATE", 0x8100: "N-EVENT-REPORT", 0x8020: "C-FIND"}
MAX_HELD = 1 << 20
"""No SCP has so much to say to a case of some kilobytes."""


@dataclass(frozen=True)
class Transcript:
    """What the SCP said, one word a PDU or DIMSE response; how it ended is the last word."""

    words: tuple[str, ...]
    abort: tuple[int, int] | None = None
    """Source and reason of its A-ABORT, if there was one."""

    def __str__(self) -> str:
        return " ".join(self.words)


def split(stream: bytes) -> list[bytes]:
    """Its PDUs as their lengths say; what is left over comes last."""
    found, at = [], 0
    while len(stream) - at >= 6:
        end = at + 6 + struct.unpack_from(">L", stream, at + 2)[0]
        if end > len(stream):
            break
        found.append(stream[at:end])
        at = end
    return [*found, stream[at:]] if at < len(stream) else found


def replay(port: int, stream: bytes, *, patience: float = 0.3, timeout: float = 5.0) -> Transcript:
    """One connection. Ends with `closed` (by the SCP, in order or by RST) or `silent` (it stays open).

    `patience` is how long an SCP that has something to answer is quiet at most. A release it must answer: that is
    waited for longer, because closing at once would race with the answer."""
    words: list[str] = []
    reader = _Reader(words)
    pdus = split(stream)
    first = pdus[0] if pdus and whole(pdus[0]) and pdus[0][0] == 1 else b""
    with RawScu(port, timeout=timeout) as scu:
        with contextlib.suppress(ConnectionError):
            scu.send(first or stream)
            if first and reader.read(scu.socket, timeout, words=1) and len(stream) > len(first):
                scu.send(stream[len(first) :])
        releases = bool(pdus) and whole(pdus[-1]) and pdus[-1][0] == 5
        reader.read(scu.socket, timeout if releases else patience, until=("RP", "ABORT") if releases else ())
        with contextlib.suppress(OSError):
            scu.socket.shutdown(socket.SHUT_WR)
        if reader.read(scu.socket, timeout):
            words.append("silent")
    return Transcript(tuple(words), reader.abort)


def whole(pdu: bytes) -> bool:
    """As long as it says."""
    return len(pdu) >= 6 and len(pdu) == 6 + struct.unpack_from(">L", pdu, 2)[0]


class _Reader:
    """Turns what is received into words."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.abort = words, None
        self._bytes, self._command = b"", b""

    def read(self, sock: socket.socket, quiet: float, *, words: int | None = None, until: tuple[str, ...] = ()) -> bool:
        """Until nothing came for so long, or so many words stand there, or one of `until`. False = it has closed."""
        if self.words[-1:] == ["closed"]:
            return False
        while (words is None or len(self.words) < words) and not set(until) & set(self.words):
            try:
                sock.settimeout(quiet)
                more = sock.recv(65536)
            except TimeoutError:
                return True
            except OSError:
                more = b""
            if not more:
                self.words.append("closed")
                return False
            self._bytes += more
            assert len(self._bytes) < MAX_HELD
            for pdu in split(self._bytes):
                if whole(pdu):
                    self._bytes = self._bytes[len(pdu) :]
                    self._pdu(pdu[0], pdu[6:])
        return True

    def _pdu(self, kind: int, body: bytes) -> None:
        if kind == 2:
            self.words.append(f"AC({accepted(body)})")
        elif kind == 3:
            self.words.append("RJ({},{},{})".format(*body[1:4]))
        elif kind == 4:
            self._data(body)
        elif kind == 6:
            self.words.append("RP")
        elif kind == 7:
            self.words.append("ABORT")
            self.abort = (body[2], body[3])
        else:
            self.words.append(f"PDU-{kind:02X}")

    def _data(self, body: bytes) -> None:
        at = 0
        while at < len(body):
            length, _, control = struct.unpack_from(">LBB", body, at)
            self._command += body[at + 6 : at + 4 + length]
            at += 4 + length
            if control & 2:
                command, self._command = self._command, b""
                self.words.append(response(command))


def accepted(body: bytes) -> str:
    """Context ids and results of an A-ASSOCIATE-AC, as `1:0,3:4`: their order means nothing (PS3.8 9.3.3)."""
    at, results = 68, []
    while at < len(body):
        kind, length = struct.unpack_from(">BxH", body, at)
        if kind == 0x21:
            results.append((body[at + 4], body[at + 6]))
        at += 4 + length
    return ",".join(f"{number}:{result}" for number, result in sorted(results))


def response(command: bytes) -> str:
    """`C-STORE=0000`"""
    field, status, at = 0, 0, 0
    while at < len(command):
        _, element, length = struct.unpack_from("<HHL", command, at)
        if element == 0x0100:
            field = struct.unpack_from("<H", command, at + 8)[0]
        elif element == 0x0900:
            status = struct.unpack_from("<H", command, at + 8)[0]
        at += 8 + length
    return f"{COMMANDS.get(field, f'{field:04X}')}={status:04X}"

"""The least a durable Storage SCP has to do, as fast as Python does it: the yardstick of `scripts/bench receive`.

    reference_receiver.py PORT FOLDER [--no-sync]

A thread an association, one buffer, P-DATA-TF parsed in place, payload straight to the file; then fsync(file), rename,
fsync(folder), and only then 0x0000. No admission, no validation, no index, no bounds but that of a PDU: what the node
does beyond this is what it costs. It shares no code with the node.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

MAX_PDU = 131072
BUFFER = 1 << 20
SECONDS = 60.0
IMPLICIT = b"1.2.840.10008.1.2"
IMPLEMENTATION = b"1.2.826.0.1.3680043.9.1.99"


class PeerError(Exception):
    """The peer sent what this does not understand: aborted."""


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def items(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack_from(">BxH", data, at)
        found.append((kind, data[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


def negotiate(request: bytes) -> tuple[bytes, dict[int, bytes]]:
    """The A-ASSOCIATE-AC, and the transfer syntax of each context. Every abstract syntax is taken."""
    syntaxes: dict[int, bytes] = {}
    for kind, body in items(request[68:]):
        if kind == 0x20:
            offered = [value for inner, value in items(body[4:]) if inner == 0x40]
            if not offered:
                raise PeerError("no transfer syntax")
            syntaxes[body[0]] = next((s for s in offered if s != IMPLICIT), offered[0])
    answer = request[:4] + request[4:68] + item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, syntax in syntaxes.items():
        answer += item(0x21, bytes((number, 0, 0, 0)) + item(0x40, syntax))
    answer += item(0x50, item(0x51, struct.pack(">L", MAX_PDU)) + item(0x52, IMPLEMENTATION))
    return struct.pack(">BBL", 2, 0, len(answer)) + answer, syntaxes


def command_elements(command: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at < len(command):
        _, element, length = struct.unpack_from("<HHL", command, at)
        found[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, number, len(value)) + value


def response(context_id: int, request: dict[int, bytes]) -> bytes:
    """Status 0x0000 to a C-STORE-RQ or a C-ECHO-RQ."""
    field = struct.unpack("<H", request[0x0100])[0] | 0x8000
    body = element(0x0002, request[0x0002]) + element(0x0100, struct.pack("<H", field))
    body += element(0x0120, request[0x0110]) + element(0x0800, b"\x01\x01") + element(0x0900, b"\0\0")
    if 0x1000 in request:
        body += element(0x1000, request[0x1000])
    body = element(0, struct.pack("<L", len(body))) + body
    return struct.pack(">BBLLBB", 4, 0, len(body) + 6, len(body) + 2, context_id, 3) + body


def file_head(request: dict[int, bytes], syntax: bytes) -> bytes:
    """Preamble and file meta information (PS3.10 7.1)."""

    def ui(number: int, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HH2sH", 2, number, b"UI", len(value)) + value

    meta = struct.pack("<HH2sHL", 2, 1, b"OB", 0, 2) + b"\0\1" + ui(2, request[0x0002].rstrip(b"\0"))
    meta += ui(3, request[0x1000].rstrip(b"\0")) + ui(0x10, syntax) + ui(0x12, IMPLEMENTATION)
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(meta)) + meta


class Folder:
    """Where instances go. A file has its name only when it is durable."""

    def __init__(self, path: Path, sync: bool) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path, self._sync = path, sync
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._numbers = itertools.count()

    def new(self) -> tuple[Path, int]:
        path = self._path / f"{next(self._numbers):08d}.part"
        return path, os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)

    def keep(self, path: Path, fd: int) -> None:
        if self._sync:
            os.fsync(fd)
        os.close(fd)
        path.rename(path.with_suffix(".dcm"))
        if self._sync:
            os.fsync(self._fd)


class Connection:
    """One association."""

    def __init__(self, sock: socket.socket, folder: Folder) -> None:
        self._sock, self._folder = sock, folder
        self._syntaxes: dict[int, bytes] = {}
        self._command = bytearray()
        self._request: dict[int, bytes] = {}
        self._path, self._fd = Path(), -1
        self._over = False

    def serve(self) -> None:
        self._sock.settimeout(SECONDS)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._read()
        except (PeerError, struct.error, KeyError, IndexError, UnicodeError):
            with contextlib.suppress(OSError):
                self._sock.sendall(b"\7\0\0\0\0\4\0\0\2\0")
        except OSError:
            pass
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._path.unlink(missing_ok=True)
            self._sock.close()

    def _read(self) -> None:
        buffer = bytearray(BUFFER)
        view, have = memoryview(buffer), 0
        while not self._over:
            got = self._sock.recv_into(view[have:])
            if not got:
                return
            # Linux forgets the flag; without it a sender with Nagle on waits 40 ms for our acknowledgement.
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            have += got
            at = 0
            while have - at >= 6:
                kind, length = struct.unpack_from(">BxL", buffer, at)
                if length > BUFFER - 6:
                    raise PeerError("PDU too long")
                if have - at < 6 + length:
                    break
                self._pdu(kind, view[at + 6 : at + 6 + length])
                at += 6 + length
            if at:
                view[: have - at] = view[at:have]
                have -= at

    def _pdu(self, kind: int, body: memoryview) -> None:
        if kind == 4:
            self._data(body)
        elif kind == 1:
            answer, self._syntaxes = negotiate(bytes(body))
            self._sock.sendall(answer)
        elif kind == 5:
            self._sock.sendall(b"\6\0\0\0\0\4\0\0\0\0")
            self._over = True
        else:
            self._over = True

    def _data(self, body: memoryview) -> None:
        at = 0
        while at < len(body):
            length, context_id, control = struct.unpack_from(">LBB", body, at)
            if length < 2 or at + 4 + length > len(body):
                raise PeerError("PDV longer than its PDU")
            fragment = body[at + 6 : at + 4 + length]
            at += 4 + length
            if control & 1:
                self._command += fragment
                if control & 2:
                    self._begin(context_id)
            else:
                self._write(fragment)
                if control & 2:
                    self._finish(context_id)

    def _begin(self, context_id: int) -> None:
        self._request = command_elements(bytes(self._command))
        self._command.clear()
        if self._request[0x0100] == b"\x30\0":
            self._sock.sendall(response(context_id, self._request))
            return
        self._path, self._fd = self._folder.new()
        self._write(memoryview(file_head(self._request, self._syntaxes[context_id])))

    def _write(self, data: memoryview) -> None:
        if self._fd < 0:
            raise PeerError("data before its command")
        while data:
            data = data[os.write(self._fd, data) :]

    def _finish(self, context_id: int) -> None:
        fd, self._fd = self._fd, -1
        self._folder.keep(self._path, fd)
        self._sock.sendall(response(context_id, self._request))


def serve(port: int, folder: Path, *, sync: bool = True, ready: Callable[[int], None] | None = None) -> None:
    """Until the process ends."""
    store = Folder(folder, sync)
    with socket.create_server(("127.0.0.1", port), backlog=256) as listening:
        if ready is not None:
            ready(listening.getsockname()[1])
        while True:
            sock, _ = listening.accept()
            threading.Thread(target=Connection(sock, store).serve, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-sync", action="store_true", help="as DCMTK and Orthanc's index do it: not durable")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    serve(arguments.port, arguments.folder, sync=not arguments.no_sync)


if __name__ == "__main__":
    main()

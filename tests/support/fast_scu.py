"""A C-STORE sender that costs as little as can be, so that the receiver is what is measured.

    fast_scu.py PORT SENDERS PER_ASSOCIATION FILE…   one JSON object on stdout

Files are read and their PDUs built before the clock starts; what clips have in common is framed once. PER_ASSOCIATION
0: all of a sender's instances on one association. Prints wall, bytes, instances, associations, and every latency in
seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import struct
import sys
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from raw_scu import association_request, store_command

MAX_PDU = 131072
RELEASE = b"\5\0\0\0\0\4\0\0\0\0"


@dataclass(frozen=True)
class Parsed:
    """A Part 10 file: who it is, and its data set."""

    sop_class: str
    sop_instance: str
    syntax: str
    data: bytes


def read(path: Path) -> Parsed:
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(path)
    whole = path.read_bytes()
    begin = 132 + 12 + struct.unpack_from("<L", whole, 140)[0]
    return Parsed(
        str(meta.MediaStorageSOPClassUID),
        str(meta.MediaStorageSOPInstanceUID),
        str(meta.TransferSyntaxUID),
        whole[begin:],
    )


def framed(data: bytes, first: int, room: int, *, last: bool) -> bytes:
    """`data` as P-DATA-TF of one PDV each; `first` bytes of it in the first."""
    out, at = [], 0
    while at < len(data):
        size = first if at == 0 and first else room
        part = data[at : at + size]
        at += len(part)
        control = 2 if last and at >= len(data) else 0
        out.append(struct.pack(">BBLLBB", 4, 0, len(part) + 6, len(part) + 2, 1, control) + part)
    return b"".join(out)


class Streams:
    """The messages of one sender. Bulk that two files in a row have in common is kept once."""

    def __init__(self, files: list[Parsed], max_pdu: int) -> None:
        self._room = min(max_pdu or MAX_PDU, MAX_PDU) - 6
        self._tails: dict[bytes, bytes] = {}
        self.all = [self._stream(each) for each in files]

    def _stream(self, file: Parsed) -> tuple[bytes, bytes]:
        head, bulk = file.data[: self._room], file.data[self._room :]
        command = store_command(file.sop_class, file.sop_instance)
        own = struct.pack(">BBLLBB", 4, 0, len(command) + 6, len(command) + 2, 1, 3) + command
        own += framed(head, 0, self._room, last=not bulk)
        if bulk and bulk not in self._tails:
            self._tails[bulk] = framed(bulk, 0, self._room, last=True)
        return own, self._tails.get(bulk, b"")


class Scu:
    """One association."""

    def __init__(self, port: int, file: Parsed) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(
            association_request([(1, file.sop_class, (file.syntax,))], calling="FASTSCU", max_pdu=MAX_PDU)
        )
        kind, body = self._pdu()
        if kind != 2:
            raise RuntimeError(f"not accepted: PDU {kind:02X}")
        if b"\x21\0" in body and body[body.index(b"\x21\0", 68) + 6]:
            raise RuntimeError("the context is not accepted")
        at = body.find(b"\x51\0\0\4")
        self.max_pdu: int = struct.unpack_from(">L", body, at + 4)[0]

    def store(self, own: bytes, tail: bytes) -> float:
        """Seconds from the first byte to the response."""
        began = time.perf_counter()
        self.socket.sendall(own)
        if tail:
            self.socket.sendall(tail)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        kind, body = self._pdu()
        seconds = time.perf_counter() - began
        at = body.find(b"\0\0\0\x09\2\0\0\0")
        if kind != 4 or at < 0 or body[at + 8 : at + 10] != b"\0\0":
            raise RuntimeError("an instance was not stored")
        return seconds

    def release(self) -> None:
        self.socket.sendall(RELEASE)
        self._pdu()
        self.socket.close()

    def _pdu(self) -> tuple[int, bytes]:
        head = self._exactly(6)
        return head[0], self._exactly(struct.unpack(">L", head[2:])[0])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise RuntimeError("cut off")
            data += more
        return data


def sender(port: int, paths: list[Path], per: int, ready: Queue[Any], start: Event, done: Queue[Any]) -> None:
    """One process."""
    try:
        files = [read(path) for path in paths]
        probe = Scu(port, files[0])
        probe.release()
        streams = Streams(files, probe.max_pdu).all
        ready.put(True)
        start.wait()
        done.put(_send(port, files[0], streams, per or len(streams)))
    except (OSError, RuntimeError) as e:
        ready.put(False)
        done.put({"error": f"{type(e).__name__}: {e}"})


def _send(port: int, file: Parsed, streams: list[tuple[bytes, bytes]], per: int) -> dict[str, Any]:
    latencies: list[float] = []
    began, associations = time.time(), 0
    for at in range(0, len(streams), per):
        scu = Scu(port, file)
        associations += 1
        latencies += [scu.store(*stream) for stream in streams[at : at + per]]
        scu.release()
    size = sum(len(own) + len(tail) for own, tail in streams)
    return {"began": began, "ended": time.time(), "bytes": size, "associations": associations, "latencies": latencies}


def send(port: int, senders: int, per: int, paths: list[Path]) -> dict[str, Any]:
    """All of them, by so many senders at once; each gets every n-th."""
    context = multiprocessing.get_context("fork")
    ready, done, start = context.Queue(), context.Queue(), context.Event()
    shares = [share for k in range(senders) if (share := paths[k::senders])]
    processes = [context.Process(target=sender, args=(port, share, per, ready, start, done)) for share in shares]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get(timeout=300)
    start.set()
    results = [done.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    errors = [r["error"] for r in results if "error" in r]
    if errors:
        return {"error": errors[0]}
    return {
        "wall": max(r["ended"] for r in results) - min(r["began"] for r in results),
        "bytes": sum(r["bytes"] for r in results),
        "instances": sum(len(r["latencies"]) for r in results),
        "associations": sum(r["associations"] for r in results),
        "latencies": sorted(s for r in results for s in r["latencies"]),
    }


if __name__ == "__main__":
    print(json.dumps(send(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(a) for a in sys.argv[4:]])))

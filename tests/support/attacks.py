"""What hostile peers do to a Storage SCP before and in an association. Each is a generator (`besieged.Attack`).

All of it was done to stock pynetdicom first, with the effects that are told at each. Bounded: no attack sends more than
some hundred megabytes or holds more than some hundred sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import hostile_cases as cases
from besieged import Besieged
from hostile_cases import REQUEST, STORE, UID, pdvs
from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    SC,
    AbortedError,
    RawScu,
    RejectedError,
    association_request,
    echo_command,
    pdata,
    small_data_set,
    store_command,
)
from wire_replay import replay

CONTEXTS = [(1, SC, (EXPLICIT,)), (3, SC, (IMPLICIT,))]
BEGIN = pdata(1, 3, store_command(SC, UID))
ENDS = (AbortedError, RejectedError, OSError)


def connected(node: Besieged, source: str = "127.0.0.1", timeout: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.port), timeout, source_address=(source, 0))


def push(sock: socket.socket, megabytes: int) -> None:
    """As much as the other side takes."""
    block = bytes(1 << 20)
    with contextlib.suppress(OSError):
        for _ in range(megabytes):
            sock.sendall(block)


def close(*held: socket.socket | RawScu) -> None:
    for each in held:
        (each.socket if isinstance(each, RawScu) else each).close()


def cut(sock: socket.socket, seconds: float = 20.0) -> bool:
    """The other side ends it within so long, whatever it says before."""
    sock.settimeout(seconds)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if not sock.recv(65536):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


# --- before there is an association ----------------------------------------------------------------------------------


def noise(node: Besieged) -> Iterator[None]:
    """Random bytes, other protocols."""
    for data in (
        *(os.urandom(2048) for _ in range(8)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"\0" * 999,
    ):
        with connected(node) as s:
            s.sendall(data)
            yield


def endless_requests(node: Besieged) -> Iterator[None]:
    """Five sockets, each with 200 MB of one A-ASSOCIATE-RQ. (Stock: 1 GB of memory, without an association.)"""
    held = [connected(node) for _ in range(5)]
    for s in held:
        s.sendall(b"\x01\x00\xff\xff\xff\xff")
    with ThreadPoolExecutor(5) as pool:
        pushing = [pool.submit(push, s, 200) for s in held]
        yield
        for each in pushing:
            each.result()
    close(*held)


def largest_requests(node: Besieged) -> Iterator[None]:
    """Requests just within the 64 KB, of as many items as go in. Negotiation costs time for each of them."""
    many = [cases.item(0x40, b"1.2.%d" % k) for k in range(4000)]
    thousand = [cases.context(1 + 2 * (k % 128), cases.ABSTRACT, cases.SYNTAX) for k in range(1000)]
    user = cases.item(
        0x50, cases.item(0x51, struct.pack(">L", 16384)) + cases.item(0x52, b"1.2.3") + cases.item(0x5A, b"") * 15_000
    )
    contexts = [(1 + 2 * k, f"1.2.840.10008.5.1.4.1.1.{k}", (EXPLICIT, IMPLICIT)) for k in range(128)]
    for request in (
        cases.bare_request(cases.APPLICATION, cases.context(1, cases.ABSTRACT, *many, cases.SYNTAX), cases.USER),
        cases.bare_request(cases.APPLICATION, *thousand, cases.USER),
        cases.bare_request(cases.APPLICATION, cases.context(1, cases.ABSTRACT, cases.SYNTAX), user),
        association_request(contexts),
    ):
        for _ in range(2):
            with connected(node) as s:
                s.sendall(request)
                s.shutdown(socket.SHUT_WR)
                yield
                assert cut(s)


def half_open(node: Besieged) -> Iterator[None]:
    """Two hundred sockets of one address that say nothing. (Stock: everybody else is rejected for 31 s.)"""
    held = [connected(node) for _ in range(200)]
    yield
    close(*held)


def half_open_everywhere(node: Besieged) -> Iterator[None]:
    """The same from a hundred addresses, against a node that knows its peers: they have a reserve."""
    held = [connected(node, f"127.2.0.{k}") for k in range(1, 101)]
    yield
    close(*held)


def churn(node: Besieged) -> Iterator[None]:
    """Connections and associations that end at once."""
    for k in range(200):
        close(connected(node, f"127.0.0.{20 + k % 8}"))
    yield
    for k in range(40):
        scu = RawScu(node.port, source=f"127.0.0.{20 + k % 8}")
        with contextlib.suppress(*ENDS):
            scu.associate(CONTEXTS)
        scu.reset() if k % 2 else close(scu)
    yield


def who_never_close(node: Besieged) -> Iterator[None]:
    """Rejected, aborted, released - and the attacker keeps its side open. The listener's must end all the same."""
    held = []
    for k, last in enumerate((cases.RELEASE, b"\xff" * 10, cases.request(called="NOBODY")) * 4):
        s = connected(node, f"127.0.0.{30 + k}")
        if k % 3 < 2:
            s.sendall(REQUEST)
            s.recv(4096)
        s.sendall(last)
        held.append(s)
    yield
    node.settles(10)
    close(*held)


# --- slowly ----------------------------------------------------------------------------------------------------------

STATES: dict[str, tuple[bytes, bytes]] = {
    "request header": (b"", REQUEST[:6]),
    "request": (REQUEST[:40], REQUEST[40:]),
    "pdu header": (REQUEST, STORE[:6]),
    "command": (REQUEST + BEGIN[:30], BEGIN[30:]),
    "data pdu": (REQUEST + BEGIN + pdata(1, 0, bytes(4000))[:100], bytes(3000)),
    "release": (REQUEST + cases.RELEASE[:4], cases.RELEASE[4:]),
}
"""What comes at once, and what trickles after it."""


def slow_everywhere(node: Besieged) -> Iterator[None]:
    """Slow-loris in each state at once: a byte now and then, never enough."""
    held = []
    for k, (first, _) in enumerate(STATES.values()):
        s = connected(node, f"127.0.0.{40 + k}")
        if first[: len(REQUEST)] == REQUEST:
            s.sendall(REQUEST)
            s.recv(4096)
            first = first[len(REQUEST) :]
        s.sendall(first)
        held.append(s)
    for at in range(5):
        for s, (_, rest) in zip(held, STATES.values(), strict=True):
            with contextlib.suppress(OSError):
                s.sendall(rest[at : at + 1])
        time.sleep(0.05)
        yield
    close(*held)


def trickle(sock: socket.socket, data: bytes, pause: float) -> None:
    """A byte every `pause` seconds until the listener has enough of it."""
    with contextlib.suppress(OSError):
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])
            time.sleep(pause)


def trickling_data(node: Besieged) -> Iterator[None]:
    """Whole P-DATA-TF, always in time, of one byte or of none: alive, and never done. The listener must end it."""
    for fragment in (b"x", b""):
        with RawScu(node.port) as scu:
            scu.associate(CONTEXTS)
            scu.send(BEGIN)
            until = time.monotonic() + 10
            with contextlib.suppress(OSError):
                while time.monotonic() < until:
                    scu.send(pdata(1, 0, fragment))
                    time.sleep(0.05)
                    yield
            assert time.monotonic() < until, f"{fragment!r} for ten seconds"


def deaf(node: Besieged) -> Iterator[None]:
    """Asks and asks, and never reads an answer: our answers fill its window, then its requests ours."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.settimeout(5)
    s.connect(("127.0.0.1", node.port))
    s.sendall(REQUEST)
    s.recv(4096)
    block = pdata(5, 3, echo_command()) * 1000
    pushing = threading.Thread(target=_push_blocks, args=(s, block, 200))
    pushing.start()
    while pushing.is_alive():
        yield
        time.sleep(0.2)
    node.settles(15)
    close(s)


def _push_blocks(sock: socket.socket, block: bytes, times: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(times):
            sock.sendall(block)


# --- in an association -----------------------------------------------------------------------------------------------


def idle_associations(node: Besieged) -> Iterator[None]:
    """All the places one address gets, and more. (Stock: the node is closed to all until its time-out of 60 s.)"""
    held = _fill(node, ["127.0.0.1"] * 24)
    yield
    close(*held)


def idle_associations_everywhere(node: Besieged) -> Iterator[None]:
    """As many as eight addresses get together, more than the port has: the last places are for who holds none."""
    held = _fill(node, [f"127.0.0.{50 + k % 8}" for k in range(80)])
    yield
    close(*held)


def _fill(node: Besieged, sources: list[str]) -> list[RawScu]:
    held = []
    for source in sources:
        scu = RawScu(node.port, source=source)
        try:
            scu.associate(CONTEXTS)
        except RejectedError as e:
            assert e.args == (2, 3, 2)  # local limit exceeded: transient
        held.append(scu)
    return held


def endless_pdata(node: Besieged) -> Iterator[None]:
    """A P-DATA-TF far over the negotiated length. (Stock: 360 MB, accepted.)"""
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(b"\x04\x00\xff\xff\xff\xff")
        push(scu.socket, 100)
        yield


def endless_command(node: Besieged) -> Iterator[None]:
    """Command fragments without a last one, large and empty."""
    for fragment in (bytes(60_000), b""):
        with RawScu(node.port) as scu:
            scu.associate(CONTEXTS)
            with contextlib.suppress(OSError):
                for _ in range(400):
                    scu.send(pdata(1, 1, fragment))
            yield


def endless_message(node: Besieged) -> Iterator[None]:
    """Data fragments without a last one, beyond max_instance_mb."""
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(BEGIN)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                scu.send(pdata(1, 0, bytes(120_000)))
        yield


def crumbs(node: Besieged) -> Iterator[None]:
    """As many PDVs as a PDU holds, all empty: work without a byte of progress."""
    pdu = pdvs(*[(1, 0, b"")] * 20_000)
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(BEGIN)
        with contextlib.suppress(OSError):
            for _ in range(10):
                scu.send(pdu)
        yield


def giant_instances(node: Besieged) -> Iterator[None]:
    """Two of 90 MB within the limit of 100: taken, and never in memory."""
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(_giant, node, k) for k in range(2)]
        yield
        for each in sent:
            assert each.result() == 0
    assert node.stored() == 2


def _giant(node: Besieged, k: int) -> int:
    uid = f"{UID}.9{k}"
    with RawScu(node.port, timeout=60) as scu:
        scu.associate(CONTEXTS)
        return scu.store(small_data_set(sop_instance=uid, pixels=90_000_000), SC, uid).status


def request_flood(node: Besieged) -> Iterator[None]:
    """Thousands of requests at once, answers read late: nothing may pile up."""
    with RawScu(node.port, timeout=30) as scu:
        scu.associate()
        scu.send(pdata(1, 3, echo_command()) * 2000)
        yield
        assert {scu.response().status for _ in range(2000)} == {0}


def resets(node: Besieged) -> Iterator[None]:
    """RST at every point of a conversation."""
    whole = REQUEST + STORE + cases.RELEASE
    for at in range(1, len(whole), 23):
        scu = RawScu(node.port, source=f"127.0.0.{60 + at % 4}")
        scu.send(whole[:at])
        scu.reset()
    yield
    node.settles(3)
    assert node.stored() <= 1 + (len(whole) - len(REQUEST) - len(STORE)) // 23 + len(cases.RELEASE)


def half_closes(node: Besieged) -> Iterator[None]:
    """FIN at every point: the peer listens on, and nothing more comes."""
    whole = REQUEST + STORE
    for at in range(1, len(whole), 41):
        with connected(node, f"127.0.0.{64 + at % 4}") as s:
            s.sendall(whole[:at])
            s.shutdown(socket.SHUT_WR)
            assert cut(s)
    yield
    assert node.stored() == 0


def every_named_case(node: Besieged) -> Iterator[None]:
    """Whatever breaks a rule of PS3.7 or PS3.8 and has a name, several at a time."""
    streams = list(cases.named().values())
    with ThreadPoolExecutor(6) as pool:
        running = [
            pool.submit(replay, node.port, stream, patience=0.01, timeout=20) for stream in streams
        ]  # fmt: skip
        yield
        assert {each.result().words[-1] for each in running} == {"closed"}
    node.stored()

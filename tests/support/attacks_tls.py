"""What hostile peers do to a TLS port (`besieged.Attack`).

Stock pynetdicom shakes hands in its accept loop: one peer that connects and is silent stops everybody.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator

from attacks import close, connected
from besieged import Besieged
from hostile_cases import REQUEST, STORE


def client_hello() -> bytes:
    """As any client begins, here one without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def silent(node: Besieged) -> Iterator[None]:
    """Connected, and not a word."""
    held = [connected(node) for _ in range(40)]
    yield
    close(*held)


def half_a_hello(node: Besieged) -> Iterator[None]:
    """A ClientHello that stops, and one that comes byte by byte."""
    hello = client_hello()
    held = [connected(node, f"127.0.0.{20 + k}") for k in range(8)]
    for s in held:
        s.sendall(hello[: len(hello) // 2])
    with connected(node) as slow:
        for at in range(20):
            slow.sendall(hello[at : at + 1])
            time.sleep(0.02)
            if at % 5 == 0:
                yield
    close(*held)


def hello_and_silence(node: Besieged) -> Iterator[None]:
    """The whole ClientHello; our answer is never read, and its certificate never comes."""
    hello = client_hello()
    held = [connected(node, f"127.0.0.{20 + k}") for k in range(8)]
    for s in held:
        s.sendall(hello)
    yield
    close(*held)


def handshake_and_silence(node: Besieged) -> Iterator[None]:
    """Known by its certificate, and then no request."""
    assert node.tls is not None
    held = [node.tls.wrap_socket(connected(node, f"127.0.0.{20 + k}")) for k in range(8)]
    yield
    for s in held:
        s.sendall(REQUEST[:30])
    yield
    close(*held)


def plain_and_noise(node: Besieged) -> Iterator[None]:
    """DICOM without TLS, records that are none, an alert, a record of 16 KB and more."""
    record = struct.pack(">BHH", 22, 0x0301, 0xFFFF)
    for data in (REQUEST, b"\0" * 500, record + bytes(70_000), b"\x15\x03\x03\0\2\2\x28", b"GET / HTTP/1.1\r\n\r\n"):
        for _ in range(3):
            with connected(node) as s, contextlib.suppress(OSError):
                s.sendall(data)
                yield


def handshakes_and_resets(node: Besieged) -> Iterator[None]:
    """RST at each stage: in the hello, after it, after the handshake, in the request, in an instance."""
    assert node.tls is not None
    hello = client_hello()
    for k in range(24):
        s: socket.socket = connected(node, f"127.0.0.{20 + k % 8}")
        if k % 4 == 0:
            s.sendall(hello[: 1 + 20 * k])
        elif k % 4 == 1:
            s.sendall(hello)
        else:
            s = node.tls.wrap_socket(s)
            with contextlib.suppress(OSError):
                s.sendall(REQUEST[: 20 * k] if k % 4 == 2 else REQUEST + STORE[: 20 * k])
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
        if k % 6 == 5:
            yield
    node.settles(3)

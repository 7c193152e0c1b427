"""A C-STORE sender that writes its PDUs by hand, so that tests can send what no library would.

`RawScu` speaks PS3.8 and PS3.7 just well enough; it shares no code with the node.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass

VERIFICATION = "1.2.840.10008.1.1"
MR = "1.2.840.10008.5.1.4.1.1.4"
SC = "1.2.840.10008.5.1.4.1.1.7"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


class RejectedError(Exception):
    """A-ASSOCIATE-RJ: result, source, reason."""


class AbortedError(Exception):
    """A-ABORT (source, reason), or the connection closed ((0, 0) = without a word)."""


@dataclass(frozen=True)
class Response:
    status: int
    comment: str
    offending: int | None
    elements: dict[int, bytes]


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def association_request(
    contexts, calling: str = "RAWSCU", called: str = "DICOM_NODE", max_pdu: int = 16384, extra: bytes = b""
) -> bytes:
    body = struct.pack(">HH", 1, 0) + called.encode().ljust(16) + calling.encode().ljust(16) + bytes(32)
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    for context_id, abstract, syntaxes in contexts:
        inner = struct.pack(">BBBB", context_id, 0, 0, 0) + item(0x30, abstract.encode())
        body += item(0x20, inner + b"".join(item(0x40, s.encode()) for s in syntaxes))
    body += item(0x50, item(0x51, struct.pack(">L", max_pdu)) + item(0x52, b"1.2.3.4") + extra)
    return struct.pack(">BBL", 1, 0, len(body)) + body


def command_element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, element, len(value)) + value


def padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def store_command(sop_class: str, sop_instance: str, message_id: int = 1, data_set: int = 1) -> bytes:
    body = (
        command_element(0x0002, padded(sop_class))
        + command_element(0x0100, struct.pack("<H", 1))
        + command_element(0x0110, struct.pack("<H", message_id))
        + command_element(0x0700, b"\0\0")
        + command_element(0x0800, struct.pack("<H", data_set))
        + command_element(0x1000, padded(sop_instance))
    )
    return command_element(0, struct.pack("<L", len(body))) + body


def echo_command(message_id: int = 1) -> bytes:
    body = (
        command_element(0x0002, padded(VERIFICATION))
        + command_element(0x0100, struct.pack("<H", 0x30))
        + command_element(0x0110, struct.pack("<H", message_id))
        + command_element(0x0800, struct.pack("<H", 0x0101))
    )
    return command_element(0, struct.pack("<L", len(body))) + body


def pdata(context_id: int, control: int, fragment: bytes) -> bytes:
    return struct.pack(">BBLLBB", 4, 0, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment


class RawScu:
    """One connection."""

    def __init__(
        self,
        port: int,
        *,
        source: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        host: str = "127.0.0.1",
    ) -> None:
        self.socket: socket.socket = socket.create_connection(
            (host, port), timeout, source_address=(source, 0) if source else None
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket)
        self.accepted: dict[int, str] = {}
        self.results: dict[int, int] = {}
        self.max_pdu = 16384

    def __enter__(self) -> RawScu:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive_pdu(self) -> tuple[int, bytes]:
        head = self._exactly(6)
        return head[0], self._exactly(struct.unpack(">L", head[2:])[0])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                chunk = self.socket.recv(count - len(data))
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise AbortedError(0, 0)
            data += chunk
        return data

    def associate(self, contexts=((1, VERIFICATION, (IMPLICIT,)),), **parameters) -> RawScu:
        self.send(association_request(contexts, **parameters))
        return self.associate_answer()

    def associate_answer(self) -> RawScu:
        """What comes back to a request that was sent."""
        kind, body = self._not_aborted()
        if kind == 3:
            raise RejectedError(*body[1:4])
        assert kind == 2, kind
        at = 68
        while at < len(body):
            kind, length = struct.unpack_from(">BxH", body, at)
            if kind == 0x21:
                context_id, result = body[at + 4], body[at + 6]
                self.results[context_id] = result
                if result == 0:
                    size = struct.unpack_from(">H", body, at + 10)[0]
                    self.accepted[context_id] = body[at + 12 : at + 12 + size].decode()
            elif kind == 0x50:
                self.max_pdu = struct.unpack_from(">L", body, at + 8)[0]
            at += 4 + length
        return self

    def _not_aborted(self) -> tuple[int, bytes]:
        kind, body = self.receive_pdu()
        if kind == 7:
            raise AbortedError(body[2], body[3])
        return kind, body

    def send_store(
        self, data: bytes, sop_class: str, sop_instance: str, context_id: int = 1, message_id: int = 1
    ) -> None:
        self.send(pdata(context_id, 3, store_command(sop_class, sop_instance, message_id)))
        self.send_data(data, context_id)

    def send_data(self, data: bytes, context_id: int = 1, *, last: bool = True) -> None:
        size = min(self.max_pdu or 65536, 131072) - 6
        for at in range(0, max(1, len(data)), size):
            final = last and at + size >= len(data)
            self.send(pdata(context_id, 2 if final else 0, data[at : at + size]))

    def response(self) -> Response:
        command = b""
        while True:
            kind, body = self._not_aborted()
            assert kind == 4, kind
            command += body[6:]
            if body[5] & 2:
                break
        elements: dict[int, bytes] = {}
        at = 0
        while at < len(command):
            _, element, length = struct.unpack_from("<HHL", command, at)
            elements[element] = command[at + 8 : at + 8 + length]
            at += 8 + length
        offending = elements.get(0x0901)
        return Response(
            struct.unpack("<H", elements[0x0900])[0],
            elements.get(0x0902, b"").decode().strip(),
            None
            if offending is None
            else struct.unpack("<H", offending[:2])[0] << 16 | struct.unpack("<H", offending[2:])[0],
            elements,
        )

    def store(self, data: bytes, sop_class: str, sop_instance: str, **parameters) -> Response:
        self.send_store(data, sop_class, sop_instance, **parameters)
        return self.response()

    def echo(self, context_id: int = 1) -> int:
        self.send(pdata(context_id, 3, echo_command()))
        return self.response().status

    def release(self) -> None:
        self.send(b"\5\0\0\0\0\4\0\0\0\0")
        kind, _ = self._not_aborted()
        assert kind == 6, kind
        self.socket.close()

    def reset(self) -> None:
        """RST: what a dying machine or a firewall leaves."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def explicit(group: int, element: int, vr: bytes, value: bytes) -> bytes:
    """One element in explicit VR little endian."""
    value += (b"\0" if vr in (b"UI", b"OB") else b" ") * (len(value) % 2)
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return struct.pack("<HH2sHL", group, element, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, element, vr, len(value)) + value


def small_data_set(
    sop_class: str = SC,
    sop_instance: str = "1.2.826.0.1.3680043.9.1",
    study: str = "1.2.826.0.1.3680043.9.2",
    series: str = "1.2.826.0.1.3680043.9.3",
    extra: bytes = b"",
    pixels: int = 64,
) -> bytes:
    """A minimal sound data set, explicit VR little endian; `extra` stands between group 0008 and group 0020."""

    def ui(group: int, element: int, value: str) -> bytes:
        return explicit(group, element, b"UI", value.encode()) if value else b""

    return (
        ui(0x0008, 0x0016, sop_class)
        + ui(0x0008, 0x0018, sop_instance)
        + extra
        + ui(0x0020, 0x000D, study)
        + ui(0x0020, 0x000E, series)
        + explicit(0x7FE0, 0x0010, b"OB", bytes(pixels))
    )

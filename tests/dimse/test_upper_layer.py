"""The acceptor's states (PS3.8 section 9.2): every pair of state and event, on a socket and against the standard."""

from __future__ import annotations

import socket
import struct

import pytest
from listener_process import listening, wait_for
from pynetdicom.fsm import ACTIONS, TRANSITION_TABLE
from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    SC,
    VERIFICATION,
    AbortedError,
    RawScu,
    association_request,
    echo_command,
    pdata,
    small_data_set,
    store_command,
)

from dicom_node.config import Receive
from dicom_node.dimse.admission import Admission
from dicom_node.dimse.association import Port, StorageAssociation
from dicom_node.dimse.negotiation import Context, Negotiator
from dicom_node.dimse.seam import Association
from dicom_node.dimse.upper_layer import TABLE, Action, Event, Progress, State, data_pdus

REQUEST = association_request([(1, VERIFICATION, (IMPLICIT,))])
ABORT = b"\7\0\0\0\0\4\0\0\0\0"
PDUS = {
    "Evt3": b"\2\0" + struct.pack(">L", 68) + bytes(68),
    "Evt4": b"\3\0\0\0\0\4\0\1\1\1",
    "Evt6": REQUEST,
    "Evt10": pdata(1, 3, echo_command()),
    "Evt12": b"\5\0\0\0\0\4\0\0\0\0",
    "Evt13": b"\6\0\0\0\0\4\0\0\0\0",
    "Evt16": ABORT,
    "Evt19": b"\x09\0\0\0\0\4\0\0\0\0",
}
STANDARD = """
         Sta2  Sta3  Sta6  Sta8  Sta13
  Evt3   AA-1  AA-8  AA-8  AA-8  AA-6
  Evt4   AA-1  AA-8  AA-8  AA-8  AA-6
  Evt6   AE-6  AA-8  AA-8  AA-8  AA-7
  Evt10  AA-1  AA-8  DT-2  AA-8  AA-6
  Evt12  AA-1  AA-8  AR-2  AA-8  AA-6
  Evt13  AA-1  AA-8  AA-8  AA-8  AA-6
  Evt16  AA-2  AA-3  AA-3  AA-3  AA-2
  Evt17  AA-5  AA-4  AA-4  AA-4  AR-5
  Evt19  AA-1  AA-8  AA-8  AA-8  AA-7
"""
"""What a peer can do to an acceptor, from PS3.8 table 9-10."""


def pairs() -> list[tuple[str, str, str]]:
    head, *rows = (line.split() for line in STANDARD.strip().splitlines())
    return [(state, row[0], action) for row in rows for state, action in zip(head, row[1:], strict=True)]


class Ears:
    """A Receiver that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattr__(self, name):
        return lambda *a, **k: self.heard.append(name if name != "dropped" else f"dropped {a[0]}")


class Machine:
    """An association in a given state, over a socket pair."""

    def __init__(self, state: str) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(0.05)
        self.ears, config = Ears(), Receive()
        port = Port(config, self.ears, Admission(config), Negotiator(config), None)
        self.association = StorageAssociation(port, ours, "127.0.0.1")
        self.association._state = State(state)
        if state != "Sta2":
            port.admission.connecting("127.0.0.1")
        if state in ("Sta6", "Sta8", "Sta13"):
            self.association.info = Association("0" * 32, "SCU", "DICOM_NODE", "127.0.0.1")
            self.association._contexts = {1: Context(VERIFICATION, IMPLICIT, False)}

    def receive(self, event: str) -> tuple[str, bytes]:
        """The state after the event, and what was said."""
        if event == "Evt17":
            self.association._step(Event.CLOSED)
        else:
            pdu = PDUS[event]
            assert self.association._pdus(memoryview(pdu)) == len(pdu)
        said = b""
        try:
            while chunk := self.peer.recv(65536):
                said += chunk
        except TimeoutError:
            pass
        self.peer.close()
        self.association._sock.close()
        return str(self.association._state), said


def aborted(source: int, reason: int) -> bytes:
    return b"\7\0\0\0\0\4\0\0" + bytes((source, reason))


@pytest.mark.parametrize(("state", "event", "action"), pairs(), ids=lambda v: v)
def test_each_pair_of_state_and_event(state, event, action):
    machine = Machine(state)
    after, said = machine.receive(event)
    reason = 1 if event == "Evt19" else 2  # unrecognised, or unexpected (PS3.8 table 9-26)
    if action in ("AE-6", "DT-2", "AR-2"):
        assert after == {"AE-6": "Sta6", "DT-2": "Sta6", "AR-2": "Sta13"}[action]
        assert said[0] == {"AE-6": 2, "DT-2": 4, "AR-2": 6}[action]
    elif action in ("AA-1", "AA-7", "AA-8"):
        assert (after, said) == ("Sta13", aborted(0, 0) if action == "AA-1" else aborted(2, reason))
        complaint = {"AA-1": "dropped not_an_association_request", "AA-7": None, "AA-8": "dropped unexpected_pdu"}
        assert [h for h in machine.ears.heard if h.startswith("dropped")] == [c for c in [complaint[action]] if c]
    else:
        assert (after, said) == ("Sta13" if action == "AA-6" else "Sta1", b"")


def test_the_table_is_the_standards_as_another_implementation_has_it():
    for state, row in TABLE.items():
        for event, (action, after) in row.items():
            assert TRANSITION_TABLE[(str(event), str(state))] == str(action)
            named = ACTIONS[str(action)][2]
            assert str(after) in (named if isinstance(named, tuple) else (named,))
    assert {(s, e, a) for s, e, a in pairs()} <= {
        (str(s), str(e), str(a)) for s, r in TABLE.items() for e, (a, _) in r.items()
    }


def test_no_state_is_without_an_answer_to_what_a_peer_can_do():
    from_the_peer = {Event(e) for e in PDUS} | {Event.CLOSED}
    assert all(from_the_peer <= set(row) for state, row in TABLE.items() if state is not State.IDLE)
    assert all(Event.ARTIM_EXPIRED in TABLE[s] for s in (State.AWAIT_REQUEST, State.AWAIT_CLOSE))
    assert all(Event.ABORT in TABLE[s] for s in (State.AWAIT_ANSWER, State.DATA, State.AWAIT_RELEASE))
    assert {a for row in TABLE.values() for a, _ in row.values()} == set(Action)


def after(port: int, sent: bytes, contexts=((1, SC, (EXPLICIT,)),)) -> tuple[int, int]:
    """Source and reason of the abort that answers it on an open association."""
    with RawScu(port, timeout=5) as scu:
        scu.associate(contexts)
        scu.send(sent)
        with pytest.raises(AbortedError) as aborted:
            scu.response()
        return aborted.value.args


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (struct.pack(">BBL", 4, 0, 1 << 30), (2, 6)),
        (b"\5\0\0\0\0\5\0\0\0\0\0", (2, 6)),
        (struct.pack(">BBL", 1, 0, 1 << 20), (2, 6)),
        (b"\4\0\0\0\0\0", (2, 6)),
        (b"\4\0\0\0\0\3\0\0\0", (2, 6)),
        (struct.pack(">BBLLBB", 4, 0, 6, 1, 1, 3), (2, 6)),
        (struct.pack(">BBLLBB", 4, 0, 6, 3, 1, 3), (2, 6)),
        (pdata(3, 3, echo_command()), (2, 6)),
        (b"\xff\0\0\0\0\0", (2, 1)),
        (REQUEST, (2, 2)),
        (pdata(1, 3, b"no command"), (0, 0)),
        (pdata(1, 0, b"data before its command"), (0, 0)),
    ],
)
def test_an_abort_says_whose_fault_it_is(tmp_path, sent, answer):
    """The provider's for a PDU (PS3.8 table 9-26), the user's for a message that no service of ours has."""
    with listening(tmp_path) as node:
        assert after(node.port, sent) == answer


def test_a_fragment_is_bounded_in_number(tmp_path):
    with listening(tmp_path, max_pdvs=100) as node:
        empty = struct.pack(">LBB", 2, 1, 0) * 101
        command = pdata(1, 3, store_command(SC, "1.2.3"))
        assert after(node.port, command + struct.pack(">BBL", 4, 0, len(empty)) + empty) == (0, 0)
        wait_for(lambda: node.messages.counts("dicom_node_associations_rejected_total") == 1)
        assert node.files() == []


def test_a_fast_beginning_does_not_pay_for_a_slow_rest():
    progress = Progress(10, 1000)
    assert not progress.is_too_slow(1, 50_000_000)
    assert not progress.is_too_slow(9.5, 0)  # the first window was good
    assert not progress.is_too_slow(9.5, 500)
    assert progress.is_too_slow(1, 500)


def test_a_peer_that_does_not_close_is_closed_and_counted(tmp_path):
    with listening(tmp_path, release_timeout=0.2) as node, RawScu(node.port) as scu:
        scu.associate()
        scu.send(PDUS["Evt12"])
        assert scu.receive_pdu()[0] == 6
        wait_for(lambda: not node.listener._server.open_associations, 2)
        assert scu.socket.recv(10) == b""
        wait_for(lambda: node.messages.counts("dicom_node_connections_lingering_total") == 1)
        assert node.messages.of("event") == []


def test_a_request_that_does_not_come_is_not_waited_for(tmp_path):
    with listening(tmp_path, request_timeout=0.3) as node, RawScu(node.port) as scu:
        scu.send(REQUEST[:30])
        assert scu.socket.recv(10) == b""
        wait_for(lambda: node.messages.of("event"))
        assert "no_request_in_time" in node.messages.of("event")[0]["text"]


def test_what_is_said_after_the_end_is_not_listened_to_for_ever(tmp_path):
    with listening(tmp_path, release_timeout=30) as node, RawScu(node.port, timeout=10) as scu:
        scu.associate()
        scu.send(PDUS["Evt12"])
        with pytest.raises(OSError):
            for _ in range(1000):
                scu.send(bytes(100_000))
        wait_for(lambda: not node.listener._server.open_associations, 5)


def test_requests_may_come_in_pieces_and_answers_in_the_smallest(tmp_path):
    stream = pdata(1, 3, store_command(SC, "1.2.3")) + pdata(1, 2, small_data_set(sop_instance="1.2.3"))
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))], max_pdu=7)
        for at in range(0, len(stream), 11):
            scu.send(stream[at : at + 11])
        assert scu.response().status == 0


def test_a_response_is_cut_to_what_the_peer_takes():
    whole = bytes(range(100))
    pdus = data_pdus(5, whole, 16)
    parts = []
    while pdus:
        length, item, context_id, control = struct.unpack_from(">2xLLBB", pdus)
        assert (item, context_id) == (length - 4, 5)
        assert length <= 16
        parts.append((control, pdus[12 : 6 + length]))
        pdus = pdus[6 + length :]
    assert b"".join(p for _, p in parts) == whole
    assert {c for c, _ in parts[:-1]} == {1}
    assert parts[-1][0] == 3
    assert data_pdus(1, whole, 0) == data_pdus(1, whole, 1 << 20)


def test_stop_ends_a_connection_that_has_not_asked(tmp_path):
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        wait_for(lambda: node.listener._server._all())
        node.listener.stop(grace=2.0)
        assert scu.socket.recv(10) == b""


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")
def test_what_comes_is_acknowledged_at_once(tmp_path):
    """Else a sender that leaves Nagle on (DCMTK as Debian ships it) waits 40 ms with every message."""
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.associate([(1, SC, (EXPLICIT,))])
        ours = node.listener._server._all()[0]._sock
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        for _ in range(3):
            assert scu.store(small_data_set(sop_instance="1.2.3"), SC, "1.2.3").status == 0
            scu.send(pdata(1, 3, store_command(SC, "1.2.3")) + pdata(1, 0, small_data_set(sop_instance="1.2.3")[:50]))
            wait_for(lambda: node.listener._server._all()[0]._message)
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 1
            scu.send(pdata(1, 2, small_data_set(sop_instance="1.2.3")[50:]))
            assert scu.response().status == 0


def test_who_is_rejected_and_stays_takes_a_place_among_the_pending(tmp_path):
    """Or a stranger would have as many threads of ours as he can open connections in a second."""
    with listening(tmp_path, max_pending_per_peer=2, release_timeout=5) as node:
        held = [RawScu(node.port) for _ in range(2)]
        for scu in held:
            scu.send(association_request([(1, VERIFICATION, (IMPLICIT,))], called="NOBODY"))
            assert scu.receive_pdu()[0] == 3
        with RawScu(node.port) as scu, pytest.raises((AbortedError, OSError)):
            scu.associate()
        for scu in held:
            scu.socket.close()
        wait_for(lambda: not node.listener._server._all())
        with RawScu(node.port) as scu:
            assert scu.associate().echo() == 0


def test_the_state_machine_ignores_what_comes_after_a_rejection(tmp_path):
    with listening(tmp_path) as node, RawScu(node.port) as scu:
        scu.send(association_request([(1, VERIFICATION, (IMPLICIT,))], called="NOBODY"))
        assert scu.receive_pdu()[0] == 3
        scu.send(PDUS["Evt10"] + PDUS["Evt6"])
        assert scu.receive_pdu() == (7, bytes((0, 0, 2, 2)))
        scu.send(ABORT)
        assert scu.socket.recv(10) == b""

"""A state machine over the PDU streams of several peers at once, well-behaved and not, in any order.

Rules are PDUs, fragments of PDUs and ends of connections. Invariants: an honest C-ECHO works; nothing is acknowledged
that is not stored, byte for byte; nothing is stored that was not acknowledged - but where the peer was gone before it
could read the answer, which is then unknown to it.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hostile_cases import RELEASE, pdvs
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from listener_process import listening, wait_for
from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    SC,
    VERIFICATION,
    AbortedError,
    RawScu,
    RejectedError,
    association_request,
    echo_command,
    pdata,
    small_data_set,
    store_command,
)

from dicom_node.store.part10 import read_meta

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom, of UIDs that are none

CONTEXTS = [(1, SC, (EXPLICIT,)), (5, VERIFICATION, (IMPLICIT,))]
ENDED = (AbortedError, OSError)
DATA_SIZES = st.sampled_from([64, 5000, 40_000, 0])
SOUND = st.sampled_from([True, True, False])


@dataclass
class Peer:
    """One association as its SCU sees it."""

    scu: RawScu
    uid: str = ""
    """Of the message in hand."""
    sent: bytes = b""
    left: bytes = b""
    sound: bool = True
    """The message in hand is one that has to be stored."""


class Stream(RuleBasedStateMachine):
    """Peers come, send, and go."""

    idle = Bundle("idle")
    """Associations with no message in hand."""
    sending = Bundle("sending")

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._root = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._node = self._stack.enter_context(
            listening(
                self._root, idle_timeout=120.0, max_associations=128, max_associations_per_peer=100, max_instance_mb=1
            )
        )
        self._number, self._connections = 0, list[RawScu]()
        self._acknowledged: dict[str, bytes] = {}
        self._unknown: dict[str, bytes] = {}
        """Sent to its end by a peer that did not stay for the answer."""

    # --- peers ---

    @initialize(target=idle)
    def first(self) -> Peer:
        return self._associate(100_000)

    @rule(target=idle, fragment=st.integers(1, 400))
    def associates(self, fragment: int) -> Peer:
        return self._associate(fragment)

    def _associate(self, fragment: int) -> Peer:
        scu = RawScu(self._node.port, timeout=10)
        self._connections.append(scu)
        request = association_request(CONTEXTS)
        for at in range(0, len(request), fragment):
            scu.send(request[at : at + fragment])
        scu.associate_answer()
        return Peer(scu)

    @rule(stop=st.integers(0, 200), reset=st.booleans())
    def asks_and_goes(self, stop: int, reset: bool) -> None:
        """An A-ASSOCIATE-RQ, or a part of one, and the end."""
        scu = RawScu(self._node.port)
        scu.send(association_request(CONTEXTS)[:stop])
        scu.reset() if reset else scu.socket.close()

    @rule(edit=st.dictionaries(st.integers(0, 200), st.integers(0, 255), min_size=1, max_size=4))
    def asks_wrongly(self, edit: dict[int, int]) -> None:
        """A request with bytes changed: whatever is answered, it ends."""
        request = bytearray(association_request(CONTEXTS))
        for at, value in edit.items():
            request[at % len(request)] = value
        with RawScu(self._node.port, timeout=10) as scu, contextlib.suppress(*ENDED, RejectedError, AssertionError):
            scu.send(bytes(request))
            scu.socket.shutdown(1)
            while True:
                scu.receive_pdu()

    # --- what a well-behaved peer does ---

    @rule(target=idle, peer=consumes(idle))
    def echoes(self, peer: Peer) -> Peer:
        assert peer.scu.echo(5) == 0
        return peer

    @rule(target=sending, peer=consumes(idle), size=DATA_SIZES, sound=SOUND, pieces=st.integers(1, 5))
    def begins(self, peer: Peer, size: int, sound: bool, pieces: int) -> Peer:
        """A C-STORE-RQ in so many PDVs; `sound` or with a data set of another instance."""
        self._number += 1
        peer.uid, peer.sound, peer.sent = f"1.2.826.0.1.{self._number}", sound, b""
        peer.left = small_data_set(sop_instance=peer.uid if sound else f"{peer.uid}.9", pixels=size)
        command = store_command(SC, peer.uid)
        step = len(command) // pieces + 1
        parts = [command[at : at + step] for at in range(0, len(command), step)]
        values = [(1, 3 if k == len(parts) - 1 else 1, part) for k, part in enumerate(parts)]
        peer.scu.send(pdvs(*values) if pieces % 2 else b"".join(pdvs(v) for v in values))
        return peer

    @rule(target=sending, peer=consumes(sending), size=st.integers(0, 20_000), chops=st.integers(1, 6))
    def goes_on(self, peer: Peer, size: int, chops: int) -> Peer:
        """Some of the data set, perhaps none; the PDUs cut anywhere by TCP."""
        part, peer.left = peer.left[:size], peer.left[size:]
        peer.sent += part
        stream = b"".join(pdata(1, 0, part[at : at + 16_000]) for at in range(0, max(1, len(part)), 16_000))
        for at in range(0, len(stream), len(stream) // chops):
            peer.scu.send(stream[at : at + len(stream) // chops])
        return peer

    @rule(target=idle, peer=consumes(sending))
    def finishes(self, peer: Peer) -> Peer:
        """The rest and the last fragment; the answer is read, and believed."""
        peer.sent += peer.left
        peer.scu.send_data(peer.left)
        status = peer.scu.response().status
        assert (status == 0) == peer.sound, hex(status)
        if status == 0:
            self._acknowledged[peer.uid] = peer.sent
        peer.uid, peer.left = "", b""
        return peer

    @rule(target=idle, peer=consumes(idle), size=DATA_SIZES, sound=SOUND)
    def stores(self, peer: Peer, size: int, sound: bool) -> Peer:
        return self.finishes(self.begins(peer, size, sound, 1))

    @rule(peer=consumes(idle) | consumes(sending))
    def releases(self, peer: Peer) -> None:
        peer.scu.release()  # also in a message: then that is lost

    # --- what others do ---

    @rule(peer=consumes(idle) | consumes(sending), how=st.sampled_from(["rst", "fin", "abort"]))
    def goes(self, peer: Peer, how: str) -> None:
        """In whatever it is; after its last fragment too, without waiting for the answer."""
        if how == "abort":
            peer.scu.send(b"\7\0\0\0\0\4\0\0\0\0")
        peer.scu.reset() if how == "rst" else peer.scu.socket.close()

    @rule(peer=consumes(sending), reset=st.booleans())
    def finishes_and_goes(self, peer: Peer, reset: bool) -> None:
        if peer.sound:
            self._unknown[peer.uid] = peer.sent + peer.left
        peer.scu.send_data(peer.left)
        peer.scu.reset() if reset else peer.scu.socket.close()

    @rule(
        peer=consumes(idle) | consumes(sending),
        pdu=st.sampled_from(
            [
                association_request(CONTEXTS),
                b"\6\0\0\0\0\4\0\0\0\0",
                b"\x08\0\0\0\0\4\0\0\0\0",
                b"\4\0\xff\xff\xff\xff" + bytes(100),
                struct.pack(">BBLLBB", 4, 0, 10, 100, 1, 0) + bytes(4),
                pdata(99, 3, echo_command()),
                pdata(1, 1, bytes(60_000)) * 2,
                pdata(1, 3, b"\x08\0\5\0\2\0\0\0xx"),
            ]
        ),
    )
    def breaks_a_rule(self, peer: Peer, pdu: bytes) -> None:
        """Aborted, and what was in hand is lost."""
        with pytest.raises(ENDED):
            peer.scu.send(pdu)
            while True:
                peer.scu.response()
        peer.scu.socket.close()

    @rule(peer=consumes(idle) | consumes(sending), early=st.booleans())
    def breaks_in(self, peer: Peer, early: bool) -> None:
        """A command in a message, or data without one."""
        with pytest.raises(ENDED):
            peer.scu.send(pdata(5, 3, echo_command()) if peer.uid else pdata(1, 0 if early else 2, b"data"))
            while True:
                peer.scu.response()
        peer.scu.socket.close()

    @rule(peer=consumes(idle) | consumes(sending))
    def goes_on_after_release(self, peer: Peer) -> None:
        """Nothing that comes behind an A-RELEASE-RQ is stored."""
        uid = "1.2.826.0.1.999999"
        with contextlib.suppress(*ENDED):
            peer.scu.send(RELEASE + pdata(1, 3, store_command(SC, uid)) + pdata(1, 2, small_data_set(sop_instance=uid)))
            while peer.scu.receive_pdu()[0] not in (6, 7):
                pass
        peer.scu.socket.close()

    # --- what always holds ---

    @invariant()
    def an_honest_peer_is_served(self) -> None:
        with RawScu(self._node.port, source="127.0.0.7", timeout=5) as scu:
            assert scu.associate().echo() == 0
            scu.release()

    @invariant()
    def stored_is_what_was_acknowledged(self) -> None:
        stored = self._stored()
        for uid, data in self._acknowledged.items():
            assert stored.get(uid) == data, uid
        for uid in stored.keys() - self._acknowledged.keys():
            assert stored[uid] == self._unknown.get(uid), uid

    def _stored(self) -> dict[str, bytes]:
        found = {}
        for path in self._node.files(suffix=".dcm"):
            meta = read_meta(path)
            found[meta.sop_instance_uid] = path.read_bytes()[meta.dataset_offset :]
        return found

    def teardown(self) -> None:
        try:
            opened = len(self._node.messages.of("association_opened"))
            for scu in self._connections:
                scu.socket.close()
            self._node.listener.stop(grace=0.0)
            wait_for(lambda: len(self._node.messages.of("association_closed")) >= opened, 10)
            assert self._node.files(suffix=".part") == []
            self.stored_is_what_was_acknowledged()
        finally:
            self._stack.close()


_settings = settings(
    deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
Stream.TestCase.settings = settings(_settings, max_examples=8, stateful_step_count=25)


class TestStream(Stream.TestCase):
    """A few seconds of it."""


@pytest.mark.long
@pytest.mark.timeout(900)
class TestStreamLonger(Stream.TestCase):
    """Minutes of it."""

    settings = settings(_settings, max_examples=120, stateful_step_count=60)

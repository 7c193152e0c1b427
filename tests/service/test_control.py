"""The control socket: private, deep roots included, robust against nonsense."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from dicom_node.service.control import SOCKET_NAME, ControlServer, ask, connect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deep = tmp_path / ("a" * 60) / ("b" * 60)  # a path longer than sun_path allows
    deep.mkdir(parents=True)
    return deep


def test_a_question_gets_its_answer_and_only_the_owner_may_ask(folder):
    server = ControlServer(folder, lambda m: {"echo": m["kind"]}, lambda _messages: None)
    server.start()
    assert ask(folder, {"kind": "retry"}) == {"echo": "retry"}
    assert stat.S_IMODE((folder / SOCKET_NAME).stat().st_mode) == 0o600
    server.stop()
    with pytest.raises((ConnectionError, FileNotFoundError)):
        ask(folder, {"kind": "retry"})


def test_nonsense_ends_one_connection_and_no_more(folder):
    server = ControlServer(folder, lambda _m: {}, lambda _messages: None)
    server.start()
    for nonsense in (b"\x00\xff\n", b"[1]\n", b"{" * 2_000_000):
        with connect(folder) as s:
            try:
                s.sendall(nonsense)
                assert s.recv(10) == b""
            except OSError:
                pass
    assert ask(folder, {"kind": "x"}) == {}
    server.stop()


def test_a_dead_nodes_socket_does_not_stop_the_next(folder):
    first = ControlServer(folder, lambda _m: {"n": 1}, lambda _messages: None)
    first.start()
    second = ControlServer(folder, lambda _m: {"n": 2}, lambda _messages: None)  # the root lock says who is alive
    second.start()
    assert ask(folder, {"kind": "x"}) == {"n": 2}
    first.stop()
    second.stop()


def test_a_listener_keeps_its_line_and_loses_no_message(folder):
    taken = []
    server = ControlServer(folder, lambda _m: {}, lambda messages: taken.extend(messages))
    server.start()
    with connect(folder) as s:
        s.sendall(b'{"kind":"listener"}\n{"kind":"stored","id":"1"}\n{"kind":"stored","id":"2"}\n')
    for _ in range(100):
        if len(taken) == 2:
            break
        time.sleep(0.02)
    assert [m["id"] for m in taken] == ["1", "2"]
    server.stop()

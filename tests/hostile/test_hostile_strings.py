"""Strings that mean something to a file system, a terminal, a shell or a log: they reach none of these."""

from __future__ import annotations

import json
from pathlib import Path

import hostile_cases as cases
import pytest
from hostile_cases import CONTEXTS, UID
from listener_process import ListenerProcess
from raw_scu import SC, RawScu, association_request, small_data_set
from wire_replay import replay

TITLES = [
    b"../../etc/passwd",
    b"A\r\nINJECTED: yes ",
    b"\x1b[2J\x1b]0;x\x07       ",
    b"$(touch /tmp/x)\0",
    b"`id`;|&><'\"%n%s ",
    b"\xff\xfe\x00\x80\xc3\x28          ",
    b"{{7*7}}${jndi:x}",
    b"=cmd|' /C calc'!",
]
UIDS = [
    "../../../../tmp/owned",
    "/etc/passwd",
    "1.2/../../3",
    "1.2\n{\"event\":\"forged\"}",
    "1.2;touch${IFS}/tmp/x",
    "1." * 100,
    "con",
    "1.2.3%00.dcm",
]  # fmt: skip


def all_files(root) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


def test_no_string_of_a_peer_becomes_a_path_a_log_line_or_a_message(tmp_path):
    root = tmp_path / "outer" / "inner" / "root"
    root.parent.mkdir(parents=True)
    with ListenerProcess(root) as node:
        for title in TITLES:
            for at in (10, 26):  # called, calling
                replay(node.port, cases.request({at: title}) + cases.STORE, patience=0.05)
        for hostile in UIDS:
            with RawScu(node.port) as scu:
                scu.associate(CONTEXTS)
                for response in (
                    scu.store(small_data_set(), SC, hostile),
                    scu.store(small_data_set(sop_instance=hostile), SC, UID),
                    scu.store(small_data_set(study=hostile), SC, UID),
                    scu.store(small_data_set(series=hostile), SC, UID),
                ):
                    assert response.status in (0xA900, 0x0117, 0xC000), (hostile, hex(response.status))
                    assert hostile not in response.comment
            replay(node.port, association_request([(1, hostile, (hostile,))]), patience=0.05)
            replay(node.port, association_request(CONTEXTS, extra=cases.item(0x55, hostile.encode())), patience=0.05)
        for path in node.files(suffix=".dcm"):
            path.unlink()  # stored under a calling AE title that is odd and legal
        node.stop()
    # Outside the root nothing has appeared, and inside names are the node's own.
    assert {p.name for p in (tmp_path / "outer" / "inner").iterdir()} == {"root"}
    assert [p.name for p in (tmp_path / "outer").iterdir()] == ["inner"]
    names = " ".join(all_files(root))
    assert not any(word in names for word in ("passwd", "owned", "con.", "%00", "IFS", ".."))
    # Each line of the log is one JSON object that the node wrote, without a control character in it.
    assert node.log_lines
    for line in node.log_lines:
        said = json.loads(line)
        assert "INJECTED" not in said and said.get("event") != "forged"
        assert line.rstrip("\n").isprintable(), line
    assert all(m["kind"] for m in node.messages.all)


@pytest.mark.parametrize("title", TITLES, ids=range(len(TITLES)))
def test_an_odd_title_is_refused_or_served_and_nothing_between(tmp_path_factory, title, listener):
    """As calling AE title: the association is made and works, or it is ended by the protocol - never silently."""
    said = replay(listener.port, cases.request({26: title}) + cases.ECHO, patience=0.1)
    assert said.words[-1] == "closed"
    assert said.words[:-1] == ("AC(1:0,3:0,5:0)", "C-ECHO=0000") or said.words[0][:2] in ("AB", "RJ"), said


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    with ListenerProcess(tmp_path_factory.mktemp("titles") / "root") as node:
        yield node

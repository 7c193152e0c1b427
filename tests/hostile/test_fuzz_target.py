"""The fuzz target finds nothing in the kept cases, mutated a little; and it is able to find."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import hostile_cases
import pytest
from fuzz_transport import Target
from pdu_mutator import mutated, scatter
from wire_replay import split

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "fuzz_transport.py"


@pytest.fixture
def target(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back what the target replaces
    made = Target(tmp_path)
    yield made
    made.close()


def test_kept_cases_and_mutations_of_them_break_nothing(target):
    """Without atheris, so without a guide: a smoke run of what `scripts/fuzz` does for ten minutes."""
    chance = random.Random(5)
    cases = [s for s in (hostile_cases.named() | hostile_cases.found()).values() if len(s) <= 8192]
    for stream in chance.sample(cases, 30):
        target.try_one(mutated(stream, scatter(chance), chance, 8192))
    assert target.count == 30


def test_a_listener_that_acknowledges_what_it_does_not_store_is_found(target):
    """It loses each file as soon as it has been said to be stored."""
    send = target.node.messages.send

    def lose(message):
        send(message)
        for path in target.node.files(suffix=".dcm"):
            path.unlink()

    target.node.messages.send = lose
    with pytest.raises(AssertionError, match="1 acknowledged, 0 stored"):
        target.try_one(hostile_cases.named()["everything"], patience=0.3)


def test_a_thread_that_dies_is_found(target):
    target.died.append("ValueError")
    with pytest.raises(AssertionError, match="ValueError"):
        target.try_one(hostile_cases.REQUEST)


def test_mutations_change_what_is_inside_the_frames(target):
    """More than half of them are still PDUs from end to end, and few are what they were."""
    chance = random.Random(1)
    stream = hostile_cases.named()["everything"]
    made = [mutated(stream, scatter(chance), chance, 8192) for _ in range(200)]
    whole = sum(sum(len(pdu) for pdu in split(m) if len(pdu) >= 6) == len(m) for m in made)
    assert whole > 100
    assert sum(m == stream for m in made) < 20


@pytest.mark.long
def test_atheris_runs_it(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed (the extra `fuzz`)")
    command = [sys.executable, str(SCRIPT), "fuzz", str(tmp_path / "corpus"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert "findings: " in done.stdout, done.stderr[-2000:]
    assert (done.returncode == 0) == ("findings: 0" in done.stdout)

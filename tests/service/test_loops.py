"""Stage loops: nothing ends them, and what they log of an exception names no patient."""

from __future__ import annotations

import io
import threading

import sqlalchemy as sa

from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.service.loops import StageLoop


def test_a_loop_survives_a_database_error_and_a_defect_and_tells_no_names():
    turns, done = [], threading.Event()

    def run_once() -> bool:
        turns.append(1)
        if len(turns) == 1:
            raise sa.exc.OperationalError("SELECT", {"patient": "Zweig^Planted"}, Exception("disk I/O error"))
        if len(turns) == 2:
            raise KeyError("Zweig^Planted")
        done.set()
        return False

    said, metrics = io.StringIO(), Metrics()
    loop = StageLoop("route", run_once, Log.open(secret=b"x", stream=said), metrics, idle_seconds=0.01)
    loop.start()
    for _ in range(200):
        loop.wake()
        if done.wait(0.05):
            break
    loop.stop()
    loop.join(5)
    assert done.is_set() and not loop.is_alive()
    assert "KeyError" in said.getvalue() and "Zweig" not in said.getvalue()
    assert metrics.value("dicom_node_ledger_errors_total") == 1


def test_work_is_done_without_pauses_and_waking_is_at_once():
    left, seen = [50], threading.Event()

    def run_once() -> bool:
        left[0] -= 1
        if left[0] <= 0:
            seen.set()
        return left[0] > 0

    loop = StageLoop("route", run_once, Log.null(), Metrics(), idle_seconds=60)
    loop.start()
    assert seen.wait(5)
    seen.clear()
    loop.wake()
    assert seen.wait(5)
    loop.stop()
    loop.join(5)
    assert not loop.is_alive()

"""`scripts/bench receive`: what it makes of rounds, and that it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bench_profile
import bench_receive
import pytest
from bench_receive import Cell, Figures, Selection, Table, Target, figures, verdicts
from bench_receivers import RECEIVERS, Receiver
from bench_works import FULL, mr_files
from fast_scu import Streams, read
from wire_replay import split

REPOSITORY = Path(__file__).resolve().parents[2]
MR = Cell(FULL[0], 1, "fast")


def at(instances_s: float, **more: float) -> Figures:
    return Figures(
        **({"mb_s": 1.0, "cpu_s_gb": 2.0, "rss_mb": 50.0, "p50_ms": 1.0, "p99_ms": 3.0} | more), instances_s=instances_s
    )


def test_a_ratio_is_of_one_round_and_a_round_that_failed_has_none():
    """The machine was twice as fast in the second round: the ratio does not notice."""
    table = Table(MR, {"ours": [at(100), at(200), None], "storescp": [at(50), at(100), at(1)]})
    assert table.ratios("instances_s", "storescp") == [2.0, 2.0]
    assert table.spread("ours", "instances_s") == "150 [100-200]"


def test_a_target_is_met_or_missed_by_the_median_round():
    table = Table(MR, {"ours": [at(1), at(10), at(10)], "storescp": [at(10), at(10), at(10)]})
    least = Target("mr", 1, "fast", "instances_s", "storescp", 1.0)
    (said,) = verdicts([table], (least,))
    assert said.endswith("1.00 x [0.10-1.00, n 3]; target >= 1: met")
    most = Target("mr", 1, "fast", "instances_s", "storescp", 0.9, least=False)
    (said,) = verdicts([table], (most,))
    assert said.endswith("target <= 0.9: MISSED")


def test_each_target_names_a_cell_that_is_run():
    cells = {(c.work.name, c.senders, c.sender) for c in Selection().cells()}
    assert {(t.work, t.senders, t.sender) for t in bench_receive.TARGETS} <= cells
    assert {t.over for t in bench_receive.TARGETS} <= set(RECEIVERS)


def test_percentiles_and_rates():
    answer = {"wall": 2.0, "bytes": 4_000_000, "instances": 100, "latencies": [k / 1000 for k in range(1, 101)]}
    found = figures(answer, cpu=0.008, rss=10.0)
    assert (found.mb_s, found.instances_s, found.cpu_s_gb) == (2.0, 50.0, 2.0)
    assert (found.p50_ms, found.p99_ms) == (51.0, 100.0)


def test_the_fast_sender_sends_the_file(tmp_path):
    """What is framed before the clock starts is the data set, whole, and ends with a last fragment."""
    (path,) = mr_files(tmp_path / "mr", 1)
    parsed = read(path)
    assert path.read_bytes().endswith(parsed.data)
    for max_pdu in (0, 16384, 131072):
        ((own, tail),) = Streams([parsed], max_pdu).all
        command, *data = split(own + tail)
        assert command[11] == 3
        assert b"".join(pdu[12:] for pdu in data) == parsed.data
        assert [pdu[11] for pdu in data] == [0] * (len(data) - 1) + [2]


def test_what_does_not_come_up_or_does_not_store_is_no_figure(tmp_path):
    """A receiver that answers and stores nothing gets no row of figures."""
    absent = Receiver("gone", "ends at once", False, lambda folder, port: [sys.executable, "-c", "pass"])
    files = mr_files(tmp_path / "mr", 3)
    assert bench_receive.measure(absent, MR, files, tmp_path / "gone") == "gone does not come up"
    elsewhere = Receiver(
        "forgets", "stores elsewhere", False, lambda folder, port: RECEIVERS["durable"].start(tmp_path / "else", port)
    )
    found = bench_receive.measure(elsewhere, MR, files, tmp_path / "forgets", patience=0.2)
    assert found == "stored 0 of 2"


def bench(*arguments: str) -> list[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench"), "receive", "--rounds", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_quick_run_prints_a_row_for_each_receiver_and_a_ratio():
    lines = bench("--quick", "--receivers", "durable", "ours", "--works", "mr", "--senders", "fast", "--at-once", "4")
    text = "\n".join(lines)
    for name in ("durable", "ours"):
        assert re.search(rf"\| {name} \| [\d.]+ \[[^|]*\| [\d.]+ \[[^|]*\| .*\| .*\| [\d.]+ \[.*\| [\d.]+ \[", text), (
            text
        )
    assert re.search(r"mr N=4 fast: instances_s ours / durable [\d.]+ x", text)
    assert "target" not in text  # a smoke run proves nothing


@pytest.mark.long
def test_a_quick_run_of_everything():
    text = "\n".join(bench("--quick"))
    missing = {name for name in RECEIVERS if f"not installed: {name}" in text}
    for name in set(RECEIVERS) - missing - {"node"}:
        assert len(re.findall(rf"\| {name} \| [\d.]+ \[", text)) == 6, (name, text)
    assert "idle: 4 associations, ours" in text


def test_the_profile_finds_every_part_and_counts_none_twice(tmp_path):
    """A function that was renamed would have no share; parts inside each other would leave less than nothing."""
    said = list(bench_profile.profile(tmp_path, 1, bench_profile.PROFILED[:1]))
    shares = [int(found[1]) for line in said if (found := re.search(r"\| (-?\d+)% \|$", line))]
    assert len(shares) == len(bench_profile.PARTS) + 1
    assert all(share > 0 for share in shares), said

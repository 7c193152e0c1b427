"""Where the time of one association goes, by cProfile: MR instances from the fast sender to a listener in this process.

The profiler itself costs time, most where calls are many and short: read shares, not seconds.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fast_scu
from bench_works import mr_files
from listener_process import listening, wait_for

from dicom_node.dimse import association, server

INSTANCES = 500
PARTS = {
    "fsync, of the file and of its folder": ("posix.fsync",),
    "validation of the data set": ("check_data_set",),
    "the file: open, write, rename, close": (
        "posix.open",
        "posix.write",
        "posix.pwrite",
        "posix.rename",
        "posix.close",
    ),
    "the socket: recv, send": ("recv_into", "sendall"),
}
"""Function names, of which the cumulated time counts; none calls another."""


def profile(work: Path, rounds: int) -> Iterator[str]:
    """Shares of the association's thread, summed over the rounds."""
    spent = dict.fromkeys(PARTS, 0.0)
    total = 0.0
    for number in range(rounds):
        stats = _one(work / str(number))
        total += stats.total_tt
        for part, names in PARTS.items():
            spent[part] += sum(
                row[3] for (_, _, name), row in stats.stats.items() if any(wanted in name for wanted in names)
            )
    yield f"MR 134 KB x {INSTANCES}, N = 1, sender fast; {rounds} rounds"
    yield "| part of the association's thread | share |"
    yield "|---|--:|"
    for part, seconds in (*spent.items(), ("all else, interpreted", total - sum(spent.values()))):
        yield f"| {part} | {seconds / total:.0%} |"


def _one(work: Path) -> Any:
    work.mkdir()
    files = mr_files(work / "files", INSTANCES)
    profiles: list[cProfile.Profile] = []

    class Profiled(association.StorageAssociation):
        def run(self) -> None:
            profiles.append(cProfile.Profile())
            profiles[-1].runcall(super().run)

    plain, server.StorageAssociation = server.StorageAssociation, Profiled
    try:
        with listening(work / "root") as node:
            command = [sys.executable, fast_scu.__file__, str(node.port), "1", str(INSTANCES), *map(str, files)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert json.loads(done.stdout)["instances"] == INSTANCES, done.stdout
            wait_for(lambda: not node.listener._server.open_associations)
    finally:
        server.StorageAssociation = plain
    largest = max(profiles, key=lambda p: pstats.Stats(p).total_tt)
    return pstats.Stats(largest)

"""Where the time of associations goes, by cProfile: the fast sender to a listener in this process.

The profiler itself costs time, most where calls are many and short: read shares, not seconds. Where several threads
store at once, a call's share holds its wait for the interpreter too.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fast_scu
from bench_works import FULL, Work
from listener_process import listening, wait_for

from dicom_node.dimse import association, server

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


@dataclass(frozen=True)
class Profiled:
    """What is sent."""

    work: Work
    at_once: int


PROFILED = (Profiled(FULL[0], 1), Profiled(FULL[1], 4))


def profile(work: Path, rounds: int, profiled: tuple[Profiled, ...] = PROFILED) -> Iterator[str]:
    """A table for each: shares of the associations' threads, summed over the rounds."""
    for one in profiled:
        spent, total = dict.fromkeys(PARTS, 0.0), 0.0
        files = one.work.make(work / one.work.name, one.work.count)
        for number in range(rounds):
            for stats in _round(work / f"{one.work.name}-{number}", files, one.at_once):
                total += stats.total_tt
                for part, names in PARTS.items():
                    spent[part] += sum(row[3] for (_, _, name), row in stats.stats.items() if _is_any(name, names))
        shutil.rmtree(work / one.work.name)
        yield f"{one.work.what} x {one.work.count}, N = {one.at_once}, sender fast; {rounds} rounds"
        yield "| part of an association's thread | share |"
        yield "|---|--:|"
        for part, seconds in (*spent.items(), ("all else, interpreted", total - sum(spent.values()))):
            yield f"| {part} | {seconds / total:.0%} |"


def _is_any(name: str, wanted: tuple[str, ...]) -> bool:
    return any(part in name for part in wanted)


def _round(work: Path, files: list[Path], at_once: int) -> list[Any]:
    """One profile of each association that stored."""
    profiles: list[cProfile.Profile] = []

    class Measured(association.StorageAssociation):
        def run(self) -> None:
            profiles.append(mine := cProfile.Profile())
            mine.runcall(super().run)

    plain, server.StorageAssociation = server.StorageAssociation, Measured
    try:
        with listening(work) as node:
            command = [sys.executable, fast_scu.__file__, str(node.port), str(at_once), "0", *map(str, files)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert json.loads(done.stdout)["instances"] == len(files), done.stdout
            wait_for(lambda: not node.listener._server.open_associations)
    finally:
        server.StorageAssociation = plain
        shutil.rmtree(work)
    found = [pstats.Stats(one) for one in profiles]
    return [one for one in found if any("check_data_set" in name for _, _, name in one.stats)]

"""What `scripts/bench receive` measures: this node beside other Storage SCPs, in paired, interleaved rounds of one run.

In each round every receiver gets the same files from the same sender, one receiver after the other, each in an empty
folder of its own on the same disk; the order turns from round to round. A ratio is of one round; its median is what
counts. Sender and receiver share the machine. What a receiver did not store is no figure: its row says what went wrong.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_receivers import AE_TITLE, HERE, OURS, RECEIVERS, Receiver, Running
from bench_works import FULL, QUICK, Work
from raw_scu import RawScu

PEER_SECONDS = 600


# --- who sends -------------------------------------------------------------------------------------------------------


def fast(port: int, work: Work, files: list[Path], senders: int, per: int = 0) -> dict[str, Any]:
    """PDU streams built before the clock starts (fast_scu.py)."""
    command = [sys.executable, str(HERE / "fast_scu.py"), str(port), str(senders), str(per), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:] or ["sender failed"]}
    return json.loads(done.stdout)


def each(port: int, work: Work, files: list[Path], senders: int) -> dict[str, Any]:
    """The same, an association for each instance."""
    return fast(port, work, files, senders, 1)


def storescu(port: int, work: Work, files: list[Path], senders: int) -> dict[str, Any]:
    """DCMTK's storescu as Debian ships it: Nagle on."""
    program = shutil.which("storescu")
    if program is None:
        return {"error": "storescu is not installed"}
    command = [program, "-R", work.proposes, "-aet", "BENCH", "-aec", AE_TITLE, "127.0.0.1", str(port)]
    shares = [share for k in range(senders) if (share := files[k::senders])]
    began = time.time()
    running = [
        subprocess.Popen([*command, *map(str, share)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for share in shares
    ]
    codes = [process.wait(PEER_SECONDS) for process in running]
    wall = time.time() - began
    if any(codes):
        return {"error": f"storescu exits {max(codes)}"}
    size = sum(path.stat().st_size for path in files)
    return {"wall": wall, "bytes": size, "instances": len(files), "associations": len(shares), "latencies": []}


SENDERS: dict[str, Callable[[int, Work, list[Path], int], dict[str, Any]]] = {
    "fast": fast, "storescu": storescu, "each": each,
}  # fmt: skip


def environment(sender: str) -> dict[str, str]:
    """DCMTK's receiver with Nagle off, its best, but where the point is what Debian's defaults do to each other."""
    return {} if sender == "storescu" else {"TCP_NODELAY": "1"}


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of work: what, by how many, from whom."""

    work: Work
    senders: int
    sender: str

    @property
    def key(self) -> str:
        return f"{self.work.name} N={self.senders} {self.sender}"


@dataclass(frozen=True, slots=True)
class Figures:
    """One receiver in one round."""

    mb_s: float
    instances_s: float
    cpu_s_gb: float
    rss_mb: float
    p50_ms: float
    p99_ms: float


@dataclass
class Table:
    """All rounds of a cell: receiver -> figures, in order of rounds; None where it failed."""

    cell: Cell
    rounds: dict[str, list[Figures | None]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def spread(self, receiver: str, name: str) -> str:
        values = [getattr(f, name) for f in self.rounds[receiver] if f is not None]
        if not values or max(values) == 0:
            return "-"
        digits = 0 if max(values) >= 100 else 1
        middle = statistics.median(values)
        return f"{middle:.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"

    def ratios(self, name: str, over: str) -> list[float]:
        """Ours over theirs, round by round."""
        pairs = zip(self.rounds.get(OURS, []), self.rounds.get(over, []), strict=False)
        return [
            getattr(a, name) / getattr(b, name)
            for a, b in pairs
            if a is not None and b is not None and getattr(b, name) > 0
        ]

    def lines(self) -> Iterator[str]:
        yield f"{self.cell.work.what} x {self.cell.work.count}, N = {self.cell.senders}, sender {self.cell.sender}"
        yield "| receiver | MB/s | instances/s | CPU s/GB | RSS MB | p50 ms | p99 ms |"
        yield "|---|--:|--:|--:|--:|--:|--:|"
        for name in self.rounds:
            if name in self.errors:
                yield f"| {name} | {self.errors[name]} | | | | | |"
                continue
            columns = ("mb_s", "instances_s", "cpu_s_gb", "rss_mb", "p50_ms", "p99_ms")
            yield f"| {name} | " + " | ".join(self.spread(name, c) for c in columns) + " |"


def measure(
    receiver: Receiver, cell: Cell, files: list[Path], folder: Path, *, patience: float = 30.0
) -> Figures | str:
    """One receiver, once. A text is what went wrong."""
    try:
        with Running(receiver, folder, environment(cell.sender)) as running:
            send = SENDERS[cell.sender]
            warm = files[:1]
            if "error" in (answer := send(running.port, cell.work, warm, 1)):
                return str(answer["error"])
            before, used = running.stored(), running.cpu()
            answer = send(running.port, cell.work, files[1:], cell.senders)
            if "error" in answer:
                return str(answer["error"])
            used = running.cpu() - used
            expected = before + len(files) - 1
            deadline = time.monotonic() + patience
            while (stored := running.stored()) < expected and time.monotonic() < deadline:
                time.sleep(0.05)  # a node that indexes moves files while we count
            if stored < expected:
                return f"stored {stored - before} of {len(files) - 1}"
            return figures(answer, used, running.peak_mb())
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def figures(answer: dict[str, Any], cpu: float, rss: float) -> Figures:
    wall, size, latencies = answer["wall"], answer["bytes"], answer["latencies"]

    def percentile(share: float) -> float:
        return 1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))] if latencies else 0.0

    return Figures(
        size / 1e6 / wall, answer["instances"] / wall, cpu / (size / 1e9), rss, percentile(0.5), percentile(0.99)
    )


# --- what is wanted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Ours over theirs in the same round; `least` says whether that is to be at least or at most so much."""

    work: str
    senders: int
    sender: str
    figure: str
    over: str
    value: float
    least: bool = True


TARGETS = (
    Target("us", 4, "fast", "mb_s", "storescp", 2.0),
    Target("mr", 1, "fast", "instances_s", "storescp", 0.5),
    Target("mr", 1, "fast", "instances_s", "orthanc", 1.3),
    Target("mr", 1, "fast", "instances_s", "durable", 0.85),
    Target("mr", 8, "fast", "instances_s", "storescp", 0.8),
    Target("mr", 32, "fast", "instances_s", "storescp", 0.8),
    Target("mr", 32, "fast", "p99_ms", "storescp", 1.0, least=False),
    Target("mr", 1, "each", "instances_s", "storescp", 1.5),
    Target("mr", 1, "storescu", "instances_s", "storescp", 20.0),
    Target("us", 4, "fast", "cpu_s_gb", "storescp", 0.5, least=False),
)
MAX_RSS_MB = 80.0


def verdicts(tables: list[Table], targets: tuple[Target, ...]) -> Iterator[str]:
    """Each ratio of ours to another; with its target, where there is one."""
    wanted = {(t.work, t.senders, t.sender, t.figure, t.over): t for t in targets}
    for table in tables:
        cell = table.cell
        for name in table.rounds:
            for figure in ("instances_s", "mb_s", "cpu_s_gb", "p99_ms"):
                target = wanted.get((cell.work.name, cell.senders, cell.sender, figure, name))
                ratios = sorted(table.ratios(figure, name))
                if name == OURS or not ratios or (target is None and figure != "instances_s"):
                    continue
                middle = statistics.median(ratios)
                text = f"{cell.key}: {figure} ours / {name} {middle:.2f} x "
                text += f"[{ratios[0]:.2f}-{ratios[-1]:.2f}, n {len(ratios)}]"
                if target is not None:
                    met = middle >= target.value if target.least else middle <= target.value
                    text += f"; target {'>=' if target.least else '<='} {target.value:g}: {'met' if met else 'MISSED'}"
                yield text
        if (cell.work.name, cell.senders) == ("us", 4) and OURS in table.rounds and OURS not in table.errors:
            peak = max(f.rss_mb for f in table.rounds[OURS] if f is not None)
            met = "met" if peak <= MAX_RSS_MB else "MISSED"
            yield f"{cell.key}: listener RSS {peak:.0f} MB; target <= {MAX_RSS_MB:g}: {met}"


def idle(folder: Path, receivers: list[str], associations: int, seconds: float) -> Iterator[str]:
    """CPU of associations that say nothing."""
    for name in receivers:
        if name not in (OURS, "naive", "durable"):
            continue
        try:
            with Running(RECEIVERS[name], folder / f"idle-{name}", {}) as running:
                held = [RawScu(running.port).associate(called=AE_TITLE) for _ in range(associations)]
                before = running.cpu()
                time.sleep(seconds)
                share = (running.cpu() - before) / seconds
                for scu in held:
                    scu.socket.close()
        except (RuntimeError, OSError) as e:
            yield f"idle: {name}: {e}"
            continue
        target = f"; target <= 0.5 %: {'met' if share <= 0.005 else 'MISSED'}" if name == OURS else ""
        yield f"idle: {associations} associations, {name}: {100 * share:.2f} % of a core{target}"


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """What of it is run; empty = everything."""

    receivers: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    at_once: tuple[int, ...] = ()
    quick: bool = False

    def cells(self) -> list[Cell]:
        """One association an instance and Debian's defaults need no many senders: they are about what one waits for."""
        return [
            Cell(work, n, sender)
            for work in (QUICK if self.quick else FULL)
            if not self.works or work.name in self.works
            for sender in self.senders or SENDERS
            for n in work.at_once
            if (not self.at_once or n in self.at_once)
            and (sender == "fast" or (work.name == "mr" and n == work.at_once[0]))
        ]

    def of_receivers(self) -> tuple[list[str], list[str]]:
        """Those that run, and those that are asked for and not installed. `node` only when it is named."""
        asked = list(self.receivers) or [name for name in RECEIVERS if name != "node"]
        return [n for n in asked if RECEIVERS[n].installed()], [n for n in asked if not RECEIVERS[n].installed()]


def disk(folder: Path) -> str:
    """The file system that is written to: on tmpfs an fsync costs nothing, and durable figures mean nothing."""
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda m: len(m.mountpoint))
    found = [m for m in mounts if folder.resolve().is_relative_to(m.mountpoint)]
    kind = found[-1].fstype if found else "unknown"
    return (
        f"{kind}{' (memory: fsync is free here, durable figures mean nothing)' if kind in ('tmpfs', 'ramfs') else ''}"
    )


def receive(work: Path, rounds: int, selection: Selection | None = None) -> Iterator[str]:
    """The table of each cell as soon as it is measured, then the ratios."""
    selection = selection or Selection()
    names, absent = selection.of_receivers()
    yield f"written to: {disk(work)}; rounds: {rounds}; receivers: " + "; ".join(
        f"{n} = {RECEIVERS[n].what}{', durable' if RECEIVERS[n].durable else ''}" for n in names
    )
    for name in absent:
        yield f"not installed: {name}"
    files: dict[str, list[Path]] = {}
    tables = []
    for cell in selection.cells():
        if cell.work.name not in files:
            files[cell.work.name] = cell.work.make(work / cell.work.name, cell.work.count + 1)
        table = Table(cell, {name: [] for name in names})
        for number in range(rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned:
                found = measure(RECEIVERS[name], cell, files[cell.work.name], work / f"r{number}-{name}")
                if isinstance(found, str):
                    table.errors[name] = found
                table.rounds[name].append(None if isinstance(found, str) else found)
        tables.append(table)
        yield from table.lines()
    yield from verdicts(tables, () if selection.quick else TARGETS)
    if not selection.works and not selection.senders:
        yield from idle(work, names, 4 if selection.quick else 32, 1.0 if selection.quick else 20.0)

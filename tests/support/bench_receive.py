"""What `scripts/bench receive` measures: this node beside other Storage SCPs, in paired and interleaved rounds of one run.

In each round every receiver gets the same files from the same sender, one receiver after the other, each in an empty folder
of its own on the same disk; the order turns from round to round. A ratio is of one round; its median is what counts.
Sender and receiver share the machine. What a receiver did not store is no figure: the row then says what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_inputs
import numpy as np
import psutil
import yaml
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from raw_scu import AbortedError, RawScu, RejectedError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
AE_TITLE = "DICOM_NODE"
PEER_SECONDS = 600


# --- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of instance, how many of it, and by how many senders at once."""

    name: str
    what: str
    count: int
    at_once: tuple[int, ...]
    make: Callable[[Path, int], list[Path]]
    proposes: str
    """Of storescu: the transfer syntax it offers."""


def _base(sop_class: str, syntax: str, modality: str, number: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    # Of one length for every instance, so that what follows the header is the same bytes in the same place.
    root = f"1.2.826.0.1.3680043.9.5.{modality == 'US':d}"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, f"{root}.{number + 100000}"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID, ds.Modality = f"{root}.1", f"{root}.2", "BENCH", modality
    ds.InstanceNumber = number
    return ds


def mr_files(folder: Path, count: int) -> list[Path]:
    """MR 256 x 256 x 16 bit with 60 private elements, 134 KB each."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    files = []
    for n in range(1, count + 1):
        ds = _base(uid.MRImageStorage, uid.ExplicitVRLittleEndian, "MR", n)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", 256, 256
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.add_new((0x0019, 0x0010), "LO", "BENCH")
        for k in range(60):
            ds.add_new((0x0019, 0x1000 + k), "LO", f"private value {k}")
        ds.PixelData = rng.integers(0, 4095, (256, 256), dtype="<u2").tobytes()
        ds.save_as(folder / f"{n:05d}.dcm", enforce_file_format=True)
        files.append(folder / f"{n:05d}.dcm")
    return files


def _clip(folder: Path, count: int, frames: int) -> list[Path]:
    folder.mkdir()
    pixels = np.stack([bench_inputs.bmode(480, 640, k % 4) for k in range(frames)]).tobytes()
    files = []
    for n in range(1, count + 1):
        ds = _base(uid.UltrasoundMultiFrameImageStorage, uid.ExplicitVRLittleEndian, "US", n)
        ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = frames, "33.3", 0x00181063
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 480, 640, 8, 8, 7, 0
        ds.PixelData = pixels
        ds["PixelData"].VR = "OB"
        ds.save_as(folder / f"{n:05d}.dcm", enforce_file_format=True)
        files.append(folder / f"{n:05d}.dcm")
    return files


def us_files(folder: Path, count: int) -> list[Path]:
    """Ultrasound 60 frames 640 x 480 RGB, 55 MB each."""
    return _clip(folder, count, 60)


def short_us_files(folder: Path, count: int) -> list[Path]:
    """Three frames of it, 2.8 MB each: for a smoke run."""
    return _clip(folder, count, 3)


def jpeg_files(folder: Path, count: int) -> list[Path]:
    """The same sixty frames as JPEG baseline."""
    folder.mkdir()
    files = []
    for n in range(1, count + 1):
        path = folder / f"{n:05d}.dcm"
        if n == 1:
            bench_inputs.clip(path, 60, 480, 640, different=12)
        else:
            ds = bench_inputs.dcmread(files[0])
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.9.5.2.{n + 100000}"
            ds.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


FULL = (
    Work("mr", "MR 134 KB", 500, (1, 8, 32), mr_files, "-xe"),
    Work("us", "US 55 MB", 20, (1, 4), us_files, "-xe"),
    Work("jpeg", "US JPEG clip", 20, (1, 4), jpeg_files, "-xy"),
)
QUICK = (
    Work("mr", "MR 134 KB", 12, (1, 4), mr_files, "-xe"),
    Work("us", "US 2.8 MB", 3, (1,), short_us_files, "-xe"),
    Work("jpeg", "US JPEG clip", 3, (1,), jpeg_files, "-xy"),
)


# --- who receives ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Receiver:
    """A Storage SCP: how it is started, and where it stores."""

    name: str
    what: str
    durable: bool
    start: Callable[[Path, int], list[str]]
    """Folder and port -> command."""
    program: str = ""
    """What has to be installed, if anything."""
    stores: str = "**/*"
    """Files that are instances, below its folder."""

    def installed(self) -> bool:
        return not self.program or shutil.which(self.program, path=os.environ["PATH"] + ":/usr/sbin") is not None


def _storescp(folder: Path, port: int) -> list[str]:
    return ["storescp", "--fork", "+xa", "-pdu", "131072", "-aet", AE_TITLE, "-od", str(folder), str(port)]


def _orthanc(folder: Path, port: int) -> list[str]:
    settings = {
        "Name": "bench", "DicomAet": AE_TITLE, "DicomPort": port, "HttpPort": free_port(), "HttpServerEnabled": False,
        "StorageDirectory": str(folder), "IndexDirectory": str(folder), "Plugins": [], "DicomAlwaysAllowStore": True,
        "DicomModalitiesInMemory": False,
    }  # fmt: skip
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(settings))
    return [shutil.which("Orthanc", path=os.environ["PATH"] + ":/usr/sbin") or "Orthanc", str(path)]


def _naive(folder: Path, port: int) -> list[str]:
    return [sys.executable, str(HERE / "stock_scp.py"), "naive", str(port), str(folder)]


def _reference(folder: Path, port: int) -> list[str]:
    return [sys.executable, str(HERE / "reference_receiver.py"), str(port), str(folder)]


def _node(folder: Path, port: int, *more: str) -> list[str]:
    settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    settings["receive"]["port"], settings["metrics"]["port"] = port, free_port()
    settings["receive"]["max_associations"] = settings["receive"]["max_associations_per_peer"] = 64
    settings["store"]["root"], settings["store"]["min_free_gb"] = str(folder), 0.1
    settings["engines"]["path"] = [str(REPOSITORY / "engines")]
    settings["assemble"]["quiet_seconds"] = 3600
    settings["log"]["level"] = "warning"
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "dicom_node", "run", "--config", str(path), *more]


def _listener(folder: Path, port: int) -> list[str]:
    return _node(folder, port, "--only", "listen")


RECEIVERS = {
    r.name: r
    for r in (
        Receiver("storescp", "DCMTK storescp --fork", False, _storescp, "storescp"),
        Receiver("orthanc", "Orthanc", False, _orthanc, "Orthanc", "??/**/*"),
        Receiver("naive", "pynetdicom, its documentation's handler", False, _naive),
        Receiver("durable", "durable prototype (tests/support/reference_receiver.py)", True, _reference, "", "*.dcm"),
        Receiver("ours", "dicom-node run --only listen", True, _listener, "", "incoming/*.dcm"),
        Receiver("node", "dicom-node run, indexing beside", True, _node, "", "**/*.dcm"),
    )
}
OURS = "ours"


class Running:
    """A receiver while it is measured."""

    def __init__(self, receiver: Receiver, folder: Path, environment: dict[str, str]) -> None:
        self.receiver, self.folder, self.port = receiver, folder, free_port()
        folder.mkdir(parents=True)
        command = receiver.start(folder, self.port)
        self._log = folder.with_suffix(".log").open("wb")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env=os.environ | environment
        )
        self._me = psutil.Process(self._process.pid)
        self._peak = 0.0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Running:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, AbortedError, RejectedError), RawScu(self.port, timeout=2) as scu:
                scu.associate(called=AE_TITLE).echo()
                scu.release()
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.receiver.name} does not come up")
            time.sleep(0.05)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for process in reversed(self.tree()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        if self._watcher.is_alive():
            self._watcher.join()
        self._log.close()

    def tree(self) -> list[psutil.Process]:
        try:
            return [self._me, *self._me.children(recursive=True)]
        except psutil.Error:
            return []

    def cpu(self) -> float:
        """Seconds so far, of it and all its children, those that ended included."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total

    def peak_mb(self) -> float:
        """The most that its processes had resident together."""
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            total = 0.0
            for process in self.tree():
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss / 2**20
            self._peak = max(self._peak, total)

    def stored(self) -> int:
        return sum(1 for p in self.folder.glob(self.receiver.stores) if p.is_file() and not p.name.startswith("index"))


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


def measure(receiver: Receiver, cell: Cell, files: list[Path], folder: Path) -> Figures | str:
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
            deadline = time.monotonic() + 30
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
                text = f"{cell.key}: {figure} ours / {name} {middle:.2f} x [{ratios[0]:.2f}-{ratios[-1]:.2f}, n {len(ratios)}]"
                if target is not None:
                    met = middle >= target.value if target.least else middle <= target.value
                    text += f"; target {'>=' if target.least else '<='} {target.value:g}: {'met' if met else 'MISSED'}"
                yield text
        if (cell.work.name, cell.senders) == ("us", 4) and OURS in table.rounds and OURS not in table.errors:
            peak = max(f.rss_mb for f in table.rounds[OURS] if f is not None)
            yield f"{cell.key}: listener RSS {peak:.0f} MB; target <= {MAX_RSS_MB:g}: {'met' if peak <= MAX_RSS_MB else 'MISSED'}"


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

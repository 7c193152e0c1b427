"""The Storage SCPs that `scripts/bench receive` measures: how each is started, what it used, what it stored."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from raw_scu import AbortedError, RawScu, RejectedError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
AE_TITLE = "DICOM_NODE"


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

"""A real node, real peers, from outside: processes, sockets, files and the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pydicom
import pytest
import sqlalchemy.exc
import yaml

from dicom_node.errors import LedgerError
from dicom_node.store import inspect
from dicom_node.store.ledger import open_read_only

REPOSITORY = Path(__file__).parent.parent.parent
SHIPPED_CONFIG = REPOSITORY / "config.yaml"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(what: Callable[[], Any], seconds: float = 30.0, *, every: float = 0.05) -> Any:
    """The first true value of `what()`; fails by name after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{getattr(what, '__name__', what)} did not come true in {seconds} s")
        time.sleep(every)


def peer(name: str) -> str:
    """The path of a peer's program, or a skip that names it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/lib/ctn/bin")
    if found is None:
        pytest.skip(f"peer {name} is not installed")
    return found


@dataclass
class Pacs:
    """DCMTK's storescp as the PACS."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Pacs:
        self.folder.mkdir(exist_ok=True)
        command = [peer("storescp"), "-aet", "PACS", "+xa", "--fork", "-od", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: _connects(self.port))
        return self

    def stop(self) -> None:
        if self.process is not None:
            for child in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    child.kill()
            self.process.wait()
            self.process = None

    def objects(self) -> list[pydicom.Dataset]:
        return [pydicom.dcmread(p, force=True) for p in sorted(self.folder.iterdir())]


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except OSError:
        return False
    return True


@dataclass
class Node:
    """`dicom-node run` in a folder of its own."""

    folder: Path
    settings: dict[str, Any]
    port: int = 0
    process: subprocess.Popen[str] | None = None
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "node.log"
        self.port = self.settings["receive"]["port"]
        self.write_config()

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def root(self) -> Path:
        return self.folder / "var"

    def write_config(self) -> None:
        self.config.write_text(yaml.safe_dump(self.settings, allow_unicode=True))

    def start(self) -> Node:
        command = [self.python, "-m", "dicom_node", "run", "--config", str(self.config)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"listening {self.settings['receive']['ae_title']}@"), self.log.read_text()[-4000:]
        return self

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        me = psutil.Process(self.process.pid)
        return [*me.children(recursive=True), me]

    def child(self, word: str) -> psutil.Process | None:
        """The listener ("listen") or a worker ("dicom_node.worker")."""
        for process in self.tree():
            with contextlib.suppress(psutil.Error):  # it may end while we look
                if word in process.cmdline():
                    return process
        return None

    def kill(self) -> None:
        """kill -9 of everything, children first or last as chance has it."""
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
                pytest.fail("the node did not stop in 30 s")
        return int(self.process.returncode)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dicom_node", *arguments, "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, done.stderr
        return done

    def explain(self, study_uid: str) -> dict[str, Any]:
        done = self.cli("explain", study_uid, "--json", check=False)
        return (
            json.loads(done.stdout) if done.returncode == 0 else {"state": "UNKNOWN", "outcomes": [], "deliveries": []}
        )

    def state(self, study_uid: str) -> str:
        """From the ledger: a process for each look would take the processor from the node. "" = not known yet."""
        try:
            engine = open_read_only(self.folder / self.settings["store"]["root"], self.settings["store"].get("ledger"))
            try:
                with engine.connect() as tx:
                    found = inspect.explain(tx, study_uid)
            finally:
                engine.dispose()
        except (LedgerError, sqlalchemy.exc.OperationalError):  # it is only now being made
            return ""
        return str(found["state"]) if found else ""

    def wait_state(self, study_uid: str, *states: str, seconds: float = 45.0) -> dict[str, Any]:
        answer: dict[str, Any] = {}

        def reached() -> bool:
            if self.state(study_uid) not in states:
                return False
            answer.update(self.explain(study_uid))
            return answer["state"] in states

        try:
            wait_for(reached, seconds, every=0.1)
        except pytest.fail.Exception:
            answer = self.explain(study_uid)
            said = json.dumps(answer, indent=1)[:3000]
            pytest.fail(f"study stays {answer.get('state')}: {said}\n{self.log.read_text()[-3000:]}")
        return answer


def make_phantom(folder: Path, *arguments: str, seed: int = 501, label: int = 1) -> Path:
    """A phantom study file by the task's own generator."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*.dcm"))
    command = [
        sys.executable,
        "-m",
        "engines.training",
        "phantom",
        "renal_ceus",
        "--seed",
        str(seed),
        "--label",
        str(label),
    ]
    subprocess.run(
        [*command, "--out", str(folder), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    (made,) = set(folder.rglob("*.dcm")) - before
    return made


PROPOSE = {"1.2.840.10008.1.2.4.50": "-xy", "1.2.840.10008.1.2.5": "-xr"}


def storescu(port: int, *files: Path, called: str = "DICOM_NODE", calling: str = "MODALITY") -> int:
    """DCMTK's storescu, an association a file, proposing what the file is (-R); Nagle off, so that tests are quick."""
    worst = 0
    for path in files:
        syntax = str(pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID)
        command = [peer("storescu"), "-R", PROPOSE.get(syntax, "-xe"), "-aet", calling, "-aec", called]
        done = subprocess.run(
            [*command, "127.0.0.1", str(port), str(path)],
            capture_output=True,
            env=os.environ | {"TCP_NODELAY": "1"},
            timeout=120,
        )
        worst = max(worst, done.returncode)
    return worst


def study_uid(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID)

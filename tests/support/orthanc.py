"""Orthanc as the PACS of a test: stores, and answers C-FIND."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_node import free_port, peer, wait_for


@dataclass(frozen=True, slots=True)
class Orthanc:
    """A running one."""

    port: int
    ae_title: str = "ORTHANC"


def _connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


@contextlib.contextmanager
def orthanc(folder: Path, **more: Any) -> Iterator[Orthanc]:
    """An empty PACS on a free port, everybody allowed; `more` of its own settings."""
    program = peer("Orthanc")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {
        "Name": "PACS",
        "DicomAet": "ORTHANC",
        "DicomPort": port,
        "HttpPort": free_port(),
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "Plugins": [],
        "DicomCheckModalityHost": False,
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowStore": True,
    } | more
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_for(lambda: _connects(port))
        yield Orthanc(port)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

"""`dicom-node run`: first the listener's process, then everything else, so that the two load side by side.

This file imports nothing heavy; the stages (`node.py`) are imported when the child is on its way.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from dicom_node.config import Config
from dicom_node.route import check_routes
from dicom_node.service.listening import spawn
from dicom_node.service.notify import notify
from dicom_node.store.files import lock_root

EX_CONFIG = 78


def run(config: Config, config_path: Path, *, only: str | None) -> int:
    """`run` and `run --only work`. Returns when told to stop. Raises RootInUseError, ConfigError, LedgerError."""
    check_routes(config.routes, str(config_path))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    lock = lock_root(config.store.root, "work")
    first = spawn(config_path) if only is None else None

    from dicom_node.service.node import Node

    node = Node(config, config_path, lock, first)
    node.start()
    try:
        while first is not None and not node.view.listening.wait(0.2) and not stop.is_set():
            if node.listener_exit_code == EX_CONFIG:
                return EX_CONFIG  # it has said why on stderr
        if node.view.address is not None:
            host, port = node.view.address
            print(f"listening {config.receive.ae_title}@{host}:{port}", flush=True)  # noqa: T201  the interface
        notify("READY=1")
        while not stop.wait(5.0):
            node.watch()
    finally:
        notify("STOPPING=1")
        node.stop()
    return 0

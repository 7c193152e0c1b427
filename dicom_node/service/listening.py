"""The listener's process and the stages process's view of it.

The listener knows files only. It talks over a socket of JSON lines: inherited from `dicom-node run` (`--link-fd`), or
the control socket when systemd supervises the two halves apart. Hints may be lost: the index sweeps `incoming/` anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from dicom_node.config import Config
from dicom_node.errors import NodeError
from dicom_node.log import Log, make_log
from dicom_node.metrics import Recorder
from dicom_node.service.control import Message, connect, lines

SEND_TIMEOUT = 2.0
SWITCH_SECONDS = 0.001
Child: TypeAlias = tuple["subprocess.Popen[bytes]", socket.socket]


class SocketLink:
    """The listener's end: `send` never waits long and never raises; without a stages process it drops the message."""

    def __init__(self, open_socket: Callable[[], socket.socket]) -> None:
        self._open_socket = open_socket
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._retry_at = 0.0

    def send(self, message: Message) -> None:
        """One message, or nothing."""
        with self._lock:
            if self._socket is None and time.monotonic() >= self._retry_at:
                try:
                    self._socket = self._open_socket()
                    self._socket.settimeout(SEND_TIMEOUT)
                except OSError:
                    self._retry_at = time.monotonic() + 0.5
            if self._socket is None:
                return
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # a half-sent line would garble the next one: begin anew
                self._socket.close()
                self._socket = None

    def wait_for_end(self) -> None:
        """Block until the other side is gone (only for an inherited link)."""
        if self._socket is not None:
            with contextlib.suppress(OSError, ValueError):
                select.select([self._socket], [], [])  # the stages process never writes here: readable means gone


def without_decoders() -> None:
    """In a process that decodes no pixels, before pydicom is imported: it must not look for what could.

    numpy and the decoders are a third of the listener's memory, most of its start, and parsers in C++ within reach of
    every peer. pydicom goes without where an import fails; a `None` in `sys.modules` makes it fail.
    """
    for name in ("numpy", "gdcm", "PIL", "pylibjpeg", "openjpeg", "rle", "jpeg_ls", "tqdm"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def run_listener(config: Config, link_fd: int | None) -> int:
    """`dicom-node run --only listen`, and the child of `dicom-node run`."""
    from dicom_node.receive import Listener

    # A peer whose messages cost nothing but our processor holds the interpreter for so long before others get it; an
    # honest one needs it a dozen times for its C-ECHO.
    sys.setswitchinterval(SWITCH_SECONDS)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log = make_log(config.log, config.store.root).bind(process="listener")
    folder = config.store.root / "run"

    def by_control_socket() -> socket.socket:
        s = connect(folder)
        s.sendall(b'{"kind":"listener"}\n')
        return s

    inherited = None if link_fd is None else socket.socket(fileno=link_fd)
    link = SocketLink(by_control_socket if inherited is None else lambda: inherited)
    listener = Listener(config.receive, config.store, link, log)
    try:
        address = listener.start()
    except OSError as e:
        where = f"{config.receive.host}:{config.receive.port}"
        raise NodeError(f"receive: {where} cannot be listened on ({e.strerror})") from None
    if inherited is None:
        from dicom_node.service.notify import notify

        print(f"listening {config.receive.ae_title}@{address[0]}:{address[1]}", flush=True)  # noqa: T201  the interface
        notify("READY=1")
        threading.Thread(target=_watchdog, args=(stop, notify), daemon=True).start()
    else:
        # Our parent is gone, however it ended: leave the port to its successor. What was acknowledged is durable.
        def leave() -> None:
            link.wait_for_end()
            os._exit(0)

        threading.Thread(target=leave, daemon=True).start()
    stop.wait()
    listener.stop()
    return 0


def _watchdog(stop: threading.Event, notify: Callable[[str], bool]) -> None:
    while not stop.wait(10):
        notify("WATCHDOG=1")


class ListenerView:
    """What the stages process knows of the listener: fed by `take`, read by assemble, the watchdog and /readyz."""

    def __init__(
        self,
        on_stored: Callable[[], None],
        on_metrics: Callable[[list[Any]], None],
        on_event: Callable[[Message], None],
        on_available: Callable[[str, list[str]], None] = lambda _study, _instances: None,
    ) -> None:
        self._on_stored, self._on_metrics, self._on_event = on_stored, on_metrics, on_event
        self._on_available = on_available
        self._open: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self.address: tuple[str, int] | None = None
        self.heard_at: float | None = None
        self.listening = threading.Event()

    @property
    def open_associations(self) -> frozenset[str]:
        """Ids of the associations open now."""
        return self._open

    def take(self, messages: Iterator[Message]) -> None:
        """Until the listener is gone."""
        for message in messages:
            self.heard_at = time.monotonic()
            self._handle(message)
        with self._lock:
            self._open = frozenset()  # its associations died with it
        self.listening.clear()
        self._on_stored()

    def _handle(self, message: Message) -> None:
        kind = message.get("kind")
        if kind == "listening":
            host, port = message["address"]
            self.address = (str(host), int(port))
            self.listening.set()
        elif kind == "associations":
            with self._lock:
                self._open = frozenset(message["open"])
        elif kind == "association_opened":
            with self._lock:
                self._open |= {message["id"]}
        elif kind == "association_closed":
            with self._lock:
                self._open -= {message["id"]}
            self._on_stored()
        elif kind == "stored":
            self._on_stored()
        elif kind == "available":
            self._on_available(str(message["study"]), [str(uid) for uid in message["instances"]])
        elif kind == "metrics":
            self._on_metrics(message["deltas"])
        elif kind == "event":
            self._on_event(message)


def spawn(config_path: Path) -> Child:
    """Start a listener child; the socket is our end of its link, and its life: it ends when we do."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dicom_node", "run", "--only", "listen", "--config", str(config_path)]
    child = subprocess.Popen(  # noqa: S603  our own interpreter, our own arguments
        [*command, "--link-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
    )
    theirs.close()
    return child, ours


class ListenerProcess(threading.Thread):
    """Keeps one listener child alive: a crash costs the open associations, never the node."""

    def __init__(self, config_path: Path, first: Child, view: ListenerView, log: Log, recorder: Recorder) -> None:
        super().__init__(name="listener-supervisor", daemon=True)
        self._config_path, self._view, self._log, self._recorder = config_path, view, log, recorder
        self._stopping = threading.Event()
        self.exit_code: int | None = None
        """Of the last child that ended; 78 = its configuration is not usable, so another try cannot help."""
        self._first: Child | None = first
        self._child: subprocess.Popen[bytes] | None = first[0]

    def run(self) -> None:
        """Start, follow, restart with back-off."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._child, ours = self._first or spawn(self._config_path)
            self._first = None
            with ours:
                self._view.take(lines(ours))
            self.exit_code = code = self._child.wait()
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > 60 else failures + 1
            self._recorder.inc("dicom_node_listener_restarts_total")
            self._log.error("listener_ended", exit_code=code, restarts=failures)
            self._stopping.wait(min(30.0, 0.1 * 2**failures))

    def stop(self, timeout: float = 15.0) -> None:
        """Refuse new associations, let the instances in hand finish, end."""
        self._stopping.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                child.kill()
        self.join(5)

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

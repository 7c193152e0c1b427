"""A listener for tests: in this process (`listening`) or as a child whose memory can be watched (`ListenerProcess`).

Run as a script it is that child: what it would tell the stages process goes to stdout, the log to stderr.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from dicom_node.config import Receive, Store  # noqa: E402
from dicom_node.log import Log, make_log  # noqa: E402
from dicom_node.receive import Listener  # noqa: E402


class Messages:
    """A Link that keeps what it is given."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.all.append(json.loads(json.dumps(message)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.all if m["kind"] == kind]

    def counts(self, name: str) -> float:
        """Sum of a counter over all labels."""
        deltas = [d for m in self.of("metrics") for d in m["deltas"]]
        return sum(d[3] for d in deltas if d[0] == "c" and d[1] == name)


class InProcess:
    def __init__(self, root: Path, listener: Listener, messages: Messages, port: int) -> None:
        self.root, self.listener, self.messages, self.port = root, listener, messages, port

    def files(self, folder: str = "incoming", suffix: str = "") -> list[Path]:
        return sorted(p for p in (self.root / folder).iterdir() if p.name.endswith(suffix))


@contextlib.contextmanager
def listening(
    root: Path, *, log: Log | None = None, room=None, min_free_gb: float = 0.0, **receive
) -> Iterator[InProcess]:
    messages = Messages()
    listener = Listener(
        Receive(port=0, **receive), Store(root=root, min_free_gb=min_free_gb), messages, log or Log.null(), room=room
    )
    _, port = listener.start()
    try:
        yield InProcess(root, listener, messages, port)
    finally:
        listener.stop(grace=1.0)


class ListenerProcess:
    """The same in a child process."""

    def __init__(self, root: Path, *, min_free_gb: float = 0.0, **receive) -> None:
        self.root = root
        section = Receive(port=0, **receive).model_dump(mode="json")
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"receive": section, "root": str(root), "min_free_gb": min_free_gb})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.messages, self.log_lines = Messages(), []
        threading.Thread(target=self._read_messages, daemon=True).start()
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()
        try:
            self.port = int(wait_for(lambda: self.messages.of("listening"), 15)[0]["address"][1])
        except AssertionError:
            self.process.kill()  # nobody else could
            self.process.wait()
            raise

    def _read_messages(self) -> None:
        for line in self.process.stdout or ():
            self.messages.all.append(json.loads(line))

    def _read_log(self) -> None:
        for line in self.process.stderr or ():
            self.log_lines.append(line)

    def files(self, folder: str = "incoming", suffix: str = "") -> list[Path]:
        return sorted(p for p in (self.root / folder).iterdir() if p.name.endswith(suffix))

    def stop(self) -> int:
        self.process.terminate()
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._log_reader.join(5)
        return code

    def __enter__(self) -> ListenerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


def wait_for(condition, seconds: float = 10.0):
    """The first true value of `condition()`; fails after so long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)
    return value


def main(text: str) -> None:
    arguments = json.loads(text)
    root = Path(arguments["root"])

    class Stdout:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def send(self, message: dict[str, Any]) -> None:
            with self._lock:
                print(json.dumps(message), flush=True)

    from dicom_node.config import Log as LogSection

    log = make_log(LogSection(level="debug"), root)
    listener = Listener(
        Receive.model_validate(arguments["receive"]),
        Store(root=root, min_free_gb=arguments["min_free_gb"]),
        Stdout(),
        log,
    )
    listener.start()
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    end.wait()
    listener.stop(grace=2.0)


if __name__ == "__main__":
    main(sys.argv[1])

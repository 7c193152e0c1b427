"""A listener under attack, watched: an honest peer asks it for an echo all the while, and its memory is looked at.

`Besieged` is a listener process with what it had at the start; `siege` runs an attack against it and judges. It sees
sockets, files and /proc only, so it serves whatever transport the listener is made of.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from listener_process import ListenerProcess, wait_for
from raw_scu import RawScu

from dicom_node.config import Tls

HONEST, HONEST_AE = "127.0.0.7", "HONEST"
ECHO_SECONDS, RSS_MB = 1.0, 150.0
SETTLE_SECONDS = 20.0
"""Longer than the listener's own deadline for a request: what an attacker left hanging must be gone by then."""


@dataclass
class Besieged:
    """A listener process, and how many threads and descriptors it has in peace."""

    listener: ListenerProcess
    tls: ssl.SSLContext | None = None
    threads: int = 0
    descriptors: int = 0
    process: psutil.Process = field(init=False)

    def __post_init__(self) -> None:
        self.process = psutil.Process(self.listener.process.pid)
        self.echo()
        self.peace()

    @property
    def port(self) -> int:
        return self.listener.port

    def peace(self) -> None:
        """What it has when nobody is connected: the least of what is seen for a while."""
        seen = []
        for _ in range(10):
            seen.append((self.process.num_threads(), self.process.num_fds()))
            time.sleep(0.005)
        self.threads, self.descriptors = min(t for t, _ in seen), min(d for _, d in seen)

    def echo(self) -> float:
        """Seconds of an honest C-ECHO, connection and association included."""
        began = time.monotonic()
        with RawScu(self.port, source=HONEST, timeout=5, tls=self.tls) as scu:
            assert scu.associate(calling=HONEST_AE).echo() == 0
            scu.release()
        return time.monotonic() - began

    def rss_mb(self) -> float:
        return self.process.memory_info().rss / 2**20

    def settled(self) -> bool:
        """Threads and descriptors are back to the start, and nothing half-written is left."""
        return (
            self.process.num_threads() <= self.threads
            and self.process.num_fds() <= self.descriptors
            and not self.listener.files(suffix=".part")
        )

    def settles(self, seconds: float = SETTLE_SECONDS) -> None:
        try:
            wait_for(self.settled, seconds)
        except AssertionError:
            now = (self.process.num_threads(), self.process.num_fds(), self.listener.files(suffix=".part"))
            raise AssertionError(f"not settled: {now}, in peace {(self.threads, self.descriptors)}") from None

    def stored(self) -> int:
        """Instances in `incoming/` now; they are removed."""
        paths = self.listener.files(suffix=".dcm")
        for path in paths:
            path.unlink()
        return len(paths)


Attack = Callable[[Besieged], Iterator[None]]
"""Yields whenever it is at its worst; ends when the attacker lets go."""


class Watch:
    """Echoes and looks at memory until told to stop."""

    def __init__(self, node: Besieged) -> None:
        self.node = node
        self.slowest, self.highest, self.echoes = 0.0, node.rss_mb(), 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._one = threading.Lock()  # a peer with one association: the reserve of a full port is for such
        self._threads = [threading.Thread(target=run) for run in (self._ask, self._look)]

    def ask(self) -> None:
        with self._one:
            try:
                self.slowest = max(self.slowest, self.node.echo())
                self.echoes += 1
            except Exception as e:  # noqa: BLE001  whatever an honest peer meets is the finding
                self.failed.append(f"{type(e).__name__}{e.args}")
            time.sleep(0.03)

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.ask()
            self._stop.wait(0.1)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            with contextlib.suppress(psutil.Error):
                self.highest = max(self.highest, self.node.rss_mb())

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def siege(node: Besieged, attack: Attack) -> Watch:
    """The attack, an honest peer beside it, and what it left behind."""
    node.peace()
    with Watch(node) as watch:
        for _ in attack(node):
            watch.ask()
    assert node.listener.process.poll() is None, "the listener died"
    assert not watch.failed, watch.failed[:3]
    assert watch.slowest < ECHO_SECONDS, f"an honest C-ECHO took {watch.slowest:.2f} s"
    assert watch.highest <= RSS_MB, f"{watch.highest:.0f} MB"
    node.settles()
    return watch


@contextlib.contextmanager
def besieged(
    root: Path, *, tls: ssl.SSLContext | None = None, own_tls: Tls | None = None, **receive
) -> Iterator[Besieged]:
    """A listener for a module of attacks; `tls` is the honest peer's context, `own_tls` the listener's section."""
    if own_tls is not None:
        receive["tls"] = own_tls.model_dump(mode="json")
    with ListenerProcess(root, **receive) as listener:
        yield Besieged(listener, tls)

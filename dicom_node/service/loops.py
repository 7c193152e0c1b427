"""The stage loop: the only place that keeps a stage running, and one of the two that catch every exception.

No loop may die: not of a database error, not of a full disk, not of a defect. It waits a little longer instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from dicom_node.log import Log, place_of
from dicom_node.metrics import Recorder

MAX_PAUSE = 30.0


class StageLoop(threading.Thread):
    """Calls `run_once` while it has work; then waits for `wake` or for `seconds_to_next`."""

    def __init__(
        self,
        name: str,
        run_once: Callable[[], bool],
        log: Log,
        recorder: Recorder,
        *,
        seconds_to_next: Callable[[], float] | None = None,
        idle_seconds: float = 2.0,
        linger_seconds: float = 0.0,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._run_once, self._log, self._recorder = run_once, log, recorder
        self._seconds_to_next = seconds_to_next or (lambda: idle_seconds)
        self._linger = linger_seconds
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self.beat = time.monotonic()
        """When the loop last came round; the watchdog and /healthz read it."""

    def wake(self) -> None:
        """There may be work."""
        self._wake.set()

    def stop(self) -> None:
        """Finish the turn in hand, then end."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """Until stopped."""
        failures = 0
        while not self._stopping.is_set():
            self._wake.clear()
            self.beat = time.monotonic()
            try:
                worked = self._run_once()
                pause = 0.0 if worked else self._seconds_to_next()
                failures = 0
            except Exception as e:  # noqa: BLE001  the stage loop: rule 4 of the house
                failures += 1
                pause = min(MAX_PAUSE, 0.5 * 2**failures)
                self._failed(e, pause)
            self._recorder.set("dicom_node_stage_beat_seconds", time.time(), stage=self.name.split(":")[0])
            if pause > 0 and self._wake.wait(pause) and self._linger:
                self._stopping.wait(self._linger)  # what comes together is worked on together

    def _failed(self, error: Exception, pause: float) -> None:
        """Say what broke, not whose: type and place, never a foreign exception's message (it may hold PHI)."""
        if isinstance(error, sa.exc.DBAPIError):
            self._recorder.inc("dicom_node_ledger_errors_total")
        self._log.error(
            "stage_error",
            stage=self.name,
            error=type(error).__name__,
            place=place_of(error.__traceback__),
            retry_seconds=pause,
        )

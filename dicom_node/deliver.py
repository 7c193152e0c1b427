"""Deliver: one stage a destination, so that a dead one never delays another. The last stage of the line.

What a status means stands in `dimse/status.py`; here it becomes a row: delivered, again later, paused, dead.

- No association: the *destination* is left alone for a while, longer each time; no object loses an attempt.
- An object that breaks the association, or is refused for now, waits by itself, and the destination for a moment: the
  next turn belongs to another object, so that one bad object never stops the rest.
- Refused for good (our AE title, TLS, 0x0124): the destination is paused. Its objects stay pending however long that
  takes, one probe goes out now and then, and everything flows by itself when it gets through.
- A SOP Class that is not taken waits in the same way, and the others do not wait for it.
- An answer of unclear meaning: a few tries over a day, then DEAD. Failing for `give_up_hours`: DEAD. A person looks.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

from dicom_node.config import Destination, Retry
from dicom_node.dimse.sender import Scope, Sender, SendOutcome
from dicom_node.dimse.status import Outcome
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import deliveries
from dicom_node.store.deliveries import Delivery, Standing
from dicom_node.store.ledger import Ledger

UNCLEAR_TRIES, UNCLEAR_SECONDS = 5, 86400.0
"""A status of unclear meaning: so many tries, spread over a day."""
HOUR = 3600.0
IDLE_SECONDS = 5.0
STAT = 5
"""Priority from which C-STORE says HIGH."""


class DeliverStage:
    """Sends what is pending for one destination. `chance` gives the jitter, 0..1."""

    def __init__(
        self,
        ledger: Ledger,
        outputs: Path,
        name: str,
        destination: Destination,
        retry: Retry,
        calling_ae_title: str,
        log: Log,
        recorder: Recorder,
        *,
        sender: Sender | None = None,
        chance: Callable[[], float] = random.random,
        on_delivered: Callable[[Delivery], None] = lambda _sent: None,
    ) -> None:
        self._ledger, self._outputs, self._name, self._to, self._retry = ledger, outputs, name, destination, retry
        self._sender = sender or Sender(calling_ae_title)
        self._log, self._recorder, self._chance = log, recorder, chance
        self._on_delivered = on_delivered
        self._failures = 0
        self._failed: set[int] = set()
        """Deliveries that failed since the last success: another one gets the next turn."""
        self._moving_since, self._outage = ledger.clock(), False
        self._refused_classes: set[str] = set()
        self._closed = False
        step = UNCLEAR_SECONDS / (UNCLEAR_TRIES - 1)
        self._farthest = max(step, 1.5 * retry.max_seconds) + 1.0

    def run_once(self) -> bool:
        """One object: a STAT study may come in while others are waiting. True = something was done."""
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            standing = deliveries.standing(tx, self._name)
            must_wait = self._must_wait(standing, now)
            waiting = []
            if not must_wait:
                since, farthest = self._moving_since, self._farthest
                waiting = deliveries.pending(tx, self._name, now, since=since, farthest=farthest)
        self._recorder.set(
            "dicom_node_destination_paused", float(standing.paused_since is not None), destination=self._name
        )
        if not waiting:
            self._sender.close_if_idle()
            return False
        one = next((d for d in waiting if d.id not in self._failed), None)
        if one is None:
            self._failed.clear()
            one = waiting[0]
        self._deliver(one, {(d.sop_class_uid, d.transfer_syntax_uid) for d in waiting}, standing)
        return True

    def seconds_to_next(self) -> float:
        """Until something may be sent; commits wake the loop earlier."""
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            standing, due = deliveries.standing(tx, self._name), deliveries.next_at(tx, self._name)
        if due is None:
            return IDLE_SECONDS
        wait = standing.probe_at - now if self._must_wait(standing, now) else 0.0
        return min(IDLE_SECONDS, max(0.05, due - now, wait))

    def close(self) -> None:
        """Release the association; a send that is still under way is cut, and what became of it is not recorded."""
        self._closed = True
        self._sender.close()

    def _must_wait(self, standing: Standing, now: float) -> bool:
        return now < standing.probe_at <= now + self._farthest  # further away: the clock was set back

    def _deliver(self, one: Delivery, contexts: set[tuple[str, str]], standing: Standing) -> None:
        path = self._outputs / one.file
        if not self._intact(path, one.sha256):
            self._dead(one, None, "the object's file is missing or was changed on disk", sent=False)
            return
        started = time.monotonic()
        outcome = self._sender.send_file(self._to, path, batch=contexts, urgent=one.priority >= STAT)
        if self._closed:
            return
        if outcome.status is not None:
            seconds = time.monotonic() - started
            self._recorder.observe("dicom_node_delivery_seconds", seconds, destination=self._name)
        self._record(one, outcome, standing)

    @staticmethod
    def _intact(path: Path, sha256: str) -> bool:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError:
            return False

    def _record(self, one: Delivery, outcome: SendOutcome, standing: Standing) -> None:
        """The outcome table: what happened becomes a row."""
        if outcome.scope is Scope.DESTINATION:
            self._nothing_gets_through(one, outcome, standing)
            return
        now = self._ledger.clock()
        if standing != deliveries.WELL and outcome.kind is not Outcome.RETRY:
            self._answered_again(now)
        if outcome.kind is Outcome.DELIVERED:
            self._delivered(one, outcome, now)
        elif outcome.kind is Outcome.DEAD:
            self._dead(one, outcome.status, outcome.reason)
        elif outcome.kind is Outcome.PAUSE:
            self._class_refused(one, outcome, now)
        elif outcome.kind is Outcome.LIMITED:
            self._unclear(one, outcome, now)
        else:
            self._again(one, outcome, standing, now)

    def _answered_again(self, now: float) -> None:
        if self._outage:  # nobody could be served meanwhile: ageing starts anew, so that STAT goes first
            self._outage, self._moving_since = False, now
        self._failures = 0
        with self._ledger.write() as tx:
            deliveries.resume(tx, self._name, now)
        self._log.info("destination_answers", destination=self._name)

    def _delivered(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        self._failures = 0
        self._failed.clear()
        with self._ledger.write() as tx:
            deliveries.delivered(tx, one, outcome.status or 0, now, outcome.reason)
            if one.sop_class_uid in self._refused_classes:
                deliveries.release_class(tx, one, now)
            last = deliveries.last_received(tx, one.study_uid)
        self._refused_classes.discard(one.sop_class_uid)
        said = "delivered" if not outcome.status else "duplicate" if outcome.status == 0x0111 else "warning"
        self._count(said)
        self._on_delivered(one)
        self._recorder.observe("dicom_node_stored_to_delivered_seconds", max(0.0, now - last), destination=self._name)
        self._log.info("delivered", study=self._log.uid(one.study_uid), destination=self._name, outcome=said)

    # -- not delivered

    def _nothing_gets_through(self, one: Delivery, outcome: SendOutcome, standing: Standing) -> None:
        now = self._ledger.clock()
        self._outage = True
        if outcome.kind is Outcome.PAUSE:
            with self._ledger.write() as tx:
                deliveries.pause(tx, self._name, outcome.reason, now, now + self._retry.max_seconds)
                if outcome.status is not None:
                    deliveries.answered(tx, one, outcome.status)
            self._count("paused")
            self._log.error("destination_paused", destination=self._name, reason=outcome.reason)
            return
        seconds = self._back_off(self._failures)
        self._failures += 1
        given_up = 0
        with self._ledger.write() as tx:
            deliveries.wait(tx, self._name, standing, outcome.reason, now + seconds)
            if standing.paused_since is None:
                deliveries.out_of_reach(tx, self._name, outcome.reason, now)
                given_up = deliveries.give_up(tx, self._name, now - self._patience, self._given_up, now)
        self._count("retry")
        self._log.warning(
            "not_delivered", destination=self._name, reason=outcome.reason, retry_seconds=round(seconds, 1)
        )
        if given_up:
            self._count("dead", given_up)
            self._log.error("deliveries_dead", destination=self._name, count=given_up, reason=self._given_up)

    def _again(self, one: Delivery, outcome: SendOutcome, standing: Standing, now: float) -> None:
        """Refused for now, or the association broke: this object by its attempts, the destination by its failures."""
        if one.failing_since is not None and now - one.failing_since > self._patience:
            self._dead(one, outcome.status, f"{self._given_up}: {outcome.reason}")
            return
        seconds = self._back_off(one.attempts)
        with self._ledger.write() as tx:
            deliveries.again(tx, one, outcome.status, outcome.reason, now, now + seconds)
            deliveries.wait(tx, self._name, standing, outcome.reason, now + self._back_off(self._failures))
        self._failures += 1
        self._failed.add(one.id)
        self._not_taken("retry", one, outcome, seconds)

    def _unclear(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        if one.unclear + 1 >= UNCLEAR_TRIES:
            self._dead(one, outcome.status, f"{outcome.reason}, {UNCLEAR_TRIES} times")
            return
        seconds = UNCLEAR_SECONDS / (UNCLEAR_TRIES - 1)
        with self._ledger.write() as tx:
            deliveries.again(tx, one, outcome.status, outcome.reason, now, now + seconds, unclear=True)
        self._not_taken("retry", one, outcome, seconds)

    def _class_refused(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        self._refused_classes.add(one.sop_class_uid)
        seconds = self._retry.max_seconds
        with self._ledger.write() as tx:
            deliveries.hold_class(tx, one, outcome.status, outcome.reason, now, now + seconds)
        self._not_taken("paused", one, outcome, seconds)

    def _not_taken(self, counted: str, one: Delivery, outcome: SendOutcome, seconds: float) -> None:
        self._count(counted)
        say = self._log.error if outcome.kind is Outcome.PAUSE else self._log.warning
        say(
            "not_delivered",
            study=self._log.uid(one.study_uid),
            destination=self._name,
            reason=outcome.reason,
            retry_seconds=round(seconds, 1),
        )

    def _dead(self, one: Delivery, status: int | None, reason: str, *, sent: bool = True) -> None:
        with self._ledger.write() as tx:
            deliveries.dead(tx, one, status, reason, self._ledger.clock(), sent_now=int(sent))
        self._count("dead")
        self._log.error("delivery_dead", study=self._log.uid(one.study_uid), destination=self._name, reason=reason)

    def _back_off(self, failures: int) -> float:
        longest = min(self._retry.max_seconds, self._retry.first_seconds * 2.0 ** min(failures, 30))
        return longest * (0.5 + self._chance())

    @property
    def _patience(self) -> float:
        return self._retry.give_up_hours * HOUR

    @property
    def _given_up(self) -> str:
        return f"given up after {self._retry.give_up_hours:g} h"

    def _count(self, outcome: str, by: int = 1) -> None:
        self._recorder.inc("dicom_node_deliveries_total", by, destination=self._name, outcome=outcome)

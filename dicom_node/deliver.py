"""Deliver: one stage a destination, so that a dead one never delays another. The last stage of the line.

What a status means stands in `dimse/status.py`; here it becomes a row: delivered, again later, paused, dead. A failed
association backs off the *destination*, not each object; a refusal for good pauses it: objects stay pending, one probe
goes out now and then, and everything flows by itself when the probe gets through.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pydicom

from dicom_node.config import Destination, Query, Retry
from dicom_node.dimse.query import Finder, Identity, identity_of
from dicom_node.dimse.sender import Sender, SendOutcome
from dicom_node.dimse.status import Outcome
from dicom_node.errors import QueryError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import deliveries
from dicom_node.store.deliveries import Delivery
from dicom_node.store.ledger import Ledger, add_event

NOT_AUTHORISED = (0x0124, 0x0214)
LIMITED_TRIES, LIMITED_SECONDS = 5, 86400.0
"""A status of unclear meaning: so many tries, spread over a day."""
HOUR = 3600.0
AGREED_SECONDS = 300.0
"""An identity that agreed is not asked for again so soon: the objects of one study go out together."""


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
        query: Query | None = None,
        chance: Callable[[], float] = random.random,
        on_delivered: Callable[[Delivery], None] = lambda _sent: None,
    ) -> None:
        self._ledger, self._outputs, self._name, self._to, self._retry = ledger, outputs, name, destination, retry
        self._sender = sender or Sender(calling_ae_title)
        self._query = query if destination.check_identity else None
        self._finder = None if self._query is None else Finder(self._query, calling_ae_title)
        self._log, self._recorder, self._chance = log, recorder, chance
        self._on_delivered = on_delivered
        self._failures = 0
        self._not_before = 0.0

    def run_once(self) -> bool:
        """One batch, or one probe. True = something was sent."""
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            pause = deliveries.paused(tx, self._name)
            waiting = deliveries.pending(tx, self._name, now)
        self._recorder.set("dicom_node_destination_paused", float(pause is not None), destination=self._name)
        if not waiting or now < self._not_before or (pause is not None and now < pause.probe_at):
            self._sender.close_if_idle()
            return False
        contexts = {(d.sop_class_uid, d.transfer_syntax_uid) for d in waiting}
        # One object a turn, the most urgent: a STAT study may come in while a batch is under way.
        return self._deliver(waiting[0], contexts)

    def seconds_to_next(self) -> float:
        """Until something may be sent; commits and resumptions wake the loop earlier."""
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            pause, due = deliveries.paused(tx, self._name), deliveries.next_at(tx, self._name)
        if due is None:
            return 5.0
        if pause is not None:
            due = max(due, pause.probe_at)
        return min(5.0, max(0.05, due - now, self._not_before - now))

    def close(self) -> None:
        """Release the association."""
        self._sender.close()

    def _deliver(self, one: Delivery, contexts: set[tuple[str, str]]) -> bool:
        path = self._outputs / one.file
        if not self._intact(path, one.sha256):
            self._dead(one, None, "the object's file is missing or was changed on disk")
            return True
        if self._finder is not None and not self._identity_holds(self._finder, one, path):
            return True
        started = time.monotonic()
        outcome = self._sender.send_file(self._to, path, batch=contexts)
        self._recorder.observe("dicom_node_delivery_seconds", time.monotonic() - started, destination=self._name)
        self._record(one, outcome)
        return outcome.kind is Outcome.DELIVERED

    @staticmethod
    def _intact(path: Path, sha256: str) -> bool:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except OSError:
            return False

    def _identity_holds(self, finder: Finder, one: Delivery, path: Path) -> bool:
        """May it go? False = it was held, or put off until the PACS answers; what waits behind it may go on."""
        ours = identity_of(pydicom.dcmread(path, specific_tags=["PatientID", "AccessionNumber"]))
        digest = _digest(ours)
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            if deliveries.identity_known(tx, one.study_uid, self._name, digest, now - AGREED_SECONDS):
                return True
        try:
            theirs = finder.identities(one.study_uid)
        except QueryError as e:
            self._count_check("no_answer")
            self._put_off(one, f"identity not checked: {e}")
            return False
        if theirs == {ours}:
            self._count_check("agreed")
            with self._ledger.write() as tx:
                deliveries.remember_identity(tx, one.study_uid, self._name, digest, "AGREED", now)
            return True
        if not theirs:
            self._count_check("unknown")
            if self._query is not None and one.attempts + 1 < self._query.attempts:
                self._put_off(
                    one, "identity not checked: the PACS does not know the study yet", self._query.retry_seconds
                )
                return False
        else:
            self._count_check("differs")
        with self._ledger.write() as tx:
            deliveries.hold(tx, one, digest, _difference(ours, theirs), now)
        self._log.error("delivery_held", study=self._log.uid(one.study_uid), destination=self._name)
        return False

    def _put_off(self, one: Delivery, reason: str, seconds: float | None = None) -> None:
        now = self._ledger.clock()
        if now - one.created_at > self._retry.give_up_hours * HOUR:
            self._dead(one, None, f"given up after {self._retry.give_up_hours:g} h: {reason}")
            return
        at = now + (self._back_off(one.attempts) if seconds is None else seconds)
        with self._ledger.write() as tx:
            deliveries.again(tx, one, None, reason, at)
            if one.attempts == 0:
                text = f"{one.sop_uid} to {self._name}: {reason}; tried again"
                add_event(tx, now, one.study_uid, "DELIVERY_DELAYED", text)
        self._count("retry")
        self._log.warning("not_delivered", destination=self._name, reason=reason, retry_seconds=round(at - now, 1))

    def _count_check(self, outcome: str) -> None:
        self._recorder.inc("dicom_node_identity_checks_total", destination=self._name, outcome=outcome)

    def _record(self, one: Delivery, outcome: SendOutcome) -> None:
        now = self._ledger.clock()
        if outcome.kind is Outcome.DELIVERED:
            self._delivered(one, outcome, now)
        elif outcome.kind is Outcome.DEAD:
            self._dead(one, outcome.status, outcome.reason)
        elif outcome.kind is Outcome.PAUSE:
            self._pause(one, outcome, now)
        elif outcome.kind is Outcome.LIMITED and one.attempts + 1 >= LIMITED_TRIES:
            self._dead(one, outcome.status, f"{outcome.reason}, {LIMITED_TRIES} times")
        elif now - one.created_at > self._retry.give_up_hours * HOUR:
            self._dead(one, outcome.status, f"given up after {self._retry.give_up_hours:g} h: {outcome.reason}")
        else:
            self._again(one, outcome, now)

    def _delivered(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        self._failures, self._not_before = 0, 0.0
        with self._ledger.write(wakes=()) as tx:
            deliveries.delivered(tx, one, outcome.status or 0, now, outcome.reason)
            deliveries.resume(tx, self._name, now)
            last = deliveries.last_received(tx, one.study_uid)
        said = "delivered" if not outcome.status else "duplicate" if outcome.status == 0x0111 else "warning"
        self._count(said)
        self._on_delivered(one)
        self._recorder.observe("dicom_node_stored_to_delivered_seconds", max(0.0, now - last), destination=self._name)
        self._log.info("delivered", study=self._log.uid(one.study_uid), destination=self._name, outcome=said)

    def _again(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        if outcome.kind is Outcome.LIMITED:
            at = now + LIMITED_SECONDS / (LIMITED_TRIES - 1)
        else:
            at = now + self._back_off(self._failures if outcome.connection else one.attempts)
        if outcome.connection:  # nothing else would get through either
            self._failures, self._not_before = self._failures + 1, at
        with self._ledger.write() as tx:
            deliveries.again(tx, one, outcome.status, outcome.reason, at)
            if one.attempts == 0 or self._failures == 1:
                text = f"{one.sop_uid} to {self._name}: {outcome.reason}; tried again"
                add_event(tx, now, one.study_uid, "DELIVERY_DELAYED", text)
        self._count("retry")
        self._log.warning(
            "not_delivered", destination=self._name, reason=outcome.reason, retry_seconds=round(at - now, 1)
        )

    def _back_off(self, failures: int) -> float:
        longest = min(self._retry.max_seconds, self._retry.first_seconds * 2.0 ** min(failures, 30))
        return longest * (0.5 + self._chance())

    def _pause(self, one: Delivery, outcome: SendOutcome, now: float) -> None:
        """Nobody's fault but the configuration's: the object keeps its attempts, the destination waits for a person."""
        if now - one.created_at > self._retry.give_up_hours * HOUR:
            self._dead(one, outcome.status, f"given up after {self._retry.give_up_hours:g} h: {outcome.reason}")
            return
        probe_at = now + self._retry.max_seconds
        whole = outcome.connection or outcome.status in NOT_AUTHORISED
        with self._ledger.write() as tx:
            if whole:
                deliveries.pause(tx, self._name, outcome.reason, now, probe_at)
            deliveries.again(tx, one, outcome.status, outcome.reason, now if whole else probe_at)
        self._count("paused")
        if not whole:  # this SOP Class only: an SR must not wait because captures are not taken
            self._log.error("object_not_taken", destination=self._name, reason=outcome.reason)
            return
        self._log.error("destination_paused", destination=self._name, reason=outcome.reason)

    def _dead(self, one: Delivery, status: int | None, reason: str) -> None:
        with self._ledger.write() as tx:
            deliveries.dead(tx, one, status, reason, self._ledger.clock())
        self._count("dead")
        self._log.error("delivery_dead", study=self._log.uid(one.study_uid), destination=self._name, reason=reason)

    def _count(self, outcome: str) -> None:
        self._recorder.inc("dicom_node_deliveries_total", destination=self._name, outcome=outcome)


def _digest(identity: Identity) -> str:
    """Equal for equal identities; says nothing else."""
    return hashlib.sha256(f"{identity.patient_id}\0{identity.accession_number}".encode()).hexdigest()


def _difference(ours: Identity, theirs: frozenset[Identity]) -> str:
    """Which attribute, never which value."""
    if not theirs:
        return "the PACS does not know the study"
    if len(theirs) > 1:
        return "the PACS holds the study under more than one identity"
    (other,) = theirs
    pairs = (
        ("Patient ID", ours.patient_id, other.patient_id),
        ("Accession Number", ours.accession_number, other.accession_number),
    )
    return "the PACS holds the study with another " + " and another ".join(n for n, a, b in pairs if a != b)

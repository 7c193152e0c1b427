"""Upkeep: removes what is finished and old, keeps the write-ahead log short, measures what waits."""

from __future__ import annotations

import sqlalchemy as sa

from dicom_node import __version__
from dicom_node.config import Config
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import availability, deliveries, inspect, jobs, rejections, studies
from dicom_node.store.files import Files
from dicom_node.store.ledger import Ledger
from dicom_node.store.schema import event

PERIOD = 15.0
SECONDS_A_DAY = 86400.0
EVENTS_KEPT_DAYS = 90.0
"""Events that belong to no study (rejections, pauses) are kept so long; a study's events stay."""


class Upkeep:
    """`run_once` does a bounded piece of each task."""

    def __init__(self, config: Config, ledger: Ledger, files: Files, log: Log, recorder: Recorder) -> None:
        self._config, self._ledger, self._files, self._log, self._recorder = config, ledger, files, log, recorder
        self._sweep_at = 0.0

    def run_once(self) -> bool:
        """True = there may be more to remove."""
        self._measure()
        more = self._expire()
        self._sweep()
        self._ledger.checkpoint()
        return more

    def _measure(self) -> None:
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            open_jobs, backlog, states = jobs.counts(tx), deliveries.backlog(tx), inspect.states(tx)
            dead, paused = deliveries.dead_counts(tx), deliveries.paused_names(tx)
            held, held_objects, withdrawals = jobs.held(tx), deliveries.held_counts(tx), rejections.open_withdrawals(tx)
            since = {"incomplete": jobs.held_since(tx), "patient_conflict": studies.conflict_since(tx)}
        self._recorder.set("dicom_node_build_info", 1, version=__version__)
        self._recorder.set("dicom_node_quarantine_files", self._files.count_quarantine())
        self._recorder.set("dicom_node_disk_free_bytes", self._files.free_bytes())
        self._recorder.set("dicom_node_disk_reserve_bytes", self._config.store.min_free_gb * 1e9)
        for state, count in states.items():
            self._recorder.set("dicom_node_studies", count, state=state)
        self._recorder.set("dicom_node_jobs_held", held)
        self._recorder.set("dicom_node_withdrawals_open", withdrawals)
        for why, at in since.items():
            self._recorder.set("dicom_node_oldest_held_seconds", 0.0 if at is None else max(0.0, now - at), why=why)
        for stage in ("route", "clinical", "complete", "infer", "report"):
            waiting = sum(open_jobs.get((stage, state), 0) for state in ("READY", "RUNNING"))
            self._recorder.set("dicom_node_jobs_waiting", waiting, stage=stage)
            self._recorder.set("dicom_node_jobs_dead", open_jobs.get((stage, "DEAD"), 0), stage=stage)
        for name in self._config.deliver.destinations:
            count, oldest = backlog.get(name, (0, now))
            self._recorder.set("dicom_node_delivery_queue", count, destination=name)
            self._recorder.set("dicom_node_oldest_undelivered_seconds", max(0.0, now - oldest), destination=name)
            self._recorder.set("dicom_node_deliveries_dead", dead.get(name, 0), destination=name)
            self._recorder.set("dicom_node_deliveries_held", held_objects.get(name, 0), destination=name)
            self._recorder.set("dicom_node_destination_paused", float(name in paused), destination=name)

    def _sweep(self) -> None:
        """Once a day: files of spool and outputs that a kill left without a row."""
        now = self._ledger.clock()
        if now < self._sweep_at:
            return
        self._sweep_at = now + SECONDS_A_DAY
        old = {path.name: path for path in self._files.list_made(now - SECONDS_A_DAY)}
        if not old:
            return
        with self._ledger.read() as tx:
            orphans = studies.unreferenced(tx, set(old))
        for name in orphans:
            old[name].unlink(missing_ok=True)
        if orphans:
            self._log.info("orphans_removed", files=len(orphans))

    def _expire(self, batch: int = 20) -> bool:
        """Finished studies older than keep_days. DEAD and pending ones are exempt (studies.expirable)."""
        now = self._ledger.clock()
        before = now - self._config.store.keep_days * SECONDS_A_DAY
        with self._ledger.write() as tx:
            tx.execute(
                sa.delete(event).where(event.c.study_uid.is_(None), event.c.at < now - EVENTS_KEPT_DAYS * SECONDS_A_DAY)
            )
            availability.forget(tx, before)
            found = studies.expirable(tx, before, batch)
        for uid in found:
            with self._ledger.write() as tx:
                ids, outputs, spool = studies.expire(tx, uid, now)
            self._files.remove_study(ids, outputs, spool)
            self._log.info("study_expired", study=self._log.uid(uid), instances=len(ids))
        return len(found) == batch

"""Assemble: decides when a study is complete. DICOM does not say (no message ends a study), so a timer does.

A study is complete when nothing new came for `quiet_seconds` and no association that delivered to it is still open,
at the latest `force_after_seconds` after the first instance. The timer is a row, so a restart resumes it. Stands
between the index (store/index.py) and route; writes nothing but timers and route jobs.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from dicom_node.config import Config
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import jobs, schema, studies
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.studies import DueStudy, Timing


def timing(config: Config) -> Timing:
    """The study timer runs at the shortest quiet time of any route; a route with a longer one waits in `route`."""
    quiet = [r.assemble.quiet_seconds for r in config.routes if r.assemble.quiet_seconds is not None]
    section = config.assemble
    return Timing(
        min([section.quiet_seconds, *quiet]), section.force_after_seconds, section.late, section.max_revisions
    )


class AssembleStage:
    """Fires the study timer. `open_associations` gives the ids of associations that are open at the listener now."""

    def __init__(
        self,
        ledger: Ledger,
        timing: Timing,
        open_associations: Callable[[], frozenset[str]],
        log: Log,
        recorder: Recorder,
        *,
        on_complete: Callable[[str], None] = lambda _study_uid: None,
    ) -> None:
        self._ledger, self._timing, self._open = ledger, timing, open_associations
        self._on_complete = on_complete
        self._log, self._recorder = log, recorder

    def run_once(self) -> bool:
        """Complete every study whose time has come. True = at least one was."""
        now = self._ledger.clock()
        with self._ledger.read() as tx:
            due = studies.due_studies(tx, now)
        still_open = self._open()
        fired = [s for s in due if self._complete(s, now, still_open)]
        for study in fired:
            self._fire(study, now)
        return bool(fired)

    def seconds_to_next(self) -> float:
        """Until the next timer runs out; at most a second, because associations close at any time."""
        with self._ledger.read() as tx:
            due = studies.next_due(tx)
        return 1.0 if due is None else min(1.0, max(0.02, due - self._ledger.clock()))

    def _complete(self, study: DueStudy, now: float, still_open: frozenset[str]) -> bool:
        forced = now >= study.armed_at + self._timing.force_after_seconds
        return forced or not (study.associations & still_open)

    def _fire(self, study: DueStudy, now: float) -> None:
        with self._ledger.write(wakes=(schema.Stage.ROUTE,)) as tx:
            row = tx.execute(sa.select(schema.study).where(schema.study.c.uid == study.study_uid)).mappings().one()
            if row["due_at"] is None or row["last_received"] != study.last_received or row["hold"] is not None:
                return  # an instance came in between; the timer was set anew
            revision = complete(tx, study.study_uid, now)
        self._recorder.inc("dicom_node_studies_assembled_total")
        if revision > 1:
            self._recorder.inc("dicom_node_revisions_total")
        self._on_complete(study.study_uid)
        self._log.info("study_assembled", study=self._log.uid(study.study_uid), revision=study.revision + 1)


def complete(tx: sa.Connection, study_uid: str, now: float) -> int:
    """Close the timer, open the next revision and give it to route. Returns the revision."""
    row = tx.execute(sa.select(schema.study).where(schema.study.c.uid == study_uid)).mappings().one()
    revision = int(row["revision"]) + 1
    tx.execute(
        schema.study.update()
        .where(schema.study.c.uid == study_uid)
        .values(revision=revision, due_at=None, armed_at=None)
    )
    jobs.supersede(tx, study_uid, revision, now)
    held = sa.select(sa.func.count()).where(
        schema.instance.c.study_uid == study_uid, schema.instance.c.current, ~schema.instance.c.own
    )
    add_event(tx, now, study_uid, "ASSEMBLED", f"revision {revision}: {tx.execute(held).scalar_one()} instances")
    jobs.put(
        tx,
        study_uid=study_uid,
        revision=revision,
        stage=schema.Stage.ROUTE,
        route="",
        priority=row["priority"],
        now=now,
    )
    return revision

"""The complete stage: does a study hold what its route requires (`require`), and what happens if not (`if_incomplete`)?

Stands between a route that took a study and inference, for routes that require something. Content is judged from the
headers, the clinical values that the study and the sources outside it gave and, where the route says `series_count`, by
asking the PACS how many instances the selected series have (PS3.4 C.6.2, Number of Series Related Instances). Fewer
there than here is no evidence, nor is a PACS that does not say; no answer is asked for again, a bounded number of
times. A held study is judged anew every minute. Where it lacks a value, the clinical stage goes on asking the sources
for it, so that a value that comes by another way than DICOM frees it too, until `hold_hours` are over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from dicom_node.config import Config, Query, Route
from dicom_node.errors import QueryError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.result import Refusal, RefusalCode
from dicom_node.route.follow import Follow, Known
from dicom_node.route.rules import missing_requirements, missing_values
from dicom_node.store import jobs, studies
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import Outcome, Stage
from dicom_node.study import Study

LEASE_SECONDS = 300.0
RECHECK_SECONDS = 60.0
HOUR = 3600.0
_WORDS = {"run": "run", "hold": "held", "give_up": "given_up"}


class SeriesCounter(Protocol):
    """The PACS (dimse/query.py)."""

    def series_counts(self, study_uid: str) -> Mapping[str, int | None]:
        """Series Instance UID to the number of its instances there; None = not said. Raises QueryError."""


class CompleteStage:
    """Claims complete jobs; puts infer jobs, or the answer that there will be none. `pacs` None = nobody to ask."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        path_of: Callable[[str], Path],
        clinical: Known,
        pacs: SeriesCounter | None,
        log: Log,
        recorder: Recorder,
        *,
        asks: Callable[[str], bool] = lambda _engine: False,
    ) -> None:
        self._routes = {route.name: route for route in config.routes}
        self._query: Query | None = config.query
        self._phases = config.phases
        self._ledger, self._path_of, self._clinical, self._pacs = ledger, path_of, clinical, pacs
        self._asks = asks
        self._log, self._recorder, self._follows = log, recorder, Follow(recorder)

    def run_once(self) -> bool:
        """One route of one study. True = there was one."""
        with self._ledger.write(wakes=()) as tx:
            job = jobs.claim(tx, Stage.COMPLETE, self._ledger.clock(), LEASE_SECONDS)
        if job is None:
            return False
        route = self._routes.get(job.route)
        if route is None:
            with self._ledger.write() as tx:
                text = "this route is no longer in config.yaml"
                jobs.finish(tx, job, Ending(Outcome.REFUSED, RefusalCode.NO_ROUTE, text), self._ledger.clock())
            return True
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._path_of)
        series = job.payload.get("series", [])
        clinical = self._clinical(study, [r.engine for r in self._routes.values()], job.payload.get("clinical"))
        missing = missing_requirements(route.require, study, clinical, series, self._phases)
        if route.require.series_count and not missing and not job.payload.get("incomplete_accepted"):
            lacking, sure = self._fewer_than_the_pacs(study, series)
            if lacking and self._asked_again(job, lacking, sure=sure):
                return True
            missing = lacking
        self._decide(job, route, missing, missing_values(route.require, clinical))
        return True

    def _fewer_than_the_pacs(self, study: Study, series: list[str]) -> tuple[list[str], bool]:
        """What the PACS has and we do not, in words; and whether it said so itself."""
        if self._pacs is None:
            return [], True
        try:
            there = self._pacs.series_counts(study.study_instance_uid)
        except QueryError as e:
            return [f"series_count ({e})"], False
        lacking = []
        for one in study.series:
            count = there.get(one.series_instance_uid)
            here = len({i.sop_instance_uid for i in one.instances})
            if one.series_instance_uid in series and count is not None and count > here:
                lacking.append(f"series_count (a {one.modality} series has {count} instances in the PACS, {here} here)")
        return lacking, True

    def _asked_again(self, job: Job, lacking: list[str], *, sure: bool) -> bool:
        """Instances may still be on their way, and a PACS may be busy: ask again before it counts."""
        asked = int(job.payload.get("asked", 0)) + 1
        if self._query is None or asked >= self._query.attempts:
            return False
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            payload = job.payload | {"asked": asked}
            text = f"{'; '.join(lacking)}: asked again, {asked} of {self._query.attempts}"
            if jobs.wait(tx, job, until=now + self._query.retry_seconds, payload=payload, detail=text):
                add_event(tx, now, job.study_uid, "COUNT_DIFFERS" if sure else "COUNT_UNKNOWN", f"{job.route}: {text}")
        return True

    def _decide(self, job: Job, route: Route, missing: list[str], values: list[str]) -> None:
        now = self._ledger.clock()
        accepted = bool(job.payload.get("incomplete_accepted"))
        if not missing or accepted or route.if_incomplete == "run":
            self._go_on(job, route, missing, now, by_order=accepted)
        elif route.if_incomplete == "hold" and now < self._held_until(job, route, now):
            self._hold(job, route, missing, values, now)
        else:
            self._give_up(job, route, missing, now)

    def _go_on(self, job: Job, route: Route, missing: list[str], now: float, *, by_order: bool) -> None:
        with self._ledger.write() as tx:
            if not jobs.finish(tx, job, Ending(Outcome.ROUTED, detail="; ".join(missing)), now):
                return
            jobs.stop_looking(tx, job.study_uid, job.revision, route.name, now)
            self._follows.infer(tx, job, route, missing, job.priority, now)
            if missing:
                why = "an operator said so" if by_order else "if_incomplete: run"
                text = f"{route.name}: goes on without {', '.join(missing)} ({why})"
                add_event(tx, now, job.study_uid, "RUN_INCOMPLETE", text)
        if missing:
            self._count(route, "run")

    def _held_until(self, job: Job, route: Route, now: float) -> float:
        return float(job.payload.get("held_since", now)) + route.hold_hours * HOUR

    def _hold(self, job: Job, route: Route, missing: list[str], values: list[str], now: float) -> None:
        first = "held_since" not in job.payload
        payload: dict[str, Any] = job.payload | {"held_since": job.payload.get("held_since", now)}
        until = min(now + RECHECK_SECONDS, self._held_until(job, route, now))
        said = ", ".join(missing)
        with self._ledger.write() as tx:
            if not jobs.wait(tx, job, until=until, payload=payload, code=jobs.HELD, detail=f"missing: {said}"):
                return
            if values and self._asks(route.engine):
                self._look_for(tx, job, route, now)
            if first:
                text = (
                    f"{route.name}: held for at most {route.hold_hours:g} h, missing: {said} "
                    "(more instances, or dicom-node complete, let it go on)"
                )
                add_event(tx, now, job.study_uid, "HELD_INCOMPLETE", text)
        if first:
            self._count(route, "hold")
            self._log.warning("held_incomplete", study=self._log.uid(job.study_uid), route=route.name)

    def _look_for(self, tx: sa.Connection, job: Job, route: Route, now: float) -> None:
        """Have the sources asked for what is missing while the study is held; one job a route, put once."""
        payload = {"engines": [route.engine], "required": list(route.require.clinical)}
        until = now + RECHECK_SECONDS
        jobs.put_next(tx, job, Stage.CLINICAL, payload, now, priority=jobs.BEHIND, run_at=until)

    def _give_up(self, job: Job, route: Route, missing: list[str], now: float) -> None:
        waited = f", held for {route.hold_hours:g} h" if "held_since" in job.payload else ""
        refusal = Refusal(RefusalCode.INCOMPLETE, f"missing: {', '.join(missing)}{waited}")
        with self._ledger.write() as tx:
            if not jobs.finish(tx, job, Ending(Outcome.ROUTED, refusal.code, refusal.detail), now):
                return
            jobs.stop_looking(tx, job.study_uid, job.revision, route.name, now)
            self._follows.refuse(tx, job, route, refusal, job.payload.get("series", []), job.priority, now)
            add_event(tx, now, job.study_uid, "GIVEN_UP_INCOMPLETE", f"{route.name}: no result, {refusal.detail}")
        self._count(route, "give_up")
        self._log.warning("given_up_incomplete", study=self._log.uid(job.study_uid), route=route.name)

    def _count(self, route: Route, decision: str) -> None:
        self._recorder.inc("dicom_node_incomplete_total", route=route.name, decision=_WORDS[decision])

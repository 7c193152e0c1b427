"""The route stage: judges each route on its own; commits its verdicts together with the jobs that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from dicom_node.config import Config, Require, Route
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.route import Verdict, body_part, contrast, evaluate_all, say_rejected, select_priority, unrouted_code
from dicom_node.route.follow import Follow, Known, handed_on
from dicom_node.store import jobs, rejections, studies
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import Outcome, Stage
from dicom_node.study import Study

LEASE_SECONDS = 300.0


class RouteStage:
    """Claims route jobs; puts complete or infer jobs, or the answer that there will be none."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        path_of: Callable[[str], Path],
        clinical: Known,
        log: Log,
        recorder: Recorder,
        *,
        asks: Callable[[str], bool] = lambda _engine: False,
    ) -> None:
        self._config, self._ledger, self._path_of, self._log, self._recorder = config, ledger, path_of, log, recorder
        self._routes = {route.name: route for route in config.routes}
        self._clinical, self._asks, self._follows = clinical, asks, Follow(recorder)
        self._loaded = False

    def run_once(self) -> bool:
        """One study. True = there was one."""
        if not self._loaded:  # in this stage's own thread, while the node listens already
            _preload()
            self._loaded = True
        with self._ledger.write(wakes=()) as tx:
            job = jobs.claim(tx, Stage.ROUTE, self._ledger.clock(), LEASE_SECONDS)
        if job is None:
            return False
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._path_of)
            rejected = rejections.rejected(tx, job.study_uid)
            whole = study
            if rejected:
                whole = studies.load_study(tx, job.study_uid, job.revision, self._path_of, with_rejected=True)
        gathered = job.payload.get("clinical")
        clinical = self._clinical(study, [route.engine for route in self._config.routes], gathered)
        verdicts = evaluate_all(self._config.routes, study, clinical)
        if gathered is None and not job.payload.get("incomplete_accepted") and self._gather(job, verdicts):
            return True
        if rejected:
            verdicts = say_rejected(verdicts, evaluate_all(self._config.routes, whole, clinical), rejected)
        taken = [v for v in verdicts if v.matched and v.refusal is None]
        ending = self._ending(verdicts)
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            if not jobs.finish(tx, job, ending, now):
                return True  # a newer revision took over
            for verdict in verdicts:
                self._follow(tx, job, whole, verdict, now)
            self._tell(tx, job, verdicts, ending, now)
        self._recorder.inc("dicom_node_jobs_total", stage="route", outcome=str(ending.outcome), route="")
        if ending.outcome is Outcome.UNROUTED:
            self._recorder.inc("dicom_node_refusals_total", route="", code=ending.code)
        routes = ",".join(v.route for v in taken)
        self._log.info("routed", study=self._log.uid(job.study_uid), job=job.id, outcome=ending.outcome, routes=routes)
        return True

    def _gather(self, job: Job, verdicts: tuple[Verdict, ...]) -> bool:
        """Have sources outside the study asked first, for the routes that took it: nobody else is asked for a patient.

        A route that only its indication keeps from the study takes part where a clinical value may establish that; one
        that only rejected images would have matched does not.
        """
        routes = [self._routes[v.route] for v in verdicts if v.matched and (v.refusal is None or self._by_value(v))]
        asking = [route for route in routes if self._asks(route.engine)]
        if not asking:
            return False
        payload = {
            "engines": sorted({route.engine for route in asking}),
            "required": sorted({name for route in asking for name in route.require.clinical}),
        }
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            if jobs.wait(tx, job, until=jobs.PARKED, payload=job.payload):
                jobs.put_next(tx, job, Stage.CLINICAL, payload, now)
        return True

    def _by_value(self, verdict: Verdict) -> bool:
        indication = self._routes[verdict.route].indication
        return any("clinical" in matcher for matcher in (*indication.any, *indication.all))

    def _ending(self, verdicts: tuple[Verdict, ...]) -> Ending:
        output = {"verdicts": [v.to_json() for v in verdicts]}
        if any(v.matched for v in verdicts):
            return Ending(Outcome.ROUTED, output=output)
        code = unrouted_code(verdicts)
        return Ending(Outcome.UNROUTED, code, code.sentence, output=output)

    def _follow(
        self,
        tx: sa.Connection,
        job: Job,
        study: Study,
        verdict: Verdict,
        now: float,
    ) -> None:
        """What comes next for a route that took the study: is it complete, inference, or the answer already."""
        if not verdict.matched:
            return
        route = self._routes[verdict.route]
        priority = max(job.priority, select_priority(route, study, self._config.receive.priority_ae))
        if verdict.refusal is not None:
            self._follows.refuse(tx, job, route, verdict.refusal, verdict.series, priority, now)
            return
        stage = Stage.COMPLETE if route.require != Require() else Stage.INFER
        payload = {"series": list(verdict.series)} | handed_on(job)
        run_at = self._run_at(route, study, now)
        jobs.put_next(tx, job, stage, payload, now, route=route.name, priority=priority, run_at=run_at)

    def _run_at(self, route: Route, study: Study, now: float) -> float:
        """A route may want a longer quiet time than the study timer: its job waits; a late instance supersedes it."""
        quiet = route.assemble.quiet_seconds
        if quiet is None:
            quiet = self._config.assemble.quiet_seconds
        last = max(i.received_at for i in study.instances)
        cap = min(i.received_at for i in study.instances) + self._config.assemble.force_after_seconds
        return max(now, min(last + quiet, cap))

    def _tell(self, tx: sa.Connection, job: Job, verdicts: tuple[Verdict, ...], ending: Ending, now: float) -> None:
        if ending.outcome is Outcome.UNROUTED:
            add_event(tx, now, job.study_uid, "UNROUTED", f"{ending.code}: {ending.detail}")
        for verdict in verdicts:
            if verdict.matched:
                said = "taken" if verdict.refusal is None else f"refused, {verdict.refusal}"
                add_event(tx, now, job.study_uid, "ROUTED", f"{verdict.route}: {said}")


def _preload() -> None:
    """Pay imports and tables now, so that the first study of the day is routed as fast as the others."""
    from dicom_node.pixels import dynamic, roi

    _: tuple[object, ...] = (dynamic, roi)
    body_part.load_tables()
    contrast.load_tables()

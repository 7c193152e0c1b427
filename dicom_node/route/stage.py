"""The route stage: judges each route on its own; commits its verdicts together with the jobs that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicom_node.config import Config, Route
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.result import ClinicalInput, Refusal, RefusalCode
from dicom_node.route import Verdict, evaluate_all, missing_requirements, select_priority, unrouted_code
from dicom_node.store import jobs, studies
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import Outcome, Stage
from dicom_node.study import Study

LEASE_SECONDS = 300.0
Known = Callable[[Study, Iterable[str], Mapping[str, Any] | None], Mapping[str, ClinicalInput]]
"""Clinical values by name: of a study, for engines, with what sources outside it said."""


class RouteStage:
    """Claims route jobs; puts infer jobs, or the answer that there will be none."""

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
        self._clinical, self._asks = clinical, asks

    def run_once(self) -> bool:
        """One study. True = there was one."""
        with self._ledger.write() as tx:
            job = jobs.claim(tx, Stage.ROUTE, self._ledger.clock(), LEASE_SECONDS)
        if job is None:
            return False
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._path_of)
        gathered = job.payload.get("clinical")
        clinical = self._clinical(study, [route.engine for route in self._config.routes], gathered)
        verdicts = evaluate_all(self._config.routes, study, clinical)
        if gathered is None and not job.payload.get("incomplete_accepted") and self._gather(job, verdicts):
            return True
        taken = [v for v in verdicts if v.matched and v.refusal is None]
        ending = self._ending(verdicts)
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            if not jobs.finish(tx, job, ending, now):
                return True  # a newer revision took over
            for verdict in verdicts:
                self._follow(tx, job, study, clinical, verdict, now)
            self._tell(tx, job, verdicts, ending, now)
        self._recorder.inc("dicom_node_jobs_total", stage="route", outcome=str(ending.outcome), route="")
        if ending.outcome is Outcome.UNROUTED:
            self._recorder.inc("dicom_node_refusals_total", route="", code=ending.code)
        routes = ",".join(v.route for v in taken)
        self._log.info("routed", study=self._log.uid(job.study_uid), job=job.id, outcome=ending.outcome, routes=routes)
        return True

    def _gather(self, job: Job, verdicts: tuple[Verdict, ...]) -> bool:
        """Have sources outside the study asked first, for the routes that took it: nobody else is asked for a patient.

        A route that only its indication keeps from the study takes part where a clinical value may establish that.
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
            if jobs.postpone(tx, job, jobs.HELD, job.payload):
                jobs.put(
                    tx,
                    study_uid=job.study_uid,
                    revision=job.revision,
                    stage=Stage.CLINICAL,
                    route="",
                    priority=job.priority,
                    now=now,
                    payload=payload,
                )
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
        clinical: Mapping[str, ClinicalInput],
        verdict: Verdict,
        now: float,
    ) -> None:
        """The infer job of a route that took the study; a DONE one when the answer is a refusal already."""
        if not verdict.matched:
            return
        route = self._routes[verdict.route]
        priority = max(job.priority, select_priority(route, study, self._config.receive.priority_ae))
        refusal, run_at = verdict.refusal, self._run_at(route, study, now)
        if refusal is None and not job.payload.get("incomplete_accepted"):
            missing = missing_requirements(route.require, study, clinical, verdict.series)
            if missing and route.if_incomplete == "give_up":
                refusal = Refusal(RefusalCode.INCOMPLETE, "missing: " + ", ".join(missing))
            elif missing and route.if_incomplete == "hold":
                run_at = jobs.HELD
                text = f"{route.name}: held, missing: {', '.join(missing)} (dicom-node complete lets it go on)"
                add_event(tx, now, job.study_uid, "HELD_INCOMPLETE", text)
        payload: dict[str, object] = {"series": list(verdict.series)}
        if (gathered := job.payload.get("clinical")) is not None:
            payload["clinical"] = gathered  # inference sees what routing saw
        if refusal is None:
            self._put(tx, job, Stage.INFER, route, priority, now, run_at=run_at, payload=payload)
            return
        ending = Ending(Outcome.REFUSED, refusal.code, refusal.detail, engine=route.engine)
        self._put(tx, job, Stage.INFER, route, priority, now, payload=payload, ending=ending)
        self._recorder.inc("dicom_node_refusals_total", route=route.name, code=str(refusal.code))
        if route.not_assessable == "sr" and route.mode == "live":
            report = {
                "refusal": {"code": str(refusal.code), "detail": refusal.detail},
                "destinations": list(route.deliver),
                "series": list(verdict.series),
                "created_at": now,
                "engine": route.engine,
            }
            self._put(tx, job, Stage.REPORT, route, priority, now, payload=report)

    def _run_at(self, route: Route, study: Study, now: float) -> float:
        """A route may want a longer quiet time than the study timer: its job waits; a late instance supersedes it."""
        quiet = route.assemble.quiet_seconds
        if quiet is None:
            quiet = self._config.assemble.quiet_seconds
        last = max(i.received_at for i in study.instances)
        cap = min(i.received_at for i in study.instances) + self._config.assemble.force_after_seconds
        return max(now, min(last + quiet, cap))

    def _put(
        self,
        tx: sa.Connection,
        job: Job,
        stage: Stage,
        route: Route,
        priority: int,
        now: float,
        *,
        run_at: float | None = None,
        payload: Mapping[str, object],
        ending: Ending | None = None,
    ) -> None:
        jobs.put(
            tx,
            study_uid=job.study_uid,
            revision=job.revision,
            stage=stage,
            route=route.name,
            priority=priority,
            now=now,
            run_at=run_at,
            payload=dict(payload),
            ending=ending,
        )

    def _tell(self, tx: sa.Connection, job: Job, verdicts: tuple[Verdict, ...], ending: Ending, now: float) -> None:
        if ending.outcome is Outcome.UNROUTED:
            add_event(tx, now, job.study_uid, "UNROUTED", f"{ending.code}: {ending.detail}")
        for verdict in verdicts:
            if verdict.matched:
                said = "taken" if verdict.refusal is None else f"refused, {verdict.refusal}"
                add_event(tx, now, job.study_uid, "ROUTED", f"{verdict.route}: {said}")

"""Infer: hands a routed study to the engine worker and records the answer. Bookkeeping only: no pixels, no numpy.

A refusal is an answer (DONE/REFUSED); a crash, a hang or an out-of-memory of the worker is a fault and costs one
attempt. The demonstration rule is applied here, where no route and no engine can get round it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from dicom_node.clinical import Collected
from dicom_node.config import Config, Destination, Route
from dicom_node.errors import NodeStoppingError, WorkerError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.result import ClinicalInput, Refusal, RefusalCode, Result, result_from_json
from dicom_node.store import jobs, studies
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import JobState, Outcome, Stage
from dicom_node.study import Study


class Reply(Protocol):
    """What came back from the worker for one job."""

    @property
    def outcome(self) -> str:
        """RESULT | REFUSED | UNCHANGED | FAULT."""

    @property
    def result(self) -> Mapping[str, Any] | None: ...
    @property
    def refusal(self) -> Mapping[str, Any] | None: ...
    @property
    def package(self) -> Mapping[str, Any]: ...
    @property
    def error(self) -> str: ...
    @property
    def input_digest(self) -> str: ...


WORKER_START_SECONDS = 180.0
"""A job may have to wait for a worker that loads its engines first; the lease covers that too."""
Predict = Callable[[Job, Route, Study, str | None, tuple[ClinicalInput, ...]], Reply]
"""Run one job in a worker. Raises WorkerError on crash, hang, out-of-memory."""


class InferStage:
    """One instance a worker."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        path_of: Callable[[str], Path],
        predict: Predict,
        clinical: Callable[[Study, str, Mapping[str, Any] | None], Collected],
        log: Log,
        recorder: Recorder,
    ) -> None:
        self._routes = {route.name: route for route in config.routes}
        self._destinations = config.deliver.destinations
        self._config, self._ledger, self._path_of, self._predict = config.infer, ledger, path_of, predict
        self._clinical, self._log, self._recorder = clinical, log, recorder

    def run_once(self) -> bool:
        """One job. True = there was one."""
        lease = self._config.timeout_seconds + WORKER_START_SECONDS
        with self._ledger.write(wakes=()) as tx:
            job = jobs.claim(tx, Stage.INFER, self._ledger.clock(), lease)
        if job is None:
            return False
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._path_of)
            previous = jobs.last_answer(tx, job.study_uid, job.route, job.revision)
        route = self._routes.get(job.route)
        if route is None:
            self._end(job, Ending(Outcome.REFUSED, RefusalCode.NO_ROUTE, "this route is no longer in config.yaml"))
            return True
        started = time.monotonic()
        known = self._clinical(study, route.engine, job.payload.get("clinical"))
        try:
            reply = self._predict(job, route, study, previous, tuple(known.values.values()))
        except NodeStoppingError:
            return False  # the attempt is taken back at the next start
        except WorkerError as e:
            self._fault(job, str(e))
            return True
        self._recorder.observe("dicom_node_job_seconds", time.monotonic() - started, stage="infer")
        self._record(job, route, reply, known.problems)
        return True

    def _record(self, job: Job, route: Route, reply: Reply, problems: tuple[str, ...]) -> None:
        about: dict[str, Any] = {
            "engine": route.engine,
            "package": str(reply.package.get("version", "")),
            "digest": str(reply.package.get("digest", "")),
            "input_digest": reply.input_digest,
        }
        if reply.outcome == "FAULT":
            self._fault(job, reply.error)
        elif reply.outcome == "UNCHANGED":
            text = "the selected input is that of an earlier revision: its result stands"
            self._end(job, Ending(Outcome.RESULT, "UNCHANGED", text, **about))
        elif reply.outcome == "REFUSED" and reply.refusal is not None:
            refusal = Refusal(RefusalCode(reply.refusal["code"]), str(reply.refusal.get("detail", "")))
            self._refuse(job, route, refusal, about, dict(reply.package))
        elif reply.result is not None:
            result = _with_problems(result_from_json(dict(reply.result)), problems)
            self._result(job, route, _with_gaps(result, job.payload.get("incomplete", [])), about)
        else:
            self._fault(job, f"the worker answered {reply.outcome} without a body")

    def _refuse(self, job: Job, route: Route, refusal: Refusal, about: dict[str, Any], package: dict[str, Any]) -> None:
        report = None
        if route.not_assessable == "sr" and route.mode == "live":
            report = {
                "refusal": {"code": str(refusal.code), "detail": refusal.detail},
                "destinations": list(route.deliver),
                "series": job.payload.get("series", []),
                "package": package,
            }
        self._end(job, Ending(Outcome.REFUSED, refusal.code, refusal.detail, **about), report=report)

    def _result(self, job: Job, route: Route, result: Result, about: dict[str, Any]) -> None:
        output = result.to_json()
        for finding in result.findings:
            # The one that was judged: an image's own score, of another distribution, would blur the drift it is for.
            self._recorder.observe("dicom_node_probability", finding.scores[0].probability, route=route.name)
        if route.mode == "shadow":
            self._recorder.inc("dicom_node_shadow_results_total", route=route.name)
            self._end(
                job, Ending(Outcome.SHADOW, "ROUTE_SHADOW", "this route runs in shadow mode", output=output, **about)
            )
            return
        allowed = _may_receive(result, {n: self._destinations[n] for n in route.deliver})
        withheld = sorted(set(route.deliver) - set(allowed))
        if withheld:
            self._recorder.inc("dicom_node_demonstration_withheld_total", len(withheld), route=route.name)
        if withheld and not allowed:
            names = ", ".join(withheld)
            text = f"weights for demonstration only; {names} is neither loopback nor has accept_demonstration: true"
            ending = Ending(Outcome.SHADOW, "DEMONSTRATION_PACKAGE", text, output=output, **about)
            self._end(job, ending)
            return
        report = {"result": output, "destinations": allowed}
        detail = f"withheld from {', '.join(withheld)} (demonstration package)" if withheld else ""
        self._end(job, Ending(Outcome.RESULT, detail=detail, output=output, **about), report=report)

    def _end(self, job: Job, ending: Ending, *, report: dict[str, Any] | None = None) -> None:
        now = self._ledger.clock()
        with self._ledger.write(wakes=(Stage.REPORT,)) as tx:
            if not jobs.finish(tx, job, ending, now):
                return  # a newer revision fenced this run out
            self._tell(tx, job, ending, now)
            if report is not None:
                payload = report | {"created_at": now, "engine": ending.engine}
                jobs.put_next(tx, job, Stage.REPORT, payload, now)
        self._recorder.inc("dicom_node_jobs_total", stage="infer", outcome=str(ending.outcome), route=job.route)
        if ending.outcome is Outcome.REFUSED:
            self._recorder.inc("dicom_node_refusals_total", route=job.route, code=ending.code)
        self._log.info(
            "inferred",
            study=self._log.uid(job.study_uid),
            job=job.id,
            route=job.route,
            outcome=ending.outcome,
            code=ending.code,
        )

    def _tell(self, tx: sa.Connection, job: Job, ending: Ending, now: float) -> None:
        said = f"{job.route}: {ending.outcome}" + (f"({ending.code})" if ending.code else "")
        add_event(tx, now, job.study_uid, "INFERRED", said + (f": {ending.detail}" if ending.detail else ""))

    def _fault(self, job: Job, text: str) -> None:
        with self._ledger.write() as tx:
            state = jobs.fail(
                tx,
                job,
                text,
                self._ledger.clock(),
                max_attempts=self._config.max_attempts,
                retry_seconds=2.0**job.attempts,
            )
        self._recorder.inc("dicom_node_job_failures_total", stage="infer")
        self._log.warning("infer_failed", study=self._log.uid(job.study_uid), job=job.id, state=state, error=text)
        if state is JobState.DEAD:
            self._recorder.inc("dicom_node_jobs_total", stage="infer", outcome="DEAD", route=job.route)


def _with_problems(result: Result, problems: tuple[str, ...]) -> Result:
    """What was there and could not be used stands in the report, beside what was used."""
    if not problems:
        return result
    parameters = result.provenance.parameters | {"clinical values not used": "; ".join(problems)}
    return replace(result, provenance=replace(result.provenance, parameters=parameters))


def _with_gaps(result: Result, missing: list[str]) -> Result:
    """What the route requires and the study lacked stands in the report: its reader must know."""
    if not missing:
        return result
    parameters = result.provenance.parameters | {"required and missing": "; ".join(missing)}
    return replace(result, provenance=replace(result.provenance, parameters=parameters))


def _may_receive(result: Result, destinations: Mapping[str, Destination]) -> list[str]:
    """Demonstration results leave the machine only where the operator has agreed in writing."""
    if result.provenance.intended_use != "demonstration":
        return list(destinations)
    return [name for name, destination in destinations.items() if destination.takes_demonstration]

"""What follows a route's judgement, in the transaction that ends it: inference, or the answer that there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from dicom_node.config import Route
from dicom_node.metrics import Recorder
from dicom_node.result import ClinicalInput, Refusal
from dicom_node.store import jobs
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.schema import Outcome, Stage
from dicom_node.study import Study

Known = Callable[[Study, Iterable[str], Mapping[str, Any] | None], Mapping[str, ClinicalInput]]
"""Clinical values by name: of a study, for engines, with what sources outside it said."""
GOES_ON = ("clinical", "incomplete_accepted")
"""What a job hands to the next: values gathered outside, so that all see the same, and an operator's word."""


def handed_on(job: Job) -> dict[str, Any]:
    """The part of a job's payload that belongs to the next job too."""
    return {key: job.payload[key] for key in GOES_ON if key in job.payload}


class Follow:
    """Shared by the two stages of this package, so that a refusal looks the same whoever gives it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def infer(
        self, tx: sa.Connection, job: Job, route: Route, missing: Iterable[str], priority: int, now: float
    ) -> None:
        """The engine's turn. `missing`: what the route requires and the study lacks all the same."""
        payload = {"series": job.payload.get("series", [])} | handed_on(job)
        if gaps := list(missing):
            payload["incomplete"] = gaps
        jobs.put_next(tx, job, Stage.INFER, payload, now, route=route.name, priority=priority)

    def refuse(
        self,
        tx: sa.Connection,
        job: Job,
        route: Route,
        refusal: Refusal,
        series: Iterable[str],
        priority: int,
        now: float,
    ) -> None:
        """An infer job that is answered already, and the SR "not assessable" where the route asks for one."""
        looked_at = list(series)
        ending = Ending(Outcome.REFUSED, refusal.code, refusal.detail, engine=route.engine)
        payload: dict[str, Any] = {"series": looked_at}
        jobs.put_next(tx, job, Stage.INFER, payload, now, route=route.name, priority=priority, ending=ending)
        self._recorder.inc("dicom_node_refusals_total", route=route.name, code=str(refusal.code))
        if route.not_assessable != "sr" or route.mode != "live":
            return
        payload |= {
            "refusal": {"code": str(refusal.code), "detail": refusal.detail},
            "destinations": list(route.deliver),
            "created_at": now,
            "engine": route.engine,
        }
        jobs.put_next(tx, job, Stage.REPORT, payload, now, route=route.name, priority=priority)

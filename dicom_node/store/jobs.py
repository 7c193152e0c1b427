"""Queries on jobs: put, claim under a lease, end fenced, retry. Each takes an open transaction.

Execution is at least once; a completion counts only while the claim's fence still holds, so a job that lost its lease,
or whose study got a newer revision, changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from dicom_node.store.ledger import add_event
from dicom_node.store.schema import JobState, Outcome, Stage, job, study

AGEING_SECONDS = 300.0
"""A job that has waited so long counts one priority more, so that routine studies do not starve behind STAT ones."""
MAX_SILENT = 5
"""Attempts after which a job that never answers is DEAD."""
PARKED = 1e12
"""run_at of a route job that waits for the clinical stage to gather values (`hand_over`), however long that takes."""
HELD = "HELD_INCOMPLETE"
"""Code of a complete job that waits for more instances, values or an operator (route option if_incomplete: hold)."""
BEHIND = -1_000_000
"""Priority of what is done for studies that were answered for the time being: after everything that waits anew."""


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job."""

    id: int
    study_uid: str
    revision: int
    stage: str
    route: str
    attempts: int
    fence: int
    priority: int
    created_at: float
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended."""

    outcome: Outcome
    code: str = ""
    detail: str = ""
    engine: str = ""
    package: str = ""
    digest: str = ""
    input_digest: str = ""
    output: dict[str, Any] | None = None


def put(
    tx: sa.Connection,
    *,
    study_uid: str,
    revision: int,
    stage: Stage,
    route: str,
    priority: int,
    now: float,
    run_at: float | None = None,
    payload: dict[str, Any] | None = None,
    ending: Ending | None = None,
) -> None:
    """A job for the next stage; with `ending`, one that is answered already. Putting it twice changes nothing."""
    values: dict[str, Any] = {
        "study_uid": study_uid,
        "revision": revision,
        "stage": stage,
        "route": route,
        "priority": priority,
        "created_at": now,
        "run_at": now if run_at is None else run_at,
        "attempts": 0,
        "fence": 0,
        "state": JobState.READY,
        "payload": _dumps(payload or {}),
    }
    if ending is not None:
        values |= {"state": JobState.DONE, "done_at": now} | _ending(ending)
    same = sa.select(job.c.id).where(
        job.c.study_uid == study_uid, job.c.revision == revision, job.c.stage == stage, job.c.route == route
    )
    if tx.execute(same).first() is None:
        tx.execute(job.insert().values(**values))


def put_next(
    tx: sa.Connection,
    after: Job,
    stage: Stage,
    payload: dict[str, Any],
    now: float,
    *,
    route: str | None = None,
    priority: int | None = None,
    run_at: float | None = None,
    ending: Ending | None = None,
) -> None:
    """`put` for the study and revision of the job `after`; of its route and priority, unless told otherwise."""
    put(
        tx,
        study_uid=after.study_uid,
        revision=after.revision,
        stage=stage,
        route=after.route if route is None else route,
        priority=after.priority if priority is None else priority,
        now=now,
        run_at=run_at,
        payload=payload,
        ending=ending,
    )


def claim(tx: sa.Connection, stage: Stage, now: float, lease_seconds: float) -> Job | None:
    """The most urgent job that may run: READY and due, or with a lease that ran out; none of a held study."""
    open_ = job.c.state.in_((JobState.READY, JobState.RUNNING))
    if tx.execute(sa.select(job.c.id).where(job.c.stage == stage, open_).limit(1)).first() is None:
        return None  # every stage asks every second: a node at rest must not pay for what a claim takes
    _bury(tx, stage, now)
    due = sa.or_(
        sa.and_(job.c.state == JobState.READY, job.c.run_at <= now),
        sa.and_(job.c.state == JobState.RUNNING, job.c.lease < now),
    )
    held = sa.exists().where(study.c.uid == job.c.study_uid, study.c.hold.is_not(None))
    urgency = job.c.priority + (now - job.c.created_at) / AGEING_SECONDS
    pick = sa.select(job.c.id).where(job.c.stage == stage, due, ~held).order_by(urgency.desc(), job.c.id).limit(1)
    row = (
        tx.execute(
            job.update()
            .where(job.c.id == pick.scalar_subquery())
            .values(
                state=JobState.RUNNING, lease=now + lease_seconds, fence=job.c.fence + 1, attempts=job.c.attempts + 1
            )
            .returning(job)
        )
        .mappings()
        .first()
    )
    return (
        None
        if row is None
        else Job(
            row["id"],
            row["study_uid"],
            row["revision"],
            row["stage"],
            row["route"],
            row["attempts"],
            row["fence"],
            row["priority"],
            row["created_at"],
            json.loads(row["payload"]),
        )
    )


def _bury(tx: sa.Connection, stage: Stage, now: float) -> None:
    """A job whose attempts keep ending without a word (a defect of ours) must not come back for ever."""
    tx.execute(
        job.update()
        .where(job.c.stage == stage, job.c.state == JobState.RUNNING, job.c.lease < now, job.c.attempts >= MAX_SILENT)
        .values(
            state=JobState.DEAD, lease=None, done_at=now, code="FAULT", detail="every attempt ended without an answer"
        )
    )


def _mine(claimed: Job) -> sa.ColumnElement[bool]:
    return sa.and_(job.c.id == claimed.id, job.c.fence == claimed.fence, job.c.state == JobState.RUNNING)


def finish(tx: sa.Connection, claimed: Job, ending: Ending, now: float) -> bool:
    """End a job. False = the fence moved on: the caller must change nothing else in this transaction."""
    done = tx.execute(
        job.update().where(_mine(claimed)).values(state=JobState.DONE, done_at=now, lease=None, **_ending(ending))
    )
    return bool(done.rowcount == 1)


def fail(
    tx: sa.Connection, claimed: Job, text: str, now: float, *, max_attempts: int, retry_seconds: float
) -> JobState:
    """One attempt lost. READY again after a while, or DEAD. `text` is free of PHI."""
    dead = claimed.attempts >= max_attempts
    state = JobState.DEAD if dead else JobState.READY
    changed = tx.execute(
        job.update()
        .where(_mine(claimed))
        .values(
            state=state,
            lease=None,
            run_at=now + retry_seconds,
            detail=text,
            code="FAULT",
            done_at=now if dead else None,
        )
    )
    if changed.rowcount == 1:
        add_event(
            tx,
            now,
            claimed.study_uid,
            "JOB_DEAD" if dead else "JOB_FAILED",
            f"{claimed.stage} {claimed.route}: attempt {claimed.attempts} of {max_attempts}: {text}",
        )
    return state


def wait(
    tx: sa.Connection, claimed: Job, *, until: float, payload: dict[str, Any], code: str = "", detail: str = ""
) -> bool:
    """Not now: READY again at `until`, no attempt lost. `code` and `detail` stand in `explain` meanwhile."""
    done = tx.execute(
        job.update()
        .where(_mine(claimed))
        .values(
            state=JobState.READY,
            lease=None,
            run_at=until,
            attempts=0,
            payload=_dumps(payload),
            code=code or None,
            detail=detail,
        )
    )
    return bool(done.rowcount == 1)


def _waits_for(asking: Job) -> sa.ColumnElement[bool]:
    """The job that a job of the clinical stage gathers for: the study's parked route job, or its route's held one."""
    of_it = (job.c.study_uid == asking.study_uid, job.c.revision == asking.revision)
    if asking.route:
        open_ = job.c.state.in_([JobState.READY, JobState.RUNNING])
        return sa.and_(*of_it, job.c.stage == Stage.COMPLETE, job.c.route == asking.route, job.c.code == HELD, open_)
    return sa.and_(*of_it, _parked())


def _parked() -> sa.ColumnElement[bool]:
    return sa.and_(job.c.stage == Stage.ROUTE, job.c.state == JobState.READY, job.c.run_at >= PARKED)


def is_waited_for(tx: sa.Connection, asking: Job) -> bool:
    """False once an operator, the time limit or a newer revision let the study go on without."""
    return tx.execute(sa.select(job.c.id).where(_waits_for(asking))).first() is not None


def hand_over(tx: sa.Connection, asking: Job, more: dict[str, Any], now: float | None) -> bool:
    """Write `more` into the job that waits; it goes on at `now`, None = it waits on. False = nothing waits."""
    row = tx.execute(sa.select(job.c.id, job.c.payload).where(_waits_for(asking))).first()
    if row is None:
        return False
    values: dict[str, Any] = {"payload": _dumps(json.loads(row.payload) | more)}
    if now is not None:  # a held job that is looked at just now is fenced out: its look came too early
        values |= {"state": JobState.READY, "run_at": now, "lease": None, "fence": job.c.fence + 1}
    tx.execute(job.update().where(job.c.id == row.id).values(**values))
    return True


def stop_looking(tx: sa.Connection, study_uid: str, revision: int, route: str, now: float) -> None:
    """A route that was held goes on or ended: nobody is asked for its values any more."""
    tx.execute(
        job.update()
        .where(
            job.c.study_uid == study_uid,
            job.c.revision == revision,
            job.c.stage == Stage.CLINICAL,
            job.c.route == route,
            job.c.state != JobState.DONE,
        )
        .values(state=JobState.DONE, outcome=Outcome.GATHERED, fence=job.c.fence + 1, lease=None, done_at=now)
    )


def supersede(tx: sa.Connection, study_uid: str, before_revision: int, now: float) -> int:
    """A newer revision takes over: open jobs of older ones end, and their running attempts are fenced out."""
    done = tx.execute(
        job.update()
        .where(
            job.c.study_uid == study_uid,
            job.c.revision < before_revision,
            job.c.state.in_([JobState.READY, JobState.RUNNING, JobState.DEAD]),
        )
        .values(state=JobState.DONE, outcome=Outcome.SUPERSEDED, fence=job.c.fence + 1, lease=None, done_at=now)
    )
    return int(done.rowcount)


def recover(tx: sa.Connection) -> int:
    """At start: take back the leases of this root's last process (one live process a root: flock)."""
    return int(
        tx.execute(
            job.update()
            .where(job.c.state == JobState.RUNNING)
            .values(state=JobState.READY, lease=None, attempts=job.c.attempts - 1)
        ).rowcount
    )


def retry(tx: sa.Connection, study_uid: str, now: float) -> int:
    """An operator's second chance: DEAD jobs become READY with their attempts forgotten."""
    return int(
        tx.execute(
            job.update()
            .where(job.c.study_uid == study_uid, job.c.state == JobState.DEAD)
            .values(state=JobState.READY, attempts=0, run_at=now, detail="", code=None, done_at=None)
        ).rowcount
    )


def release(tx: sa.Connection, study_uid: str, now: float) -> int:
    """An operator's word that a study is complete as it is: what waits for more of it, or for a value, goes on."""
    open_ = sa.and_(job.c.stage == Stage.COMPLETE, job.c.state.in_([JobState.READY, JobState.RUNNING]))
    rows = tx.execute(
        sa.select(job.c.id, job.c.payload).where(job.c.study_uid == study_uid, sa.or_(open_, _parked()))
    ).all()
    for row in rows:
        payload = json.loads(row.payload) | {"incomplete_accepted": True}
        values = {"state": JobState.READY, "run_at": now, "payload": _dumps(payload), "code": None, "detail": ""}
        # A turn that is asking the PACS just now is fenced out: the operator's word comes after it.
        tx.execute(job.update().where(job.c.id == row.id).values(**values, lease=None, fence=job.c.fence + 1))
    return len(rows)


def held(tx: sa.Connection, study_uid: str | None = None) -> int:
    """How many routes wait for more instances or an operator, of one study or of all."""
    of = [] if study_uid is None else [job.c.study_uid == study_uid]
    query = sa.select(sa.func.count()).where(job.c.state != JobState.DONE, job.c.code == HELD, *of)
    return int(tx.execute(query).scalar_one())


def held_since(tx: sa.Connection) -> float | None:
    """Since when the route that has waited longest waits; None = none does."""
    query = sa.select(sa.func.min(job.c.created_at)).where(job.c.state != JobState.DONE, job.c.code == HELD)
    since: float | None = tx.execute(query).scalar()
    return since


def last_answer(tx: sa.Connection, study_uid: str, route: str, before_revision: int) -> str | None:
    """Input digest of the newest earlier run of this route that gave an answer; None if there is none."""
    value: str | None = tx.execute(
        sa.select(job.c.input_digest)
        .where(
            job.c.study_uid == study_uid,
            job.c.route == route,
            job.c.stage == Stage.INFER,
            job.c.revision < before_revision,
            job.c.input_digest != "",
            job.c.outcome.in_([Outcome.RESULT, Outcome.REFUSED, Outcome.SHADOW]),
        )
        .order_by(job.c.revision.desc())
        .limit(1)
    ).scalar()
    return value


def counts(tx: sa.Connection) -> dict[tuple[str, str], int]:
    """Open and dead jobs by (stage, state)."""
    rows = tx.execute(
        sa.select(job.c.stage, job.c.state, sa.func.count())
        .where(job.c.state != JobState.DONE)
        .group_by(job.c.stage, job.c.state)
    ).all()
    return {(stage, state): count for stage, state, count in rows}


def _ending(ending: Ending) -> dict[str, Any]:
    return {
        "outcome": ending.outcome,
        "code": ending.code or None,
        "detail": ending.detail,
        "engine": ending.engine,
        "package": ending.package,
        "digest": ending.digest,
        "input_digest": ending.input_digest,
        "output": _dumps(ending.output or {}),
    }


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

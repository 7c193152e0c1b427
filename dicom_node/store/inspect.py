"""What the operator asks: `explain`, `status`. Read-only queries; the shapes are public (docs/schemas)."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from dicom_node.store import rejections
from dicom_node.store.jobs import HELD
from dicom_node.store.schema import (
    DeliveryState,
    JobState,
    Stage,
    StudyState,
    delivery,
    destination,
    event,
    instance,
    job,
    study,
    withdrawal,
)


def _state_expression() -> sa.Case[str]:
    def any_job(*states: JobState) -> sa.Exists:
        return sa.exists().where(job.c.study_uid == study.c.uid, job.c.state.in_(states))

    def any_delivery(state: DeliveryState) -> sa.Exists:
        return sa.exists().where(delivery.c.study_uid == study.c.uid, delivery.c.state == state)

    held_job = sa.exists().where(job.c.study_uid == study.c.uid, job.c.state != JobState.DONE, job.c.code == HELD)
    return sa.case(
        (study.c.hold.is_not(None), StudyState.HELD),
        (sa.or_(any_job(JobState.DEAD), any_delivery(DeliveryState.DEAD)), StudyState.DEAD),
        (study.c.due_at.is_not(None), StudyState.RECEIVING),
        (sa.or_(held_job, any_delivery(DeliveryState.HELD)), StudyState.HELD),
        (any_job(JobState.READY, JobState.RUNNING), StudyState.PROCESSING),
        (any_delivery(DeliveryState.PENDING), StudyState.DELIVERING),
        (study.c.revision == 0, StudyState.IGNORED),
        else_=StudyState.DONE,
    )


def states(tx: sa.Connection) -> dict[str, int]:
    """How many studies stand in each state."""
    state = _state_expression().label("state")
    rows = tx.execute(sa.select(state, sa.func.count()).select_from(study).group_by(state)).all()
    return {str(name): 0 for name in StudyState} | {str(name): count for name, count in rows}


def status(tx: sa.Connection, destinations: list[str], now: float) -> dict[str, Any]:
    """`dicom-node status --json`."""
    rows = tx.execute(
        sa.select(
            delivery.c.destination, delivery.c.state, sa.func.count(), sa.func.min(delivery.c.created_at)
        ).group_by(delivery.c.destination, delivery.c.state)
    ).all()
    paused = {r.name: r for r in tx.execute(sa.select(destination).where(destination.c.paused_since.is_not(None)))}
    oldest = min((r[3] for r in rows if r[1] == DeliveryState.PENDING), default=None)
    waiting, more = attention(tx)
    return {
        "states": states(tx),
        "attention": waiting,
        "attention_left_out": more,
        "oldest_undelivered_seconds": None if oldest is None else round(now - oldest, 1),
        "destinations": [
            {
                "name": name,
                "paused": name in paused,
                "reason": paused[name].reason if name in paused else "",
                **{s.lower(): next((r[2] for r in rows if r[0] == name and r[1] == s), 0) for s in DeliveryState},
            }
            for name in sorted({*destinations, *(r[0] for r in rows)})
        ],
    }


def attention(tx: sa.Connection, most: int = 100) -> tuple[list[dict[str, Any]], int]:
    """Studies that wait for a person, the longest first: which, why (an event's code), since when; how many more."""

    def of(table: sa.Table, why: str, at: str, *where: sa.ColumnElement[bool]) -> sa.Select[Any]:
        since = sa.func.min(table.c[at]).label("since")
        query = sa.select(table.c.study_uid.label("study"), sa.literal(why).label("why"), since)
        return query.where(*where).group_by(table.c.study_uid)

    stopped = sa.select(study.c.uid, study.c.hold, study.c.last_received).where(study.c.hold.is_not(None))
    found = sa.union_all(
        of(job, HELD, "created_at", job.c.state != JobState.DONE, job.c.code == HELD),
        of(job, "JOB_DEAD", "created_at", job.c.state == JobState.DEAD),
        of(delivery, "DELIVERY_HELD", "created_at", delivery.c.state == DeliveryState.HELD),
        of(delivery, "DELIVERY_DEAD", "created_at", delivery.c.state == DeliveryState.DEAD),
        of(withdrawal, "WITHDRAWAL_NEEDED", "at", withdrawal.c.done_at.is_(None)),
        stopped,
    ).subquery()
    total = tx.execute(sa.select(sa.func.count()).select_from(found)).scalar_one()
    rows = tx.execute(sa.select(found).order_by(found.c.since, found.c.study).limit(most)).all()
    return [{"study": r.study, "why": r.why, "since": r.since} for r in rows], max(0, total - most)


def explain(tx: sa.Connection, study_uid: str) -> dict[str, Any] | None:
    """`dicom-node explain STUDY_UID --json`; None = no such study."""
    row = (
        tx.execute(sa.select(study, _state_expression().label("state")).where(study.c.uid == study_uid))
        .mappings()
        .first()
    )
    if row is None:
        return None
    count = sa.select(sa.func.count()).where(instance.c.study_uid == study_uid, instance.c.current, ~instance.c.own)
    return {
        "study": study_uid,
        "state": str(row["state"]),
        "hold": row["hold"],
        "revision": row["revision"],
        "instances": tx.execute(count).scalar_one(),
        "outcomes": _outcomes(tx, study_uid),
        "deliveries": _deliveries(tx, study_uid),
        "withdrawals": rejections.withdrawals(tx, study_uid),
        "events": [
            {"at": r.at, "code": r.code, "text": r.text}
            for r in tx.execute(sa.select(event).where(event.c.study_uid == study_uid).order_by(event.c.id))
        ],
        "evidence": verdicts(tx, study_uid, row["revision"]),
    }


def _outcomes(tx: sa.Connection, study_uid: str) -> list[dict[str, Any]]:
    """One row for each answer: what each route concluded, and UNROUTED where none took the study."""
    rows = tx.execute(
        sa.select(job).where(job.c.study_uid == study_uid, _answers()).order_by(job.c.revision, job.c.id)
    ).mappings()
    return [
        {
            "route": r["route"] or None,
            "revision": r["revision"],
            "stage": r["stage"],
            "state": r["state"],
            "outcome": r["outcome"],
            "code": r["code"],
            "detail": r["detail"],
            "engine": r["engine"] or None,
            "package": r["package"] or None,
            "digest": r["digest"] or None,
            **_backend(r["output"]),
            "clinical": _clinical(r["output"]),
        }
        for r in rows
    ]


def _clinical(output: str) -> dict[str, Any] | None:
    """The clinical values a result was made with, each with unit, time and source, and those it could not use."""
    said = json.loads(output or "{}")
    if "clinical" not in said:
        return None
    keys = ("name", "laterality", "value", "unit", "time", "source")
    unused = said["provenance"]["parameters"].get("clinical values not used", "")
    return {"used": [{k: c[k] for k in keys} for c in said["clinical"]], "not_used": unused}


def _backend(output: str) -> dict[str, str | None]:
    """What a result was computed on, and how near that came to the golden answers."""
    made = json.loads(output or "{}").get("provenance", {})
    return {
        "backend": made.get("backend") or None,
        "precision": made.get("precision") or None,
        "acceptance": made.get("parameters", {}).get("acceptance") or None,
    }


def _answers() -> sa.ColumnElement[bool]:
    """Inference, what ended or waits before it, and what is stuck."""
    open_ = job.c.state != JobState.DONE
    before = sa.and_(job.c.stage == Stage.COMPLETE, sa.or_(open_, job.c.outcome == "REFUSED"))
    gathering = sa.and_(job.c.stage == Stage.CLINICAL, open_, job.c.code.is_not(None))
    stuck = job.c.state == JobState.DEAD
    return sa.or_(job.c.stage == Stage.INFER, job.c.outcome == "UNROUTED", before, gathering, stuck)


def _deliveries(tx: sa.Connection, study_uid: str) -> list[dict[str, Any]]:
    rows = tx.execute(sa.select(delivery).where(delivery.c.study_uid == study_uid).order_by(delivery.c.id)).mappings()
    return [
        {
            "destination": r["destination"],
            "sop_instance_uid": r["sop_uid"],
            "state": r["state"],
            "status": None if r["status"] is None else f"0x{r['status']:04X}",
            "attempts": r["attempts"],
            "reason": r["reason"],
        }
        for r in rows
    ]


def verdicts(tx: sa.Connection, study_uid: str, revision: int) -> list[dict[str, Any]]:
    """Rule by rule, as the route stage saw it at this revision; [] while it has not."""
    text = tx.execute(
        sa.select(job.c.output).where(
            job.c.study_uid == study_uid, job.c.revision == revision, job.c.stage == Stage.ROUTE
        )
    ).scalar()
    seen: list[dict[str, Any]] = json.loads(text or "{}").get("verdicts", [])
    return seen


def gathered(tx: sa.Connection, study_uid: str, revision: int) -> dict[str, Any] | None:
    """What sources outside the study said of its clinical values at this revision; None = nobody was asked."""
    text = tx.execute(
        sa.select(job.c.payload).where(
            job.c.study_uid == study_uid, job.c.revision == revision, job.c.stage == Stage.ROUTE
        )
    ).scalar()
    said: dict[str, Any] | None = json.loads(text or "{}").get("clinical")
    return said


def received_since(tx: sa.Connection, since: float) -> list[tuple[str, int]]:
    """(UID, revision) of the studies that received something since then, oldest first."""
    rows = tx.execute(
        sa.select(study.c.uid, study.c.revision).where(study.c.last_received >= since).order_by(study.c.last_received)
    )
    return [(row.uid, row.revision) for row in rows]


def study_row(tx: sa.Connection, study_uid: str) -> dict[str, Any]:
    """The study's row as it is."""
    return dict(tx.execute(sa.select(study).where(study.c.uid == study_uid)).mappings().one())

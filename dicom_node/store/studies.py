"""Queries on instances and studies: index, timers, patient identity, retention. Each takes an open transaction."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicom_node.store import jobs
from dicom_node.store.ledger import add_event
from dicom_node.store.rejections import is_rejected
from dicom_node.store.schema import DeliveryState, JobState, delivery, event, instance, job, output, study
from dicom_node.study import Header, Instance, Study


@dataclass(frozen=True, slots=True)
class Timing:
    """When a study counts as complete."""

    quiet_seconds: float
    force_after_seconds: float
    late: str
    max_revisions: int


@dataclass(frozen=True, slots=True)
class DueStudy:
    """A study whose quiet time is over."""

    study_uid: str
    revision: int
    armed_at: float
    due_at: float
    last_received: float
    priority: int
    associations: frozenset[str]


def patient_digest(header: Header) -> str:
    """Equal for equal Patient ID, Issuer of Patient ID and Patient's Birth Date; says nothing else."""
    parts = [header.text(k).strip() for k in ("PatientID", "IssuerOfPatientID", "PatientBirthDate")]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def is_our_object(tx: sa.Connection, sop_uid: str) -> bool:
    """True when this node made the object (loop guard: PACS -> node -> PACS auto-forward)."""
    return tx.execute(sa.select(output.c.sop_uid).where(output.c.sop_uid == sop_uid)).first() is not None


def add_instance(tx: sa.Connection, new: Instance, *, own: bool, priority: int, timing: Timing, now: float) -> str:
    """Index one stored file. Returns what happened: "new", "changed", "duplicate" or "own"."""
    rows = tx.execute(
        sa.select(instance.c.id, instance.c.digest, instance.c.current).where(
            instance.c.study_uid == new.study_instance_uid, instance.c.sop_uid == new.sop_instance_uid
        )
    ).all()
    if any(row.digest == new.digest and row.current for row in rows):
        return "duplicate"
    if rows:
        tx.execute(instance.update().where(instance.c.id.in_([r.id for r in rows])).values(current=False))
    tx.execute(
        instance.insert().values(
            id=new.instance_id,
            study_uid=new.study_instance_uid,
            sop_uid=new.sop_instance_uid,
            transfer_syntax_uid=new.transfer_syntax_uid,
            digest=new.digest,
            association=new.association_id,
            calling_ae=new.calling_ae_title,
            called_ae=new.called_ae_title,
            peer=new.peer,
            received_at=new.received_at,
            patient=patient_digest(new.header),
            current=True,
            own=own,
            header=json.dumps(new.header.to_json(), ensure_ascii=False, separators=(",", ":")),
        )
    )
    _touch_study(tx, new, own=own, priority=priority, timing=timing, now=now)
    if own:
        return "own"
    _check_patient(tx, new.study_instance_uid, now)
    return "changed" if rows else "new"


def _touch_study(tx: sa.Connection, new: Instance, *, own: bool, priority: int, timing: Timing, now: float) -> None:
    uid = new.study_instance_uid
    row = tx.execute(sa.select(study).where(study.c.uid == uid)).mappings().first()
    if row is None:
        tx.execute(
            study.insert().values(
                uid=uid,
                revision=0,
                armed_at=None,
                last_received=new.received_at,
                due_at=None,
                hold=None,
                accepted_conflict=False,
                priority=priority,
                expired=False,
            )
        )
        add_event(tx, now, uid, "STUDY_OPENED", "first instance received")
        row = tx.execute(sa.select(study).where(study.c.uid == uid)).mappings().one()
    if own:  # stored and ignored: it must not start the line again
        add_event(tx, now, uid, "OWN_OBJECT", "one of our own objects came back; stored, not routed")
        return
    if row["revision"] > 0 and row["due_at"] is None and not _may_rerun(tx, uid, row["revision"], timing, now):
        tx.execute(study.update().where(study.c.uid == uid).values(last_received=new.received_at))
        return
    armed_at = row["armed_at"] if row["armed_at"] is not None else new.received_at
    due_at = min(
        max(new.received_at, row["last_received"]) + timing.quiet_seconds, armed_at + timing.force_after_seconds
    )
    tx.execute(
        study.update()
        .where(study.c.uid == uid)
        .values(
            armed_at=armed_at,
            due_at=due_at,
            last_received=max(new.received_at, row["last_received"]),
            priority=max(row["priority"], priority),
            expired=False,
        )
    )


def _may_rerun(tx: sa.Connection, uid: str, revision: int, timing: Timing, now: float) -> bool:
    """A late instance: does it arm the timer again? Only revisions that an engine really ran on are counted."""
    if jobs.held(tx, uid):
        text = "an instance came for a study that was held as incomplete; it is assembled again"
        add_event(tx, now, uid, "LATE_INSTANCE", text)
        return True
    if timing.late == "ignore":
        add_event(
            tx, now, uid, "LATE_IGNORED", "an instance came after the study was complete; assemble.late is ignore"
        )
        return False
    ran = tx.execute(
        sa.select(sa.func.count(sa.distinct(job.c.revision))).where(
            job.c.study_uid == uid, job.c.stage == "infer", job.c.input_digest != ""
        )
    ).scalar_one()
    if ran >= timing.max_revisions:
        add_event(tx, now, uid, "REVISIONS_EXHAUSTED", f"a late instance came after {ran} runs; stored, not run again")
        return False
    add_event(
        tx, now, uid, "LATE_INSTANCE", f"an instance came after revision {revision}; the study is assembled again"
    )
    return True


def _check_patient(tx: sa.Connection, uid: str, now: float) -> None:
    """Patient safety: instances of one study that disagree on the patient stop the study until they agree."""
    row = tx.execute(sa.select(study.c.hold, study.c.accepted_conflict).where(study.c.uid == uid)).one()
    patients = tx.execute(
        sa.select(sa.func.count(sa.distinct(instance.c.patient))).where(
            instance.c.study_uid == uid, instance.c.current, ~instance.c.own
        )
    ).scalar_one()
    if patients > 1 and row.hold is None and not row.accepted_conflict:
        tx.execute(study.update().where(study.c.uid == uid).values(hold="PATIENT_CONFLICT"))
        add_event(
            tx,
            now,
            uid,
            "PATIENT_CONFLICT",
            "instances differ in Patient ID, its issuer or birth date; nothing is "
            "delivered until they agree or an operator decides (dicom-node complete --accept-conflict)",
        )
    elif patients <= 1 and row.hold == "PATIENT_CONFLICT":
        tx.execute(study.update().where(study.c.uid == uid).values(hold=None))
        add_event(tx, now, uid, "PATIENT_AGREED", "the instances agree on the patient again")


def arm(tx: sa.Connection, uid: str, now: float, quiet_seconds: float) -> None:
    """Assemble the study again though nothing of it came (its images were rejected)."""
    tx.execute(
        study.update()
        .where(study.c.uid == uid, study.c.due_at.is_(None))
        .values(armed_at=now, due_at=now + quiet_seconds)
    )


def due_studies(tx: sa.Connection, now: float, limit: int = 100) -> list[DueStudy]:
    """Studies whose quiet time is over, most urgent first, with the associations that delivered to them."""
    rows = (
        tx.execute(
            sa.select(study)
            .where(study.c.due_at <= now, study.c.hold.is_(None))
            .order_by(study.c.priority.desc(), study.c.due_at)
            .limit(limit)
        )
        .mappings()
        .all()
    )
    found = []
    for row in rows:
        associations = (
            tx.execute(
                sa.select(instance.c.association)
                .distinct()
                .where(instance.c.study_uid == row["uid"], instance.c.received_at >= row["armed_at"])
            )
            .scalars()
            .all()
        )
        found.append(
            DueStudy(
                row["uid"],
                row["revision"],
                row["armed_at"],
                row["due_at"],
                row["last_received"],
                row["priority"],
                frozenset(associations),
            )
        )
    return found


def next_due(tx: sa.Connection) -> float | None:
    """When the next timer runs out."""
    value: float | None = tx.execute(sa.select(sa.func.min(study.c.due_at)).where(study.c.hold.is_(None))).scalar()
    return value


def load_study(
    tx: sa.Connection, uid: str, revision: int, path_of: Callable[[str], Path], *, with_rejected: bool = False
) -> Study:
    """The study as it stands now: newest content of each SOP Instance, our own objects and rejected ones left out."""
    query = sa.select(instance).where(instance.c.study_uid == uid, instance.c.current, ~instance.c.own)
    if not with_rejected:
        query = query.where(~is_rejected())
    rows = tx.execute(query).mappings().all()
    return Study.from_instances(uid, revision, (_instance(row, path_of) for row in rows))


def _instance(row: Any, path_of: Callable[[str], Path]) -> Instance:
    return Instance(
        instance_id=row["id"],
        header=Header.from_json(json.loads(row["header"])),
        transfer_syntax_uid=row["transfer_syntax_uid"],
        digest=row["digest"],
        path=path_of(row["id"]),
        calling_ae_title=row["calling_ae"],
        called_ae_title=row["called_ae"],
        peer=row["peer"],
        association_id=row["association"],
        received_at=row["received_at"],
    )


def set_hold(tx: sa.Connection, uid: str, reason: str | None, *, accept_conflict: bool = False) -> None:
    """Stop a study, or let it go on."""
    values: dict[str, Any] = {"hold": reason}
    if accept_conflict:
        values["accepted_conflict"] = True
    tx.execute(study.update().where(study.c.uid == uid).values(**values))


def conflict_since(tx: sa.Connection) -> float | None:
    """When the study that has been stopped longest got its last instance; None = none is stopped."""
    since: float | None = tx.execute(
        sa.select(sa.func.min(study.c.last_received)).where(study.c.hold.is_not(None))
    ).scalar()
    return since


def exists(tx: sa.Connection, uid: str) -> bool:
    """True when the ledger knows the study."""
    return tx.execute(sa.select(study.c.uid).where(study.c.uid == uid)).first() is not None


def known_ids(tx: sa.Connection) -> set[str]:
    """Ids of every indexed file (start-up: adopt what is missing here, alarm on what is missing on disk)."""
    return set(tx.execute(sa.select(instance.c.id)).scalars())


def expirable(tx: sa.Connection, before: float, limit: int = 50) -> list[str]:
    """Studies without a timer, an open or dead job or delivery, last touched before `before`, files still kept."""
    over = (DeliveryState.DELIVERED, DeliveryState.WITHDRAWN)
    busy_job = sa.exists().where(job.c.study_uid == study.c.uid, job.c.state != JobState.DONE)
    busy_delivery = sa.exists().where(delivery.c.study_uid == study.c.uid, delivery.c.state.not_in(over))
    recent = sa.exists().where(event.c.study_uid == study.c.uid, event.c.at >= before)
    return list(
        tx.execute(
            sa.select(study.c.uid)
            .where(
                study.c.last_received < before,
                study.c.due_at.is_(None),
                study.c.hold.is_(None),
                ~study.c.expired,
                ~busy_job,
                ~busy_delivery,
                ~recent,
            )
            .order_by(study.c.last_received)
            .limit(limit)
        ).scalars()
    )


def expire(tx: sa.Connection, uid: str, now: float) -> tuple[list[str], list[str], list[str]]:
    """Forget a study's headers and files. Returns instance ids, output and spool files to unlink afterwards."""
    ids = list(tx.execute(sa.select(instance.c.id).where(instance.c.study_uid == uid)).scalars())
    outputs = list(tx.execute(sa.select(output.c.file).where(output.c.study_uid == uid)).scalars())
    spool = [
        name
        for text in tx.execute(sa.select(job.c.output).where(job.c.study_uid == uid)).scalars()
        for name in spool_files(json.loads(text))
    ]
    tx.execute(instance.delete().where(instance.c.study_uid == uid))
    tx.execute(study.update().where(study.c.uid == uid).values(expired=True))
    add_event(tx, now, uid, "EXPIRED", "images, headers and results were removed after store.keep_days")
    return ids, outputs, spool


def unreferenced(tx: sa.Connection, names: set[str]) -> set[str]:
    """Of these names of spool and output files, those no row names: left by a kill between the write and the commit."""
    left = set(names)
    left -= set(tx.execute(sa.select(output.c.file)).scalars())
    for text in tx.execute(sa.select(job.c.output).where(job.c.output.like("%.npy%"))).scalars():
        left.difference_update(spool_files(json.loads(text)))
    return left


def spool_files(result: Any) -> Iterable[str]:
    """Names of the spilled arrays in a stored Result."""
    if isinstance(result, dict):
        if set(result) >= {"name", "digest", "shape", "dtype"}:
            yield str(result["name"])
        for value in result.values():
            yield from spool_files(value)
    elif isinstance(result, list):
        for value in result:
            yield from spool_files(value)


def known_ids_among(tx: sa.Connection, ids: list[str]) -> set[str]:
    """Which of these files are indexed already."""
    return set(tx.execute(sa.select(instance.c.id).where(instance.c.id.in_(ids))).scalars())


@dataclass(frozen=True, slots=True)
class About:
    """What an audit message says of a study. Holds the Patient ID: for the audit trail only."""

    patient_id: str
    calling_ae: str
    peer: str
    sop_classes: dict[str, int]


def about(tx: sa.Connection, study_uid: str) -> About:
    """Of the instances as they are now."""
    rows = tx.execute(
        sa.select(instance.c.header, instance.c.calling_ae, instance.c.peer)
        .where(instance.c.study_uid == study_uid, instance.c.current, ~instance.c.own)
        .order_by(instance.c.received_at)
    ).all()
    headers = [Header.from_json(json.loads(row.header)) for row in rows]
    classes = Counter(header.text("SOPClassUID") for header in headers)
    first = rows[0] if rows else None
    return About(
        headers[0].text("PatientID") if headers else "",
        first.calling_ae if first else "",
        first.peer if first else "",
        dict(classes),
    )

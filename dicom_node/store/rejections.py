"""Rejection notes: Key Object Selection documents that say which images must not be used (PS3.16 TID 2010, CID 7011).

A note takes effect in the transaction that indexes it: its images are left out from then on (`studies.load_study`),
open jobs on them end, results made from them are not sent any more, and those a destination holds already are listed
for withdrawal: taking an object out of a PACS is done there, by people, and `explain` says which. A note that is itself
rejected counts no longer (IHE IOCM).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from dicom_node.result import RefusalCode
from dicom_node.store import jobs
from dicom_node.store.ledger import add_event
from dicom_node.store.schema import (
    DeliveryState,
    JobState,
    Outcome,
    Stage,
    delivery,
    instance,
    job,
    output,
    rejection,
    withdrawal,
)
from dicom_node.study import Header

KEY_OBJECT_SELECTION = "1.2.840.10008.5.1.4.1.1.88.59"
TITLES = {
    "113001": "Rejected for Quality Reasons",
    "113037": "Rejected for Patient Safety Reasons",
    "113038": "Incorrect Modality Worklist Entry",
    "113039": "Data Retention Policy Expired",
}
"""Document titles of CID 7011. 113010 (Quality Issue, CID 7010) remarks on an image and does not reject it."""
MAX_REFERENCES = 20_000
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Note:
    """What a rejection note says."""

    uid: str
    code: str
    sop_uids: frozenset[str]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a note changed."""

    images: int
    """Instances that this node holds and will not use any more."""
    rerun: frozenset[str]
    """Studies that must be judged again without them."""


def note_of(header: Header) -> Note | None:
    """A rejection note, or None for any other object."""
    if header.text("SOPClassUID") != KEY_OBJECT_SELECTION:
        return None
    titles = [
        i for i in header.items_of("ConceptNameCodeSequence") if i.text("CodingSchemeDesignator").strip() == "DCM"
    ]
    codes = [i.text("CodeValue").strip() for i in titles]
    code = next((c for c in codes if c in TITLES), None)
    if code is None:
        return None
    named = frozenset(_referenced(header)) or frozenset(_evidence(header))
    return Note(header.text("SOPInstanceUID"), code, frozenset(sorted(named)[:MAX_REFERENCES]))


def _referenced(header: Header) -> Iterator[str]:
    """Of the content tree: IMAGE, COMPOSITE and WAVEFORM items, at any depth."""
    waiting = list(header.items_of("ContentSequence"))
    while waiting:
        item = waiting.pop()
        waiting += item.items_of("ContentSequence")
        yield from _sops(item.items_of("ReferencedSOPSequence"))


def _evidence(header: Header) -> Iterator[str]:
    for study in header.items_of("CurrentRequestedProcedureEvidenceSequence"):
        for series in study.items_of("ReferencedSeriesSequence"):
            yield from _sops(series.items_of("ReferencedSOPSequence"))


def _sops(items: tuple[Header, ...]) -> Iterator[str]:
    yield from (uid for item in items if (uid := item.text("ReferencedSOPInstanceUID").strip()))


def is_rejected() -> sa.ColumnElement[bool]:
    """For a query on `instance`: a note that counts names it."""
    return sa.exists().where(rejection.c.sop_uid == instance.c.sop_uid)


def rejected(tx: sa.Connection, study_uid: str) -> dict[str, str]:
    """SOP Instance UID to code and title of the note, of the study's instances that must not be used."""
    rows = tx.execute(
        sa.select(rejection.c.sop_uid, rejection.c.code)
        .join(instance, instance.c.sop_uid == rejection.c.sop_uid)
        .where(instance.c.study_uid == study_uid, instance.c.current, ~instance.c.own)
        .order_by(rejection.c.at, rejection.c.id)
    ).all()
    return {row.sop_uid: f"{row.code} {TITLES[row.code]}" for row in rows}


def apply(tx: sa.Connection, note: Note, study_uid: str, now: float) -> Effect:
    """Put a note into effect; the same note again (perhaps corrected) replaces what it said before."""
    tx.execute(rejection.delete().where(rejection.c.note_uid == note.uid))
    if tx.execute(sa.select(rejection.c.id).where(rejection.c.sop_uid == note.uid)).first() is not None:
        add_event(tx, now, study_uid, "REJECTION_REVOKED", "a rejection note came that is itself rejected: no effect")
        return Effect(0, frozenset())
    for uid in sorted(note.sop_uids - {note.uid}):
        tx.execute(rejection.insert().values(sop_uid=uid, note_uid=note.uid, code=note.code, at=now))
    rerun = _revoke(tx, note.sop_uids, study_uid, now)
    _done(tx, note.sop_uids, now)
    images = 0
    for study, named in _held(tx, note.sop_uids).items():
        images += len(named)
        title = f"{note.code} {TITLES[note.code]}"
        add_event(tx, now, study, "IMAGES_REJECTED", f"{len(named)} instances are not used any more: {title}")
        if _cancel(tx, study, named, title, now):
            rerun |= {study}
        _withdraw(tx, study, frozenset(named), note.code, now)
    return Effect(images, frozenset(rerun))


def _revoke(tx: sa.Connection, uids: Collection[str], study_uid: str, now: float) -> set[str]:
    """Notes among the rejected: what they rejected may be used again."""
    notes = [n for chunk in _chunks(uids) for n in tx.execute(
        sa.select(rejection.c.note_uid).distinct().where(rejection.c.note_uid.in_(chunk))).scalars()]  # fmt: skip
    for uid in notes:
        tx.execute(rejection.delete().where(rejection.c.note_uid == uid))
        add_event(
            tx, now, study_uid, "REJECTION_REVOKED", "an earlier rejection note is itself rejected: it counts no longer"
        )
    return {study_uid} if notes else set()


def _done(tx: sa.Connection, uids: Collection[str], now: float) -> None:
    """A note on one of our own objects: that withdrawal is done."""
    for chunk in _chunks(uids):
        tx.execute(
            withdrawal.update()
            .where(withdrawal.c.sop_uid.in_(chunk), withdrawal.c.done_at.is_(None))
            .values(done_at=now)
        )


def _held(tx: sa.Connection, uids: Collection[str]) -> dict[str, dict[str, str]]:
    """Of these instances those we have: study to {SOP Instance UID: Series Instance UID}."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for chunk in _chunks(uids):
        rows = tx.execute(
            sa.select(instance.c.study_uid, instance.c.sop_uid, instance.c.header).where(
                instance.c.sop_uid.in_(chunk), instance.c.current, ~instance.c.own
            )
        ).all()
        for row in rows:
            found[row.study_uid][row.sop_uid] = str(json.loads(row.header).get("SeriesInstanceUID", ""))
    return found


def _cancel(tx: sa.Connection, study_uid: str, named: dict[str, str], title: str, now: float) -> bool:
    """End the open jobs that would use a rejected image, and fence out the running ones."""
    rows = tx.execute(
        sa.select(job.c.id, job.c.stage, job.c.revision, job.c.route, job.c.payload).where(
            job.c.study_uid == study_uid,
            job.c.stage.in_([Stage.COMPLETE, Stage.INFER, Stage.REPORT]),
            job.c.state != JobState.DONE,
        )
    ).all()
    cancelled = [row for row in rows if _uses(json.loads(row.payload), named)]
    for row in cancelled:
        tx.execute(
            job.update()
            .where(job.c.id == row.id)
            .values(
                state=JobState.DONE,
                outcome=Outcome.REFUSED,
                code=RefusalCode.IMAGE_REJECTED,
                detail=title,
                fence=job.c.fence + 1,
                lease=None,
                done_at=now,
            )
        )
        jobs.stop_looking(tx, study_uid, row.revision, row.route, now)
        text = f"{row.route}: {row.stage} ended, a selected image is rejected: {title}"
        add_event(tx, now, study_uid, "JOB_CANCELLED", text)
    return bool(cancelled)


def _uses(payload: dict[str, Any], named: dict[str, str]) -> bool:
    if "result" in payload:
        return not named.keys().isdisjoint(payload["result"].get("source_instances", []))
    if "refusal" in payload:
        return False
    return not set(named.values()).isdisjoint(payload.get("series", []))


def _withdraw(tx: sa.Connection, study_uid: str, named: frozenset[str], code: str, now: float) -> None:
    """Results made from a rejected image: unsent ones stay here, sent ones are listed."""
    rows = tx.execute(
        sa.select(job.c.revision, job.c.route, job.c.output).where(
            job.c.study_uid == study_uid, job.c.stage == Stage.INFER, job.c.outcome == Outcome.RESULT
        )
    ).all()
    made_from = [(r.revision, r.route) for r in rows if named & set(json.loads(r.output).get("source_instances", []))]
    for revision, route in made_from:
        sent = tx.execute(
            sa.select(delivery.c.id, delivery.c.destination, delivery.c.sop_uid, delivery.c.state)
            .join(output, output.c.sop_uid == delivery.c.sop_uid)
            .where(output.c.study_uid == study_uid, output.c.revision == revision, output.c.route == route)
        ).all()
        for row in sent:
            if row.state == DeliveryState.DELIVERED:
                list_withdrawal(tx, study_uid, row.sop_uid, row.destination, code, now)
            elif row.state != DeliveryState.WITHDRAWN:
                reason = f"its images are rejected: {code} {TITLES[code]}"
                tx.execute(
                    delivery.update()
                    .where(delivery.c.id == row.id)
                    .values(state=DeliveryState.WITHDRAWN, reason=reason, done_at=now)
                )
                add_event(tx, now, study_uid, "DELIVERY_WITHDRAWN", f"{row.sop_uid} to {row.destination}: {reason}")


def list_withdrawal(tx: sa.Connection, study_uid: str, sop_uid: str, destination: str, code: str, now: float) -> None:
    """A destination holds an object made from rejected images: somebody must take it out there."""
    same = sa.select(withdrawal.c.id).where(withdrawal.c.sop_uid == sop_uid, withdrawal.c.destination == destination)
    if tx.execute(same).first() is None:
        tx.execute(
            withdrawal.insert().values(study_uid=study_uid, sop_uid=sop_uid, destination=destination, code=code, at=now)
        )
        why = f"{code} {TITLES.get(code, '')}"
        text = f"{sop_uid} at {destination} was made from images rejected since ({why}): withdraw it there"
        add_event(tx, now, study_uid, "WITHDRAWAL_NEEDED", text)


def withdrawals(tx: sa.Connection, study_uid: str) -> list[dict[str, Any]]:
    """For `explain`."""
    rows = tx.execute(sa.select(withdrawal).where(withdrawal.c.study_uid == study_uid).order_by(withdrawal.c.id))
    return [
        {
            "destination": r.destination,
            "sop_instance_uid": r.sop_uid,
            "code": r.code,
            "reason": TITLES.get(r.code, ""),
            "at": r.at,
            "done": r.done_at is not None,
        }
        for r in rows
    ]


def open_withdrawals(tx: sa.Connection) -> int:
    """How many objects somebody must still take out of a PACS."""
    return int(tx.execute(sa.select(sa.func.count()).where(withdrawal.c.done_at.is_(None))).scalar_one())


def _chunks(uids: Collection[str]) -> Iterator[list[str]]:
    """SQLite binds a limited number of values."""
    ordered = sorted(uids)
    yield from (ordered[at : at + _CHUNK] for at in range(0, len(ordered), _CHUNK))

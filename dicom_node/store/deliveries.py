"""Queries on outputs, deliveries and destinations. Each takes an open transaction.

An output is written once and those bytes are sent, again and again if need be: a repeated send is a harmless duplicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from dicom_node.store.jobs import AGEING_SECONDS
from dicom_node.store.ledger import add_event
from dicom_node.store.rejections import list_withdrawal
from dicom_node.store.schema import (
    DeliveryState,
    delivery,
    destination,
    identity,
    instance,
    output,
    rejection,
    study,
)


@dataclass(frozen=True, slots=True)
class Output:
    """One object we made, as it lies under <root>/outputs."""

    sop_uid: str
    study_uid: str
    revision: int
    route: str
    kind: str
    variant: str
    sop_class_uid: str
    transfer_syntax_uid: str
    series_uid: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One object on its way to one destination."""

    id: int
    destination: str
    sop_uid: str
    study_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    file: str
    sha256: str
    attempts: int
    created_at: float
    priority: int


@dataclass(frozen=True, slots=True)
class Pause:
    """A destination that refuses us for a reason only a person can mend; probed now and then."""

    since: float
    reason: str
    probe_at: float


def add_output(tx: sa.Connection, new: Output, now: float) -> None:
    """Record a written object; the same object twice changes nothing."""
    if tx.execute(sa.select(output.c.sop_uid).where(output.c.sop_uid == new.sop_uid)).first() is None:
        tx.execute(
            output.insert().values(
                sop_uid=new.sop_uid,
                study_uid=new.study_uid,
                revision=new.revision,
                route=new.route,
                kind=new.kind,
                variant=new.variant,
                sop_class_uid=new.sop_class_uid,
                transfer_syntax_uid=new.transfer_syntax_uid,
                series_uid=new.series_uid,
                file=new.file,
                sha256=new.sha256,
                created_at=now,
            )
        )


def add_delivery(tx: sa.Connection, *, to: str, sop_uid: str, study_uid: str, priority: int, now: float) -> None:
    """Queue an object for a destination; the same pair twice changes nothing."""
    known = sa.select(delivery.c.id).where(delivery.c.destination == to, delivery.c.sop_uid == sop_uid)
    if tx.execute(known).first() is None:
        tx.execute(
            delivery.insert().values(
                destination=to,
                sop_uid=sop_uid,
                study_uid=study_uid,
                state=DeliveryState.PENDING,
                priority=priority,
                attempts=0,
                created_at=now,
                next_at=now,
            )
        )


def pending(tx: sa.Connection, to: str, now: float, limit: int = 50) -> list[Delivery]:
    """What may be sent to a destination now, most urgent first; nothing of a held study."""
    held = sa.exists().where(study.c.uid == delivery.c.study_uid, study.c.hold.is_not(None))
    urgency = delivery.c.priority + (now - delivery.c.created_at) / AGEING_SECONDS
    rows = (
        tx.execute(
            sa.select(delivery, output.c.sop_class_uid, output.c.transfer_syntax_uid, output.c.file, output.c.sha256)
            .join(output, output.c.sop_uid == delivery.c.sop_uid)
            .where(
                delivery.c.destination == to,
                delivery.c.state == DeliveryState.PENDING,
                delivery.c.next_at <= now,
                ~held,
            )
            .order_by(urgency.desc(), delivery.c.id)
            .limit(limit)
        )
        .mappings()
        .all()
    )
    return [
        Delivery(
            r["id"],
            r["destination"],
            r["sop_uid"],
            r["study_uid"],
            r["sop_class_uid"],
            r["transfer_syntax_uid"],
            r["file"],
            r["sha256"],
            r["attempts"],
            r["created_at"],
            r["priority"],
        )
        for r in rows
    ]


def next_at(tx: sa.Connection, to: str) -> float | None:
    """When the next object for a destination falls due."""
    value: float | None = tx.execute(
        sa.select(sa.func.min(delivery.c.next_at)).where(
            delivery.c.destination == to, delivery.c.state == DeliveryState.PENDING
        )
    ).scalar()
    return value


def delivered(tx: sa.Connection, sent: Delivery, status: int, now: float, note: str = "") -> None:
    """The destination has it."""
    withdrawn = _state(tx, sent) == DeliveryState.WITHDRAWN
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(state=DeliveryState.DELIVERED, status=status, reason=note, attempts=sent.attempts + 1, done_at=now)
    )
    add_event(
        tx,
        now,
        sent.study_uid,
        "DELIVERED",
        f"{sent.sop_uid} to {sent.destination}: 0x{status:04X}" + (f" ({note})" if note else ""),
    )
    if withdrawn:  # its images were rejected while it was on its way
        list_withdrawal(tx, sent.study_uid, sent.sop_uid, sent.destination, _why_rejected(tx, sent.study_uid), now)


def again(tx: sa.Connection, sent: Delivery, status: int | None, reason: str, at: float) -> None:
    """Not delivered; will be tried again at `at`."""
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(status=status, reason=reason, attempts=sent.attempts + 1, next_at=at)
    )


def _state(tx: sa.Connection, sent: Delivery) -> str:
    return str(tx.execute(sa.select(delivery.c.state).where(delivery.c.id == sent.id)).scalar_one())


def _why_rejected(tx: sa.Connection, study_uid: str) -> str:
    named = sa.select(rejection.c.code).join(instance, instance.c.sop_uid == rejection.c.sop_uid)
    newest = named.where(instance.c.study_uid == study_uid).order_by(rejection.c.id.desc()).limit(1)
    return str(tx.execute(newest).scalar() or "")


def dead(tx: sa.Connection, sent: Delivery, status: int | None, reason: str, now: float) -> None:
    """Not delivered and not tried again by itself."""
    if _state(tx, sent) != DeliveryState.PENDING:
        return  # withdrawn meanwhile: nobody needs to look
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(state=DeliveryState.DEAD, status=status, reason=reason, attempts=sent.attempts + 1, done_at=now)
    )
    add_event(tx, now, sent.study_uid, "DELIVERY_DEAD", f"{sent.sop_uid} to {sent.destination}: {reason}")


def pause(tx: sa.Connection, to: str, reason: str, now: float, probe_at: float) -> None:
    """Stop sending to a destination; its objects stay pending and one probe goes out at `probe_at`."""
    row = tx.execute(sa.select(destination.c.paused_since).where(destination.c.name == to)).first()
    if row is None:
        tx.execute(destination.insert().values(name=to, paused_since=now, reason=reason, probe_at=probe_at))
    else:
        tx.execute(
            destination.update()
            .where(destination.c.name == to)
            .values(
                paused_since=row.paused_since if row.paused_since is not None else now, reason=reason, probe_at=probe_at
            )
        )
    if row is None or row.paused_since is None:
        add_event(tx, now, None, "DESTINATION_PAUSED", f"{to}: {reason}")


def resume(tx: sa.Connection, to: str, now: float) -> None:
    """The destination took an object or answered an echo: everything pending flows again, at once."""
    done = tx.execute(
        destination.update()
        .where(destination.c.name == to, destination.c.paused_since.is_not(None))
        .values(paused_since=None, reason="")
    )
    if done.rowcount:
        tx.execute(
            delivery.update()
            .where(delivery.c.destination == to, delivery.c.state == DeliveryState.PENDING)
            .values(next_at=now)
        )
        add_event(tx, now, None, "DESTINATION_RESUMED", to)


def paused(tx: sa.Connection, to: str) -> Pause | None:
    """Whether and why a destination is paused."""
    row = tx.execute(
        sa.select(destination).where(destination.c.name == to, destination.c.paused_since.is_not(None))
    ).first()
    return None if row is None else Pause(row.paused_since, row.reason, row.probe_at)


def retry(tx: sa.Connection, study_uid: str, now: float) -> int:
    """An operator's second chance for DEAD deliveries of a study; pending ones go at once."""
    revived = tx.execute(
        delivery.update()
        .where(delivery.c.study_uid == study_uid, delivery.c.state == DeliveryState.DEAD)
        .values(state=DeliveryState.PENDING, attempts=0, created_at=now, next_at=now, done_at=None)
    )
    tx.execute(
        delivery.update()
        .where(delivery.c.study_uid == study_uid, delivery.c.state == DeliveryState.PENDING)
        .values(next_at=now)
    )
    return int(revived.rowcount)


def hold(tx: sa.Connection, one: Delivery, digest: str, reason: str, now: float) -> int:
    """Keep back what waits of this object's revision: it stands under another identity there. `reason`: no PHI."""
    study_uid, to = one.study_uid, one.destination
    revision = sa.select(output.c.revision).where(output.c.sop_uid == one.sop_uid).scalar_subquery()
    same = sa.select(output.c.sop_uid).where(output.c.study_uid == study_uid, output.c.revision == revision)
    held = tx.execute(
        delivery.update()
        .where(
            delivery.c.study_uid == study_uid,
            delivery.c.destination == to,
            delivery.c.state == DeliveryState.PENDING,
            delivery.c.sop_uid.in_(same),
        )
        .values(state=DeliveryState.HELD, reason=reason)
    )
    remember_identity(tx, study_uid, to, digest, "DIFFERS", now)
    add_event(tx, now, study_uid, "DELIVERY_HELD", f"{held.rowcount} objects for {to}: {reason}")
    return int(held.rowcount)


def release(tx: sa.Connection, study_uid: str, now: float, *, accept: bool) -> int:
    """Held objects go on: as they are by an operator's word (`accept`), or to be checked again."""
    if accept:
        tx.execute(
            identity.update()
            .where(identity.c.study_uid == study_uid, identity.c.state == "DIFFERS")
            .values(state="ACCEPTED", at=now)
        )
    released = tx.execute(
        delivery.update()
        .where(delivery.c.study_uid == study_uid, delivery.c.state == DeliveryState.HELD)
        .values(state=DeliveryState.PENDING, attempts=0, created_at=now, next_at=now, reason="")
    )
    return int(released.rowcount)


def remember_identity(tx: sa.Connection, study_uid: str, to: str, digest: str, state: str, now: float) -> None:
    """What the last check said: AGREED or DIFFERS."""
    same = (identity.c.study_uid == study_uid, identity.c.destination == to, identity.c.digest == digest)
    if tx.execute(identity.update().where(*same).values(state=state, at=now)).rowcount == 0:
        values = {"study_uid": study_uid, "destination": to, "digest": digest, "state": state, "at": now}
        tx.execute(identity.insert().values(**values))


def identity_known(tx: sa.Connection, study_uid: str, to: str, digest: str, since: float) -> bool:
    """True = an operator accepted this identity, or it agreed at `since` or later."""
    row = tx.execute(
        sa.select(identity.c.state, identity.c.at).where(
            identity.c.study_uid == study_uid, identity.c.destination == to, identity.c.digest == digest
        )
    ).first()
    return row is not None and (row.state == "ACCEPTED" or (row.state == "AGREED" and row.at >= since))


def drop_held(tx: sa.Connection, study_uid: str, route: str, revision: int, now: float) -> None:
    """A newer revision is reported: what an older one still holds back is never sent."""
    older = sa.select(output.c.sop_uid).where(
        output.c.study_uid == study_uid, output.c.route == route, output.c.revision < revision
    )
    dropped = tx.execute(
        delivery.update()
        .where(delivery.c.state == DeliveryState.HELD, delivery.c.sop_uid.in_(older))
        .values(state=DeliveryState.WITHDRAWN, reason=f"revision {revision} took its place", done_at=now)
    )
    if dropped.rowcount:
        text = f"{route}: {dropped.rowcount} held objects are never sent, revision {revision} took their place"
        add_event(tx, now, study_uid, "DELIVERY_WITHDRAWN", text)


def held_counts(tx: sa.Connection) -> dict[str, int]:
    """Per destination: how many objects are held."""
    rows = tx.execute(
        sa.select(delivery.c.destination, sa.func.count())
        .where(delivery.c.state == DeliveryState.HELD)
        .group_by(delivery.c.destination)
    ).all()
    return {row[0]: row[1] for row in rows}


def backlog(tx: sa.Connection) -> dict[str, tuple[int, float]]:
    """Per destination: how many objects are pending, and when the oldest was made."""
    rows = tx.execute(
        sa.select(delivery.c.destination, sa.func.count(), sa.func.min(delivery.c.created_at))
        .where(delivery.c.state == DeliveryState.PENDING)
        .group_by(delivery.c.destination)
    ).all()
    return {name: (count, oldest) for name, count, oldest in rows}


def earlier_srs(tx: sa.Connection, study_uid: str, route: str, revision: int) -> list[Output]:
    """This route's SRs of earlier revisions: the predecessors of the new one, each of its own variant."""
    rows = tx.execute(
        sa.select(output)
        .where(
            output.c.study_uid == study_uid,
            output.c.route == route,
            output.c.kind == "sr",
            output.c.revision < revision,
        )
        .order_by(output.c.revision, output.c.sop_uid)
    ).mappings()
    return [Output(**{name: row[name] for name in Output.__dataclass_fields__}) for row in rows]


def dead_counts(tx: sa.Connection) -> dict[str, int]:
    """Per destination: how many objects need a person."""
    rows = tx.execute(
        sa.select(delivery.c.destination, sa.func.count())
        .where(delivery.c.state == DeliveryState.DEAD)
        .group_by(delivery.c.destination)
    ).all()
    return {row[0]: row[1] for row in rows}


def paused_names(tx: sa.Connection) -> set[str]:
    """The destinations that are paused now."""
    return set(tx.execute(sa.select(destination.c.name).where(destination.c.paused_since.is_not(None))).scalars())


def last_received(tx: sa.Connection, study_uid: str) -> float:
    """When the study's last instance came."""
    return float(tx.execute(sa.select(study.c.last_received).where(study.c.uid == study_uid)).scalar_one())

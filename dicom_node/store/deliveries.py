"""Queries on outputs, deliveries and destinations. Each takes an open transaction.

An output is written once and those bytes are sent, again and again if need be: a repeated send is a harmless duplicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from dicom_node.store.jobs import AGEING_SECONDS
from dicom_node.store.ledger import add_event
from dicom_node.store.schema import DeliveryState, delivery, destination, output, study


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
    """How often it was sent; an association that did not come about is no attempt."""
    unclear: int
    """Answers of unclear meaning among them."""
    failing_since: float | None
    created_at: float
    priority: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How we stand with a destination."""

    paused_since: float | None
    """It refuses us for a reason only a person can mend. Its objects stay pending, for as long as it takes."""
    reason: str
    """Why it is paused or out of reach; "" = all is well."""
    probe_at: float
    """Nothing is sent before."""


WELL = Standing(None, "", 0.0)


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


def pending(
    tx: sa.Connection, to: str, now: float, *, since: float = 0.0, farthest: float = 1e9, limit: int = 50
) -> list[Delivery]:
    """What may be sent to a destination now, most urgent first; nothing of a held study.

    Ageing counts from `since`, when the queue last began to move: after an outage STAT still goes first. A time
    further away than `farthest` was written before the clock was set back, and has come.
    """
    held = sa.select(study.c.uid).where(study.c.hold.is_not(None))
    waits_from = sa.case((delivery.c.created_at > since, delivery.c.created_at), else_=since)
    urgency = delivery.c.priority + (now - waits_from) / AGEING_SECONDS
    order = (urgency.desc(), delivery.c.id)
    due = sa.or_(delivery.c.next_at <= now, delivery.c.next_at > now + farthest)
    # First which, then what: sorting whole rows of a long queue costs five times as much.
    first = (
        sa.select(delivery.c.id)
        .where(_waiting(to), due, delivery.c.study_uid.not_in(held))
        .order_by(*order)
        .limit(limit)
    )
    rows = tx.execute(
        sa.select(delivery, output.c.sop_class_uid, output.c.transfer_syntax_uid, output.c.file, output.c.sha256)
        .join(output, output.c.sop_uid == delivery.c.sop_uid)
        .where(delivery.c.id.in_(first))
        .order_by(*order)
    ).mappings()
    return [Delivery(**{name: row[name] for name in Delivery.__dataclass_fields__}) for row in rows]


def next_at(tx: sa.Connection, to: str) -> float | None:
    """When the next object for a destination falls due; those of held studies wait for a person."""
    held = sa.select(study.c.uid).where(study.c.hold.is_not(None))
    value: float | None = tx.execute(
        sa.select(sa.func.min(delivery.c.next_at)).where(_waiting(to), delivery.c.study_uid.not_in(held))
    ).scalar()
    return value


def _waiting(to: str) -> sa.ColumnElement[bool]:
    return sa.and_(delivery.c.destination == to, delivery.c.state == DeliveryState.PENDING)


def delivered(tx: sa.Connection, sent: Delivery, status: int, now: float, note: str = "") -> None:
    """The destination has it."""
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(state=DeliveryState.DELIVERED, status=status, reason=note, attempts=sent.attempts + 1, done_at=now)
    )
    text = f"{sent.sop_uid} to {sent.destination}: 0x{status:04X}" + (f" ({note})" if note else "")
    add_event(tx, now, sent.study_uid, "DELIVERED", text)


def again(
    tx: sa.Connection, sent: Delivery, status: int | None, reason: str, now: float, at: float, *, unclear: bool = False
) -> None:
    """Sent and not delivered; will be sent again at `at`. `unclear`: the answer may as well mean never."""
    since = sent.failing_since if sent.failing_since is not None or unclear else now
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(
            status=status,
            reason=reason,
            attempts=sent.attempts + 1,
            unclear=sent.unclear + unclear,
            failing_since=since,
            next_at=at,
        )
    )
    if sent.attempts == 0:
        _delayed(tx, now, sent.study_uid, sent.destination, reason)


def answered(tx: sa.Connection, sent: Delivery, status: int) -> None:
    """Sent, and the answer says something about the destination rather than about this object."""
    tx.execute(
        delivery.update().where(delivery.c.id == sent.id).values(status=status, attempts=delivery.c.attempts + 1)
    )


def dead(tx: sa.Connection, sent: Delivery, status: int | None, reason: str, now: float, *, sent_now: int = 1) -> None:
    """Not delivered and not tried again by itself. `sent_now`: 0 = it was not even sent."""
    tx.execute(
        delivery.update()
        .where(delivery.c.id == sent.id)
        .values(state=DeliveryState.DEAD, status=status, reason=reason, attempts=sent.attempts + sent_now, done_at=now)
    )
    add_event(tx, now, sent.study_uid, "DELIVERY_DEAD", f"{sent.sop_uid} to {sent.destination}: {reason}")


def _delayed(tx: sa.Connection, now: float, study_uid: str, to: str, reason: str) -> None:
    add_event(tx, now, study_uid, "DELIVERY_DELAYED", f"to {to}: {reason}; tried again")


# -- destinations


def standing(tx: sa.Connection, to: str) -> Standing:
    """How we stand with a destination."""
    row = tx.execute(sa.select(destination).where(destination.c.name == to)).first()
    return WELL if row is None else Standing(row.paused_since, row.reason, row.probe_at)


def wait(tx: sa.Connection, to: str, before: Standing, reason: str, probe_at: float) -> None:
    """Leave a destination alone until `probe_at`. Where it is paused, it stays so, for the reason it was."""
    _stand(
        tx, to, Standing(before.paused_since, before.reason if before.paused_since is not None else reason, probe_at)
    )


def out_of_reach(tx: sa.Connection, to: str, reason: str, now: float) -> None:
    """No association comes about: everything that is due waits for the same thing, and `explain` says for what."""
    due = sa.and_(_waiting(to), delivery.c.next_at <= now)
    first = sa.select(delivery.c.study_uid).where(due, delivery.c.failing_since.is_(None)).distinct()
    for study_uid in tx.execute(first).scalars().all():
        _delayed(tx, now, study_uid, to, reason)
    tx.execute(
        delivery.update()
        .where(due, sa.or_(delivery.c.failing_since.is_(None), delivery.c.reason != reason))
        .values(failing_since=sa.func.coalesce(delivery.c.failing_since, now), reason=reason)
    )


def give_up(tx: sa.Connection, to: str, before: float, why: str, now: float) -> int:
    """DEAD: everything for a destination that has been failing since before `before`. Returns how many."""
    expired = tx.execute(
        delivery.update()
        .where(_waiting(to), delivery.c.failing_since < before)
        .values(state=DeliveryState.DEAD, reason=f"{why}: " + delivery.c.reason, done_at=now)
        .returning(delivery.c.study_uid, delivery.c.sop_uid, delivery.c.reason)
    ).all()
    for row in expired:
        add_event(tx, now, row.study_uid, "DELIVERY_DEAD", f"{row.sop_uid} to {to}: {row.reason}")
    return len(expired)


def pause(tx: sa.Connection, to: str, reason: str, now: float, probe_at: float) -> None:
    """Stop sending to a destination; its objects stay pending and one probe goes out at `probe_at`."""
    before = standing(tx, to)
    since = now if before.paused_since is None else before.paused_since
    _stand(tx, to, Standing(since, reason, probe_at))
    # A configuration that waits for a person is no failure of theirs: give_up_hours do not run.
    tx.execute(
        delivery.update()
        .where(_waiting(to), sa.or_(delivery.c.failing_since.is_not(None), delivery.c.reason != reason))
        .values(failing_since=None, reason=reason)
    )
    if before.paused_since is None:
        add_event(tx, now, None, "DESTINATION_PAUSED", f"{to}: {reason}")


def resume(tx: sa.Connection, to: str, now: float) -> None:
    """The destination answered: everything pending flows again, at once."""
    before = standing(tx, to)
    if before == WELL:
        return
    _stand(tx, to, WELL)
    tx.execute(delivery.update().where(_waiting(to), delivery.c.attempts == 0).values(failing_since=None, reason=""))
    if before.paused_since is not None:
        add_event(tx, now, None, "DESTINATION_RESUMED", to)


def _stand(tx: sa.Connection, to: str, standing: Standing) -> None:
    values = {"paused_since": standing.paused_since, "reason": standing.reason, "probe_at": standing.probe_at}
    if not tx.execute(destination.update().where(destination.c.name == to).values(**values)).rowcount:
        tx.execute(destination.insert().values(name=to, **values))


def hold_class(tx: sa.Connection, refused: Delivery, status: int | None, reason: str, now: float, at: float) -> None:
    """The destination takes no object of this SOP Class: all of them wait until one is tried again at `at`."""
    same = sa.select(output.c.sop_uid).where(output.c.sop_class_uid == refused.sop_class_uid)
    waiting = sa.and_(_waiting(refused.destination), delivery.c.sop_uid.in_(same), delivery.c.next_at < at)
    first = sa.select(delivery.c.study_uid).where(waiting, delivery.c.reason != reason).distinct()
    for study_uid in tx.execute(first).scalars().all():
        _delayed(tx, now, study_uid, refused.destination, reason)
    tx.execute(delivery.update().where(waiting).values(next_at=at, status=status, reason=reason, failing_since=None))


def release_class(tx: sa.Connection, taken: Delivery, now: float) -> None:
    """An object of a SOP Class that was refused was taken: the others need not wait."""
    same = sa.select(output.c.sop_uid).where(output.c.sop_class_uid == taken.sop_class_uid)
    tx.execute(
        delivery.update()
        .where(
            _waiting(taken.destination),
            delivery.c.sop_uid.in_(same),
            delivery.c.next_at > now,
            delivery.c.failing_since.is_(None),  # not those that fail, or are unclear, for reasons of their own
            delivery.c.unclear == 0,
        )
        .values(next_at=now)
    )


def retry(tx: sa.Connection, study_uid: str, now: float) -> int:
    """An operator's second chance for DEAD deliveries of a study; pending ones, and their destinations, at once."""
    revived = tx.execute(
        delivery.update()
        .where(delivery.c.study_uid == study_uid, delivery.c.state == DeliveryState.DEAD)
        .values(state=DeliveryState.PENDING, attempts=0, unclear=0, failing_since=None, created_at=now, done_at=None)
    )
    waiting = sa.and_(delivery.c.study_uid == study_uid, delivery.c.state == DeliveryState.PENDING)
    tx.execute(delivery.update().where(waiting).values(next_at=now))
    theirs = sa.select(delivery.c.destination).where(waiting)
    sooner = sa.and_(destination.c.name.in_(theirs), destination.c.probe_at > now)
    tx.execute(destination.update().where(sooner).values(probe_at=now))
    return int(revived.rowcount)


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

"""What an Instance Availability Notification said (PS3.4 annex R), kept until the study holds it: a hint, no more.

When every instance the notification named is here, waiting longer serves nothing: the study's timer runs out now. A
notification never makes a study complete that lacks one of them, and never replaces the timer.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import sqlalchemy as sa

from dicom_node.store.ledger import add_event
from dicom_node.store.schema import availability, instance, study

MAX_INSTANCES = 20_000


def announce(tx: sa.Connection, study_uid: str, sop_uids: Collection[str], now: float) -> None:
    """Keep the newest notification of a study, and act on it if everything is here already."""
    tx.execute(availability.delete().where(availability.c.study_uid == study_uid))
    if not sop_uids or len(sop_uids) > MAX_INSTANCES:
        return
    text = json.dumps(sorted(set(sop_uids)))
    tx.execute(availability.insert().values(study_uid=study_uid, sop_uids=text, at=now))
    hurry(tx, study_uid, now)


def hurry(tx: sa.Connection, study_uid: str, now: float) -> bool:
    """The study is due now, if a notification named it and everything it named is here."""
    text = tx.execute(sa.select(availability.c.sop_uids).where(availability.c.study_uid == study_uid)).scalar()
    if text is None:
        return False
    held = set(
        tx.execute(
            sa.select(instance.c.sop_uid).where(instance.c.study_uid == study_uid, instance.c.current, ~instance.c.own)
        ).scalars()
    )
    wanted = set(json.loads(text))
    if not wanted <= held:
        return False
    due = tx.execute(study.update().where(study.c.uid == study_uid, study.c.due_at > now).values(due_at=now))
    tx.execute(availability.delete().where(availability.c.study_uid == study_uid))
    if due.rowcount:
        text = f"a notification named {len(wanted)} instances and all are here: the study is not waited for any longer"
        add_event(tx, now, study_uid, "AVAILABLE", text)
    return bool(due.rowcount)


def forget(tx: sa.Connection, before: float) -> None:
    """Notifications of studies that never came."""
    tx.execute(availability.delete().where(availability.c.at < before))

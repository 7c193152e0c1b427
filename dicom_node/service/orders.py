"""What an operator may order: `retry` and `complete`. Runs where the ledger's only writer is."""

from __future__ import annotations

import sqlalchemy as sa

from dicom_node import assemble
from dicom_node.service.control import Message
from dicom_node.store import deliveries, inspect, jobs, studies
from dicom_node.store.ledger import Ledger, add_event


def apply_command(ledger: Ledger, message: Message) -> Message:
    """The answer is `{"text"}`, or `{"error"}` where nothing was changed."""
    kind, uid = message.get("kind"), str(message.get("study", ""))
    now = ledger.clock()
    if kind not in ("retry", "complete"):
        return {"error": f"unknown command {kind!r}"}
    with ledger.write() as tx:
        if not studies.exists(tx, uid):
            return {"error": "unknown study"}
        if kind == "retry":
            revived, resent = jobs.retry(tx, uid, now), deliveries.retry(tx, uid, now)
            checked = deliveries.release(tx, uid, now, accept=False)
            add_event(tx, now, uid, "RETRY_ORDERED", f"by an operator: {revived} jobs, {resent} deliveries")
            text = f"{revived} dead jobs and {resent} dead deliveries will be tried again"
            return {"text": text + (f", {checked} held objects are checked again" if checked else "")}
        return {"text": _complete(tx, uid, now, accept_conflict=bool(message.get("accept_conflict")))}


def _complete(tx: sa.Connection, uid: str, now: float, *, accept_conflict: bool) -> str:
    row = inspect.study_row(tx, uid)
    said = []
    if row["hold"] is not None:
        if row["hold"] == "PATIENT_CONFLICT" and not accept_conflict:
            return (
                "nothing was changed: the instances disagree on the patient; if they are of one patient all the same, "
                "say so with --accept-conflict"
            )
        studies.set_hold(tx, uid, None, accept_conflict=accept_conflict)
        said.append("the hold is lifted")
    released = jobs.release(tx, uid, now)
    if released:
        said.append(f"{released} held jobs go on")
    sent = deliveries.release(tx, uid, now, accept=True)
    if sent:
        said.append(f"{sent} held objects are sent")
    if row["due_at"] is not None:
        said.append(f"revision {assemble.complete(tx, uid, now)} is assembled")
    text = ", ".join(said) or "nothing was waiting"
    add_event(tx, now, uid, "COMPLETE_ORDERED", f"by an operator: {text}")
    return text

"""What the operator asks and orders: `status`, `explain`, `check`, `echo`, `retry`, `complete`, `engines list`.

Each question has a function that answers in plain data (the public JSON shape) and one that writes it as text.
Reads the ledger read-only; orders go to the running node over its control socket, which alone writes.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dicom_node import assemble
from dicom_node.config import Config
from dicom_node.errors import NodeError, UnknownTargetError
from dicom_node.service.control import Message, ask
from dicom_node.store import deliveries, inspect, jobs, studies
from dicom_node.store.ledger import Ledger, add_event, open_read_only

Answer = dict[str, Any]


# -- status


def status(config: Config) -> Answer:
    """`{states, oldest_undelivered_seconds, destinations}`."""
    engine = open_read_only(config.store.root, config.store.ledger)
    with engine.connect() as tx:
        return inspect.status(tx, list(config.deliver.destinations), time.time())


def status_text(answer: Answer) -> str:
    """For a terminal."""
    lines = ["studies"]
    lines += [f"  {name:<11}{count:>7}" for name, count in answer["states"].items() if count]
    if len(lines) == 1:
        lines.append("  none yet")
    oldest = answer["oldest_undelivered_seconds"]
    lines.append("oldest undelivered object: " + ("none" if oldest is None else f"{oldest:.0f} s"))
    for d in answer["destinations"]:
        lines.append(f"destination {d['name']}: {d['pending']} pending, {d['delivered']} delivered, {d['dead']} dead")
        if d["paused"]:
            lines.append(f"  PAUSED: {d['reason']}")
    return "\n".join(lines)


# -- explain


def explain(config: Config, study_uid: str) -> Answer:
    """What happened to a study and why. Raises UnknownTargetError."""
    engine = open_read_only(config.store.root, config.store.ledger)
    with engine.connect() as tx:
        answer = inspect.explain(tx, study_uid)
    if answer is None:
        raise UnknownTargetError(f"no study {study_uid} in the ledger of {config.store.root}")
    return answer


def explain_text(answer: Answer) -> str:
    """For a terminal."""
    lines = [
        f"study {answer['study']}",
        f"state {answer['state']}" + (f" ({answer['hold']})" if answer["hold"] else ""),
    ]
    lines.append(f"revision {answer['revision']}, {answer['instances']} instances")
    for o in answer["outcomes"]:
        said = str(o["outcome"] or o["state"]) + (f" ({o['code']})" if o["code"] else "")
        lines.append(f"outcome: {o['route'] or 'no route'}, revision {o['revision']}: {said}")
        if o["detail"]:
            lines.append(f"  {o['detail']}")
        if o["engine"] and o["package"]:
            lines.append(f"  engine {o['engine']}, package {o['package']}, digest {str(o['digest'])[:16]}…")
    for d in answer["deliveries"]:
        lines.append(
            f"delivery to {d['destination']}: {d['state']}"
            + (f", status {d['status']}" if d["status"] else "")
            + f", {d['attempts']} attempts, {d['sop_instance_uid']}"
            + (f": {d['reason']}" if d["reason"] else "")
        )
    lines.append("what happened")
    lines += [f"  {_clock(e['at'])}  {e['code']:<20} {e['text']}" for e in answer["events"]]
    if answer["evidence"]:
        lines.append("how the routes judged it")
        lines += _verdicts_text(answer["evidence"])
    return "\n".join(lines)


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


# -- orders


def command(config: Config, kind: str, study_uid: str, *, accept_conflict: bool = False) -> str:
    """`retry` or `complete`, by the running node, or on the ledger itself when no node runs on this root."""
    message: Message = {"kind": kind, "study": study_uid, "accept_conflict": accept_conflict}
    try:
        answer = ask(config.store.root / "run", message)
    except OSError:
        from dicom_node.store.files import lock_root

        with lock_root(config.store.root, "work"):
            ledger = Ledger(config.store.root, config.store.ledger)
            answer = apply_command(ledger, message)
            ledger.close()
    if answer.get("error") == "unknown study":
        raise UnknownTargetError(f"no study {study_uid} in the ledger of {config.store.root}")
    if "error" in answer:
        raise NodeError(str(answer["error"]))
    return str(answer["text"])


def apply_command(ledger: Ledger, message: Message) -> Message:
    """Runs where the ledger's only writer is."""
    kind, uid = message.get("kind"), str(message.get("study", ""))
    now = ledger.clock()
    if kind not in ("retry", "complete"):
        return {"error": f"unknown command {kind!r}"}
    with ledger.write() as tx:
        if not studies.exists(tx, uid):
            return {"error": "unknown study"}
        if kind == "retry":
            revived, resent = jobs.retry(tx, uid, now), deliveries.retry(tx, uid, now)
            add_event(tx, now, uid, "RETRY_ORDERED", f"by an operator: {revived} jobs, {resent} deliveries")
            return {"text": f"{revived} dead jobs and {resent} dead deliveries will be tried again"}
        return {"text": _complete(tx, uid, now, accept_conflict=bool(message.get("accept_conflict")))}


def _complete(tx: Any, uid: str, now: float, *, accept_conflict: bool) -> str:
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
    if row["due_at"] is not None:
        said.append(f"revision {assemble.complete(tx, uid, now)} is assembled")
    text = ", ".join(said) or "nothing was waiting"
    add_event(tx, now, uid, "COMPLETE_ORDERED", f"by an operator: {text}")
    return text

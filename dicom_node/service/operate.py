"""What the operator asks and orders: `status`, `explain`, `check`, `echo`, `retry`, `complete`, `engines …`.

Each question has a function that answers in plain data (the public JSON shape) and one that writes it as text.
Reads the ledger read-only; orders go to the running node over its control socket, which alone writes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dicom_node.config import Config
from dicom_node.errors import NodeError, UnknownTargetError
from dicom_node.service.control import Message, ask
from dicom_node.service.orders import apply_command
from dicom_node.store import inspect
from dicom_node.store.ledger import Ledger, open_read_only

Answer = dict[str, Any]
ANSWER_SECONDS = 10.0
SWITCH_SECONDS = 180.0
"""A switch waits for the job in hand, then loads the package in every worker."""


# -- status


def status(config: Config) -> Answer:
    """Counts, what every destination still waits for, and which studies wait for a person."""
    engine = open_read_only(config.store.root, config.store.ledger)
    with engine.connect() as tx:
        return inspect.status(tx, list(config.deliver.destinations), time.time())


def status_text(answer: Answer) -> str:
    """For a terminal."""
    lines = ["studies"]
    lines += [f"  {name:<11}{count:>7}" for name, count in answer["states"].items() if count]
    if len(lines) == 1:
        lines.append("  none yet")
    if answer["attention"]:
        lines.append("studies that need a person (dicom-node explain STUDY_UID)")
        lines += [f"  {a['why']:<18} since {_clock(a['since'])}  {a['study']}" for a in answer["attention"]]
    if answer["attention_left_out"]:
        lines.append(f"  … and {answer['attention_left_out']} more")
    oldest = answer["oldest_undelivered_seconds"]
    lines.append("oldest undelivered object: " + ("none" if oldest is None else f"{oldest:.0f} s"))
    for d in answer["destinations"]:
        lines.append(f"destination {d['name']}: {d['pending']} pending, {d['delivered']} delivered, {d['dead']} dead")
        if d["held"]:
            lines.append(f"  HELD: {d['held']}; explain says of which identity")
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
    if config.audit.path is not None or config.audit.syslog is not None:
        with contextlib.suppress(OSError):  # an access is told to the running node, which keeps the trail
            ask(config.store.root / "run", {"kind": "explain", "study": study_uid})
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
        who = o["route"] or ("every route" if o["stage"] == "clinical" else "no route")
        lines.append(f"outcome: {who}, revision {o['revision']}: {said}")
        if o["detail"]:
            lines.append(f"  {o['detail']}")
        lines += _clinical_lines(o["clinical"])
        if o["engine"] and o["package"]:
            lines.append(f"  engine {o['engine']}, package {o['package']}, digest {str(o['digest'])[:16]}…")
        if o["backend"]:
            lines.append(f"  backend {o['backend']}, {o['precision']}, accepted: {o['acceptance']}")
    lines += [_delivery_line(d) for d in answer["deliveries"]]
    lines += [_withdrawal_line(w) for w in answer["withdrawals"]]
    lines.append("what happened")
    lines += [f"  {_clock(e['at'])}  {e['code']:<20} {e['text']}" for e in answer["events"]]
    if answer["evidence"]:
        lines.append("how the routes judged it")
        lines += [line for verdict in answer["evidence"] for line in ("", *_verdict_lines(verdict))]
    return "\n".join(lines)


def _clinical_lines(clinical: Answer | None) -> list[str]:
    """What the result was made with, and where each value is from."""
    if clinical is None:
        return []
    lines = [
        f"  clinical value {c['name']}{' ' + c['laterality'] if c['laterality'] else ''}: {c['value']:g} {c['unit']}"
        + (f", of {c['time']}" if c["time"] else "")
        + f", source {c['source']}"
        for c in clinical["used"]
    ]
    return lines + ([f"  clinical values not used: {clinical['not_used']}"] if clinical["not_used"] else [])


def _verdict_lines(verdict: Answer) -> list[str]:
    from dicom_node.route import format_verdict

    return ["  " + line for line in format_verdict(verdict).splitlines()]


def _delivery_line(d: Answer) -> str:
    said = f"delivery to {d['destination']}: {d['state']}" + (f", status {d['status']}" if d["status"] else "")
    said += f", {d['attempts']} attempts, {d['sop_instance_uid']}"
    return said + (f": {d['reason']}" if d["reason"] else "")


def _withdrawal_line(w: Answer) -> str:
    said = "withdrawn from" if w["done"] else "WITHDRAW from"
    return f"{said} {w['destination']}: {w['sop_instance_uid']}, its images are rejected ({w['code']} {w['reason']})"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def explain_files(
    config: Config, config_path: Path, paths: list[Path], calling_ae: str = "", called_ae: str = ""
) -> tuple[Answer, int]:
    """How the routes would judge these files, attribute by attribute, rule by rule. 1 = one of them cannot be read."""
    from dicom_node.clinical import ClinicalValues
    from dicom_node.packages import wanted_of
    from dicom_node.route import check_routes
    from dicom_node.route import explain_files as judge
    from dicom_node.store.header import read_header

    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not f.is_dir()]
    check_routes(config.routes, str(config_path))
    fallback = config.store.fallback_charset or ""
    known = ClinicalValues(wanted_of(config.engines.path), config.clinical)
    engines = [route.engine for route in config.routes]
    answer = judge(
        config.routes,
        files,
        lambda path: read_header(path, fallback),
        calling_ae=calling_ae,
        called_ae=called_ae or config.receive.ae_title,
        clinical=lambda study: known.known(study, engines),
    )
    return answer, 1 if answer["unreadable"] or not files else 0


def explain_files_text(answer: Answer) -> str:
    """For a terminal."""
    from dicom_node.route import format_explanation

    return format_explanation(answer)


# -- echo, engines


def echo(config: Config, name: str) -> tuple[Answer, int]:
    """C-ECHO one destination. Raises UnknownTargetError."""
    from dicom_node.dimse.sender import Sender

    destination = config.deliver.destinations.get(name)
    if destination is None:
        known = ", ".join(config.deliver.destinations) or "none is defined"
        raise UnknownTargetError(f"no destination {name!r} in deliver.destinations ({known})")
    started = time.monotonic()
    sender = Sender(config.receive.ae_title)
    outcome = sender.echo(destination)
    sender.close()
    seconds = round(time.monotonic() - started, 3)
    return {"destination": name, "ok": outcome.ok, "seconds": seconds, "reason": outcome.reason}, 0 if outcome.ok else 1


def echo_text(answer: Answer) -> str:
    """For a terminal."""
    said = f"answered in {answer['seconds']:.3f} s" if answer["ok"] else f"does not answer: {answer['reason']}"
    return f"{answer['destination']} {said}"


def engines_list(config: Config) -> list[Answer]:
    """Tasks and packages, and whether they are accepted on this machine."""
    from dicom_node import packages

    return packages.engines_list(config)


def engines_text(answer: list[Answer]) -> str:
    """For a terminal."""
    lines = []
    for engine in answer:
        said = "available" if engine["available"] else f"not available: {engine['reason']}"
        lines.append(f"{engine['task']}: {engine['title']}\n  {said}")
        if engine["version"]:
            lines.append(
                f"  package {engine['version']} ({engine['intended_use']}), {engine['algorithm']}, "
                f"digest {str(engine['digest'])[:16]}…"
            )
        if engine["installed"]:
            used = ", ".join(engine["history"][:1]) or "none, so the package that comes with the task"
            lines.append(f"  installed: {', '.join(engine['installed'])}; in use: {used}")
        lines += [f"  {backend}: {state}" for backend, state in engine["backends"].items()]
        lines += _table_lines(engine["acceptance"])
    return "\n".join(lines) or "no task folder under engines.path"


def _table_lines(kept: Answer | None) -> list[str]:
    """The acceptance table of the last time a worker had the engine."""
    if kept is None:
        return []
    if kept["error"]:
        return [f"  refused {_clock(kept['at'])}: {kept['error']}"]
    about = f"{kept['backend']} {kept['precision']} ({kept['library']}), package {kept['version']}"
    return [f"  last accepted {_clock(kept['at'])} on {about}", *_tried_lines(kept["tried"])]


def _tried_lines(tried: list[Answer]) -> list[str]:
    """Every backend, and every model on it."""
    lines = []
    for t in tried:
        name = f"{t['backend']} {t['precision']}"
        cost = f"{t['milliseconds']:.1f} ms, loaded in {t['load_seconds']:.1f} s" if t["milliseconds"] else ""
        lines.append(f"    {name:<19}{t['status']:<10}{t['reason'] or cost}")
        lines += [f"      {note}" for note in t["notes"]]
        for line in t["lines"]:
            said = f"{line['cases']} golden cases, worst {line['worst']:.1e} of {line['tolerance']:.1e} allowed: ok"
            lines.append(f"      {line['model']:<17}{said}")
    return lines


def engines_install(config: Config, folder: Path) -> Answer:
    """Check a package and copy it below the store root; not yet active."""
    from dicom_node.service import models

    return models.install(config, folder)


def install_text(answer: Answer) -> str:
    """For a terminal."""
    name = f"{answer['task']} {answer['version']} ({answer['intended_use']}), digest {answer['digest'][:16]}…"
    if answer["already_installed"]:
        return f"{name}: installed already"
    lines = [_acceptance(line) for line in answer["accepted"]]
    return "\n".join(
        [*lines, f"{name}: installed; `engines activate {answer['task']} {answer['version']}` puts it to use"]
    )


def _acceptance(line: Answer) -> str:
    said = f"off by {line['worst']:.1e} of {line['tolerance']:.1e} allowed"
    return f"  {line['model']} on {line['backend']} {line['precision']}: {line['cases']} golden cases, {said}"


def engines_verify(config: Config, task: str | None) -> tuple[list[Answer], int]:
    """Hash every package again and replay its golden cases. Raises UnknownTargetError."""
    from dicom_node.service import models

    return models.verify(config, task)


def verify_text(answer: list[Answer]) -> str:
    """For a terminal."""
    lines = []
    for line in answer:
        about = f"{line['task']:<16}{line['version'] or '?':<18}{line['state']:<17}"
        lines.append(f"{about}{(line['digest'] or '')[:16]:<18}{'ok' if line['ok'] else 'REFUSED: ' + line['reason']}")
        lines += _tried_lines(line["tried"])
    return "\n".join(lines) or "no package"


def switch(config: Config, kind: str, task: str, version: str = "") -> str:
    """`activate` or `rollback`, by the running node between two jobs, or here when no node runs on this root."""
    from dicom_node.service import models

    models.task_folder(config, task)
    message: Message = {"kind": kind, "task": task, "version": version}
    patience = config.infer.timeout_seconds + SWITCH_SECONDS
    return _ordered(config, message, lambda ledger: _switch_here(config, ledger, message), patience)


def _switch_here(config: Config, ledger: Ledger, message: Message) -> Message:
    from dicom_node.log import Log
    from dicom_node.metrics import NullRecorder
    from dicom_node.service import models

    return models.Switch(config, ledger, Log.null(), NullRecorder(), []).apply(message)


# -- infer, check: see their own files


def infer_folder(config: Config, folder: Path, out: Path) -> tuple[Answer, int]:
    """The same line over files."""
    from dicom_node.service import folder as offline

    return offline.infer_folder(config, folder, out)


def infer_text(answer: Answer) -> str:
    """For a terminal."""
    lines = [f"{answer['files']} files, {len(answer['studies'])} studies"]
    lines += [f"rejected: {r['file']}: {r['reason']}" for r in answer["rejected"]]
    for study in answer["studies"]:
        lines.append(f"study {study['study']}")
        for o in study["outcomes"]:
            said = str(o["outcome"] or o["state"]) + (f" ({o['code']})" if o["code"] else "")
            lines.append(f"  {o['route'] or 'no route'}: {said}" + (f": {o['detail']}" if o["detail"] else ""))
        lines += [f"  {path}" for path in study["objects"]]
    return "\n".join(lines)


def check(config: Config) -> tuple[Answer, int]:
    """Is this configuration usable on this machine?"""
    from dicom_node.service import checks

    return checks.check(config)


def check_text(answer: Answer) -> str:
    """For a terminal."""
    lines = [f"{f['level']:<8}{f['about']:<26}{f['text']}" for f in answer["findings"]]
    return "\n".join([*lines, "well" if answer["ok"] else "not well: see above"])


# -- orders


def command(config: Config, kind: str, study_uid: str, *, accept_conflict: bool = False) -> str:
    """`retry` or `complete`, by the running node, or on the ledger itself when no node runs on this root."""
    message: Message = {"kind": kind, "study": study_uid, "accept_conflict": accept_conflict}
    return _ordered(config, message, lambda ledger: apply_command(ledger, message))


def _ordered(
    config: Config, message: Message, here: Callable[[Ledger], Message], patience: float = ANSWER_SECONDS
) -> str:
    try:
        answer = ask(config.store.root / "run", message, patience=patience)
    except OSError:
        from dicom_node.store.files import lock_root

        with lock_root(config.store.root, "work"):
            ledger = Ledger(config.store.root, config.store.ledger)
            answer = here(ledger)
            ledger.close()
    if answer.get("error") == "unknown study":
        raise UnknownTargetError(f"no study {message['study']} in the ledger of {config.store.root}")
    if "text" not in answer:
        raise NodeError(str(answer.get("error", "the node gave no answer")))
    return str(answer["text"])

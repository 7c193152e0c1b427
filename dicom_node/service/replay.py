"""`dicom-node replay`: the headers that the ledger keeps, judged by changed rules before these go live.

Reads only: the ledger is opened read-only, study by study, beside the running node; nothing is stored, sent or run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from dicom_node.clinical import ClinicalValues
from dicom_node.config import Config, load
from dicom_node.packages import wanted_of
from dicom_node.route import check_routes, differences, evaluate_all, format_differences, format_summary, say_rejected
from dicom_node.store import inspect, rejections, studies
from dicom_node.store.ledger import open_read_only
from dicom_node.study import Study

Answer = dict[str, Any]
Judged = list[dict[str, Any]]
_UNITS: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def seconds_of(text: str) -> float:
    """`7d`, `12h`, `30m`, `2w` in seconds. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if found is None or int(found[1]) == 0:
        raise ValueError("a number and m, h, d or w, such as 7d")
    return int(found[1]) * _UNITS[found[2]]


def replay(config: Config, config_path: Path, since: str, new_path: Path | None) -> Answer:
    """The studies of the last `since` whose routing would differ.

    With `new_path`: the rules of that file against those in force, both on the same stored headers. Without: the rules
    in force against what was decided when each study came. Raises ConfigError, LedgerError.
    """
    new = config if new_path is None else load(new_path)
    check_routes(config.routes, str(config_path))
    check_routes(new.routes, str(new_path or config_path))
    old_rules, new_rules = _Rules(config), _Rules(new)
    engine = open_read_only(config.store.root, config.store.ledger)
    compared = gone = undecided = 0
    found: list[Answer] = []
    with engine.connect() as tx:
        recent = inspect.received_since(tx, time.time() - seconds_of(since))
    for uid, revision in recent:
        with engine.connect() as tx:  # a connection each: a long look must not keep the write-ahead log from folding
            stored = _Stored.load(tx, uid, revision)
            before = inspect.verdicts(tx, uid, revision) if new_path is None else None
        if stored is None:
            gone += 1
            continue
        if new_path is None and not before:
            undecided += 1
            continue
        compared += 1
        if routes := differences(before or old_rules.judge(stored), new_rules.judge(stored)):
            found.append({"study": uid, "routes": routes})
    return {
        "since": since,
        "against": "decided" if new_path is None else "rules",
        "compared": compared,
        "without_headers": gone,
        "undecided": undecided,
        "different": len(found),
        "studies": found,
    }


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the ledger keeps of a study, as the route stage sees it."""

    study: Study
    whole: Study
    """With the images that a rejection note took out of use."""
    rejected: Mapping[str, str]
    gathered: Mapping[str, Any] | None
    """Clinical values that sources outside the study said then: nobody is asked again."""

    @classmethod
    def load(cls, tx: sa.Connection, uid: str, revision: int) -> _Stored | None:
        """None once its headers were removed after `store.keep_days`, or when it holds nothing but our own objects."""
        whole = studies.load_study(tx, uid, revision, Path, with_rejected=True)
        if not whole.instances:
            return None
        rejected = rejections.rejected(tx, uid)
        study = studies.load_study(tx, uid, revision, Path) if rejected else whole
        return cls(study, whole, rejected, inspect.gathered(tx, uid, revision))


class _Rules:
    """The routes of one configuration, with the clinical values that its engines would know."""

    def __init__(self, config: Config) -> None:
        self._routes = config.routes
        self._clinical = ClinicalValues(wanted_of(config.engines.path), config.clinical)

    def judge(self, stored: _Stored) -> Judged:
        engines = [route.engine for route in self._routes]
        clinical = self._clinical.known(stored.study, engines, stored.gathered)
        verdicts = evaluate_all(self._routes, stored.study, clinical)
        if stored.rejected:
            with_them = evaluate_all(self._routes, stored.whole, clinical)
            verdicts = say_rejected(verdicts, with_them, stored.rejected)
        return [verdict.to_json() for verdict in verdicts]


def replay_text(answer: Answer) -> str:
    """For a terminal."""
    return "\n".join(_lines(answer))


def _lines(answer: Answer) -> Iterator[str]:
    for study in answer["studies"]:
        yield from format_differences(study["study"], study["routes"])
    if len(answer["studies"]) > 1:
        yield "in all"
        yield from format_summary(answer["studies"])
    what = "the rules in force" if answer["against"] == "rules" else "what was decided"
    yield f"{answer['different']} of {answer['compared']} studies of the last {answer['since']} differ from {what}"
    if answer["without_headers"]:
        yield f"{answer['without_headers']} more hold no headers of others any longer (store.keep_days), or never did"
    if answer["undecided"]:
        yield f"{answer['undecided']} more are not judged yet"

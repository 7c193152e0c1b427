"""Index: takes the durable files of `incoming/` into the ledger. The file is the truth, the ledger its index.

One transaction for a batch, then the files move to `objects/`. A crash at any point leaves a file that the next sweep
finds: an id the ledger knows is only moved. Runs in the stages process, the ledger's only writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from dicom_node.errors import CannotUnderstandError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import availability, rejections, studies
from dicom_node.store.files import Files
from dicom_node.store.ledger import Ledger, add_event, has_event
from dicom_node.store.studies import Timing
from dicom_node.study import Instance, is_own_output

BATCH = 64
PRIORITY_STAT = 9


@dataclass(frozen=True, slots=True)
class Sweep:
    """What start-up found."""

    adopted: int
    missing: int


class IndexStage:
    """`run_once` indexes at most one batch; `adopt` compares files and rows at start."""

    def __init__(
        self, ledger: Ledger, files: Files, timing: Timing, priority_ae: Iterable[str], log: Log, recorder: Recorder
    ) -> None:
        self._ledger, self._files, self._timing = ledger, files, timing
        self._priority_ae = frozenset(priority_ae)
        self._log, self._recorder = log, recorder

    def run_once(self) -> bool:
        """Index up to `BATCH` waiting files. True = there was one."""
        waiting = self._files.list_incoming()
        self._recorder.set("dicom_node_incoming_files", len(waiting))
        if not waiting:
            return False
        self._index(waiting[:BATCH], after=self._file_away)
        return True

    def adopt(self) -> Sweep:
        """Files without a row are indexed where they lie; rows without a file are an alarm."""
        with self._ledger.read() as tx:
            known = studies.known_ids(tx)
        present = {path.stem: path for path in self._files.list_objects()}
        orphans = [path for instance_id, path in present.items() if instance_id not in known]
        for start in range(0, len(orphans), BATCH):
            self._index(orphans[start : start + BATCH], after=self._stay)
        missing = known - present.keys() - {path.stem for path in self._files.list_incoming()}
        if missing:
            with self._ledger.write() as tx:
                text = f"{len(missing)} indexed files are gone from the disk, the first is {min(missing)}"
                add_event(tx, self._ledger.clock(), None, "FILES_MISSING", text)
            self._log.error("files_missing", count=len(missing))
        return Sweep(len(orphans), len(missing))

    def _index(self, paths: list[Path], after: Callable[[list[tuple[str, str]]], None]) -> None:
        with self._ledger.read() as tx:
            known = studies.known_ids_among(tx, [path.stem for path in paths])
        parsed = [(path, self._parse(path)) for path in paths if path.stem not in known]
        happened: list[tuple[str, str]] = [(path.stem, "known") for path in paths if path.stem in known]
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            for path, instance in parsed:
                if instance is None:
                    text = f"file {path.stem} does not parse; moved to quarantine"
                    add_event(tx, now, None, "QUARANTINED", text)
                    continue
                own = is_own_output(instance.header) or studies.is_our_object(tx, instance.sop_instance_uid)
                priority = PRIORITY_STAT if instance.calling_ae_title in self._priority_ae else 0
                what = studies.add_instance(tx, instance, own=own, priority=priority, timing=self._timing, now=now)
                if instance.header.text_guessed and what not in ("duplicate", "own"):
                    _tell_guess(tx, now, instance.study_instance_uid)
                happened.append((path.stem, what))
                if what in ("new", "changed"):
                    self._rejects(tx, instance, now)
            for uid in {instance.study_instance_uid for _, instance in parsed if instance is not None}:
                availability.hurry(tx, uid, now)
        after(happened)
        for path, instance in parsed:
            if instance is None:
                self._files.quarantine(path, "the index cannot parse it")
                self._recorder.inc("dicom_node_quarantined_total")
            else:
                self._recorder.observe("dicom_node_index_lag_seconds", max(0.0, now - instance.received_at))

    def _rejects(self, tx: sa.Connection, instance: Instance, now: float) -> None:
        """A rejection note takes effect in the transaction that indexes it."""
        note = rejections.note_of(instance.header)
        if note is None:
            return
        effect = rejections.apply(tx, note, instance.study_instance_uid, now)
        for uid in effect.rerun:
            studies.arm(tx, uid, now, self._timing.quiet_seconds)
        self._recorder.inc("dicom_node_rejected_images_total", effect.images)

    def _parse(self, path: Path) -> Instance | None:
        try:
            meta, header = self._files.read_stored(path)
        except CannotUnderstandError:
            return None
        return Instance(
            instance_id=path.stem,
            header=header,
            transfer_syntax_uid=meta.transfer_syntax_uid,
            digest=self._files.dataset_digest(path),
            path=path,
            calling_ae_title=meta.calling_ae_title,
            called_ae_title=meta.called_ae_title,
            peer=meta.peer,
            association_id=meta.association_id,
            received_at=meta.received_at,
        )

    def _file_away(self, happened: list[tuple[str, str]]) -> None:
        for instance_id, what in happened:
            if what == "duplicate":
                self._files.remove_incoming(instance_id)
        self._files.move_to_objects(*(instance_id for instance_id, what in happened if what != "duplicate"))

    def _stay(self, happened: list[tuple[str, str]]) -> None:
        for instance_id, what in happened:
            if what == "duplicate":
                self._files.remove_object(instance_id)


def _tell_guess(tx: sa.Connection, now: float, study_uid: str) -> None:
    """Once a study: thousands of instances come from the same device with the same fault."""
    if not has_event(tx, study_uid, "CHARSET_GUESSED"):
        text = "text is not in the declared Specific Character Set (0008,0005), or none is declared; it was guessed"
        add_event(tx, now, study_uid, "CHARSET_GUESSED", text)

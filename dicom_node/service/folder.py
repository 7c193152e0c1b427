"""`dicom-node infer FOLDER --out DIR`: the same line over files, without a network. Retrospective work.

The same stages on a temporary root: each file is stored, indexed, assembled, routed, inferred and reported; the objects
are copied to DIR under names of our own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicom_node import assemble
from dicom_node.clinical import ClinicalValues
from dicom_node.clinical.stage import ClinicalStage
from dicom_node.config import Config, RouteAssemble
from dicom_node.errors import ConfigError, NodeError
from dicom_node.infer import InferStage
from dicom_node.log import Log
from dicom_node.metrics import NullRecorder
from dicom_node.packages import task_of, wanted_of
from dicom_node.report.stage import ReportStage
from dicom_node.route.complete import CompleteStage
from dicom_node.route.stage import RouteStage
from dicom_node.store import inspect, schema
from dicom_node.store.files import Files
from dicom_node.store.index import IndexStage
from dicom_node.store.ledger import Ledger
from dicom_node.worker import WorkerClient

BLOCK = 1 << 20
ASSOCIATION = "folder"


def infer_folder(config: Config, folder: Path, out: Path) -> tuple[dict[str, Any], int]:
    """The answer (docs/schemas/infer) and the exit code: 1 when a file was rejected or a job is DEAD."""
    if not folder.is_dir():
        raise ConfigError(str(folder), "", "a folder with DICOM files")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dicom-node-") as temporary:
        line = _Line(_offline(config, Path(temporary)))
        try:
            rejected = line.take(folder)
            line.run()
            studies = line.collect(out)
        finally:
            line.close()
    dead = any(o["state"] == "DEAD" for told in studies for o in told["outcomes"])
    answer = {"out": str(out), "files": line.stored + len(rejected), "rejected": rejected, "studies": studies}
    return answer, int(bool(rejected or dead))


def _offline(config: Config, root: Path) -> Config:
    """No destinations, no waiting (nothing more will come, so nothing is held), a root of its own."""
    routes = tuple(
        r.model_copy(
            update={
                "deliver": (),
                "assemble": RouteAssemble(),
                "if_incomplete": "give_up" if r.if_incomplete == "hold" else r.if_incomplete,
            }
        )
        for r in config.routes
    )
    return config.model_copy(
        update={
            "routes": routes,
            "store": config.store.model_copy(update={"root": root, "ledger": None, "min_free_gb": 0.0}),
            "assemble": config.assemble.model_copy(update={"quiet_seconds": 0.0}),
            "clinical": config.clinical.model_copy(update={"wait_seconds": 0.0}),
            "deliver": config.deliver.model_copy(update={"destinations": {}}),
        }
    )


class _Line:
    """The stages, called one after the other until nothing is left to do."""

    def __init__(self, config: Config) -> None:
        root, log, recorder = config.store.root, Log.null(), NullRecorder()
        self.files = Files(root, config.store.fallback_charset or "")
        self.ledger = Ledger(root)
        self.stored = 0
        engines = tuple(sorted({route.engine for route in config.routes}))
        self.worker = WorkerClient(config, engines, log, recorder)
        timing = assemble.timing(config)
        self.index = IndexStage(self.ledger, self.files, timing, (), log, recorder)
        clinical = ClinicalValues(wanted_of(config.engines.path), config.clinical)
        infer = InferStage(
            config,
            self.ledger,
            self.files.path_of,
            partial(self.worker.run, timeout=config.infer.timeout_seconds),
            clinical.for_engine,
            log,
            recorder,
        )
        report = ReportStage(
            config, self.ledger, self.files, lambda name: task_of(config.engines.path, name), log, recorder
        )
        path_of = self.files.path_of
        route = RouteStage(config, self.ledger, path_of, clinical.known, log, recorder, asks=clinical.asks)
        gather = ClinicalStage(config.clinical, self.ledger, path_of, clinical, log, recorder)
        complete = CompleteStage(config, self.ledger, path_of, clinical.known, None, log, recorder)
        stages = (route, gather, complete, infer, report)
        self.stages: list[Callable[[], bool]] = [stage.run_once for stage in stages]

    def take(self, folder: Path) -> list[dict[str, str]]:
        """Store every DICOM file below `folder`. What is not DICOM is named, not followed."""
        rejected = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            try:
                self._store(path)
                self.stored += 1
            except NodeError as e:
                rejected.append({"file": str(path), "reason": str(e)})
        while self.index.run_once():
            pass
        return rejected

    def _store(self, path: Path) -> None:
        meta = self.files.read_meta(path)
        self.files.read_header(path)
        # AE titles in a file say who stored it once; they establish no indication here.
        part = self.files.new_part(replace(meta, calling_ae_title="", called_ae_title="", association_id=ASSOCIATION))
        with path.open("rb") as source:
            source.seek(meta.dataset_offset)
            while block := source.read(BLOCK):
                part.write(block)
        part.commit(time.time())

    def run(self) -> None:
        """Assemble every study as it is, then work until no stage has work."""
        now = self.ledger.clock()
        with self.ledger.write() as tx:
            for uid in (
                tx.execute(sa.select(schema.study.c.uid).where(schema.study.c.due_at.is_not(None))).scalars().all()
            ):
                assemble.complete(tx, uid, now)
        while self._turn() or self._waiting():
            pass

    def _turn(self) -> bool:
        worked = False
        for stage in self.stages:
            worked |= stage()
        return worked

    def _waiting(self) -> bool:
        """A failed attempt waits a moment before the next."""
        with self.ledger.read() as tx:
            open_jobs = sa.select(sa.func.count()).where(
                schema.job.c.state == schema.JobState.READY, schema.job.c.run_at < self.ledger.clock() + 60
            )
            waiting = bool(tx.execute(open_jobs).scalar())
        if waiting:
            time.sleep(0.1)
        return waiting

    def collect(self, out: Path) -> list[dict[str, Any]]:
        """Copy the objects; one folder a study, in the order of the ledger."""
        with self.ledger.read() as tx:
            uids = list(tx.execute(sa.select(schema.study.c.uid).order_by(schema.study.c.last_received)).scalars())
            answers = [inspect.explain(tx, uid) for uid in uids]
            outputs = list(tx.execute(sa.select(schema.output).order_by(schema.output.c.created_at)).mappings())
        told = []
        for number, (uid, answer) in enumerate(zip(uids, answers, strict=True), 1):
            objects = []
            for count, row in enumerate((o for o in outputs if o["study_uid"] == uid), 1):
                target = out / f"study-{number:03d}" / f"{row['route']}-{row['kind']}-{count}.dcm"
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(self.files.outputs / row["file"], target)
                objects.append(str(target))
            told.append({"study": uid, "outcomes": (answer or {})["outcomes"], "objects": objects})
        return told

    def close(self) -> None:
        """End the worker, close the ledger."""
        self.worker.close()
        self.ledger.close()

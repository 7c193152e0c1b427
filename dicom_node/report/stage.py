"""The report stage: writes the objects of one result, once, and queues those bytes for their destinations.

A repeated run (after a kill) builds the same bytes under the same UIDs, because every time in them is the job's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

from dicom_node.config import Config
from dicom_node.errors import NodeError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.packages import Task
from dicom_node.report import BuiltObject, Predecessor, ReportContext, Variant, build, build_not_assessable, preload
from dicom_node.result import Provenance, Refusal, RefusalCode, result_from_json
from dicom_node.store import deliveries, jobs, studies
from dicom_node.store.deliveries import Output
from dicom_node.store.files import Files, node_namespace, write_durable
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import Outcome, Stage
from dicom_node.store.sync import FolderSync
from dicom_node.study import Study

LEASE_SECONDS = 600.0
RETRY_SECONDS = 5.0
MAX_ATTEMPTS = 3
WRITERS = 4


class ReportStage:
    """Claims report jobs. `task_of` gives the task of an engine by name, or raises PackageError."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        files: Files,
        task_of: Callable[[str], Task],
        log: Log,
        recorder: Recorder,
    ) -> None:
        self._config, self._ledger, self._files, self._task_of = config, ledger, files, task_of
        self._log, self._recorder = log, recorder
        self._namespace = node_namespace(files.root)
        self._sync = FolderSync(files.outputs).sync
        self._loaded = False

    def run_once(self) -> bool:
        """One result. True = there was one."""
        if not self._loaded:  # in this stage's own thread, while the node listens already
            preload()
            self._loaded = True
        with self._ledger.write(wakes=()) as tx:
            job = jobs.claim(tx, Stage.REPORT, self._ledger.clock(), LEASE_SECONDS)
        if job is None:
            return False
        started = time.monotonic()
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._files.path_of)
            earlier = deliveries.earlier_srs(tx, job.study_uid, job.route, job.revision)
        try:
            built = self._build(job, study, earlier)
            outputs = self._write_all(job, built)
        except (NodeError, OSError) as e:
            with self._ledger.write() as tx:
                text = str(e) if isinstance(e, NodeError) else type(e).__name__
                now = self._ledger.clock()
                jobs.fail(tx, job, text, now, max_attempts=MAX_ATTEMPTS, retry_seconds=RETRY_SECONDS)
            self._recorder.inc("dicom_node_job_failures_total", stage="report")
            return True
        self._commit(job, built, outputs)
        self._recorder.observe("dicom_node_job_seconds", time.monotonic() - started, stage="report")
        return True

    def _build(self, job: Job, study: Study, earlier: Iterable[Output]) -> tuple[BuiltObject, ...]:
        wanted = [self._config.deliver.destinations[name] for name in self._destinations(job)]
        context = ReportContext(
            config=self._config.report,
            namespace=self._namespace,
            created=datetime.fromtimestamp(float(job.payload["created_at"]), UTC),
            study_instance_uid=job.study_uid,
            spool=self._files.spool,
            fallback_charset=self._files.fallback_charset,
            variants=tuple(dict.fromkeys(map(Variant.of, wanted))) or (Variant(),),
            predecessors=tuple(Predecessor(o.sop_class_uid, o.sop_uid, o.series_uid, o.variant) for o in earlier),
        )
        sources = {i.sop_instance_uid: i for i in study.instances}
        if "result" in job.payload:
            return build(result_from_json(job.payload["result"]), sources, context)
        said = job.payload["refusal"]
        refusal = Refusal(RefusalCode(said["code"]), str(said["detail"]))
        series = set(job.payload.get("series", []))
        looked_at = {uid: i for uid, i in sources.items() if i.series_instance_uid in series} or sources
        task = self._task_of(str(job.payload["engine"]))
        return build_not_assessable(refusal, task, looked_at, context, _provenance(task, job.payload.get("package")))

    def _destinations(self, job: Job) -> list[str]:
        """Those of the job that are still in config.yaml."""
        return [name for name in job.payload["destinations"] if name in self._config.deliver.destinations]

    def _write_all(self, job: Job, built: tuple[BuiltObject, ...]) -> list[Output]:
        """At once: an fsync waits for the disk, not for the processor, and those that come together share flushes."""
        with ThreadPoolExecutor(WRITERS, "report-write") as pool:
            return list(pool.map(partial(self._write, job), built))

    def _write(self, job: Job, made: BuiltObject) -> Output:
        """Durable before the ledger names it. The name is ours: a digest of the UID, not the UID."""
        name = hashlib.sha256(made.sop_instance_uid.encode()).hexdigest()[:32] + ".dcm"
        write_durable(self._files.outputs / name, made.data, self._sync)
        return Output(
            sop_uid=made.sop_instance_uid,
            study_uid=job.study_uid,
            revision=job.revision,
            route=job.route,
            kind=made.kind,
            variant=made.variant,
            sop_class_uid=made.sop_class_uid,
            transfer_syntax_uid=made.transfer_syntax_uid,
            series_uid=made.series_instance_uid,
            file=name,
            sha256=hashlib.sha256(made.data).hexdigest(),
        )

    def _commit(self, job: Job, built: tuple[BuiltObject, ...], outputs: list[Output]) -> None:
        now = self._ledger.clock()
        summary: dict[str, Any] = {"objects": [o.sop_uid for o in outputs]}
        with self._ledger.write(wakes=("deliver",)) as tx:
            if not jobs.finish(tx, job, Ending(Outcome.BUILT, output=summary), now):
                return  # a newer revision took over: nothing of this one is sent
            for made, output in zip(built, outputs, strict=True):
                deliveries.add_output(tx, output, now)
                for name in self._destinations(job):
                    if Variant.of(self._config.deliver.destinations[name]).accepts(made):
                        deliveries.add_delivery(
                            tx, to=name, sop_uid=output.sop_uid, study_uid=job.study_uid, priority=job.priority, now=now
                        )
            deliveries.drop_held(tx, job.study_uid, job.route, job.revision, now)
            if unfit := sorted({made.variant for made in built if not made.fits}):
                text = f"text does not fit the character set asked for; written as ISO_IR 192: {', '.join(unfit)}"
                add_event(tx, now, job.study_uid, "CHARSET_UTF8", f"{job.route}: {text}")
            kinds = ", ".join(f"{made.kind} ({made.variant})" for made in built)
            add_event(tx, now, job.study_uid, "REPORTED", f"{job.route}: {kinds}")
        self._recorder.inc("dicom_node_jobs_total", stage="report", outcome="BUILT", route=job.route)
        self._log.info("reported", study=self._log.uid(job.study_uid), job=job.id, objects=len(outputs))


def _provenance(task: Task, package: Mapping[str, str] | None) -> Provenance | None:
    """Of a refusal: the package that looked, if one did (the route may have refused before)."""
    if not package:
        return None
    return Provenance(
        task=task.task,
        package_version=package["version"],
        package_digest=package["digest"],
        intended_use=package["intended_use"],
        backend=package.get("backend", "onnx"),  # a job of the version before says nothing: it knew only this one
        precision=package.get("precision", "fp32"),
        algorithm_name=package["algorithm"],
    )

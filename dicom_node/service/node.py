"""The composition root: the only file that knows all stages. Processes, threads, ordered stop.

listener (child)      files only; its own interpreter, so inference never holds it up
stages (this process) index, assemble, route, clinical, complete, infer's bookkeeping, report, deliver, retention; only
                      writer of the ledger
worker (child)        one a device; decodes pixels and runs engines; its death costs one attempt
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicom_node import assemble
from dicom_node.assemble import AssembleStage
from dicom_node.audit import Audit
from dicom_node.clinical import ClinicalValues
from dicom_node.clinical.stage import ClinicalStage
from dicom_node.config import Config
from dicom_node.deliver import DeliverStage
from dicom_node.dimse.query import Finder
from dicom_node.errors import StoreError, WorkerError
from dicom_node.infer import InferStage
from dicom_node.log import make_log
from dicom_node.metrics import Metrics
from dicom_node.metrics_http import Health, serve
from dicom_node.packages import acceptance, task_of, wanted_of
from dicom_node.pixels.decode import available_decoders
from dicom_node.report.stage import ReportStage
from dicom_node.route.complete import CompleteStage
from dicom_node.route.stage import RouteStage
from dicom_node.service import models, upkeep
from dicom_node.service.control import ControlServer, Message
from dicom_node.service.listening import Child, ListenerProcess, ListenerView
from dicom_node.service.loops import StageLoop
from dicom_node.service.notify import notify
from dicom_node.service.orders import apply_command
from dicom_node.service.trail import Trail
from dicom_node.store import availability, jobs
from dicom_node.store.files import Files, RootLock
from dicom_node.store.index import IndexStage
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.worker import Standing, WorkerClient

ASSEMBLE_GRACE = 3.0
"""Seconds after start in which a listener may still tell which associations are open."""
BEAT_LIMIT = 60.0
LISTEN_FIRST = 5.0
"""Seconds that the workers leave the processor to a listener that starts."""
CRITICAL = ("index", "assemble", "route", "report", "upkeep")
"""Loops whose silence means the node is not alive. Not infer: a hung engine must not restart the receiver."""


class Node:
    """Everything between the listener's files and the destinations."""

    def __init__(self, config: Config, config_path: Path, lock: RootLock, listener: Child | None) -> None:
        self._config = config
        root = config.store.root
        self._files = Files(root, config.store.fallback_charset or "")
        self._lock = lock
        self.metrics = Metrics()
        self.log = make_log(config.log, root).bind(process="stages")
        self.view = ListenerView(self._stored, self.metrics.merge, self._listener_event, self._available)
        self._listener = None
        if listener is not None:
            self._listener = ListenerProcess(config_path, listener, self.view, self.log, self.metrics)
        self._started = time.monotonic()
        self.ledger = Ledger(root, config.store.ledger)
        audit = Audit(
            config.audit.path,
            config.audit.syslog,
            ae_titles=(config.receive.ae_title, *config.receive.extra_ae_titles),
            on_loss=lambda reason: self.log.error("audit_lost", reason=reason),
        )
        self._trail = Trail(config, self.ledger, audit)
        self._standing = Standing(
            config.infer.runtime, self.log, self.metrics, changed=self._backend_changed, keep=self._keep_acceptance
        )
        self._workers = self._make_workers()
        self._switch = models.Switch(config, self.ledger, self.log, self.metrics, self._workers)
        self._stages: list[DeliverStage] = []
        self._ledger_writable = True
        self._warming: set[WorkerClient] = set()
        self._loops = self._make_loops()
        self._by_name = {loop.name: loop for loop in self._loops}
        self._control = ControlServer(root / "run", self._answer, self.view.take)
        self._server: Any = None
        self.ledger.on_commit = self._wake

    # -- composition

    def _make_workers(self) -> list[WorkerClient]:
        section = self._config.infer
        tasks = tuple(sorted({route.engine for route in self._config.routes}))
        return [
            WorkerClient(self._config, tasks, self.log.bind(worker=n), self.metrics, self._standing, number=n)
            for n in range(section.workers_per_device)
        ]

    def _make_loops(self) -> list[StageLoop]:
        config, ledger, log, metrics = self._config, self.ledger, self.log, self.metrics
        timing = assemble.timing(config)
        self._index = IndexStage(ledger, self._files, timing, config.receive.priority_ae, log, metrics)
        self._assembling = AssembleStage(
            ledger, timing, lambda: self.view.open_associations, log, metrics, on_complete=self._trail.study_received
        )
        clinical = ClinicalValues(wanted_of(config.engines.path), config.clinical)
        routing = RouteStage(config, ledger, self._files.path_of, clinical.known, log, metrics, asks=clinical.asks)
        gathering = ClinicalStage(config.clinical, ledger, self._files.path_of, clinical, log, metrics)
        pacs = None if config.query is None else Finder(config.query, config.receive.ae_title)
        completing = CompleteStage(
            config, ledger, self._files.path_of, clinical.known, pacs, log, metrics, asks=clinical.asks
        )
        reporting = ReportStage(
            config, ledger, self._files, lambda name: task_of(config.engines.path, name), log, metrics
        )
        upkeeping = upkeep.Upkeep(config, ledger, self._files, log, metrics)
        loops = [
            StageLoop("index", self._index.run_once, log, metrics, idle_seconds=0.5, linger_seconds=0.05),
            StageLoop("assemble", self._assemble_once, log, metrics, seconds_to_next=self._assembling.seconds_to_next),
            StageLoop("route", routing.run_once, log, metrics),
            StageLoop("clinical", gathering.run_once, log, metrics),
            StageLoop("complete", completing.run_once, log, metrics),
            StageLoop("report", reporting.run_once, log, metrics),
            StageLoop("upkeep", upkeeping.run_once, log, metrics, idle_seconds=upkeep.PERIOD),
        ]
        for number, worker in enumerate(self._workers):
            stage = InferStage(
                config,
                ledger,
                self._files.path_of,
                partial(worker.run, timeout=config.infer.timeout_seconds),
                clinical.for_engine,
                log,
                metrics,
            )
            loops.append(StageLoop(f"infer:{number}", stage.run_once, log, metrics))
        if config.infer.replay_minutes:
            replaying = partial(models.replay_one, self._workers, config.infer)
            loops.append(StageLoop("replay", replaying, log, metrics, idle_seconds=models.REPLAY_TURN))
        for name, destination in config.deliver.destinations.items():
            delivering = DeliverStage(
                ledger,
                self._files.outputs,
                name,
                destination,
                config.deliver.retry,
                config.receive.ae_title,
                log,
                metrics,
                on_delivered=self._trail.object_sent,
                query=config.query,
            )
            self._stages.append(delivering)
            loops.append(
                StageLoop(
                    f"deliver:{name}", delivering.run_once, log, metrics, seconds_to_next=delivering.seconds_to_next
                )
            )
        return loops

    # -- life

    def start(self) -> None:
        """Recover what the last process left, then start everything, the back of the line first."""
        with self.ledger.write() as tx:
            recovered = jobs.recover(tx)
        sweep = self._index.adopt()
        self._trail.audit.started()
        self.log.info("started", recovered_jobs=recovered, adopted_files=sweep.adopted, missing_files=sweep.missing)
        for loop in reversed(self._loops):
            loop.start()
        for worker in self._workers:
            threading.Thread(target=self._warm, args=(worker,), name="worker-warm-up", daemon=True).start()
        self._control.start()
        if self._listener is not None:
            self._listener.start()  # the child has been loading since before this process imported its stages
        section = self._config.metrics
        self._server = serve(self.metrics, section.host, section.port, self.health)

    def stop(self) -> None:
        """Front to back: take nothing new, finish what is in hand, close. Durable state needs no drain."""
        if self._listener is not None:
            self._listener.stop()  # first: no new promise is made while we leave
        self._control.stop()
        for loop in self._loops:
            loop.stop()
        for worker in self._workers:
            worker.close()  # a job in hand is given up; its lease is taken back at the next start
        for loop in self._loops:
            loop.join(5)
        for stage in self._stages:
            stage.close()
        if self._server is not None:
            self._server.close()
        self._trail.audit.stopped()
        self._trail.audit.close()
        self.ledger.checkpoint()
        self.ledger.close()
        self._lock.close()

    @property
    def listener_exit_code(self) -> int | None:
        """How the last listener child ended, if one did."""
        return None if self._listener is None else self._listener.exit_code

    def watch(self) -> None:
        """Every few seconds: feed the watchdog only while everything that must live does."""
        waiting = 0
        try:
            with self.ledger.write() as tx:  # the probe: BEGIN IMMEDIATE needs the write lock and a writable file
                waiting = sum(jobs.counts(tx).values())
            self._ledger_writable = True
        except sa.exc.DBAPIError:
            self._ledger_writable = False
        self.metrics.set("dicom_node_listening", float(self._listener is None or self.view.listening.is_set()))
        for worker in self._workers:
            if not worker.is_ready and worker not in self._warming:  # it died while idle: be ready for the next study
                threading.Thread(target=self._warm, args=(worker,), name="worker-warm-up", daemon=True).start()
        if self.health().alive:
            notify("WATCHDOG=1")
        notify(f"STATUS={waiting} jobs open")

    def health(self) -> Health:
        """For /healthz, /readyz and the watchdog."""
        now = time.monotonic()
        silent = [loop.name for loop in self._loops if loop.name in CRITICAL and now - loop.beat > BEAT_LIMIT]
        listening = self._listener is None or self.view.listening.is_set()
        loading = sorted({task for worker in self._workers for task in worker.loading})
        loaded = all(worker.is_ready for worker in self._workers)
        missing = [name for name, plugin in available_decoders().items() if not plugin]
        refused = [
            f"engine {task}: {told['error']}"
            for worker in self._workers[:1]
            for task, told in sorted(worker.engines().items())
            if told["error"]
        ]
        reasons = [f"the {name} loop is silent" for name in silent]
        reasons += [] if listening else ["the listener is not listening"]
        reasons += [] if loaded else [f"engines are loading: {', '.join(loading) or 'all'}"]
        reasons += [f"no decoder for {name}" for name in missing]
        reasons += [] if self._ledger_writable else ["the ledger cannot be written"]
        return Health(alive=not silent, ready=not reasons, reasons=(*reasons, *refused))

    def _warm(self, worker: WorkerClient) -> None:
        """Load the engines now; a worker that cannot start says so in the log, and the next job tries again."""
        self._warming.add(worker)
        if self._listener is not None:
            self.view.listening.wait(LISTEN_FIRST)  # a sender waits for the listener, nobody yet for an engine
        try:
            worker.ready()
        except WorkerError as e:
            self.log.error("worker_not_ready", error=str(e))
        finally:
            self._warming.discard(worker)

    # -- messages

    def _assemble_once(self) -> bool:
        if self.view.heard_at is None and time.monotonic() - self._started < ASSEMBLE_GRACE:
            return False  # a listener that outlived us has not yet told which associations are open
        return self._assembling.run_once()

    def _stored(self) -> None:
        for name in ("index", "assemble"):
            self._by_name[name].wake()

    def _wake(self, stages: Collection[str] | None) -> None:
        """These, or all that work on what the ledger holds."""
        for loop in self._loops:
            stage = loop.name.split(":")[0]
            if stage in stages if stages is not None else stage not in ("index", "upkeep", "replay"):
                loop.wake()

    def _listener_event(self, message: Message) -> None:
        with self.ledger.write() as tx:
            add_event(tx, self.ledger.clock(), None, str(message["code"])[:48], str(message["text"])[:400])
        if message["code"] == "ASSOCIATION_REJECTED":
            self._trail.audit.association_rejected("", str(message.get("peer", "")), str(message["text"])[:400])

    def _backend_changed(self, text: str) -> None:
        """No study waits for this line: where the ledger cannot be written, the log and the metrics have said it."""
        try:
            with self.ledger.write() as tx:
                add_event(tx, self.ledger.clock(), None, "BACKEND_CHANGED", text[:400])
        except sa.exc.DBAPIError:
            self.metrics.inc("dicom_node_ledger_errors_total")

    def _keep_acceptance(self, engines: Mapping[str, Any]) -> None:
        try:
            acceptance.write(self._config.store.root, engines)
        except StoreError as e:
            self.log.warning("acceptance_not_kept", error=str(e))

    def _available(self, study_uid: str, sop_uids: list[str]) -> None:
        with self.ledger.write() as tx:
            availability.announce(tx, study_uid, sop_uids, self.ledger.clock())
        self._stored()

    def _answer(self, message: Message) -> Message:
        if message.get("kind") == "explain":
            self._trail.ordered("explain", str(message.get("study", ""))[:64])
            return {"text": "noted"}
        if message.get("kind") in models.KINDS:
            return self._switch.apply(message)
        answer = apply_command(self.ledger, message)
        if "text" in answer:
            self._trail.ordered(str(message["kind"]), str(message["study"]))
        return answer

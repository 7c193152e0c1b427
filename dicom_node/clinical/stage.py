"""The clinical stage: asks the sources outside a study, while the study's route job is parked or a route holds it.

The only caller of a network or a sidecar folder for clinical values, in a loop of its own: a server that is slow holds
up nobody who does not need it. What a source said is written into the route job, so that routing and inference see the
same, also after a crash. A source that does not answer is asked again, the pause doubling, until
`clinical.wait_seconds` have passed since the study was routed; then the study goes on without it, and the report says
so. The bound holds however long the queue is: a study whose time is over is not asked for any more. A study that its
route holds for want of a value (`if_incomplete: hold`) is asked for behind all others, until the value is there or the
hold is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import sqlalchemy as sa

from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.fhir import FhirSource
from dicom_node.clinical.identity import Subject, subject_of
from dicom_node.clinical.model import ClinicalCode, CodeKey, Gathered, problem
from dicom_node.clinical.sidecar import SidecarFolder
from dicom_node.clinical.values import ClinicalValues
from dicom_node.config_clinical import Clinical
from dicom_node.errors import ClinicalSourceError
from dicom_node.log import Log
from dicom_node.metrics import Recorder
from dicom_node.store import jobs, studies
from dicom_node.store.jobs import Ending, Job
from dicom_node.store.ledger import Ledger, add_event
from dicom_node.store.schema import Outcome, Stage
from dicom_node.study import Study

LEASE_SECONDS = 90.0
"""Longer than all sources may take together."""
FIRST_PAUSE, MAX_PAUSE = 5.0, 60.0
LOOK_AGAIN = 30.0
"""Seconds until a value that a route requires is looked for again."""
LOOK_AGAIN_HELD = 300.0
"""The same for a study that is held, which may last for days."""
WAITING = "CLINICAL_WAITING"
"""Event, and code in `explain`, of a study that waits for a source or a value."""

Ask = Callable[[Subject, tuple[CodeKey, ...], float], Gathered]


class _Source:
    """A source and how it fares: while it does not answer, it is asked for one study at a time and ever more rarely."""

    def __init__(self, name: str, ask: Ask) -> None:
        self.name, self.ask = name, ask
        self.quiet_until, self.failures, self.why = 0.0, 0, ""

    def failed(self, error: ClinicalSourceError, now: float) -> None:
        self.failures += 1
        self.quiet_until = now + min(MAX_PAUSE, FIRST_PAUSE * 2 ** (self.failures - 1))
        self.why = problem(ClinicalCode(error.code), self.name, str(error))

    def answered(self) -> None:
        self.quiet_until, self.failures, self.why = 0.0, 0, ""


def sources_of(section: Clinical) -> list[tuple[str, Ask]]:
    """Those that the configuration names."""
    codes = CodeMap(section.codes, section.sites)
    made: list[tuple[str, Ask]] = []
    if section.fhir is not None:
        made.append(("FHIR", FhirSource(section.fhir, codes).ask))
    if section.sidecar is not None:
        folder = SidecarFolder(section.sidecar, codes)
        made.append(("sidecar", lambda subject, _codes, _days: folder.ask(subject)))
    return made


class ClinicalStage:
    """One instance a node."""

    def __init__(
        self,
        section: Clinical,
        ledger: Ledger,
        path_of: Callable[[str], Path],
        values: ClinicalValues,
        log: Log,
        recorder: Recorder,
        *,
        sources: list[tuple[str, Ask]] | None = None,
    ) -> None:
        self._wait, self._ledger, self._path_of, self._values = section.wait_seconds, ledger, path_of, values
        self._log, self._recorder = log, recorder
        self._sources = [_Source(*source) for source in (sources_of(section) if sources is None else sources)]

    def run_once(self) -> bool:
        """One study. True = there was one."""
        with self._ledger.write(wakes=()) as tx:
            job = jobs.claim(tx, Stage.CLINICAL, self._ledger.clock(), LEASE_SECONDS)
        if job is None:
            return False
        with self._ledger.read() as tx:
            study = studies.load_study(tx, job.study_uid, job.revision, self._path_of)
            waited_for = jobs.is_waited_for(tx, job)
        if not waited_for:  # an operator let the study go on
            self._end(job, Gathered(), ())
            return True
        deadline = math.inf if job.route else job.created_at + self._wait
        answers, silent, again_at = self._ask_all(job, study, deadline)
        gathered = Gathered(
            tuple(o for a in answers.values() for o in a.observations),
            tuple(p for a in answers.values() for p in a.problems) + tuple(silent),
        )
        missing = self._missing(job, study, gathered)
        now = self._ledger.clock()
        if now < deadline and (again_at or missing):
            until = now + LOOK_AGAIN_HELD if job.route else min(deadline, again_at or now + LOOK_AGAIN)
            self._postpone(job, answers, gathered, until, silent, missing)
        else:
            self._end(job, gathered, missing)
        return True

    # -- asking

    def _ask_all(self, job: Job, study: Study, deadline: float) -> tuple[dict[str, Gathered], list[str], float | None]:
        """Answers by source, what silent sources suffer from, and when to try these again (None = never)."""
        subject = subject_of(study)
        codes, days = self._values.question(job.payload["engines"])
        required = bool(job.payload.get("required"))
        kept = {} if required else job.payload.get("answers", {})  # what is looked for may have come since
        answers = {name: Gathered.from_json(answer) for name, answer in kept.items()}
        silent: list[str] = []
        again_at: float | None = None
        for source in self._sources:
            if source.name in answers:
                continue
            late = self._ledger.clock() >= deadline > job.created_at
            if late or self._ledger.clock() < source.quiet_until:
                text = "not asked: the study has waited as long as it may"
                silent.append(source.why or problem(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, source.name, text))
                again_at = min(again_at or source.quiet_until, source.quiet_until)
                continue
            try:
                answers[source.name] = source.ask(subject, codes, days)
                source.answered()
                self._count(source, "answered")
            except ClinicalSourceError as e:
                self._failed(job, source, e)
                silent.append(source.why)
                if e.again:
                    again_at = min(again_at or source.quiet_until, source.quiet_until)
                else:
                    source.answered()  # this study's question has no answer; the next one's may
        return answers, silent, again_at

    def _failed(self, job: Job, source: _Source, error: ClinicalSourceError) -> None:
        source.failed(error, self._ledger.clock())
        self._count(source, error.code)
        self._log.warning(
            "clinical_source",
            study=self._log.uid(job.study_uid),
            job=job.id,
            source=source.name,
            code=error.code,
            error=str(error),
        )

    def _count(self, source: _Source, outcome: str) -> None:
        self._recorder.inc("dicom_node_clinical_answers_total", source=source.name, outcome=outcome)
        self._recorder.set("dicom_node_clinical_source_answering", float(outcome == "answered"), source=source.name)

    def _missing(self, job: Job, study: Study, gathered: Gathered) -> tuple[str, ...]:
        """What the routes require and nobody has said so far."""
        required = [str(name) for name in job.payload.get("required", [])]
        if not required:
            return ()
        known = {name.casefold() for name in self._values.known(study, job.payload["engines"], gathered.to_json())}
        return tuple(name for name in required if name.casefold() not in known)

    # -- writing down

    def _postpone(
        self,
        job: Job,
        answers: Mapping[str, Gathered],
        gathered: Gathered,
        until: float,
        silent: list[str],
        missing: tuple[str, ...],
    ) -> None:
        now = self._ledger.clock()
        if job.route:  # what the route lacks stands with its held job
            with self._ledger.write() as tx:
                jobs.wait(tx, job, until=until, payload=job.payload)
            return
        payload = job.payload | {"answers": {name: a.to_json() for name, a in answers.items()}, "told": True}
        text = "; ".join((*silent, *(f"{_missing(name)}; the route requires it" for name in missing)))
        with self._ledger.write() as tx:
            if not jobs.wait(tx, job, until=until, payload=payload, code=WAITING, detail=text):
                return
            jobs.hand_over(tx, job, {"clinical": gathered.to_json()}, None)  # an operator may let it go on with this
            if not job.payload.get("told"):
                limit = f"the study waits for {self._wait:g} s at most (dicom-node complete lets it go on)"
                add_event(tx, now, job.study_uid, "CLINICAL_WAITING", f"{text}; {limit}")

    def _end(self, job: Job, gathered: Gathered, missing: tuple[str, ...]) -> None:
        now = self._ledger.clock()
        with self._ledger.write() as tx:
            if not jobs.finish(tx, job, Ending(Outcome.GATHERED), now):
                return  # a newer revision took over
            if jobs.hand_over(tx, job, {"clinical": gathered.to_json()}, now):
                self._tell(tx, job, gathered, missing, now)
        self._recorder.inc("dicom_node_jobs_total", stage="clinical", outcome=str(Outcome.GATHERED), route="")

    def _tell(self, tx: sa.Connection, job: Job, gathered: Gathered, missing: tuple[str, ...], now: float) -> None:
        """How many values each source gave: the values themselves stand with the outcome that used them."""
        counts = {s.name: sum(o.origin == s.name.lower() for o in gathered.observations) for s in self._sources}
        text = ", ".join(f"{name}: {count} values" for name, count in counts.items())
        text = "; ".join((text, *gathered.problems, *map(_missing, missing)))
        add_event(tx, now, job.study_uid, "CLINICAL_GATHERED", text)


def _missing(name: str) -> str:
    return problem(ClinicalCode.CLINICAL_INPUT_MISSING, name, "no source has a value that can be used")

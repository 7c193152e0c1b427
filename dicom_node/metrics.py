"""Metrics: what the node counts, and how the counts come together (metrics_http.py is the door to them).

Stands under every stage, imports none. `CATALOGUE` is the complete list: an unknown name or label raises, and
docs/metrics.md is generated from it. No label may hold a name, an identifier or a UID of a patient, study or instance;
AE titles only of configured peers (`known`). The stages process owns the one `Metrics`; children count into `Deltas`
and send them up (prometheus-client's multiprocess mode reads the environment at import and leaves files: not used).
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_JOB = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
_LONG = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0, 259200.0)
_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the catalogue."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"dicom_node_{name}_total", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"dicom_node_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"dicom_node_{name}", "histogram", text, labels, buckets)


CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # receive
        _counter("associations_accepted", "Associations accepted.", "calling_ae"),
        _counter("associations_rejected", "Associations rejected, and connections cut, by reason.", "reason"),
        _counter("connections_lingering", "Connections that the peer did not close in time when all was said."),
        _counter("associations_aborted", "Accepted associations that ended without a release.", "calling_ae"),
        _gauge("associations_open", "Associations open now."),
        _counter(
            "contexts_rejected",
            "Presentation contexts rejected: abstract_syntax or transfer_syntax.",
            "calling_ae",
            "reason",
        ),
        _counter("instances_received", "Instances stored durably and acknowledged.", "calling_ae"),
        _counter(
            "instances_refused",
            "Instances answered with a failure status (four hexadecimal digits).",
            "calling_ae",
            "status",
        ),
        _counter("notifications", "Instance Availability Notifications (N-CREATE) understood.", "calling_ae"),
        _counter("commitments", "Instances in reports of storage commitment.", "calling_ae", "outcome"),
        _counter("received_bytes", "Bytes of the data sets of acknowledged instances.", "calling_ae"),
        _histogram("store_seconds", "Last byte of an instance received to its acknowledgement.", _FAST),
        _counter("listener_restarts", "Times the listener process ended and was started again."),
        # store
        _gauge("incoming_files", "Acknowledged files that wait to be indexed."),
        _histogram("index_lag_seconds", "Acknowledgement of an instance to its row in the ledger.", _FAST),
        _counter("quarantined", "Files put aside because they cannot be parsed."),
        _gauge("quarantine_files", "Files in quarantine now."),
        _gauge("disk_free_bytes", "Free bytes of the file system of the store root."),
        _gauge("disk_reserve_bytes", "store.min_free_gb in bytes: below it instances are refused with 0xA700."),
        _counter("ledger_errors", "Statements the ledger refused; the loop went on."),
        # assemble
        _counter("studies_assembled", "Studies that were found complete, each revision counted."),
        _counter("revisions", "Studies assembled again because instances came late."),
        _gauge("studies", "Studies of the ledger by state.", "state"),
        # route, clinical, complete, infer, report
        _counter("jobs", "Jobs that ended, by outcome (DEAD = needs a person).", "stage", "outcome", "route"),
        _counter("refusals", "Studies that got no number, by refusal code.", "route", "code"),
        _counter(
            "clinical_answers",
            "Questions to a source of clinical values outside the study: answered, or the code of what went wrong.",
            "source",
            "outcome",
        ),
        _gauge(
            "clinical_source_answering",
            "1 = the last question got an answer that can be used; 0 = it did not (see clinical_answers).",
            "source",
        ),
        _counter(
            "incomplete", "Routes that lacked something they require: run, held or given_up.", "route", "decision"
        ),
        _gauge("jobs_held", "Routes of studies that wait for more instances or an operator."),
        _gauge(
            "oldest_held_seconds",
            "Age of the oldest study that is held: incomplete (a route requires more), or patient_conflict.",
            "why",
        ),
        _counter("rejected_images", "Instances that a rejection note (KOS) took out of use."),
        _gauge("withdrawals_open", "Delivered objects made from images that were rejected later."),
        _counter("shadow_results", "Results recorded but not sent because the route is in shadow mode.", "route"),
        _counter("demonstration_withheld", "Demonstration results kept back from a destination.", "route"),
        _counter("job_failures", "Attempts that failed; the job is tried again until its limit.", "stage"),
        _histogram("job_seconds", "Duration of one attempt of a job.", _JOB, "stage"),
        _gauge("jobs_waiting", "Jobs that are ready or running.", "stage"),
        _gauge("jobs_dead", "Jobs that need a person (dicom-node retry).", "stage"),
        _counter("worker_restarts", "Worker processes that ended and were started again, by reason.", "reason"),
        _gauge("engine_accepted", "1 = the engine gave its golden answers on this machine and runs.", "engine"),
        _gauge(
            "engine_backend",
            "1 = a worker runs the engine on this backend now; 0 = none does any longer.",
            "engine",
            "backend",
            "precision",
        ),
        _gauge(
            "engine_first_choice",
            "1 = the engine runs on the backend that infer.runtime names; 0 = on another. Absent with runtime: auto.",
            "engine",
        ),
        _gauge(
            "engine_acceptance_ratio",
            "Largest difference from the golden answers over its tolerance, of an accepted backend.",
            "engine",
            "backend",
            "precision",
        ),
        _counter(
            "backend_changes",
            "Times an engine left a backend: crash, deadline, answer, drift, missing, refused, slower or package; "
            "plan: it stayed, but its compiled plan was refused and built again.",
            "engine",
            "backend",
            "reason",
        ),
        _counter("golden_replays", "Golden replays of engines that serve: held or drifted.", "engine", "outcome"),
        _counter(
            "package_switches",
            "Orders to use another model package: activated, rolled_back, or refused (the one in use stays).",
            "engine",
            "outcome",
        ),
        _histogram("probability", "Calibrated probabilities of results: watch it for drift.", _TENTHS, "route"),
        _histogram(
            "ood_ratio", "Out-of-distribution distance over the package's limit; above 1 is refused.", _RATIO, "route"
        ),
        # deliver
        _counter(
            "deliveries",
            "Attempts to send one object: delivered, warning, duplicate, retry, paused or dead.",
            "destination",
            "outcome",
        ),
        _histogram("delivery_seconds", "Duration of one C-STORE to a destination.", _FAST, "destination"),
        _histogram(
            "stored_to_delivered_seconds",
            "Last instance of a study stored to its object accepted by the destination.",
            _LONG,
            "destination",
        ),
        _gauge("delivery_queue", "Objects that wait for a destination.", "destination"),
        _gauge("deliveries_dead", "Objects a destination refused for good, or given up.", "destination"),
        _gauge("deliveries_held", "Objects held because the PACS knows another patient or order.", "destination"),
        _counter(
            "identity_checks", "Identity checks: agreed, differs, unknown or no_answer.", "destination", "outcome"
        ),
        _gauge("oldest_undelivered_seconds", "Age of the oldest object that waits for a destination.", "destination"),
        _gauge("destination_paused", "1 = the destination refuses us for good and is only probed.", "destination"),
        # the node itself
        _gauge("build_info", "1, with the version of the node.", "version"),
        _gauge("listening", "1 = a C-ECHO to the listener would succeed."),
        _gauge("stage_beat_seconds", "Unix time of the last successful turn of a stage's loop.", "stage"),
    )
}


class Recorder(Protocol):
    """Where a stage counts."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put one observation into a histogram."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""


class NullRecorder:
    """Checks names and labels as the others do, and keeps nothing."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See Recorder."""
        _key(name, "counter", labels)
        _not_negative(name, value)

    def observe(self, name: str, value: float, **labels: str) -> None:  # noqa: ARG002
        """See Recorder."""
        _key(name, "histogram", labels)

    def set(self, name: str, value: float, **labels: str) -> None:  # noqa: ARG002
        """See Recorder."""
        _key(name, "gauge", labels)


def known(ae_title: str, configured: Collection[str]) -> str:
    """The label of a peer: its AE title where an operator configured it, else "other" (a stranger chooses freely)."""
    return ae_title if ae_title in configured else "other"


_Key = tuple[str, tuple[str, ...]]  # name, values in the order of Metric.labels


def _key(name: str, kind: Kind, labels: dict[str, str]) -> _Key:
    metric = CATALOGUE.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"{name}: no such {kind} in the catalogue of metrics")
    if labels.keys() != set(metric.labels):
        raise ValueError(f"{name}: labels are {', '.join(metric.labels) or 'none'}, not {', '.join(labels) or 'none'}")
    return name, tuple(str(labels[label]) for label in metric.labels)


def _not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name}: a counter never goes down")


class _Store:
    """Values of counters, gauges and histograms under one lock. A histogram is [count per bucket…, sum]."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._histograms: dict[_Key, list[float]] = {}

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See Recorder. `inc(name, 0, …)` makes a series visible before its first event."""
        key = _key(name, "counter", labels)
        _not_negative(name, value)
        with self._lock:
            self._sums[key] = self._sums.get(key, 0.0) + value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """See Recorder."""
        key = _key(name, "histogram", labels)
        buckets = CATALOGUE[name].buckets
        with self._lock:
            row = self._histograms.setdefault(key, [0.0] * (len(buckets) + 2))
            row[bisect.bisect_left(buckets, value)] += 1
            row[-1] += value

    def set(self, name: str, value: float, **labels: str) -> None:
        """See Recorder."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = value


class Deltas(_Store):
    """What a child process counted since it last told its parent."""

    def drain(self) -> list[Any]:
        """JSON-able; for `Metrics.merge`. Empty = nothing to send."""
        with self._lock:
            sums, gauges, histograms = self._sums, self._gauges, self._histograms
            self._sums, self._gauges, self._histograms = {}, {}, {}
        return [
            *(["c", name, list(values), value] for (name, values), value in sums.items()),
            *(["g", name, list(values), value] for (name, values), value in gauges.items()),
            *(["h", name, list(values), row] for (name, values), row in histograms.items()),
        ]


class Metrics(_Store):
    """All counts of the node; the stages process owns it and `serve` shows it."""

    def __init__(self) -> None:
        super().__init__()
        # A counter without labels is visible as 0 from the start, so that `increase()` sees its first event.
        self._sums.update({(m.name, ()): 0.0 for m in CATALOGUE.values() if m.kind == "counter" and not m.labels})

    def merge(self, deltas: Iterable[Any]) -> None:
        """Add what a child drained. Raises ValueError on anything that is not in the catalogue."""
        for kind, name, values, content in deltas:
            metric = CATALOGUE.get(name)
            if metric is None or len(values) != len(metric.labels):
                raise ValueError(f"{name}: not a metric of this catalogue")
            labels = dict(zip(metric.labels, values, strict=True))
            if kind == "c":
                self.inc(name, content, **labels)
            elif kind == "g":
                self.set(name, content, **labels)
            else:
                self._add_histogram(_key(name, "histogram", labels), content)

    def _add_histogram(self, key: _Key, row: list[float]) -> None:
        with self._lock:
            own = self._histograms.setdefault(key, [0.0] * len(row))
            if len(own) != len(row):
                raise ValueError(f"{key[0]}: other buckets")
            own[:] = [a + b for a, b in zip(own, row, strict=True)]

    def value(self, name: str, **labels: str) -> float:
        """One counter or gauge, or the number of observations of a histogram; 0 if it never happened."""
        kind = CATALOGUE[name].kind if name in CATALOGUE else "counter"
        key = _key(name, kind, labels)
        with self._lock:
            if kind == "histogram":
                return sum(self._histograms.get(key, [0.0])[:-1])
            return (self._sums if kind == "counter" else self._gauges).get(key, 0.0)

    def collect(self) -> Iterator[Any]:
        """Metric families for prometheus-client's exposition: the whole catalogue, with or without samples."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        with self._lock:
            sums, gauges = dict(self._sums), dict(self._gauges)
            histograms = {key: list(row) for key, row in self._histograms.items()}
        families: dict[str, Any] = {}
        make = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        for metric in CATALOGUE.values():
            families[metric.name] = make[metric.kind](metric.name, metric.help, labels=metric.labels)
        for (name, values), value in (*sums.items(), *gauges.items()):
            families[name].add_metric(values, value)
        for (name, values), row in histograms.items():
            families[name].add_metric(values, _cumulative(CATALOGUE[name].buckets, row), row[-1])
        yield from families.values()

    def exposition(self) -> bytes:
        """The Prometheus text format, with the memory, CPU and files of the process."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        text: bytes = generate_latest(registry)
        return text


def _cumulative(buckets: tuple[float, ...], row: list[float]) -> list[tuple[str, float]]:
    total, out = 0.0, []
    for bound, count in zip((*buckets, float("inf")), row[:-1], strict=True):
        total += count
        out.append(("+Inf" if bound == float("inf") else str(bound), total))
    return out

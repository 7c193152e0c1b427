"""Metrics: a closed catalogue, counts of several processes in one place, and the HTTP door."""

from __future__ import annotations

import ast
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dicom_node.metrics import CATALOGUE, Deltas, Metrics, NullRecorder, known
from dicom_node.metrics_http import Health, MetricsServer, serve

SOURCES = Path(__file__).parent.parent / "dicom_node"
PHI_LABELS = {"patient", "study", "series", "instance", "accession", "uid", "study_uid", "name"}


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


@pytest.fixture(params=[Metrics, Deltas, NullRecorder])
def recorder(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_an_unknown_name_kind_or_label_raises_in_every_recorder(recorder: Any) -> None:
    with pytest.raises(ValueError, match="no such counter"):
        recorder.inc("dicom_node_typo_total")
    with pytest.raises(ValueError, match="no such gauge"):
        recorder.set("dicom_node_ledger_errors_total", 1)
    with pytest.raises(ValueError, match="no such histogram"):
        recorder.observe("dicom_node_listening", 1)
    with pytest.raises(ValueError, match="labels are stage"):
        recorder.inc("dicom_node_job_failures_total")
    with pytest.raises(ValueError, match="labels are none"):
        recorder.inc("dicom_node_ledger_errors_total", stage="x")
    with pytest.raises(ValueError, match="never goes down"):
        recorder.inc("dicom_node_ledger_errors_total", -1)


def test_names_help_and_labels_follow_the_rules() -> None:
    for name, metric in CATALOGUE.items():
        assert name.startswith("dicom_node_")
        assert (metric.kind == "counter") == name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")
        assert not PHI_LABELS & set(metric.labels), name


def recorded() -> Iterator[tuple[str, str, set[str], Path]]:
    """Every `….inc("dicom_node_…", label=…)` in the sources: method, name, labels, file."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("inc", "observe", "set")
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and str(node.args[0].value).startswith("dicom_node_")
            ):
                labels = {keyword.arg or "**" for keyword in node.keywords} - {"value"}
                yield node.func.attr, node.args[0].value, labels, path


def test_everything_the_sources_record_is_in_the_catalogue() -> None:
    kinds = {"inc": "counter", "observe": "histogram", "set": "gauge"}
    calls = list(recorded())
    assert calls
    for method, name, labels, path in calls:
        assert name in CATALOGUE, f"{path.name}: {name}"
        assert CATALOGUE[name].kind == kinds[method], f"{path.name}: {name}"
        assert "**" in labels or labels == set(CATALOGUE[name].labels), f"{path.name}: {name} {labels}"


def test_the_exposition_says_what_was_counted() -> None:
    metrics = Metrics()
    metrics.inc("dicom_node_jobs_total", stage="infer", outcome="RESULT", route="renal-ceus")
    metrics.inc("dicom_node_jobs_total", 2, stage="infer", outcome="RESULT", route="renal-ceus")
    metrics.set("dicom_node_listening", 1)
    metrics.set("dicom_node_listening", 0)
    for value in (0.05, 0.2, 0.2, 500.0):
        metrics.observe("dicom_node_job_seconds", value, stage="infer")
    seen = samples(metrics)
    job = {("stage", "infer"), ("outcome", "RESULT"), ("route", "renal-ceus")}
    assert seen["dicom_node_jobs_total", frozenset(job)] == 3
    assert seen["dicom_node_listening", frozenset()] == 0
    infer = ("stage", "infer")
    assert seen["dicom_node_job_seconds_bucket", frozenset({infer, ("le", "0.05")})] == 1  # le: the bound belongs to it
    assert seen["dicom_node_job_seconds_bucket", frozenset({infer, ("le", "0.1")})] == 1
    assert seen["dicom_node_job_seconds_bucket", frozenset({infer, ("le", "0.2")})] == 3
    assert seen["dicom_node_job_seconds_bucket", frozenset({infer, ("le", "300.0")})] == 3
    assert seen["dicom_node_job_seconds_bucket", frozenset({infer, ("le", "+Inf")})] == 4
    assert seen["dicom_node_job_seconds_count", frozenset({infer})] == 4
    assert seen["dicom_node_job_seconds_sum", frozenset({infer})] == pytest.approx(500.45)
    assert seen["dicom_node_ledger_errors_total", frozenset()] == 0  # visible before its first event
    assert ("process_resident_memory_bytes", frozenset()) in seen


def test_a_label_value_is_escaped() -> None:
    metrics = Metrics()
    metrics.inc("dicom_node_associations_rejected_total", reason='a"b\n\\c')
    labels = {("reason", 'a"b\n\\c')}
    assert samples(metrics)["dicom_node_associations_rejected_total", frozenset(labels)] == 1


def test_promtool_finds_nothing_to_say() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian prometheus)")
    metrics = Metrics()
    for metric in CATALOGUE.values():
        labels = dict.fromkeys(metric.labels, "x")
        {"counter": metrics.inc, "gauge": metrics.set, "histogram": metrics.observe}[metric.kind](
            metric.name, 1, **labels
        )
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.exposition(), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_children_count_into_the_same_numbers() -> None:
    child, metrics = Deltas(), Metrics()
    metrics.inc("dicom_node_received_bytes_total", 10, calling_ae="CT1")
    for _ in range(2):
        child.inc("dicom_node_received_bytes_total", 5, calling_ae="CT1")
        child.observe("dicom_node_store_seconds", 0.003)
        child.set("dicom_node_associations_open", 4)
        metrics.merge(json.loads(json.dumps(child.drain())))
    assert metrics.value("dicom_node_received_bytes_total", calling_ae="CT1") == 20
    assert metrics.value("dicom_node_store_seconds") == 2
    assert metrics.value("dicom_node_associations_open") == 4
    assert child.drain() == []


@pytest.mark.parametrize(
    "delta",
    [["c", "dicom_node_typo_total", [], 1], ["c", "dicom_node_listening", [], 1],
     ["c", "dicom_node_received_bytes_total", [], 1], ["h", "dicom_node_store_seconds", [], [1.0, 2.0]]],
)  # fmt: skip
def test_a_delta_that_is_not_in_the_catalogue_is_refused(delta: list[Any]) -> None:
    with pytest.raises(ValueError, match="dicom_node_"):
        Metrics().merge([delta, ["h", "dicom_node_store_seconds", [], [0.0] * 16], ["h", *delta[1:]]])


def test_nothing_is_lost_between_threads() -> None:
    child, metrics = Deltas(), Metrics()

    def count() -> None:
        for _ in range(2000):
            child.inc("dicom_node_quarantined_total")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.merge(child.drain())
    metrics.merge(child.drain())
    assert metrics.value("dicom_node_quarantined_total") == 8000


def test_a_stranger_does_not_choose_a_label() -> None:
    assert known("PACS", {"PACS"}) == "PACS"
    assert known("MUSTERMANN^ERIKA", {"PACS"}) == "other"


def test_counting_does_not_import_prometheus_client() -> None:
    """Its import reads the environment; the listener only counts."""
    script = (
        "import sys, dicom_node.metrics as m; d = m.Deltas(); d.inc('dicom_node_quarantined_total');"
        "sys.exit(any(n.startswith('prometheus') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=SOURCES.parent).returncode == 0


@pytest.fixture
def health() -> list[Health]:
    return [Health(alive=True, ready=False, reasons=("engines are loading",))]


@pytest.fixture
def server(health: list[Health]) -> Iterator[MetricsServer]:
    server = serve(Metrics(), "127.0.0.1", 0, lambda: health[0])
    yield server
    server.close()


def get(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_the_door_tells_alive_from_ready(server: MetricsServer, health: list[Health]) -> None:
    assert get(server, "/healthz") == (200, b'{"alive": true}\n')
    status, body = get(server, "/readyz")
    assert status == 503
    assert json.loads(body) == {"alive": True, "ready": False, "reasons": ["engines are loading"]}
    health[0] = Health(alive=True, ready=True)
    assert get(server, "/readyz")[0] == 200
    health[0] = Health(alive=False, ready=False, reasons=("the index loop is silent",))
    assert get(server, "/healthz")[0] == 503


def test_the_door_shows_metrics_and_nothing_else(server: MetricsServer) -> None:
    status, body = get(server, "/metrics?x=1")
    assert status == 200
    assert b"\ndicom_node_ledger_errors_total 0.0\n" in body
    assert get(server, "/metrics", "HEAD") == (200, b"")
    assert get(server, "/")[0] == 404
    assert get(server, "/metrics", "POST")[0] == 501


def test_silent_clients_do_not_pile_up(server: MetricsServer) -> None:
    """More connections than hands: the surplus is dropped at once, and the door works again when they leave."""
    address = ("127.0.0.1", server.server_address[1])
    before = threading.active_count()
    silent = [socket.create_connection(address, timeout=5) for _ in range(30)]
    try:
        deadline = time.monotonic() + 5
        while sum(_is_closed(s) for s in silent) < 22 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sum(_is_closed(s) for s in silent) == 22
        assert threading.active_count() <= before + 8
    finally:
        for s in silent:
            s.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if get(server, "/healthz")[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    pytest.fail("the door stayed shut")


def _is_closed(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True

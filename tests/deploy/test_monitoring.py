"""Alerts and dashboard: every query is valid, names metrics that exist, and uses labels they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicom_node.metrics import CATALOGUE

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERT_TESTS = DEPLOY / "prometheus" / "alerts.test.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dicom-node.json").read_text())
FOREIGN = {
    "up": {"job", "instance"},
    "process_resident_memory_bytes": {"job", "instance"},
    "process_cpu_seconds_total": {"job", "instance"},
}
SELECTOR = re.compile(r"\b((?:dicom_node|process)_\w+|up)\b(?:\{([^}]*)\})?")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian prometheus)")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def labels_of(name: str) -> set[str]:
    """The labels of a series; `le` belongs to the buckets of a histogram only."""
    if name in FOREIGN:
        return FOREIGN[name]
    if name in CATALOGUE and CATALOGUE[name].kind != "histogram":
        return {*CATALOGUE[name].labels, "job", "instance"}
    base, _, part = name.rpartition("_")
    assert part in ("bucket", "count", "sum"), f"no such metric: {name}"
    assert base in CATALOGUE, f"no such metric: {name}"
    assert CATALOGUE[base].kind == "histogram", f"no such metric: {name}"
    return {*CATALOGUE[base].labels, "job", "instance"} | ({"le"} if part == "bucket" else set())


def check(where: str, query: str) -> None:
    found = SELECTOR.findall(query)
    assert found, f"{where}: no metric in {query}"
    known = set()
    for name, matchers in found:
        labels = labels_of(name)
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert used <= labels, f"{where}: {name} has no label {used - labels}"
        known |= labels
    for grouping in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query):
        used = {label.strip() for label in grouping.split(",") if label.strip()}
        assert used <= known, f"{where}: nothing has a label {used - known}"


QUERIES = [*((rule["alert"], rule["expr"]) for rule in rules()), *dashboard_queries()]


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[f"{n}-{w}" for n, (w, _) in enumerate(QUERIES)])
def test_every_query_names_existing_metrics_and_labels(where: str, query: str) -> None:
    check(where, query)


@pytest.mark.parametrize(
    "query",
    ["dicom_node_typo_total", "dicom_node_jobs_total_bucket", "dicom_node_job_seconds",
     'dicom_node_jobs_total{patient="x"}', "sum by (patient) (dicom_node_jobs_total)",
     "sum by (le) (dicom_node_listening)"],
)  # fmt: skip
def test_the_check_can_fail(query: str) -> None:
    with pytest.raises(AssertionError, match=r"(no|nothing) \w+"):
        check("x", query)


def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in."""
    queries = [
        query.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$route", ".*")
        for _, query in dashboard_queries()
    ]
    path = tmp_path / "rules.yml"
    path.write_text(
        yaml.safe_dump(
            {"groups": [{"name": "g", "rules": [{"record": f"q{n}", "expr": q} for n, q in enumerate(queries)]}]}
        )
    )
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def test_the_variables_name_existing_metrics() -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in labels_of(name)


def test_panels_have_their_own_place_and_number() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & own, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_the_rules_and_the_scrape_example_are_sound() -> None:
    done = promtool("check", "rules", str(ALERTS))
    assert done.returncode == 0, done.stderr
    done = promtool("check", "config", "--syntax-only", str(DEPLOY / "prometheus" / "scrape.yml"))
    assert done.returncode == 0, done.stderr


def test_every_alert_speaks_when_it_should_and_not_otherwise() -> None:
    done = promtool("test", "rules", str(ALERT_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_speaks_and_one_in_which_it_is_silent() -> None:
    cases = [case for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_every_alert_says_how_urgent_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["action"], rule["alert"]

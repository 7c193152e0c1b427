"""config.yaml: what a mistake looks like to the person who made it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dicom_node import config
from dicom_node.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "config.yaml"


def complaint(text: str, tmp_path: Path) -> ConfigError:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as e:
        config.load(path)
    assert e.value.file == str(path)
    return e.value


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("receive: {prot: 1}", "receive.prot", "no such key"),
        ("recieve: {}", "recieve", "no such key"),
        ("receive: {port: abc}", "receive.port", "integer"),
        ("receive: {port: 70000}", "receive.port", "65535"),
        ("receive: {ae_title: THIS_TITLE_IS_FAR_TOO_LONG}", "receive.ae_title", "1 to 16"),
        ("receive: {host: 0.0.0.0}", "receive.allow", "must list the peers"),
        (
            "receive: {max_associations: 4, reserved_associations: 4}",
            "receive.reserved_associations",
            "must be less than max_associations",
        ),
        ("receive: {allow: [{ae_title: PACS, address: here}]}", "receive.allow.0.address", "10.1.0.0/16"),
        ("deliver: {destinations: {pacs: {ae_title: P, host: h}}}", "deliver.destinations.pacs.port", "required"),
        ("routes: [{name: a, when: {}, indication: {any: [{roi: true}]}, engine: x}]", "routes.0.when", "at least one"),
        ("routes: [{name: a, when: {modality: US}, engine: x}]", "routes.0.indication", "required"),
        (
            "routes: [{name: a, when: {modality: MR}, engine: x, indication: {any: [{roi: true}]}, "
            "require: {phases: [venous]}}]",
            "routes.0.require.phases.0",
            "'portal venous'",
        ),
        (
            "routes: [{name: a, when: {modalty: US}, indication: {any: [{roi: true}]}, engine: x}]",
            "routes.0.when.modalty",
            "DICOM keyword",
        ),
        (
            "routes: [{name: a, when: {StudyDescription: {regex: '('}}, indication: {any: [{roi: true}]}, engine: x}]",
            "routes.0.when.StudyDescription.regex",
            "regular expression",
        ),
        (
            "routes: [{name: a, when: {NumberOfFrames: {min: 9}}, indication: {any: [{roi: true}]}, engine: x}]",
            "routes.0.when.NumberOfFrames",
            "{range: [low, high]}",
        ),
        (
            "routes: [{name: a, when: {modality: US}, indication: {any: [{roi: true}]}, engine: x, deliver: [pax]}]",
            "routes.0.deliver",
            "'pax'",
        ),
        (
            "phases: {windows: {arterial: [50, 15]}}",
            "phases.windows",
            "the earlier second first, not 50 to 15",
        ),
        (
            "phases: {windows: {arterial: [15, 60]}}",
            "phases.windows",
            "begins after arterial ends, at 60 s",
        ),
        ("phases: {windows: {pre: [-60, 5]}}", "phases.windows", "pre: ends at 0"),
        ("phases: {windows: {arterial: [15]}}", "phases.windows.arterial", "required"),
        ("phases: {windows: {delayed: [120, .inf]}}", "phases.windows.delayed", "finite"),
        ("phases: {windows: {venous: [55, 100]}}", "phases.windows.venous", "'portal venous'"),
        (
            "phases: {windows: {arterial: [30, 50]}}",
            "phases.arm_to_liver_seconds",
            "the arterial window, 30 to 50 s",
        ),
        (
            "phases: {words: {arterial: [t1 twist]}}",
            "phases.words",
            "single blanks between, not 't1 twist'",
        ),
        ("phases: {words: {arterial: [Dyn], delayed: [dyn]}}", "phases.words", "delayed: 'dyn' already means arterial"),
        ("phases: {minimum_slices: 0}", "phases.minimum_slices", "greater than or equal to 1"),
        ("store: {root: a, root: b}", "", "written twice"),
        ("store: [", "", "YAML"),
        ("- a", "", "mapping of sections"),
        ("deliver: {destinations: {pacs: {ae_title: {file: gone}, host: h, port: 1}}}", "ae_title", "readable file"),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(tmp_path, text, key, expected):
    error = complaint(text, tmp_path)
    assert key in error.key and expected in error.expected


def test_a_site_writes_the_phase_windows_that_it_changes(tmp_path):
    (tmp_path / "config.yaml").write_text("phases: {windows: {portal venous: [60, 90]}, words: {arterial: [dyn spät]}}")
    found = config.load(tmp_path / "config.yaml").phases
    assert found.windows["portal venous"] == (60, 90) and found.windows["arterial"] == (15, 50)
    assert list(found.windows) == ["pre", "arterial", "portal venous", "delayed", "hepatobiliary"]
    assert found.words == {"arterial": ("dyn spät",)}
    assert config.load(SHIPPED).phases == config.Config().phases


def test_the_shipped_file_is_valid_and_shows_every_key_with_its_default(tmp_path):
    """A key that is missing from the shipped file is a key no administrator will find."""
    written = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    loaded = config.load(SHIPPED)
    for name, section in loaded:
        if name == "routes":
            continue
        if section is None:  # `query` is off as shipped; its keys stand in the comment beside it
            assert written[name] is None
            continue
        assert set(written[name]) == set(type(section).model_fields), name
    for part, model in (
        (written["routes"][0], config.Route),
        (written["deliver"]["destinations"]["pacs"], config.Destination),
        (written["deliver"]["retry"], config.Retry),
        (written["report"]["capture"], config.Capture),
    ):
        assert set(part) == set(model.model_fields), model
    bare = config.parse({}, file="x", base=SHIPPED.parent)
    for name in ("assemble", "infer", "report", "clinical", "log", "audit", "metrics", "store"):
        assert getattr(loaded, name) == getattr(bare, name), name


def test_a_secret_may_lie_in_a_file_of_its_own(tmp_path):
    (tmp_path / "title").write_text("SECRET_AE\n")
    (tmp_path / "config.yaml").write_text(
        "deliver: {destinations: {pacs: {ae_title: {file: title}, host: h, port: 104}}}"
    )
    assert config.load(tmp_path / "config.yaml").deliver.destinations["pacs"].ae_title == "SECRET_AE"


def test_paths_are_relative_to_the_file_not_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("store: {root: here}")
    monkeypatch.chdir(os.sep)
    assert config.load(tmp_path / "config.yaml").store.root == tmp_path / "here"


@pytest.mark.parametrize(
    ("host", "accept", "takes"),
    [
        ("127.0.0.1", False, True),
        ("localhost", False, True),
        ("::1", False, True),
        ("10.0.0.5", False, False),
        ("localhost.example.org", False, False),
        ("10.0.0.5", True, True),
    ],
)
def test_demonstration_results_leave_the_machine_only_by_a_written_word(host, accept, takes):
    destination = config.Destination(ae_title="P", host=host, port=104, accept_demonstration=accept)
    assert destination.takes_demonstration is takes


def test_the_comment_of_query_names_every_key():
    """It is shipped as null, so the keys cannot be seen elsewhere."""
    text = SHIPPED.read_text(encoding="utf-8").partition("query: null")[2].partition("clinical:")[0]
    assert all(f"{key}:" in text for key in config.Query.model_fields)

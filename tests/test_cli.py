"""The command line: exit codes, and JSON that keeps its published shape."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from dicom_node.cli import main
from dicom_node.store import studies
from dicom_node.store.ledger import Ledger

REPOSITORY = Path(__file__).parent.parent
SCHEMAS = REPOSITORY / "docs" / "schemas"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    settings["engines"]["path"] = [str(REPOSITORY / "engines")]
    settings["deliver"]["destinations"]["pacs"]["port"] = 9
    settings["receive"]["port"] = settings["metrics"]["port"] = 0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def ledger(config: Path, make_instance) -> Ledger:
    root = config.parent / "var"
    (root / "run").mkdir(parents=True)
    made = Ledger(root)
    with made.write() as tx:
        timing = studies.Timing(60, 600, "rerun", 3)
        studies.add_instance(tx, make_instance(), own=False, priority=0, timing=timing, now=1.0)
    return made


def valid(name: str, text: str) -> dict:
    answer = json.loads(text)
    jsonschema.validate(answer, json.loads((SCHEMAS / f"{name}.v1.schema.json").read_text()))
    return answer


def test_status_and_explain_keep_their_shape(config, ledger, capsys):
    assert main(["status", "--json", "--config", str(config)]) == 0
    assert valid("status", capsys.readouterr().out)["states"]["RECEIVING"] == 1
    assert main(["explain", "1.2.3", "--json", "--config", str(config)]) == 0
    answer = valid("explain", capsys.readouterr().out)
    assert {"study", "state", "outcomes", "deliveries", "events"} <= set(answer)
    assert main(["explain", "1.2.3", "--config", str(config)]) == 0
    assert "RECEIVING" in capsys.readouterr().out


def test_check_and_engines_keep_their_shape(config, capsys):
    main(["check", "--json", "--config", str(config)])
    checked = valid("check", capsys.readouterr().out)
    about = [f for f in checked["findings"] if f["about"] == "route renal-ceus"]
    assert [f["level"] for f in about] == ["ok"]
    assert main(["engines", "list", "--json", "--config", str(config)]) == 0
    engines = {engine["task"]: engine for engine in valid("engines-list", capsys.readouterr().out)}
    assert {path.parent.name for path in (REPOSITORY / "engines").glob("*/engine.yaml")} == set(engines)
    assert engines["renal_ceus"]["intended_use"] == "demonstration" and engines["renal_ceus"]["history"] == []
    assert engines["renal_ceus"]["backends"]["tensorrt"] == "not executed by us"


def test_echo_of_a_dead_destination_is_not_well_and_says_why(config, capsys):
    assert main(["echo", "pacs", "--json", "--config", str(config)]) == 1
    answer = valid("echo", capsys.readouterr().out)
    assert not answer["ok"] and "no connection" in answer["reason"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["explain", "9.9.9"], 4),
        (["retry", "9.9.9"], 4),
        (["complete", "9.9.9"], 4),
        (["echo", "nowhere"], 4),
        (["engines", "activate", "no_task", "1"], 4),
        (["engines", "rollback", "no_task"], 4),
        (["engines", "verify", "no_task"], 4),
        (["engines", "activate", "renal_ceus", "99"], 1),
        (["engines", "rollback", "renal_ceus"], 1),
        (["engines", "install", "no/such/folder"], 1),
        (["explain"], 2),
        (["explain", "1.2.3", "--file", "x"], 2),
    ],
)
def test_exit_codes_of_unknown_things_and_wrong_usage(config, ledger, arguments, code, capsys):
    assert main([*arguments, "--config", str(config)]) == code
    assert "dicom-node" in capsys.readouterr().err


def test_a_wrong_configuration_exits_78_with_file_key_and_expectation(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("receive: {prot: 1}")
    assert main(["status", "--config", str(path)]) == 78
    assert f"{path}: receive.prot: no such key" in capsys.readouterr().err


def test_a_regular_expression_that_could_run_for_ever_is_a_configuration_error(config, capsys):
    settings = yaml.safe_load(config.read_text())
    settings["routes"][0]["when"]["StudyDescription"] = {"regex": "(a+)+$"}
    config.write_text(yaml.safe_dump(settings))
    assert main(["run", "--config", str(config)]) == 78
    assert "routes.0.when.StudyDescription.regex" in capsys.readouterr().err


def test_orders_work_without_a_running_node(config, ledger, capsys):
    ledger.close()
    assert main(["complete", "1.2.3", "--config", str(config)]) == 0
    assert "revision 1 is assembled" in capsys.readouterr().out
    assert main(["explain", "1.2.3", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "PROCESSING"


def test_check_says_what_this_version_does_not_do(config, capsys):
    settings = yaml.safe_load(config.read_text())
    settings["deliver"]["destinations"]["pacs"]["commitment"] = True
    settings["infer"]["runtime"] = "tensorrt"
    config.write_text(yaml.safe_dump(settings))
    assert main(["check", "--json", "--config", str(config)]) == 1
    found = {f["about"]: f for f in valid("check", capsys.readouterr().out)["findings"] if f["level"] != "ok"}
    assert found["destination pacs"]["level"] == "error" and found["infer.runtime"]["level"] == "warning"


def test_explain_file_judges_without_a_ledger(config, capsys, tmp_path):
    (tmp_path / "not.dcm").write_bytes(b"no")
    main(["explain", "--file", str(tmp_path / "not.dcm"), "--json", "--config", str(config)])
    assert json.loads(capsys.readouterr().out)["unreadable"]

"""`engines bench`: its arithmetic, its table, and children that die, hang or answer nonsense without ending it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dicom_node import config as configuration
from dicom_node.cli import main
from dicom_node.errors import UnknownTargetError
from dicom_node.service import bench, bench_table
from dicom_node.service.bench_child import Child, ChildError, durations
from dicom_node.service.bench_table import Gate, Ratio, Row

REPOSITORY = Path(__file__).parents[2]
SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "engines-bench.v1.schema.json").read_text())


# -- arithmetic


def test_a_ratio_is_of_paired_rounds_not_of_all_samples():
    """The machine was ten times slower in the second round: both were, so the ratio is not."""
    ratio = bench_table.ratio_of([[10, 11, 12], [100, 110], [10]], [[20, 22, 24], [240], [20]])
    assert (ratio.median, ratio.least, ratio.rounds) == (2.0, 2.0, 3)
    assert ratio.most == pytest.approx(240 / 105)


def test_percentiles_are_values_that_were_measured():
    values = [float(v) for v in range(1, 101)]
    assert (bench_table.percentile(values, 0.5), bench_table.percentile(values, 0.95)) == (50.0, 95.0)
    assert bench_table.percentile([7.0], 0.95) == 7.0


def test_the_best_batch_gives_the_most_cases_a_second():
    assert bench_table.best_batch({1: 10.0, 2: 12.0, 4: 40.0}) == (2, pytest.approx(2000 / 12))
    assert bench_table.best_batch({1: 10.0, 2: 20.0})[0] == 1  # no gain: the smaller one


def row(task: str, backend: str, ms: float, ratio: float | None, preset: str = "demo", status: str = "accepted") -> Row:
    found = None if ratio is None else Ratio(ratio, ratio, ratio, 7)
    return Row(task, preset, backend, "fp32", status, p50_ms=ms, ratio=found, ratio_reason="" if ratio else "no torch")


def test_the_gate_looks_at_the_backend_that_serves_not_at_the_one_that_flatters():
    rows = [row("a", "onnx", 5.0, 3.0), row("a", "openvino", 4.0, 0.9), row("a", "cuda", 1.0, 9.0)]
    (gate,) = bench_table.gates(rows, every_task=False)
    assert (gate.held, gate.said) == (False, "0.90 x (openvino)")


def test_a_refused_backend_holds_no_target():
    (gate,) = bench_table.gates([row("a", "onnx", 5.0, 3.0, status="refused")], every_task=False)
    assert (gate.held, gate.said) == (None, "no CPU backend was accepted")


def test_the_mean_over_the_engines_is_geometric_and_needs_all_of_them():
    rows = [row("a", "onnx", 1.0, 1.0), row("b", "onnx", 1.0, 4.1)]
    assert bench_table.gates(rows, every_task=True)[-1] == Gate(
        "geometric mean over 2 engines >= 2 x", True, f"{math.sqrt(4.1):.2f} x"
    )
    assert len(bench_table.gates(rows, every_task=False)) == 2  # one engine was asked about: no mean
    rows[1] = row("b", "onnx", 1.0, None)
    assert [g.held for g in bench_table.gates(rows, every_task=True)] == [True, None, None]


def test_paper_presets_of_two_networks_have_a_target_of_their_own():
    rows = [row(t, "onnx", 1.0, 1.5, preset="paper") for t in ("thyroid_cine", "testis_noa", "renal_ceus")]
    assert [(g.target.split(",")[0], g.held) for g in bench_table.gates(rows, every_task=True)] == [
        ("thyroid_cine", False),
        ("testis_noa", False),
    ]


@pytest.mark.parametrize("found", [None, [], "fast", [1.0, float("nan")], [0.0], [-1.0], [float("inf")], [None]])
def test_what_no_clock_can_have_shown_is_no_duration(found):
    with pytest.raises(ChildError):
        durations({"ms": found}, "ms")


# -- children


def child(script: str) -> Child:
    return Child(["-c", "import os, socket, sys, time\ns = socket.socket(fileno=int(sys.argv[-1]))\n" + script])


def test_a_child_that_dies_says_by_which_signal():
    lost = child("s.recv(1); os.abort()")
    with pytest.raises(ChildError, match="ended by SIGABRT"):
        lost.ask({"do": "open"}, 20)


def test_a_child_that_ends_says_its_last_words():
    lost = child("s.recv(1); print('first', file=sys.stderr); sys.exit('install the extra')")
    with pytest.raises(ChildError, match=r"^install the extra$"):
        lost.ask({"do": "open"}, 20)


def test_a_child_that_hangs_is_ended():
    lost = child("time.sleep(600)")
    pid = lost._process.pid
    begun = time.monotonic()
    with pytest.raises(ChildError, match="no answer in 1 s"):
        lost.ask({"do": "open"}, 1)
    assert time.monotonic() - begun < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("answer", ["hello", "[1, 2]", "{", "\\x00\\xff"])
def test_a_child_that_talks_nonsense_is_ended(answer):
    lost = child(f"s.recv(1); s.sendall(b'{answer}\\n'); time.sleep(600)")
    with pytest.raises(ChildError, match="no answer"):
        lost.ask({"do": "open"}, 20)


def test_what_a_library_prints_does_not_stand_between_two_answers():
    """A real child of the node's side: print goes elsewhere, the pipe carries JSON alone."""
    script = (
        "from dicom_node.worker import timing\n"
        "timing.serve(int(sys.argv[-1]), {'open': lambda q: print('noise') or {'seconds': 1}}, ())"
    )
    spoken = child("s.detach()\n" + script)
    assert spoken.ask({"do": "open"}, 30) == {"seconds": 1}
    assert spoken.ask({"do": "memory"}, 30)["rss"] > 1_000_000
    with pytest.raises(ChildError, match="no such question"):
        spoken.ask({"do": "sing"}, 30)
    spoken.close()


# -- the whole, with children that misbehave


FAKE = """
import json, os, socket, sys, time
torch = "eager" in sys.argv
pipe = socket.socket(fileno=int(sys.argv[-1])).makefile("rw")
backend = "torch" if torch else ""
for line in pipe:
    asked = json.loads(line)
    backend = backend or asked.get("backend", "")
    if asked["do"] == "here":
        answer = {"missing": "no driver" if backend == "absent" else ""}
    elif asked["do"] == "open":
        if backend == "hangs":
            time.sleep(600)
        answer = {"status": "accepted", "reason": "", "version": "1", "seconds": 0.5, "builds": None,
                  "models": {"classifier": {"worst": 1e-6, "tolerance": 1e-3}}}
        if torch:
            del answer["status"]
        if backend == "off":
            answer = {"status": "refused", "reason": "off by 1", "version": "1"}
    elif asked["do"] == "memory":
        answer = {"rss": 100e6, "pss": 90e6}
    elif backend == "dies":
        os.abort()
    elif asked["do"] == "time" and backend == "nonsense":
        answer = {"ms": "fast"}
    elif asked["do"] == "time":
        answer = {"ms": [20.0 if torch else 10.0] * 3}
    else:
        answer = {"ms": [50.0] * 3, "score_ms": [20.0] * 3}
    pipe.write(json.dumps(answer) + "\\n")
    pipe.flush()
"""


@dataclass
class Fake:
    name: str
    precision: str = "fp32"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    settings["engines"]["path"] = [str(REPOSITORY / "engines")]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`onnx` answers; the others are what they are called. The training side exports at once."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    names = ("absent", "dies", "hangs", "nonsense", "off", "onnx")
    monkeypatch.setattr(bench, "known", lambda _: tuple(Fake(name) for name in names))
    monkeypatch.setattr(bench, "Child", lambda command: Child([str(script), *command]))
    monkeypatch.setattr(bench, "training", lambda *_: "")
    monkeypatch.setattr(bench, "phantom", lambda _task, folder: [folder / "phantom.dcm"])
    monkeypatch.setattr(bench, "OPEN_SECONDS", 2.0)
    return script


def benched(config: Path, asked: bench.Asked) -> tuple[dict[str, Any], bool]:
    answer, held = bench.bench(configuration.load(config), asked, lambda _: None)
    jsonschema.validate(answer, SCHEMA)
    return answer, held


def test_a_child_that_misbehaves_has_its_row_and_the_others_theirs(config, fakes):
    answer, held = benched(config, bench.Asked("renal_ceus", seconds=0.1, rounds=3))
    rows = {r["backend"]: r for r in answer["rows"]}
    assert answer["absent"] == [{"backend": "absent", "precision": "fp32", "reason": "no driver"}]
    assert (rows["dies"]["status"], rows["dies"]["reason"]) == ("failed", "ended by SIGABRT")
    assert (rows["hangs"]["status"], rows["hangs"]["reason"]) == ("failed", "no answer in 2 s")
    assert (rows["nonsense"]["status"], rows["nonsense"]["reason"]) == ("failed", "its answer is no answer")
    assert (rows["off"]["status"], rows["off"]["reason"]) == ("refused", "off by 1")
    onnx = rows["onnx"]
    assert (onnx["status"], onnx["p50_ms"], onnx["rss_mb"], onnx["first_load_s"]) == ("accepted", 10.0, 100.0, 0.5)
    assert onnx["ratio"] == {"median": 2.0, "least": 2.0, "most": 2.0, "rounds": 3}
    assert rows["torch eager"]["status"] == "reference"
    assert held
    text = bench_table.text(answer)
    for said in ("ended by SIGABRT", "no answer in 2 s", "off by 1", "no driver", "2.00-2.00", "best CPU backend"):
        assert said in text


def test_decoded_input_to_result_is_held_to_its_aim(config, fakes, monkeypatch):
    monkeypatch.setattr(bench, "known", lambda _: (Fake("onnx"),))
    answer, _ = benched(config, bench.Asked("testis_tumour", seconds=0.1, rounds=1))
    found = {c["what"]: (c["p50_ms"], c["aim_ms"]) for c in answer["cases"]}
    if "nyxus" in str(answer["cases"][0]["reason"]):
        pytest.skip("nyxus is not installed")
    assert found == {"score": (20.0, 300.0), "map": (30.0, 2000.0), "result": (50.0, None)}
    assert "MISSED" not in bench_table.text(answer)


def test_without_the_training_side_there_is_no_ratio_and_the_reason_is_told(config, fakes, monkeypatch):
    why = "training needs the extra: pip install 'dicom-node[train]'"
    monkeypatch.setattr(bench, "known", lambda _: (Fake("onnx"),))
    monkeypatch.setattr(bench, "training", lambda *_: why)
    asked = bench.Asked("renal_ceus", presets=("demo", "paper"), seconds=0.1, rounds=1)
    answer, held = benched(config, asked)
    demo, paper = answer["rows"]
    assert (demo["p50_ms"], demo["ratio"], demo["ratio_reason"]) == (10.0, None, why)
    assert paper["status"] == "not here"
    assert why in paper["reason"]
    assert answer["graphs"] == "the packages in use"
    assert not held  # a target that cannot be judged does not hold
    assert why in bench_table.text(answer)


def test_an_unknown_task_is_told_before_anything_is_started(config, fakes):
    with pytest.raises(UnknownTargetError):
        bench.bench(configuration.load(config), bench.Asked("no_such"), lambda _: None)
    assert main(["engines", "bench", "no_such", "--config", str(config)]) == 4
    assert main(["engines", "bench", "--backend", "no_such", "--config", str(config)]) == 4


@pytest.mark.parametrize(("gate", "held", "code"), [([], False, 0), (["--gate"], False, 1), (["--gate"], True, 0)])
def test_a_missed_target_ends_with_1_only_where_it_gates(config, monkeypatch, capsys, gate, held, code):
    answer = {"machine": "m", "versions": "", "graphs": "", "absent": [], "rows": [], "cases": [],
              "gates": bench_table.plain([Gate("a >= 1 x", held, "0.50 x")])}  # fmt: skip
    monkeypatch.setattr(bench, "bench", lambda *_: (answer, held))
    assert main(["engines", "bench", *gate, "--config", str(config)]) == code
    assert ("holds" if held else "DOES NOT HOLD") in capsys.readouterr().out


def test_nothing_can_be_timed_in_no_time(config, capsys):
    assert main(["engines", "bench", "--seconds", "0", "--config", str(config)]) == 2
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.long
def test_one_engine_on_this_machine(config, capsys):
    """The real children: ONNX Runtime always; torch beside it where the extra is installed."""
    assert main(["engines", "bench", "renal_ceus", "--seconds", "1", "--json", "--config", str(config)]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, SCHEMA)
    onnx = next(r for r in answer["rows"] if r["backend"] == "onnx")
    assert onnx["status"] == "accepted"
    assert 0 < onnx["p50_ms"] <= onnx["p95_ms"] < 5000
    assert onnx["per_second"] >= 500 / onnx["p50_ms"]
    assert onnx["rss_mb"] > 50
    case = next(c for c in answer["cases"] if c["backend"] == "onnx")
    assert (case["reason"], case["what"]) == ("", "result")
    if "torch" in sys.modules or __import__("importlib.util").util.find_spec("torch"):
        assert onnx["ratio"]["rounds"] == 7
        assert onnx["off"] < 1
    else:
        assert "dicom-node[train]" in onnx["ratio_reason"]

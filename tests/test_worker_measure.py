"""What `engines bench` and `engines build` ask their children, answered in this process."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import yaml

from dicom_node.cli import main
from dicom_node.runtime import Place, tensorrt
from dicom_node.runtime.onnx import no_device
from dicom_node.worker import measure, planning

REPOSITORY = Path(__file__).parent.parent
RENAL = REPOSITORY / "engines" / "renal_ceus"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    settings["engines"]["path"] = [str(REPOSITORY / "engines")]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def asked(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "backend": "onnx", "precision": "fp32", "threads": 1, "task": str(RENAL), "root": str(tmp_path),
        "signed": False, "graphs": None, "plans": None,
    } | more  # fmt: skip


def exported(folder: Path, change: float = 0.0) -> Path:
    """The graphs of the renal package, as `deploy` would lay them; golden logits off by `change`."""
    manifest = yaml.safe_load((RENAL / "model" / "manifest.yaml").read_text())
    shutil.copytree(RENAL / "model" / "models", folder / "models")
    with np.load(RENAL / "model" / "golden.npz") as golden:
        arrays = {name: golden[name] + (change if name.endswith("logits") else 0) for name in golden.files}
    np.savez(folder / "golden.npz", **{name: np.asarray(a, np.float32) for name, a in arrays.items()})
    models = {name: entry | {"precisions": ["fp32"]} for name, entry in manifest["models"].items()}
    (folder / "deploy.json").write_text(json.dumps({"models": models}))
    return folder


def test_the_package_in_use_is_accepted_and_timed(tmp_path):
    child = measure.Measure(tmp_path)
    assert child.time({"batch": 1, "seconds": 0.0}) == {"error": "not open"}
    answer = child.open(asked(tmp_path))
    assert answer["status"] == "accepted"
    assert answer["models"]["classifier"]["worst"] <= answer["models"]["classifier"]["tolerance"]
    assert answer["rss"] > 0
    assert len(child.time({"batch": 3, "seconds": 0.0, "least": 2})["ms"]) == 2


def test_a_backend_that_gives_other_answers_is_not_timed(tmp_path):
    child = measure.Measure(tmp_path)
    answer = child.open(asked(tmp_path, graphs=str(exported(tmp_path / "graphs", change=0.5))))
    assert (answer["status"], "off by" in answer["reason"]) == ("refused", True)
    assert child.time({"batch": 1, "seconds": 0.0}) == {"error": "not open"}


def test_exported_graphs_are_timed_like_a_package(tmp_path):
    child = measure.Measure(tmp_path)
    assert child.open(asked(tmp_path, graphs=str(exported(tmp_path / "graphs"))))["status"] == "accepted"
    assert child.case({"files": [], "seconds": 0.1}) == {"error": "no package is loaded"}


def test_a_case_is_counted_from_decoded_pixels_to_the_result(tmp_path, phantom_clip):
    spool = tmp_path / "spool"
    spool.mkdir()
    child = measure.Measure(spool)
    child.open(asked(tmp_path))
    answer = child.case({"files": [str(phantom_clip)], "seconds": 0.0})
    assert len(answer["ms"]) == len(answer["score_ms"]) == 1
    assert 0 < answer["score_ms"][0] < answer["ms"][0]
    assert list(spool.iterdir()) == []  # results of a bench are nobody's


@pytest.fixture(scope="module")
def phantom_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from e2e_node import make_phantom

    return make_phantom(tmp_path_factory.mktemp("clip"))


# -- engines build


@pytest.mark.skipif(not no_device(), reason="this machine has an NVIDIA device")
def test_without_a_gpu_nothing_is_built_and_the_reason_is_told(config, capsys):
    assert main(["engines", "build", "renal_ceus", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("not here: tensorrt") for line in lines)


def test_a_plan_for_a_gpu_that_is_not_here_is_built_and_not_kept(config, capsys):
    if not any(importlib.util.find_spec(name) for name in ("tensorrt_rtx", "tensorrt_rtx_bindings")):
        pytest.skip("tensorrt_rtx is not installed")
    assert main(["engines", "build", "renal_ceus", "--sm", "86", "--json", "--config", str(config)]) == 0
    import jsonschema

    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((REPOSITORY / "docs/schemas/engines-build.v1.schema.json").read_text()))
    assert {(line["model"], line["precision"], line["status"]) for line in answer} == {
        ("classifier", "fp16", "built"),
        ("classifier", "fp32", "built"),
    }
    assert all(line["bytes"] > 1000 and line["key"] == "" for line in answer)
    assert all("not executed by us" in line["reason"] for line in answer)
    assert not (config.parent / "var" / "plans").exists()


def test_a_plan_may_take_longer_than_a_worker_would_wait(monkeypatch, tmp_path):
    if not any(importlib.util.find_spec(name) for name in ("tensorrt_rtx", "tensorrt_rtx_bindings")):
        pytest.skip("tensorrt_rtx is not installed")
    assert planning.SECONDS > tensorrt.BUILD_SECONDS
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    question = asked(tmp_path, backend="tensorrt_rtx", targets=["SM86"])
    (line,) = planning.build(question)["lines"]
    assert (line["status"], "took longer than 0 s" in line["reason"]) == ("refused", True)


def test_what_is_kept_was_found_and_what_the_cache_says_is_told(tmp_path):
    site, model = fake_tensorrt.Site(), fake_tensorrt.model_of()
    place = Place(plans=tmp_path / "plans")

    def made() -> tuple[str, str, bool]:
        status, reason, _, size, _ = planning._for_this_machine(site.backend(), model, place)
        return status, reason, bool(size)

    assert (made(), made()) == (("built", "", True), ("kept", "", True))
    (plan,) = (tmp_path / "plans").glob("*.plan")
    plan.write_bytes(b"poison")
    status, reason, there = made()
    assert (status, there) == ("built", True)
    assert "a plan was refused and is built again" in reason
    (tmp_path / "link").symlink_to(tmp_path / "plans")
    place = Place(plans=tmp_path / "link")
    assert "not used, plans are built at every start" in made()[1]


def test_a_gpu_nobody_knows_ends_with_1(config, capsys):
    assert main(["engines", "build", "renal_ceus", "--sm", "7", "--config", str(config)]) == 1
    assert capsys.readouterr().out


def test_plans_of_other_graphs_and_damaged_records_are_left_out(tmp_path):
    import hashlib

    from dicom_node.runtime import Model
    from dicom_node.runtime.tensorrt import TensorRtBackend

    graph = b"graph"
    model = Model("m", ("x",), ("y",), {"fp32": graph}, {}, {}, {})
    digest = hashlib.sha256(graph).hexdigest()
    records = {
        "a": {"key": {"graph": digest, "library": "tensorrt"}, "plan": {"bytes": 12}},
        "b": {"key": {"graph": digest, "library": "tensorrt_rtx"}, "plan": {"bytes": 13}},
        "c": {"key": {"graph": "0", "library": "tensorrt"}, "plan": {"bytes": 14}},
        "d": ["nonsense"],
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "e.json").write_text("{")
    found = planning.plans_of(Place(plans=tmp_path), model, TensorRtBackend("tensorrt", "fp32"))
    assert found == {"a": 12}

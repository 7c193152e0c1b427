"""`deploy` and `eager`: graphs of a preset with weights of a seed, and torch that answers what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dicom_node.runtime import Place  # noqa: E402
from dicom_node.runtime.accept import accept  # noqa: E402
from dicom_node.runtime.onnx import OnnxBackend  # noqa: E402
from dicom_node.service.bench_child import Child  # noqa: E402
from dicom_node.worker.measure import deployed  # noqa: E402
from engines.training import deploy, device, eager  # noqa: E402
from engines.training.recipe import task_folder  # noqa: E402

TASKS = sorted(p.parent.name for p in task_folder("").glob("*/training.yaml"))


@pytest.mark.parametrize("task", TASKS)
def test_every_model_of_the_package_is_there_and_answers_sanely(task: str) -> None:
    """Dead or exploding activations would be timed as something else than a trained network."""
    import yaml

    made = deploy.build(task, "nano")
    manifest = yaml.safe_load((task_folder(task) / "model" / "manifest.yaml").read_text())
    assert made.networks.keys() == manifest["models"].keys()
    for name, network in made.networks.items():
        with torch.no_grad():
            said = deploy.answers(network, torch.from_numpy(made.inputs[name]))
        assert len(said) == len(manifest["models"][name]["outputs"])
        for output, y in zip(manifest["models"][name]["outputs"], said, strict=True):
            values = y.numpy()
            assert np.isfinite(values).all()
            if output == "logits":
                assert np.abs(values).max() < 100
                assert values.std() > 0  # not the same whatever comes in
        assert not any(m.training for m in network.modules())


def test_the_same_preset_is_the_same_network_every_time() -> None:
    one, other = (deploy.build("renal_ceus", "nano").networks["classifier"].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def replayed(folder: Path, *precisions: str) -> dict[str, float]:
    """How far ONNX Runtime is from torch, as a share of what is allowed."""
    models, golden = deployed(folder)
    found = {}
    for model in models:
        for precision in model.graphs.keys() & set(precisions):
            session = OnnxBackend(precision).open(model, Place(threads=1))
            line = accept(model.name, session, golden, model.tolerance[precision], model.outputs)
            found[f"{model.name} {precision}"] = line.worst / line.tolerance
    return found


def test_what_is_exported_gives_the_answers_of_torch(tmp_path: Path) -> None:
    deploy.write("renal_ceus", "nano", tmp_path, ("fp32", "fp16"))
    found = replayed(tmp_path, "fp32", "fp16")
    assert found.keys() == {"classifier fp32", "classifier fp16"}
    assert found["classifier fp32"] < 0.1


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_demo_preset_is_exported_whole(task: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engines.training", "deploy", task, "--preset", "demo", "--out", str(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    models, golden = deployed(tmp_path)
    assert replayed(tmp_path, "fp32").keys() == {f"{model.name} fp32" for model in models}
    for model in models:
        assert model.graphs.keys() == model.tolerance.keys()
        if "fp16" in model.graphs:  # weights that were not trained promise nothing of half precision but that it runs
            session = OnnxBackend("fp16").open(model, Place(threads=1))
            assert session.run({name: golden[f"{model.name}.{name}"] for name in model.inputs}).keys() == set(
                model.outputs
            )
    assert json.loads((tmp_path / "deploy.json").read_text())["preset"] == "demo"


def test_torch_is_held_to_the_answers_of_the_export_before_it_is_timed(tmp_path: Path) -> None:
    made = deploy.build("renal_ceus", "nano")
    with torch.no_grad():
        logits, features = deploy.answers(made.networks["classifier"], torch.from_numpy(made.inputs["classifier"]))
    golden = {"classifier.x": made.inputs["classifier"], "classifier.logits": logits, "classifier.features": features}
    np.savez(tmp_path / "golden.npz", **{k: np.asarray(v) for k, v in golden.items()})
    asked = eager.Torch("renal_ceus", "nano", tmp_path, eager.How())
    assert asked.open({})["models"]["classifier"]["worst"] < 1e-5
    assert len(asked.time({"batch": 2, "seconds": 0.0, "least": 3})["ms"]) == 3
    np.savez(tmp_path / "golden.npz", **{k: np.asarray(v) + 1 for k, v in golden.items()})
    with pytest.raises(Exception, match="off by"):
        eager.Torch("renal_ceus", "nano", tmp_path, eager.How()).open({})


@pytest.mark.long
def test_the_child_speaks_the_protocol(tmp_path: Path) -> None:
    deploy.write("renal_ceus", "nano", tmp_path, ("fp32",))
    child = Child(["-m", "engines.training", "eager", "renal_ceus", "--preset", "nano", "--graphs", str(tmp_path)])
    said = child.ask({"do": "open"}, 120)
    assert said["version"] == torch.__version__
    assert child.milliseconds({"do": "time", "batch": 1, "seconds": 0.05}, 60)
    assert child.ask({"do": "memory"}, 10)["rss"] > 50e6
    child.close()


# -- device: the arithmetic, which needs no GPU


def test_the_work_of_a_convolution_is_counted() -> None:
    network = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False).eval()
    found = device.work(network, torch.zeros(1, 3, 16, 16))
    assert found.flops == 2 * 8 * 3 * 9 * 16 * 16
    weights, case = 4 * 8 * 3 * 9, 4 * 16 * 16 * (3 + 8)
    assert (found.weights, found.case, found.bytes(4)) == (weights, case, weights + 4 * case)


def test_views_move_nothing() -> None:
    class Turn(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.transpose(1, 2) + 1

    found = device.work(Turn(), torch.zeros(1, 4, 4))
    assert found.case == 2 * 64  # read once, written once


def test_rows_of_a_device_name_a_ratio_to_eager_and_a_share_of_the_ceiling() -> None:
    limits = {"fp32": 1e11, "fp16": 1e11, "bytes": 1e10}
    rows = device.network("renal_ceus", "nano", "cpu", 0.02, limits, ["eager"])
    eager_rows = [r for r in rows if (r.variant, r.precision, r.batch) == ("eager", "fp32", 1)]
    assert eager_rows[0].against_eager == 1.0
    assert eager_rows[0].of_flops == pytest.approx(eager_rows[0].flops / 1e11)
    assert {(r.variant, r.precision, r.reason) for r in rows} == {("eager", "fp32", ""), ("eager", "fp16", "")}


def test_a_cuda_graph_is_asked_of_no_processor() -> None:
    assert device.variants_of("cpu") == ("eager", "compile")
    assert device.variants_of("cuda") == ("eager", "compile", "graph")


def test_a_way_that_fails_says_why_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(network: Any) -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", compiled)
    limits = {"fp32": 1e11, "fp16": 1e11, "bytes": 1e10}
    rows = device.network("renal_ceus", "nano", "cpu", 0.02, limits, ["eager", "compile"])
    assert {r.reason for r in rows if r.variant == "compile"} == {"RuntimeError: no compiler here"}
    assert any(r.variant == "eager" and r.milliseconds > 0 for r in rows)

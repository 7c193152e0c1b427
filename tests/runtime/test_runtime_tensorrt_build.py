"""Real plans, built by TensorRT-RTX on a machine without a GPU, for every shipped graph. Executes none of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_node import packages
from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place
from dicom_node.runtime.tensorrt import TensorRtBackend
from dicom_node.runtime.tensorrt_build import SINGLE, Settings, make_logger

REPOSITORY = Path(__file__).parents[2]
TARGETS = ("SM80", "SM86", "SM89", "SM120")
"""Ampere, Ada, Blackwell; what TensorRT-RTX also lists, Turing (SM75), has no single precision there."""
TENSORRT_RTX = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (extra [rtx])")


def models() -> Iterator[Any]:
    for folder in sorted((REPOSITORY / "engines").glob("*/model")):
        for path in sorted(folder.glob("models/*/*.onnx")):
            task, name = folder.parent.name, path.parent.name
            yield pytest.param(folder, name, path.stem, id=f"{task}-{name}-{path.stem}")


def shipped(folder: Path, name: str) -> Model:
    package = packages.load_package(folder)
    entry = package.manifest.models[name]
    graphs = {path.stem: path.read_bytes() for path in (folder / "models" / name).glob("*.onnx")}
    return Model(
        name, tuple(entry.inputs), tuple(entry.outputs), graphs,
        {precision: hashlib.sha256(graph).hexdigest() for precision, graph in graphs.items()},
        dict(entry.tolerance), {i: package.golden[f"{name}.{i}"].shape[1:] for i in entry.inputs},
    )  # fmt: skip


def backend(precision: str = "fp32", **how: Any) -> TensorRtBackend:
    return TensorRtBackend("tensorrt_rtx", precision, settings=Settings(targets=TARGETS), **how)


@pytest.mark.parametrize(("folder", "name", "precision"), list(models()))
def test_a_plan_is_built_for_every_shipped_graph(folder: Path, name: str, precision: str) -> None:
    model = shipped(folder, name)
    built = backend(precision).build(model, Place())
    assert sorted(built.inputs) == sorted(model.inputs) and sorted(built.outputs) == sorted(model.outputs)
    assert len(built.plan) > 100_000 and all(name.encode() in built.plan for name in model.outputs)
    # The one graph that this library builds for no open batch; when it does, this test says so.
    narrow = (folder.parent.name, name, precision) == ("thyroid_cine", "classifier", "fp32")
    assert (built.batches == SINGLE) == narrow and bool(built.narrowed) == narrow


def test_the_library_takes_its_own_plan_as_far_as_it_can_without_a_driver() -> None:
    """Past the header's checks; a damaged one is refused before. With a GPU the first would be an engine."""
    folder = REPOSITORY / "engines" / "testis_noa" / "model"
    plan = backend().build(shipped(folder, "locator"), Place()).plan

    def said(data: bytes) -> str:
        logger = make_logger(TENSORRT_RTX)
        runtime = TENSORRT_RTX.Runtime(logger)
        assert runtime.engine_host_code_allowed is False
        engine = runtime.deserialize_cuda_engine(data)
        return "engine" if engine is not None else str(logger.said())

    assert "magicTag" not in said(plan)
    assert "magicTag" in said(b"\0" * 64 + plan[64:])


def small(**changes: Any) -> Model:
    folder = REPOSITORY / "engines" / "testis_noa" / "model"
    model = shipped(folder, "locator")
    given = {field: getattr(model, field) for field in Model.__dataclass_fields__}
    return Model(**(given | changes))


def test_a_slow_build_is_cancelled_by_the_real_builder() -> None:
    with pytest.raises(BackendError, match="the build of its plan took longer than 0 s"):
        backend(build_seconds=0.0).build(small(), Place())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": ("image",)}, "its inputs are x; the manifest says image"),
        ({"outputs": ("logits",)}, "its outputs are probability; the manifest says logits"),
        (
            {"shapes": {"x": (1, 100, 128)}},
            r"x is \(-1, 1, 96, 128\) in .*; the golden cases have 1 x 100 x 128",
        ),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PackageError, match=said):
        backend().build(small(**changes), Place())


def test_a_target_that_the_library_does_not_know() -> None:
    for target in ("SM90", "NONE_SUCH"):
        with pytest.raises(BackendError, match=f"{target} is not a compute capability"):
            TensorRtBackend("tensorrt_rtx", "fp32", settings=Settings(targets=(target,))).build(small(), Place())


def graph(batch: Any, *operators: str) -> bytes:
    """x (batch, 4, 8) through ReLU and some operators to y."""
    onnx = pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    from onnx import TensorProto, helper

    names = ["x", *(f"t{i}" for i in range(len(operators))), "y"]
    nodes = [
        helper.make_node(op, [a], [b], name=f"/layer{i}/{op}")
        for i, (op, a, b) in enumerate(zip((*operators, "Relu"), names, names[1:], strict=False))
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 4, 8]) for name in ("x", "y"))
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    assert onnx
    return bytes(made.SerializeToString())


def model_of(data: bytes) -> Model:
    digest = hashlib.sha256(data).hexdigest()
    return Model("net", ("x",), ("y",), {"fp32": data}, {"fp32": digest}, {"fp32": 1e-3}, {"x": (4, 8)})


def test_every_operator_that_the_parser_refuses_is_named() -> None:
    """Operators of ONNX that TensorRT has no importer for; two faults, both told."""
    with pytest.raises(BackendError) as e:
        backend().build(model_of(graph("n", "Det", "Relu", "StringNormalizer")), Place())
    said = str(e.value)
    assert "Det" in said and "StringNormalizer" in said and "/" not in said


def test_bytes_that_are_no_graph() -> None:
    for data in (b"", b"\xff" * 100):
        with pytest.raises((BackendError, PackageError), match=r"net: (TensorRT refuses|its inputs are ;)"):
            backend().build(model_of(data), Place())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_of_a_fixed_batch_keeps_it(batch: int) -> None:
    built = backend().build(model_of(graph(batch)), Place())
    assert str(built.batches) == f"{batch}/{batch}/{batch}" and not built.narrowed


def test_an_open_size_behind_the_batch_is_taken_from_the_golden_cases() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    loaded = onnx.load_from_string(graph("n"))
    for value in (*loaded.graph.input, *loaded.graph.output):
        value.type.tensor_type.shape.dim[2].dim_param = "width"
    built = backend().build(model_of(loaded.SerializeToString()), Place())
    assert str(built.batches) == "1/16/1024"


# -- paper presets


PAPER = {
    "renal_ceus": ((1, 224, 224), ("logits", "features")),
    "testis_noa": ((1, 224, 224), ("logits", "features")),
    "testis_tumour": ((1, 128, 128), ("y",)),
    "thyroid_cine": ((1, 16, 112, 112), ("logits", "features")),
    "liver_dce": ((5, 16, 64, 64), ("logits", "features", "cam", "attention")),
}


@pytest.mark.long
@pytest.mark.parametrize("task", PAPER)
def test_plans_are_built_for_the_paper_presets(task: str, tmp_path: Path) -> None:
    """The networks at the size of the papers, with random weights: 30 to 300 MB of graph each."""
    torch = pytest.importorskip("torch", reason="torch exports the graphs of this test (extra [train])")
    import importlib

    from engines.training import export

    shape, outputs = PAPER[task]
    torch.manual_seed(1)
    network: Any = importlib.import_module(f"engines.{task}.network").build("paper").eval()
    deployed = network.deploy() if hasattr(network, "deploy") else network
    example = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    paths = export.export(deployed, example, outputs, tmp_path)
    graphs = {precision: path.read_bytes() for precision, path in paths.items()}
    digests = {precision: hashlib.sha256(data).hexdigest() for precision, data in graphs.items()}
    model = Model(task, ("x",), outputs, graphs, digests, {"fp32": 1e-3, "fp16": 2e-2}, {"x": shape})
    for precision in graphs:
        built = backend(precision).build(model, Place())
        assert len(built.plan) > 0.9 * len(graphs[precision])
        print(f"{task} {precision}: plan {len(built.plan) / 1e6:.1f} MB, {built.batches}, {built.seconds:.1f} s")

"""What a graph may hold: refused before a runtime sees it, and always with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_engine

from dicom_node.errors import PackageError
from dicom_node.runtime import graph

REPOSITORY = Path(__file__).parent.parent.parent
GRAPHS = sorted((REPOSITORY / "engines").glob("*/model/models/*/*.onnx"))


def check(data: bytes, **how: Any) -> None:
    graph.check(data, ("x",), ("logits", "features"), **how)


def changed(change: Callable[[Any], object]) -> bytes:
    """The tiny graph, changed by its author."""
    onnx = pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    model = onnx.load_from_string(tiny_engine.GRAPH.read_bytes())
    change(model)
    return bytes(model.SerializeToString())


def rename(model: Any, op: str, domain: str = "") -> None:
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type, node.domain = op, domain


def claim(model: Any, *dims: int) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def branch(model: Any) -> None:
    """An If, whose branches are graphs of their own."""
    from onnx import helper

    node = model.graph.node.add()
    node.op_type = "If"
    node.attribute.append(helper.make_attribute("then_branch", model.graph))


def hide_in_attribute(model: Any) -> None:
    """A node that is allowed, with a graph where nobody looks."""
    from onnx import helper

    model.graph.node[0].attribute.append(helper.make_attribute("body", model.graph))


def constant_in_a_file(model: Any) -> None:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="hidden", data_type=1, dims=[2], data_location=1)
    model.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=tensor))


def double(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 11


def add_function(model: Any) -> None:
    model.functions.add().name = "f"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: rename(m, "Evil"), "operator Evil is not accepted"),
        (lambda m: rename(m, "RandomNormalLike"), "operator RandomNormalLike is not accepted"),
        (lambda m: rename(m, "Gelu", "com.microsoft"), "operator Gelu of the domain com.microsoft"),
        (lambda m: rename(m, "Re\nlu\x1b[31m"), r"operator Re\?lu\?\[31m is not accepted"),
        (lambda m: m.opset_import.add(domain="custom", version=1), "domain custom are not accepted"),
        (branch, "operator If is not accepted"),
        (hide_in_attribute, "Cast holds a graph"),
        (add_function, "functions"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse"),
        (lambda m: m.training_info.add(), "training"),
        (external, "K lies in another file: external data is not accepted"),
        (constant_in_a_file, "hidden lies in another file"),
        (lambda m: claim(m, 1 << 20, 1 << 20), "initialisers claim more than 1024 MB"),
        (lambda m: claim(m, 3, 1, 1, 2), "K does not hold the 6 numbers it claims"),
        (lambda m: claim(m, -3, -1), "K is no tensor of plain numbers"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 8), "K is no tensor of plain numbers"),
        (lambda m: setattr(m.graph.input[0], "name", "image"), "its inputs are image; the manifest says x"),
        (lambda m: m.graph.output.pop(), "its outputs are logits; the manifest says logits, features"),
        (double, "x is not of single precision"),
        (lambda m: m.graph.ClearField("node"), "it has no node"),
    ],
)
def test_a_graph_with_more_than_arithmetic_is_refused(change: Callable[[Any], object], said: str) -> None:
    with pytest.raises(PackageError, match=said):
        check(changed(change))


@pytest.mark.parametrize("data", [b"", b"not a graph", b"\xff" * 100, b"\x3a" * 5000])
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(PackageError, match="not an ONNX graph"):
        check(data)


def test_sizes_of_the_manifest_hold_where_the_graph_fixes_them() -> None:
    data = tiny_engine.GRAPH.read_bytes()
    check(data, sizes={"x": (4, 4)})
    check(data, sizes={"x": (1, 4, 4)})
    with pytest.raises(PackageError, match=r"x has the shape \? x 1 x 4 x 4; the manifest says 8 x 8 at its end"):
        check(data, sizes={"x": (8, 8)})
    with pytest.raises(PackageError, match="the manifest says 2 x 1 x 1 x 4 x 4"):
        check(data, sizes={"x": (2, 1, 1, 4, 4)})


def test_the_checker_of_onnx_has_a_say_where_it_is_installed() -> None:
    data = changed(lambda m: m.graph.node[1].input.__setitem__(1, "nowhere"))
    check(data)
    with pytest.raises(PackageError, match=r"onnx.checker refuses the graph"):
        check(data, thorough=True)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: "/".join(p.parts[-5:]))
def test_shipped_graphs_need_no_more_operators(path: Path) -> None:
    model = graph._parsed(path.read_bytes())
    assert {node.op_type.decode() for node in model.graph.node} <= graph.OPERATORS

"""What a graph may hold, checked before a runtime sees a byte of it. Reads bytes, runs nothing.

ONNX Runtime names a graph's inputs and outputs but not its operators or initialisers, and knows hundreds of operators
beyond ONNX's own. So the file is parsed here by Google's protobuf runtime (onnxruntime depends on it), with the
messages of ONNX that matter: field numbers of a protobuf schema never change. Where the package `onnx` is installed its
checker has a say as well (`thorough`); the node does not need it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dicom_node.errors import PackageError

MAX_INITIALISER_BYTES = 1 << 30
"""All constants of one graph together."""
OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
    Clip Col2Im Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax
    Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu
    Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape
    Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905  a hundred names in quotes would fill two screens
)
"""Arithmetic on tensors, of ONNX's own domain: the same answer each time, an end in sight. Left out on purpose are
loops and branches (If, Loop, Scan), chance (Random…, Dropout), decoders, strings and sequences."""
_OWN_DOMAIN = ("", "ai.onnx")
_EXTERNAL = 1
_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of one element by TensorProto.DataType: plain numbers; neither text, complex nor packed ones."""
_TYPED = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_FLOAT = 1

# Message -> field -> (number, type; "*" = repeated). What is only refused by its presence is read as bytes.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"opset": (8, "Opset*"), "graph": (7, "Graph"), "training": (20, "bytes*"), "functions": (25, "bytes*")},
    "Opset": {"domain": (1, "bytes"), "version": (2, "int64")},
    "Graph": {"node": (1, "Node*"), "initializer": (5, "Tensor*"), "sparse": (15, "bytes*"),
              "input": (11, "Value*"), "output": (12, "Value*")},
    "Node": {"op_type": (4, "bytes"), "domain": (7, "bytes"), "attribute": (5, "Attribute*")},
    "Attribute": {"t": (5, "Tensor"), "g": (6, "bytes"), "tensors": (10, "Tensor*"), "graphs": (11, "bytes*"),
                  "sparse_tensor": (22, "bytes"), "sparse_tensors": (23, "bytes*")},
    "Tensor": {"dims": (1, "int64*"), "data_type": (2, "int32"), "segment": (3, "bytes"), "float_data": (4, "float*"),
               "int32_data": (5, "int32*"), "int64_data": (7, "int64*"), "name": (8, "bytes"), "raw_data": (9, "bytes"),
               "double_data": (10, "double*"), "uint64_data": (11, "uint64*"), "external_data": (13, "bytes*"),
               "data_location": (14, "int32")},
    "Value": {"name": (1, "bytes"), "type": (2, "Type")},
    "Type": {"tensor": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dimension*")},
    "Dimension": {"value": (1, "int64")},
}  # fmt: skip
_TYPES = {"double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "message": 11, "bytes": 12}

Sizes = tuple[int | None, ...]


def check(
    graph: bytes,
    inputs: Iterable[str],
    outputs: Iterable[str],
    *,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    thorough: bool = False,
) -> None:
    """Raises PackageError that says what is wrong with the graph; the caller knows its file.

    `sizes`: what the last dimensions of an input must be, where the graph fixes them.
    """
    model = _parsed(graph)
    for version in model.opset:
        if version.domain.decode("utf-8", "replace") not in _OWN_DOMAIN:
            raise PackageError(f"operators of the domain {_text(version.domain)} are not accepted")
    if model.functions or model.training or model.graph.sparse:
        raise PackageError("functions, training graphs and sparse initialisers are not accepted")
    for node in model.graph.node:
        _check_node(node)
    _check_tensors(_tensors(model.graph))
    _check_border(model.graph, tuple(inputs), tuple(outputs), sizes or {})
    if thorough:
        _check_with_onnx(graph)


def _parsed(graph: bytes) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = _model_class().FromString(graph)
    except DecodeError:
        raise PackageError("not an ONNX graph") from None
    if not model.graph.node:
        raise PackageError("not an ONNX graph: it has no node")
    return model


@functools.cache
def _model_class() -> Any:
    """ModelProto, in a pool of its own: the package `onnx` registers the same names in the common one."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            base = kind.rstrip("*")
            made = message.field.add(name=field, number=number, label=3 if kind.endswith("*") else 1)
            made.type = _TYPES["message" if base in _MESSAGES else base]
            if base in _MESSAGES:
                made.type_name = f".graph.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("graph.Model"))


def _check_node(node: Any) -> None:
    name = _text(node.op_type)
    if node.domain.decode("utf-8", "replace") not in _OWN_DOMAIN:
        raise PackageError(f"operator {name} of the domain {_text(node.domain)} is not accepted")
    if name not in OPERATORS:
        raise PackageError(f"operator {name} is not accepted")
    for a in node.attribute:
        if a.HasField("g") or a.graphs or a.HasField("sparse_tensor") or a.sparse_tensors:
            raise PackageError(f"operator {name} holds a graph or a sparse tensor of its own")


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensors(tensors: Iterable[Any]) -> None:
    total = 0
    for tensor in tensors:
        name = _text(tensor.name) or "a constant"
        if tensor.data_location == _EXTERNAL or tensor.external_data or tensor.HasField("segment"):
            raise PackageError(f"{name} lies in another file: external data is not accepted")
        width = _WIDTHS.get(tensor.data_type)
        if width is None or any(d < 0 for d in tensor.dims):
            raise PackageError(f"{name} is no tensor of plain numbers")
        count = math.prod(tensor.dims)
        total += count * width
        if total > MAX_INITIALISER_BYTES:
            raise PackageError(f"initialisers claim more than {MAX_INITIALISER_BYTES >> 20} MB ({name})")
        held = len(getattr(tensor, _TYPED.get(tensor.data_type, "int32_data")))
        if (len(tensor.raw_data) != count * width) if tensor.HasField("raw_data") else (held != count):
            raise PackageError(f"{name} does not hold the {count} numbers it claims")


def _check_border(graph: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], sizes: Mapping[str, Sizes]) -> None:
    constants = {t.name for t in graph.initializer}
    found = {"inputs": [v for v in graph.input if v.name not in constants], "outputs": list(graph.output)}
    for what, promised in (("inputs", inputs), ("outputs", outputs)):
        names = sorted(_text(v.name) for v in found[what])
        if names != sorted(promised):
            raise PackageError(f"its {what} are {', '.join(names)}; the manifest says {', '.join(promised)}")
        for value in found[what]:
            if value.type.tensor.elem_type != _FLOAT:
                raise PackageError(f"{_text(value.name)} is not of single precision (dtype float32)")
    for value in found["inputs"]:
        name = _text(value.name)
        wanted = sizes.get(name, ())
        shape = tuple(d.value if d.HasField("value") else None for d in value.type.tensor.shape.dim)
        last = shape[len(shape) - len(wanted) :]
        if len(shape) <= len(wanted) or any(d not in (None, w) for d, w in zip(last, wanted, strict=True)):
            raise PackageError(f"{name} has the shape {_shape(shape)}; the manifest says {_shape(wanted)} at its end")


def _check_with_onnx(graph: bytes) -> None:
    try:
        from onnx import checker
    except ImportError:
        return
    try:
        checker.check_model(graph, full_check=True)
    except (checker.ValidationError, ValueError, RuntimeError) as e:  # InferenceError is a RuntimeError
        raise PackageError(f"onnx.checker refuses the graph ({type(e).__name__})") from None


def _shape(shape: Sizes) -> str:
    return " x ".join("?" if d is None else str(d) for d in shape)


def _text(value: bytes) -> str:
    """A name out of a foreign file, fit for a log."""
    said = value[:64].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in said)

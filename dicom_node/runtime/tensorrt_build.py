"""From an ONNX graph to a plan, with TensorRT 10.16, 11 or TensorRT-RTX: whichever module is handed in.

Strongly typed: the precision is the graph's, not the builder's (TensorRT 11 knows nothing else), so fp16 is the
package's fp16 graph. Version compatibility, hardware compatibility and refitting stay off: the first two put host code
into a plan or slow it down, and a plan never leaves the machine that built it. Needs no GPU where the module needs none
(TensorRT-RTX); executes nothing, reads and writes no file.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place
from dicom_node.runtime.guard import bound

LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError, MemoryError, AttributeError)
"""What the bindings raise: pybind11 turns a null pointer into a TypeError, an exception of C++ into a RuntimeError."""
_MAX_TEXT = 160
_PLACE = re.compile(r"\s*\(?\b(?:In|in) \w+ at \S*\)?|(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.+-])")


class BuilderRefusedError(BackendError):
    """The graph was parsed, but this builder makes no plan of it: another profile may help."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The batch axis of a profile: smallest, the one it is tuned for, largest."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}/{self.best}/{self.most}"

    def steps(self) -> tuple[int, ...]:
        """The batches that are executed: each is compiled and captured before the first study comes."""
        found = [self.least]
        while found[-1] * 4 < self.most:
            found.append(found[-1] * 4)
        return tuple(dict.fromkeys((*found, self.most)))


SINGLE = Batches(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the builder may use. All of it is part of a plan's key."""

    workspace: int = 2 << 30
    """Bytes of GPU memory for one layer's scratch."""
    level: int = 3
    """builder_optimization_level."""
    targets: tuple[str, ...] = ()
    """Compute capabilities (TensorRT-RTX only), such as SM89; () = the GPU of this machine."""

    def __str__(self) -> str:
        targets = ",".join(self.targets) or "own"
        return f"strongly typed, no TF32, level {self.level}, workspace {self.workspace}, targets {targets}"


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A plan, and what the builder said about it."""

    plan: bytes
    batches: Batches
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    timing: bytes
    """The timing cache for the next build; empty where there is none."""
    seconds: float
    narrowed: str = ""
    """Why it is for single studies, where more were asked for."""


def batches_of(model: Model, place: Place) -> Batches:
    """The profile: 1/4/16 for images, 1/1/4 for volumes, 1/16/1024 for plain vectors; the largest is the place's."""
    spatial = max((len(shape) - 1 for shape in model.shapes.values()), default=0)
    best, most = 16 if spatial < 2 else 4 if spatial == 2 else 1, bound(model, place)
    return Batches(1, min(best, most), most)


def make_logger(trt: Any) -> Any:
    """Keeps the last errors of the library; nothing is printed. Must outlive what it is given to."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

        def said(self) -> str:
            """The errors since the last time, shortened; for a message."""
            text = "; ".join(dict.fromkeys(shorten(error) for error in self.errors))
            self.errors.clear()
            return text or "it says nothing"

    return Kept()


def shorten(text: str) -> str:
    """What a library said, fit for a log: one line, no path."""
    plain = "".join(c if c.isprintable() else " " for c in _PLACE.sub("", text))
    return plain if len(plain) <= _MAX_TEXT else f"{plain[: _MAX_TEXT - 1]}…"


def kind_of(e: BaseException) -> str:
    """Of what a library raised; a name that it lacks tells which version it is."""
    return f"no {e.name}" if isinstance(e, AttributeError) and e.name else type(e).__name__


def build_widest(
    trt: Any, graph: bytes, model: Model, batches: Batches, settings: Settings, *, seconds: float, timing: bytes = b""
) -> Built:
    """`build`, and where that profile is refused once more for single studies.

    Builders have faults that only an open batch meets: TensorRT-RTX 1.7 with our 3D network at single precision.
    """
    until = time.monotonic() + seconds
    try:
        return build(trt, graph, model, batches, settings, seconds=seconds, timing=timing)
    except BuilderRefusedError as e:
        if batches == SINGLE:
            raise
        why = str(e)
    return replace(
        build(trt, graph, model, SINGLE, settings, seconds=until - time.monotonic(), timing=timing), narrowed=why
    )


def build(
    trt: Any, graph: bytes, model: Model, batches: Batches, settings: Settings, *, seconds: float, timing: bytes = b""
) -> Built:
    """Raises PackageError where the graph is not what the manifest says, BackendError where TensorRT makes no plan.

    A build that takes longer than `seconds` is cancelled at its next step.
    """
    started = time.monotonic()
    logger = make_logger(trt)
    try:
        builder = trt.Builder(logger)
        network = builder.create_network(_creation_flags(trt))
        parser = _parse(trt, network, logger, graph, model)
        batches, profile = _profile(builder, network, model, batches)
        config = builder.create_builder_config()
        cache = _configure(trt, config, settings, timing)
        monitor = _deadline(trt, started + seconds)
        config.progress_monitor = monitor
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise BackendError(f"model {model.name}: TensorRT refuses the profile {batches}: {logger.said()}")
        plan = builder.build_serialized_network(network, config)
        if plan is None and monitor.expired:
            raise BackendError(f"model {model.name}: the build of its plan took longer than {seconds:.0f} s")
        if plan is None:
            raise BuilderRefusedError(f"model {model.name}: TensorRT builds no plan of {batches}: {logger.said()}")
        inputs, outputs = _border(network)
        learnt = b"" if cache is None else bytes(cache.serialize())
        del parser  # not sooner: the network's weights are the parser's
        return Built(bytes(plan), batches, inputs, outputs, learnt, time.monotonic() - started)
    except LIBRARY_ERRORS as e:
        raise BackendError(f"model {model.name}: TensorRT failed ({kind_of(e)}): {logger.said()}") from None


def _creation_flags(trt: Any) -> int:
    """Strong typing is a flag in TensorRT 10, and all there is (a flag without effect, or none) in 11 and RTX."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, logger: Any, graph: bytes, model: Model) -> Any:
    """The parser, which owns the weights of the network."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(_error(error) for error in errors) or logger.said()
        raise BackendError(f"model {model.name}: TensorRT refuses {len(errors)} nodes of the graph: {said}")
    inputs, outputs = _border(network)
    for what, found, promised in (("inputs", inputs, model.inputs), ("outputs", outputs, model.outputs)):
        if sorted(found) != sorted(promised):
            raise PackageError(
                f"model {model.name}: its {what} are {', '.join(found)}; the manifest says {', '.join(promised)}"
            )
    for tensor in _tensors(network):
        if tensor.dtype != trt.DataType.FLOAT:
            raise PackageError(f"model {model.name}: {tensor.name} is not of single precision")
    return parser


def _error(error: Any) -> str:
    name, operator = shorten(error.node_name()), shorten(error.node_operator())
    where = f"node {error.node()} {operator} {name}".rstrip() if error.node() >= 0 else "the graph"
    return f"{where}: {shorten(error.desc())}"


def _tensors(network: Any) -> list[Any]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return inputs + [network.get_output(index) for index in range(network.num_outputs)]


def _border(network: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = tuple(str(tensor.name) for tensor in _tensors(network))
    return names[: network.num_inputs], names[network.num_inputs :]


def _profile(builder: Any, network: Any, model: Model, batches: Batches) -> tuple[Batches, Any]:
    """The batches that the graph allows, and the profile; None where nothing in the graph is left open."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[str(tensor.name)] = _fitted(model, str(tensor.name), tuple(tensor.shape))
    fixed = {shape[0] for shape in shapes.values()} - {-1}
    if fixed:  # exported for one batch: it keeps that
        if len(fixed) > 1 or any(shape[0] == -1 for shape in shapes.values()):
            raise PackageError(f"model {model.name}: its inputs do not have one batch")
        (batch,) = fixed
        batches = Batches(batch, batch, batch)
    for index in range(network.num_outputs):
        tensor = network.get_output(index)
        shape = tuple(tensor.shape)
        if not shape or shape[0] != (batches.most if fixed else -1):
            raise PackageError(f"model {model.name}: {tensor.name} does not have the batch as its first axis")
    if fixed and all(-1 not in tuple(network.get_input(i).shape) for i in range(network.num_inputs)):
        return batches, None
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, *((batch, *shape[1:]) for batch in (batches.least, batches.best, batches.most)))
    return batches, profile


def _fitted(model: Model, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The input's shape with what the graph leaves open behind the batch taken from the golden cases."""
    wanted = model.shapes.get(name)
    fits = (
        wanted is not None
        and len(shape) == len(wanted) + 1
        and all(found in (-1, size) for found, size in zip(shape[1:], wanted, strict=True))
    )
    if wanted is None or not fits:
        said = "none" if wanted is None else " x ".join(map(str, wanted))
        raise PackageError(f"model {model.name}: {name} is {tuple(shape)} in the graph; the golden cases have {said}")
    return (shape[0], *wanted)


def _configure(trt: Any, config: Any, settings: Settings, timing: bytes) -> Any:
    """The timing cache, or None: TensorRT-RTX has no use for one, it times nothing while it builds."""
    config.clear_flag(trt.BuilderFlag.TF32)  # ten bits of mantissa would pass for single precision
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.builder_optimization_level = settings.level
    if hasattr(trt, "ComputeCapability"):
        targets = settings.targets or ("CURRENT",)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(trt.ComputeCapability, target, None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise BackendError(f"{target} is not a compute capability that this TensorRT-RTX builds for")
        return None
    cache = config.create_timing_cache(timing)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another GPU or version: start anew
        config.set_timing_cache(cache, False)
    return cache


def _deadline(trt: Any, until: float) -> Any:
    """Ends a build at the first step after `until`. The library calls it from threads of its own."""

    class Deadline(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.expired = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Nothing to say."""

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002  the library's names
            self.expired = self.expired or time.monotonic() > until
            return not self.expired

        def phase_finish(self, phase_name: str) -> None:
            """Nothing to say."""

    return Deadline()

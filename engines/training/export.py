"""Export: a trained network to ONNX (opset 18, one graph per precision) and its parity with torch. Writes `.onnx` only.

The dynamo exporter is the one exporter. The example has batch 2, because a batch of 1 may be frozen into the graph;
batches 1, 2 and 3 are compared. fp16 keeps fp32 inputs and outputs and casts inside.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.training import package

if TYPE_CHECKING:
    from engines.training.recipe import Recipe, Run

OPSET = 18
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
"""Largest absolute difference of a logit, as in the manifest."""


class Half(nn.Module):
    """Half precision behind casts: single precision at the border."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.model(x.half())
        return out.float() if isinstance(out, Tensor) else tuple(o.float() for o in out)


def classifier(recipe: Recipe, run: Run) -> dict[str, Any]:
    """The scoring network of a fit into `run.out`: graphs, head.npz, and how exactly they say what torch said."""
    from engines.training import fit

    torch.set_num_threads(run.threads)
    network: Any = fit.load(run.task, run.preset, run.checkpoint)
    deployed = network.deploy()
    inputs, _ = run.cohort("validation").frames()
    sample = inputs[:3].astype(np.float32)
    with torch.no_grad():
        fused = float((network(torch.from_numpy(sample))[0] - deployed(torch.from_numpy(sample))[0]).abs().max())
    folder = run.out / "models" / recipe.explained
    shutil.rmtree(folder, ignore_errors=True)
    paths = export(deployed, sample[:2], ("logits", "features"), folder)
    weights, bias = deployed.full_head()
    package.write_arrays(run.out, "head.npz", {"W": weights.numpy(), "b": bias.numpy()})
    parameters = sum(p.numel() for p in deployed.parameters())
    return {"fuse_error": fused, "parity": parity(deployed, paths, sample), "parameters": parameters}


def export(
    model: nn.Module,
    example: NDArray[np.float32],
    outputs: tuple[str, ...],
    folder: Path,
    precisions: tuple[str, ...] = tuple(TOLERANCE),
) -> dict[str, Path]:
    """Write a graph of a deployed network for each precision (fp32.onnx, fp16.onnx); `example` has batch 2."""
    if len(example) != 2:
        raise ValueError("export: the example needs batch 2")
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for precision in precisions:
        copied = _copy(model)
        graph = copied if precision == "fp32" else Half(copied)
        path = folder / f"{precision}.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                graph.eval(),
                (torch.from_numpy(example),),
                path,
                dynamo=True,
                opset_version=OPSET,
                input_names=["x"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
            )
        _strip(path)
        written[precision] = path
    return written


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float().eval()


def _strip(path: Path) -> None:
    """Check the graph and drop what names the exporting machine (paths of source lines)."""
    graph = onnx.load(path)
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.metadata_props[:], graph.graph.value_info[:]
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, CPU: the reference."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def parity(model: nn.Module, paths: dict[str, Path], x: NDArray[np.float32]) -> dict[str, float]:
    """Largest absolute difference of the first output (the logits) against torch fp32 at batch 1, 2 and 3.

    Raises RuntimeError above the tolerance.
    """
    worst = {}
    for precision, path in paths.items():
        run = session(path)
        first = run.get_outputs()[0].name
        differences = []
        for batch in (1, 2, 3):
            with torch.no_grad():
                expected = model(torch.from_numpy(x[:batch]))
            expected = (expected if isinstance(expected, Tensor) else expected[0]).numpy()
            found = run.run([first], {"x": x[:batch]})[0]
            differences.append(float(np.abs(found - expected).max()))
        worst[precision] = max(differences)
        if not worst[precision] <= TOLERANCE[precision]:
            raise RuntimeError(f"export: {precision} differs from torch by {worst[precision]:.2e}")
    return worst

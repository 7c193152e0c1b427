"""The deploy graphs of a preset without a fit: for timing, and for holding backends to golden answers. Not a package.

Weights come from a fixed seed and mean nothing; the topology, the inputs (the golden cases of the task's package, real
phantoms) and the statistics of BatchNorm (measured on them) are those of a trained one, so no activation overflows and
none dies. The answers of torch are the golden ones: a backend that gives them runs the same graph. At half precision a
network that was not trained may be off by more than its manifest allows; it is then refused, and not timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.training import export
from engines.training.recipe import recipe_of, task_folder

SEED = 20261
CASES = 2
"""Golden cases of each model: the exporter's example has batch 2."""
Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Deployed:
    """The networks of one preset, ready to be timed."""

    networks: Mapping[str, nn.Module]
    inputs: Mapping[str, NDArray[np.float32]]
    """x of each model, `CASES` long."""
    models: Mapping[str, Mapping[str, Any]]
    """inputs, outputs and tolerance of each, as manifest.yaml says them."""


def build(task: str, preset: str) -> Deployed:
    """The same networks every time."""
    torch.manual_seed(SEED)
    networks = recipe_of(task).networks(preset)
    package = task_folder(task) / "model"
    models = yaml.safe_load((package / "manifest.yaml").read_text("utf-8"))["models"]
    with np.load(package / "golden.npz", allow_pickle=False) as golden:
        inputs = {name: np.ascontiguousarray(golden[f"{name}.x"][:CASES], np.float32) for name in networks}
    for name, network in networks.items():
        settle(network, inputs[name])
    return Deployed({name: deployed(network) for name, network in networks.items()}, inputs, models)


def settle(network: nn.Module, x: NDArray[np.float32]) -> None:
    """Statistics of every BatchNorm from one pass over `x`; a last layer that begins with zeros gets small weights."""
    network.eval()
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))]
    kept = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all passes, of which there is one
        norm.train()
    with torch.no_grad():
        network(torch.from_numpy(x))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    network.eval()


def deployed(network: nn.Module) -> nn.Module:
    """What would be exported."""
    own: Any = getattr(network, "deploy", None)
    made: nn.Module = network if own is None else own()
    return made.eval()


def answers(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs in the order of the manifest."""
    out = network(x)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def write(task: str, preset: str, out: Path, precisions: Sequence[str]) -> list[Path]:
    """models/<name>/<precision>.onnx, golden.npz and deploy.json into `out`; every file. A precision that the manifest
    holds no tolerance for is left out."""
    made = build(task, preset)
    golden: dict[str, NDArray[np.float32]] = {}
    paths: list[Path] = []
    about: dict[str, Any] = {}
    for name, network in made.networks.items():
        entry, x = made.models[name], made.inputs[name]
        wanted = tuple(p for p in precisions if p in entry["tolerance"])
        graphs = export.export(network, x, tuple(entry["outputs"]), out / "models" / name, wanted)
        paths += graphs.values()
        with torch.no_grad():
            said = [y.numpy() for y in answers(network, torch.from_numpy(x))]
        golden |= {f"{name}.x": x, **{f"{name}.{k}": y for k, y in zip(entry["outputs"], said, strict=True)}}
        parameters = sum(p.numel() for p in network.parameters())
        about[name] = {**entry, "precisions": list(wanted), "parameters": parameters}
    np.savez(out / "golden.npz", allow_pickle=False, **golden)
    text = json.dumps({"task": task, "preset": preset, "seed": SEED, "torch": torch.__version__, "models": about})
    (out / "deploy.json").write_text(text, "utf-8")
    return [*paths, out / "golden.npz", out / "deploy.json"]

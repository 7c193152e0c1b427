"""The torch side of `dicom-node engines bench`: the deploy networks of a preset in this process, asked over a pipe.

    eager | compile | graph     how torch runs them: as written, torch.compile, or a CUDA graph for each batch
    fp32 | fp16                 fp16 is half precision throughout, behind casts, as in the exported graph

Speaks the protocol of `dicom_node.worker.timing`. `open` holds the networks to the golden answers of the same graphs'
export (`deploy`), so that what is compared is the same computation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dicom_node.runtime.accept import accept
from dicom_node.worker import timing
from engines.training import deploy
from engines.training.export import Half

VARIANTS = ("eager", "compile", "graph")
FOREIGN = (RuntimeError, ValueError, TypeError, KeyError, OSError, AttributeError, ImportError)
"""What torch and its compilers raise."""
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class How:
    """One way to run the networks."""

    device: str = "cpu"
    variant: str = "eager"
    precision: str = "fp32"
    threads: int = 1


class TorchSession:
    """`dicom_node.runtime.Session` over a network: arrays in, arrays out, as every backend is timed."""

    def __init__(self, network: nn.Module, outputs: tuple[str, ...], how: How) -> None:
        self.backend, self.precision = f"torch {how.variant}", how.precision
        self._outputs, self._device = outputs, torch.device(how.device)
        self._call: Any = prepared(network, how)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One pass, with the way to the device and back."""
        with torch.inference_mode():
            said = self._call(torch.from_numpy(inputs["x"]).to(self._device))
            return {name: y.float().cpu().numpy() for name, y in zip(self._outputs, said, strict=True)}

    def close(self) -> None:
        """Nothing that the process does not free."""


def prepared(network: nn.Module, how: How) -> Any:
    """A call from a tensor on the device to the tuple of outputs."""
    network = (Half(network) if how.precision == "fp16" else network).to(how.device).eval()
    if how.variant == "compile":
        compiled: Any = torch.compile(network)
        return lambda x: deploy.answers(compiled, x)
    if how.variant == "graph":
        return Graphs(network)
    return lambda x: deploy.answers(network, x)


class Graphs:
    """A CUDA graph for each shape of input, captured when the shape first comes."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(x.shape)
        if shape not in self._kept:
            self._kept[shape] = self._captured(x)
        graph, given, said = self._kept[shape]
        given.copy_(x)
        graph.replay()
        return said

    def _captured(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        given = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their algorithms outside of the capture
            for _ in range(3):
                deploy.answers(self._network, given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            said = deploy.answers(self._network, given)
        return graph, given, said


class Torch:
    """What the child answers."""

    def __init__(self, task: str, preset: str, graphs: Path, how: How) -> None:
        self._task, self._preset, self._graphs, self._how = task, preset, graphs, how
        self._passes: timing.Passes | None = None

    def open(self, question: timing.Question) -> timing.Answer:
        """Build, then hold to the golden answers."""
        del question
        begun = time.perf_counter()
        torch.set_num_threads(self._how.threads)
        made = deploy.build(self._task, self._preset)
        with np.load(self._graphs / "golden.npz", allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
        sessions, lines = {}, []
        for name, network in made.networks.items():
            entry = made.models[name]
            tolerance = entry["tolerance"].get(self._how.precision)
            if tolerance is None:  # as in the package: this network stays at single precision
                how, tolerance = (
                    How(self._how.device, self._how.variant, "fp32", self._how.threads),
                    entry["tolerance"]["fp32"],
                )
            else:
                how = self._how
            sessions[name] = TorchSession(network, tuple(entry["outputs"]), how)
            lines.append(accept(name, sessions[name], golden, tolerance, tuple(entry["outputs"])))
        self._passes = timing.Passes(sessions, {name: {"x": x} for name, x in made.inputs.items()})
        return {
            "seconds": time.perf_counter() - begun,
            "version": torch.__version__,
            "models": {line.model: {"worst": line.worst, "tolerance": line.tolerance} for line in lines},
            **timing.memory(),
        }

    def time(self, question: timing.Question) -> timing.Answer:
        """Passes over all networks."""
        return {"error": "not open"} if self._passes is None else self._passes(question)


def serve(task: str, preset: str, graphs: Path, how: How, fd: int) -> int:
    """The child's life."""
    child = Torch(task, preset, graphs, how)
    timing.serve(fd, {"open": child.open, "time": child.time}, FOREIGN)
    return 0

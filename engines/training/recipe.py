"""What differs from task to task on the training side: `engines/<task>/recipe.py` subclasses `Recipe`.

The defaults are those of one network "classifier" whose head is linear on globally averaged features: a task of that
kind writes `write`, `sample` and `inputs` and is done. Importing this module needs no torch: phantoms are made where
just the node is installed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal

if TYPE_CHECKING:
    from torch import nn

    from engines.training.cohort import Cohort
    from engines.training.evaluate import Graph

Settings = Mapping[str, Any]
"""What `phantom.generator(name)` gives: the difficulty of phantom.yaml."""


@dataclass(frozen=True)
class Sample:
    """One unit of result as the network sees it, and what is known of it."""

    x: NDArray[np.float32]
    """(k, *input): k network inputs whose logits are averaged; k = 1 for a volume or a still."""
    place: NDArray[np.float32]
    """(*grid): share of each cell that a map should point at; zero where nothing is planted. Axes as the map has."""
    nuisance: NDArray[np.float64]
    """(q,): image statistics and metadata that a shortcut would use."""
    covariates: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """(c,): in the order of `Recipe.covariates`."""
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Further arrays of a fixed shape, for example a mask for the locator."""


@dataclass(frozen=True)
class Run:
    """One call of the command line."""

    task: str
    preset: str
    work: Path
    out: Path
    """The package folder."""
    processes: int = 1
    threads: int = 1
    device: str = "cpu"
    real: tuple[Path, ...] = ()
    folder: Path | None = None
    """Images with a table of labels, instead of phantoms."""
    readers: Path | None = None
    """Scores of readers on the test cohort, as CSV."""

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.task)

    @property
    def plan(self) -> dict[str, Any]:
        """training.yaml of the task."""
        return plan_of(self.task)

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.task}-{self.preset}"

    def cohort(self, name: str) -> Cohort:
        """A cohort of training.yaml, or the part of this name of the folder. Made once, then read from its file."""
        from engines.training import cohort, folder

        if self.folder is not None:
            return folder.cohort(self.recipe, self.folder, name)
        return cohort.build(cohort.Spec(self.task, **self.plan["cohorts"][name]), self.work, self.processes)


class Recipe:
    """The training side of a task; stateless."""

    task: str
    covariates: tuple[str, ...] = ()
    """Keys of the clinical values (`ClinicalInput.key`) of `Sample.covariates`."""
    method: str = "class activation map"
    explained: str = "classifier"
    """The model whose logits are the score."""
    value_range: tuple[float, float] = (-1.0, 3.0)
    """Black and white of a network input, for corruptions that a gate must notice."""
    network_name: str = ""
    """For the provenance: the published architecture."""
    plain: bool = True
    """One network whose train form gives (logits, features): the gates of gates.py can be asked of it."""
    points: bool = True
    """The graph's map and `Sample.place` have the same axes: the pointing game can be played."""

    # -- phantoms

    def write(self, args: argparse.Namespace) -> list[Path]:
        """The verb `phantom`: one study as DICOM files under `args.out`."""
        raise NotImplementedError

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        """A phantom through the engine's own preparation, as the node would see it in that encoding."""
        raise NotImplementedError

    def sources(self) -> list[Path]:
        """Files that shape the cohorts: a change of one makes them anew."""
        here = task_folder(self.task)
        names = ("phantom.py", "phantom.yaml", "engine.py", "recipe.py")
        return [Path(__file__).with_name("physics.py"), *(here / name for name in names)]

    # -- training

    def network(self, preset: str) -> nn.Module:
        """The train form of a preset."""
        module: nn.Module = importlib.import_module(f"engines.{self.task}.network").build(preset)
        return module

    def networks(self, preset: str) -> dict[str, nn.Module]:
        """Every network of a package of this preset by the name of its model, with weights as they begin: what
        `deploy` times. One that has no `deploy()` is exported as it is."""
        return {self.explained: self.network(preset)}

    def augment(
        self, x: NDArray[np.float32], place: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A batch (b, *input) and its places, changed by what leaves the label as it is."""
        from engines.training import augment

        return augment.stills(x, place, rng)

    def fit(self, run: Run) -> None:
        """Train everything the package holds; checkpoints lie in `run.checkpoint`."""
        from engines.training import fit

        settings = fit.Settings(**run.plan["presets"][run.preset], threads=run.threads, device=run.device)
        fit.fit(self.task, run.preset, settings, run.cohort("train"), run.cohort("validation"), run.checkpoint)

    def export(self, run: Run) -> dict[str, Any]:
        """Graphs and head.npz into `run.out`; what the card says of them (parameters, parity, fuse_error)."""
        from engines.training import export

        return export.classifier(self, run)

    # -- the package

    def inputs(self) -> list[dict[str, Any]]:
        """`inputs` of the manifest."""
        raise NotImplementedError

    def models(self, run: Run) -> dict[str, Any]:
        """`models` of the manifest."""
        from engines.training.export import TOLERANCE

        del run
        return {self.explained: {"inputs": ["x"], "outputs": ["logits", "features"], "tolerance": dict(TOLERANCE)}}

    def golden(self, run: Run) -> dict[str, NDArray[Any]]:
        """Cases of further models for golden.npz, named `<model>.<input or output>`."""
        del run
        return {}

    def graph(self, folder: Path) -> Graph:
        """The scoring model of a package."""
        from engines.training.evaluate import Graph

        return Graph.of(folder / "models" / self.explained / "fp32.onnx")

    def fusion(self, run: Run) -> dict[str, Any] | None:
        """`fusion` of the manifest."""
        del run
        return None

    def scale_maps(self, run: Run, graph: Graph, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps of validation positives: the fixed scale of the picture comes from them."""
        from engines.training import evaluate

        held = run.cohort("validation")
        return evaluate.maps(graph, weights, held.part(np.flatnonzero(held.y == 1)[:60]).frames()[0])

    # -- evaluation

    def measured(self, run: Run) -> dict[str, Any]:
        """Further figures of a package on its test cohort, into `metrics`; `more` holds sentences for the card."""
        del run
        return {}

    def image_input(self, grey: list[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        """Any images (H, W) as network input (k, *input), the engine's rules left aside; None = not possible."""
        engine: Any = engine_of(self.task)
        images = [(resize(g, engine.INPUT_SIZE) / 255 - engine.MEAN) / engine.STD for g in grey]
        return np.asarray(np.stack(images)[:, None], np.float32)


def plan_of(task: str) -> dict[str, Any]:
    """training.yaml of a task."""
    plan: dict[str, Any] = yaml.safe_load((task_folder(task) / "training.yaml").read_text("utf-8"))
    return plan


def task_folder(task: str) -> Path:
    """`engines/<task>`."""
    return Path(__file__).parents[1] / task


def recipe_of(task: str) -> Recipe:
    """`engines/<task>/recipe.py`."""
    found: Recipe = importlib.import_module(f"engines.{task}.recipe").RECIPE
    return found


def engine_of(task: str) -> ModuleType:
    """`engines/<task>/engine.py`."""
    return importlib.import_module(f"engines.{task}.engine")


def phantom_of(task: str) -> ModuleType:
    """`engines/<task>/phantom.py`."""
    return importlib.import_module(f"engines.{task}.phantom")

"""Cohorts: phantoms by seed, prepared by the task's own engine, kept as one `.npz` beside the training.

The image a network learns from goes through `engine.prepare`, the function the node runs; so training and use cannot
drift apart. No torch here: phantoms are made by plain processes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dicom_node.result import Refusal
from engines.training.recipe import Recipe, Sample, Settings, phantom_of, recipe_of


@dataclass(frozen=True)
class Spec:
    """A cohort, written down: the same spec gives the same arrays."""

    task: str
    first_seed: int
    count: int
    generator: str = "training"
    encoding: str = "raw"
    """raw | jpeg | mixed (every second clip went through JPEG), or what the task's `sample` knows."""

    def seeds(self) -> Iterator[tuple[int, int]]:
        """(seed, label): every seed once, labels alternate, so both classes are equally many."""
        for seed in range(self.first_seed, self.first_seed + self.count):
            yield seed, seed % 2


@dataclass(frozen=True)
class Cohort:
    """Prepared units; refused ones are named, not hidden."""

    x: NDArray[np.float16]
    """(units, inputs, *input); a unit with fewer inputs repeats its last one."""
    counts: NDArray[np.int64]
    """Inputs that are real."""
    y: NDArray[np.int64]
    place: NDArray[np.float16]
    """(units, *grid) share of each cell that holds the planted signal; zero for label 0."""
    seeds: NDArray[np.int64]
    nuisance: NDArray[np.float64]
    """(units, features)."""
    refused: tuple[tuple[int, str], ...]
    covariates: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    """(units, clinical values); NaN = not known."""
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Further arrays, one row a unit."""

    def frames(self) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """All real inputs, and the unit each belongs to."""
        real = np.arange(self.x.shape[1])[None] < self.counts[:, None]
        return self.x[real], np.nonzero(real)[0]

    def part(self, chosen: NDArray[Any]) -> Cohort:
        """Those units only, in this order."""
        return Cohort(
            self.x[chosen], self.counts[chosen], self.y[chosen], self.place[chosen], self.seeds[chosen],
            self.nuisance[chosen], (), self.covariates[chosen] if self.covariates.size else self.covariates,
            {key: value[chosen] for key, value in self.extra.items()},
        )  # fmt: skip


Job: TypeAlias = tuple[str, int, int, Settings, str]
"""Task, seed, label, settings of the generator, encoding."""
Made: TypeAlias = tuple[int, int, Sample | str]
"""Seed, label, the sample or why it was refused."""


def build(spec: Spec, work: Path, processes: int = 1) -> Cohort:
    """The cohort, from its file where that exists and matches."""
    sources = _sources(recipe_of(spec.task))
    key = hashlib.sha256(json.dumps([asdict(spec), sources], sort_keys=True).encode()).hexdigest()[:16]
    path = work / f"cohort-{spec.task}-{spec.generator}-{spec.first_seed}-{key}.npz"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        _save(path, arrays(_make(spec, processes)))
    return _load(path)


def _sources(recipe: Recipe) -> str:
    """Digest of everything that shapes the images: a changed generator never reuses an old cohort."""
    # The syntax tree, so that a comment or a line break does not make everything anew.
    parts = [
        ast.dump(ast.parse(f.read_text("utf-8"))) if f.suffix == ".py" else f.read_text("utf-8")
        for f in recipe.sources()
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _jobs(spec: Spec) -> Iterator[Job]:
    settings = phantom_of(spec.task).generator(spec.generator)
    for index, (seed, label) in enumerate(spec.seeds()):
        encoding = ("jpeg" if (index // 2) % 2 else "raw") if spec.encoding == "mixed" else spec.encoding
        yield spec.task, seed, label, settings, encoding


def _one(job: Job) -> Made:
    task, seed, label, settings, encoding = job
    sample = recipe_of(task).sample(seed, label, settings, encoding)
    return seed, label, str(sample) if isinstance(sample, Refusal) else sample


def _make(spec: Spec, processes: int) -> list[Made]:
    def shown(made: Iterable[Made]) -> list[Made]:
        about = f"phantoms {spec.task} {spec.generator} {spec.first_seed}"
        return list(tqdm(made, about, spec.count, mininterval=5, ascii=True))

    if processes <= 1:
        return shown(map(_one, _jobs(spec)))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return shown(pool.imap(_one, _jobs(spec), chunksize=8))


def arrays(made: list[Made]) -> dict[str, NDArray[Any]]:
    """What `_load` reads: all samples stacked, and the refusals as text."""
    kept = [(seed, label, value) for seed, label, value in made if isinstance(value, Sample)]
    refused = [(seed, value) for seed, _, value in made if isinstance(value, str)]
    if not kept:
        raise RuntimeError(f"every phantom was refused, first: {refused[0][1]}")
    samples = [value for _, _, value in kept]
    most = max(len(s.x) for s in samples)
    return {
        "x": np.stack([np.concatenate([s.x, np.repeat(s.x[-1:], most - len(s.x), 0)]) for s in samples]).astype("f2"),
        "counts": np.array([len(s.x) for s in samples]),
        "y": np.array([label for _, label, _ in kept]),
        "place": np.stack([s.place for s in samples]).astype("f2"),
        "seeds": np.array([seed for seed, _, _ in kept]),
        "nuisance": np.stack([s.nuisance for s in samples]),
        "covariates": np.stack([s.covariates for s in samples]),
        "refused": np.array(json.dumps(refused)),
        **{f"extra.{name}": np.stack([s.extra[name] for s in samples]) for name in samples[0].extra},
    }


def _save(path: Path, whole: Mapping[str, NDArray[Any]]) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **whole)
    part.replace(path)


def _load(path: Path) -> Cohort:
    with np.load(path, allow_pickle=False) as file:
        return from_arrays(file)


def from_arrays(file: Mapping[str, NDArray[Any]]) -> Cohort:
    """The inverse of `arrays`."""
    refused = tuple((int(seed), str(why)) for seed, why in json.loads(str(file["refused"])))
    extra = {name.removeprefix("extra."): file[name] for name in file if name.startswith("extra.")}
    return Cohort(
        file["x"], file["counts"], file["y"], file["place"], file["seeds"], file["nuisance"], refused,
        file["covariates"], extra,
    )  # fmt: skip

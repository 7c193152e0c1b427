"""Cohorts: phantoms by seed, prepared by the task's own engine, kept as one `.npz` beside the training.

The image a network learns from goes through `engine.prepare`, the function the node runs; so training and use cannot
drift apart. No torch here: phantoms are made by plain processes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from dicom_node.study import Header, Instance
from engines.training import dicomfile

PLACE = (28, 28)


@dataclass(frozen=True)
class Spec:
    """A cohort, written down: the same spec gives the same arrays."""

    task: str
    first_seed: int
    count: int
    generator: str = "training"
    encoding: str = "raw"
    """raw | jpeg | mixed (every second clip went through JPEG)."""

    def seeds(self) -> Iterator[tuple[int, int]]:
        """(seed, label): every seed once, labels alternate, so both classes are equally many."""
        for seed in range(self.first_seed, self.first_seed + self.count):
            yield seed, seed % 2


@dataclass(frozen=True)
class Cohort:
    """Prepared clips; refused ones are named, not hidden."""

    x: NDArray[np.float16]
    """(clips, frames, 1, H, W); a clip with fewer frames repeats its last one."""
    counts: NDArray[np.int64]
    """Frames that are real."""
    y: NDArray[np.int64]
    place: NDArray[np.float16]
    """(clips, 28, 28) share of each cell that holds the planted lesion; zero for label 0."""
    seeds: NDArray[np.int64]
    nuisance: NDArray[np.float64]
    """(clips, features): image statistics and metadata that a shortcut would use."""
    refused: tuple[tuple[int, str], ...]

    def frames(self) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """All real frames, and the clip each belongs to."""
        real = np.arange(self.x.shape[1])[None] < self.counts[:, None]
        return self.x[real], np.nonzero(real)[0]


class MemoryReader:
    """A PixelReader over frames that are already decoded."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._frames = frames

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[NDArray[Any]]:
        """As `dicom_node.engine.PixelReader`."""
        del instance
        for number in numbers or range(1, len(self._frames) + 1):
            yield self._frames[number - 1]


def engine_of(task: str) -> ModuleType:
    """`engines/<task>/engine.py`."""
    return importlib.import_module(f"engines.{task}.engine")


def phantom_of(task: str) -> ModuleType:
    """`engines/<task>/phantom.py`."""
    return importlib.import_module(f"engines.{task}.phantom")


def header_of(ds: Dataset) -> Header:
    """The attributes of a data set without bulk data, as the node sees them."""
    return Header(MappingProxyType(dict(_values(ds))))


def _values(ds: Dataset) -> Iterator[tuple[str, Any]]:
    for element in ds:
        if element.VR in ("OB", "OW", "UN") or element.is_empty:
            continue
        name = element.keyword or f"{int(element.tag):08X}"
        if element.VR == "SQ":
            yield name, tuple(header_of(item) for item in element.value)
        elif isinstance(element.value, MultiValue):
            yield name, tuple(_scalar(v, element.VR) for v in element.value)
        else:
            yield name, _scalar(element.value, element.VR)


def _scalar(value: Any, vr: str) -> str | int | float:
    if vr in ("DS", "FL", "FD"):
        return float(value)
    return int(value) if vr in ("IS", "US", "SS", "UL", "SL") else str(value)


def instance_of(ds: Dataset) -> Instance:
    """An Instance for a data set in memory."""
    return Instance("0" * 32, header_of(ds), str(ds.file_meta.TransferSyntaxUID), "", Path(), "", "", "", "", 0.0)


Job: TypeAlias = tuple[str, int, int, Mapping[str, Any], str]
"""Task, seed, label, settings of the generator, encoding."""


def prepare_clip(job: Job) -> tuple[Any, NDArray[np.float64], NDArray[np.float16]] | Refusal:
    """One phantom through the engine: (Prepared, nuisance features, place), or the engine's refusal."""
    task, seed, label, settings, encoding = job
    return prepare(task, phantom_of(task).make(seed, label, settings), encoding)


def prepare(task: str, clip: Any, encoding: str) -> tuple[Any, NDArray[np.float64], NDArray[np.float16]] | Refusal:
    """A clip in memory as the node would see it in that encoding, through the engine."""
    labels = dicomfile.Labels(uid_seed=clip.seed)
    header = dicomfile.dataset(_Thin(clip), "raw", labels)
    header.NumberOfFrames, header.Rows, header.Columns = clip.frames.shape[:3]
    frames = clip.frames
    if encoding == "jpeg":
        frames = np.stack([dicomfile.jpeg_round_trip(frame, labels.jpeg_quality) for frame in frames])
    prepared = engine_of(task).prepare(instance_of(header), MemoryReader(frames))
    if isinstance(prepared, Refusal):
        return prepared
    place = resize(clip.mass * np.float32(clip.label), PLACE).astype(np.float16)
    return prepared, nuisance_features(prepared.crops, clip), place


class _Thin:
    """A clip with one pixel, for its header: encoding 22 MB only to drop them would double the time."""

    def __init__(self, clip: Any) -> None:
        self.frames = np.zeros((1, 1, 1, 3), np.uint8)
        self.frame_ms, self.contrast, self.tissue, self.mm_per_px = (
            clip.frame_ms,
            clip.contrast,
            clip.tissue,
            clip.mm_per_px,
        )


def nuisance_features(crops: NDArray[np.uint8], clip: Any) -> NDArray[np.float64]:
    """What a network could use without seeing the mass: mean, spread, histogram, spectrum, lit area, metadata."""
    grey = crops.astype(np.float64) / 255
    lit = grey > 0.08
    histogram = np.histogram(grey, bins=8, range=(0, 1))[0] / grey.size
    power = (np.abs(np.fft.rfft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    rows = np.abs(np.fft.fftfreq(grey.shape[1]))[:, None]
    radius = np.hypot(rows, np.fft.rfftfreq(grey.shape[2])[None])
    edges = (0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1)
    spectrum = [power[(radius >= a) & (radius < b)].sum() for a, b in itertools.pairwise(edges)]
    shares = np.log(np.array(spectrum) / sum(spectrum) + 1e-9)
    per_frame = grey.mean(axis=(1, 2))
    summary = [
        grey.mean(),
        grey.std(),
        lit.mean(),
        float(np.median(grey)),
        per_frame[-1] - per_frame[0],
        per_frame.std(),
    ]
    metadata = [clip.frame_ms, clip.mm_per_px, float(clip.contrast[0]), float(len(crops))]
    return np.concatenate([summary, histogram, shares, metadata])


def build(spec: Spec, work: Path, processes: int = 1) -> Cohort:
    """The cohort, from its file where that exists and matches."""
    key = hashlib.sha256(json.dumps([asdict(spec), _sources(spec.task)], sort_keys=True).encode()).hexdigest()[:16]
    path = work / f"cohort-{spec.task}-{spec.generator}-{spec.first_seed}-{key}.npz"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        _save(path, _make(spec, processes))
    return _load(path)


def _sources(task: str) -> str:
    """Digest of everything that shapes the images: a changed generator never reuses an old cohort."""
    here = Path(__file__).parent
    files = [
        here / "physics.py",
        *(here.parent / task / n for n in ("phantom.py", "phantom.yaml", "engine.py")),
    ]
    # The syntax tree, so that a comment or a line break does not make everything anew.
    parts = [ast.dump(ast.parse(f.read_text("utf-8"))) if f.suffix == ".py" else f.read_text("utf-8") for f in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _one(job: Job) -> tuple[int, int, Any]:
    done = prepare_clip(job)
    if isinstance(done, Refusal):
        return job[1], job[2], str(done)
    prepared, nuisance, place = done
    return job[1], job[2], (prepared.x.astype(np.float16), nuisance, place)


def _jobs(spec: Spec) -> Iterator[Job]:
    settings = phantom_of(spec.task).generator(spec.generator)
    for index, (seed, label) in enumerate(spec.seeds()):
        encoding = ("jpeg" if (index // 2) % 2 else "raw") if spec.encoding == "mixed" else spec.encoding
        yield spec.task, seed, label, settings, encoding


def _make(spec: Spec, processes: int) -> dict[str, NDArray[Any]]:
    done: list[tuple[int, int, Any]] = []
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for item in pool.imap(_one, _jobs(spec), chunksize=8):
                done.append(item)
                _progress(spec, len(done))
    else:
        for job in _jobs(spec):
            done.append(_one(job))
            _progress(spec, len(done))
    return arrays(done)


def arrays(done: list[tuple[int, int, Any]]) -> dict[str, NDArray[Any]]:
    """(seed, label, what `prepare` gave or the refusal as text) of every clip, as the arrays of a Cohort."""
    kept = [(seed, label, value) for seed, label, value in done if not isinstance(value, str)]
    refused = [(seed, value) for seed, _, value in done if isinstance(value, str)]
    if not kept:
        raise RuntimeError(f"every phantom was refused, first: {refused[0][1]}")
    most = max(len(value[0]) for _, _, value in kept)
    return {
        "x": np.stack([np.concatenate([v[0], np.repeat(v[0][-1:], most - len(v[0]), 0)]) for _, _, v in kept]),
        "counts": np.array([len(v[0]) for _, _, v in kept]),
        "y": np.array([label for _, label, _ in kept]),
        "place": np.stack([v[2] for _, _, v in kept]),
        "seeds": np.array([seed for seed, _, _ in kept]),
        "nuisance": np.stack([v[1] for _, _, v in kept]),
        "refused": np.array(json.dumps(refused)),
    }


def _progress(spec: Spec, done: int) -> None:
    if done % 100 == 0 or done == spec.count:
        print(f"phantoms {spec.generator}: {done}/{spec.count}", flush=True)


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **arrays)
    part.replace(path)


def _load(path: Path) -> Cohort:
    with np.load(path, allow_pickle=False) as file:
        return from_arrays(file)


def from_arrays(file: Mapping[str, NDArray[Any]]) -> Cohort:
    """The inverse of `arrays`."""
    refused = tuple((int(seed), str(why)) for seed, why in json.loads(str(file["refused"])))
    return Cohort(file["x"], file["counts"], file["y"], file["place"], file["seeds"], file["nuisance"], refused)

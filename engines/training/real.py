"""Real files against a phantom-trained package: what refuses them, the task's rules or the out-of-distribution gate?

Reads DICOM (also inside .zip) and PNG below the folders it is given; writes nothing, keeps no name of a patient. Rules
are what the engine itself refuses before the scoring model is asked; its other models (a locator) run for real.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dicom_node.errors import NodeError
from dicom_node.pixels import ultrasound
from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError, decode_file
from dicom_node.result import Refusal
from dicom_node.store.header import read_header
from dicom_node.study import Header, Instance, Study
from engines.training import stats
from engines.training.evaluate import Graph
from engines.training.package import Choices
from engines.training.recipe import Recipe, engine_of

MAX_FRAMES = 12


@dataclass(frozen=True)
class RealFile:
    """What happened to one file that is not a phantom."""

    kind: str
    """dicom | png."""
    rule: str
    """The refusal by rule; "" = none (a PNG has no header to judge, and counts on the gate alone)."""
    distance: float
    """OOD statistic of the image, the rules left aside."""
    far: bool


class _ReachedError(Exception):
    """The engine asked the scoring model: no rule had refused."""


def examine(recipe: Recipe, package: Path, graph: Graph, choices: Choices, folders: Iterable[Path]) -> list[RealFile]:
    """Every decodable file below the folders."""
    found = []
    models = {p.parent.name: Graph.of(p) for p in package.glob("models/*/fp32.onnx")}

    def ask(name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        if name == recipe.explained:
            raise _ReachedError
        return models[name].run(inputs["x"])

    with tempfile.TemporaryDirectory() as scratch:
        for path in _files(folders, Path(scratch)):
            image = _images(recipe, path, ask)
            if image is None:
                continue
            kind, rule, x = image
            if x is None:  # nothing the network could be shown: the rule alone counts
                found.append(RealFile(kind, rule, float("nan"), False))
                continue
            distance = float(stats.mahalanobis2(graph.pooled(x), choices.ood_mean, choices.ood_precision).mean())
            found.append(RealFile(kind, rule, distance, distance > choices.ood_limit))
    return found


def summary(files: list[RealFile]) -> dict[str, Any]:
    """Shares with intervals, for the card."""
    either = sum(bool(f.rule) or f.far for f in files)  # a PNG has no header, and counts on the gate alone
    dicom = [f for f in files if f.kind == "dicom"]
    return {
        "files": len(files),
        "refused": stats.proportion(either, len(files)).to_json(),
        "by_gate_alone": stats.proportion(sum(f.far for f in files), len(files)).to_json(),
        "dicom_files": len(dicom),
        "dicom_refused_by_rule": stats.proportion(sum(bool(f.rule) for f in dicom), len(dicom)).to_json(),
        "dicom_by_gate_alone": stats.proportion(sum(f.far for f in dicom), len(dicom)).to_json(),
    }


def _files(folders: Iterable[Path], scratch: Path) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or "malformed" in path.parts:
                continue
            if path.suffix == ".zip":
                yield from _members(path, scratch)
            else:
                yield path


def _members(path: Path, scratch: Path) -> Iterator[Path]:
    with zipfile.ZipFile(path) as archive:
        for index, member in enumerate(archive.infolist()):
            if not member.is_dir() and member.file_size < 1 << 29:
                copy = scratch / f"{path.stem}-{index}"  # the member's own name is not trusted
                copy.write_bytes(archive.read(member))
                yield copy
                copy.unlink()


Ask = Callable[[str, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


def _images(recipe: Recipe, path: Path, ask: Ask) -> tuple[str, str, NDArray[np.float32] | None] | None:
    """(kind, rule, network input or None) or None when this is no image."""
    if path.suffix.lower() == ".png":
        if "mask" in path.stem:
            return None
        return "png", "", recipe.image_input([np.asarray(Image.open(path).convert("L"), np.uint8)])
    try:
        header = read_header(path)
        if not header.text("SOPClassUID"):
            return None
        count = int(header.number("NumberOfFrames") or 1)
        numbers = tuple(range(1, count + 1, max(1, count // MAX_FRAMES)))[:MAX_FRAMES]
        frames = list(decode_file(path, numbers))
    except NodeError:
        return None
    boxes = ultrasound.tissue_regions(header)
    region = boxes[0] if boxes else ultrasound.fan_region(frames)
    grey = [ultrasound.to_gray(frame) if frame.dtype == np.uint8 else _window(frame) for frame in frames]
    return (
        "dicom",
        _rule(recipe, path, header, ask),
        recipe.image_input([region.crop(g) if region else g for g in grey]),
    )


def _rule(recipe: Recipe, path: Path, header: Header, ask: Ask) -> str:
    engine: Any = engine_of(recipe.task)
    instance = Instance("0" * 32, header, "", "", path, "", "", "", "", 0.0)
    selection = engine.select(Study.from_instances(instance.study_instance_uid, 1, [instance]), {})
    if isinstance(selection, Refusal):
        return str(selection.code)
    try:
        answer = engine.predict(selection, PixelDecoder(), ask)
    except _ReachedError:
        return ""
    except PixelsUndecodableError as e:
        return str(e.refusal().code)
    return str(answer.code) if isinstance(answer, Refusal) else ""


def _window(frame: NDArray[Any]) -> NDArray[np.uint8]:
    """A deep image as a viewer would show it; this is evidence about the gate, not a reading of the image."""
    grey = frame.astype(np.float64) if frame.ndim == 2 else frame.mean(axis=2)
    low, high = np.percentile(grey, (1, 99))
    return np.asarray(np.clip((grey - low) / max(high - low, 1e-9) * 255, 0, 255), np.uint8)

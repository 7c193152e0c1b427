"""A cohort from a folder of images with a table of labels: a site's own data, or a public collection.

`labels.csv` in the folder (UTF-8): columns `file` (relative path of a PNG or DICOM file), `label` (0 | 1), `patient`
(any text; never printed), and optionally `split` (train | validation | test) and a column for each clinical value of
the task. Without `split`, patients are divided 60 : 20 : 20 by a digest of their identifier, so that no patient is in
two parts and the division does not change when data are added. PNG images are taken as they are (`image_input`); DICOM
files go through the engine's own `prepare`.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal
from dicom_node.store.header import read_header
from dicom_node.study import Instance
from engines.training.cohort import Cohort, arrays, from_arrays
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Sample, engine_of

PARTS = ("train", "validation", "test")
PLACE = (28, 28)


def cohort(recipe: Recipe, folder: Path, part: str) -> Cohort:
    """One part. Raises ValueError that names the row and the column that is wrong."""
    if part not in PARTS:
        raise ValueError(f"a folder has the parts {', '.join(PARTS)}, not {part}")
    made: list[tuple[int, int, Sample | str]] = []
    for number, row in _rows(folder / "labels.csv"):
        if (row.get("split") or split_of(row["patient"])) == part:
            made.append((number, int(row["label"]), _sample(recipe, _inside(folder, row["file"], number), row)))
    return from_arrays(arrays(made))


def from_class_folders(source: Path, negative: str, positive: str, out: Path) -> int:
    """A collection that keeps its classes in folders of those names, copied to `out` with its table; how many files.

    Every file counts as a patient of its own, for want of better: say so where you report figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for label, name in enumerate((negative, positive)):
        for path in sorted((source / name).glob("*.png")):
            if "mask" in path.stem:
                continue
            copy = f"{name}-{path.stem}.png"
            shutil.copyfile(path, out / copy)
            rows.append((copy, label, f"{name} {path.stem}"))
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "label", "patient"), *rows])
    return len(rows)


def split_of(patient: str) -> str:
    """60 : 20 : 20 by a digest of the identifier."""
    place = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 10
    return "train" if place < 6 else "validation" if place < 8 else "test"


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        seen: dict[str, str] = {}
        for number, row in enumerate(csv.DictReader(file), start=1):
            for column in ("file", "label", "patient"):
                if not row.get(column):
                    raise ValueError(f"{table.name}: row {number}: column {column} is empty or missing")
            if row["label"] not in ("0", "1"):
                raise ValueError(f"{table.name}: row {number}: label is 0 or 1")
            split = row.get("split") or ""
            if split and split not in PARTS:
                raise ValueError(f"{table.name}: row {number}: split is one of {', '.join(PARTS)}")
            if seen.setdefault(row["patient"], split) != split:
                raise ValueError(f"{table.name}: row {number}: this patient is in two splits")
            yield number, row


def _inside(folder: Path, name: str, number: int) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"labels.csv: row {number}: file is not a file inside the folder")
    return path


def _sample(recipe: Recipe, path: Path, row: dict[str, str]) -> Sample | str:
    covariates = np.array([float(row.get(name) or "nan") for name in recipe.covariates])
    if path.suffix.lower() == ".png":
        grey = np.asarray(Image.open(path).convert("L"), np.uint8)
        x = recipe.image_input([grey])
        return "NOT_AN_INPUT" if x is None else _of(x, grey[None], covariates)
    instance = Instance("0" * 32, read_header(path), "", "", path, "", "", "", "", 0.0)
    engine: Any = engine_of(recipe.task)
    found = engine.prepare(instance, PixelDecoder())
    return str(found) if isinstance(found, Refusal) else _of(found.x, found.crops, covariates)


def _of(x: NDArray[np.float32], images: NDArray[np.uint8], covariates: NDArray[np.float64]) -> Sample:
    grid = PLACE if x.ndim == 4 else (1, *PLACE)
    return Sample(x, np.zeros(grid, np.float32), image_statistics(images.astype(np.float64) / 255), covariates)

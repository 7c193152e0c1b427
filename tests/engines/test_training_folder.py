"""A site's own images: divided by patient, refused by row and column where the table is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tqdm", reason="tqdm is not installed (pip install 'dicom-node[train]')")

from engines.training import folder
from engines.training.recipe import recipe_of

RECIPE = recipe_of("renal_ceus")


def table(where: Path, *rows: str, header: str = "file,label,patient") -> Path:
    where.mkdir(exist_ok=True)
    (where / "labels.csv").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return where


def png(where: Path, name: str, level: int = 90) -> str:
    where.mkdir(exist_ok=True)
    Image.fromarray(np.full((60, 80), level, np.uint8)).save(where / name)
    return name


def test_no_patient_is_in_two_parts_and_the_division_does_not_depend_on_order(tmp_path: Path) -> None:
    rows = [f"{png(tmp_path, f'{p}-{i}.png', 10 * i + 5)},{p % 2},patient {p}" for p in range(30) for i in range(2)]
    seen: dict[str, int] = {}
    for part in folder.PARTS:
        found = folder.cohort(RECIPE, table(tmp_path, *rows), part)
        for row in found.seeds - 1:
            assert seen.setdefault(rows[row].split(",")[2], folder.PARTS.index(part)) == folder.PARTS.index(part)
        assert len(found.y) == len(found.x) > 0
    assert len(seen) == 30
    backwards = folder.cohort(RECIPE, table(tmp_path, *reversed(rows)), "test")
    forwards = folder.cohort(RECIPE, table(tmp_path, *rows), "test")
    assert len(backwards.y) == len(forwards.y)


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    rows = [f"{png(tmp_path, f'{k}.png')},{k % 2},p{k},{part}" for k, part in enumerate(folder.PARTS)]
    source = table(tmp_path, *rows, header="file,label,patient,split")
    assert [list(folder.cohort(RECIPE, source, part).seeds) for part in folder.PARTS] == [[1], [2], [3]]


def test_a_png_becomes_what_the_network_sees(tmp_path: Path) -> None:
    source = table(tmp_path, f"{png(tmp_path, 'a.png', 128)},1,p,test", header="file,label,patient,split")
    x = folder.cohort(RECIPE, source, "test").x
    assert x.shape == (1, 1, 1, 224, 224)
    assert x.astype(float) == pytest.approx((128 / 255 - 0.25) / 0.25, abs=0.01)


def test_dicom_files_go_through_the_engines_own_preparation(tmp_path: Path, phantom_file: Callable[..., Path]) -> None:
    clip = phantom_file(900_100, 1)
    (tmp_path / "clip.dcm").write_bytes(clip.read_bytes())
    (tmp_path / "broken.dcm").write_bytes(clip.read_bytes()[:20_000])
    source = table(tmp_path, "clip.dcm,1,p,test", header="file,label,patient,split")
    found = folder.cohort(RECIPE, source, "test")
    assert found.counts[0] >= 3
    assert found.refused == ()


@pytest.mark.parametrize(
    ("row", "header", "said"),
    [
        ("a.png,2,p", "file,label,patient", "row 1: label is 0 or 1"),
        ("a.png,1,", "file,label,patient", "row 1: column patient is empty or missing"),
        ("a.png,1", "file,label", "row 1: column patient is empty or missing"),
        ("../a.png,1,p", "file,label,patient", "row 1: file is not a file inside the folder"),
        ("no.png,1,p", "file,label,patient", "row 1: file is not a file inside the folder"),
        ("a.png,1,p,holdout", "file,label,patient,split", "row 1: split is one of train, validation, test"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, header: str, said: str) -> None:
    inside = tmp_path / "cohort"
    png(tmp_path, "a.png")
    png(inside, "a.png")
    source = table(inside, row, header=header)
    with pytest.raises(ValueError, match=said):
        for part in folder.PARTS:
            folder.cohort(RECIPE, source, part)


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    png(tmp_path, "a.png")
    source = table(tmp_path, "a.png,1,p,train", "a.png,0,p,test", header="file,label,patient,split")
    with pytest.raises(ValueError, match="row 2: this patient is in two splits"):
        folder.cohort(RECIPE, source, "train")

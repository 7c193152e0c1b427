"""Every real ultrasound and MR file of the shared data, by its row of the table: decoded, or refused for the reason.

The table says what each file is; what the node makes of it stands here, so a file that is added must be judged too.
"""

from __future__ import annotations

import csv
import zipfile
from collections import defaultdict
from pathlib import Path

import dce
import numpy as np
import pytest

from dicom_node.config import load, shipped
from dicom_node.pixels import dynamic
from dicom_node.pixels.decode import FRAME_COUNT_CORRECTED, PixelDecoder
from dicom_node.pixels.dynamic import Rules
from dicom_node.pixels.ultrasound import frame_times
from dicom_node.result import Refusal
from dicom_node.route import evaluate_all

Row = dict[str, str]
TWO_SLICES = Rules(minimum_slices=2)


@pytest.fixture
def rows(shared_data: Path) -> list[Row]:
    with (shared_data / "index.tsv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row for row in found if row["file"].startswith(("us/", "mr/"))]


def path_of(shared_data: Path, tmp_path: Path, name: str) -> Path:
    path = shared_data / name
    if path.suffix != ".zip":
        return path
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(archive.namelist()[0], tmp_path))


def test_every_image_is_decoded_whole(rows: list[Row], shared_data: Path, tmp_path: Path) -> None:
    """All frames the table counts, of the size of the header, none of them one value only."""
    judged = 0
    for row in rows:
        if row["file"].endswith("qiba_dce_dro_v4.zip"):
            continue  # 667 files, judged in test_dynamic.py
        (instance,) = dce.stored([path_of(shared_data, tmp_path, row["file"])]).instances
        decoder = PixelDecoder()
        size = instance.header.number("Rows"), instance.header.number("Columns")
        count = 0
        for frame in decoder.frames(instance):
            assert frame.shape[:2] == size, row["file"]
            assert frame.min() < frame.max(), row["file"]
            count += 1
        assert count == int(row["frames"]), row["file"]
        assert FRAME_COUNT_CORRECTED not in decoder.notes(instance)
        judged += 1
    assert judged > 100


def test_every_mr_folder_is_refused_as_a_dynamic_study_for_its_own_reason(rows: list[Row], shared_data: Path) -> None:
    """None of them is a contrast-enhanced liver. The head study and the functional series name no stack at all."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for row in rows:
        if row["file"].startswith("mr/") and row["file"].endswith(".dcm"):
            folders[str(Path(row["file"]).parent.relative_to("mr"))].append(shared_data / row["file"])
    assert len(folders) > 15
    for folder, files in sorted(folders.items()):
        found = dynamic.plan(dce.stored(sorted(files)), TWO_SLICES)
        assert isinstance(found, Refusal), folder
        # Three small test files of a head lie in one folder as one "study", and one does not say where its slices are.
        wanted = "GEOMETRY_MIXED" if folder == "." else "NO_SUITABLE_IMAGE"
        assert found.code == wanted, (folder, str(found))


def test_the_head_study_reaches_no_liver_engine(shared_data: Path) -> None:
    routes = load(shipped() / "config.yaml").routes
    paths = sorted((shared_data / "mr" / "adit_samples").rglob("*.dcm"))
    verdicts = {v.route: v for v in evaluate_all(routes, dce.stored(paths), {})}
    assert paths and not verdicts["liver-dce"].matched


def test_the_uneven_clip_lasts_as_long_as_its_vector_says(shared_data: Path) -> None:
    """Philips and Acuson write one time for each frame; a mean frame rate would be wrong by the pauses."""
    (instance,) = dce.stored([shared_data / "us" / "acuson_echo_65f_jpegbaseline.dcm"]).instances
    times = frame_times(instance.header)
    assert not isinstance(times, Refusal)
    steps = np.diff(times)
    vector = [float(v) for v in instance.header.texts("FrameTimeVector")]
    assert len(times) == 65 and times[-1] == pytest.approx(sum(vector[1:]) / 1000)
    assert steps.max() > 1.01 * steps.min(), "uneven"

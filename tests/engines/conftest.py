"""Phantom studies for the tests of the tasks: clips as the node would see them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # engines/ is no part of the installed dicom_node
    sys.path.insert(0, str(ROOT))

from dicom_node.store.header import read_header  # noqa: E402
from dicom_node.study import Header, Instance, Study  # noqa: E402


@pytest.fixture(scope="session")
def phantom_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """phantom_file(seed, label, encoding="jpeg", frames=…, **Labels) -> path; the same arguments share one file."""
    from engines.renal_ceus import phantom
    from engines.training import dicomfile

    folder, made = tmp_path_factory.mktemp("phantoms"), {}

    def make(seed: int, label: int, encoding: str = "jpeg", frames: int = phantom.FRAMES, **labels: object) -> Path:
        key = repr((seed, label, encoding, frames, sorted(labels.items())))
        if key not in made:
            clip = phantom.make(seed, label, frames=frames)
            path = folder / f"{len(made)}.dcm"
            made[key] = dicomfile.write(clip, path, encoding, dicomfile.Labels(**labels))  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def instance_of() -> Callable[..., Instance]:
    """instance_of(path, **changes) -> Instance; a change of None removes the attribute."""

    def make(path: Path, **changes: object) -> Instance:
        values = dict(read_header(path)) | changes
        header = Header({key: value for key, value in values.items() if value is not None})  # type: ignore[misc]
        return Instance("0" * 32, header, "", "0" * 64, path, "MODALITY", "DICOM_NODE", "127.0.0.1", "a", 0.0)

    return make


@pytest.fixture(scope="session")
def study_of() -> Callable[..., Study]:
    """study_of(*instances) -> Study."""
    return lambda *instances: Study.from_instances("1.2.3", 1, instances)

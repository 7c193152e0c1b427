"""Fixtures that several rooms use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import hypothesis
import pytest

from dicom_node.study import Header, Instance

# A search by chance belongs to a developer's desk; continuous integration asks the same question each time.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

REPOSITORY = Path(__file__).parent.parent


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shared_data() -> Path:
    """Real DICOM beside the checkout; a test that needs it is skipped by name where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real DICOM samples (../shared/data)")
    return folder


@pytest.fixture
def make_instance() -> Callable[..., Instance]:
    """Instances of one ultrasound study; keywords change the header, `at`, `digest` and `association` the rest."""
    numbers = itertools.count(1)

    def make(at: float = 0.0, digest: str = "a", association: str = "A1", **header: object) -> Instance:
        values: dict[str, object] = {
            "StudyInstanceUID": "1.2.3",
            "SeriesInstanceUID": "1.2.3.0",
            "SOPInstanceUID": "1.2.3.1",
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.3.1",
            "PatientID": "P1",
            "Modality": "US",
        } | header
        about = Header(MappingProxyType(values))  # type: ignore[arg-type]
        own = f"{next(numbers):032x}"
        return Instance(own, about, "1.2.840.10008.1.2.1", digest, Path(own), "MOD", "NODE", "::1", association, at)

    return make

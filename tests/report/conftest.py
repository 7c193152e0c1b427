"""Synthetic sources, results and contexts for the report tests."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from dicom_node import report
from dicom_node.config import Report as ReportConfig
from dicom_node.packages import Task
from dicom_node.report import BuiltObject, ReportContext, Variant
from dicom_node.result import (
    ArrayFile,
    ClinicalInput,
    Code,
    Finding,
    FrameRef,
    Fusion,
    Heatmap,
    Provenance,
    Refusal,
    Result,
    Score,
)
from dicom_node.study import Header, Instance

US_MULTIFRAME = "1.2.840.10008.5.1.4.1.1.3.1"
STUDY = "1.2.826.0.1.3680043.8.498.1000"
CREATED = datetime(2026, 3, 4, 5, 6, 7, 890000, tzinfo=UTC)
KIDNEY = Code("64033007", "SCT", "Kidney")
THYROID = Code("69748006", "SCT", "Thyroid")
RIGHT = Code("24028007", "SCT", "Right")
OUTCOME = Code("PROB-HIGHGRADE", "99INFER", "Probability of high nuclear grade")


TASK = Task.model_validate(
    {
        "schema": 1, "task": "renal_ceus", "title": "Grade of a renal mass", "unit": "lesion", "modality": "US",
        "series_description": "AI renal CEUS ccRCC grade", "study_reference": "a study", "paired": True,
        "indication": {"value": "IND-CCRCC", "scheme": "99INFER", "meaning": "Suspected ccRCC"},
        "finding": {"value": "108369006", "scheme": "SCT", "meaning": "Neoplasm"},
        "site": {"value": "64033007", "scheme": "SCT", "meaning": "Kidney"},
        "outcome": {"value": "PROB-HIGHGRADE", "scheme": "99INFER", "meaning": "Probability of high nuclear grade"},
        "categories": {
            name: {"value": value, "scheme": "99INFER", "meaning": value.title()}
            for name, value in (("name", "RISKCAT"), ("high", "HIGH"), ("low", "LOW"), ("indeterminate", "INDET"))
        },
    }
)  # fmt: skip


def us_clip(number: int = 1, **changes: Any) -> Dataset:
    """A valid US Multi-frame of 12 RGB frames with an ASCII patient; `changes` sets keywords, None removes one."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = US_MULTIFRAME, f"{STUDY}.1.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, f"{STUDY}.1"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "US", "ACME", "Echo 3"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "P-001", "19600102", "F"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20260303", "101112", "S1", "A-77"
    ds.ReferringPhysicianName, ds.SeriesNumber, ds.InstanceNumber = "Ref^R", 1, number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0001"]
    ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = 12, "40", 0x00181063
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 96, 128, 8, 8, 7
    ds.PixelRepresentation, ds.LossyImageCompression, ds.BodyPartExamined = 0, "00", "KIDNEY"
    ds.Laterality = "R"
    ds.PatientOrientation = None
    for keyword, value in changes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    return ds


def write(ds: Dataset, path: Path, *, big_endian: bool = False) -> Path:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian if big_endian else ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def spill(folder: Path, name: str, array: np.ndarray[Any, Any]) -> ArrayFile:
    np.save(folder / name, array, allow_pickle=False)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return ArrayFile(name, digest, array.shape, str(array.dtype))


@dataclass
class Case:
    """One study with a result; a test changes what it is about, then builds."""

    folder: Path
    sources: dict[str, Instance] = field(default_factory=dict)
    intended_use: str = "research"
    site: Code = KIDNEY
    laterality: Code | None = RIGHT
    laterality_note: str = ""
    frames: int = 12
    noise: bool = False
    parameters: dict[str, str] = field(default_factory=lambda: {"threshold": "0.5", "temperature": "1.3"})
    context: dict[str, Any] = field(default_factory=dict)
    frame_time_ms: float | None = 40.0
    fusion: Fusion | None = None
    notes: tuple[str, ...] = ()
    clinical: tuple[ClinicalInput, ...] = ()
    scores: tuple[Score, ...] = (Score(OUTCOME, 0.831249),)

    def add(self, ds: Dataset, *, big_endian: bool = False, transfer_syntax: str | None = None) -> None:
        path = write(ds, self.folder / f"{len(self.sources)}.dcm", big_endian=big_endian)
        uid = str(ds.SOPInstanceUID)
        values = {
            "SOPInstanceUID": uid,
            "SOPClassUID": str(ds.SOPClassUID),
            "SeriesInstanceUID": str(ds.SeriesInstanceUID),
        }
        syntax = transfer_syntax or str(ds.file_meta.TransferSyntaxUID)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.sources[uid] = Instance(
            f"{len(self.sources):032x}", Header.from_json(values), syntax, digest, path, "US1", "NODE", "::1", "a", 0.0
        )

    def add_file(self, path: Path) -> None:
        """A real file, as it is."""
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        uid, syntax = str(ds.SOPInstanceUID), str(ds.file_meta.TransferSyntaxUID)
        values = {"SOPInstanceUID": uid, "SOPClassUID": str(ds.SOPClassUID)}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.sources[uid] = Instance("0" * 32, Header.from_json(values), syntax, digest, path, "", "", "", "", 0.0)
        self.context["study_instance_uid"] = str(ds.StudyInstanceUID)

    @property
    def first(self) -> Instance:
        return next(iter(self.sources.values()))

    def heatmap(self) -> Heatmap:
        rng = np.random.default_rng(5)
        frames = rng.integers(0, 256 if self.noise else 2, (self.frames, 60, 80), np.uint8)
        maps = np.zeros((self.frames, 60, 80), np.float32)
        for n in range(self.frames):
            maps[n, 20:40, 30 : 31 + 4 * n] = 2.0
        uid, sop_class = self.first.sop_instance_uid, self.first.sop_class_uid
        refs = tuple(FrameRef(sop_class, uid, n + 1, self.frames) for n in range(self.frames))
        return Heatmap(
            "class activation map", OUTCOME, spill(self.folder, "f.npy", frames), spill(self.folder, "m.npy", maps),
            refs, (10, 20, 89, 79), 1.0, 4.0, self.frame_time_ms,
        )  # fmt: skip

    def spill(self, name: str, array: np.ndarray[Any, Any]) -> ArrayFile:
        return spill(self.folder, name, array)

    def finding(self, heatmap: Heatmap | None) -> Finding:
        refs = heatmap.frame_refs[: self.frames // 2] if heatmap else ()
        return Finding(
            "Lesion 1", Code("108369006", "SCT", "Neoplasm"), self.site, self.laterality, self.laterality_note,
            Code("RISKCAT", "99INFER", "Risk category"), Code("HIGH", "99INFER", "High grade favoured"),
            self.scores, refs, heatmap, "none", self.fusion, self.notes,
        )  # fmt: skip

    def result(self) -> Result:
        provenance = Provenance(
            "renal_ceus", "0.1.0", "ab" * 32, self.intended_use, "onnx-cpu", "fp32", "RepVGG-A0 (demo width) CEUS",
            self.parameters,
        )  # fmt: skip
        finding = self.finding(self.heatmap())
        title = "AI renal CEUS ccRCC grade"
        return Result("renal-ceus", (finding,), provenance, self.clinical, tuple(self.sources), "cd" * 32, title, 0.4)

    def report_context(self, **changes: Any) -> ReportContext:
        base = ReportContext(ReportConfig(), "node-of-the-tests", CREATED, STUDY, self.folder)
        return replace(base, **(self.context | changes))

    def build(self, **changes: Any) -> tuple[BuiltObject, ...]:
        return report.build(self.result(), self.sources, self.report_context(**changes))

    def only(self, kind: str, **variant: Any) -> BuiltObject:
        """Build one variant and return the first object of this kind."""
        built = self.build(variants=(Variant(objects=(kind,), **variant),))
        return built[0]

    def sr(self, **variant: Any) -> Dataset:
        return self.read(self.only("sr", **variant))

    def capture(self, **variant: Any) -> Dataset:
        return self.read(self.only("capture", **variant))

    def not_assessable(self, refusal: Refusal, *, provenance: bool = True, **changes: Any) -> BuiltObject:
        used = self.result().provenance if provenance else None
        (built,) = report.build_not_assessable(refusal, TASK, self.sources, self.report_context(**changes), used)
        return built

    @staticmethod
    def read(built: BuiltObject) -> Dataset:
        return pydicom.dcmread(BytesIO(built.data))

    def save(self, built: BuiltObject) -> Path:
        path = self.folder / f"{built.sop_instance_uid}.dcm"
        path.write_bytes(built.data)
        return path


@pytest.fixture
def clip() -> Callable[..., Dataset]:
    return us_clip


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time of a build is the packing of pixels that most tests do not look at."""
    monkeypatch.setattr("dicom_node.report.picture.PANEL", 80)


@pytest.fixture
def case(tmp_path: Path, small_pictures: None) -> Case:
    made = Case(tmp_path)
    made.add(us_clip())
    return made


@pytest.fixture
def empty_case(tmp_path: Path, small_pictures: None) -> Case:
    return Case(tmp_path)


def run_tool(*command: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a validator; skipped by name where it is not installed."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )


@pytest.fixture
def dciodvfy() -> Callable[[Path], list[str]]:
    """The errors and warnings of dciodvfy, without the warning that every private code draws."""

    def run(path: Path) -> list[str]:
        done = run_tool("dciodvfy", "-new", path)
        lines = (done.stdout + done.stderr).splitlines()
        assert [x for x in lines if x.endswith(("SR", "SCImage"))], "one line names the IOD it recognised"
        return [x for x in lines if x.startswith(("Error", "Warning")) and "99INFER" not in x]

    return run


@pytest.fixture
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_tool


@pytest.fixture
def pixelmed() -> Callable[[Path], list[str]]:
    """The errors of PixelMed's SR validator, which knows the templates. Some twenty seconds a document."""
    jar = Path("/usr/share/java/pixelmed.jar")
    if not jar.is_file():
        pytest.skip("needs PixelMed (libpixelmed-java)")
    limits = [f"-Djdk.xml.xpath{name}Limit=0" for name in ("ExprOp", "TotalOp", "ExprGrp")]

    def run(path: Path) -> list[str]:
        done = run_tool(
            "java", "-Xmx3g", *limits, "-cp", f"{jar}:/usr/share/java/commons-codec.jar",
            "com.pixelmed.validate.DicomSRValidator", path, timeout=200,
        )  # fmt: skip
        said = (done.stdout + done.stderr).splitlines()
        assert any("validation complete" in line.lower() for line in said), done.stderr
        return [line for line in said if line.startswith("Error")]

    return run

"""One dynamic liver phantom in every encoding that scanners write, with pydicom; read back as the node does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from dicom_node.store.header import read_header
from dicom_node.study import Instance, Study

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
NAMES = ("pre", "arterial", "portal venous", "delayed")
SECONDS = (-20.0, 25.0, 70.0, 180.0)
"""After the injection."""
INJECTION = 36020.0
"""Seconds of the day: 10:00:20."""
SPACING, GAP, ORIGIN = (1.5, 1.25), 3.0, (-8.0, -6.0, -40.0)
"""Row and column spacing, between slices, first voxel; mm."""

Mark = Callable[[Dataset, int, int], None]
"""What an encoding writes into slice s of phase p."""


def phantom(seed: int = 0, depth: int = 20, rows: int = 12, columns: int = 10) -> NDArray[np.uint16]:
    """(P, D, H, W): smooth enough to be resampled, different in every slice and phase."""
    rng = np.random.default_rng(seed)
    s, r, c = np.meshgrid(np.arange(depth), np.arange(rows), np.arange(columns), indexing="ij")
    gain = np.array([100.0, 400.0, 300.0, 220.0])[:, None, None, None]
    body = 40 * s + 7 * r + 3 * c + rng.integers(0, 5, size=s.shape)
    return np.asarray(gain + body[None] * np.array([1.0, 1.6, 1.4, 1.2])[:, None, None, None], dtype=np.uint16)


def tm(seconds: float) -> str:
    """A TM of seconds since midnight."""
    seconds %= 86400
    return f"{int(seconds // 3600):02d}{int(seconds % 3600 // 60):02d}{seconds % 60:09.6f}"


@dataclass
class Dce:
    """The phantom and where it lies; `datasets` and `enhanced` encode it."""

    values: NDArray[np.uint16] = field(default_factory=phantom)
    study_uid: str = field(default_factory=generate_uid)
    frame_uid: str = field(default_factory=generate_uid)
    injection: float = INJECTION
    tilt: float = 0.0
    """Degrees about the left-right axis: an oblique stack."""

    @property
    def axes(self) -> NDArray[np.float64]:
        """Row direction, column direction, normal."""
        a = np.deg2rad(self.tilt)
        return np.array([[1.0, 0, 0], [0, np.cos(a), np.sin(a)], [0, -np.sin(a), np.cos(a)]])

    def affine(self) -> NDArray[np.float64]:
        """(column, row, slice, 1) → mm."""
        out = np.eye(4)
        out[:3, :3] = (self.axes * np.array([SPACING[1], SPACING[0], GAP])[:, None]).T
        out[:3, 3] = ORIGIN
        return out

    def time(self, phase: int) -> float:
        """Seconds of the day at which a phase was acquired."""
        return self.injection + SECONDS[phase]

    def blank(self, sop_class: str, series: str) -> Dataset:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = self.study_uid, series, self.frame_uid
        ds.Modality, ds.PatientID, ds.PatientName, ds.Manufacturer = "MR", "T1", "Secret^Name", "TEST"
        ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260301"
        ds.StudyTime = ds.SeriesTime = tm(self.time(0))
        ds.ImageType, ds.SeriesNumber, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "M"], 1, 1
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.Rows, ds.Columns = self.values.shape[2:]
        ds.ContrastBolusAgent, ds.ContrastBolusStartTime = "Gadobutrol", tm(self.injection)
        return ds

    def position(self, s: int) -> list[float]:
        return [round(float(v), 6) for v in (self.affine() @ np.array([0, 0, s, 1.0]))[:3]]

    def slice(self, p: int, s: int, series: str) -> Dataset:
        """A classic MR image without anything that says which phase it is."""
        ds = self.blank(MR, series)
        ds.ScanningSequence, ds.SequenceVariant, ds.MRAcquisitionType = "GR", "SP", "3D"
        ds.RepetitionTime, ds.EchoTime, ds.FlipAngle = 4.2, 1.9, 10
        ds.PixelSpacing, ds.SliceThickness, ds.SpacingBetweenSlices = list(SPACING), GAP, GAP
        ds.ImageOrientationPatient = [round(float(v), 8) for v in self.axes[:2].ravel()]
        ds.ImagePositionPatient = self.position(s)
        ds.AcquisitionTime, ds.ContentTime = tm(self.time(0)), tm(self.time(3) + 60)
        ds.PixelData = self.values[p, s].tobytes()
        return ds

    def datasets(self, mark: Mark, one_series: bool = True) -> list[Dataset]:
        """Classic images, one a slice and phase."""
        phases, depth = self.values.shape[:2]
        shared = generate_uid()
        found = []
        for p in range(phases):
            series = shared if one_series else generate_uid()
            for s in range(depth):
                ds = self.slice(p, s, series)
                ds.InstanceNumber = p * depth + s + 1 if one_series else s + 1
                ds.SeriesNumber = 1 if one_series else p + 1
                ds.SeriesDescription = "t1 dyn tra" if one_series else f"t1_vibe_fs_tra_{p}"
                mark(ds, p, s)
                found.append(ds)
        return found

    def enhanced(
        self, mark: Callable[[Dataset, Dataset, int, int], None], order: Sequence[int] | None = None
    ) -> Dataset:
        """One Enhanced MR instance; `mark(data set, functional group, p, s)`; `order` of the p * D + s."""
        phases, depth = self.values.shape[:2]
        ds = self.blank(ENHANCED_MR, generate_uid())
        ds.SeriesDescription, ds.EchoPulseSequence, ds.MRAcquisitionType = "t1 dyn tra", "GRADIENT", "3D"
        ds.AcquisitionDateTime, ds.NumberOfFrames = "20260301" + tm(self.time(0)), phases * depth
        orientation = [round(float(v), 8) for v in self.axes[:2].ravel()]
        ds.SharedFunctionalGroupsSequence = [
            item(
                PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
                PixelMeasuresSequence=[item(PixelSpacing=list(SPACING), SliceThickness=GAP)],
                MRTimingAndRelatedParametersSequence=[item(RepetitionTime=4.2)],
                MREchoSequence=[item(EffectiveEchoTime=1.9)],
                MRImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY", "T1", "NONE"])],
            )
        ]
        sequence = list(range(phases * depth)) if order is None else list(order)
        ds.PerFrameFunctionalGroupsSequence = []
        for k in sequence:
            p, s = divmod(k, depth)
            group = item(PlanePositionSequence=[item(ImagePositionPatient=self.position(s))])
            group.FrameContentSequence = [Dataset()]
            mark(ds, group, p, s)
            ds.PerFrameFunctionalGroupsSequence.append(group)
        flat = self.values.reshape(-1, *self.values.shape[2:])
        ds.PixelData = flat[sequence].tobytes()
        return ds


def item(**values: Any) -> Dataset:
    """A sequence item."""
    ds = Dataset()
    for key, value in values.items():
        setattr(ds, key, value)
    return ds


def big_endian(datasets: Iterable[Dataset]) -> list[Dataset]:
    """The same images in Explicit VR Big Endian."""
    found = []
    for ds in datasets:
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        found.append(ds)
    return found


def study(folder: Path, datasets: Iterable[Dataset]) -> Study:
    """Write and read as the node does."""
    folder.mkdir(parents=True, exist_ok=True)
    return Study.from_instances("1.2.3", 1, [instance(folder, n, ds) for n, ds in enumerate(datasets, start=1)])


def instance(folder: Path, number: int, ds: Dataset) -> Instance:
    path = folder / f"{number}.dcm"
    ds["PixelData"].VR = "OW"
    ds.save_as(path, enforce_file_format=True)
    syntax = str(ds.file_meta.TransferSyntaxUID)
    return Instance(f"{number:032x}", read_header(path), syntax, "0" * 64, path, "A", "B", "", "", 0.0)


def stored(paths: Iterable[Path]) -> Study:
    """Files of others as a study."""
    found = []
    for number, path in enumerate(paths, start=1):
        syntax = str(dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID)
        found.append(Instance(f"{number:032x}", read_header(path), syntax, "0" * 64, path, "A", "B", "", "", 0.0))
    return Study.from_instances("1.2.3", 1, found)

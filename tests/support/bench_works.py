"""The files that `scripts/bench receive` sends: made here, once a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_inputs
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of instance, how many of it, and by how many senders at once."""

    name: str
    what: str
    count: int
    at_once: tuple[int, ...]
    make: Callable[[Path, int], list[Path]]
    proposes: str
    """Of storescu: the transfer syntax it offers."""


def _base(sop_class: str, syntax: str, modality: str, number: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    # Of one length for every instance, so that what follows the header is the same bytes in the same place.
    root = f"1.2.826.0.1.3680043.9.5.{modality == 'US':d}"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, f"{root}.{number + 100000}"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID, ds.Modality = f"{root}.1", f"{root}.2", "BENCH", modality
    ds.InstanceNumber = number
    return ds


def mr_files(folder: Path, count: int) -> list[Path]:
    """MR 256 x 256 x 16 bit with 60 private elements, 134 KB each."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    files = []
    for n in range(1, count + 1):
        ds = _base(uid.MRImageStorage, uid.ExplicitVRLittleEndian, "MR", n)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", 256, 256
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.add_new((0x0019, 0x0010), "LO", "BENCH")
        for k in range(60):
            ds.add_new((0x0019, 0x1000 + k), "LO", f"private value {k}")
        ds.PixelData = rng.integers(0, 4095, (256, 256), dtype="<u2").tobytes()
        ds.save_as(folder / f"{n:05d}.dcm", enforce_file_format=True)
        files.append(folder / f"{n:05d}.dcm")
    return files


def _clip(folder: Path, count: int, frames: int) -> list[Path]:
    folder.mkdir()
    pixels = np.stack([bench_inputs.bmode(480, 640, k % 4) for k in range(frames)]).tobytes()
    files = []
    for n in range(1, count + 1):
        ds = _base(uid.UltrasoundMultiFrameImageStorage, uid.ExplicitVRLittleEndian, "US", n)
        ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = frames, "33.3", 0x00181063
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 480, 640, 8, 8, 7, 0
        ds.PixelData = pixels
        ds["PixelData"].VR = "OB"
        ds.save_as(folder / f"{n:05d}.dcm", enforce_file_format=True)
        files.append(folder / f"{n:05d}.dcm")
    return files


def us_files(folder: Path, count: int) -> list[Path]:
    """Ultrasound 60 frames 640 x 480 RGB, 55 MB each."""
    return _clip(folder, count, 60)


def short_us_files(folder: Path, count: int) -> list[Path]:
    """Three frames of it, 2.8 MB each: for a smoke run."""
    return _clip(folder, count, 3)


def jpeg_files(folder: Path, count: int) -> list[Path]:
    """The same sixty frames as JPEG baseline."""
    folder.mkdir()
    files = []
    for n in range(1, count + 1):
        path = folder / f"{n:05d}.dcm"
        if n == 1:
            bench_inputs.clip(path, 60, 480, 640, different=12)
        else:
            ds = bench_inputs.dcmread(files[0])
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.9.5.2.{n + 100000}"
            ds.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


FULL = (
    Work("mr", "MR 134 KB", 500, (1, 8, 32), mr_files, "-xe"),
    Work("us", "US 55 MB", 20, (1, 4), us_files, "-xe"),
    Work("jpeg", "US JPEG clip", 20, (1, 4), jpeg_files, "-xy"),
)
QUICK = (
    Work("mr", "MR 134 KB", 12, (1, 4), mr_files, "-xe"),
    Work("us", "US 2.8 MB", 3, (1,), short_us_files, "-xe"),
    Work("jpeg", "US JPEG clip", 3, (1,), jpeg_files, "-xy"),
)

"""What `scripts/bench` measures of the inputs: phase stacks, clips, memory, headers. Files are made here, once.

Each pair is the node's way and the obvious pydicom + numpy way to the same arrays, which are compared before anything
is timed; the rounds are interleaved, and only the ratio of a round means something.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import dce
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from scipy import ndimage

from dicom_node.config import Config, load, shipped
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.pixels import dynamic, ultrasound
from dicom_node.pixels.decode import PixelDecoder, decode_file
from dicom_node.result import Refusal
from dicom_node.route import evaluate_all
from dicom_node.store.header import read_header, read_stored
from dicom_node.study import Instance, Study
from dicom_node.worker import WorkerClient
from engines.renal_ceus import phantom
from engines.training import dicomfile

Array = NDArray[Any]
Spent = tuple[list[float], list[float]]
"""Seconds of each round: the node's, and the other's."""
INPUT_SIZE = (224, 224)
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def paired(ours: Callable[[], object], naive: Callable[[], object], rounds: int) -> Spent:
    """Seconds of each, in interleaved rounds."""
    spent: Spent = ([], [])
    for n in range(rounds):
        for k in (0, 1) if n % 2 else (1, 0):
            begun = time.perf_counter()
            (ours, naive)[k]()
            spent[k].append(time.perf_counter() - begun)
    return spent


def ratio(spent: Spent) -> float:
    """Of the median round."""
    return statistics.median(b / a for a, b in zip(*spent, strict=True))


def told(name: str, target: float, spent: Spent) -> list[str]:
    """The ratio that counts, and the absolutes beside it."""
    ratios = sorted(b / a for a, b in zip(*spent, strict=True))
    lines = [
        f"{name} (target >= {target:g} x): median {ratio(spent):.2f} x "
        f"(min {ratios[0]:.2f}, max {ratios[-1]:.2f}, n {len(ratios)})"
    ]
    for who, seconds in zip(("the node", "pydicom + numpy"), spent, strict=True):
        ms = [1000 * s for s in seconds]
        lines.append(f"  {who}: median {statistics.median(ms):.0f} ms (min {min(ms):.0f}, max {max(ms):.0f})")
    return lines


# --- phase stack -----------------------------------------------------------------------------------------------------


def phase_study(folder: Path, phases: int = 5, slices: int = 80, side: int = 256) -> Study:
    """Classic MR, one file a slice, the phases by Temporal Position Identifier."""
    rng = np.random.default_rng(1)
    values = rng.integers(1, 4095, (phases, slices, side, side), dtype=np.uint16)
    d = dce.Dce(values=values)

    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = p + 1, phases
        ds.AcquisitionTime = dce.tm(d.injection - 20 + 40 * p)
        ds.RescaleSlope, ds.RescaleIntercept = 2.0, -3.0
        block = ds.private_block(0x0019, "BENCH", create=True)
        for k in range(60):
            block.add_new(k, "LO", f"private value {k}")

    return dce.study(folder, d.datasets(mark, one_series=True))


def stack(study: Study) -> Array:
    """The node's way, from headers that it has in its ledger already when the worker begins."""
    found = dynamic.plan(study)
    assert not isinstance(found, Refusal), found
    made = dynamic.load(found, PixelDecoder())
    assert not isinstance(made, Refusal), made
    return made.volume


def stack_from_files(paths: list[Path]) -> Array:
    """The node's whole way: every header of every file read as well, which the index stage does on arrival."""
    return stack(Study.from_instances("1.2.3", 1, read_all(paths)))


def read_all(paths: list[Path]) -> list[Instance]:
    """As the index stage does it, without the digest of the file."""
    found = []
    for number, path in enumerate(paths, start=1):
        meta, header = read_stored(path)
        syntax = meta.transfer_syntax_uid
        found.append(Instance(f"{number:032x}", header, syntax, "0" * 64, path, "A", "B", "", "", 0.0))
    return found


def naive_stack(paths: list[Path]) -> Array:
    """What one writes with pydicom and numpy: read, sort by phase and position, rescale, stack."""
    datasets = [dcmread(p) for p in paths]
    datasets.sort(key=lambda d: (int(d.TemporalPositionIdentifier), float(d.ImagePositionPatient[2])))
    slices = [(d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)).astype(np.float32) for d in datasets]
    return np.stack(slices).reshape(len({d.TemporalPositionIdentifier for d in datasets}), -1, *slices[0].shape)


def phases(work: Path, rounds: int) -> list[str]:
    study = phase_study(work / "phases")
    paths = sorted(i.path for i in study.instances)
    assert np.array_equal(stack(study), naive_stack(paths))
    lines = told("5 x 80 slices of 256^2 from 400 files -> float32 stack, headers in the ledger", 1.7,
                 paired(lambda: stack(study), lambda: naive_stack(paths), rounds))  # fmt: skip
    lines += told("5 x 80 slices of 256^2 from 400 files -> float32 stack, headers parsed too", 1.7,
                  paired(lambda: stack_from_files(paths), lambda: naive_stack(paths), rounds))  # fmt: skip
    return [*lines, where_it_goes(paths, rounds)]


def where_it_goes(paths: list[Path], rounds: int) -> str:
    """The fastest round of each step of `stack_from_files`."""
    best = dict.fromkeys(("headers", "plan", "pixels"), float("inf"))
    for _ in range(rounds):
        at = [time.perf_counter()]
        study = Study.from_instances("1.2.3", 1, read_all(paths))
        at.append(time.perf_counter())
        found = dynamic.plan(study)
        at.append(time.perf_counter())
        assert not isinstance(found, Refusal), found
        assert not isinstance(dynamic.load(found, PixelDecoder()), Refusal)
        at.append(time.perf_counter())
        best = {step: min(best[step], b - a) for step, (a, b) in zip(best, pairwise(at), strict=True)}
    return "  of the node's: " + ", ".join(f"{step} {1000 * s:.0f} ms" for step, s in best.items())


# --- clip ------------------------------------------------------------------------------------------------------------


def bmode(rows: int, columns: int, seed: int) -> NDArray[np.uint8]:
    """A sector of speckle under a banner, RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    inside = (np.hypot(x - columns / 2, y + 0.08 * rows) < 0.95 * rows) & (np.abs(x - columns / 2) < 0.8 * (y + 40))
    speckle = ndimage.gaussian_filter(rng.rayleigh(55, (rows, columns)), 1.2)
    grey = np.where(inside & (y > 30), speckle, 0).clip(0, 255).astype(np.uint8)
    grey[4:20, 10:200:3] = 220
    return np.repeat(grey[..., None], 3, axis=2)


def clip(path: Path, frames: int, rows: int, columns: int, different: int | None = None) -> Path:
    """An ultrasound clip in JPEG baseline, YBR_FULL_422, as most scanners send it, with its region."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    ds.SOPClassUID, ds.SOPInstanceUID = uid.UltrasoundMultiFrameImageStorage, uid.generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID, ds.Modality = "1.2", "1.2.1", "BENCH", "US"
    ds.NumberOfFrames, ds.Rows, ds.Columns, ds.FrameTime, ds.FrameIncrementPointer = (
        frames, rows, columns, "50", 0x00181063,
    )  # fmt: skip
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "YBR_FULL_422", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 2
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 40, 30
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = columns - 41, rows - 31
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.02
    ds.SequenceOfUltrasoundRegions = [region]
    encoded = []
    for k in range(min(frames, different or frames)):
        buffer = io.BytesIO()
        Image.fromarray(bmode(rows, columns, k)).save(buffer, "JPEG", quality=90, subsampling="4:2:2")
        encoded.append(buffer.getvalue())
    ds.PixelData = encapsulate([encoded[k % len(encoded)] for k in range(frames)])
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path


def instance(path: Path) -> Instance:
    return dce.stored([path]).instances[0]


def clip_input(path: Path) -> Array:
    """As the engines do: frame by frame, the B-mode region, grey, resized, normalised."""
    header = read_header(path)
    (pane,) = ultrasound.tissue_regions(header)
    times = ultrasound.frame_times(header)
    assert not isinstance(times, Refusal)
    out = np.empty((len(times), *INPUT_SIZE), np.float32)
    frames = PixelDecoder().frames(instance(path))
    for k, frame in enumerate(frames):
        out[k] = ultrasound.resize(ultrasound.to_gray(pane.crop(frame)), INPUT_SIZE) / 255
    return out


def naive_clip_input(path: Path) -> Array:
    """What one writes with pydicom and numpy: `pixel_array`, luma, crop; the resize is the node's in both."""
    ds = dcmread(path)
    region = ds.SequenceOfUltrasoundRegions[0]
    grey = (ds.pixel_array @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    crops = grey[
        :, region.RegionLocationMinY0 : region.RegionLocationMaxY1 + 1,
        region.RegionLocationMinX0 : region.RegionLocationMaxX1 + 1,
    ]  # fmt: skip
    return np.stack([ultrasound.resize(crop, INPUT_SIZE) / 255 for crop in crops]).astype(np.float32)


def cine(work: Path, rounds: int) -> list[str]:
    path = clip(work / "clip.dcm", 60, 480, 640, different=12)
    error = float(np.abs(clip_input(path) - naive_clip_input(path)).max()) * 255
    assert error <= 2, error
    spent = paired(lambda: clip_input(path), lambda: naive_clip_input(path), rounds)
    return [
        *told("60 frames 640 x 480 JPEG baseline -> engine input", 3.0, spent),
        f"  largest difference of the two inputs: {error:.2f} grey levels",
    ]


# --- memory ----------------------------------------------------------------------------------------------------------


class _Job:
    """What the worker's client wants to know of a job."""

    id = 1
    payload: dict[str, Any] = {}  # noqa: RUF012


def contrast_clip(path: Path, frames: int = 300, rows: int = 768, columns: int = 1024, seed: int = 501) -> Path:
    """A renal phantom of the engine's own generator, shown twice as large on a larger screen, its frames repeated.

    Each panel, brought to the network's size, is the phantom's again: the engine scores it like any other.
    """
    made = phantom.make(seed, 1)
    large = made.frames.repeat(2, axis=1).repeat(2, axis=2)
    top, left = (rows - large.shape[1]) // 32 * 16, (columns - large.shape[2]) // 32 * 16
    screen = np.zeros((len(large), rows, columns, 3), np.uint8)
    screen[:, top : top + large.shape[1], left : left + large.shape[2]] = large

    def moved(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = box
        return left + 2 * x0, top + 2 * y0, left + 2 * x1 + 1, top + 2 * y1 + 1

    shown = replace(
        made, frames=screen, contrast=moved(made.contrast), tissue=moved(made.tissue), mm_per_px=made.mm_per_px / 2
    )
    ds = dicomfile.dataset(shown, "jpeg")
    encoded = list(generate_frames(ds.PixelData, number_of_frames=len(screen)))
    ds.PixelData = encapsulate([encoded[k * len(encoded) // frames] for k in range(frames)])
    ds.NumberOfFrames, ds.FrameTime = frames, f"{made.frame_ms * len(encoded) / frames:.3f}"
    ds.save_as(path, enforce_file_format=True)
    return path


def worker_peak_mb(work: Path, path: Path) -> tuple[float, float, str]:
    """Peak resident memory of the real worker process before and after the clip, and what it answered."""
    config = load(shipped() / "config.yaml")
    config = config.model_copy(update={"store": config.store.model_copy(update={"root": work / "root"})})
    route = next(r for r in config.routes if r.engine == "renal_ceus")
    client = WorkerClient(config, ("renal_ceus",), Log.null(), Metrics())
    try:
        client.ready(timeout=120)
        before = _peak_mb(client.pid)
        study = Study.from_instances("1.2", 1, [instance(path)])
        reply = client.run(_Job(), route, study, None, timeout=300)
        return before, _peak_mb(client.pid), f"{reply.outcome} {(reply.refusal or {}).get('code', '')}".strip()
    finally:
        client.close()


def _peak_mb(pid: int | None) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def memory(work: Path, rounds: int) -> list[str]:
    del rounds  # a peak is a peak
    before, peak, answer = worker_peak_mb(work, contrast_clip(work / "long.dcm"))
    return [
        f"worker, 300 frames 1024 x 768 (renal_ceus, target <= 400 MB): peak {peak:.0f} MB "
        f"(engine loaded: {before:.0f} MB; answer: {answer})"
    ]


# --- headers and routing ---------------------------------------------------------------------------------------------


def read_and_route(paths: list[Path], config: Config) -> int:
    """From files to verdicts, as the index and route stages do it, without the ledger."""
    return len(evaluate_all(config.routes, Study.from_instances("1.2.3", 1, read_all(paths)), {}))


def header_study(folder: Path, slices: int = 200) -> tuple[list[Path], Config]:
    """5 x `slices` instances with 110 attributes and hardly any pixels, and the routes that are shipped."""
    study = phase_study(folder, phases=5, slices=slices, side=16)
    return sorted(i.path for i in study.instances), load(shipped() / "config.yaml")


def naive_read(paths: list[Path]) -> int:
    """What one writes with pydicom: the header of each file, and the attributes that routing looks at."""
    keys = ("Modality", "BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageType")
    headers = [dcmread(p, stop_before_pixels=True) for p in paths]
    return sum(any("liver" in str(h.get(k, "")).lower() for k in keys) for h in headers)


def headers(work: Path, rounds: int) -> list[str]:
    paths, config = header_study(work / "headers")
    ours, naive = paired(lambda: read_and_route(paths, config), lambda: naive_read(paths), rounds)
    each = [1000 * s / len(paths) for s in ours]
    other = [1000 * s / len(paths) for s in naive]
    return [
        f"header parse and routing, {len(paths)} instances (target <= 1 ms an instance): "
        f"median {statistics.median(each):.2f} ms (min {min(each):.2f}, max {max(each):.2f}, n {rounds})",
        f"  pydicom's headers alone: median {statistics.median(other):.2f} ms; ratio of paired rounds "
        f"{ratio((ours, naive)):.2f} x",
    ]


# --- decoders --------------------------------------------------------------------------------------------------------


def decoders(work: Path, rounds: int) -> list[str]:
    """How far the node's lossy pictures are from pydicom's: luma and chroma (Cb, Cr), grey levels."""
    del rounds
    weights = np.array([0.299, 0.587, 0.114])
    lines = []
    paths = [clip(work / "lossy.dcm", 4, 480, 640), *sorted((SHARED / "us").glob("*jpegbaseline.dcm"))]
    for path in paths:
        luma, chroma = 0.0, 0.0
        for mine, theirs in zip(decode_file(path), dcmread(path).pixel_array, strict=True):
            y, z = mine @ weights, theirs @ weights
            luma = max(luma, float(np.abs(y - z).max()))
            for k in (0, 2):  # R - Y and B - Y
                chroma = max(chroma, float(np.abs((mine[..., k] - y) - (theirs[..., k] - z)).max()))
        lines.append(f"{path.name} against pydicom: luma within {luma:.2f}, chroma within {chroma:.2f} grey levels")
    return lines


MEASURES = {"phases": phases, "cine": cine, "memory": memory, "headers": headers, "decoders": decoders}

"""Thyroid cine: the frames of a clip in the order of time, cropped around each nodule, scored as one volume.

`select` reads headers, `predict` pixels. One result for each nodule: where a person drew regions, theirs; else the
place that the package's locator sees (a place, not an indication); else ROI_REQUIRED. Only the B-mode region ever
reaches the model or a picture: the banner with the patient's name lies outside it. Out-of-distribution gate,
calibration, abstention and the map are the node's. Training prepares its clips through `prepare` below, so the two can
never drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dicom_node.engine import NoSuchModelError, PixelReader, Prediction, RunModel, Selection, UnitPrediction
from dicom_node.pixels import roi, ultrasound
from dicom_node.result import ClinicalInput, FrameRef, Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study

FRAMES = 16
INPUT_SIZE = (112, 112)
MEAN, STD = 0.25, 0.25
"""Of the grey value 0..1; fixed, so that gain stays visible to the out-of-distribution gate."""
MARGIN = 0.45
"""The crop reaches this share of the nodule's box beyond it on each side: a focus is judged by where it lies."""
MIN_SIDE = 24
"""Pixels of a nodule's box: a smaller one shows no punctate echo."""
LOCATOR_SIZE = (96, 128)
LOCATOR_CELLS = 60
LOCATOR_FRAMES = 5
"""Frames, evenly spread, whose mean the locator sees: speckle averages out, the nodule stays."""
Box: TypeAlias = tuple[int, int, int, int]

_CINE = {"1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6.1"}


@dataclass(frozen=True)
class Prepared:
    """What the network sees of one nodule, and where it comes from."""

    x: NDArray[np.float32]
    """(1, 1, 16, 112, 112)."""
    crops: NDArray[np.uint8]
    """(16, H, W), native resolution."""
    numbers: tuple[int, ...]
    """Frame numbers from 1."""
    region: Box
    frame_ms: float
    masked: str
    """What the report says of drawn marks on the crops; "" = none was found."""


# --- headers ---------------------------------------------------------------------------------------------------------


def select(study: Study, clinical: Mapping[str, ClinicalInput]) -> Selection | Refusal:
    """The B-mode clips in the order of their acquisition, and the objects that mark regions on them."""
    del clinical  # the published score uses the images alone
    clips = [i for i in study.instances if i.sop_class_uid in _CINE and i.number_of_frames > 1]
    if not clips:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no multi-frame ultrasound")
    grey = [i for i in clips if not ultrasound.is_color_doppler(i.header) and not _has_agent(i.header)]
    if not grey:
        return Refusal(RefusalCode.WRONG_VIEW, "colour Doppler or contrast agent")
    long_enough = sorted((i for i in grey if i.number_of_frames >= FRAMES), key=_acquired)
    if not long_enough:
        return Refusal(RefusalCode.TOO_FEW_FRAMES, f"fewer than {FRAMES} frames")
    marks = roi.marking(study, long_enough)
    return Selection((*long_enough, *marks), "", "", {"clips": str(len(long_enough))})


def _has_agent(header: Header) -> bool:
    agent = header.text("ContrastBolusAgent").strip().upper()
    return bool(agent or header.items_of("ContrastBolusAgentSequence")) and agent not in ("NONE", "NO", "N")


def _acquired(instance: Instance) -> tuple[str, str, float, str]:
    header = instance.header
    when = header.text("AcquisitionDateTime") or header.text("AcquisitionDate") + header.text("AcquisitionTime")
    content = header.text("ContentDate") + header.text("ContentTime")
    return when or content, content, header.number("InstanceNumber") or 0.0, instance.sop_instance_uid


# --- pixels ----------------------------------------------------------------------------------------------------------


def predict(selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
    """A unit for each nodule: on the first clip that a person marked it on; else of the first clip that the locator
    reads."""
    study = Study.from_instances("", 0, selection.instances)
    clips = [i for i in selection.instances if i.sop_class_uid in _CINE and i.number_of_frames >= FRAMES]
    notes: dict[str, str] = {}
    refusals: list[Refusal] = []
    marked: dict[int, tuple[Instance, roi.PlanarRoi]] = {}
    for order, clip in enumerate(clips, start=1):
        found = roi.planar_rois(study, clip, pixels)
        if isinstance(found, Refusal):
            refusals.append(found)
            notes[f"clip {order}: its region is not used"] = str(found)
            continue
        for region in found:
            if region.structure != "organ":
                marked.setdefault(region.number, (clip, region))
    if not marked and refusals:
        return refusals[0]  # somebody marked something: an automatic place would be another one
    units = []
    for number, (clip, region) in sorted(marked.items()):
        prepared = prepare(clip, pixels, region.box())
        if isinstance(prepared, Refusal):
            refusals.append(prepared)
            notes[f"Nodule {number}: not assessed"] = str(prepared)
        else:
            units.append(_scored(f"Nodule {number}", clip, prepared, region.source, run, notes))
    if not marked:
        located = _first_located(clips, pixels, run, notes)
        if isinstance(located, Refusal):
            return located
        units.append(located)
    return Prediction(tuple(units), notes) if units else refusals[0]


def _first_located(
    clips: list[Instance], pixels: PixelReader, run: RunModel, notes: dict[str, str]
) -> UnitPrediction | Refusal:
    why: list[Refusal] = []
    for clip in clips:
        box = locate(clip, pixels, run)
        prepared = box if isinstance(box, Refusal) else prepare(clip, pixels, box)
        if isinstance(prepared, Prepared):
            return _scored("Nodule 1", clip, prepared, "auto", run, notes)
        why.append(prepared)
    return why[0]


def _scored(
    name: str, clip: Instance, prepared: Prepared, source: str, run: RunModel, notes: dict[str, str]
) -> UnitPrediction:
    out = run("classifier", {"x": prepared.x})
    if prepared.masked:
        notes[f"{name}: {ultrasound.MASKED}"] = prepared.masked
    return UnitPrediction(
        tracking_identifier=name,
        logits=np.asarray(out["logits"], np.float32)[0],
        feature_maps=np.asarray(out["features"], np.float32),
        frames=prepared.crops,
        frame_refs=tuple(
            FrameRef(clip.sop_class_uid, clip.sop_instance_uid, number, clip.number_of_frames)
            for number in prepared.numbers
        ),
        region=prepared.region,
        roi_source=source,
        frame_time_ms=prepared.frame_ms,
    )


def locate(clip: Instance, pixels: PixelReader, run: RunModel) -> Box | Refusal:
    """Where the package's own locator sees a nodule."""
    pane = _pane(clip)
    if isinstance(pane, Refusal):
        return pane
    count = clip.number_of_frames
    numbers = tuple(int(n) for n in np.linspace(1, count, LOCATOR_FRAMES + 2).round()[1:-1])
    crops = [pane.crop(frame) for frame in pixels.frames(clip, numbers)]
    if not crops:
        return Refusal(RefusalCode.TOO_FEW_FRAMES, "the pixel data hold fewer frames than promised")
    drawn = ultrasound.overlay_mask(crops, white=False)  # or the place would be where a person put the calipers
    grey = [ultrasound.without_overlay(ultrasound.to_gray(c), drawn) for c in crops]
    try:
        out = run("locator", {"x": locator_input(grey)})
    except NoSuchModelError:
        return Refusal(RefusalCode.ROI_REQUIRED, "no region drawn, and the package has no locator")
    cells = np.asarray(out["probability"], np.float32)[0, 0]
    found = roi.locate(cells, LOCATOR_CELLS)
    if found is None:
        return Refusal(RefusalCode.ROI_REQUIRED, "no region drawn, and the locator finds no nodule")
    rows, columns = np.nonzero(found.any(axis=1))[0], np.nonzero(found.any(axis=0))[0]
    down, across = pane.height / cells.shape[0], pane.width / cells.shape[1]
    return (
        pane.x0 + round(columns[0] * across),
        pane.y0 + round(rows[0] * down),
        pane.x0 + round((columns[-1] + 1) * across) - 1,
        pane.y0 + round((rows[-1] + 1) * down) - 1,
    )


def locator_input(grey: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """(1, 1, 96, 128) of a few frames of a clip, whatever their size."""
    mean = np.mean([ultrasound.resize(g, LOCATOR_SIZE) for g in grey], axis=0)
    return np.asarray(((mean / 255 - MEAN) / STD)[None, None], np.float32)


def _pane(clip: Instance) -> ultrasound.Region | Refusal:
    """The B-mode region: without it nobody can say where the banner with the patient's name ends."""
    panes = ultrasound.tissue_regions(clip.header)
    if len(panes) == 1:
        return panes[0]
    return Refusal(RefusalCode.NO_SUITABLE_IMAGE, f"{len(panes)} B-mode regions (0018,6011) on the clip, one is needed")


def prepare(clip: Instance, pixels: PixelReader, box: Box | None = None) -> Prepared | Refusal:
    """From a clip and the box of a nodule (x0, y0, x1, y1 inclusive) to the network's input."""
    if box is None:
        return Refusal(RefusalCode.ROI_REQUIRED, "no box of the nodule")
    pane = _pane(clip)
    if isinstance(pane, Refusal):
        return pane
    x0, y0, x1, y1 = box
    if min(x1 - x0, y1 - y0) < MIN_SIDE - 1:
        return Refusal(RefusalCode.ROI_REQUIRED, f"a region of {x1 - x0 + 1} x {y1 - y0 + 1} pixels is too small")
    if not (pane.x0 <= (x0 + x1) / 2 <= pane.x1 and pane.y0 <= (y0 + y1) / 2 <= pane.y1):
        return Refusal(RefusalCode.ROI_REQUIRED, "the region lies outside the B-mode image")
    times = ultrasound.frame_times(clip.header)
    if isinstance(times, Refusal):
        return times
    numbers = _spread(times)
    wide, high = round(MARGIN * (x1 - x0 + 1)), round(MARGIN * (y1 - y0 + 1))
    left, top = max(x0 - wide, pane.x0), max(y0 - high, pane.y0)
    right, bottom = min(x1 + wide, pane.x1), min(y1 + high, pane.y1)
    crops = [frame[top : bottom + 1, left : right + 1] for frame in pixels.frames(clip, numbers)]
    if len(crops) < FRAMES:
        return Refusal(RefusalCode.TOO_FEW_FRAMES, "the pixel data hold fewer frames than promised")
    if ultrasound.has_color(crops[:: FRAMES // 4]):
        return Refusal(RefusalCode.WRONG_VIEW, "colour in the B-mode image")
    grey = np.stack([ultrasound.to_gray(crop) for crop in crops])
    drawn = ultrasound.overlay_mask(crops, white=False)  # a calcification is white and may stand still
    seen = (ultrasound.without_overlay(g, drawn) for g in grey)
    x = np.stack([(ultrasound.resize(g, INPUT_SIZE) / 255 - MEAN) / STD for g in seen])[None, None]
    told = ultrasound.masked(drawn, white=False)
    step = float(np.median(np.diff(times[[n - 1 for n in numbers]]))) * 1000
    return Prepared(np.asarray(x, np.float32), grey, numbers, (left, top, right, bottom), step, told)


def _spread(times: NDArray[np.float64]) -> tuple[int, ...]:
    """16 different frame numbers, evenly spread in time: the clip's length, not its frame rate, sets the step."""
    wanted = np.linspace(times[0], times[-1], FRAMES)
    nearest = [int(np.argmin(np.abs(times - t))) for t in wanted]
    for k in range(1, FRAMES):  # uneven times may ask for one frame twice
        nearest[k] = max(nearest[k], nearest[k - 1] + 1)
    for k in range(FRAMES - 1, -1, -1):
        nearest[k] = min(nearest[k], len(times) - FRAMES + k)
    return tuple(n + 1 for n in nearest)

"""Renal CEUS: choose the contrast clips, take frames at fixed times after the agent's arrival, score each, pool.

`select` reads headers, `predict` pixels. Only the contrast panel ever reaches the model or a picture: the banner with
the patient's name lies outside it. Out-of-distribution gate, calibration, abstention and the map are the node's.
Training prepares its images through `prepare` below, so the two can never drift apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicom_node.engine import PixelReader, Prediction, RunModel, Selection, UnitPrediction
from dicom_node.pixels import ultrasound
from dicom_node.result import ClinicalInput, FrameRef, Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study

INPUT_SIZE = (224, 224)
MEAN, STD = 0.25, 0.25
"""Of the grey value 0..1; fixed, so that gain stays visible to the out-of-distribution gate."""
SECONDS_AFTER_ARRIVAL = (3.0, 6.0, 9.0, 12.0, 16.0, 20.0)
MIN_FRAMES = 3
TOLERANCE_S = 1.0
"""A frame further than this from its time is not taken (half a frame interval where that is longer)."""
SCAN_FRAMES = 160
"""At most so many frames, evenly spread, are looked at to find the panels and the arrival."""

_ULTRASOUND = {  # US Multi-frame Image and its retired form; some writers put several frames into a US Image
    "1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6.1",
}  # fmt: skip
_AGENT_TEXT = re.compile(
    r"\bceus\b|contrast|kontrast|\bsonovue\b|\blumason\b|\bsonazoid\b|\bdefinity\b|\boptison\b|造影"
)
_NO_AGENT = re.compile(r"\b(?:non|without|no|ohne|sans)[ -]?(?:contrast|kontrast)|\bw/?o contrast|未造影|非造影")
_TEXTS = ("StudyDescription", "SeriesDescription", "ProtocolName", "PerformedProcedureStepDescription")


@dataclass(frozen=True)
class Prepared:
    """What the network sees of one clip, and where it comes from."""

    x: NDArray[np.float32]
    """(n, 1, 224, 224)."""
    crops: NDArray[np.uint8]
    """(n, H, W) contrast panel, native resolution."""
    numbers: tuple[int, ...]
    """Frame numbers from 1."""
    region: tuple[int, int, int, int]
    frame_ms: float
    notes: Mapping[str, str]


# --- headers ---------------------------------------------------------------------------------------------------------


def select(study: Study, clinical: Mapping[str, ClinicalInput]) -> Selection | Refusal:
    """The contrast clips of the study in the order of their acquisition."""
    del clinical  # the published score uses the images alone
    clips = [i for i in study.instances if i.sop_class_uid in _ULTRASOUND and i.number_of_frames > 1]
    with_agent = [i for i in clips if has_agent(i.header)]
    if not with_agent:
        detail = "no multi-frame ultrasound" if not clips else "no clip with a contrast agent"
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, detail)
    grey = [i for i in with_agent if not ultrasound.is_color_doppler(i.header)]
    if not grey:
        return Refusal(RefusalCode.WRONG_VIEW, "colour Doppler")
    long_enough = [i for i in grey if i.number_of_frames >= MIN_FRAMES]
    if not long_enough:
        return Refusal(RefusalCode.TOO_FEW_FRAMES, f"fewer than {MIN_FRAMES} frames")
    ordered = tuple(sorted(long_enough, key=_acquired))
    sides = {ultrasound.laterality(i.header) for i in ordered}
    side, note = next(iter(sides)) if len({s for s, _ in sides}) == 1 else ("", "the clips show different sides")
    return Selection(ordered, side, note, {"contrast clips": str(len(ordered))})


def has_agent(header: Header) -> bool:
    """Does the header say that contrast agent was given: the Contrast/Bolus module, else a description."""
    if header.text("ContrastBolusAgent").strip() or header.items_of("ContrastBolusAgentSequence"):
        return header.text("ContrastBolusAgent").strip().upper() not in ("NONE", "NO", "N")
    text = " ".join(header.text(key) for key in _TEXTS).casefold()
    return bool(_AGENT_TEXT.search(_NO_AGENT.sub(" ", text)))


def _acquired(instance: Instance) -> tuple[str, str, float, str]:
    header = instance.header
    when = header.text("AcquisitionDateTime") or header.text("AcquisitionDate") + header.text("AcquisitionTime")
    content = header.text("ContentDate") + header.text("ContentTime")
    return when or content, content, header.number("InstanceNumber") or 0.0, instance.sop_instance_uid


# --- pixels ----------------------------------------------------------------------------------------------------------


def predict(selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
    """One lesion per side: the first clip of the side that shows the arrival of the agent."""
    sides: dict[str, list[Instance]] = {}
    for instance in selection.instances:
        sides.setdefault(ultrasound.laterality(instance.header)[0], []).append(instance)
    units: list[UnitPrediction] = []
    notes: dict[str, str] = {}
    refusals: list[Refusal] = []
    for number, (side, instances) in enumerate(sides.items(), start=1):
        unit = _first_usable(f"Lesion {number}", instances, pixels, run, notes)
        if isinstance(unit, Refusal):
            refusals.append(unit)
            notes[f"not assessed, side {side or 'unknown'}"] = str(unit)
        else:
            units.append(unit)
    return Prediction(tuple(units), notes) if units else refusals[0]


def _first_usable(
    name: str, instances: list[Instance], pixels: PixelReader, run: RunModel, notes: dict[str, str]
) -> UnitPrediction | Refusal:
    refusals: list[Refusal] = []
    for instance in instances:
        prepared = prepare(instance, pixels)
        if isinstance(prepared, Refusal):
            refusals.append(prepared)
            continue
        notes.update({f"{name}: {key}": value for key, value in prepared.notes.items()})
        return _score(name, instance, prepared, run)
    return refusals[0]


def _score(name: str, instance: Instance, prepared: Prepared, run: RunModel) -> UnitPrediction:
    out = run("classifier", {"x": prepared.x})
    side, note = ultrasound.laterality(instance.header)
    return UnitPrediction(
        tracking_identifier=name,
        logits=np.asarray(out["logits"], np.float32).mean(axis=0),
        feature_maps=np.asarray(out["features"], np.float32),
        frames=prepared.crops,
        frame_refs=tuple(
            FrameRef(instance.sop_class_uid, instance.sop_instance_uid, number, instance.number_of_frames)
            for number in prepared.numbers
        ),
        region=prepared.region,
        laterality=side,
        laterality_note=note,
        frame_time_ms=prepared.frame_ms,
    )


def prepare(instance: Instance, pixels: PixelReader) -> Prepared | Refusal:
    """From a clip to the network's input: times, panels, arrival, frames, crop, resize."""
    times = ultrasound.frame_times(instance.header)
    if isinstance(times, Refusal):
        return times
    step = math.ceil(len(times) / SCAN_FRAMES)
    scanned = tuple(range(1, len(times) + 1, step))
    frames = ultrasound.clip_frames(pixels, instance, scanned)
    if len(frames) < len(scanned):  # Number of Frames promised more than the pixel data holds
        scanned = scanned[: len(frames)]
        times = times[: scanned[-1] if scanned else 0]
    times_seen = times[[number - 1 for number in scanned]]
    panels = ultrasound.ceus_panels(instance.header, frames)
    if isinstance(panels, Refusal):
        return panels
    if panels.tissue is not None and ultrasound.has_color(
        panels.tissue.crop(f) for f in frames[:: max(1, len(frames) // 8)]
    ):
        return Refusal(RefusalCode.WRONG_VIEW, "colour in the B-mode panel")
    arrival = ultrasound.contrast_arrival(panels.curve, times_seen)
    if isinstance(arrival, Refusal):
        return arrival
    numbers = _at(times, arrival)
    if len(numbers) < MIN_FRAMES:
        return Refusal(RefusalCode.TOO_FEW_FRAMES, f"{len(numbers)} frames at the times after arrival")
    picked = [frames[n - 1] for n in numbers] if step == 1 else pixels.frames(instance, numbers)
    shown = [panels.contrast.crop(frame) for frame in picked]
    crops = np.stack([ultrasound.to_gray(crop) for crop in shown])
    # A drawn mark is there before the agent comes; an enhanced vessel, however bright and still, is not.
    before = [panels.contrast.crop(frames[k]) for k in _before(times_seen, arrival)]
    drawn = ultrasound.overlay_mask([*before, *shown])
    seen = (ultrasound.without_overlay(crop, drawn) for crop in crops)
    x = np.stack([(ultrasound.resize(crop, INPUT_SIZE) / 255 - MEAN) / STD for crop in seen])[:, None]
    notes = {
        "panel": panels.evidence,
        "contrast arrival (s)": f"{arrival:.1f}",
        "frames": ", ".join(map(str, numbers)),
    }
    if said := ultrasound.masked(drawn):
        notes[ultrasound.MASKED] = said
    spacing = float(np.median(np.diff(times))) * 1000
    return Prepared(np.asarray(x, np.float32), crops, numbers, panels.contrast.bounds, spacing, notes)


def _before(times: NDArray[np.float64], arrival: float) -> tuple[int, ...]:
    """Indices of a few frames before the arrival, spread over that time."""
    count = int(np.searchsorted(times, arrival))
    return tuple(sorted({0, count // 2, max(count - 1, 0)}))


def _at(times: NDArray[np.float64], arrival: float) -> tuple[int, ...]:
    """Frame numbers nearest to the fixed times after arrival, each once."""
    tolerance = max(TOLERANCE_S, float(np.median(np.diff(times))) / 2)
    found: list[int] = []
    for after in SECONDS_AFTER_ARRIVAL:
        index = int(np.argmin(np.abs(times - (arrival + after))))
        if abs(times[index] - (arrival + after)) <= tolerance and index + 1 not in found:
            found.append(index + 1)
    return tuple(found)

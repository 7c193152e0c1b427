"""Testis ultrasound: the B-mode still of each testis, cropped to its region of interest, scored; then both as one.

`select` reads headers, `predict` pixels. Only a box around the testis ever reaches the model or a picture. A still
whose side no attribute states is not used: a score must not land on the wrong testis. The out-of-distribution gate,
calibration, abstention, the map and the fusion with FSH, volume and velocity are the node's. Training prepares its
images through `prepare` below, so the two can never drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dicom_node.engine import NoSuchModelError, PixelReader, Prediction, RunModel, Selection, UnitPrediction
from dicom_node.pixels import roi, ultrasound
from dicom_node.result import ClinicalInput, FrameRef, Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study

INPUT_SIZE = (224, 224)
MEAN, STD = 0.25, 0.25
"""Of the grey value 0..1; fixed, so that gain stays visible to the out-of-distribution gate."""
MARGIN = 0.25
"""The crop reaches this share of the box beyond it on each side: echo is judged against the tissue around."""
MIN_SIDE = 32
"""Pixels: a smaller region of interest shows no texture."""
LOCATOR_SIZE = (96, 128)
LOCATOR_CELLS = 200
"""Of the locator's grid: fewer are no testis."""
Box: TypeAlias = tuple[int, int, int, int]
NAMES = {"R": "Right testis", "L": "Left testis"}

_STILL = {"1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.6"}  # US Image and its retired form
_TRUST = (*roi.TRUST, "auto")
_OTHER_ORGAN = re.compile(
    r"kidney|renal|liver|thyroid|breast|bladder|prostate|neck|heart|carotid|penis|groin|inguinal|hernia|appendix"
)


@dataclass(frozen=True)
class Prepared:
    """What the network sees of one still, and where it comes from."""

    x: NDArray[np.float32]
    """(1, 1, 224, 224)."""
    crops: NDArray[np.uint8]
    """(1, H, W), native resolution."""
    region: Box
    masked: str
    """What the report says of drawn marks on the crop; "" = none was found."""


# --- headers ---------------------------------------------------------------------------------------------------------


def select(study: Study, clinical: Mapping[str, ClinicalInput]) -> Selection | Refusal:
    """The B-mode stills whose side is known, in the order of their acquisition, and the objects with regions."""
    del clinical  # fused by the node
    stills = [i for i in study.instances if _is_still(i)]
    if not stills:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no ultrasound still of the scrotum")
    grey = [i for i in stills if not ultrasound.is_color_doppler(i.header) and not _is_spectral(i.header)]
    if not grey:
        return Refusal(RefusalCode.WRONG_VIEW, "Doppler only")
    sided = {i.sop_instance_uid: ultrasound.laterality(i.header) for i in grey}
    known = sorted((i for i in grey if sided[i.sop_instance_uid][0] in NAMES), key=_acquired)
    if not known:
        why = sorted({note if not side else "the image shows both sides" for side, note in sided.values()})
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no still of a known side: " + "; ".join(why))
    parameters = {"stills": str(len(known))}
    for number, instance in enumerate((i for i in sorted(grey, key=_acquired) if i not in known), start=1):
        side, note = sided[instance.sop_instance_uid]
        parameters[f"still not used {number}"] = "the image shows both sides" if side else f"side unknown, {note}"
    sides = {sided[i.sop_instance_uid][0] for i in known}
    side = next(iter(sides)) if len(sides) == 1 else "B"
    return Selection((*known, *roi.marking(study, known)), side, "", parameters)


def _is_still(instance: Instance) -> bool:
    header = instance.header
    if instance.sop_class_uid not in _STILL or instance.number_of_frames != 1:
        return False
    return not _OTHER_ORGAN.search(header.text("BodyPartExamined").casefold())


def _is_spectral(header: Header) -> bool:
    """A Doppler trace or M-mode: Image Type value 4 (PS3.3 C.8.5.6.1.1), or a spectral region (C.8.5.5.1.1)."""
    mode = (header.texts("ImageType") + ("",) * 4)[3].strip()
    if re.fullmatch(r"[0-9A-Fa-f]{4}", mode) and int(mode, 16) & 0x000E:
        return True
    found = ultrasound.regions(header)
    return any(r.spatial_format == 3 for r in found)


def _acquired(instance: Instance) -> tuple[str, str, float, str]:
    header = instance.header
    when = header.text("AcquisitionDateTime") or header.text("AcquisitionDate") + header.text("AcquisitionTime")
    content = header.text("ContentDate") + header.text("ContentTime")
    return when or content, content, header.number("InstanceNumber") or 0.0, instance.sop_instance_uid


# --- pixels ----------------------------------------------------------------------------------------------------------


def predict(selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
    """A unit for each testis that has a region of interest; where both have, one for the patient."""
    study = Study.from_instances("", 0, selection.instances)
    stills = [i for i in selection.instances if i.sop_class_uid in _STILL]
    notes: dict[str, str] = {}
    units: list[UnitPrediction] = []
    refusals: list[Refusal] = []
    for side, name in NAMES.items():
        mine = [i for i in stills if ultrasound.laterality(i.header)[0] == side]
        if not mine:
            continue
        place = _place(side, mine, study, pixels, run)
        if isinstance(place, Refusal):
            refusals.append(place)
            notes[f"{name}: not assessed"] = str(place)
        else:
            notes[f"{name}: region of interest"] = place.said
            if place.prepared.masked:
                notes[f"{name}: {ultrasound.MASKED}"] = place.prepared.masked
            units.append(_scored(name, side, place, run))
    if not units:
        return refusals[0]
    if len(units) == len(NAMES):
        units.append(_patient(units[0], units[1]))
    return Prediction(tuple(units), notes)


@dataclass(frozen=True)
class _Place:
    """The still that is used of a side, where its testis lies, and how that is known."""

    instance: Instance
    prepared: Prepared
    source: str
    said: str


def _place(side: str, stills: list[Instance], study: Study, pixels: PixelReader, run: RunModel) -> _Place | Refusal:
    """The first still with a region that a person drew; where no still has one, the first that the locator reads."""
    why: list[Refusal] = []
    silent: list[Instance] = []
    for instance in stills:
        drawn = _drawn(side, instance, study, pixels)
        if drawn is None:
            silent.append(instance)
            continue
        box = drawn if isinstance(drawn, Refusal) else drawn.box()
        prepared = box if isinstance(box, Refusal) else prepare(instance, pixels, box)
        if isinstance(drawn, roi.PlanarRoi) and isinstance(prepared, Prepared):
            return _Place(instance, prepared, drawn.source, f"{drawn.source}, number {drawn.number}")
        why += [prepared] if isinstance(prepared, Refusal) else []
    for instance in silent:
        box = _located(instance, pixels, run)
        prepared = box if isinstance(box, Refusal) else prepare(instance, pixels, box)
        if isinstance(prepared, Prepared):
            return _Place(instance, prepared, "auto", "found by the locator of the package")
        why.append(prepared)
    return why[0]


def _drawn(side: str, instance: Instance, study: Study, pixels: PixelReader) -> roi.PlanarRoi | Refusal | None:
    """The one region on this still that may be this testis; None where the study holds no region on it."""
    found = roi.planar_rois(study, instance, pixels)
    if isinstance(found, Refusal):
        return found
    organs = [r for r in found if r.structure != "lesion"]
    mine = [r for r in organs if r.laterality in ("", side)]
    if len(mine) == 1:
        return mine[0]
    if mine:
        return Refusal(RefusalCode.ROI_REQUIRED, f"{len(mine)} regions on one still: which is the testis is not said")
    if organs:
        return Refusal(RefusalCode.ROI_REQUIRED, "the region is of the other side than the still")
    return None


def _located(instance: Instance, pixels: PixelReader, run: RunModel) -> Box | Refusal:
    """Where the package's own locator sees the testis: a place, never an indication."""
    panes = ultrasound.tissue_regions(instance.header)
    if len(panes) != 1:
        return Refusal(RefusalCode.ROI_REQUIRED, f"no region drawn, and {len(panes)} B-mode images on the still")
    pane = panes[0]
    (frame,) = pixels.frames(instance, (1,))
    try:
        out = run("locator", {"x": locator_input(_unmarked(pane.crop(frame))[0])})
    except NoSuchModelError:
        return Refusal(RefusalCode.ROI_REQUIRED, "no region drawn, and the package has no locator")
    cells = np.asarray(out["probability"], np.float32)[0, 0]
    found = roi.locate(cells, LOCATOR_CELLS)
    if found is None:
        return Refusal(RefusalCode.ROI_REQUIRED, "no region drawn, and the locator finds none")
    rows, columns = np.nonzero(found.any(axis=1))[0], np.nonzero(found.any(axis=0))[0]
    down, across = pane.height / cells.shape[0], pane.width / cells.shape[1]
    return (
        pane.x0 + round(columns[0] * across),
        pane.y0 + round(rows[0] * down),
        pane.x0 + round((columns[-1] + 1) * across) - 1,
        pane.y0 + round((rows[-1] + 1) * down) - 1,
    )


def _unmarked(crop: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Grey values without coloured calipers and lines, and where these were."""
    drawn = ultrasound.overlay_mask([crop])
    return ultrasound.without_overlay(ultrasound.to_gray(crop), drawn), drawn


def locator_input(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(1, 1, 96, 128) of a B-mode image, whatever its size."""
    small = (ultrasound.resize(grey, LOCATOR_SIZE) / 255 - MEAN) / STD
    return np.asarray(small[None, None], np.float32)


def prepare(instance: Instance, pixels: PixelReader, box: Box | None = None) -> Prepared | Refusal:
    """From a still and the box of its testis (x0, y0, x1, y1 inclusive) to the network's input."""
    if box is None:
        return Refusal(RefusalCode.ROI_REQUIRED, "no box of the testis")
    x0, y0, x1, y1 = box
    if min(x1 - x0, y1 - y0) < MIN_SIDE - 1:
        return Refusal(RefusalCode.ROI_REQUIRED, f"a region of {x1 - x0 + 1} x {y1 - y0 + 1} pixels is too small")
    centre = (x0 + x1) / 2, (y0 + y1) / 2
    panes = [
        r for r in ultrasound.tissue_regions(instance.header)
        if r.x0 <= centre[0] <= r.x1 and r.y0 <= centre[1] <= r.y1
    ]  # fmt: skip
    if not panes:  # without it nobody can say where the banner with the patient's name begins
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no B-mode region (0018,6011) around the testis")
    pane = panes[-1]  # the smallest
    wide, high = round(MARGIN * (x1 - x0 + 1)), round(MARGIN * (y1 - y0 + 1))
    left, top = max(x0 - wide, pane.x0), max(y0 - high, pane.y0)
    right, bottom = min(x1 + wide, pane.x1), min(y1 + high, pane.y1)
    (frame,) = pixels.frames(instance, (1,))
    crop = frame[top : bottom + 1, left : right + 1]
    if ultrasound.has_color([crop]):
        return Refusal(RefusalCode.WRONG_VIEW, "colour in the B-mode image")
    grey = np.ascontiguousarray(ultrasound.to_gray(crop))
    seen, drawn = _unmarked(crop)
    x = (ultrasound.resize(seen, INPUT_SIZE) / 255 - MEAN) / STD
    told = ultrasound.masked(drawn, white=False)  # one picture: nothing moves around a white mark
    return Prepared(np.asarray(x[None, None], np.float32), grey[None], (left, top, right, bottom), told)


# --- units -----------------------------------------------------------------------------------------------------------


def _scored(name: str, side: str, place: _Place, run: RunModel) -> UnitPrediction:
    out = run("classifier", {"x": place.prepared.x})
    instance = place.instance
    return UnitPrediction(
        tracking_identifier=name,
        logits=np.asarray(out["logits"], np.float32)[0],
        feature_maps=np.asarray(out["features"], np.float32),
        frames=place.prepared.crops,
        frame_refs=(FrameRef(instance.sop_class_uid, instance.sop_instance_uid, 1, 1),),
        region=place.prepared.region,
        laterality=side,
        laterality_note=ultrasound.laterality(instance.header)[1],
        roi_source=place.source,
    )


def _patient(right: UnitPrediction, left: UnitPrediction) -> UnitPrediction:
    """Both sides: the mean of their log-odds. No picture of its own, theirs say all."""
    return UnitPrediction(
        tracking_identifier="Patient",
        logits=np.asarray((right.logits + left.logits) / 2, np.float32),
        feature_maps=np.concatenate([right.feature_maps, left.feature_maps]),
        frames=right.frames,
        frame_refs=right.frame_refs + left.frame_refs,
        region=right.region,
        laterality="B",
        roi_source=max(right.roi_source, left.roi_source, key=_TRUST.index),
        heatmap=False,
        notes=("Mean of the log-odds of the right and the left testis.",),
    )

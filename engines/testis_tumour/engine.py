"""Testicular tumour on B-mode ultrasound: region, fixed spacing, x2 super-resolution, radiomics, sensitivity map.

`select` reads headers, `predict` pixels. The texture inside the region of interest is described by features of the
Image Biomarker Standardisation Initiative (IBSI; Zwanenburg 2020) that nyxus computes; the graph "radiomics" picks its
signature from all of them. Out-of-distribution gate, calibration, abstention and the fusion with age and tumour markers
are the node's. Training prepares its images through `prepare` and `features` below, so the two can never drift apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicom_node.engine import NoSuchModelError, PixelReader, Prediction, RunModel, Selection, UnitPrediction
from dicom_node.pixels import roi, ultrasound
from dicom_node.result import ClinicalInput, FrameRef, Refusal, RefusalCode
from dicom_node.study import Instance, Study

NATIVE_MM = 0.2
"""Pixel spacing before super-resolution; half of it after. Radiomics of different spacings are not comparable."""
TILE, OVERLAP = 128, 32
"""The graph "superres" takes tiles of 128²; larger regions are covered by tiles that overlap."""
MARGIN_MM = 2.0
BIN = 8
"""Grey values to a level of the texture matrices: a fixed bin size (IBSI 2.7). B-mode grey is logarithmic, so a bin is
a fixed number of decibels: another gain moves the levels and does not stretch them."""
MIN_CELLS = 100
"""Pixels of 0.2 mm: a region under 4 mm² holds no texture."""
MAX_SIDE_MM = 100.0
LOCATOR_SIZE = (64, 72)
MIN_PLACE = 20
"""Cells of the locator's map: a smaller place is no tumour."""
MAX_WINDOWS = 120
MAP_PIXELS = 20000
"""The windows of the map grow with the region, so that it takes about a second whatever the region."""

Image: TypeAlias = NDArray[np.uint8]

_ULTRASOUND = {  # US Image, US Multi-frame Image and the retired forms
    "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.3.1",
    "1.2.840.10008.5.1.4.1.1.3",
}  # fmt: skip

# --- the feature vector: every column of the graph's input, in this order -------------------------------------------

_INTENSITY = (  # IBSI 3.3, not discretised
    "MEAN", "MEDIAN", "P10", "P90", "MIN", "MAX", "RANGE", "INTERQUARTILE_RANGE", "MEAN_ABSOLUTE_DEVIATION",
    "MEDIAN_ABSOLUTE_DEVIATION", "VARIANCE_BIASED", "SKEWNESS", "EXCESS_KURTOSIS", "COV", "QCOD", "ROOT_MEAN_SQUARED",
)  # fmt: skip
_HISTOGRAM = ("ENTROPY", "UNIFORMITY", "SKEWNESS", "EXCESS_KURTOSIS", "COV")  # IBSI 3.4, of the discretised levels
_GLCM = (  # IBSI 3.6, distance 1, mean of four directions
    "ASM", "ACOR", "CLUPROM", "CLUSHADE", "CLUTEND", "CONTRAST", "CORRELATION", "DIFAVE", "DIFENTRO", "DIFVAR", "ID",
    "IDN", "IDM", "IDMN", "IV", "JAVE", "JE", "INFOMEAS1", "INFOMEAS2", "JMAX", "JVAR", "SUMENTROPY",
)  # fmt: skip
_GLRLM = (  # IBSI 3.7, mean of four directions
    "SRE", "LRE", "GLNN", "RLNN", "RP", "GLV", "RV", "RE", "LGLRE", "HGLRE", "SRLGLE", "SRHGLE", "LRLGLE", "LRHGLE",
)  # fmt: skip
_NGTDM = ("COARSENESS", "CONTRAST", "BUSYNESS", "COMPLEXITY", "STRENGTH")  # IBSI 3.10
_NGLDM = (  # IBSI 3.11, coarseness 0
    "SDE", "LDE", "DNN", "GLV", "DV", "DE", "LGLE", "HGLE", "SDLGLE", "SDHGLE", "LDLGLE", "LDHGLE",
)  # fmt: skip
_SHAPE = ("AREA_MM2", "EXTENT", "ELONGATION")
_TEXTURE = (
    *_HISTOGRAM, *(f"GLCM_{n}_AVE" for n in _GLCM), *(f"GLRLM_{n}_AVE" for n in _GLRLM),
    *(f"NGTDM_{n}" for n in _NGTDM), *(f"GLDM_{n}" for n in _NGLDM), "AREA_PIXELS_COUNT", "EXTENT",
)  # fmt: skip
FEATURES: tuple[str, ...] = (
    *(f"INTENSITY_{n}" for n in _INTENSITY), *(f"HISTOGRAM_{n}" for n in _HISTOGRAM), *(f"GLCM_{n}" for n in _GLCM),
    *(f"GLRLM_{n}" for n in _GLRLM), *(f"NGTDM_{n}" for n in _NGTDM), *(f"NGLDM_{n}" for n in _NGLDM),
    *(f"SHAPE_{n}" for n in _SHAPE),
)  # fmt: skip
"""GLSZM is left out: the zones that nyxus 0.11 counts are those of neither the 4- nor the 8-neighbourhood."""


@dataclass(frozen=True)
class Prepared:
    """One lesion on one picture at the fixed spacing."""

    image: Image
    """(H, W) grey at `NATIVE_MM`; at least one tile."""
    share: Image
    """(H, W) share of each pixel inside the region of interest, 0..255."""
    crop: Image
    """The source pixels under the part of `image` that lies on the picture."""
    region: tuple[int, int, int, int]
    """x0, y0, x1, y1 of `crop` in the source frame."""
    inner: tuple[slice, slice]
    """That part of `image`."""
    corner: tuple[int, int]
    """Row and column of the first pixel of `image`, from the first pixel of the resampled panel."""
    masked: str = ""
    """What the report says of drawn marks on `crop`; "" = none was found."""


# --- headers ---------------------------------------------------------------------------------------------------------


def select(study: Study, clinical: Mapping[str, ClinicalInput]) -> Selection | Refusal:
    """B-mode pictures with a known pixel spacing, and the objects that may mark a region on them."""
    del clinical  # the node fuses
    pictures = [i for i in study.instances if i.sop_class_uid in _ULTRASOUND]
    if not pictures:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no ultrasound image")
    grey = [i for i in pictures if not ultrasound.is_color_doppler(i.header)]
    if not grey:
        return Refusal(RefusalCode.WRONG_VIEW, "colour Doppler")
    scaled = [i for i in grey if _panel(i) is not None]
    if not scaled and any(ultrasound.tissue_regions(i.header) for i in grey):
        return Refusal(RefusalCode.CALIBRATION_MISSING, "no physical units in the region, and no Pixel Spacing")
    if not scaled:
        return Refusal(RefusalCode.NO_SUITABLE_IMAGE, "no 2D tissue region with a physical pixel spacing")
    markers = roi.marking(study, scaled)
    sides = {ultrasound.laterality(i.header) for i in scaled}
    side, note = next(iter(sides)) if len({s for s, _ in sides}) == 1 else ("", "the images show different sides")
    told = {"B-mode images": str(len(scaled)), "region objects": str(len(markers))}
    return Selection((*scaled, *markers), side, note, told)


def _panel(instance: Instance) -> ultrasound.Region | None:
    """The largest 2D tissue region with a spacing."""
    return next((r for r in ultrasound.tissue_regions(instance.header) if r.spacing_mm is not None), None)


# --- pixels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marked:
    """A lesion as one picture shows it."""

    instance: Instance
    frame: int
    mask: NDArray[np.bool_]
    source: str
    number: int
    side: str
    note: str


def predict(selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
    """One unit a lesion: marked regions, else the place the locator finds. Of several pictures the largest section."""
    pictures = [i for i in selection.instances if i.sop_class_uid in _ULTRASOUND]
    study = Study.from_instances(pictures[0].study_instance_uid, 1, selection.instances)
    marked: list[_Marked] = []
    for instance in pictures:
        found = roi.planar_rois(study, instance, pixels)
        if isinstance(found, Refusal):
            return found
        marked += [_marked(instance, region) for region in found if region.structure != "organ"]
    if not marked:
        marked = list(_located(pictures, pixels, run))
    if not marked:
        return Refusal(RefusalCode.ROI_REQUIRED, "no region in the study, and none was found automatically")
    lesions: dict[tuple[str, int], _Marked] = {}
    for m in marked:
        kept = lesions.get((m.side, m.number))
        if kept is None or m.mask.sum() > kept.mask.sum():
            lesions[m.side, m.number] = m
    units: list[UnitPrediction] = []
    notes: dict[str, str] = {}
    refusals: list[Refusal] = []
    for count, lesion in enumerate(lesions.values(), start=1):
        unit = _assess(f"Lesion {count}", lesion, pixels, run, notes)
        if isinstance(unit, Refusal):
            refusals.append(unit)
            notes[f"Lesion {count}: not assessed"] = str(unit)
        else:
            units.append(unit)
    return Prediction(tuple(units), notes) if units else refusals[0]


def _marked(instance: Instance, region: roi.PlanarRoi) -> _Marked:
    """The frame on which the region is largest; the region's own side where the picture says none."""
    frame, mask = max(region.masks.items(), key=lambda item: (int(item[1].sum()), -item[0]))
    side, note = ultrasound.laterality(instance.header)
    if not side and region.laterality:
        side, note = region.laterality, f"from the {region.source}"
    return _Marked(instance, frame, mask, region.source, region.number, side, note)


def _located(pictures: Sequence[Instance], pixels: PixelReader, run: RunModel) -> Iterator[_Marked]:
    """The package's own locator: a place, never an indication."""
    for instance in pictures:
        panel = _panel(instance)
        frame = next(iter(pixels.frames(instance, (1,))), None)
        if panel is None or frame is None or ultrasound.has_color([panel.crop(frame)]):
            continue
        grey, _ = _unmarked(panel.crop(frame))
        try:
            out = run("locator", {"x": locator_input(grey)})
        except NoSuchModelError:
            return  # nothing is located: a region is required
        place = roi.locate(np.asarray(out["probability"], np.float32)[0, 0], MIN_PLACE)
        if place is None:
            continue
        mask = np.zeros(frame.shape[:2], np.bool_)
        panel.crop(mask)[:] = ultrasound.resize(place.astype(np.float32), grey.shape) > 0.5
        yield _Marked(instance, 1, mask, "auto", 1, *ultrasound.laterality(instance.header))


def _unmarked(tissue: NDArray[Any]) -> tuple[Image, NDArray[np.bool_]]:
    """Grey values without coloured calipers and lines, and where these were."""
    marks = ultrasound.overlay_mask([tissue])
    return ultrasound.without_overlay(ultrasound.to_gray(tissue), marks), marks


def locator_input(grey: Image) -> NDArray[np.float32]:
    """(1, 1, 64, 72) of a B-mode image, whatever its size."""
    return np.asarray(ultrasound.resize(grey, LOCATOR_SIZE)[None, None] / 255, np.float32)


def _assess(
    name: str, lesion: _Marked, pixels: PixelReader, run: RunModel, notes: dict[str, str]
) -> UnitPrediction | Refusal:
    panel = _panel(lesion.instance)
    frame = next(iter(pixels.frames(lesion.instance, (lesion.frame,))), None)
    if panel is None or frame is None:
        return Refusal(RefusalCode.PIXELS_UNDECODABLE, "the marked frame is not there")
    prepared = prepare(frame, panel, lesion.mask)
    if isinstance(prepared, Refusal):
        return prepared
    fine, inside = superresolve(prepared, run)
    out = run("radiomics", {"x": features(fine[None], inside)})
    margin = margins(out["logits"])[0]
    shown = sensitivity(fine, inside, margin, run)
    notes |= {f"{name}: region of interest": lesion.source, f"{name}: area (mm2)": f"{inside.sum() * 0.01:.1f}"}
    if prepared.masked:
        notes[f"{name}: {ultrasound.MASKED}"] = prepared.masked
    instance = lesion.instance
    return UnitPrediction(
        tracking_identifier=name,
        logits=np.asarray(out["logits"][0], np.float32),
        feature_maps=np.asarray(out["features"], np.float32),
        frames=prepared.crop[None],
        frame_refs=(
            FrameRef(instance.sop_class_uid, instance.sop_instance_uid, lesion.frame, instance.number_of_frames),
        ),
        region=prepared.region,
        cam=shown[prepared.inner][None].copy(),
        laterality=lesion.side,
        laterality_note=lesion.note,
        roi_source=lesion.source,
    )


def prepare(frame: NDArray[Any], panel: ultrasound.Region, mask: NDArray[np.bool_]) -> Prepared | Refusal:
    """Crop to the panel, resample to `NATIVE_MM`, cut the window around the region of interest."""
    tissue = panel.crop(frame)
    if ultrasound.has_color([tissue]):
        return Refusal(RefusalCode.WRONG_VIEW, "colour in the B-mode image")
    if panel.spacing_mm is None:
        return Refusal(RefusalCode.CALIBRATION_MISSING, "no physical pixel spacing")
    grey, marks = _unmarked(tissue)
    drawn = panel.crop(mask)
    size = tuple(max(1, round(n * mm / NATIVE_MM)) for n, mm in zip(grey.shape, panel.spacing_mm, strict=True))
    share = np.rint(ultrasound.resize(drawn.astype(np.float32), (size[0], size[1])) * 255).astype(np.uint8)
    rows, columns = (np.flatnonzero((share > 127).any(axis=axis)) for axis in (1, 0))
    if not rows.size or (share > 127).sum() < MIN_CELLS:
        return Refusal(RefusalCode.ROI_REQUIRED, "the region of interest lies off the image or is too small")
    spans = [_span(int(r[0]), int(r[-1]) + 1) for r in (rows, columns)]
    if max(stop - start for start, stop in spans) * NATIVE_MM > MAX_SIDE_MM:
        return Refusal(RefusalCode.ROI_REQUIRED, "the region of interest is larger than a tumour can be")
    image = np.rint(ultrasound.resize(grey, (size[0], size[1]))).astype(np.uint8)
    at = [np.arange(*span) for span in spans]
    clipped = np.ix_(*(np.clip(a, 0, n - 1) for a, n in zip(at, size, strict=True)))
    outside = ~np.logical_and.outer(*((a >= 0) & (a < n) for a, n in zip(at, size, strict=True)))
    inner = tuple(slice(max(0, -a), min(b, n) - a) for (a, b), n in zip(spans, size, strict=True))
    # The same part in pixels of the source.
    (y0, y1), (x0, x1) = (
        (math.floor(max(a, 0) * m / n), min(math.ceil(min(b, n) * m / n), m))
        for (a, b), n, m in zip(spans, size, grey.shape, strict=True)
    )
    return Prepared(
        image[clipped],
        np.where(outside, 0, share[clipped]).astype(np.uint8),
        np.ascontiguousarray(ultrasound.to_gray(tissue[y0:y1, x0:x1])),
        (panel.x0 + x0, panel.y0 + y0, panel.x0 + x1 - 1, panel.y0 + y1 - 1),
        (inner[0], inner[1]),
        (spans[0][0], spans[1][0]),
        ultrasound.masked(marks[y0:y1, x0:x1], white=False),  # one picture: nothing moves around a white mark
    )


def _span(first: int, stop: int) -> tuple[int, int]:
    """A whole number of tile steps around the region and its margin, centred."""
    needed = stop - first + 2 * round(MARGIN_MM / NATIVE_MM)
    step = TILE - OVERLAP
    length = TILE + step * max(0, math.ceil((needed - TILE) / step))
    start = (first + stop - length) // 2
    return start, start + length


# --- super-resolution ------------------------------------------------------------------------------------------------


def superresolve(prepared: Prepared, run: RunModel) -> tuple[Image, NDArray[np.bool_]]:
    """Image at half the spacing, and the region on its grid."""
    image = prepared.image
    step, trim = TILE - OVERLAP, OVERLAP // 2
    corners = [
        (y, x) for y in range(0, image.shape[0] - trim * 2, step) for x in range(0, image.shape[1] - trim * 2, step)
    ]
    tiles = np.stack([image[y : y + TILE, x : x + TILE] for y, x in corners])[:, None]
    out = np.asarray(run("superres", {"x": tiles.astype(np.float32) / 255})["y"])[:, 0]
    fine = np.zeros((2 * image.shape[0], 2 * image.shape[1]), np.uint8)
    for (y, x), tile in zip(corners, out, strict=True):
        # The border of a tile has seen less around it: it counts only where no other tile covers the place.
        top, left = (trim if y else 0), (trim if x else 0)
        fine[2 * (y + top) : 2 * (y + TILE), 2 * (x + left) : 2 * (x + TILE)] = levels(tile)[2 * top :, 2 * left :]
    return fine, region_of(prepared.share)


def levels(y: NDArray[np.float32]) -> Image:
    """Output of the network, 0..1, as grey values."""
    return np.asarray(np.clip(np.rint(y * 255), 0, 255), np.uint8)


def region_of(share: Image) -> NDArray[np.bool_]:
    """The region on the grid of half the spacing."""
    return np.asarray(ultrasound.resize(share, (2 * share.shape[0], 2 * share.shape[1])) > 127, np.bool_)


# --- radiomics -------------------------------------------------------------------------------------------------------


def features(images: Image, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(n, len(FEATURES)) of images (n, H, W) in one region (H, W), or each in its own (n, H, W).

    One thread, the same bits every time.
    """
    masks = np.broadcast_to(inside, images.shape)
    box = ndimage.find_objects(masks.any(axis=0).astype(np.int8))[0]
    labels = np.pad(masks[(slice(None), *box)], ((0, 0), (1, 1), (1, 1))).astype(np.uint32)
    cut = np.pad(images[(slice(None), *box)], ((0, 0), (1, 1), (1, 1))).astype(np.uint32)
    plain = _nyxus(_INTENSITY, cut, labels)
    texture = _nyxus(_TEXTURE, (cut // BIN + 1) * labels, labels)
    shape = texture[:, -2:] * np.array([(NATIVE_MM / 2) ** 2, 1.0])
    elongation = np.array([[_elongation(mask)] for mask in labels])
    return np.concatenate([plain, texture[:, :-2], shape, elongation], axis=1).astype(np.float32)


def _elongation(mask: NDArray[np.uint32]) -> float:
    """Minor to major axis (IBSI 3.1.14, in the plane)."""
    minor, major = np.linalg.eigvalsh(np.cov(np.nonzero(mask)))
    return math.sqrt(max(float(minor), 0.0) / float(major))


@functools.cache
def _extractor(names: tuple[str, ...]) -> Any:
    """One for the life of the process: nyxus 0.11 keeps 1.4 MB for every object that has ever computed something."""
    import nyxus

    extractor = nyxus.Nyxus(sorted(set(names)), ibsi=True, n_feature_calc_threads=1)
    extractor.set_metaparam("glcm/offset=1")  # it starts with 0, which compares every pixel with itself
    return extractor


def _nyxus(names: tuple[str, ...], images: NDArray[np.uint32], labels: NDArray[np.uint32]) -> NDArray[np.float64]:
    numbers = [str(k) for k in range(len(images))]  # its default for these is one list that every call lengthens
    table = _extractor(names).featurize(images, labels, numbers, list(numbers))
    values = table[list(names)].to_numpy(np.float64)
    if len(values) != len(images):
        raise ValueError(f"nyxus gave {len(values)} rows for {len(images)} images")
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


# --- sensitivity map -------------------------------------------------------------------------------------------------


def sensitivity(fine: Image, inside: NDArray[np.bool_], margin: float, run: RunModel) -> NDArray[np.float32]:
    """(H, W) at `NATIVE_MM`: how far the margin falls where a window slides over the region and is left out of it.

    The window is cut out of the region instead of painted over: paint has a texture and an edge of its own, and
    radiomics sees both. Size and shape stay the whole region's. Positive = what is there speaks for the positive class.
    """
    windows = _windows(inside)
    left = np.repeat(inside[None], len(windows), axis=0)
    for mask, window in zip(left, windows, strict=True):
        mask[window] = False
    table = np.repeat(features(fine[None], inside), len(windows), axis=0)
    table[:, : -len(_SHAPE)] = features(np.repeat(fine[None], len(windows), axis=0), left)[:, : -len(_SHAPE)]
    without = margins(run("radiomics", {"x": table})["logits"])
    total, weight = np.zeros(inside.shape, np.float32), np.zeros(inside.shape, np.float32)
    for window, one in zip(windows, without, strict=True):
        total[window] += margin - one
        weight[window] += 1
    found = np.where(inside & (weight > 0), total / np.maximum(weight, 1), 0).astype(np.float32)
    return np.asarray(ultrasound.resize(found, (found.shape[0] // 2, found.shape[1] // 2)), np.float32)


def _windows(inside: NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Overlapping squares whose centre lies in the region; few enough for the time, and none takes half of it."""
    area = int(inside.sum())
    most = int(np.clip(MAX_WINDOWS * MAP_PIXELS / area, MAX_WINDOWS / 10, MAX_WINDOWS))
    step = max(4, math.ceil(math.sqrt(area / most)))
    while True:
        half = round(0.75 * step)
        rows, columns = (np.arange(step // 2, n, step) for n in inside.shape)
        centres = [(int(r), int(c)) for r in rows for c in columns if inside[r, c]]
        if 0 < len(centres) <= most:
            break
        step = step + 1 if centres else max(step // 2, 1)
    return [(slice(max(r - half, 0), r + half), slice(max(c - half, 0), c + half)) for r, c in centres]


def margins(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logit of non-seminoma less that of seminoma."""
    return np.asarray(logits, np.float64)[:, 1] - np.asarray(logits, np.float64)[:, 0]

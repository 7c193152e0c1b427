"""The heatmap as a Secondary Capture: one Multi-frame True Color SC, or single-frame ones for old viewers.

Built on `highdicom.base.SOPClass`, because highdicom's own secondary capture knows one frame only. The canvas has
margins, so spatial locations are not preserved and no geometry is written. Burned In Annotation (0028,0301) speaks of
text that identifies patient and date (PS3.3 C.8.6.3): the model's name does not, and the source's banner was cropped
away; where it was not, and the source does not say NO, ours says YES.

Frames: at most `max_frames` and `max_mb`, the ones with most of the map above the scale's lower end first, shown in
the order of time with their numbers in the source. Encoded as RLE Lossless where that is smaller than plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from dicom_node import __version__
from dicom_node.report import codes, objects, picture, rle
from dicom_node.report.context import ReportContext, Variant
from dicom_node.report.uids import Uids
from dicom_node.report.wording import NOT_ANATOMY, mark_of, series_description
from dicom_node.result import Finding, FrameRef, Heatmap, Result

KEY_FRAMES: Final = 8
"""Single-frame captures of one finding: an old viewer shows them as pages."""
SOP_CLASS: Final = {
    "multiframe": str(MultiFrameTrueColorSecondaryCaptureImageStorage),
    "keyframes": str(SecondaryCaptureImageStorage),
}
_FRAME_TIME_MS = 200.0
# Lossy transfer syntaxes and their method (PS3.3 C.7.6.1.1.5.1), for a source that does not say itself it is lossy.
_LOSSY = {
    "1.2.840.10008.1.2.4.50": "ISO_10918_1",
    "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1",
    "1.2.840.10008.1.2.4.91": "ISO_15444_1",
    "1.2.840.10008.1.2.4.203": "ISO_15444_15",
}


@dataclass(frozen=True, slots=True)
class Frames:
    """The drawn frames of one finding in the order of time, plain and packed."""

    indices: tuple[int, ...]
    """Which of the heatmap's frames."""
    ranks: tuple[int, ...]
    """Position of each in the order of saliency."""
    pixels: tuple[NDArray[np.uint8], ...]
    """RGB (rows, columns, 3)."""
    packed: tuple[bytes, ...]

    def at(self, positions: Sequence[int]) -> Frames:
        """Those at these positions."""
        return Frames(
            tuple(self.indices[n] for n in positions),
            tuple(self.ranks[n] for n in positions),
            tuple(self.pixels[n] for n in positions),
            tuple(self.packed[n] for n in positions),
        )

    def most_salient(self, count: int) -> Frames:
        return self.at([n for n, rank in enumerate(self.ranks) if rank < count])

    @property
    def smaller_packed(self) -> bool:
        """Whether the object is written as RLE Lossless."""
        return sum(map(len, self.packed)) < sum(frame.nbytes for frame in self.pixels)


def draw(result: Result, finding: Finding, heatmap: Heatmap, context: ReportContext) -> Frames:
    """Choose, draw and pack the frames; once for all variants. What `max_mb` leaves out is not drawn."""
    capture = context.config.capture
    order = np.argsort(-picture.saliency(heatmap, context.spool), kind="stable")[: capture.max_frames].tolist()
    drawn: list[NDArray[np.uint8]] = []
    packed: list[bytes] = []
    plain_bytes = packed_bytes = 0
    for frame in picture.each_frame(heatmap, context.spool, picture.caption_of(result, finding), order):
        data = rle.encode(frame)
        plain_bytes, packed_bytes = plain_bytes + frame.nbytes, packed_bytes + len(data)
        if packed and min(plain_bytes, packed_bytes) > capture.max_mb * 1e6:
            break
        drawn.append(frame)
        packed.append(data)
    by_rank = Frames(tuple(order[: len(packed)]), tuple(range(len(packed))), tuple(drawn), tuple(packed))
    return by_rank.at(sorted(by_rank.ranks, key=by_rank.indices.__getitem__))


@dataclass(frozen=True, slots=True)
class Reported:
    """One finding and what it was made from."""

    result: Result
    finding: Finding
    index: int
    """Of the finding; each finding has a series of its own, as a series has one side."""
    sources: Mapping[str, Dataset]
    syntaxes: Mapping[str, str]
    """SOP Instance UID to the transfer syntax it came in."""

    @property
    def source(self) -> Dataset:
        """The header of the first instance of the finding."""
        return self.sources[self.finding.sources[0].sop_instance_uid]


@dataclass(frozen=True, slots=True)
class Subject(Reported):
    """One finding's heatmap."""

    heatmap: Heatmap

    @property
    def source(self) -> Dataset:
        """The header of the first instance shown."""
        return self.sources[self.heatmap.frame_refs[0].sop_instance_uid]


def build_captures(
    subject: Subject, frames: Frames, context: ReportContext, uids: Uids, variant: Variant
) -> list[Dataset]:
    """The data sets of one variant."""
    if variant.capture == "multiframe":
        return [_capture(subject, frames, context, uids, variant, 1)]
    chosen = frames.most_salient(KEY_FRAMES)
    return [_capture(subject, chosen.at([n]), context, uids, variant, n + 1) for n in range(len(chosen.indices))]


def _capture(
    subject: Subject, frames: Frames, context: ReportContext, uids: Uids, variant: Variant, number: int
) -> Dataset:
    name = variant.name("capture")
    provenance = subject.result.provenance
    packed = frames.smaller_packed
    identity = objects.Identity(
        sop_class_uid=SOP_CLASS[variant.capture],
        sop_instance_uid=uids.instance("capture", name, subject.index, number),
        series_instance_uid=uids.series("capture", name, subject.index),
        modality=str(subject.source.get("Modality") or "OT"),
        series_number=context.config.series_number + 1 + subject.index,
        instance_number=number,
        series_description=series_description(subject.result.title, provenance.intended_use),
    )
    software = f"{provenance.task} {provenance.package_version}"[:64]
    syntax = str(RLELossless if packed else ExplicitVRLittleEndian)
    made = objects.new_object(identity, subject.source, context, uids, syntax, software)
    add_side(made, subject)
    add_equipment(made, subject, context)
    _image(made, subject, frames)
    add_pixels(made, frames, packed)
    if variant.capture == "multiframe":
        _timing(made, len(frames.indices), subject.heatmap.frame_time_ms)
    return made


def add_side(made: Dataset, subject: Reported) -> None:
    """Laterality is 2C (PS3.3 C.7.3.1): required of a paired body part, empty when unknown, never defaulted."""
    part = codes.BODY_PART.get(subject.finding.site) or str(subject.source.get("BodyPartExamined", ""))
    if part:
        made.BodyPartExamined = part
    side = codes.LATERALITY_VALUE.get(subject.finding.laterality) if subject.finding.laterality else None
    if side in ("R", "L"):
        made.Laterality = side
    elif side == "B":
        made.ImageLaterality = side  # Laterality has no value for both
    elif part not in codes.UNPAIRED:
        made.Laterality = None


def add_equipment(made: Dataset, subject: Reported, context: ReportContext) -> None:
    """SC Equipment module (PS3.3 C.8.6.1): the image was made on a workstation."""
    made.ConversionType = "WSD"
    made.SecondaryCaptureDeviceManufacturer = context.config.manufacturer
    made.SecondaryCaptureDeviceManufacturerModelName = objects.MODEL_NAME
    made.SecondaryCaptureDeviceSoftwareVersions = f"{objects.MODEL_NAME} {__version__}"
    stamp = objects.Stamp.of(context.created, subject.source)
    made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = stamp.date, stamp.time


def _image(made: Dataset, subject: Subject, frames: Frames) -> None:
    """General Image module: what it was derived from and how."""
    heatmap, provenance = subject.heatmap, subject.result.provenance
    made.ImageType = ["DERIVED", "SECONDARY", "OTHER", "HEATMAP"]
    made.PatientOrientation = None
    made.BurnedInAnnotation = "NO" if _banner_removed(subject) else "YES"
    made.DerivationDescription = (
        f"{heatmap.method} of {provenance.algorithm_name} {provenance.package_version} over the source frames, "
        f"colour map {picture.COLOUR_MAP}, fixed scale {heatmap.vmin:.4g} to {heatmap.vmax:.4g}. {NOT_ANATOMY}"
    )
    made.ImageComments = mark_of(provenance.intended_use) or NOT_ANATOMY
    shown = [heatmap.frame_refs[i] for i in frames.indices]
    made.SourceImageSequence = list(source_images(shown))
    _lossy_history(made, subject, shown)


def _banner_removed(subject: Subject) -> bool:
    """True when nothing shown can name the patient: cropped to the image region, or the source says so."""
    source = subject.source
    if source.get("BurnedInAnnotation") == "NO":
        return True
    x0, y0, x1, y1 = subject.heatmap.region
    rows, columns = int(source.get("Rows") or 0), int(source.get("Columns") or 0)
    whole = x1 - x0 + 1 >= columns and y1 - y0 + 1 >= rows
    # A scanner's MR image is computed, not captured from a screen.
    computed = source.get("Modality") == "MR" and "SECONDARY" not in (source.get("ImageType") or ())
    return not whole or (computed and source.get("BurnedInAnnotation") != "YES")


def source_images(references: Iterable[FrameRef]) -> Iterable[Dataset]:
    by_instance: dict[str, list[FrameRef]] = {}
    for reference in references:
        by_instance.setdefault(reference.sop_instance_uid, []).append(reference)
    for group in by_instance.values():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = group[0].sop_class_uid, group[0].sop_instance_uid
        numbers = objects.frame_numbers(group)
        if numbers:
            item.ReferencedFrameNumber = numbers
        item.PurposeOfReferenceCodeSequence = [objects.code_item(codes.SOURCE_IMAGE_FOR_PROCESSING)]
        item.SpatialLocationsPreserved = "NO"
        yield item


def _lossy_history(made: Dataset, subject: Subject, shown: Iterable[FrameRef]) -> None:
    """Lossy Image Compression never resets (PS3.3 C.7.6.1.1.5): a picture of a lossy image is lossy."""
    history: dict[tuple[str, str], None] = {}
    lossy = False
    for uid in dict.fromkeys(r.sop_instance_uid for r in shown):
        source = subject.sources[uid]
        methods = _several(source.get("LossyImageCompressionMethod"))
        ratios = _several(source.get("LossyImageCompressionRatio"))
        by_syntax = _LOSSY.get(subject.syntaxes[uid])
        lossy = lossy or source.get("LossyImageCompression") == "01" or by_syntax is not None
        if not methods and by_syntax:
            methods = [by_syntax]
        history |= dict.fromkeys(zip(methods, ratios + [""] * (len(methods) - len(ratios)), strict=False))
    made.LossyImageCompression = "01" if lossy else "00"
    if lossy and history:
        made.LossyImageCompressionMethod = [method for method, _ in history]
        if all(ratio for _, ratio in history):
            made.LossyImageCompressionRatio = [ratio for _, ratio in history]


def _several(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list | tuple) or hasattr(value, "append") else [str(value)]


def _timing(made: Dataset, n: int, frame_ms: float | None) -> None:
    made.NumberOfFrames = n
    if n > 1:
        made.FrameIncrementPointer = Tag("FrameTime")
        made.FrameTime = f"{frame_ms or _FRAME_TIME_MS:.10g}"


def add_pixels(made: Dataset, frames: Frames, packed: bool) -> None:
    """PS3.3 A.8.5.4: RGB, eight bits, colour by pixel."""
    made.Rows, made.Columns, made.SamplesPerPixel = frames.pixels[0].shape
    made.PhotometricInterpretation, made.PlanarConfiguration = "RGB", 0
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    if packed:
        made.PixelData = encapsulate(list(frames.packed))
        made["PixelData"].VR = "OB"
        made["PixelData"].is_undefined_length = True
    else:
        data = b"".join(frame.tobytes() for frame in frames.pixels)
        made.PixelData = data + b"\0" * (len(data) % 2)
        made["PixelData"].VR = "OB"

"""Phantom studies as scanners of several makers send them: the liver's phases, and the pixels of ultrasound."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import convert_color_space
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from engines.liver_dce import objects, phantom

LIVER = ("series", "times", "temporal", "acquisition", "enhanced", "philips", "ge", "siemens", "big endian")
"""How scanners tell the phases apart; the first four the task's own generator writes."""
ULTRASOUND = ("jpeg", "raw", "rle", "palette", "ybr", "j2k")
"""JPEG baseline YBR_FULL_422, RGB, RLE, PALETTE COLOR, YBR_FULL, JPEG 2000 lossless; the first three likewise."""
RULES = {
    "enhanced": "TemporalPositionIndex", "philips": "TemporalPositionIdentifier", "ge": "TriggerTime",
    "siemens": "AcquisitionNumber", "big endian": "TemporalPositionIdentifier",
}  # fmt: skip
"""Which rule finds the phases."""
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
PHASES, DEPTH = len(phantom.PHASES), phantom.SHAPE[0]
_FRAMES = 6
_OF_A_SLICE = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "SliceLocation", "TemporalPositionIdentifier", "NumberOfTemporalPositions", "RepetitionTime", "EchoTime",
    "AcquisitionTime", "AcquisitionDate", "ScanningSequence", "EchoNumbers", "AcquisitionNumber", "PixelData",
)  # fmt: skip


def exam(seed: int, label: int) -> phantom.Exam:
    return phantom.make(seed, label)


def liver(made: phantom.Exam, form: str) -> list[Dataset]:
    """The images of all phases; without a vendor's form, as the task's generator writes them."""
    if form in objects.ENCODINGS:
        return objects.images(made, form)
    base = objects.images(made, "temporal")
    write: dict[str, Callable[[list[Dataset], phantom.Exam], list[Dataset]]] = {
        "enhanced": _enhanced, "philips": _philips, "ge": _ge, "siemens": _siemens, "big endian": _big_endian,
    }  # fmt: skip
    return write[form](base, made)


def outline(made: phantom.Exam, images: list[Dataset]) -> Dataset:
    """The tumour as a reader outlined it on the arterial phase; of Enhanced MR, on its frames."""
    if images[0].SOPClassUID != ENHANCED_MR:
        return objects.segmentation(made, images[DEPTH : 2 * DEPTH])
    classic = objects.images(made, "temporal")[DEPTH : 2 * DEPTH]
    for ds in classic:
        ds.StudyInstanceUID, ds.FrameOfReferenceUID = images[0].StudyInstanceUID, images[0].FrameOfReferenceUID
        ds.PatientID = images[0].PatientID
    seg = objects.segmentation(made, classic)
    sent = {ds.SOPInstanceUID: number for number, ds in enumerate(classic)}
    _point_at(seg, images[0], sent)
    return seg


def _point_at(seg: Dataset, image: Dataset, sent: dict[str, int]) -> None:
    """The same regions, drawn on frames of one instance."""
    frames = [
        (
            int(group.FrameContentSequence[0].TemporalPositionIndex),
            tuple(group.PlanePositionSequence[0].ImagePositionPatient),
        )
        for group in image.PerFrameFunctionalGroupsSequence
    ]
    places = sorted({place for _, place in frames}, key=lambda place: place[2])
    for group in seg.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence", []):
            for source in derivation.SourceImageSequence:
                place = places[sent[source.ReferencedSOPInstanceUID]]
                source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = ENHANCED_MR, image.SOPInstanceUID
                source.ReferencedFrameNumber = frames.index((2, place)) + 1
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = ENHANCED_MR, image.SOPInstanceUID
    series = Dataset()
    series.SeriesInstanceUID, series.ReferencedInstanceSequence = image.SeriesInstanceUID, [reference]
    seg.ReferencedSeriesSequence = [series]


def _each(images: list[Dataset]) -> list[tuple[int, int, Dataset]]:
    return [(*divmod(number, DEPTH), ds) for number, ds in enumerate(images)]


def _unmarked(images: list[Dataset], maker: str) -> None:
    """One series in which nothing tells a phase yet."""
    for ds in images:
        ds.Manufacturer, ds.SeriesDescription = maker, "t1 dyn tra"
        ds.AcquisitionTime, ds.ContentTime = images[0].AcquisitionTime, images[-1].ContentTime
        for keyword in ("TemporalPositionIdentifier", "NumberOfTemporalPositions"):
            if keyword in ds:
                del ds[keyword]


def _philips(images: list[Dataset], made: phantom.Exam) -> list[Dataset]:
    """Instance Number shuffled, a slope for each phase, the time of the dynamic in a private element."""
    numbers = list(range(1, len(images) + 1))
    random.Random(5).shuffle(numbers)
    for p, s, ds in _each(images):
        scale = (1.0, 0.5, 0.25, 0.125)[p]
        ds.Manufacturer, ds.SeriesDescription, ds.InstanceNumber = "Philips", "dyn THRIVE", numbers[p * DEPTH + s]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = scale, 0.0, "normalized"
        ds.PixelData = (made.volume[p, s] / scale).astype("<u2").tobytes()
        block = ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0xA0, "FL", made.times[p] - made.times[0])
        block.add_new(0x0E, "FL", 0.01 / scale)
    return images


def _ge(images: list[Dataset], made: phantom.Exam) -> list[Dataset]:
    """All phases bear the time at which the first began; the rest is in Trigger Time."""
    _unmarked(images, "GE MEDICAL SYSTEMS")
    for p, s, ds in _each(images):
        ds.TriggerTime, ds.InstanceNumber = f"{1000 * (made.times[p] - made.times[0]):.1f}", s * PHASES + p + 1
    return images


def _siemens(images: list[Dataset], made: phantom.Exam) -> list[Dataset]:
    """Acquisition Number counts the phases; every slice has a time of its own."""
    begun = datetime.datetime.strptime(str(images[0].AcquisitionTime), "%H%M%S.%f")
    _unmarked(images, "SIEMENS")
    for p, s, ds in _each(images):
        seconds = made.times[p] - made.times[0] + 0.01 * s
        ds.AcquisitionNumber = p + 1
        ds.AcquisitionTime = (begun + datetime.timedelta(seconds=seconds)).strftime("%H%M%S.%f")
    return images


def _big_endian(images: list[Dataset], made: phantom.Exam) -> list[Dataset]:
    for p, s, ds in _each(images):
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = made.volume[p, s].astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    return images


def _enhanced(images: list[Dataset], made: phantom.Exam) -> list[Dataset]:
    """One Enhanced MR instance, its frames in no order."""
    ds = deepcopy(images[0])
    for keyword in _OF_A_SLICE:
        if keyword in ds:
            del ds[keyword]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesDescription, ds.EchoPulseSequence = "t1 dyn tra", "GRADIENT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    ds.NumberOfFrames, ds.AcquisitionDateTime = len(images), _date_time(images[0])
    first = images[0]
    ds.SharedFunctionalGroupsSequence = [
        _item(
            PlaneOrientationSequence=[_item(ImageOrientationPatient=first.ImageOrientationPatient)],
            PixelMeasuresSequence=[_item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)],
            MRTimingAndRelatedParametersSequence=[_item(RepetitionTime=first.RepetitionTime)],
            MREchoSequence=[_item(EffectiveEchoTime=float(first.EchoTime))],
            MRImageFrameTypeSequence=[_item(FrameType=["ORIGINAL", "PRIMARY", "T1", "NONE"])],
        )
    ]
    order = list(range(len(images)))
    random.Random(3).shuffle(order)
    ds.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=images[k].ImagePositionPatient)],
            FrameContentSequence=[
                _item(TemporalPositionIndex=k // DEPTH + 1, FrameAcquisitionDateTime=_date_time(images[k]))
            ],
        )
        for k in order
    ]
    ds.PixelData = made.volume.reshape(-1, *made.volume.shape[2:])[order].astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return [ds]


def _date_time(ds: Dataset) -> str:
    return f"{ds.AcquisitionDate}{ds.AcquisitionTime}"


def _item(**values: Any) -> Dataset:
    made = Dataset()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def ultrasound(raw: Dataset, form: str) -> Dataset:
    """An uncompressed image or clip in one of the last three of ULTRASOUND; of a clip the first frames."""
    ds = deepcopy(raw)
    pixels = ds.pixel_array
    if int(ds.get("NumberOfFrames", 1)) > 1:
        pixels = pixels[:_FRAMES]
        ds.NumberOfFrames = len(pixels)
    color = pixels if ds.SamplesPerPixel == 3 else np.repeat(pixels[..., None], 3, axis=-1)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if form == "palette":
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "PALETTE COLOR"
        if "PlanarConfiguration" in ds:
            del ds.PlanarConfiguration
        table = (np.arange(256, dtype="<u2") * 257).tobytes()
        for color_number in (1, 2, 3):  # red, green, blue
            ds.add_new(0x00281100 + color_number, "US", [256, 0, 16])
            ds.add_new(0x00281200 + color_number, "OW", table)
        color = np.rint(color.mean(axis=-1)).astype(np.uint8)
    else:
        ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, "RGB"
        if form == "ybr":
            color = convert_color_space(color, "RGB", "YBR_FULL")
            ds.PhotometricInterpretation = "YBR_FULL"
    ds.PixelData = np.ascontiguousarray(color).tobytes()
    ds["PixelData"].VR = "OB"
    if form == "j2k":
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    return ds

"""Headers → Frames that can be part of a contrast-enhanced dynamic series. Classic and Enhanced MR. Reads no file.

Kept: T1-weighted spoiled gradient echo, axial within 45 degrees, original or the water image of a Dixon acquisition.
Left out, by Image Type and description: subtractions, projections, reformats, phase images, localisers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from types import MappingProxyType

from dicom_node.pixels.dynamic_model import Frame, Rules
from dicom_node.pixels.roi_model import Plane, planes
from dicom_node.study import Header, Instance

MR, ENHANCED_MR, LEGACY_ENHANCED_MR = (f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4"))

_PARTS = {
    "water": {"W", "WATER", "WASSER"},
    "fat": {"F", "FAT", "FETT", "FF", "PDFF", "FAT_FRACTION", "FATFRACTION"},
    "in": {"IN", "IP", "IN_PHASE", "INPHASE"},
    "opposed": {"OP", "OPP", "OUT", "OPPOSED", "OUT_PHASE", "OUTPHASE", "OPP_PHASE", "OPPPHASE", "OPPOSED_PHASE"},
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}
_NOT_IMAGES = {
    "SUB", "SUBTRACTION", "SUBTRACT", "MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION_IMAGE", "MPR", "CSA_MPR", "CPR",
    "VOLREN", "VR", "LOCALIZER", "P", "PHASE", "PHASE_MAP", "R", "REAL", "I", "IMAGINARY", "ADC", "DIFFUSION", "FA",
    "VELOCITY", "RESAMPLED", "REFORMATTED", "T2_STAR", "R2_STAR", "T2", "T2STAR", "R2STAR", "SCREEN_SAVE",
    "CSA_RESAMPLED", "T1_MAP", "T2_MAP", "MEAN", "STDDEV", "TTP", "CBV",
}  # fmt: skip
"""Values 3 and on of Image Type or Frame Type (PS3.3 C.8.3.1.1.1, C.8.13.3.1.1; the vendors' own beside)."""
_NOT_WORDS = {
    "sub", "subs", "subtr", "subtraction", "subtraktion", "subtracted", "soustraction", "mip", "minip", "mpr", "dwi",
    "adc", "t2", "haste", "mrcp", "localizer", "localiser", "localizador", "lokalizer", "scout", "survey", "projection",
    "phasenbild", "phasemap",
}  # fmt: skip
_NOT_HAN = ("减影", "減影", "剪影", "定位")
_DIXON = re.compile(r"dixon|flex|ideal|水脂")
_AXIAL = 0.7
"""Smallest z of the normal: 45 degrees."""
_PHILIPS = "philips mr imaging dd"


def frames_of(instance: Instance) -> Iterator[Frame]:
    """What every frame of an MR instance says of itself."""
    header = instance.header
    groups = header.items_of("PerFrameFunctionalGroupsSequence") or (Header({}),)
    shared = next(iter(header.items_of("SharedFunctionalGroupsSequence")), Header({}))
    where = planes(header)
    if len(where) != len(groups):
        where = [None] * len(groups)
    for number, (group, plane) in enumerate(zip(groups, where, strict=True), start=1):
        yield _frame(instance, number, plane, _Groups(header, group, shared))


class _Groups:
    """One frame's attributes: of its functional group, else of the shared one, else of the data set."""

    __slots__ = ("group", "header", "shared")

    def __init__(self, header: Header, group: Header, shared: Header) -> None:
        self.header, self.group, self.shared = header, group, shared

    def of(self, sequence: str) -> Header:
        """The item of a functional group; the data set itself where there is none, as in a classic image."""
        return next(iter(self.group.items_of(sequence) or self.shared.items_of(sequence)), self.header)

    def number(self, sequence: str, keyword: str) -> float | None:
        return self.of(sequence).number(keyword)


def _frame(instance: Instance, number: int, plane: Plane | None, groups: _Groups) -> Frame:
    header = instance.header
    kind = groups.of("MRImageFrameTypeSequence")
    values = kind.texts("FrameType") or header.texts("ImageType")
    part = part_of(values, header.text("SeriesDescription"))
    echo = groups.number("MREchoSequence", "EffectiveEchoTime")
    transform = groups.of("PixelValueTransformationSequence")
    usage = groups.of("ContrastBolusUsageSequence")
    slope, intercept = transform.number("RescaleSlope"), transform.number("RescaleIntercept")
    clock, zone = _clock(groups)
    echo_number = header.number("EchoNumbers")
    return Frame(
        instance, number, plane,
        rows=int(header.number("Rows") or 0), columns=int(header.number("Columns") or 0),
        part=part, original=values[:1] == ("ORIGINAL",) or part == "water",
        echo_number=None if echo_number is None else int(echo_number),
        echo_ms=header.number("EchoTime") if echo is None else echo,
        keys=_keys(groups), clock=clock, zone=zone, offsets=_offsets(groups),
        label=usage.text("ContrastBolusAgentPhase").strip().upper(),
        administered=usage.text("ContrastBolusAgentAdministered").strip().upper(),
        slope=1.0 if slope is None else slope, intercept=0.0 if intercept is None else intercept,
        private_scale=_philips(groups, "2005100E"),
        stored_as=(
            int(header.number("BitsAllocated") or 0), int(header.number("BitsStored") or 0),
            int(header.number("PixelRepresentation") or 0),
        ),
        written_spacing_mm=groups.number("PixelMeasuresSequence", "SpacingBetweenSlices"),
    )  # fmt: skip


def _keys(groups: _Groups) -> MappingProxyType[str, float]:
    """In order of trust (`dynamic_split.KEYS`)."""
    header, content = groups.header, groups.of("FrameContentSequence")
    found = {
        "TemporalPositionIdentifier": header.number("TemporalPositionIdentifier"),
        "TemporalPositionIndex": content.number("TemporalPositionIndex"),
        "DimensionIndexValues": _dimension(header, content),
        "TemporalPositionTimeOffset": groups.number("TemporalPositionSequence", "TemporalPositionTimeOffset"),
        "AcquisitionNumber": (
            header.number("AcquisitionNumber") if content is header else content.number("FrameAcquisitionNumber")
        ),
        "TriggerTime": _trigger(groups),
        "ContentTime": moment(header.text("ContentDate"), header.text("ContentTime")),
    }
    return MappingProxyType({k: v for k, v in found.items() if v is not None})


def _trigger(groups: _Groups) -> float | None:
    classic = groups.header.number("TriggerTime")
    return (
        groups.number("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime")
        if classic is None
        else classic
    )


_TEMPORAL_POINTERS = ("00209128", "0020930D", "00209156", "00189074", "00189344", "00200100", "00189342")
"""Temporal Position Index, its time offset, frame acquisition number and time, contrast phase, position identifier."""


def _dimension(header: Header, content: Header) -> float | None:
    """Value of the first dimension that counts the phases (PS3.3 C.7.6.17)."""
    pointers = [item.text("DimensionIndexPointer") for item in header.items_of("DimensionIndexSequence")]
    values = content.texts("DimensionIndexValues")
    if len(pointers) != len(values):
        return None
    for wanted in _TEMPORAL_POINTERS:
        if wanted in pointers:
            value = values[pointers.index(wanted)]
            return float(value) if value.isdigit() else None
    return None


def _offsets(groups: _Groups) -> MappingProxyType[str, float]:
    """Seconds from some start, in order of trust. Trigger Time is a cardiac attribute that scanners use for this."""
    trigger, offset = _trigger(groups), groups.number("TemporalPositionSequence", "TemporalPositionTimeOffset")
    found = {
        "TemporalPositionTimeOffset": offset,
        "dynamic scan begin time (2005,10A0)": _philips(groups, "200510A0"),
        "TriggerTime": None if trigger is None else trigger / 1000.0,
    }
    return MappingProxyType({k: v for k, v in found.items() if v is not None})


def _philips(groups: _Groups, name: str) -> float | None:
    """A private number, only where the block is said to be Philips'."""
    creator = groups.header.text("20050010").casefold()
    return groups.header.number(name) if creator.startswith(_PHILIPS) else None


# --- time ------------------------------------------------------------------------------------------------------------


def _clock(groups: _Groups) -> tuple[float | None, float | None]:
    """When the frame was acquired, and its time zone (PS3.5 6.2 DT; PS3.3 C.12.1.1.8)."""
    header = groups.header
    of_study = _offset(header.text("TimezoneOffsetFromUTC"))
    for item, keyword in (
        (groups.of("FrameContentSequence"), "FrameAcquisitionDateTime"), (header, "AcquisitionDateTime"),
    ):  # fmt: skip
        text = item.text(keyword).strip()
        found = re.fullmatch(r"(\d{8})(\d{2,6}(?:\.\d{1,6})?)([+-]\d{4})?", text)
        if found:
            clock, zone = moment(found[1], found[2]), _offset(found[3] or "")
            return clock, of_study if zone is None else zone
    day = header.text("AcquisitionDate") or header.text("SeriesDate") or header.text("StudyDate")
    return moment(day, header.text("AcquisitionTime")), of_study


def moment(day: str, time: str) -> float | None:
    """Seconds since 0001-01-01, or since midnight where the day is not said; None where the time is not."""
    found = re.fullmatch(r"(\d{2})(\d{2})?(\d{2})?(\.\d{1,6})?", time.strip().replace(":", ""))
    if not found or not time.strip():
        return None
    hours, minutes, seconds = (int(found[i] or 0) for i in (1, 2, 3))
    of_day = hours * 3600 + minutes * 60 + seconds + float(found[4] or 0)
    digits = day.strip().replace(".", "")
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])).toordinal() * 86400.0 + of_day
    except ValueError:
        return of_day


def _offset(text: str) -> float | None:
    found = re.fullmatch(r"([+-])(\d{2})(\d{2})", text.strip())
    if not found:
        return None
    return (-1 if found[1] == "-" else 1) * (int(found[2]) * 3600.0 + int(found[3]) * 60.0)


# --- what kind of image ----------------------------------------------------------------------------------------------


def part_of(image_type: tuple[str, ...], description: str) -> str:
    """Which image of a Dixon acquisition, by Image Type, else by a description that speaks of one."""
    for value in _values(image_type):
        if value in _PART_OF:
            return _PART_OF[value]
    text = description.casefold()
    if not _DIXON.search(text):
        return ""
    if "水" in text.replace("水脂", ""):
        return "water"
    found = {_PART_OF[w.upper()] for w in re.findall(r"[a-z]+", text) if w.upper() in _PART_OF}
    return found.pop() if len(found) == 1 else ""


def _values(image_type: tuple[str, ...]) -> list[str]:
    """Values 3 and on: spaces as underscores, Philips' technique ("W_FFE") cut off."""
    values = [v.strip().upper().replace(" ", "_") for v in image_type[2:]]
    return [re.sub(r"_(FFE|TFE|SE|IR)$", "", v) for v in values]


def why_not(frame: Frame, rules: Rules) -> str:
    """Why a frame is no part of a dynamic series; "" = it can be one. A Dixon part is judged by the caller."""
    header = frame.instance.header
    kind = next(iter(_item(header, frame.number, "MRImageFrameTypeSequence")), header)
    image_type = kind.texts("FrameType") or header.texts("ImageType")
    words = set(re.findall(r"[a-z0-9]+", header.text("SeriesDescription").casefold()))
    if image_type[1:2] == ("SECONDARY",) or (_NOT_IMAGES & set(_values(image_type)) and not frame.part):
        return "derived"
    if _NOT_WORDS & words or any(w in header.text("SeriesDescription") for w in _NOT_HAN):
        return "derived"
    if kind.text("ComplexImageComponent") in ("PHASE", "REAL", "IMAGINARY"):
        return "derived"
    if header.text("PhotometricInterpretation") not in ("MONOCHROME2", "") or not frame.rows or not frame.columns:
        return "no grey image"
    if not _gradient_echo(header, frame.number, rules):
        return "not a fast gradient echo"
    if frame.plane is not None and abs(float(frame.plane.normal[2])) < _AXIAL:
        return "not axial"
    return ""


def _item(header: Header, number: int, sequence: str) -> tuple[Header, ...]:
    groups = header.items_of("PerFrameFunctionalGroupsSequence")
    own = groups[number - 1].items_of(sequence) if number <= len(groups) else ()
    return own or tuple(i for s in header.items_of("SharedFunctionalGroupsSequence") for i in s.items_of(sequence))


def _gradient_echo(header: Header, number: int, rules: Rules) -> bool:
    """PS3.3 C.8.3.1 Scanning Sequence; C.8.13.4 Echo Pulse Sequence, which is required of original Enhanced images."""
    timing = next(iter(_item(header, number, "MRTimingAndRelatedParametersSequence")), header)
    repetition = timing.number("RepetitionTime")
    if repetition is not None and not 0 < repetition < rules.maximum_tr_ms:
        return False
    if header.text("EchoPulseSequence"):
        modifier = next(iter(_item(header, number, "MRModifierSequence")), header)
        return header.text("EchoPulseSequence") == "GRADIENT" and modifier.text("InversionRecovery") != "YES"
    scanning = set(header.texts("ScanningSequence"))
    return "GR" in scanning and not scanning & {"SE", "IR", "EP"}


def is_mr(instance: Instance) -> bool:
    """An MR image of the patient, classic or enhanced."""
    return instance.sop_class_uid in (MR, ENHANCED_MR, LEGACY_ENHANCED_MR)

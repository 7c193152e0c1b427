"""What goes into the builders and what comes out, as frozen values. No I/O, nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from dicom_node.config import Destination
from dicom_node.config import Report as ReportConfig
from dicom_node.result import FrameRef

SrKind = Literal["comprehensive3d", "enhanced"]
CaptureKind = Literal["multiframe", "keyframes"]
Charset = Literal["ISO_IR 192", "GB18030", "ISO_IR 100"]
ObjectKind = Literal["sr", "capture"]


@dataclass(frozen=True, slots=True)
class Variant:
    """What one destination wants to receive."""

    objects: tuple[ObjectKind, ...] = ("sr", "capture")
    sr: SrKind = "comprehensive3d"
    capture: CaptureKind = "multiframe"
    charset: Charset = "ISO_IR 192"

    @classmethod
    def of(cls, destination: Destination) -> Variant:
        return cls(destination.objects, destination.sr, destination.capture, destination.charset)

    def name(self, kind: ObjectKind) -> str:
        """`BuiltObject.variant` of the objects of this kind: at most 32 characters."""
        return f"{self.sr if kind == 'sr' else self.capture}/{self.charset}"

    def accepts(self, built: BuiltObject) -> bool:
        """True when this object is one of those the destination wants."""
        return built.kind in self.objects and built.variant == self.name(built.kind)


@dataclass(frozen=True, slots=True)
class Predecessor:
    """An SR of an earlier revision, which the new one follows (PS3.3 C.17.2, Predecessor Documents Sequence)."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    variant: str
    """As `BuiltObject.variant`: an SR follows the one that the same destinations hold."""


@dataclass(frozen=True, slots=True)
class Region:
    """A closed polygon in the pixels of one full source frame (x right, y down, origin at the top left corner)."""

    frame: FrameRef
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) < 3:
            raise ValueError("a region needs at least 3 points")


@dataclass(frozen=True, slots=True)
class ReportContext:
    """Everything besides the result itself that the bytes depend on."""

    config: ReportConfig
    namespace: str
    """Unlike any other node's and unchanging, for example a random UUID kept in the store root."""
    created: datetime
    """Of the job row, with a time zone; every time stamp in the objects is this one."""
    study_instance_uid: str
    spool: Path
    """Folder of the arrays that `Heatmap` names."""
    variants: tuple[Variant, ...] = (Variant(),)
    predecessors: tuple[Predecessor, ...] = ()
    fallback_charset: str = ""
    """For text of the sources that is not in the character set they declare (`store.fallback_charset`)."""
    regions: Mapping[str, Region] = field(default_factory=dict)
    """Tracking identifier to region. Where every finding has one, the SR's groups are TID 1410, else TID 1501."""

    def __post_init__(self) -> None:
        if self.created.tzinfo is None:
            raise ValueError("created needs a time zone")
        if not self.namespace:
            raise ValueError("namespace may not be empty")


@dataclass(frozen=True, slots=True)
class BuiltObject:
    """One SOP Instance, ready to be written once and sent as often as needed."""

    kind: ObjectKind
    variant: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    data: bytes
    """The Part 10 file."""
    fits: bool = True
    """False: some text is not in the character set that was asked for, so the object is in UTF-8."""

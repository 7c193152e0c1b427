"""SOP Classes and Transfer Syntaxes this node accepts as SCP: explicit tables, the source of the conformance statement.

Nothing outside the tables is negotiated: not even as "any storage class", because that mode takes the peer's first
transfer syntax blindly, also one nobody here can decode. For each context **our** order decides: uncompressed first (a
sender loses nothing and does not compress on our account), then lossless, then lossy. What was received is stored as it
came. Deflated is absent on purpose: 2 MB of it can inflate to gigabytes. Video is absent because no decoder is shipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

VERIFICATION = "1.2.840.10008.1.1"
INSTANCE_AVAILABILITY = "1.2.840.10008.5.1.4.33"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"

EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"


@dataclass(frozen=True, slots=True)
class TransferSyntax:
    """One row of the transfer syntax table."""

    uid: str
    name: str
    kind: Literal["uncompressed", "lossless", "lossy"]


TRANSFER_SYNTAXES: tuple[TransferSyntax, ...] = (
    TransferSyntax(EXPLICIT_VR_LITTLE_ENDIAN, "Explicit VR Little Endian", "uncompressed"),
    TransferSyntax(IMPLICIT_VR_LITTLE_ENDIAN, "Implicit VR Little Endian", "uncompressed"),
    TransferSyntax(EXPLICIT_VR_BIG_ENDIAN, "Explicit VR Big Endian (retired)", "uncompressed"),
    TransferSyntax("1.2.840.10008.1.2.4.70", "JPEG Lossless, First-Order Prediction (Process 14 SV1)", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.57", "JPEG Lossless (Process 14)", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.90", "JPEG 2000 Lossless Only", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.201", "High-Throughput JPEG 2000 Lossless Only", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.202", "High-Throughput JPEG 2000 with RPCL Lossless Only", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.5", "RLE Lossless", "lossless"),
    TransferSyntax("1.2.840.10008.1.2.4.50", "JPEG Baseline (Process 1)", "lossy"),
    TransferSyntax("1.2.840.10008.1.2.4.51", "JPEG Extended (Process 2 and 4)", "lossy"),
    TransferSyntax("1.2.840.10008.1.2.4.81", "JPEG-LS Near-lossless", "lossy"),
    TransferSyntax("1.2.840.10008.1.2.4.91", "JPEG 2000", "lossy"),
    TransferSyntax("1.2.840.10008.1.2.4.203", "High-Throughput JPEG 2000", "lossy"),
)
"""In the order of our preference."""

UNCOMPRESSED = tuple(t.uid for t in TRANSFER_SYNTAXES if t.kind == "uncompressed")
ALL = tuple(t.uid for t in TRANSFER_SYNTAXES)


@dataclass(frozen=True, slots=True)
class SopClass:
    """One row of the SOP Class table."""

    uid: str
    name: str
    use: Literal["image", "report", "region", "stored", "verification", "notification", "commitment"]
    """image: routed; report: clinical and measurement input; region: ROI input; stored: kept, never routed, so that the
    sender's whole-study job does not fail; notification: N-CREATE, only where `receive.availability` is true;
    commitment: N-EVENT-REPORT, only with the roles reversed."""
    transfer_syntaxes: tuple[str, ...] = ALL


_STORAGE = "1.2.840.10008.5.1.4.1.1."

SOP_CLASSES: tuple[SopClass, ...] = (
    SopClass(VERIFICATION, "Verification", "verification", UNCOMPRESSED),
    SopClass(_STORAGE + "6.1", "Ultrasound Image Storage", "image"),
    SopClass(_STORAGE + "3.1", "Ultrasound Multi-frame Image Storage", "image"),
    SopClass(_STORAGE + "6", "Ultrasound Image Storage (Retired)", "image"),
    SopClass(_STORAGE + "3", "Ultrasound Multi-frame Image Storage (Retired)", "image"),
    SopClass(_STORAGE + "6.2", "Enhanced US Volume Storage", "stored"),
    SopClass(_STORAGE + "4", "MR Image Storage", "image"),
    SopClass(_STORAGE + "4.1", "Enhanced MR Image Storage", "image"),
    SopClass(_STORAGE + "4.3", "Enhanced MR Color Image Storage", "image"),
    SopClass(_STORAGE + "4.4", "Legacy Converted Enhanced MR Image Storage", "image"),
    SopClass(_STORAGE + "7", "Secondary Capture Image Storage", "image"),
    SopClass(_STORAGE + "7.2", "Multi-frame Grayscale Byte Secondary Capture Image Storage", "image"),
    SopClass(_STORAGE + "7.4", "Multi-frame True Color Secondary Capture Image Storage", "image"),
    SopClass(_STORAGE + "88.11", "Basic Text SR Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "88.22", "Enhanced SR Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "88.33", "Comprehensive SR Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "88.34", "Comprehensive 3D SR Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "88.35", "Extensible SR Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "88.59", "Key Object Selection Document Storage", "report", UNCOMPRESSED),
    SopClass(_STORAGE + "66.4", "Segmentation Storage", "region"),
    SopClass(_STORAGE + "481.3", "RT Structure Set Storage", "region", UNCOMPRESSED),
    SopClass(_STORAGE + "11.1", "Grayscale Softcopy Presentation State Storage", "region", UNCOMPRESSED),
    SopClass(_STORAGE + "11.2", "Color Softcopy Presentation State Storage", "stored", UNCOMPRESSED),
    SopClass(_STORAGE + "104.1", "Encapsulated PDF Storage", "stored", UNCOMPRESSED),
    SopClass(_STORAGE + "66", "Raw Data Storage", "stored", UNCOMPRESSED),
    SopClass(_STORAGE + "4.2", "MR Spectroscopy Storage", "stored", UNCOMPRESSED),
    SopClass(_STORAGE + "67", "Real World Value Mapping Storage", "stored", UNCOMPRESSED),
    SopClass(_STORAGE + "30", "Parametric Map Storage", "stored"),
    SopClass(_STORAGE + "2", "CT Image Storage", "stored"),
    SopClass(INSTANCE_AVAILABILITY, "Instance Availability Notification", "notification", UNCOMPRESSED),
)

COMMITMENT = SopClass(STORAGE_COMMITMENT, "Storage Commitment Push Model", "commitment", UNCOMPRESSED)
"""Taken only from a peer that proposes itself as SCP (PS3.7 D.3.3.4, PS3.4 J.3.3): a PACS that reports to us."""


def accepted(also_accept: Iterable[str] = (), *, availability: bool = False) -> tuple[SopClass, ...]:
    """The table with the operator's additions (`receive.also_accept`: vendor private classes, stored, never routed)."""
    known = {c.uid for c in SOP_CLASSES}
    extra = tuple(SopClass(uid, "receive.also_accept", "stored") for uid in also_accept if uid not in known)
    return tuple(c for c in SOP_CLASSES if availability or c.use != "notification") + extra

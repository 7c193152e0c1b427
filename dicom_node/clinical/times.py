"""Times of values and of images, made comparable.

DICOM times rarely name a zone, a FHIR server always does. Where the study names its own (0008,0201), a time with an
offset is brought to it; else both are taken as written: one site has one zone. The error is below a day, the limits
are days.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from dicom_node.study import Study


def iso(date: str, time: str) -> str:
    """DA and TM (PS3.5 6.2) as ISO 8601; "" where the date is none. ACR-NEMA's dots and colons are read."""
    parts = re.fullmatch(r"(\d{4})\.?(\d{2})\.?(\d{2})", date.strip())
    if parts is None:
        return ""
    digits = re.match(r"\d{0,6}", time.replace(":", ""))
    clock = (digits[0] if digits else "").ljust(6, "0")
    second = min(int(clock[4:]), 59)  # PS3.5 allows 60, a leap second
    text = f"{parts[1]}-{parts[2]}-{parts[3]}T{clock[:2]}:{clock[2:4]}:{second:02d}"
    return text if moment(text) is not None else ""


def moment(text: str, zone: timedelta | None = None) -> datetime | None:
    """A point in time that compares with any other; None where the text names no day."""
    if not re.match(r"\d{4}-\d{2}-\d{2}", text):
        return None
    try:
        value = datetime.fromisoformat(text)
        if value.tzinfo is not None and zone is not None:
            value = value.astimezone(timezone(zone))
        return value.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def zone_of(study: Study) -> timedelta | None:
    """Timezone Offset From UTC (0008,0201), &ZZXX, where all instances agree on it."""
    said = {t for i in study.instances if (t := i.header.text("TimezoneOffsetFromUTC").strip())}
    match = re.fullmatch(r"([+-])(\d{2})(\d{2})", said.pop()) if len(said) == 1 else None
    if match is None:
        return None
    offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
    offset = -offset if match[1] == "-" else offset
    return offset if abs(offset) <= timedelta(hours=14) else None


def reference(study: Study) -> datetime | None:
    """When the images were made: the newest study time of an instance that is not a report."""
    times = [
        moment(iso(i.header.text("StudyDate"), i.header.text("StudyTime")))
        for i in study.instances
        if i.header.text("Modality") != "SR"
    ]
    return max((t for t in times if t is not None), default=None)

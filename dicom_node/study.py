"""What was received, as frozen values: Header, Instance, Series, Study. No I/O; everything above may import it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

Scalar: TypeAlias = str | int | float
Value: TypeAlias = "Scalar | tuple[Scalar, ...] | tuple[Header, ...]"


@dataclass(frozen=True, slots=True, eq=False)
class Header(Mapping[str, "Value"]):
    """The attributes of one data set without its bulk data: an immutable mapping from DICOM keyword to value.

    Text is decoded (PS3.5 6.1) to `str`; numbers are `int` or `float`; a multi-valued attribute is a tuple; a sequence
    is a tuple of Headers. Absent and empty attributes are both absent. Private attributes stand under their tag as
    eight hexadecimal digits (`"200510A0"`).
    """

    values_: Mapping[str, Value]
    text_guessed: bool = False
    """Some text is not in the character set that the object declares; not kept by the ledger."""

    def __getitem__(self, keyword: str) -> Value:
        return self.values_[keyword]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def text(self, keyword: str) -> str:
        """The value as text; "" when absent; a multi-valued attribute joined by a backslash."""
        value = self.values_.get(keyword, "")
        return "\\".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def texts(self, keyword: str) -> tuple[str, ...]:
        """All values as text; () when absent."""
        value = self.values_.get(keyword, ())
        return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)

    def number(self, keyword: str) -> float | None:
        """The (first) value as a number; None when absent or not a number."""
        value: Any = self.values_.get(keyword)
        if isinstance(value, tuple):
            value = value[0] if value else None
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError):
            return None

    def items_of(self, keyword: str) -> tuple[Header, ...]:
        """The items of a sequence; () when absent."""
        value = self.values_.get(keyword, ())
        return tuple(v for v in value if isinstance(v, Header)) if isinstance(value, tuple) else ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Header:
        """The inverse of `to_json`."""
        return cls(MappingProxyType({k: _thaw(v) for k, v in values.items()}))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and scalars, as the ledger keeps them."""
        return {k: _freeze(v) for k, v in self.values_.items()}


def _thaw(value: Any) -> Value:
    if isinstance(value, list):
        return tuple(Header.from_json(v) if isinstance(v, dict) else v for v in value)
    return value


def _freeze(value: Value) -> Any:
    if isinstance(value, tuple):
        return [v.to_json() if isinstance(v, Header) else v for v in value]
    return value


@dataclass(frozen=True, slots=True)
class Instance:
    """One stored SOP Instance."""

    instance_id: str
    """The node's own id: 32 hexadecimal digits; names the file. Never derived from the wire."""
    header: Header
    transfer_syntax_uid: str
    digest: str
    """SHA-256 (hex) of the encoded data set as received, without the Part 10 meta group."""
    path: Path
    calling_ae_title: str
    called_ae_title: str
    peer: str
    association_id: str
    received_at: float
    """Seconds since the epoch."""

    @property
    def sop_class_uid(self) -> str:
        return self.header.text("SOPClassUID")

    @property
    def sop_instance_uid(self) -> str:
        return self.header.text("SOPInstanceUID")

    @property
    def series_instance_uid(self) -> str:
        return self.header.text("SeriesInstanceUID")

    @property
    def study_instance_uid(self) -> str:
        return self.header.text("StudyInstanceUID")

    @property
    def number_of_frames(self) -> int:
        return int(self.header.number("NumberOfFrames") or 1)


@dataclass(frozen=True, slots=True)
class Series:
    """The instances of one Series, newest revision of each SOP Instance UID only, by Instance Number."""

    series_instance_uid: str
    instances: tuple[Instance, ...]

    @property
    def modality(self) -> str:
        return self.instances[0].header.text("Modality")


@dataclass(frozen=True, slots=True)
class Study:
    """One study as it stands at one revision."""

    study_instance_uid: str
    revision: int
    series: tuple[Series, ...]

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(i for s in self.series for i in s.instances)

    @classmethod
    def from_instances(cls, study_instance_uid: str, revision: int, instances: Iterable[Instance]) -> Study:
        """Group by Series Instance UID; order is stable, so the same instances give an equal Study."""
        groups: dict[str, list[Instance]] = {}
        for instance in instances:
            groups.setdefault(instance.series_instance_uid, []).append(instance)
        series = [
            Series(
                uid, tuple(sorted(group, key=lambda i: (i.header.number("InstanceNumber") or 0.0, i.sop_instance_uid)))
            )
            for uid, group in groups.items()
        ]
        series.sort(key=lambda s: (s.instances[0].header.number("SeriesNumber") or 0.0, s.series_instance_uid))
        return cls(study_instance_uid, revision, tuple(series))


OWN_MODEL_NAME = "dicom-node"
"""Manufacturer's Model Name (0008,1090) of everything this node makes, whatever manufacturer the site configured."""


def is_own_output(header: Header) -> bool:
    """True for an object that a dicom-node made (loop guard: PACS -> node -> PACS auto-forward).

    Decided by the data set only. Implementation Class UID (0002,0012) says who *stored the file last*, which is this
    node's own listener for every object received (PS3.10 7.1), so it must not be used.
    """
    if _own_model(header, "ManufacturerModelName") or _own_model(header, "SecondaryCaptureDeviceManufacturerModelName"):
        return True
    equipment = header.items_of("ContributingEquipmentSequence")
    return any(_own_model(item, "ManufacturerModelName") for item in equipment)


def _own_model(header: Header, keyword: str) -> bool:
    return header.text(keyword).strip().casefold() == OWN_MODEL_NAME


def study_to_json(study: Study) -> dict[str, Any]:
    """For the trip to the worker; the inverse of `study_from_json`."""
    instances = [
        {f: getattr(i, f) for f in Instance.__dataclass_fields__ if f not in ("header", "path")}
        | {"header": i.header.to_json(), "path": str(i.path)}
        for i in study.instances
    ]
    return {"study": study.study_instance_uid, "revision": study.revision, "instances": instances}


def study_from_json(value: Mapping[str, Any]) -> Study:
    """Rebuild a Study from `study_to_json`."""
    instances = (
        Instance(**(v | {"header": Header.from_json(v["header"]), "path": Path(v["path"])})) for v in value["instances"]
    )
    return Study.from_instances(value["study"], value["revision"], instances)

"""Data sets in memory as the node sees stored instances: Header, Instance, and a PixelReader over arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from dicom_node.study import Header, Instance


class MemoryReader:
    """A PixelReader over frames that are already decoded: of one instance, or of several by SOP Instance UID."""

    def __init__(self, frames: NDArray[Any] | Mapping[str, NDArray[Any]]) -> None:
        self._frames = frames

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[NDArray[Any]]:
        """As `dicom_node.engine.PixelReader`."""
        whole = self._frames[instance.sop_instance_uid] if isinstance(self._frames, Mapping) else self._frames
        for number in numbers or range(1, len(whole) + 1):
            yield np.asarray(whole[number - 1])


def header_of(ds: Dataset) -> Header:
    """The attributes of a data set without bulk data, as the node sees them."""
    return Header(MappingProxyType(dict(_values(ds))))


def _values(ds: Dataset) -> Iterator[tuple[str, Any]]:
    for element in ds:
        if element.VR in ("OB", "OW", "UN") or element.is_empty:
            continue
        name = element.keyword or f"{int(element.tag):08X}"
        if element.VR == "SQ":
            yield name, tuple(header_of(item) for item in element.value)
        elif isinstance(element.value, MultiValue):
            yield name, tuple(_scalar(v, element.VR) for v in element.value)
        else:
            yield name, _scalar(element.value, element.VR)


def _scalar(value: Any, vr: str) -> str | int | float:
    if vr in ("DS", "FL", "FD"):
        return float(value)
    return int(value) if vr in ("IS", "US", "SS", "UL", "SL") else str(value)


def instance_of(ds: Dataset) -> Instance:
    """An Instance for a data set in memory."""
    return Instance("0" * 32, header_of(ds), str(ds.file_meta.TransferSyntaxUID), "", Path(), "", "", "", "", 0.0)

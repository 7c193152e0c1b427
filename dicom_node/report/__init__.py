"""Report: turns a Result, or a refusal, into DICOM objects as bytes. The sixth stage of the line.

It knows no ledger, no network and no engine; it decodes no pixel data (it reads the headers of the sources and the
arrays the worker spilled). The same input gives the same bytes: every time stamp comes from the job, every UID is
derived (`uids.py`).

    context.py    what a caller passes and gets: ReportContext, Variant, BuiltObject
    sr.py         Comprehensive 3D or Enhanced SR, TID 1500
    capture.py    the heatmap as a Secondary Capture;   picture.py draws its frames, rle.py packs them
    objects.py    what both kinds share;   normalise.py cleans the source's header
    tree.py       an SR as readable text

highdicom and Pillow cost half a second to import, so nothing here imports them before the first object is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicom_node.report.context import BuiltObject, Predecessor, Region, ReportContext, Variant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dicom_node.packages import Task
    from dicom_node.report.picture import Caption
    from dicom_node.result import Finding, Heatmap, Provenance, Refusal, Result
    from dicom_node.study import Instance

__all__ = [
    "BuiltObject",
    "Predecessor",
    "Region",
    "ReportContext",
    "Variant",
    "build",
    "build_not_assessable",
    "caption_of",
    "preload",
    "render_frames",
]


def build(result: Result, sources: Mapping[str, Instance], context: ReportContext) -> tuple[BuiltObject, ...]:
    """Every object that some destination wants of this result, SR first.

    `sources` maps SOP Instance UID to the stored instance and holds at least `result.source_instances`.
    Raises StoreError when a source header or a spooled array cannot be read or is not the one the result names, and
    ReportError when the result cannot be written as DICOM.
    """
    from dicom_node.report import assembly

    return assembly.build(result, sources, context)


def build_not_assessable(
    refusal: Refusal,
    task: Task,
    sources: Mapping[str, Instance],
    context: ReportContext,
    provenance: Provenance | None = None,
) -> tuple[BuiltObject, ...]:
    """The SR "not assessable" with the coded reason and no number, for every SR variant wanted.

    `sources` holds the instances that were looked at, at least one. `provenance` is None when no package was asked.
    """
    from dicom_node.report import assembly

    return assembly.build_not_assessable(refusal, task, sources, context, provenance)


def caption_of(result: Result, finding: Finding) -> Caption:
    """What is printed around the picture of one finding."""
    from dicom_node.report import picture

    return picture.caption_of(result, finding)


def render_frames(
    heatmap: Heatmap, spool: Path, caption: Caption, indices: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """The picture of the chosen frames (0-based; None = all) as RGB (n, height, width, 3), as a capture carries it."""
    from dicom_node.report import picture

    return picture.render_frames(heatmap, spool, caption, indices)


def preload() -> None:
    """Pay the imports and tables now, so that the first report of the day is as fast as the others."""
    from dicom_node.report import assembly, objects

    _: Any = assembly
    objects.load_tables()

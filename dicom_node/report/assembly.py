"""Puts the objects of one report together: reads the sources once, draws once, builds each variant once."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydicom.dataset import Dataset

from dicom_node.errors import ReportError, StoreError
from dicom_node.packages import Task
from dicom_node.report import capture, nomogram, objects, sr, uids
from dicom_node.report.context import BuiltObject, ObjectKind, ReportContext, Variant
from dicom_node.report.normalise import read_reference, read_source
from dicom_node.result import Provenance, Refusal, Result
from dicom_node.study import Instance


@contextmanager
def _as_report_error() -> Iterator[None]:
    """What the DICOM libraries refuse becomes a fault of this job. Says where, not what: a value may name a patient."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RuntimeError) as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise ReportError(f"the objects cannot be built ({type(e).__name__} at {where})") from None


@_as_report_error()
def build(result: Result, sources: Mapping[str, Instance], context: ReportContext) -> tuple[BuiltObject, ...]:
    """Every object that some variant wants of this result, SR first."""
    instances = _needed(result.source_instances, sources)
    headers = _headers(instances, _copied_from(result), context)
    content = {"result": result.to_json() | {"seconds": 0}}
    keys = uids.Uids.of(context, uids.content_digest(content, instances, context))
    built: list[BuiltObject] = []
    for variant in _distinct(context.variants, "sr"):
        document = sr.result_document(result, context, keys)
        made = sr.build_sr(document, list(headers.values()), context, keys, variant)
        built.append(_finish("sr", made, variant))
    wanted = list(_distinct(context.variants, "capture"))
    syntaxes = {i.sop_instance_uid: i.transfer_syntax_uid for i in instances}
    for index, finding in enumerate(result.findings):
        if finding.fusion is not None and wanted:
            figure = nomogram.draw(result, finding, finding.fusion)
            about = capture.Reported(result, finding, index, headers, syntaxes)
            built += [_finish("capture", nomogram.build(about, figure, context, keys, v), v) for v in wanted]
        if finding.heatmap is None or not wanted:
            continue
        subject = capture.Subject(result, finding, index, headers, syntaxes, finding.heatmap)
        frames = capture.draw(result, finding, finding.heatmap, context)
        for variant in wanted:
            captures = capture.build_captures(subject, frames, context, keys, variant)
            built += [_finish("capture", made, variant) for made in captures]
    return tuple(built)


@_as_report_error()
def build_not_assessable(
    refusal: Refusal,
    task: Task,
    sources: Mapping[str, Instance],
    context: ReportContext,
    provenance: Provenance | None,
) -> tuple[BuiltObject, ...]:
    """The SR without a number, for every SR variant wanted."""
    instances = list(sources.values())
    if not instances:
        raise ReportError("a report needs at least one source instance: it says whose patient and study it is")
    headers = list(_headers(instances, {instances[0].sop_instance_uid}, context).values())
    content = {"refusal": [refusal.code, task.task, provenance.package_digest if provenance else ""]}
    keys = uids.Uids.of(context, uids.content_digest(content, instances, context))
    built = []
    for variant in _distinct(context.variants, "sr"):
        document = sr.refusal_document(
            refusal,
            task.series_description,
            sr.TaskConcepts.of(task),
            headers,
            provenance,
            keys.tracking(task.task, "Study"),
        )
        built.append(_finish("sr", sr.build_sr(document, headers, context, keys, variant), variant))
    return tuple(built)


def _needed(wanted: Iterable[str], sources: Mapping[str, Instance]) -> list[Instance]:
    try:
        return [sources[uid] for uid in wanted]
    except KeyError:
        raise StoreError("a source instance of the result is no longer stored") from None


def _copied_from(result: Result) -> set[str]:
    """The instances whose patient, study and equipment some object carries: the first of the result, and of each of
    its series."""
    first = {result.source_instances[0], *(f.sources[0].sop_instance_uid for f in result.findings if f.sources)}
    return first | {f.heatmap.frame_refs[0].sop_instance_uid for f in result.findings if f.heatmap is not None}


def _headers(instances: Iterable[Instance], whole: set[str], context: ReportContext) -> dict[str, Dataset]:
    """Of the others a report says no more than which image it is, how large, and where it lies."""
    return {
        i.sop_instance_uid: read_source(i.path, context.fallback_charset)
        if i.sop_instance_uid in whole
        else read_reference(i.path)
        for i in instances
    }


def _distinct(variants: Iterable[Variant], kind: ObjectKind) -> Iterator[Variant]:
    """One variant for each name: two destinations that want the same get the same object."""
    seen: dict[str, Variant] = {v.name(kind): v for v in reversed(list(variants)) if kind in v.objects}
    yield from reversed(seen.values())


def _finish(kind: ObjectKind, made: Dataset, variant: Variant) -> BuiltObject:
    data = objects.encode(made, variant.charset)
    return BuiltObject(
        kind=kind,
        variant=variant.name(kind),
        sop_class_uid=str(made.SOPClassUID),
        sop_instance_uid=str(made.SOPInstanceUID),
        series_instance_uid=str(made.SeriesInstanceUID),
        transfer_syntax_uid=str(made.file_meta.TransferSyntaxUID),
        data=data,
        fits=str(made.SpecificCharacterSet) == variant.charset,
    )

"""The Structured Report: Comprehensive 3D or Enhanced SR, TID 1500 "Measurement Report" (PS3.16).

One measurement group for each finding: TID 1410 where every finding has a region, else TID 1501, never both in one
document (both bear the concept 125007, and validators take one for the other). The *finding* is what was looked at,
never the diagnosis; what the model says is a probability (NUM, unit "no units") and a coded category beside it.

A document is COMPLETE (all that the node has to say on this input), PRELIMINARY and UNVERIFIED: no person has seen it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.uid import (
    Comprehensive3DSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
)

from dicom_node.packages import Task
from dicom_node.report import codes, objects
from dicom_node.report.context import Predecessor, Region, ReportContext, Variant
from dicom_node.report.library import evidence, image_library
from dicom_node.report.uids import Uids
from dicom_node.report.wording import mark_of, series_description
from dicom_node.result import ClinicalInput, Code, Finding, FrameRef, Provenance, Refusal, Result, Score

SOP_CLASS: Final = {"comprehensive3d": str(Comprehensive3DSRStorage), "enhanced": str(EnhancedSRStorage)}
_CONTAINS = hd.sr.RelationshipTypeValues.CONTAINS


@dataclass(frozen=True, slots=True)
class Document:
    """What one SR says, whatever its SOP Class and character set."""

    groups: Sequence[Any]
    title: str
    intended_use: str
    software: str


@dataclass(frozen=True, slots=True)
class TaskConcepts:
    """What a task looks at, where there is no finding to say it."""

    finding: Code
    site: Code
    category_name: Code

    @classmethod
    def of(cls, task: Task) -> TaskConcepts:
        entries = (task.finding, task.site, task.categories.name)
        return cls(*(Code(e.value, e.scheme, e.meaning) for e in entries))


def result_document(result: Result, context: ReportContext, uids: Uids) -> Document:
    """The measurement groups of a result."""
    algorithm = _algorithm(result)
    planar = all(f.tracking_identifier in context.regions for f in result.findings)
    groups = []
    for finding in result.findings:
        region = context.regions[finding.tracking_identifier] if planar else None
        uid = uids.tracking(result.provenance.task, finding.tracking_identifier)
        groups.append(_group(finding, region, algorithm, uid, result.provenance.intended_use))
    if not planar:
        groups += [_clinical_group(value, result, uids) for value in result.clinical]
    software = f"{result.provenance.task} {result.provenance.package_version}"[:64]
    return Document(groups, result.title, result.provenance.intended_use, software)


def refusal_document(
    refusal: Refusal,
    title: str,
    concepts: TaskConcepts,
    sources: Iterable[Dataset],
    provenance: Provenance | None,
    tracking_uid: str,
) -> Document:
    """A group without a measurement: not assessable, and why. `Refusal.detail` may hold figures, so it stays out."""
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=tracking_uid, identifier="Study"),
        finding_type=_concept(concepts.finding),
        finding_sites=[hd.sr.FindingSite(_concept(concepts.site))],
        algorithm_id=None if provenance is None else _algorithm_identification(provenance, ()),
        qualitative_evaluations=[
            hd.sr.QualitativeEvaluation(_concept(concepts.category_name), _concept(codes.NOT_ASSESSABLE)),
            hd.sr.QualitativeEvaluation(_concept(codes.REFUSAL_REASON), _concept(codes.refusal_code(refusal.code))),
        ],
        source_images=[hd.sr.SourceImageForMeasurementGroup(s.SOPClassUID, s.SOPInstanceUID) for s in sources],
    )
    intended_use = "research" if provenance is None else provenance.intended_use
    _comment(group, refusal.code.sentence)
    _comment(group, mark_of(intended_use))
    software = "" if provenance is None else f"{provenance.task} {provenance.package_version}"[:64]
    return Document([group], title, intended_use, software)


def build_sr(
    document: Document, sources: Sequence[Dataset], context: ReportContext, uids: Uids, variant: Variant
) -> Dataset:
    """The data set of one variant. `sources` are normalised headers, the first gives patient and study."""
    name = variant.name("sr")
    identity = objects.Identity(
        sop_class_uid=SOP_CLASS[variant.sr],
        sop_instance_uid=uids.instance("sr", name),
        series_instance_uid=uids.series("sr", name),
        modality="SR",
        series_number=context.config.series_number,
        instance_number=1,
        series_description=series_description(document.title, document.intended_use),
    )
    made = objects.new_object(identity, sources[0], context, uids, str(ExplicitVRLittleEndian), document.software)
    made.CodingSchemeIdentificationSequence = [objects.private_scheme()]
    made.CompletionFlag, made.VerificationFlag, made.PreliminaryFlag = "COMPLETE", "UNVERIFIED", "PRELIMINARY"
    made.ReferencedPerformedProcedureStepSequence = []
    made.PerformedProcedureCodeSequence = sources[0].get("ProcedureCodeSequence") or []
    requests = list(_requests(sources[0], context.study_instance_uid))
    if requests:
        made.ReferencedRequestSequence = requests
    previous = [p for p in context.predecessors if p.variant == name]
    if previous:
        made.PredecessorDocumentsSequence = [_predecessors(previous, context.study_instance_uid)]
    content = _content(document, sources, context, uids)
    for element in content:
        made.add(element)
    if same_study := evidence(sources, content, context.study_instance_uid):
        made.CurrentRequestedProcedureEvidenceSequence = same_study
    return made


def _content(document: Document, sources: Sequence[Dataset], context: ReportContext, uids: Uids) -> Dataset:
    """TID 1500 from its root. The image library (TID 1600) is ours."""
    language = context.config.language
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                standard.DCM.Device,
                hd.sr.DeviceObserverIdentifyingAttributes(
                    uid=uids.device(),
                    name=context.config.station_name,
                    manufacturer_name=context.config.manufacturer,
                    model_name=objects.MODEL_NAME,
                    serial_number=uids.device_serial_number(),
                ),
            )
        ),
        procedure_reported=_concept(codes.IMAGING_PROCEDURE),
        imaging_measurements=document.groups,
        language_of_content_item_and_descendants=hd.sr.LanguageOfContentItemAndDescendants(
            hd.sr.CodedConcept(language, "RFC5646", codes.LANGUAGES.get(language, language))
        ),
    )
    root: Dataset = report[0]
    library = image_library(sources)
    if library is not None:
        before_measurements = len(root.ContentSequence) - 1
        root.ContentSequence.insert(before_measurements, library)
    return root


def _group(
    finding: Finding,
    region: Region | None,
    algorithm: hd.sr.AlgorithmIdentification,
    tracking_uid: str,
    intended_use: str,
) -> Any:
    """TID 1410 with a region, TID 1501 without."""
    said: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=tracking_uid, identifier=finding.tracking_identifier),
        "finding_type": _concept(finding.finding),
        "finding_sites": [
            hd.sr.FindingSite(_concept(finding.site), finding.laterality and _concept(finding.laterality))
        ],
        "algorithm_id": algorithm,
        "measurements": [
            hd.sr.Measurement(
                name=_concept(score.outcome), value=round(score.probability, 4), unit=_concept(codes.NO_UNITS)
            )
            for score in finding.scores
        ],
        "qualitative_evaluations": [
            hd.sr.QualitativeEvaluation(_concept(finding.category_name), _concept(finding.category))
        ],
    }
    group: Any
    if region is None:
        group = hd.sr.MeasurementsAndQualitativeEvaluations(**said, source_images=_source_images(finding.sources))
    else:
        group = hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(**said, referenced_region=_image_region(region))
    for note in (*map(_interval, finding.scores), *finding.notes):
        _comment(group, note)
    if finding.laterality_note:
        _comment(group, f"Side not established: {finding.laterality_note}")
    _comment(group, mark_of(intended_use))
    return group


def _interval(score: Score) -> str:
    """In words: as measurement uncertainty (TID 310, CID 225) it is correct, but PixelMed takes it for an inference."""
    if score.low is None or score.high is None:
        return ""
    return f"{score.outcome.meaning}: 95 % interval {score.low:.4f} to {score.high:.4f}"


def _clinical_group(value: ClinicalInput, result: Result, uids: Uids) -> Any:
    """A clinical value that was known, in a group of its own (TID 1501): the algorithm of the findings did not make it.

    Beside findings with a region there is no such group, as a document has groups of one kind; there the value stands
    in the algorithm's parameters alone.
    """
    side = next((code for code, letter in codes.LATERALITY_VALUE.items() if letter == value.laterality), None)
    site = result.findings[0].site if side else None
    number = hd.sr.Measurement(
        name=_concept(value.code),
        value=value.value,
        unit=hd.sr.CodedConcept(value.unit, "UCUM", value.unit),
    )
    if value.time:
        form = "%Y%m%d%H%M%S%z" if "T" in value.time else "%Y%m%d"  # no more than the source says (PS3.5 6.2, DT)
        number[0].ObservationDateTime = datetime.fromisoformat(value.time).strftime(form)
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=uids.tracking(result.provenance.task, f"clinical {value.key}"), identifier=f"Clinical value {value.key}"
        ),
        finding_sites=[hd.sr.FindingSite(_concept(site), _concept(side))] if site and side else None,
        measurements=[number],
    )
    _comment(group, f"Input of the model, not made by it. Source: {value.source}")
    return group


def _comment(group: Any, text: str) -> None:
    """TID 1501 and 1410 allow text beside the coded evaluations; a display shows it with the group's number."""
    if text:
        group[0].ContentSequence.append(
            hd.sr.TextContentItem(_concept(codes.COMMENT), value=text, relationship_type=_CONTAINS)
        )


def _source_images(references: Iterable[FrameRef]) -> list[hd.sr.SourceImageForMeasurementGroup]:
    """One IMAGE item for each instance; frame numbers only where not all frames were used (PS3.3 C.18.4)."""
    by_instance: dict[str, list[FrameRef]] = defaultdict(list)
    for reference in references:
        by_instance[reference.sop_instance_uid].append(reference)
    return [
        hd.sr.SourceImageForMeasurementGroup(
            group[0].sop_class_uid, uid, referenced_frame_numbers=objects.frame_numbers(group)
        )
        for uid, group in by_instance.items()
    ]


def _image_region(region: Region) -> hd.sr.ImageRegion:
    points = region.points if region.points[0] == region.points[-1] else (*region.points, region.points[0])
    frame = region.frame
    return hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array(points, np.float32),
        source_image=hd.sr.SourceImageForRegion(
            frame.sop_class_uid,
            frame.sop_instance_uid,
            referenced_frame_numbers=objects.frame_numbers([frame]),
        ),
    )


def _algorithm(result: Result) -> hd.sr.AlgorithmIdentification:
    """TID 4019. The parameters say enough to repeat the result."""
    intervals = (
        f"{f.tracking_identifier}: interval of {s.outcome.value}: {s.low:.4f} to {s.high:.4f} (95 %)"
        for f in result.findings
        for s in f.scores
        if s.low is not None and s.high is not None
    )
    clinical = map(_clinical_parameter, result.clinical)
    own = (f"{name}: {value}" for name, value in result.provenance.parameters.items())
    return _algorithm_identification(result.provenance, (f"route: {result.route}", *own, *intervals, *clinical))


def _algorithm_identification(provenance: Provenance, more: Iterable[str]) -> hd.sr.AlgorithmIdentification:
    fixed = {
        "task": provenance.task,
        "package digest": f"sha256:{provenance.package_digest}",
        "backend": provenance.backend,
        "precision": provenance.precision,
        "intended use": provenance.intended_use,
    }
    return hd.sr.AlgorithmIdentification(
        name=provenance.algorithm_name,
        version=provenance.package_version,
        parameters=[*(f"{name}: {value}" for name, value in fixed.items() if value), *more],
        family=standard.cid7162.ArtificialIntelligence,
    )


def _clinical_parameter(value: ClinicalInput) -> str:
    when = f", of {value.time}" if value.time else ""
    return f"clinical input {value.key}: {value.value:g} {value.unit}{when}, source {value.source}"


def _requests(source: Dataset, study_instance_uid: str) -> Iterable[Dataset]:
    """Referenced Request Sequence (PS3.3 C.17.2) from the request attributes the modality wrote."""
    requests = source.get("RequestAttributesSequence") or []
    for request in requests or ([source] if source.get("AccessionNumber") else []):
        item = Dataset()
        item.StudyInstanceUID = request.get("StudyInstanceUID") or study_instance_uid
        item.ReferencedStudySequence = []
        for keyword in ("AccessionNumber", "RequestedProcedureDescription", "RequestedProcedureID"):
            setattr(item, keyword, None)
            found = request if request.get(keyword) else source
            if found.get(keyword):
                item[keyword] = found[keyword]
        item.RequestedProcedureCodeSequence = request.get("RequestedProcedureCodeSequence") or []
        item.PlacerOrderNumberImagingServiceRequest = item.FillerOrderNumberImagingServiceRequest = None
        yield item


def _predecessors(previous: Iterable[Predecessor], study_instance_uid: str) -> Dataset:
    study = Dataset()
    study.StudyInstanceUID = study_instance_uid
    study.ReferencedSeriesSequence = []
    for p in previous:
        series, document = Dataset(), Dataset()
        series.SeriesInstanceUID = p.series_instance_uid
        document.ReferencedSOPClassUID, document.ReferencedSOPInstanceUID = p.sop_class_uid, p.sop_instance_uid
        series.ReferencedSOPSequence = [document]
        study.ReferencedSeriesSequence.append(series)
    return study


def _concept(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)

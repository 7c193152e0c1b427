"""Images and region objects as other software writes them: highdicom (SEG, SR), pydicom by hand for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dicom_node.store.header import read_header
from dicom_node.study import Instance, Study

US, US_MULTI, MR = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.4"


class Files:
    """One study on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study_uid = generate_uid()
        self.frame_uid = generate_uid()
        self._count = 0
        self.instances: list[Instance] = []

    @property
    def study(self) -> Study:
        return Study.from_instances(self.study_uid, 1, self.instances)

    def add(self, dataset: Dataset) -> Instance:
        """Write it, and read its header as the node does."""
        self._count += 1
        path = self.folder / f"{self._count}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        header = read_header(path)
        syntax = str(dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID)
        instance = Instance(f"{self._count:032x}", header, syntax, "0" * 64, path, "A", "B", "", "", 0.0)
        self.instances.append(instance)
        return instance

    def blank(self, sop_class: str, modality: str, series_uid: str | None = None, **values: Any) -> Dataset:
        """A data set of this study with what every object has."""
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self.study_uid, series_uid or generate_uid()
        ds.Modality, ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = (
            modality,
            "T",
            "Test^Region",
            "",
            "O",
        )
        ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", ""
        ds.StudyDate, ds.StudyTime, ds.SeriesNumber, ds.InstanceNumber = "20260101", "120000", 1, 1
        ds.ContentDate, ds.ContentTime, ds.Manufacturer = "20260101", "120000", "Test"
        for key, value in values.items():
            setattr(ds, key, value)
        return ds

    def ultrasound(self, rows: int = 40, columns: int = 50, frames: int = 1, **values: Any) -> Dataset:
        """A still, or a cine of more frames; no place in the patient."""
        ds = self.blank(US_MULTI if frames > 1 else US, "US")
        _pixels(ds, np.zeros((frames, rows, columns), np.uint8))
        if frames > 1:
            ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = frames, 40.0, 0x00181063
        for key, value in values.items():
            setattr(ds, key, value)
        self.add(ds)
        return ds

    def mr(self, depth: int, rows: int, columns: int, affine: NDArray[np.float64], frame: str = "") -> list[Dataset]:
        """Classic slices of one series."""
        series = generate_uid()
        slices = []
        for k in range(depth):
            ds = self.blank(MR, "MR", series, InstanceNumber=k + 1)
            _pixels(ds, np.zeros((1, rows, columns), np.uint16))
            step = [np.linalg.norm(affine[:3, i]) for i in range(3)]
            ds.PixelSpacing, ds.SliceThickness = [float(step[1]), float(step[0])], float(step[2])
            axes = np.concatenate([affine[:3, 0] / step[0], affine[:3, 1] / step[1]])
            ds.ImageOrientationPatient = [round(float(v), 8) for v in axes]
            ds.ImagePositionPatient = [round(float(v), 6) for v in affine[:3, 3] + k * affine[:3, 2]]
            ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = frame or self.frame_uid, ""
            self.add(ds)
            slices.append(ds)
        return slices

    def seg(
        self, sources: list[Dataset], mask: NDArray[Any], descriptions: list[hd.seg.SegmentDescription] | None = None,
        kind: str = "BINARY", when: str = "", series: str | None = None, add: bool = True, **options: Any,
    ) -> Dataset:  # fmt: skip
        """As highdicom writes it. `mask`: (frames, rows, columns[, segments])."""
        count = mask.shape[3] if mask.ndim == 4 else 1
        ds: Dataset = hd.seg.Segmentation(
            source_images=sources, pixel_array=mask.copy(), segmentation_type=kind,
            segment_descriptions=descriptions or [describe(n) for n in range(1, count + 1)],
            series_instance_uid=series or generate_uid(), series_number=50, sop_instance_uid=generate_uid(),
            instance_number=1, manufacturer="Test", manufacturer_model_name="Test", software_versions="1",
            device_serial_number="1", **options,
        )  # fmt: skip
        if when:
            ds.ContentDate, ds.ContentTime = when[:8], when[8:]
        if add:
            self.add(ds)
        return ds

    def plain_seg(
        self, rasters: list[tuple[int, NDArray[Any], dict[str, Any]]], labels: list[str], kind: str = "BINARY",
        when: str = "20260101130000", maximum: int = 255, **values: Any,
    ) -> Dataset:  # fmt: skip
        """By hand, as converters write it: each raster is (segment number, mask, what its functional group says)."""
        ds = self.blank("1.2.840.10008.5.1.4.1.1.66.4", "SEG", ImageType=["DERIVED", "PRIMARY"])
        ds.ContentDate, ds.ContentTime = when[:8], when[8:]
        ds.SegmentationType, ds.NumberOfFrames = kind, len(rasters)
        frames = np.stack([mask for _, mask, _ in rasters]).astype(np.uint8)
        _pixels(ds, frames)
        if kind == "BINARY":
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
            packed = np.packbits(frames.reshape(-1), bitorder="little").tobytes()
            ds.PixelData = packed + b"\0" * (len(packed) % 2)
        elif kind == "FRACTIONAL":
            ds.SegmentationFractionalType, ds.MaximumFractionalValue = "PROBABILITY", maximum
        ds["PixelData"].VR = "OB"
        ds.SegmentSequence = [item(SegmentNumber=n, SegmentLabel=label) for n, label in enumerate(labels, start=1)]
        ds.SharedFunctionalGroupsSequence = [Dataset()]
        ds.PerFrameFunctionalGroupsSequence = [
            item(SegmentIdentificationSequence=[item(ReferencedSegmentNumber=n)], **group) for n, _, group in rasters
        ]
        for key, value in values.items():
            setattr(ds, key, value)
        self.add(ds)
        return ds


def item(**values: Any) -> Dataset:
    """An item of a sequence."""
    ds = Dataset()
    for key, value in values.items():
        setattr(ds, key, value)
    return ds


def reference(source: Dataset, frames: int | list[int] | None = None) -> Dataset:
    """An item of a Referenced Image Sequence."""
    ds = item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    if frames is not None:
        ds.ReferencedFrameNumber = frames
    return ds


def derived(source: Dataset, frames: int | list[int] | None = None) -> dict[str, Any]:
    """The Derivation Image functional group."""
    return {"DerivationImageSequence": [item(SourceImageSequence=[reference(source, frames)])]}


def describe(number: int, label: str = "", tracking: str | None = None, **options: Any) -> hd.seg.SegmentDescription:
    """One segment: a lesion drawn by hand."""
    return hd.seg.SegmentDescription(
        number, label or f"Lesion {number}", options.pop("category", codes.SCT.MorphologicallyAbnormalStructure),
        codes.SCT.Lesion, "MANUAL", tracking_uid=tracking, tracking_id="x" if tracking else None, **options,
    )  # fmt: skip


def _pixels(ds: Dataset, frames: NDArray[Any]) -> None:
    bits = 8 * frames.dtype.itemsize
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows, ds.Columns = frames.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelData = frames.tobytes()


def rtstruct(
    files: Files, rois: list[tuple[str, list[NDArray[Any]]]], images: list[Dataset] = [], frame: str = "",  # noqa: B006
    when: str = "20260101130000", kind: str = "CLOSED_PLANAR", interpreted: str = "GTV",
) -> Dataset:  # fmt: skip
    """Each ROI: name and contours in mm, as treatment planning writes them."""
    ds = files.blank("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", StructureSetLabel="A")
    ds.StructureSetDate, ds.StructureSetTime = when[:8], when[8:]
    ds.StructureSetROISequence = [
        item(ROINumber=n, ROIName=name, ReferencedFrameOfReferenceUID=frame or files.frame_uid)
        for n, (name, _) in enumerate(rois, start=1)
    ]
    ds.ROIContourSequence = [
        item(ReferencedROINumber=n, ContourSequence=[_contour(c, kind, images) for c in contours])
        for n, (_, contours) in enumerate(rois, start=1)
    ]
    ds.RTROIObservationsSequence = [
        item(ObservationNumber=n, ReferencedROINumber=n, RTROIInterpretedType=interpreted, ROIInterpreter="")
        for n in range(1, len(rois) + 1)
    ]
    files.add(ds)
    return ds


def _contour(points: NDArray[Any], kind: str, images: list[Dataset]) -> Dataset:
    ds = item(
        ContourGeometricType=kind, NumberOfContourPoints=len(points),
        ContourData=[f"{v:.4f}" for v in np.asarray(points).reshape(-1)],
    )  # fmt: skip
    if images:
        ds.ContourImageSequence = [reference(i) for i in images]
    return ds


def gsps(
    files: Files, annotations: list[Dataset], images: list[Dataset], when: str = "20260101130000", **values: Any
) -> Dataset:
    """A greyscale presentation state."""
    ds = files.blank("1.2.840.10008.5.1.4.1.1.11.1", "PR", ContentLabel="ROI")
    ds.PresentationCreationDate, ds.PresentationCreationTime = when[:8], when[8:]
    ds.ReferencedSeriesSequence = [
        item(SeriesInstanceUID=images[0].SeriesInstanceUID, ReferencedImageSequence=[reference(i) for i in images])
    ]
    ds.GraphicAnnotationSequence = annotations
    for key, value in values.items():
        setattr(ds, key, value)
    files.add(ds)
    return ds


def annotation(graphics: list[Dataset], on: list[Dataset] | None = None, layer: str = "ROI") -> Dataset:
    """An item of the Graphic Annotation Sequence."""
    ds = item(GraphicLayer=layer, GraphicObjectSequence=graphics)
    if on is not None:
        ds.ReferencedImageSequence = on
    return ds


def graphic(shape: str, points: NDArray[Any] | list[list[float]], units: str = "PIXEL", **values: Any) -> Dataset:
    """An item of the Graphic Object Sequence."""
    data = np.asarray(points, dtype=np.float32)
    return item(
        GraphicAnnotationUnits=units, GraphicDimensions=2, NumberOfGraphicPoints=len(data), GraphicType=shape,
        GraphicData=[float(v) for v in data.reshape(-1)], GraphicFilled="N", **values,
    )  # fmt: skip


def report(files: Files, content: list[Dataset], when: str = "20260101130000", **values: Any) -> Dataset:
    """A Comprehensive 3D SR around content items."""
    ds = files.blank("1.2.840.10008.5.1.4.1.1.88.34", "SR", ValueType="CONTAINER", ContinuityOfContent="SEPARATE")
    ds.ContentDate, ds.ContentTime = when[:8], when[8:]
    ds.ConceptNameCodeSequence = [coded("126000", "DCM", "Imaging Measurement Report")]
    ds.CompletionFlag, ds.VerificationFlag, ds.ContentSequence = "COMPLETE", "UNVERIFIED", content
    for key, value in values.items():
        setattr(ds, key, value)
    files.add(ds)
    return ds


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence."""
    return item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def scoord(shape: str, points: NDArray[Any] | list[list[float]], on: Dataset) -> Dataset:
    """An SCOORD selected from one image reference."""
    image = item(RelationshipType="SELECTED FROM", ValueType="IMAGE", ReferencedSOPSequence=[on])
    return item(
        RelationshipType="CONTAINS", ValueType="SCOORD", GraphicType=shape, ContentSequence=[image],
        ConceptNameCodeSequence=[coded("111030", "DCM", "Image Region")],
        GraphicData=[float(v) for v in np.asarray(points, dtype=np.float32).reshape(-1)],
    )  # fmt: skip

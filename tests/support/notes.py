"""Key Object Selection documents and small images, as files, made with pydicom and highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

US = "1.2.840.10008.5.1.4.1.1.6.1"


def image(path: Path, study: str, series: str, number: int = 1, **changes: object) -> Dataset:
    """An ultrasound image of 8 x 8, complete enough for any Storage SCP."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = US
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber, ds.SeriesNumber = study, series, number, 1
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Test^Gate", "GATE-1", "19700101", "M"
    ds.AccessionNumber, ds.StudyID, ds.StudyDate, ds.StudyTime = "ACC-1", "1", "20260101", "101500"
    ds.ReferringPhysicianName, ds.Modality, ds.Manufacturer = "", "US", "Test"
    ds.StudyDescription = "US kidney, renal mass"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", 8, 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = bytes(range(64))
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return ds


def rejection_note(path: Path, images: Sequence[Dataset], code: str = "113001", meaning: str = "Rejected") -> Dataset:
    """A rejection note by highdicom (TID 2010), in the study of the images."""
    from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
    from highdicom.sr.coding import CodedConcept

    title = CodedConcept(*Code(code, "DCM", meaning)[:3])
    document = KeyObjectSelectionDocument(
        evidence=list(images),
        content=KeyObjectSelection(document_title=title, referenced_objects=list(images)),
        series_instance_uid=generate_uid(),
        series_number=900,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Test PACS",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    document.save_as(path, enforce_file_format=True)
    return pydicom.dcmread(path)

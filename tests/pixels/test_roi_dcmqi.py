"""Segmentations as 3D Slicer writes them: dcmqi's itkimage2segimage, where it is installed (`pip install dcmqi`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from roi_files import Files

from dicom_node.pixels import roi
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal

WRITER = shutil.which("itkimage2segimage") or shutil.which("itkimage2segimage", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(WRITER is None, reason="dcmqi (itkimage2segimage) is not installed")


def code(value: str, meaning: str) -> dict[str, str]:
    return {"CodeValue": value, "CodingSchemeDesignator": "SCT", "CodeMeaning": meaning}


def segment(number: int, category: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "labelID": number, "SegmentLabel": f"Segment_{number}", "SegmentDescription": "x", "recommendedDisplayRGBValue":
        [255, 0, 0], "SegmentAlgorithmType": "MANUAL", "SegmentedPropertyCategoryCodeSequence": category,
        "SegmentedPropertyTypeCodeSequence": code("4147007", "Mass"), **more,
    }  # fmt: skip


def nrrd(labels: NDArray[np.uint8], affine: NDArray[np.float64]) -> bytes:
    """What Slicer hands to the writer."""
    vectors = ["(" + ",".join(repr(float(v)) for v in affine[:3, i]) + ")" for i in range(4)]
    head = [
        "NRRD0004", "type: uint8", "dimension: 3", "space: left-posterior-superior",
        "sizes: " + " ".join(str(n) for n in labels.shape[::-1]), "space directions: " + " ".join(vectors[:3]),
        "kinds: domain domain domain", "endian: little", "encoding: raw", f"space origin: {vectors[3]}", "", "",
    ]  # fmt: skip
    return "\n".join(head).encode() + labels.tobytes()


@pytest.mark.parametrize("all_frames", [True, False])
def test_the_stack_gets_its_segments_back(tmp_path: Path, all_frames: bool) -> None:
    files = Files(tmp_path)
    affine = np.array([[0.0, 0.9, 2.0, -12.5], [1.2, 0.0, 0.0, 30.0], [0.0, -1.2, 1.5, 4.0], [0, 0, 0, 1]])
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) * 2.5
    shape = (6, 24, 28)
    slices = files.mr(*shape, affine)
    labels = np.random.default_rng(5).integers(0, 3, shape, dtype=np.uint8)
    labels[0] = 0
    side = code("24028007", "Right")
    meta = {
        "ContentCreatorName": "Test^A", "SeriesDescription": "Segmentation", "SeriesNumber": "300",
        "InstanceNumber": "1", "segmentAttributes": [[
            segment(1, code("49755003", "Morphologically Altered Structure"),
                    AnatomicRegionSequence=code("10200004", "Liver"), AnatomicRegionModifierSequence=side),
            segment(2, code("85756007", "Tissue")),
        ]],
    }  # fmt: skip
    (tmp_path / "labels.nrrd").write_bytes(nrrd(labels, affine))
    (tmp_path / "meta.json").write_text(json.dumps(meta), "utf-8")
    assert WRITER is not None
    subprocess.run(
        [WRITER, "--inputImageList", "labels.nrrd", "--inputMetadata", "meta.json", "--outputDICOM", "seg.dcm",
         "--inputDICOMList", ",".join(str(i.path) for i in files.instances), *([] if all_frames else ["--skip"])],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    files.add(dcmread(tmp_path / "seg.dcm"))
    uids = frozenset(str(s.SOPInstanceUID) for s in slices)
    found = roi.volume_rois(files.study, uids, shape, affine, files.frame_uid, PixelDecoder())
    assert not isinstance(found, Refusal)
    assert [(r.number, r.laterality, r.structure) for r in found] == [(1, "R", "lesion"), (2, "", "organ")]
    for one in found:
        assert np.array_equal(one.mask, labels == one.number)

"""Our objects before independent judges: dicom3tools, DCMTK and PixelMed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.report import Region, Variant
from dicom_node.report.normalise import TYPE_2
from dicom_node.result import ClinicalInput, Code, FrameRef, Refusal, RefusalCode, Score

OUTCOME = Code("PROB-HIGHGRADE", "99INFER", "Probability of high nuclear grade")
CLINICAL = (
    ClinicalInput("FSH", Code("15067-2", "LN", "Follitropin"), 12.5, "[IU]/L", "2026-01-02T08:30:00", "DICOM SR"),
    ClinicalInput("VOLUME", Code("118565006", "SCT", "Volume"), 9.25, "mL", "", "DICOM SR", "L"),
    ClinicalInput("AGE", Code("30525-0", "LN", "Age"), 34, "a", "", "Patient's Age"),
)
THYROID = Code("69748006", "SCT", "Thyroid")
NEW, OLD = Variant(), Variant(sr="enhanced", capture="keyframes")
Judge = Callable[[Path], list[str]]


def every_document(case: Any) -> list[Path]:
    """Both SOP Classes, with and without a region or clinical values, and the one without a result."""
    frame = FrameRef(case.first.sop_class_uid, case.first.sop_instance_uid, 3, 12)
    regions = {"Lesion 1": Region(frame, ((10.0, 20.0), (30.0, 20.0), (30.0, 40.5)))}
    documents = [case.only("sr"), case.only("sr", sr="enhanced"), case.build(regions=regions)[0]]
    case.clinical, case.notes = CLINICAL, ("fusion not computed: EDV (right) missing",)
    case.scores = (Score(OUTCOME, 0.8, 0.65, 0.9), Score(OUTCOME._replace(value="PROB-IMAGE"), 0.55))
    documents += [case.only("sr"), case.only("sr", sr="enhanced"), case.build(regions=regions)[0]]
    documents.append(case.not_assessable(Refusal(RefusalCode.OUT_OF_DISTRIBUTION)))
    documents.append(case.not_assessable(Refusal(RefusalCode.NO_SUITABLE_IMAGE), provenance=False))
    return [case.save(d) for d in documents]


@pytest.mark.parametrize("use", ["demonstration", "research", "clinical"])
def test_dciodvfy_finds_no_error_in_any_object(case: Any, dciodvfy: Judge, use: str) -> None:
    case.intended_use = use
    for path in every_document(case):
        assert dciodvfy(path) == []
    for built in (case.only("capture"), case.only("capture", capture="keyframes")):
        assert dciodvfy(case.save(built)) == []


def test_dciodvfy_finds_no_error_in_a_plain_capture(
    case: Any, dciodvfy: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.report.rle.encode", lambda frame: bytes(frame.nbytes))
    built = case.only("capture")
    assert built.transfer_syntax_uid == "1.2.840.10008.1.2.1"
    assert dciodvfy(case.save(built)) == []


@pytest.mark.parametrize("kind", ["multiframe", "keyframes"])
@pytest.mark.parametrize(
    ("site", "side", "warnings"),
    [
        (None, Code("7771000", "SCT", "Left"), 0),
        (None, Code("51440002", "SCT", "Bilateral"), 0),
        (THYROID, None, 0),
        (None, None, 1),
    ],
)
def test_dciodvfy_accepts_every_side(
    case: Any, dciodvfy: Judge, kind: str, site: Code | None, side: Code | None, warnings: int
) -> None:
    """An empty Laterality, the honest "unknown" of a paired organ, draws a warning and no error."""
    case.site, case.laterality = site or case.site, side
    said = dciodvfy(case.save(case.only("capture", capture=kind)))
    assert len(said) == warnings and not [line for line in said if line.startswith("Error")]


def test_dciodvfy_accepts_what_is_made_of_a_poor_header(empty_case: Any, clip: Any, dciodvfy: Judge) -> None:
    empty_case.add(clip(**dict.fromkeys(TYPE_2)), big_endian=True)
    for built in empty_case.build(variants=(NEW, OLD)):
        said = dciodvfy(empty_case.save(built))
        assert not [line for line in said if line.startswith("Error")]
        assert all("DICOMDIR" in line or "DirectoryRecord" in line for line in said), said


def test_dciodvfy_finds_no_error_of_ours_in_what_is_made_of_real_files(
    empty_case: Any, dciodvfy: Judge, shared_data: Path
) -> None:
    """Whatever a scanner wrote, only its own illegal UIDs remain: those cannot be mended without losing the study."""
    empty_case.frames = 1
    files = [*sorted((shared_data / "us").glob("*.dcm")), *sorted((shared_data / "mr").glob("*.dcm"))]
    assert len(files) > 10
    for path in files:
        empty_case.sources.clear()
        empty_case.add_file(path)
        for built in empty_case.build():
            errors = [line for line in dciodvfy(empty_case.save(built)) if line.startswith("Error")]
            assert all("InstanceUID" in line for line in errors), (path.name, built.kind, errors)


def test_dcentvfy_finds_the_same_patient_and_study(case: Any, tool: Any) -> None:
    built = [case.save(b) for b in case.build(variants=(NEW, OLD))]
    done = tool("dcentvfy", case.first.path, *built)
    assert done.returncode == 0 and "Error" not in done.stderr
    # Accession Number stands in the SR's request items too, which dcentvfy takes for another entity.
    assert all("AccessionNumber" in line for line in done.stderr.splitlines() if line.startswith("Warning"))


def test_dsrdump_reads_the_documents(case: Any, tool: Any) -> None:
    for path in every_document(case):
        done = tool("dsrdump", path)
        assert done.returncode == 0
        said = [x for x in done.stderr.splitlines() if x and "Specific Character Set" not in x]
        assert said == [] and "Imaging Measurement Report" in done.stdout


def test_dcmtk_decodes_the_capture(case: Any, tool: Any) -> None:
    built = case.only("capture")
    plain = case.folder / "plain.dcm"
    done = tool("dcmdrle", case.save(built), plain)
    assert done.returncode == 0, done.stderr
    import pydicom

    assert (pydicom.dcmread(plain).pixel_array == case.read(built).pixel_array).all()


@pytest.mark.long
def test_pixelmed_finds_no_error_in_the_template(case: Any, pixelmed: Judge) -> None:
    for path in every_document(case):
        assert pixelmed(path) == []

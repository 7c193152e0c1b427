"""Coded concepts: our private scheme 99INFER, and the standard ones by the context group they come from.

99INFER holds what DICOM and its free SNOMED CT subset lack (PS3.16 section 8.2: private designators begin with "99").
Task concepts (PROB-…, RISKCAT, HIGH, LOW, INDET) stand in each `engine.yaml`; here stand those the node itself adds.
"""

from __future__ import annotations

from typing import Final

from dicom_node.result import Code, RefusalCode

PRIVATE_SCHEME: Final = "99INFER"
PRIVATE_SCHEME_NAME: Final = "dicom-node inference concepts"
PRIVATE_SCHEME_ORGANISATION: Final = "dicom-node"

NOT_ASSESSABLE: Final = Code("NOTASSESS", PRIVATE_SCHEME, "Not assessable")
REFUSAL_REASON: Final = Code("NOTASSESS-REASON", PRIVATE_SCHEME, "Reason for no result")

IMAGING_PROCEDURE: Final = Code("363679005", "SCT", "Imaging procedure")
"""Of CID 100, which has no ultrasound procedure; the site's own code goes into PerformedProcedureCodeSequence."""
NO_UNITS: Final = Code("1", "UCUM", "no units")
COMMENT: Final = Code("121106", "DCM", "Comment")
SOURCE_IMAGE_FOR_PROCESSING: Final = Code("121322", "DCM", "Source Image for Image Processing Operation")
ACQUISITION_EQUIPMENT: Final = Code("109101", "DCM", "Acquisition Equipment")
PROCESSING_EQUIPMENT: Final = Code("109102", "DCM", "Processing Equipment")

RIGHT: Final = Code("24028007", "SCT", "Right")
LEFT: Final = Code("7771000", "SCT", "Left")
BILATERAL: Final = Code("51440002", "SCT", "Bilateral")
LATERALITY_VALUE: Final = {RIGHT: "R", LEFT: "L", BILATERAL: "B"}
"""CID 244 to Laterality (0020,0060) and Image Laterality (0020,0062)."""

BODY_PART: Final = {
    Code("69748006", "SCT", "Thyroid"): "THYROID",
    Code("64033007", "SCT", "Kidney"): "KIDNEY",
    Code("10200004", "SCT", "Liver"): "LIVER",
    Code("303270005", "SCT", "Liver and biliary structure"): "LIVER",
    Code("40689003", "SCT", "Testis"): "TESTIS",
    Code("20233005", "SCT", "Scrotum"): "SCROTUM",
    Code("87644002", "SCT", "Epididymis"): "EPIDIDYMIS",
    Code("818981001", "SCT", "Abdomen"): "ABDOMEN",
    Code("45048000", "SCT", "Neck"): "NECK",
}
"""PS3.16 annex L: anatomic region to Body Part Examined (0018,0015)."""
UNPAIRED: Final = frozenset({"THYROID", "LIVER", "ABDOMEN", "NECK"})
"""Body parts that have no side, so that Laterality (2C, PS3.3 C.7.3.1) is absent."""

LANGUAGES: Final = {"en-US": "English (United States)", "en-GB": "English (United Kingdom)", "en": "English"}

# Code Values hold at most 16 characters (PS3.3 8.1), so the public names of the refusals cannot be used as they are.
_REFUSALS: Final = {
    RefusalCode.NO_ROUTE: ("NO-ROUTE", "No rule for this study"),
    RefusalCode.BODY_PART_AMBIGUOUS: ("BODYPART-AMBIG", "Body part ambiguous"),
    RefusalCode.INDICATION_NOT_ESTABLISHED: ("NO-INDICATION", "Indication not established"),
    RefusalCode.INCOMPLETE: ("INCOMPLETE", "Study incomplete"),
    RefusalCode.IMAGE_REJECTED: ("IMAGE-REJECTED", "Images rejected by a note"),
    RefusalCode.PATIENT_CONFLICT: ("PATIENT-CONFLICT", "Patient identity conflict"),
    RefusalCode.ENGINE_NOT_AVAILABLE: ("NO-ENGINE", "Engine not available"),
    RefusalCode.NO_SUITABLE_IMAGE: ("NO-IMAGE", "No suitable image"),
    RefusalCode.WRONG_VIEW: ("WRONG-VIEW", "View or mode not suitable"),
    RefusalCode.CALIBRATION_MISSING: ("NO-CALIBRATION", "Physical pixel size not stated"),
    RefusalCode.ROI_REQUIRED: ("ROI-REQUIRED", "Region of interest required"),
    RefusalCode.ROI_AMBIGUOUS: ("ROI-AMBIGUOUS", "Regions of interest disagree"),
    RefusalCode.ROI_UNREADABLE: ("ROI-UNREADABLE", "Region of interest cannot be placed"),
    RefusalCode.PHASES_UNSEPARABLE: ("PHASES-UNSEP", "Phases cannot be separated"),
    RefusalCode.PHASES_AMBIGUOUS: ("PHASES-AMBIG", "Evidence on phases contradictory"),
    RefusalCode.PHASE_LABEL_CONFLICT: ("PHASE-LABEL", "Phase name contradicts its time or order"),
    RefusalCode.PHASE_TIME_INVALID: ("PHASE-TIME", "Times of phases not comparable"),
    RefusalCode.PHASE_MISSING: ("PHASE-MISSING", "Contrast phase missing"),
    RefusalCode.DIXON_WATER_MISSING: ("NO-DIXON-WATER", "Dixon water images missing"),
    RefusalCode.SLICE_MISSING: ("SLICE-MISSING", "Slice missing"),
    RefusalCode.SLICE_DUPLICATE: ("SLICE-DUPLICATE", "Slice position twice in one stack"),
    RefusalCode.SLICE_SPACING_UNEVEN: ("SLICE-UNEVEN", "Slice spacing uneven"),
    RefusalCode.GEOMETRY_MIXED: ("GEOMETRY-MIXED", "Slices of one stack differ in geometry"),
    RefusalCode.GEOMETRY_SHEAR: ("GEOMETRY-SHEAR", "Slices shifted across their normal"),
    RefusalCode.FRAME_OF_REFERENCE_MISMATCH: ("FOR-MISMATCH", "No common Frame of Reference"),
    RefusalCode.PHASE_COVERAGE: ("PHASE-COVERAGE", "Phases overlap too little"),
    RefusalCode.PIXEL_FORMAT_MISMATCH: ("PIXEL-FORMAT", "Pixel formats differ within a stack"),
    RefusalCode.PIXELS_UNDECODABLE: ("PIXELS-UNDECOD", "Pixel data cannot be decoded"),
    RefusalCode.FRAME_TIME_INVALID: ("FRAMETIME-BAD", "Frame times invalid"),
    RefusalCode.CEUS_PANEL_AMBIGUOUS: ("PANEL-AMBIG", "Contrast panel ambiguous"),
    RefusalCode.CONTRAST_ARRIVAL_NOT_FOUND: ("NO-ARRIVAL", "Contrast arrival not found"),
    RefusalCode.TOO_FEW_FRAMES: ("FEW-FRAMES", "Too few frames"),
    RefusalCode.SLICE_EMPTY: ("SLICE-EMPTY", "Slice without content"),
    RefusalCode.OUT_OF_DISTRIBUTION: ("OUT-OF-DISTRIB", "Images unlike those of the validation"),
}


def refusal_code(code: RefusalCode) -> Code:
    """The coded reason of a refusal."""
    value, meaning = _REFUSALS[code]
    return Code(value, PRIVATE_SCHEME, meaning)


def private_codes() -> tuple[Code, ...]:
    """All concepts of 99INFER that the node itself adds, for the conformance statement."""
    return (NOT_ASSESSABLE, REFUSAL_REASON, *map(refusal_code, _REFUSALS))

"""What comes out: codes, findings, heatmaps, results and refusals, as frozen values. No I/O.

`Result` crosses the process border as JSON (`to_json`, `result_from_json`), arrays as `.npy` files named in it.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Code(NamedTuple):
    """A coded concept (PS3.3 8.8): Code Value, Coding Scheme Designator, Code Meaning. Equality ignores the meaning."""

    value: str
    scheme: str
    meaning: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and (self.value, self.scheme) == (other.value, other.scheme)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.value, self.scheme))


class RefusalCode(enum.StrEnum):
    """Why there is no number. Public: documented, stable, each reachable (tested)."""

    # route
    NO_ROUTE = "NO_ROUTE"
    BODY_PART_AMBIGUOUS = "BODY_PART_AMBIGUOUS"
    INDICATION_NOT_ESTABLISHED = "INDICATION_NOT_ESTABLISHED"
    INCOMPLETE = "INCOMPLETE"
    IMAGE_REJECTED = "IMAGE_REJECTED"
    PATIENT_CONFLICT = "PATIENT_CONFLICT"
    ENGINE_NOT_AVAILABLE = "ENGINE_NOT_AVAILABLE"
    # select: headers
    NO_SUITABLE_IMAGE = "NO_SUITABLE_IMAGE"
    WRONG_VIEW = "WRONG_VIEW"
    CALIBRATION_MISSING = "CALIBRATION_MISSING"
    ROI_REQUIRED = "ROI_REQUIRED"
    ROI_AMBIGUOUS = "ROI_AMBIGUOUS"
    ROI_UNREADABLE = "ROI_UNREADABLE"
    PHASES_UNSEPARABLE = "PHASES_UNSEPARABLE"
    PHASES_AMBIGUOUS = "PHASES_AMBIGUOUS"
    PHASE_LABEL_CONFLICT = "PHASE_LABEL_CONFLICT"
    PHASE_TIME_INVALID = "PHASE_TIME_INVALID"
    PHASE_MISSING = "PHASE_MISSING"
    DIXON_WATER_MISSING = "DIXON_WATER_MISSING"
    SLICE_MISSING = "SLICE_MISSING"
    SLICE_DUPLICATE = "SLICE_DUPLICATE"
    SLICE_SPACING_UNEVEN = "SLICE_SPACING_UNEVEN"
    GEOMETRY_MIXED = "GEOMETRY_MIXED"
    GEOMETRY_SHEAR = "GEOMETRY_SHEAR"
    FRAME_OF_REFERENCE_MISMATCH = "FRAME_OF_REFERENCE_MISMATCH"
    PHASE_COVERAGE = "PHASE_COVERAGE"
    PIXEL_FORMAT_MISMATCH = "PIXEL_FORMAT_MISMATCH"
    # predict: pixels
    PIXELS_UNDECODABLE = "PIXELS_UNDECODABLE"
    FRAME_TIME_INVALID = "FRAME_TIME_INVALID"
    CEUS_PANEL_AMBIGUOUS = "CEUS_PANEL_AMBIGUOUS"
    CONTRAST_ARRIVAL_NOT_FOUND = "CONTRAST_ARRIVAL_NOT_FOUND"
    TOO_FEW_FRAMES = "TOO_FEW_FRAMES"
    SLICE_EMPTY = "SLICE_EMPTY"
    # the node's own gate
    OUT_OF_DISTRIBUTION = "OUT_OF_DISTRIBUTION"

    @property
    def sentence(self) -> str:
        """One sentence for the operator."""
        return _SENTENCES[self]


_SENTENCES: dict[RefusalCode, str] = {
    RefusalCode.NO_ROUTE: "No route of config.yaml matches this study.",
    RefusalCode.BODY_PART_AMBIGUOUS: "The evidence names more than one body part, none of them clearly.",
    RefusalCode.INDICATION_NOT_ESTABLISHED: (
        "The body part matches, but nothing establishes the indication the engine was made for."
    ),
    RefusalCode.INCOMPLETE: "The study never held what the route requires.",
    RefusalCode.IMAGE_REJECTED: "A rejection note (Key Object Selection) says that these images must not be used.",
    RefusalCode.PATIENT_CONFLICT: "Instances of this study disagree on who the patient is.",
    RefusalCode.ENGINE_NOT_AVAILABLE: "The engine of this route is not installed or was not accepted on this machine.",
    RefusalCode.NO_SUITABLE_IMAGE: "The study holds no image of the kind the engine needs.",
    RefusalCode.WRONG_VIEW: "The images are of a mode the engine was not made for, for example colour Doppler.",
    RefusalCode.CALIBRATION_MISSING: (
        "The engine measures in millimetres, and no attribute says how large a pixel of the image is."
    ),
    RefusalCode.ROI_REQUIRED: "The engine needs a region of interest and the study holds none.",
    RefusalCode.ROI_AMBIGUOUS: "Several objects mark different regions on one image, and nothing says which holds.",
    RefusalCode.ROI_UNREADABLE: "An object marks a region on these images that cannot be placed on them.",
    RefusalCode.PHASES_UNSEPARABLE: (
        "Several images lie at each slice position, and no attribute divides them into phases exactly."
    ),
    RefusalCode.PHASES_AMBIGUOUS: (
        "The evidence on which image belongs to which phase, or in which order, contradicts itself."
    ),
    RefusalCode.PHASE_LABEL_CONFLICT: "What a phase is called contradicts its time, its order, or its other names.",
    RefusalCode.PHASE_TIME_INVALID: "The times of the phases cannot be compared.",
    RefusalCode.PHASE_MISSING: "The study does not hold every contrast phase that is needed, in increasing order.",
    RefusalCode.DIXON_WATER_MISSING: "Of a Dixon acquisition there are parts, but not the water images.",
    RefusalCode.SLICE_MISSING: "A slice is missing from a stack.",
    RefusalCode.SLICE_DUPLICATE: "Two slices of one stack lie at one position.",
    RefusalCode.SLICE_SPACING_UNEVEN: "The slices of a stack are not equally spaced.",
    RefusalCode.GEOMETRY_MIXED: (
        "Slices of one stack differ in orientation, size or pixel spacing, or do not say where they lie."
    ),
    RefusalCode.GEOMETRY_SHEAR: "The slices are shifted across their normal, as with a tilted gantry.",
    RefusalCode.FRAME_OF_REFERENCE_MISMATCH: (
        "The phases have no common Frame of Reference, so they cannot be laid over each other."
    ),
    RefusalCode.PHASE_COVERAGE: "The phases show too little of the body in common.",
    RefusalCode.PIXEL_FORMAT_MISMATCH: "The images of a stack differ in how their pixel values are stored or scaled.",
    RefusalCode.PIXELS_UNDECODABLE: "The pixel data cannot be decoded.",
    RefusalCode.FRAME_TIME_INVALID: "The times of the frames are absent or implausible.",
    RefusalCode.CEUS_PANEL_AMBIGUOUS: "The contrast panel cannot be told from the B-mode panel.",
    RefusalCode.CONTRAST_ARRIVAL_NOT_FOUND: "No arrival of contrast agent is visible in the clip.",
    RefusalCode.TOO_FEW_FRAMES: "The clip holds fewer usable frames than the engine needs.",
    RefusalCode.SLICE_EMPTY: "A slice of a stack holds one value only.",
    RefusalCode.OUT_OF_DISTRIBUTION: "The images are unlike those the model was validated on.",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer, not a fault: no number, and why. `detail` is free of PHI (it reaches logs and `explain`)."""

    code: RefusalCode
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.code}({self.detail})" if self.detail else str(self.code)


@dataclass(frozen=True, slots=True)
class ClinicalInput:
    """One clinical value with its provenance. `unit` is UCUM; `time` is ISO 8601 or ""."""

    name: str
    code: Code
    value: float
    unit: str
    time: str
    source: str
    laterality: str = ""
    """"R" or "L" for a value of one of paired organs; "" for a value of the patient."""

    @property
    def key(self) -> str:
        """Its key in the mapping that engines and gates see: "FSH", "EDV L"."""
        return f"{self.name} {self.laterality}".strip()


@dataclass(frozen=True, slots=True)
class FrameRef:
    """One frame of a stored instance; `frame_number` counts from 1 (PS3.3 10.3)."""

    sop_class_uid: str
    sop_instance_uid: str
    frame_number: int
    number_of_frames: int


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An array spilled to `<root>/spool/<name>` as `.npy`, with the SHA-256 of the file. `name` is the node's own."""

    name: str
    digest: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Heatmap:
    """The explanation of one score.

    `frames`: uint8 (n, h, w) or (n, h, w, 3), cropped to the image region, so without the banner that carries names.
    `map`: float32 (n, h, w), positive = towards `target`, same grid as `frames`.
    `region`: x0, y0, x1, y1 (inclusive, 0-based) of the crop in the source frame.
    """

    method: str
    """As written into the SR and on the picture: "class activation map", "Grad-CAM", "sensitivity map"."""
    target: Code
    frames: ArrayFile
    map: ArrayFile
    frame_refs: tuple[FrameRef, ...]
    region: tuple[int, int, int, int]
    vmin: float
    vmax: float
    """The fixed scale of the package (`explain.vmin`, `explain.vmax`): nothing is painted below vmin."""
    frame_time_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The probability of one outcome: after calibration, 0..1."""

    outcome: Code
    """Concept name of the NUM content item, for example (PROB-HIGHGRADE, 99INFER)."""
    probability: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class FusionTerm:
    """One axis of a nomogram with this patient's value on it. Contribution: beta * (t(value) - centre) / scale."""

    name: str
    """"logit" (the calibrated image score), or the name of a clinical value."""
    unit: str
    """UCUM; "" for the logit."""
    value: float
    transform: str
    """t: "none" or "log" (natural)."""
    centre: float
    scale: float
    beta: float
    low: float
    high: float
    """The axis as drawn, in the unit of the value: the range the coefficients were fitted on."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """Image score and clinical values in one logistic model, with the delta-method interval of its probability."""

    terms: tuple[FusionTerm, ...]
    intercept: float
    linear_predictor: float
    probability: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One evaluated unit (lesion, clip, testis, patient): what was looked at, and what the model says of it."""

    tracking_identifier: str
    """Stable for the same lesion across re-runs, for example "Lesion 1"."""
    finding: Code
    """What was looked at (a neoplasm, a nodule): never the diagnosis."""
    site: Code
    laterality: Code | None
    """SNOMED right/left/bilateral; None = unpaired organ or side unknown. Never defaulted."""
    laterality_note: str
    """Empty, or why the side is unknown."""
    category_name: Code
    category: Code
    """The qualitative evaluation: HIGH, LOW or INDET (abstained)."""
    scores: tuple[Score, ...]
    sources: tuple[FrameRef, ...]
    heatmap: Heatmap | None
    roi_source: str
    """"none", or where the region of interest came from: SEG, RTSTRUCT, SR, GSPS, auto."""
    fusion: Fusion | None = None
    """Where the package fuses and every clinical value was there: `scores[0]` is its probability, `scores[1]` the
    image's alone."""
    notes: tuple[str, ...] = ()
    """For the reader of the report, free of PHI, for example "fusion not computed: FSH is missing"."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights, run how: enough to repeat the result."""

    task: str
    package_version: str
    package_digest: str
    """SHA-256 of manifest.yaml, which itself lists the SHA-256 of every file."""
    intended_use: str
    """demonstration | research | clinical."""
    backend: str
    precision: str
    algorithm_name: str
    parameters: dict[str, str] = field(default_factory=dict)
    """The SR's Algorithm Parameters (111002, DCM): threshold, temperature, frames chosen, OOD distance…"""


@dataclass(frozen=True, slots=True)
class Result:
    """What an engine and the node's own gates concluded on one study for one route."""

    route: str
    findings: tuple[Finding, ...]
    provenance: Provenance
    clinical: tuple[ClinicalInput, ...]
    source_instances: tuple[str, ...]
    """SOP Instance UIDs of the selected source set."""
    input_digest: str
    """SHA-256 over the selected instances' digests, clinical inputs, package digest and parameters: the same input
    gives the same digest, so a late instance that changes nothing re-runs nothing."""
    title: str
    """Series description of what is sent, for example "AI renal CEUS ccRCC grade"."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the inverse of `result_from_json`."""
        return asdict(self)


def _code(v: Any) -> Code | None:
    return None if v is None else Code(*v)


def _frame_refs(values: list[dict[str, Any]]) -> tuple[FrameRef, ...]:
    return tuple(FrameRef(**v) for v in values)


def _array(v: dict[str, Any]) -> ArrayFile:
    return ArrayFile(v["name"], v["digest"], tuple(v["shape"]), v["dtype"])


def _heatmap(v: dict[str, Any] | None) -> Heatmap | None:
    if v is None:
        return None
    x0, y0, x1, y1 = v["region"]
    return Heatmap(
        **(
            v
            | {
                "target": Code(*v["target"]),
                "frames": _array(v["frames"]),
                "map": _array(v["map"]),
                "frame_refs": _frame_refs(v["frame_refs"]),
                "region": (x0, y0, x1, y1),
            }
        )
    )


def _fusion(v: dict[str, Any] | None) -> Fusion | None:
    return None if v is None else Fusion(**(v | {"terms": tuple(FusionTerm(**t) for t in v["terms"])}))


def _finding(v: dict[str, Any]) -> Finding:
    return Finding(
        **(
            v
            | {
                "finding": Code(*v["finding"]),
                "site": Code(*v["site"]),
                "laterality": _code(v["laterality"]),
                "category_name": Code(*v["category_name"]),
                "category": Code(*v["category"]),
                "scores": tuple(Score(**(s | {"outcome": Code(*s["outcome"])})) for s in v["scores"]),
                "sources": _frame_refs(v["sources"]),
                "heatmap": _heatmap(v["heatmap"]),
                "fusion": _fusion(v["fusion"]),
                "notes": tuple(v["notes"]),
            }
        )
    )


def result_from_json(v: dict[str, Any]) -> Result:
    """Rebuild a Result from `Result.to_json()` after a trip through JSON text."""
    return Result(
        **(
            v
            | {
                "findings": tuple(map(_finding, v["findings"])),
                "provenance": Provenance(**v["provenance"]),
                "clinical": tuple(ClinicalInput(**(c | {"code": Code(*c["code"])})) for c in v["clinical"]),
                "source_instances": tuple(v["source_instances"]),
            }
        )
    )

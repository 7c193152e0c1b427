"""engine.yaml and manifest.yaml as models: strict keys, finite numbers, names that stay inside the package. No I/O.

The limits matter: a distance limit of NaN would let everything pass, a tolerance of 10 would accept any backend.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_FILE_BYTES = 2 << 30
MAX_PACKAGE_FILES = 64
SUFFIXES = frozenset({"onnx", "npz", "json", "md", "txt", "yaml", "safetensors"})
"""What a package may hold: graphs, arrays and text. Never code, a pickle or a compiled plan."""
REQUIRED_FILES = ("head.npz", "ood.npz", "golden.npz", "MODEL_CARD.md", "metadata.json")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CodeEntry(_Strict):
    """A coded concept in YAML."""

    value: Annotated[str, Field(max_length=16)]
    scheme: Annotated[str, Field(max_length=16)]
    meaning: Annotated[str, Field(max_length=64)]


class Categories(_Strict):
    """Concept name of the qualitative evaluation, and its values."""

    name: CodeEntry
    high: CodeEntry
    low: CodeEntry
    indeterminate: CodeEntry


class ClinicalEntry(_Strict):
    """A clinical value the task can use. Absent or out of range: the score is the image's alone."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
    code: CodeEntry
    """LOINC (scheme LN) or SNOMED CT."""
    also: tuple[CodeEntry, ...] = ()
    """Further codes that mean the same."""
    unit: Annotated[str, Field(max_length=16)]
    """UCUM; a value in another unit of the same dimension is converted."""
    range: tuple[float, float]
    """Plausible values in `unit`; outside: refused as a value, with the reason in the report."""
    max_age_days: Annotated[float, Field(gt=0)] = 90
    per_side: bool = False
    """True for a measurement of one of paired organs; the study must then say which."""
    site: CodeEntry | None = None
    """For a code that names no organ (Volume): only a value whose Finding Site is this one counts."""
    sites: tuple[CodeEntry, ...] = ()
    """Where a value states its site, it must be one of these; a velocity may be of any artery."""
    repeated: Literal["agree", "mean"] = "agree"
    """Several measurements in one report: they must agree, or their mean is used and the report says so."""

    @model_validator(mode="after")
    def _ordered(self) -> ClinicalEntry:
        if self.range[0] >= self.range[1]:
            raise ValueError("range: [low, high]")
        return self


class Task(_Strict):
    """engine.yaml: what the task needs and says, whatever the weights."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    task: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
    title: str
    series_description: Annotated[str, Field(max_length=64)]
    study_reference: str
    """The published study the task follows."""
    modality: Literal["US", "MR"]
    unit: Literal["patient", "lesion", "clip", "testis"]
    indication: CodeEntry
    """The condition the published study's population had."""
    finding: CodeEntry
    """What is looked at: never the diagnosis."""
    site: CodeEntry
    paired: bool
    outcome: CodeEntry
    """Concept name of the probability, for example (PROB-HIGHGRADE, 99INFER)."""
    image_outcome: CodeEntry | None = None
    """Concept name of the image's own probability, where a package fuses it with clinical values."""
    categories: Categories
    libraries: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = ()
    """Python modules beyond the node's base that engine.py imports; absent = the task is "not available"."""
    clinical: tuple[ClinicalEntry, ...] = ()


class ModelEntry(_Strict):
    """One graph; `models/<name>/fp32.onnx` lies in the package."""

    inputs: tuple[str, ...] = Field(min_length=1)
    outputs: tuple[str, ...] = Field(min_length=1)
    tolerance: dict[Literal["fp32", "fp16"], Annotated[float, Field(gt=0, le=0.1)]]
    """Largest difference from the golden answers, relative where these are above 1; at most 0.1."""

    @model_validator(mode="after")
    def _usable(self) -> ModelEntry:
        names = (*self.inputs, *self.outputs)
        if len(set(names)) != len(names) or "fp32" not in self.tolerance:
            raise ValueError("every input and output named once, and a tolerance for fp32")
        return self


class InputSpec(_Strict):
    """How the engine prepares one input: told to people; engine.py has its own constants unless it says otherwise."""

    name: str
    kind: Literal["still", "cine", "phases"]
    frames: int = 1
    size: tuple[int, ...]
    channels: int = 1
    normalise: dict[str, float] = Field(default_factory=dict)


class Calibration(_Strict):
    method: Literal["none", "temperature"]
    T: Annotated[float, Field(gt=0)] = 1.0
    fitted_on: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if self.method == "none" and self.T != 1.0:
            raise ValueError("T: 1 where the method is none")
        return self


class Abstain(_Strict):
    lower: float
    upper: float


class Decision(_Strict):
    """Probability of the positive class, after calibration, against the threshold; inside the band: indeterminate."""

    threshold: Annotated[float, Field(gt=0, lt=1)]
    rule: str
    abstain: Abstain

    @model_validator(mode="after")
    def _ordered(self) -> Decision:
        if not 0 <= self.abstain.lower <= self.threshold <= self.abstain.upper <= 1:
            raise ValueError("0 <= abstain.lower <= threshold <= abstain.upper <= 1")
        return self


class Explain(_Strict):
    """Fixed scale of the picture: nothing below vmin, full colour at vmax."""

    model: str
    method: Annotated[str, Field(max_length=64)]
    """As printed: "class activation map"."""
    vmin: Annotated[float, Field(ge=0)]
    vmax: float

    @model_validator(mode="after")
    def _ordered(self) -> Explain:
        if self.vmin >= self.vmax:
            raise ValueError("vmin < vmax")
        return self


class OodSpec(_Strict):
    """ood.npz holds `mean` (C,), `precision` (C, C). Statistic of a unit: mean over its frames of the squared
    Mahalanobis distance of the globally averaged features. Above `limit` the unit is refused."""

    file: Literal["ood.npz"] = "ood.npz"
    limit: Annotated[float, Field(gt=0)]
    quantile: float = 0.99


class FusionTermSpec(_Strict):
    """One term: beta * (t(value) - centre) / scale."""

    name: str
    """"logit": log-odds of the image after calibration; else a clinical value of the task."""
    transform: Literal["none", "log"] = "none"
    centre: float
    scale: Annotated[float, Field(gt=0)]
    beta: float
    axis: tuple[float, float]
    """Drawn from, to: the range of the cohort it was fitted on, in the unit of the value."""


class FusionSpec(_Strict):
    """Logistic model of the image's log-odds and clinical values. A unit of one side takes that side's values, one of
    both the mean of the two; where one is missing nothing is computed."""

    terms: tuple[FusionTermSpec, ...] = Field(min_length=2)
    intercept: float
    covariance: tuple[tuple[float, ...], ...]
    """(k + 1, k + 1) of intercept and betas, in that order; the interval is the delta method's."""
    decision: Decision
    fitted_on: str
    n: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _consistent(self) -> FusionSpec:
        names = [term.name for term in self.terms]
        size = len(names) + 1
        if names.count("logit") != 1 or len(set(names)) != len(names):
            raise ValueError("terms: every name once, and logit")
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise ValueError("covariance: one row and column for the intercept and for each term")
        return self


class FileEntry(_Strict):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class Signature(_Strict):
    """Ed25519 over the manifest without this block, which must be its last."""

    alg: Literal["ed25519"]
    key_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """`<store.root>/keys/<key_id>.pub` holds the public key."""
    sig: str
    """Base64."""


class Manifest(_Strict):
    """manifest.yaml of a model package; its own SHA-256 is the package's digest."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    task: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,31}$")]
    algorithm: Annotated[str, Field(max_length=64)]
    """Algorithm Name (111001, DCM), for example "RepVGG-A0 (demo width) CEUS"."""
    intended_use: Literal["demonstration", "research", "clinical"]
    classes: tuple[str, ...] = Field(min_length=2)
    positive: str
    models: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")], ModelEntry] = Field(min_length=1)
    inputs: tuple[InputSpec, ...]
    calibration: Calibration
    decision: Decision
    explain: Explain
    ood: OodSpec
    fusion: FusionSpec | None = None
    metrics: dict[str, object] = Field(default_factory=dict)
    provenance: dict[str, object] = Field(default_factory=dict)
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,120}$")], FileEntry]
    signature: Signature | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.positive not in self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"positive: one of classes, which differ, not {self.positive!r}")
        if self.explain.model not in self.models:
            raise ValueError(f"explain.model: one of models, not {self.explain.model!r}")
        if len(self.files) > MAX_PACKAGE_FILES:
            raise ValueError(f"files: at most {MAX_PACKAGE_FILES}")
        for needed in (*(f"models/{name}/fp32.onnx" for name in self.models), *REQUIRED_FILES):
            if needed not in self.files:
                raise ValueError(f"files: {needed} is missing")
        for name in self.files:
            if {"", ".", ".."} & set(name.split("/")):
                raise ValueError("files: names stay inside the package")
            if name.rpartition(".")[2] not in SUFFIXES:
                raise ValueError(f"files: {name}: a package holds {', '.join(sorted(SUFFIXES))}")
        return self

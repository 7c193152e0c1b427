"""Tasks and model packages: read, check, find the active one.

A *task* is a folder `engines/<task>/` with `engine.yaml` and `engine.py`. A *model package* is an immutable folder with
`manifest.yaml` and the files it lists: `engines/<task>/model/` (the demonstration package) or
`<store.root>/models/<task>/<version>/` (a site's own). No pickle, no code and no compiled plan is ever read from a package.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    categories: Categories
    libraries: tuple[str, ...] = ()
    """Python modules beyond the node's base that engine.py imports; absent = the task is "not available"."""
    clinical: tuple[str, ...] = ()


class ModelEntry(_Strict):
    """One graph; `models/<name>/fp32.onnx` lies in the package."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: dict[Literal["fp32", "fp16"], float]


class InputSpec(_Strict):
    """How the engine prepares one input; the engine reads it through `engine.yaml`'s code, not from here, unless it says so."""

    name: str
    kind: Literal["still", "cine", "phases"]
    frames: int = 1
    size: tuple[int, ...]
    channels: int = 1
    normalise: dict[str, float] = Field(default_factory=dict)


class Calibration(_Strict):
    method: Literal["none", "temperature"]
    T: float = 1.0
    fitted_on: str = ""


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
    method: str
    """As printed: "class activation map"."""
    vmin: float
    vmax: float


class OodSpec(_Strict):
    """ood.npz holds `mean` (C,), `precision` (C, C). Statistic of a unit: mean over its frames of the squared
    Mahalanobis distance of the globally averaged features. Above `limit` the unit is refused."""

    file: Literal["ood.npz"] = "ood.npz"
    limit: float
    quantile: float = 0.99


class FileEntry(_Strict):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: int


class Manifest(_Strict):
    """manifest.yaml of a model package; its own SHA-256 is the package's digest."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    task: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+-]{1,32}$")]
    algorithm: Annotated[str, Field(max_length=64)]
    """Algorithm Name (111001, DCM), for example "RepVGG-A0 (demo width) CEUS"."""
    intended_use: Literal["demonstration", "research", "clinical"]
    classes: tuple[str, ...]
    positive: str
    models: dict[str, ModelEntry]
    inputs: tuple[InputSpec, ...]
    calibration: Calibration
    decision: Decision
    explain: Explain
    ood: OodSpec
    metrics: dict[str, object] = Field(default_factory=dict)
    provenance: dict[str, object] = Field(default_factory=dict)
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,120}$")], FileEntry]
    signature: dict[str, str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.positive not in self.classes:
            raise ValueError(f"positive: one of classes, not {self.positive!r}")
        for name in self.models:
            if f"models/{name}/fp32.onnx" not in self.files:
                raise ValueError(f"files: models/{name}/fp32.onnx is missing")
        for needed in ("head.npz", "ood.npz", "golden.npz", "MODEL_CARD.md", "metadata.json"):
            if needed not in self.files:
                raise ValueError(f"files: {needed} is missing")
        if any(".." in name.split("/") for name in self.files):
            raise ValueError("files: names stay inside the package")
        return self

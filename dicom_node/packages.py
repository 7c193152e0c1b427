"""Tasks and model packages: read, check, find the active one.

A *task* is a folder `engines/<task>/` with `engine.yaml` and `engine.py`. A *model package* is an immutable folder with
`manifest.yaml` and the files it lists: `engines/<task>/model/` (the demonstration package) or
`<store.root>/models/<task>/<version>/` (a site's own). No pickle, code or compiled plan is ever read from a package.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicom_node.config import Config
from dicom_node.errors import PackageError


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
    """How the engine prepares one input: for readers of the package; the engine's code is what runs."""

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


# -- on disk

MAX_PACKAGE_FILES = 64
MAX_FILE_BYTES = 2 << 30
ACTIVE = "active"
"""`<root>/models/<task>/active` names the version in use; without it the task's own demonstration package is."""

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class TaskFolder:
    """A task as it lies on disk."""

    folder: Path
    task: Task

    @property
    def missing_libraries(self) -> tuple[str, ...]:
        """Python modules engine.py needs and this installation lacks."""
        return tuple(name for name in self.task.libraries if importlib.util.find_spec(name) is None)


@dataclass(frozen=True, slots=True, eq=False)
class ModelPackage:
    """A verified package: every listed file had its listed bytes."""

    folder: Path
    manifest: Manifest
    digest: str
    """SHA-256 of manifest.yaml, which lists the SHA-256 of every other file."""
    head_weights: NDArray[np.float64]
    """(K, C) of the linear head."""
    ood_mean: NDArray[np.float64]
    ood_precision: NDArray[np.float64]
    golden: Mapping[str, NDArray[Any]]

    def graph(self, model: str, precision: str = "fp32") -> Path:
        """Path of one graph."""
        return self.folder / "models" / model / f"{precision}.onnx"


def load_task(folder: Path) -> TaskFolder:
    """Read engine.yaml. Raises PackageError."""
    task = _yaml(folder / "engine.yaml", Task)
    if task.task != folder.name:
        raise PackageError(f"{folder.name}/engine.yaml: task is {task.task!r}; the folder's name is its identity")
    if not (folder / "engine.py").is_file():
        raise PackageError(f"{folder.name}: engine.py is missing")
    return TaskFolder(folder, task)


def find_tasks(paths: Iterable[Path]) -> dict[str, Path]:
    """Task folders by name; the first folder of `engines.path` wins."""
    found: dict[str, Path] = {}
    for path in paths:
        for manifest in sorted(path.glob("*/engine.yaml")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def task_of(paths: Iterable[Path], name: str) -> Task:
    """The task an engine name stands for. Raises PackageError."""
    folder = find_tasks(paths).get(name)
    if folder is None:
        raise PackageError(f"no task {name} under engines.path")
    return load_task(folder).task


def active_package(task: TaskFolder, root: Path, *, require_signature: bool = False) -> ModelPackage:
    """The installed package in use, else the demonstration package that comes with the task. Raises PackageError."""
    installed = root / "models" / task.task.task
    marker = installed / ACTIVE
    folder = installed / marker.read_text(encoding="ascii").strip() if marker.is_file() else task.folder / "model"
    package = load_package(folder, keys=root / "keys" if require_signature else None)
    if package.manifest.task != task.task.task:
        raise PackageError(f"{folder.name}: made for {package.manifest.task}, not for {task.task.task}")
    return package


def load_package(folder: Path, *, keys: Path | None = None) -> ModelPackage:
    """Schema, digests, signature (when `keys` is given), arrays: in that order. Raises PackageError naming the step."""
    path = folder / "manifest.yaml"
    manifest = _yaml(path, Manifest)
    _verify_files(folder, manifest)
    if keys is not None:
        _verify_signature(path, manifest, keys)
    head = _arrays(folder / "head.npz")
    ood = _arrays(folder / "ood.npz")
    try:
        weights, mean, precision = head["W"].astype(float), ood["mean"].astype(float), ood["precision"].astype(float)
    except KeyError as e:
        raise PackageError(f"{folder.name}: head.npz or ood.npz lacks the array {e}") from None
    channels = mean.shape[0] if mean.ndim == 1 else -1
    if weights.shape != (len(manifest.classes), channels) or precision.shape != (channels, channels):
        raise PackageError(f"{folder.name}: W, mean and precision do not fit together and to the classes")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelPackage(folder, manifest, digest, weights, mean, precision, _arrays(folder / "golden.npz"))


def _yaml(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as e:
        raise PackageError(f"{path.parent.name}/{path.name} cannot be read ({e})") from None
    except yaml.YAMLError as e:
        raise PackageError(f"{path.parent.name}/{path.name} is not YAML ({' '.join(str(e).split())})") from None
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise PackageError(f"{path.parent.name}/{path.name}: {key}: {first['msg']}") from None


def _verify_files(folder: Path, manifest: Manifest) -> None:
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
    extra = sorted(present.keys() - manifest.files.keys() - {"manifest.yaml"})
    if extra or len(manifest.files) > MAX_PACKAGE_FILES:
        raise PackageError(f"{folder.name}: files the manifest does not list, or too many: {', '.join(extra[:3])}")
    for name, entry in manifest.files.items():
        path = present.get(name)
        if path is None or path.is_symlink() or not path.is_file():
            raise PackageError(f"{folder.name}: {name} is missing, or not a plain file")
        if path.stat().st_size != entry.bytes or entry.bytes > MAX_FILE_BYTES:
            raise PackageError(
                f"{folder.name}: {name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
            raise PackageError(f"{folder.name}: {name} is not the file the manifest was written for (SHA-256 differs)")


def _verify_signature(path: Path, manifest: Manifest, keys: Path) -> None:
    """Ed25519 over the manifest without its signature lines. Public keys: <root>/keys/<key_id>.pub, base64."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if manifest.signature is None:
        raise PackageError(f"{path.parent.name}: not signed, and engines.require_signature is true")
    trusted = {p.stem: p for p in keys.glob("*.pub")}
    known = trusted.get(manifest.signature.get("key_id", ""))
    if known is None:
        raise PackageError(f"{path.parent.name}: signed with a key that is not in {keys}")
    text = path.read_text(encoding="utf-8")
    signed = text[: text.index("\nsignature:") + 1].encode()
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(known.read_text(), validate=True))
        key.verify(base64.b64decode(manifest.signature.get("sig", ""), validate=True), signed)
    except (InvalidSignature, ValueError):
        raise PackageError(f"{path.parent.name}: the signature does not fit the manifest") from None


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Plain arrays; never a pickle."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as e:
        raise PackageError(f"{path.parent.name}: {path.name} holds no plain arrays ({type(e).__name__})") from None


# -- shown


def engines_list(config: Config) -> list[dict[str, Any]]:
    """`dicom-node engines list --json`."""
    return [_listed(folder, config) for _, folder in sorted(find_tasks(config.engines.path).items())]


def _listed(folder: Path, config: Config) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": folder.name, "title": "", "available": False, "reason": "", "version": None, "digest": None,
        "intended_use": None, "algorithm": None, "backends": {}, "metrics": {},
    }  # fmt: skip
    try:
        task = load_task(folder)
        told["title"] = task.task.title
        package = active_package(task, config.store.root, require_signature=config.engines.require_signature)
    except PackageError as e:
        return told | {"reason": str(e)}
    told |= {
        "version": package.manifest.version,
        "digest": package.digest,
        "intended_use": package.manifest.intended_use,
        "algorithm": package.manifest.algorithm,
        "metrics": package.manifest.metrics,
    }
    if task.missing_libraries:
        return told | {"reason": f"install {', '.join(task.missing_libraries)}"}
    backends = {
        "onnx": "the reference; accepted by golden replay when a worker starts",
        "tensorrt": "not executed by us",
    }
    return told | {"available": True, "backends": backends}

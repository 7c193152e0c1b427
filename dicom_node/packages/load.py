"""From a folder to verified values. A package is untrusted input until every step has passed:

schema → bytes and SHA-256 of every file → signature (where required) → arrays that fit together.

The last step, golden replay, needs a backend and is `runtime/accept.py`'s. Reads files, writes none; every refusal is a
PackageError that names the package and the step.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from dicom_node.errors import PackageError
from dicom_node.packages.fused import check_fusion
from dicom_node.packages.schema import ClinicalEntry, Manifest, Task

MAX_YAML_BYTES = 1 << 20
MAX_ARRAY_BYTES = 512 << 20
"""Unpacked, one `.npz`: a compressed megabyte may claim a terabyte."""
ACTIVE = "active"
"""`<root>/models/<task>/active` names the version in use, below it those before; without it the task's own
demonstration package is."""

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class TaskFolder:
    """A task as it lies on disk."""

    folder: Path
    task: Task

    @property
    def missing_libraries(self) -> tuple[str, ...]:
        """Python modules engine.py needs and this installation lacks. Looks, and imports nothing."""
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
    head_bias: NDArray[np.float64]
    """(K,)."""
    ood_mean: NDArray[np.float64]
    ood_precision: NDArray[np.float64]
    golden: Mapping[str, NDArray[Any]]

    def read(self, name: str) -> bytes:
        """A listed file, checked again: what is used is what was verified. Raises PackageError."""
        return _read(self.folder, name, self.manifest)


def load_task(folder: Path) -> TaskFolder:
    """Read engine.yaml. Raises PackageError."""
    path = folder / "engine.yaml"
    task = _validated(path, Task, _yaml(path, _text(path)))
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


def wanted_of(paths: Iterable[Path]) -> Callable[[str], tuple[ClinicalEntry, ...]]:
    """The clinical values of a task by its name; () for a task that is not there. Each engine.yaml is read once."""
    folders, known = list(paths), dict[str, tuple[ClinicalEntry, ...]]()

    def wanted(name: str) -> tuple[ClinicalEntry, ...]:
        if name not in known:
            try:
                known[name] = task_of(folders, name).clinical
            except PackageError:
                known[name] = ()
        return known[name]

    return wanted


def active_package(task: TaskFolder, root: Path, *, require_signature: bool = False) -> ModelPackage:
    """The installed package in use, else the demonstration package that comes with the task. Raises PackageError."""
    installed = root / "models" / task.task.task
    marker = installed / ACTIVE
    version = (_text(marker).splitlines() or [""])[0].strip() if marker.is_file() else None
    if version is not None and version not in _names(installed):  # also keeps ".." out of the path
        raise PackageError(f"{task.task.task}: the active version {version[:32]!r} is not installed")
    folder = task.folder / "model" if version is None else installed / version
    if version is None and not folder.is_dir():
        raise PackageError(f"{task.task.task}: no package comes with the task, and none is installed and active")
    package = package_for(task, folder, root, require_signature=require_signature)
    if version is not None and package.manifest.version != version:
        raise PackageError(f"{folder.name}: its manifest says version {package.manifest.version}")
    return package


def package_for(task: TaskFolder, folder: Path, root: Path, *, require_signature: bool = False) -> ModelPackage:
    """The package in a folder, which must be this task's. Raises PackageError."""
    package = load_package(folder, keys=root / "keys" if require_signature else None)
    if package.manifest.task != task.task.task:
        raise PackageError(f"{folder.name}: made for {package.manifest.task}, not for {task.task.task}")
    check_fusion(task.task, package.manifest)
    return package


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.is_symlink()}


def load_package(folder: Path, *, keys: Path | None = None) -> ModelPackage:
    """Schema, digests, signature (when `keys` is given), arrays: in that order. Raises PackageError naming the step."""
    path = folder / "manifest.yaml"
    text = _text(path)
    parsed = _yaml(path, text)
    manifest = _validated(path, Manifest, parsed)
    _verify_files(folder, manifest)
    if keys is not None:
        _verify_signature(path, text, parsed, manifest, keys)
    head, ood, golden = (_arrays(folder, name, manifest) for name in ("head.npz", "ood.npz", "golden.npz"))
    try:
        weights, bias, mean, precision = (
            np.asarray(array, np.float64) for array in (head["W"], head["b"], ood["mean"], ood["precision"])
        )
    except (KeyError, ValueError) as e:
        raise PackageError(f"{folder.name}: head.npz holds W and b, ood.npz mean and precision ({e})") from None
    _fit(folder, len(manifest.classes), weights, bias, mean, precision)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ModelPackage(folder, manifest, digest, weights, bias, mean, precision, golden)


def _fit(folder: Path, classes: int, *arrays: NDArray[np.float64]) -> None:
    """Shapes that fit; and a precision that is one: with another matrix the distance could never reach its limit."""
    weights, bias, mean, precision = arrays
    channels = mean.shape[0] if mean.ndim == 1 else -1
    shapes = (weights.shape, bias.shape, precision.shape)
    if shapes != ((classes, channels), (classes,), (channels, channels)):
        raise PackageError(f"{folder.name}: W, b, mean and precision do not fit together and to the classes")
    if not all(np.isfinite(a).all() for a in arrays) or not np.allclose(precision, precision.T, rtol=1e-6):
        raise PackageError(f"{folder.name}: W, b, mean or precision is not finite, or precision is not symmetric")
    try:
        np.linalg.cholesky(precision)
    except np.linalg.LinAlgError:
        raise PackageError(f"{folder.name}: precision in ood.npz is not positive definite") from None


# -- YAML


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (a few lines of them grow to gigabytes) and without a key written twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise PackageError(f"{path.parent.name}/{path.name} is larger than {MAX_YAML_BYTES >> 20} MB")
        return path.read_bytes().decode("utf-8")
    except OSError as e:
        raise PackageError(f"{path.parent.name}/{path.name} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise PackageError(f"{path.parent.name}/{path.name} is not UTF-8 text") from None


def _yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506  a SafeLoader subclass
    except (yaml.YAMLError, ValueError) as e:  # a date of month 13 is a ValueError
        raise PackageError(f"{path.parent.name}/{path.name} is not YAML ({' '.join(str(e).split())})") from None
    except RecursionError:
        raise PackageError(f"{path.parent.name}/{path.name} is nested too deeply") from None


def _validated(path: Path, model: type[_Model], parsed: Any) -> _Model:
    try:
        return model.model_validate(parsed)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        said = first["msg"].removeprefix("Value error, ")
        raise PackageError(f"{path.parent.name}/{path.name}: {where}{said}") from None


# -- files


def _verify_files(folder: Path, manifest: Manifest) -> None:
    listed = {"manifest.yaml", *manifest.files}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise PackageError(f"{folder.name}: {name[:120]} is a link or no plain file")
        if path.is_file() and name not in listed:
            raise PackageError(f"{folder.name}: {name[:120]} is a file the manifest does not list")
    for name in manifest.files:
        _read(folder, name, manifest)


def _read(folder: Path, name: str, manifest: Manifest) -> bytes:
    """A file of the package. Raises PackageError unless it has its listed bytes and SHA-256."""
    entry = manifest.files.get(name)
    if entry is None:
        raise PackageError(f"{folder.name}: the manifest lists no {name}")
    try:
        with (folder / name).open("rb") as file:
            data = file.read(entry.bytes + 1)
    except OSError as e:
        raise PackageError(f"{folder.name}: {name} cannot be read ({e.strerror})") from None
    if len(data) != entry.bytes:
        raise PackageError(f"{folder.name}: {name} is not {entry.bytes} bytes long, as the manifest says")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise PackageError(f"{folder.name}: {name} is not the file the manifest was written for (SHA-256 differs)")
    return data


def _arrays(folder: Path, name: str, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Plain arrays, read-only; never a pickle."""
    data = _read(folder, name, manifest)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_ARRAY_BYTES:
                raise PackageError(f"{folder.name}: {name} unpacks to more than {MAX_ARRAY_BYTES >> 20} MB")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise PackageError(f"{folder.name}: {name} holds no plain arrays ({type(e).__name__})") from None
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


# -- signature


def _verify_signature(path: Path, text: str, parsed: Any, manifest: Manifest, keys: Path) -> None:
    """Ed25519 over the text before the signature block; public keys: `<root>/keys/<key_id>.pub`, 32 bytes in base64.

    What is signed must be all that the manifest says: a line after the block, or before it in another form, would be
    believed unsigned. So the signed text alone is parsed again and compared with the whole.
    """
    name = path.parent.name
    if manifest.signature is None:
        raise PackageError(f"{name}: not signed, and engines.require_signature is true")
    known = keys / f"{manifest.signature.key_id}.pub"
    if not known.is_file():
        raise PackageError(
            f"{name}: signed with the key {manifest.signature.key_id}, which is not among the site's keys"
        )
    before, found, _ = text.partition("\nsignature:")
    signed = before + "\n"
    unsigned = {key: value for key, value in parsed.items() if key != "signature"}
    if not found or _yaml(path, signed) != unsigned:
        raise PackageError(f"{name}: the signature must be the last block of manifest.yaml")
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise PackageError(f"{name}: to verify a signature, install cryptography") from None
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(_text(known).strip(), validate=True))
        key.verify(base64.b64decode(manifest.signature.sig, validate=True), signed.encode())
    except (InvalidSignature, ValueError):
        raise PackageError(f"{name}: the signature does not fit the manifest") from None

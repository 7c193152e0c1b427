"""From a folder that somebody brought to a version that can be put to use, and back. Writes only below `<root>/models`.

    check      schema, bytes and SHA-256, signature, arrays (load.py), then the graphs (runtime/graph.py)
    staged     a durable copy under a name that no version can have; the golden replay is its caller's, with a worker
    settle     one rename: the version is there whole, or not at all
    choose     which version is in use: one file, replaced by one rename, with the versions before it

Who calls these holds the lock of the models (`lock_models`). Every refusal is a PackageError that names file and step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from dicom_node.errors import PackageError, StoreError
from dicom_node.packages.load import ACTIVE, ModelPackage, load_package
from dicom_node.runtime import graph
from dicom_node.store.files import RootLock, lock_root, write_durable
from dicom_node.store.sync import fsync_path

HISTORY_KEPT = 16
"""So many versions back can `rollback` go."""
STAGING = ".staging-"
READ_ONLY = 0o444
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}")


def lock_models(root: Path) -> RootLock:
    """One process at a time changes the models of a root. Raises RootInUseError."""
    return lock_root(root, "models")


# -- checks


def check(folder: Path, keys: Path | None) -> ModelPackage:
    """Every step but the golden replay; `keys` where a signature is required."""
    package = load_package(folder, keys=keys)
    check_graphs(package, thorough=True)
    return package


def check_graphs(package: ModelPackage, *, thorough: bool = False) -> None:
    """Operators, initialisers, names, dtypes, sizes of every graph; `thorough`: onnx.checker too, where installed."""
    manifest = package.manifest
    for file in manifest.files:
        if not file.endswith(".onnx"):
            continue
        where = f"{package.folder.name}: graph check of {file}"
        parts = file.split("/")
        entry = manifest.models.get(parts[1]) if len(parts) == 3 and parts[0] == "models" else None
        if entry is None:
            raise PackageError(f"{where}: it belongs to no model of the manifest")
        try:
            graph.check(
                package.read(file), entry.inputs, entry.outputs, sizes=_sizes(package, parts[1]), thorough=thorough
            )
        except PackageError as e:
            raise PackageError(f"{where}: {e}") from None


def _sizes(package: ModelPackage, model: str) -> dict[str, tuple[int, ...]]:
    """`inputs` of the manifest that speak of this model: "x" is the explained model's, "locator.x" says whose."""
    sizes = {}
    for spec in package.manifest.inputs:
        whose, _, name = spec.name.rpartition(".")
        if (whose or package.manifest.explain.model) == model:
            sizes[name] = spec.size
    return sizes


# -- the files


def version_folder(root: Path, task: str, version: str) -> Path:
    """Where an installed version lies. Both names have passed the schema: they hold no separator."""
    return root / "models" / task / version


def installed(root: Path, task: str) -> tuple[str, ...]:
    """Versions of a task that are installed whole."""
    folder = root / "models" / task
    if not folder.is_dir():
        return ()
    found = (p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return tuple(sorted(p.name for p in found))


def sweep(root: Path) -> None:
    """Remove what a kill left behind. Under the lock only: nobody else is at work there."""
    models = root / "models"
    for left in models.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    for part in models.glob(f"*/.{ACTIVE}.*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(package: ModelPackage, root: Path) -> Iterator[Path]:
    """A durable, read-only copy of the verified bytes, for the golden replay and `settle`. Raises StoreError."""
    models = root / "models"
    staging = models / f"{STAGING}{uuid.uuid4().hex}"
    folder = staging / package.manifest.version
    try:
        try:
            folder.mkdir(parents=True)
            for name in package.manifest.files:
                _write(folder, name, package.read(name))
            _write(folder, "manifest.yaml", _manifest(package))
            for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
                fsync_path(path)
            fsync_path(folder)
        except OSError as e:
            raise StoreError(f"the package cannot be copied ({e.strerror})") from e
        yield folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _manifest(package: ModelPackage) -> bytes:
    text = (package.folder / "manifest.yaml").read_bytes()
    if hashlib.sha256(text).hexdigest() != package.digest:
        raise PackageError(f"{package.folder.name}: manifest.yaml changed while it was read")
    return text


def _write(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), READ_ONLY)
        os.fsync(file.fileno())


def settle(copy: Path, root: Path, package: ModelPackage) -> Path:
    """The accepted copy takes its final name. Raises StoreError."""
    final = version_folder(root, package.manifest.task, package.manifest.version)
    try:
        final.parent.mkdir(exist_ok=True)
        copy.rename(final)
        fsync_path(final.parent)
        fsync_path(root / "models")
    except OSError as e:
        raise StoreError(f"the package cannot be given its name ({e.strerror})") from e
    return final


# -- which one is in use


def history(root: Path, task: str) -> tuple[str, ...]:
    """The version in use and those before it, latest first; () = the package that comes with the task is in use."""
    try:
        text = (root / "models" / task / ACTIVE).read_text("utf-8")
    except FileNotFoundError:
        return ()
    return tuple(line for line in text.splitlines() if _VERSION.fullmatch(line))


def choose(root: Path, task: str, versions: tuple[str, ...]) -> None:
    """Write that history: at every moment either the old one or this one is on the disk. Raises StoreError."""
    marker = root / "models" / task / ACTIVE
    if versions:
        write_durable(marker, "".join(f"{version}\n" for version in versions[:HISTORY_KEPT]).encode())
        return
    try:
        marker.unlink(missing_ok=True)
        fsync_path(marker.parent)
    except OSError as e:
        raise StoreError(f"the marker cannot be removed ({e.strerror})") from e

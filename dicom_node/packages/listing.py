"""What operators are shown of tasks and packages (`dicom-node engines list`, `check`). Reads; runs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dicom_node.config import Config
from dicom_node.errors import PackageError
from dicom_node.packages import acceptance
from dicom_node.packages.install import history, installed
from dicom_node.packages.load import active_package, find_tasks, load_task

BACKENDS = ("tensorrt", "tensorrt_rtx", "cuda", "openvino", "onnx")
NOT_EXECUTED = frozenset({"tensorrt", "tensorrt_rtx", "cuda"})
"""By those who made this version; said until the machine it runs on has done it."""


def engines_list(config: Config) -> list[dict[str, Any]]:
    """`dicom-node engines list --json`."""
    said = acceptance.read(config.store.root)
    return [_listed(folder, config, said) for _, folder in sorted(find_tasks(config.engines.path).items())]


def _listed(folder: Path, config: Config, said: dict[str, dict[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": folder.name, "title": "", "available": False, "reason": "", "version": None, "digest": None,
        "intended_use": None, "algorithm": None, "backends": {}, "metrics": {}, "acceptance": None,
        "installed": list(installed(config.store.root, folder.name)),
        "history": list(history(config.store.root, folder.name)),
    }  # fmt: skip
    try:
        task = load_task(folder)
        told["title"] = task.task.title
        package = active_package(task, config.store.root, require_signature=config.engines.require_signature)
    except PackageError as e:
        return told | {"reason": str(e)}
    manifest = package.manifest
    told |= {
        "version": manifest.version,
        "digest": package.digest,
        "intended_use": manifest.intended_use,
        "algorithm": manifest.algorithm,
        "metrics": manifest.metrics,
    }
    if task.missing_libraries:
        return told | {"reason": f"not available: install {', '.join(task.missing_libraries)}"}
    last = said.get(folder.name)
    told |= {"acceptance": _acceptance(last), "backends": {name: _standing(name, last) for name in BACKENDS}}
    return told | {"available": True}


def _acceptance(last: dict[str, Any] | None) -> dict[str, Any] | None:
    """The table of the last time a worker had the engine; None where none has."""
    if last is None:
        return None
    kept = ("version", "digest", "backend", "precision", "library")
    table = {key: last.get(key) for key in kept}
    return {"at": last["at"], "error": last["error"], **table, "tried": last.get("tried", [])}


def _standing(name: str, last: dict[str, Any] | None) -> str:
    """One backend in a line, as a worker found it here."""
    tried = [t for t in (last or {}).get("tried", []) if t["backend"] == name]
    accepted = [t["precision"] for t in tried if t["status"] == "accepted"]
    if last is not None and last.get("backend") == name:
        return f"in use, {last['precision']} (accepted: {', '.join(accepted)})"
    if accepted:
        return f"accepted, {', '.join(accepted)}"
    unknown = "not executed by us" if name in NOT_EXECUTED else "no worker has tried it yet"
    if not tried:
        return "the reference; accepted by golden replay when a worker starts" if name == "onnx" else unknown
    reasons = "; ".join(dict.fromkeys(f"{t['status']}: {t['reason']}" for t in tried))
    here = any(t["status"] not in ("not here", "not tried") for t in tried)
    return reasons if here or name not in NOT_EXECUTED else f"not executed by us; {reasons}"

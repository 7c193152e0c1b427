"""What operators are shown of tasks and packages (`dicom-node engines list`, `check`). Reads; runs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dicom_node.config import Config
from dicom_node.errors import PackageError
from dicom_node.packages.install import history, installed
from dicom_node.packages.load import active_package, find_tasks, load_task

BACKENDS = {
    "onnx": "the reference; accepted by golden replay when a worker starts",
    "tensorrt": "not executed by us",
}


def engines_list(config: Config) -> list[dict[str, Any]]:
    """`dicom-node engines list --json`."""
    return [_listed(folder, config) for _, folder in sorted(find_tasks(config.engines.path).items())]


def _listed(folder: Path, config: Config) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": folder.name, "title": "", "available": False, "reason": "", "version": None, "digest": None,
        "intended_use": None, "algorithm": None, "backends": {}, "metrics": {},
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
    if config.infer.runtime not in ("auto", "onnx"):
        return told | {"reason": f"infer.runtime is {config.infer.runtime}; this version runs onnx"}
    return told | {"available": True, "backends": BACKENDS}

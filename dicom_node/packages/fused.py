"""Whether a package's fusion of image and clinical values fits the task it is for. No I/O."""

from __future__ import annotations

import math

import numpy as np

from dicom_node.errors import PackageError
from dicom_node.packages.schema import Manifest, Task


def check_fusion(task: Task, manifest: Manifest) -> None:
    """A nomogram may ask only for what the task collects, and its numbers must be usable. Raises PackageError."""
    spec, where = manifest.fusion, f"{manifest.task} {manifest.version}: fusion"
    if spec is None:
        return
    if task.image_outcome is None:
        raise PackageError(f"{where}: the task names no image_outcome, so two scores would bear one name")
    lowest = {"logit": -math.inf} | {entry.name: entry.range[0] for entry in task.clinical}
    unknown = {term.name for term in spec.terms} - lowest.keys()
    if unknown:
        raise PackageError(f"{where}: the task has no clinical value {', '.join(sorted(unknown))}")
    for term in spec.terms:
        if not term.axis[0] < term.axis[1]:
            raise PackageError(f"{where}: {term.name}: axis: [low, high]")
        if term.transform == "log" and min(lowest[term.name], term.axis[0]) <= 0:
            raise PackageError(f"{where}: {term.name} may be 0 or less, which has no logarithm")
    covariance = np.array(spec.covariance)
    # Rounding in the manifest may leave an eigenvalue a little below zero.
    if not np.allclose(covariance, covariance.T) or np.linalg.eigvalsh(covariance).min() < -1e-9 * covariance.max():
        raise PackageError(f"{where}: covariance is not symmetric positive semidefinite")

"""Plans ahead of time: what the backends that compile need, built in a process of its own and left in the node's cache.

A build is minutes of foreign native code: a crash costs this process alone. For a GPU that is not here a plan is built
to see that it can be, and thrown away: it was not executed, and a plan is never taken to another machine.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from dicom_node import packages
from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place
from dicom_node.runtime.tensorrt import TensorRtBackend
from dicom_node.runtime.tensorrt_build import Settings
from dicom_node.worker import timing
from dicom_node.worker.engines import models_of

BUILT, KEPT, REFUSED = "built", "kept", "refused"
SECONDS = 1800.0
"""For one plan: nobody waits. A worker, which must be back soon, finds it in the cache."""
NOT_EXECUTED = "not executed by us; not kept"


def build(question: timing.Question) -> timing.Answer:
    """A line for each graph of the package in use that this backend compiles, or why it compiles none."""
    targets = tuple(str(target) for target in question["targets"])
    backend = TensorRtBackend(
        str(question["backend"]), str(question["precision"]), settings=Settings(targets=targets), build_seconds=SECONDS
    )
    if not targets and (missing := backend.missing()):
        return {"missing": missing, "lines": []}
    if targets and not backend.version():
        return {"missing": backend.missing(), "lines": []}
    home = packages.load_task(Path(question["task"]))
    root = Path(question["root"])
    package = packages.active_package(home, root, require_signature=bool(question["signed"]))
    packages.check_graphs(package)
    place = Place(int(question["threads"]), plans=root / "plans")
    mine = [m for m in models_of(package) if backend.precision in m.graphs]
    one = _for_targets if targets else _for_this_machine
    return {"missing": "", "lines": [_line(model, *one(backend, model, place)) for model in mine]}


def _line(model: Model, status: str, reason: str, seconds: float | None, size: int | None, key: str) -> dict[str, Any]:
    rounded = None if seconds is None else round(seconds, 3)
    return {"model": model.name, "status": status, "reason": reason, "seconds": rounded, "bytes": size, "key": key}


def _for_targets(
    backend: TensorRtBackend, model: Model, place: Place
) -> tuple[str, str, float | None, int | None, str]:
    try:
        built = backend.build(model, place)
    except (BackendError, PackageError) as e:
        return REFUSED, str(e), None, None, ""
    narrowed = f"; one case at a time ({built.narrowed})" if built.narrowed else ""
    return BUILT, f"{NOT_EXECUTED}{narrowed}", built.seconds, len(built.plan), ""


def _for_this_machine(
    backend: TensorRtBackend, model: Model, place: Place
) -> tuple[str, str, float | None, int | None, str]:
    """Opened as the worker opens it, so that what is kept is what it will find."""
    before, begun = set(plans_of(place, model, backend)), time.monotonic()
    try:
        session = backend.open(model, place)
        session.close()
    except (BackendError, PackageError) as e:
        return REFUSED, str(e), None, None, ""
    seconds, after = time.monotonic() - begun, plans_of(place, model, backend)
    new = [key for key in after if key not in before]
    found = (new or list(after))[:1]
    notes = tuple(getattr(session, "notes", ()))
    status = BUILT if new or notes or not found else KEPT  # a plan that was refused is built under its old name
    return status, "; ".join(notes), seconds, after[found[0]] if found else None, found[0] if found else ""


def plans_of(place: Place, model: Model, backend: TensorRtBackend) -> dict[str, int]:
    """Key and bytes of the plans of a graph in the cache. Told, not trusted: the backend checks what it takes."""
    digest, found = hashlib.sha256(model.graphs[backend.precision]).hexdigest(), {}
    for path in sorted(place.plans.glob("*.json")) if place.plans else ():
        try:
            record = json.loads(path.read_text("utf-8"))
            if (record["key"].get("graph"), record["key"].get("library")) == (digest, backend.name):
                found[path.stem] = int(record["plan"]["bytes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged: the backend builds it anew
    return found

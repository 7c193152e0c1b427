"""One engine, resident: its code, its verified package, and sessions that gave the golden answers on this machine.

Loads `engine.py` by its path: no search path is changed, and nothing of the training side is ever imported. Runs in the
child only. Every refusal is a PackageError that names the step; what foreign code raises is the caller's to catch.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from numpy.typing import NDArray

from dicom_node import decide, packages
from dicom_node.engine import Engine, NoSuchModelError, Prediction, Selection, Site
from dicom_node.errors import PackageError, WorkerError
from dicom_node.metrics import Recorder
from dicom_node.packages import ModelPackage, Task
from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError
from dicom_node.result import ClinicalInput, Refusal, Result
from dicom_node.runtime import Session
from dicom_node.runtime.accept import Accepted, accept, check_head
from dicom_node.runtime.onnx import OnnxSession
from dicom_node.study import Study


@dataclass(frozen=True, slots=True)
class Loaded:
    """What stays in memory from job to job."""

    task: Task
    package: ModelPackage
    engine: Engine
    sessions: Mapping[str, Session]
    accepted: tuple[Accepted, ...]
    seconds: float

    def run_model(self, model: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """`engine.RunModel`."""
        session = self.sessions.get(model)
        if session is None:
            raise NoSuchModelError(f"the package has no model {str(model)[:32]!r}")
        return session.run(inputs)

    def about(self) -> dict[str, Any]:
        """Said beside every answer: enough for the provenance of a refusal."""
        m = self.package.manifest
        return {
            "version": m.version,
            "digest": self.package.digest,
            "intended_use": m.intended_use,
            "algorithm": m.algorithm,
        }

    def told(self) -> dict[str, Any]:
        """Said once, when the engine is ready: the acceptance table."""
        table = [asdict(line) for line in self.accepted]
        return {"error": "", **self.about(), "accepted": table, "seconds": round(self.seconds, 3)}

    def select(self, study: Study, clinical: Mapping[str, ClinicalInput], site: Site) -> Selection | Refusal:
        """Headers only. Raises WorkerError when the answer is neither."""
        select: Callable[..., object] = self.engine.select
        asked = {"site": site} if "site" in inspect.signature(select).parameters else {}
        answer = select(study, clinical, **asked)
        if isinstance(answer, Refusal):
            return answer
        if not isinstance(answer, Selection) or not answer.instances:
            raise WorkerError("select returned neither a refusal nor a selection of at least one instance")
        return answer

    def conclude(
        self, route: str, selection: Selection, clinical: Mapping[str, ClinicalInput], spool: Path, recorder: Recorder
    ) -> Result | Refusal:
        """Pixels to Result, through the node's own gates."""
        started = time.monotonic()
        pixels = PixelDecoder()
        try:
            prediction = self.engine.predict(selection, pixels, self.run_model)
        except PixelsUndecodableError as e:
            return e.refusal()
        if isinstance(prediction, Refusal):
            return prediction
        if not isinstance(prediction, Prediction):
            raise WorkerError("predict returned neither a refusal nor a prediction")
        corrected = sorted({note for instance in selection.instances for note in pixels.notes(instance)})
        if corrected:
            prediction = replace(
                prediction, parameters={**prediction.parameters, "pixel data corrected": ", ".join(corrected)}
            )
        session = self.sessions[self.package.manifest.explain.model]
        return decide.conclude(
            route, self.task, self.package, selection, prediction, clinical,
            spool=spool, backend=session.backend, precision=session.precision,
            seconds=time.monotonic() - started, recorder=recorder,
        )  # fmt: skip


def load_engine(
    folder: Path, root: Path, *, require_signature: bool, threads: int, candidate: Path | None = None
) -> Loaded:
    """Task, package (the active one, or a candidate in a folder), code, sessions; every model replays its golden cases.

    Raises PackageError naming the step.
    """
    started = time.monotonic()
    task = packages.load_task(folder)
    if task.missing_libraries:
        raise PackageError(f"not available: install {', '.join(task.missing_libraries)}")
    if candidate is None:
        package = packages.active_package(task, root, require_signature=require_signature)
    else:
        package = packages.package_for(task, candidate, root, require_signature=require_signature)
    packages.check_graphs(package)
    engine = cast(Engine, load_module(folder))
    sessions: dict[str, Session] = {}
    accepted = []
    for name, entry in package.manifest.models.items():
        graph = package.read(f"models/{name}/fp32.onnx")
        session = OnnxSession(name, graph, entry.inputs, entry.outputs, threads=threads)
        accepted.append(accept(name, session, package.golden, entry.tolerance["fp32"], entry.outputs))
        sessions[name] = session
    _check_explained(package)
    return Loaded(task.task, package, engine, sessions, tuple(accepted), time.monotonic() - started)


def _check_explained(package: ModelPackage) -> None:
    """A model that gives no map of its own is explained by head.npz, so that must be its head."""
    name = package.manifest.explain.model
    entry = package.manifest.models[name]
    if "cam" in entry.outputs:
        return
    if not {"logits", "features"} <= set(entry.outputs):
        raise PackageError(f"model {name}: explain.model gives logits and features, or a cam")
    check_head(name, package.golden, package.head_weights, package.head_bias, entry.tolerance["fp32"])


def load_module(folder: Path) -> ModuleType:
    """engine.py by its path. Raises PackageError, and whatever its top level raises besides import errors."""
    spec = importlib.util.spec_from_file_location(f"dicom_node_engine_{folder.name}", folder / "engine.py")
    if spec is None or spec.loader is None:
        raise PackageError(f"{folder.name}: engine.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in engine.py look their module up
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise PackageError(f"{folder.name}: engine.py imports what is not installed: {e.name}") from None
    if not (callable(getattr(module, "select", None)) and callable(getattr(module, "predict", None))):
        raise PackageError(f"{folder.name}: engine.py defines no select and predict")
    return module

"""One engine, resident: its code, its verified package, and sessions that gave the golden answers on this machine.

Loads `engine.py` by its path: no search path is changed, and nothing of the training side is ever imported. Runs in the
child only. Every refusal is a PackageError that names the step; what foreign code raises is the caller's to catch.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from dicom_node import decide, packages
from dicom_node.engine import Engine, Prediction, Selection, Site
from dicom_node.errors import PackageError, WorkerError
from dicom_node.metrics import Recorder
from dicom_node.packages import ModelPackage, Task
from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError
from dicom_node.result import ClinicalInput, Refusal, Result
from dicom_node.runtime import Backend, Model, Place
from dicom_node.runtime.accept import Accepted, Judge, check_head
from dicom_node.runtime.choose import Chosen, Tried, choose, close, replay
from dicom_node.study import Study
from dicom_node.worker.answers import Answers, At, Reference, is_reference, reference_of


class FallenError(Exception):
    """The backend failed where the reference does not: nothing of this run may be used."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What stays in memory from job to job."""

    task: Task
    package: ModelPackage
    engine: Engine
    models: tuple[Model, ...]
    backends: tuple[Backend, ...]
    place: Place
    at: At
    named: bool
    """`infer.runtime` names the backends."""
    chosen: Chosen
    seconds: float
    earlier: frozenset[str] = frozenset()
    """Backends that a child before this one accepted, and that this one did not try."""

    def about(self) -> dict[str, Any]:
        """Said beside every answer: enough for the provenance of a refusal."""
        m = self.package.manifest
        return {
            "version": m.version,
            "digest": self.package.digest,
            "intended_use": m.intended_use,
            "algorithm": m.algorithm,
            "backend": self.chosen.backend,
            "precision": self.chosen.precision,
        }

    def told(self) -> dict[str, Any]:
        """Said when the engine is ready, and when its backend changed: the acceptance table."""
        used = self._used()
        return {
            "error": "",
            **self.about(),
            "library": used.version[:120],
            "accepted": [_line(line) for line in used.lines],
            "tried": [_tried(tried) for tried in self.chosen.tried],
            "seconds": round(self.seconds, 3),
        }

    @property
    def on_reference(self) -> bool:
        """There is nothing to fall back to."""
        return (self.chosen.backend, self.chosen.precision) == _name(reference_of(self.backends))

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
        """Pixels to Result, through the node's own gates. Raises FallenError."""
        started = time.monotonic()
        pixels = PixelDecoder()
        try:
            prediction = self._predict(selection, pixels)
        except PixelsUndecodableError as e:
            return e.refusal()
        if isinstance(prediction, Refusal):
            return prediction
        if not isinstance(prediction, Prediction):
            raise WorkerError("predict returned neither a refusal nor a prediction")
        added = {"acceptance": self._acceptance()}
        if corrected := sorted({note for instance in selection.instances for note in pixels.notes(instance)}):
            added["pixel data corrected"] = ", ".join(corrected)
        prediction = replace(prediction, parameters={**prediction.parameters, **added})
        return decide.conclude(
            route, self.task, self.package, selection, prediction, clinical,
            spool=spool, backend=self.chosen.backend, precision=self.chosen.precision,
            seconds=time.monotonic() - started, recorder=recorder,
        )  # fmt: skip

    def _predict(self, selection: Selection, pixels: PixelDecoder) -> object:
        reference = Reference(reference_of(self.backends), self.models, self.package.golden, self.place)
        run = Answers(self.chosen.sessions, reference, self.at)
        try:
            return self.engine.predict(selection, pixels, run)
        finally:
            if run.failed:  # whatever the engine made of it: a refusal, too, would be from a failed backend
                raise FallenError(run.failed)

    def drifted(self) -> str:
        """Why the sessions in use no longer give the golden answers; "" = they do."""
        self.at(self.chosen.backend)
        try:
            return replay(self.chosen, self.models, self.package.golden, self._explained, self._judge)
        finally:
            self.at("")

    def on_next(self, excluded: Mapping[str, str]) -> Loaded:
        """On the fastest other one that was accepted, here or in the child before. Raises PackageError."""
        self.close()
        started = time.monotonic()
        before = {(tried.backend, tried.precision): tried for tried in self.chosen.tried}
        served = self.earlier | {tried.backend for tried in self.chosen.tried if tried.status == "accepted"}
        left = [b for b in self.backends if is_reference(b) or b.name in served]
        golden, explained = self.package.golden, self._explained
        chosen = choose(
            self.models, golden, explained, self._judge, left, self.place, excluded, self.at, named=self.named
        )
        after = before | {(tried.backend, tried.precision): tried for tried in chosen.tried}
        seconds = time.monotonic() - started
        return replace(self, chosen=replace(chosen, tried=tuple(after.values())), seconds=seconds)

    def close(self) -> None:
        """Free what the device holds."""
        close(self.chosen.backend, self.chosen.sessions, self.at)

    def _used(self) -> Tried:
        name = (self.chosen.backend, self.chosen.precision)
        return next(tried for tried in self.chosen.tried if (tried.backend, tried.precision) == name)

    def _acceptance(self) -> str:
        """One line for the report."""
        used = self._used()
        lines = (f"{a.model} off by {a.worst:.1e} of {a.tolerance:.1e} allowed" for a in used.lines)
        return f"{used.backend} {used.precision} ({used.version}): {', '.join(lines)}"

    @property
    def _explained(self) -> str:
        return self.package.manifest.explain.model

    @property
    def _judge(self) -> Judge:
        return partial(decide.judge, self.task, self.package)


def load_engine(
    folder: Path,
    root: Path,
    backends: tuple[Backend, ...],
    *,
    require_signature: bool,
    place: Place,
    at: At,
    named: bool,
    candidate: Path | None = None,
    excluded: Mapping[str, str] | None = None,
    settled: tuple[str, str] | None = None,
    earlier: frozenset[str] = frozenset(),
) -> Loaded:
    """Task, package (the active one, or a candidate in a folder), code, sessions on the fastest accepted backend.

    Raises PackageError naming the step.
    """
    started = time.monotonic()
    task = packages.load_task(folder)
    if task.missing_libraries:
        raise PackageError(f"not available: install {', '.join(task.missing_libraries)}")
    _import_libraries(task.task)
    if candidate is None:
        package = packages.active_package(task, root, require_signature=require_signature)
    else:
        package = packages.package_for(task, candidate, root, require_signature=require_signature)
    packages.check_graphs(package)
    engine = cast(Engine, load_module(folder))
    models = models_of(package)
    judge, explained = partial(decide.judge, task.task, package), package.manifest.explain.model
    chosen = choose(
        models, package.golden, explained, judge, backends, place, excluded or {}, at, named=named, settled=settled
    )
    seconds = time.monotonic() - started
    loaded = Loaded(task.task, package, engine, models, backends, place, at, named, chosen, seconds, earlier)
    try:
        _check_explained(package)
    except PackageError:
        loaded.close()
        raise
    return loaded


def _line(line: Accepted) -> dict[str, Any]:
    """As `packages.acceptance.Line` has it."""
    return {name: getattr(line, name) for name in ("model", "backend", "precision", "cases", "worst", "tolerance")}


def _tried(tried: Tried) -> dict[str, Any]:
    """As `packages.acceptance.TriedBackend` has it; texts are cut to what it takes."""
    return {
        "backend": tried.backend,
        "precision": tried.precision,
        "version": tried.version[:120],
        "status": tried.status,
        "reason": tried.reason[:400],
        "notes": [note[:400] for note in tried.notes[:8]],
        "lines": [_line(line) for line in tried.lines],
        "load_seconds": tried.load_seconds,
        "milliseconds": tried.milliseconds,
    }


def _import_libraries(task: Task) -> None:
    """Now, so that the first study is as fast as the tenth."""
    for name in task.libraries:
        try:
            importlib.import_module(name)
        except ImportError:
            raise PackageError(f"not available: {name} is installed and cannot be loaded") from None


def models_of(package: ModelPackage) -> tuple[Model, ...]:
    """The networks of a package, as a backend is given them. Raises PackageError."""
    return tuple(_model(package, name) for name in package.manifest.models)


def _model(package: ModelPackage, name: str) -> Model:
    entry, files = package.manifest.models[name], package.manifest.files
    paths = {p: f"models/{name}/{p}.onnx" for p in ("fp32", "fp16") if f"models/{name}/{p}.onnx" in files}
    cases = {i: package.golden.get(f"{name}.{i}") for i in entry.inputs}
    if any(array is None for array in cases.values()):
        raise PackageError(f"golden replay of {name}: golden.npz holds no complete case")
    return Model(
        name=name,
        inputs=entry.inputs,
        outputs=entry.outputs,
        graphs=_Graphs(package, paths),
        digests={precision: files[path].sha256 for precision, path in paths.items()},
        tolerance={str(precision): allowed for precision, allowed in entry.tolerance.items()},
        shapes={i: array.shape[1:] for i, array in cases.items() if array is not None},
    )


class _Graphs(Mapping[str, bytes]):
    """Read and verified each time: hundreds of megabytes that are needed once must not stay in memory."""

    def __init__(self, package: ModelPackage, paths: Mapping[str, str]) -> None:
        self._package, self._paths = package, paths

    def __getitem__(self, precision: str) -> bytes:
        return self._package.read(self._paths[precision])

    def __contains__(self, precision: object) -> bool:
        return precision in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _name(backend: Backend) -> tuple[str, str]:
    return backend.name, backend.precision


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

"""One backend and one engine in a process of their own, timed over a pipe: `-m dicom_node.worker.measure --fd N`.

Started by `engines bench` only, so that memory, first load and a crash are this backend's alone. Loads the engine's
package in use, or the graphs of a preset as the training side exports them; a backend that does not give the golden
answers is not timed. Writes nothing but what a result spools, into a folder of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dicom_node import decide, packages
from dicom_node.engine import Engine, NoSuchModelError, Prediction, Selection, Site
from dicom_node.errors import BackendError, PackageError, WorkerError
from dicom_node.metrics import NullRecorder
from dicom_node.packages import ModelPackage, Task
from dicom_node.pixels.decode import PixelDecoder
from dicom_node.result import Refusal
from dicom_node.runtime import Backend, Model, Place
from dicom_node.runtime.accept import Accepted, accept
from dicom_node.runtime.backends import known
from dicom_node.runtime.guard import Guarded, bound
from dicom_node.store.header import read_stored
from dicom_node.study import Instance, Study
from dicom_node.worker import planning, timing
from dicom_node.worker.engines import load_module, models_of

DEPLOYED = "deploy.json"
"""What `python -m engines.training deploy` writes beside its graphs."""
ACCEPTED, REFUSED = "accepted", "refused"
Golden = Mapping[str, NDArray[Any]]


class Measure:
    """What the child answers."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._passes: timing.Passes | None = None
        self._case: _Case | None = None

    def here(self, question: timing.Question) -> timing.Answer:
        """Can a backend be tried on this machine?"""
        return {"missing": _backend(str(question["backend"]), str(question["precision"])).missing()}

    def open(self, question: timing.Question) -> timing.Answer:
        """Load every model on one backend and hold it to the golden answers."""
        backend = _backend(str(question["backend"]), str(question["precision"]))
        home = packages.load_task(Path(question["task"]))
        graphs = question.get("graphs")
        package = None if graphs else packages.active_package(
            home, Path(question["root"]), require_signature=bool(question["signed"])
        )  # fmt: skip
        models, golden = deployed(Path(graphs)) if graphs else packaged(cast(ModelPackage, package))
        plans = question.get("plans")
        place = Place(int(question["threads"]), plans=Path(plans) if plans else None)
        try:
            sessions, seconds, builds = _opened(models, backend, place, golden)
            lines = [_accepted(model, sessions[model.name], golden) for model in models]
        except (PackageError, BackendError) as e:
            return {"status": REFUSED, "reason": str(e), "version": backend.version()}
        inputs = {m.name: {key: golden[f"{m.name}.{key}"] for key in m.inputs} for m in models}
        self._passes = timing.Passes(sessions, inputs)
        if package is not None:
            self._case = _Case(home.folder, home.task, package, sessions)
        return {
            "status": ACCEPTED, "reason": "", "version": backend.version(), "seconds": seconds,
            "models": {line.model: {"worst": line.worst, "tolerance": line.tolerance} for line in lines},
            "builds": builds,
            **timing.memory(),
        }  # fmt: skip

    def time(self, question: timing.Question) -> timing.Answer:
        """Passes over all models."""
        return {"error": "not open"} if self._passes is None else self._passes(question)

    def case(self, question: timing.Question) -> timing.Answer:
        """Decoded input to result, of one study in files."""
        if self._case is None:
            return {"error": "no package is loaded"}
        paths = [Path(path) for path in question["files"]]
        return self._case.timed(paths, float(question["seconds"]), self._spool)


def _backend(name: str, precision: str) -> Backend:
    """Raises BackendError."""
    for backend in known("auto"):
        if (backend.name, backend.precision) == (name, precision):
            return backend
    raise BackendError("this version has no such backend")


def _opened(
    models: Sequence[Model], backend: Backend, place: Place, golden: Golden
) -> tuple[dict[str, Guarded], float, float | None]:
    """Every model, the seconds of the first load, and those of them that went into plans: what a second load saves."""
    before, begun = _plans(place), time.perf_counter()
    sessions = {model.name: opened(model, backend, place, golden) for model in models}
    first = time.perf_counter() - begun
    if _plans(place) == before:
        return sessions, first, None
    for session in sessions.values():
        session.close()
    begun = time.perf_counter()
    sessions = {model.name: opened(model, backend, place, golden) for model in models}
    return sessions, first, max(0.0, first - (time.perf_counter() - begun))


def _plans(place: Place) -> set[str]:
    return {path.name for path in place.plans.glob("*.plan")} if place.plans is not None else set()


def _accepted(model: Model, session: Guarded, golden: Golden) -> Accepted:
    return accept(model.name, session, golden, model.tolerance[session.precision], model.outputs)


def opened(model: Model, backend: Backend, place: Place, golden: Golden) -> Guarded:
    """As the worker has it. A model without a graph at this precision runs at fp32 on the same backend."""
    if not {backend.precision} <= model.graphs.keys() & model.tolerance.keys():
        backend = _backend(backend.name, "fp32")
    outputs = {name: golden[f"{model.name}.{name}"].shape[1:] for name in model.outputs}
    return Guarded(backend.open(model, place), model, outputs, bound(model, place, backend.name))


# -- graphs


def packaged(package: ModelPackage) -> tuple[Sequence[Model], Golden]:
    """The models of a package."""
    packages.check_graphs(package)
    return models_of(package), package.golden


def deployed(folder: Path) -> tuple[Sequence[Model], Golden]:
    """The graphs of a preset, from a folder that this bench had written itself. Raises PackageError."""
    try:
        about = json.loads((folder / DEPLOYED).read_text("utf-8"))["models"]
        with np.load(io.BytesIO((folder / "golden.npz").read_bytes()), allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
        models = []
        for name, entry in about.items():
            graphs = {p: (folder / "models" / name / f"{p}.onnx").read_bytes() for p in entry["precisions"]}
            digests = {p: hashlib.sha256(graph).hexdigest() for p, graph in graphs.items()}
            shapes = {key: golden[f"{name}.{key}"].shape[1:] for key in entry["inputs"]}
            models.append(
                Model(
                    name, tuple(entry["inputs"]), tuple(entry["outputs"]), graphs, digests, entry["tolerance"], shapes
                )
            )
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise PackageError(f"{folder.name}: no exported graphs ({type(e).__name__})") from None
    return models, golden


# -- decoded input to result


class _Decoded:
    """`engine.PixelReader` that decodes every frame once."""

    def __init__(self) -> None:
        self._decoder = PixelDecoder()
        self._kept: dict[tuple[str, tuple[int, ...] | None], list[NDArray[Any]]] = {}

    def frames(self, instance: Instance, numbers: Sequence[int] | None = None) -> Iterator[NDArray[Any]]:
        key = (instance.instance_id, None if numbers is None else tuple(numbers))
        if key not in self._kept:
            self._kept[key] = list(self._decoder.frames(instance, numbers))
        return iter(self._kept[key])


@dataclass
class _Case:
    folder: Path
    task: Task
    package: ModelPackage
    sessions: Mapping[str, Guarded]

    def timed(self, paths: list[Path], seconds: float, spool: Path) -> timing.Answer:
        """Milliseconds from decoded pixels to the result, and to the first score. Raises WorkerError."""
        engine = cast(Engine, load_module(self.folder))
        instances = [_instance(number, path) for number, path in enumerate(paths, start=1)]
        study = Study.from_instances(instances[0].study_instance_uid, 1, instances)
        asked: Callable[..., object] = engine.select
        site = {"site": Site()} if "site" in inspect.signature(asked).parameters else {}
        selection = asked(study, {}, **site)
        if not isinstance(selection, Selection):
            raise WorkerError(f"select: {selection}")
        pixels, scores = _Decoded(), list[float]()
        explained = self.package.manifest.explain.model

        def once() -> None:
            begun, first = time.perf_counter(), list[float]()

            def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
                session = self.sessions.get(name)
                if session is None:
                    raise NoSuchModelError(f"the package has no model {name[:32]!r}")
                out = session.run(inputs)
                if name == explained and not first:
                    first.append(1000 * (time.perf_counter() - begun))
                return out

            self._conclude(selection, engine.predict(selection, pixels, run), spool, begun)
            scores.extend(first)

        spent = timing.timed(once, seconds)
        return {"ms": [round(ms, 3) for ms in spent], "score_ms": [round(ms, 3) for ms in scores[1:]]}

    def _conclude(self, selection: Selection, said: object, spool: Path, begun: float) -> None:
        """The node's own gates; a phantom that is refused is no measurement."""
        if not isinstance(said, Prediction):
            raise WorkerError(f"predict: {said}")
        session = self.sessions[self.package.manifest.explain.model]
        result = decide.conclude(
            "bench", self.task, self.package, selection, said, {}, spool=spool, backend=session.backend,
            precision=session.precision, seconds=time.perf_counter() - begun, recorder=NullRecorder(),
        )  # fmt: skip
        if isinstance(result, Refusal):
            raise WorkerError(f"refused: {result}")
        for path in spool.glob("*.npy"):
            path.unlink()


def _instance(number: int, path: Path) -> Instance:
    meta, header = read_stored(path)
    return Instance(f"{number:032x}", header, meta.transfer_syntax_uid, "0" * 64, path, "BENCH", "BENCH", "", "", 0.0)


def main() -> None:
    """The child's life."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd = parser.parse_args().fd
    np.seterr(all="ignore")
    with tempfile.TemporaryDirectory(prefix="bench-spool-") as folder:
        child = Measure(Path(folder))
        # Engines are foreign code, and so are the libraries under a backend.
        foreign = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
        timing.serve(
            fd,
            {"here": child.here, "open": child.open, "time": child.time, "case": child.case, "build": planning.build},
            foreign,
        )


if __name__ == "__main__":
    main()

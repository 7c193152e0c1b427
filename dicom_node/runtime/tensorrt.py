"""TensorRT and TensorRT-RTX as backends: plans are built on this machine, for this machine, and kept in its own cache.

    tensorrt_build    ONNX graph → plan        plans    the cache        tensorrt_session    plan → answers

The only file that imports the libraries. Both have the same classes; what differs is asked of the module that is there.
TensorRT-RTX (wheels of the package index) builds for GeForce and RTX GPUs, TensorRT (from NVIDIA) for the others too.
Plans are built and parsed by our tests; neither library was executed on a GPU by us.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Callable
from typing import Any

from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Model, Place, Session, cuda
from dicom_node.runtime.plans import Key, Plans
from dicom_node.runtime.tensorrt_build import (
    SINGLE,
    Batches,
    Built,
    Settings,
    batches_of,
    build_widest,
)
from dicom_node.runtime.tensorrt_session import PlanRefusedError, TensorRtSession

BUILD_SECONDS = 100.0
"""For one plan: less than a worker's patience with one step of loading. `engines build` may take longer."""
OLDEST = {"tensorrt": (10, 16), "tensorrt_rtx": (1, 3)}
OLDEST_SM = (7, 5)
"""Of TensorRT 10.16 and 11; TensorRT-RTX lists its own."""
_TITLE = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRA = {
    "tensorrt": "install dicom-node[tensorrt], which needs NVIDIA's package index",
    "tensorrt_rtx": "install dicom-node[rtx]",
}
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""What importing a binding raises when a shared library or a symbol is missing."""
_SAME = ("kind", "library", "gpu", "graph")
"""A new plan replaces those that are alike in these: of an older version, driver, profile or setting."""


def find_module(name: str) -> Any:
    """The library, whether its front package or its bindings alone are installed. Raises ImportError, OSError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
    return importlib.import_module(f"{name}_bindings")


class TensorRtBackend:
    """One of the two libraries, at one precision: a graph of the package for each, since neither converts one."""

    def __init__(
        self,
        module_name: str,
        precision: str,
        *,
        settings: Settings = Settings(),  # noqa: B008  frozen
        build_seconds: float = BUILD_SECONDS,
        find_module: Callable[[str], Any] = find_module,
        find_cuda: Callable[[], Any] = cuda.find_library,
    ) -> None:
        self.name, self.precision = module_name, precision
        self._settings, self._seconds = settings, build_seconds
        self._find_module, self._find_cuda = find_module, find_cuda

    def missing(self) -> str:
        """Driver, GPU, library, its age: the first that is not as it must be.

        In this order, because the libraries take some hundred megabytes which a node without a GPU should not load.
        """
        try:
            (_, devices), trt = self._devices(), self._library()
            reasons = [_unusable(trt, device) for device in devices]
        except BackendError as e:
            return str(e)
        return "" if "" in reasons else reasons[0]

    def version(self) -> str:
        """Of the library; "" where there is none."""
        try:
            return str(self._library().__version__)
        except BackendError:
            return ""

    def open(self, model: Model, place: Place) -> Session:
        """The plan of the cache, or one that is built now. The first takes seconds, the second perhaps minutes."""
        (library, devices), trt = self._devices(), self._library()
        graph = graph_of(model, self.precision)
        if place.device >= len(devices):
            raise BackendError(f"there is no GPU {place.device}: this machine has {len(devices)}")
        device = devices[place.device]
        if reason := _unusable(trt, device):
            raise BackendError(reason)
        plans = Plans(place.plans)
        try:
            maker = _Maker(trt, model, graph, self._keys(device), plans, self._settings, self._seconds)
            return self._opened(maker, cuda.Gpu(library, device), batches_of(model, place))
        finally:
            plans.close()

    def build(self, model: Model, place: Place) -> Built:
        """A plan for `settings.targets`, where there is no such GPU: for a look at it, never kept or executed."""
        return build_widest(
            self._library(), graph_of(model, self.precision), model, batches_of(model, place), self._settings,
            seconds=self._seconds,
        )  # fmt: skip

    def _opened(self, maker: _Maker, gpu: cuda.Gpu, batches: Batches) -> Session:
        plan, notes = maker.plan(batches), maker.plans.notes
        try:
            session = self._session(maker, gpu, plan)
        except PlanRefusedError as e:
            notes.append(f"plan cache: a plan was refused and is built again ({e})")
            session = self._again(maker, gpu, batches, plan)
        session.notes = (*(f"model {maker.model.name}: {note}" for note in notes), *session.notes)
        return session

    def _again(self, maker: _Maker, gpu: cuda.Gpu, batches: Batches, refused: bytes) -> TensorRtSession:
        try:
            return self._session(maker, gpu, maker.plan(batches, refused))
        except PlanRefusedError:
            maker.forget(batches)
            raise

    def _session(self, maker: _Maker, gpu: cuda.Gpu, plan: bytes) -> TensorRtSession:
        return TensorRtSession(maker.trt, gpu, maker.model, plan, backend=self.name, precision=self.precision)

    def _keys(self, device: cuda.Device) -> dict[str, str]:
        return {
            "library": self.name,
            "version": self.version(),
            "gpu": device.name,
            "sm": "{}.{}".format(*device.sm),
            "multiprocessors": str(device.multiprocessors),
            "driver": device.driver,
        }

    def _library(self) -> Any:
        title = _TITLE[self.name]
        try:
            trt = self._find_module(self.name)
        except ModuleNotFoundError:
            raise BackendError(f"{title} is not installed: {_EXTRA[self.name]}") from None
        except _BROKEN as e:
            raise BackendError(
                f"{title} is installed, but its libraries cannot be loaded ({type(e).__name__})"
            ) from None
        version = str(getattr(trt, "__version__", "0"))
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST[self.name]:
            oldest = ".".join(map(str, OLDEST[self.name]))
            raise BackendError(f"{title} {version} is too old: {oldest} or later is needed")
        return trt

    def _devices(self) -> tuple[Any, tuple[cuda.Device, ...]]:
        try:
            library = self._find_cuda()
        except _BROKEN:
            raise BackendError(f"{_TITLE[self.name]}'s cuda-bindings is not installed: {_EXTRA[self.name]}") from None
        return library, cuda.find_devices(library)


def _unusable(trt: Any, device: cuda.Device) -> str:
    """Why this library does not build for a GPU; "" = it does."""
    known, sm = getattr(trt, "ComputeCapability", None), "SM {}.{}".format(*device.sm)
    if known is None:
        old = device.sm < OLDEST_SM
        return f"{device.name} ({sm}) is too old for TensorRT: SM 7.5 is the oldest" if old else ""
    builds = hasattr(known, "SM{}{}".format(*device.sm))
    return "" if builds else f"TensorRT-RTX {trt.__version__} builds no plans for {device.name} ({sm})"


def graph_of(model: Model, precision: str) -> bytes:
    """The graph whose digest the manifest lists. Raises BackendError where there is none, PackageError."""
    graph = model.graphs.get(precision)
    if graph is None:
        raise BackendError(f"model {model.name}: the package has no {precision} graph")
    if hashlib.sha256(graph).hexdigest() != model.digests.get(precision):
        raise PackageError(f"model {model.name}: its {precision} graph does not have the SHA-256 of the manifest")
    return graph


class _Maker:
    """The plan of one graph, out of the cache or built, at the widest profile that the library makes."""

    def __init__(
        self, trt: Any, model: Model, graph: bytes, machine: dict[str, str], plans: Plans, settings: Settings,
        seconds: float,
    ) -> None:  # fmt: skip
        self.trt, self.model, self.plans = trt, model, plans
        self._graph, self._machine, self._settings, self._seconds = graph, machine, settings, seconds
        self._digest = hashlib.sha256(graph).hexdigest()

    def plan(self, batches: Batches, refused: bytes | None = None) -> bytes:
        """`refused`: what the library did not take; another worker may have built a better one meanwhile."""
        until = time.monotonic() + self._seconds
        keys = [self._key(profile) for profile in dict.fromkeys((batches, SINGLE))]
        with self.plans.lock(keys[0], self._seconds):
            for key in keys:
                plan = self.plans.get(key)
                if plan is not None and plan != refused:
                    return plan
            self.forget(batches)
            return self._built(batches, until - time.monotonic())

    def forget(self, batches: Batches) -> None:
        """Plans that the library does not take."""
        for profile in (batches, SINGLE):
            self.plans.remove(self._key(profile))

    def _built(self, batches: Batches, seconds: float) -> bytes:
        timing_key = Key({"kind": "timing", "settings": str(self._settings), **self._machine})
        with self.plans.lock(timing_key, seconds):  # one for all graphs, and engines load side by side
            timing = self.plans.get(timing_key) or b""
        built = build_widest(self.trt, self._graph, self.model, batches, self._settings, seconds=seconds, timing=timing)
        if built.narrowed:
            self.plans.notes.append(f"its plan takes one case at a time ({built.narrowed})")
        self.plans.put(self._key(SINGLE if built.narrowed else batches), built.plan, _SAME)
        if built.timing and built.timing != timing:
            with self.plans.lock(timing_key, self._seconds):
                self.plans.put(timing_key, built.timing, ("kind", "library", "gpu"))
        return built.plan

    def _key(self, batches: Batches) -> Key:
        shapes = (f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(self.model.shapes.items()))
        profile = "; ".join([str(batches), *shapes])  # a graph may leave sizes open that the golden cases fix
        graph = {"graph": self._digest, "profile": profile, "settings": str(self._settings)}
        return Key({"kind": "plan", **self._machine, **graph})

"""A worker with its folder, its counts and its log, and an engine that does what it is told, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicom_node.config import Config, Engines, Indication, Infer, Route, Store
from dicom_node.config_phases import Rules
from dicom_node.metrics import Metrics
from dicom_node.study import Header, Instance, Study
from dicom_node.worker import Reply, Standing, WorkerClient

# An engine that does what the Series Description of its only image asks for.
ENGINE = """
import ctypes, json, os, sys, time
import numpy as np
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.result import FrameRef, Refusal, RefusalCode

def select(study, clinical, site):
    first = study.instances[0]
    if first.header.text("SeriesDescription") == "refuse":
        return Refusal(RefusalCode.ROI_REQUIRED, "no region")
    if first.header.text("SeriesDescription") == "nothing":
        return None
    said = {k: str(v.value) for k, v in clinical.items()}
    return Selection((first,), "R", parameters=said | {"arterial": str(site.phases.windows["arterial"])})

def _forge(outcome):
    line = json.dumps({"kind": "done", "id": 1, **outcome}).encode() + b"\\n"
    os.write(int(sys.argv[sys.argv.index("--fd") + 1]), line)
    time.sleep(60)

def predict(selection, pixels, run):
    clip = selection.instances[0]
    mode = clip.header.text("SeriesDescription")
    x = np.full((2, 1, 4, 4), 0.5, np.float32)
    region, notes = (0, 0, 7, 7), {}
    if mode == "abort":
        os.abort()
    elif mode == "exit":
        sys.exit(3)
    elif mode == "hang":
        ctypes.PyDLL(None).sleep(600)  # with the interpreter lock held, as a native decoder would
    elif mode == "memory":
        np.ones(8 << 30, np.uint8)
    elif mode == "raise":
        raise RuntimeError("DOE^JANE was here")
    elif mode == "shape":
        x = x[:, :, :2]
    elif mode == "model":
        run("other", {"x": x})
    elif mode == "decode":
        list(pixels.frames(clip))
    elif mode == "none":
        return {"units": []}
    elif mode == "print":
        print("DOE^JANE")
    elif mode == "modules":
        notes = {"modules": " ".join(sorted(sys.modules))}
    elif mode == "numpy":
        region = tuple(np.int64(v) for v in region)
    elif mode == "traversal":
        _forge({"outcome": "RESULT", "result": json.load(open(selection.parameters["forged"]))})
    elif mode == "garbage":
        _forge({"outcome": "ALL IS WELL"})
    elif mode == "flood":
        channel = int(sys.argv[sys.argv.index("--fd") + 1])
        while True:
            os.write(channel, b"x" * 65536)
    elif mode == "swallow":
        try:
            run("classifier", {"x": x})
        except Exception:
            return Refusal(RefusalCode.ROI_REQUIRED, "swallowed")
    out = run("classifier", {"x": x})
    logits = out["logits"].mean(axis=0)
    if mode == "nan":
        logits = logits * np.nan
    refs = tuple(FrameRef("1.2", clip.sop_instance_uid, n, 2) for n in (1, 2))
    frames = np.zeros((2, 8, 8), np.uint8)
    return Prediction((UnitPrediction("Lesion 1", logits, out["features"], frames, refs, region),), notes)
"""


@dataclass
class Job:
    """What the infer stage would claim."""

    id: int = 1
    payload: dict[str, Any] = field(default_factory=dict)


def study(mode: str = "ok", path: Path = Path("absent.dcm")) -> Study:
    header = Header.from_json(
        {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "SOPInstanceUID": "1.2.5", "SOPClassUID": "1.2",
         "Modality": "US", "SeriesDescription": mode}
    )  # fmt: skip
    return Study.from_instances("1.2.3", 1, [Instance("0" * 32, header, "", "a" * 64, path, "", "", "", "", 0.0)])


def route(engine: str = "tiny") -> Route:
    return Route(name="tiny-route", when={"modality": "US"}, indication=Indication(any=({"roi": True},)), engine=engine)


@dataclass
class Lines:
    """A log that keeps its lines."""

    said: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def info(self, event: str, **fields: Any) -> None:
        self.said.append((event, fields))

    error = warning = debug = info

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.said if name == event]


class Bench:
    """A worker with its folder, its counts and its log."""

    def __init__(
        self, folder: Path, tasks: tuple[str, ...] = ("tiny",), module: str = "dicom_node.worker", **infer: Any
    ) -> None:
        self.root, self.metrics, self.log = folder / "root", Metrics(), Lines()
        self.config = config = Config(
            engines=Engines(path=(folder / "engines",)),
            store=Store(root=self.root),
            infer=Infer(**{"memory_gb": 2} | infer),
            phases=Rules(windows={"arterial": (18, 45)}),
        )
        self.said: list[str] = []
        self.kept: list[dict[str, Any]] = []
        self.standing = Standing(
            config.infer.runtime,
            self.log,  # type: ignore[arg-type]
            self.metrics,
            changed=self.said.append,
            keep=lambda table: self.kept.append(dict(table)),
        )
        self.tasks, self.module = tasks, module
        self.client = self.worker(0)

    def worker(self, number: int) -> WorkerClient:
        """One of the workers of this node."""
        return WorkerClient(
            self.config,
            self.tasks,
            self.log,
            self.metrics,
            self.standing,
            number=number,
            module=self.module,  # type: ignore[arg-type]
        )

    def run(self, mode: str = "ok", *, timeout: float = 30, engine: str = "tiny", **how: Any) -> Reply:
        previous, clinical = how.pop("previous", None), how.pop("clinical", ())
        return self.client.run(Job(), route(engine), study(mode, **how), previous, clinical, timeout=timeout)

    def restarts(self, reason: str) -> float:
        return self.metrics.value("dicom_node_worker_restarts_total", reason=reason)

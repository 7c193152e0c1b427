"""Backends for tests: one that answers as the tiny graph does until told to lie; the shipped packages as models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_engine
from numpy.typing import NDArray

from dicom_node.packages import Manifest, ModelPackage
from dicom_node.runtime import Model, Place, Session

ENGINES = Path(__file__).parents[2] / "engines"
SHIPPED = sorted(path.parent.name for path in ENGINES.glob("*/model"))
Arrays = Mapping[str, NDArray[Any]]
Answer = Callable[[Arrays], dict[str, NDArray[Any]]]


def truth(inputs: Arrays) -> dict[str, NDArray[Any]]:
    """What the tiny graph answers."""
    logits, features = tiny_engine.answers(inputs["x"])
    return {"logits": logits, "features": features}


class ToldBackend:
    """A backend that answers what `answer` says, after `seconds`; counts what is open."""

    def __init__(
        self,
        name: str = "told",
        precision: str = "fp32",
        answer: Answer = truth,
        *,
        missing: str = "",
        seconds: float = 0.0,
        pause: Callable[[float], object] = time.sleep,
        opening: Callable[[], object] | None = None,
        closing: Callable[[], object] = lambda: None,
    ) -> None:
        self.name, self.precision, self._missing, self._answer = name, precision, missing, answer
        self._pause, self._opening, self.closing = partial(pause, seconds), opening, closing
        self.open_now, self.opened = 0, 0
        self.notes: tuple[str, ...] = ()

    def missing(self) -> str:
        return self._missing

    def version(self) -> str:
        return "1.0"

    def open(self, model: Model, place: Place) -> Session:
        if self._opening is not None:
            self._opening()
        self.open_now, self.opened = self.open_now + 1, self.opened + 1
        return _ToldSession(self, self._answer, self._pause)


class _ToldSession:
    def __init__(self, owner: ToldBackend, answer: Answer, pause: Callable[[], object]) -> None:
        self.backend, self.precision, self.notes = owner.name, owner.precision, owner.notes
        self._owner, self._answer, self._pause = owner, answer, pause

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self._pause()
        return self._answer(inputs)

    def close(self) -> None:
        self._owner.open_now -= 1
        self._owner.closing()


def tiny_model(**changes: Any) -> Model:
    """The tiny graph as a backend is given it."""
    about: dict[str, Any] = {
        "name": "classifier", "inputs": ("x",), "outputs": ("logits", "features"), "digests": {},
        "graphs": {"fp32": tiny_engine.GRAPH.read_bytes()}, "tolerance": {"fp32": 1e-3}, "shapes": {"x": (1, 4, 4)},
    }  # fmt: skip
    return Model(**(about | changes))


def tiny_judge(outputs: Arrays) -> tuple[tuple[object, ...], ...]:
    """HIGH or LOW by the larger logit."""
    return tuple(("HIGH" if row[1] >= row[0] else "LOW", float(row[1])) for row in outputs["logits"])


def models_of(package: ModelPackage) -> list[Model]:
    """All models of a package, with every graph that has a tolerance."""
    return [
        Model(
            name, entry.inputs, entry.outputs,
            {p: package.read(f"models/{name}/{p}.onnx") for p in entry.tolerance}, {}, dict(entry.tolerance),
            {i: package.golden[f"{name}.{i}"].shape[1:] for i in entry.inputs},
        )
        for name, entry in package.manifest.models.items()
    ]  # fmt: skip


def judge_of(package: ModelPackage) -> Callable[[Arrays], tuple[tuple[object, ...], ...]]:
    """By the thresholds of the manifest, as decide.py would: a golden case is a unit."""
    return partial(_judge, package, package.manifest)


def _judge(package: ModelPackage, manifest: Manifest, outputs: Arrays) -> tuple[tuple[object, ...], ...]:
    positive, band = manifest.classes.index(manifest.positive), manifest.decision.abstain
    verdicts = []
    for logits, features in zip(outputs["logits"], outputs["features"], strict=True):
        odds = np.exp((logits - logits.max()).astype(float) / manifest.calibration.T)
        p = float(odds[positive] / odds.sum())
        centred = features.reshape(len(features), -1).mean(axis=1, dtype=float) - package.ood_mean
        inside = bool(centred @ package.ood_precision @ centred <= manifest.ood.limit)
        said = "INDET" if band.lower <= p <= band.upper else "HIGH" if p >= manifest.decision.threshold else "LOW"
        verdicts.append((said, inside, p))
    return tuple(verdicts)

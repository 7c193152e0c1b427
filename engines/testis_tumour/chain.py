"""The whole score of a package in one call: picture and region to super-resolution, radiomics, logits. onnxruntime.

What `engine.predict` does between `prepare` and the node's gates, for evaluation on cohorts. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.testis_tumour import engine
from engines.training.evaluate import Graph


@dataclass(frozen=True)
class Chain(Graph):
    """`session` is the graph "radiomics"; inputs are (n, 2, 128, 128): grey and share inside the region, 0..255."""

    superres: onnxruntime.InferenceSession
    known: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Features of inputs that were seen before: every cohort is asked for more than once."""

    @classmethod
    def of(cls, path: Path) -> Chain:
        """Of a package folder."""
        from engines.training.export import session

        return cls(session(path / "models/radiomics/fp32.onnx"), session(path / "models/superres/fp32.onnx"))

    def model(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """`dicom_node.engine.RunModel`."""
        session = {"superres": self.superres, "radiomics": self.session}[name]
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def run(self, x: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """All outputs of the score."""
        return dict(self.model("radiomics", {"x": self.features(x)}))

    def features(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """(n, len(FEATURES))."""
        return np.stack([self._features(one) for one in x])

    def fine(self, one: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Super-resolved picture and its region, of one input (2, H, W)."""
        return engine.superresolve(prepared(one), self.model)

    def map(self, one: NDArray[Any]) -> NDArray[np.float32]:
        """Sensitivity map of one input."""
        fine, inside = self.fine(one)
        margin = engine.margins(self.run(one[None])["logits"])[0]
        return engine.sensitivity(fine, inside, float(margin), self.model)

    def _features(self, one: NDArray[Any]) -> NDArray[np.float32]:
        key = hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest()
        if key not in self.known:
            fine, inside = self.fine(one)
            self.known[key] = engine.features(fine[None], inside)[0]
        return self.known[key]


def prepared(one: NDArray[Any]) -> engine.Prepared:
    """An input of a cohort as the engine has it. Without a usable region (a corrupted input): the middle."""
    grey, share = (np.clip(np.rint(c), 0, 255).astype(np.uint8) for c in np.asarray(one, np.float32))
    if (share > 127).sum() < engine.MIN_CELLS:
        share = middle(grey.shape)
    return engine.Prepared(
        grey, share, grey, (0, 0, grey.shape[1] - 1, grey.shape[0] - 1), (slice(None), slice(None)), (0, 0)
    )


def middle(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A disc of half the width: the region of a picture that has none."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    away = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2)
    return np.where(away < min(shape) / 4, 255, 0).astype(np.uint8)

"""The one extension point: what an engine is given and what it returns. No I/O.

An engine is a folder `engines/<task>/` with `engine.yaml` (what the task needs and says) and `engine.py`, which defines

    def select(study, clinical) -> Selection | Refusal            # headers only
    def predict(selection, pixels, run) -> Prediction | Refusal

Both are plain module functions (the module satisfies `Engine`). A `select` with a third parameter `site` is given what
config.yaml sets for engines. The node, outside the engine, applies the out-of-distribution gate, calibration,
abstention, the analytic class activation map and provenance (`decide.py`), so no engine can skip them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dicom_node.errors import NoSuchModelError as NoSuchModelError  # engines catch it
from dicom_node.pixels.dynamic_model import Rules
from dicom_node.result import ClinicalInput, FrameRef, Refusal
from dicom_node.study import Instance, Study

RunModel: TypeAlias = Callable[[str, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""run("classifier", {"x": array}) -> {"logits": …, "features": …}, on whatever backend was accepted.
Raises NoSuchModelError for a name that the package does not hold."""


@dataclass(frozen=True, slots=True)
class Site:
    """What config.yaml sets for the engines. What an engine uses of it belongs into its selection's `extra`, so that
    it counts in the input digest."""

    phases: Rules = field(default_factory=Rules)
    """For `pixels.dynamic.plan`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The source set the engine wants to see, from headers alone."""

    instances: tuple[Instance, ...]
    laterality: str
    """"R", "L", "B", or "" = unknown or unpaired."""
    laterality_note: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """How the selection was made; goes into the SR's algorithm parameters."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever `select` wants to hand to `predict` (plain values; part of the input digest)."""


@dataclass(frozen=True, slots=True)
class UnitPrediction:
    """The network's raw output for one unit of result (patient, lesion, clip or testis)."""

    tracking_identifier: str
    logits: NDArray[np.float32]
    """(K,), pooled over the frames as the manifest says; not calibrated."""
    feature_maps: NDArray[np.float32]
    """Last feature maps, which the node's OOD gate and class activation map read: (n, C, h, w), one for each frame, or
    (1, C, d, h, w), one volume whose depth spans the n frames. Where the engine gives `cam`, (m, C, ...) of any m."""
    frames: NDArray[np.uint8]
    """(n, H, W) or (n, H, W, 3): the cropped source frames, for display under the map."""
    frame_refs: tuple[FrameRef, ...]
    """Length n >= 1."""
    region: tuple[int, int, int, int]
    """x0, y0, x1, y1 (inclusive) of the crop in the source frame."""
    cam: NDArray[np.float32] | None = None
    """(n, h, w) signed map towards the positive class, where the head is not linear; None: the node makes it."""
    laterality: str = ""
    laterality_note: str = ""
    roi_source: str = "none"
    frame_time_ms: float | None = None
    heatmap: bool = True
    """False for a unit that sums up others (both testes): their frames, no picture of its own."""
    notes: tuple[str, ...] = ()
    """For the reader of the report; free of PHI."""

    def __post_init__(self) -> None:
        n = len(self.frame_refs)
        if self.logits.ndim != 1 or not n or (self.cam is None and self.feature_maps.shape[0] not in (1, n)):
            raise ValueError(
                f"{self.tracking_identifier}: logits (K,), n >= 1 frames, feature_maps (n, C, h, w) or (1, C, d, h, w)"
            )
        if self.heatmap and self.frames.shape[0] != n:
            raise ValueError(f"{self.tracking_identifier}: frames (n, …) needed")
        for array in (self.logits, self.feature_maps, self.frames, *(() if self.cam is None else (self.cam,))):
            array.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What `predict` returns: one or more units, and what to write beside them."""

    units: tuple[UnitPrediction, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)


class PixelReader(Protocol):
    """Lazy access to decoded pixels; implemented in `pixels/decode.py`, runs in the worker under a memory limit."""

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[NDArray[Any]]:
        """Decoded frames (H, W) or (H, W, 3) RGB, in order; `numbers` count from 1; None = all.

        Raises `PixelsUndecodableError` (pixels), which the node turns into REFUSED(PIXELS_UNDECODABLE).
        """


class Engine(Protocol):
    """`engines/<task>/engine.py`."""

    def select(self, study: Study, clinical: Mapping[str, ClinicalInput]) -> Selection | Refusal:
        """Choose the source set from headers."""

    def predict(self, selection: Selection, pixels: PixelReader, run: RunModel) -> Prediction | Refusal:
        """Decode, prepare, run the models."""

"""Contrast phases as values: what a frame says of itself, a phase, a plan, a stack, and the rules of a site. No I/O.

dynamic_frames   headers → Frames that can be part of a dynamic series     dynamic_split    Frames → phases, in order
dynamic_names    what the phases are called, seconds after injection       dynamic          plan, choose, load
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicom_node.config_phases import ARTERIAL, DELAYED, HEPATOBILIARY, ORDER, PORTAL, PRE, Rules
from dicom_node.pixels.geometry import Grid
from dicom_node.pixels.roi_model import Plane
from dicom_node.result import FrameRef
from dicom_node.study import Instance

__all__ = [
    "ARTERIAL", "DELAYED", "HEPATOBILIARY", "ORDER", "PORTAL", "PRE", "Frame", "PhasePlan", "Plan", "Rules", "Stack",
    "own_rules",
]  # fmt: skip


def own_rules(rules: Rules) -> str:
    """What a site has set otherwise than it is shipped, for the report; "" = nothing."""
    usual = Rules()
    said = [
        f"{name} {rules.windows[name][0]:g} to {rules.windows[name][1]:g} s"
        for name in ORDER
        if rules.windows[name] != usual.windows[name]
    ]
    said += [f"{name} also called {', '.join(rules.words[name])}" for name in ORDER if rules.words.get(name)]
    for text, mine, shipped in (
        ("arm to liver {:g} s", rules.arm_to_liver_seconds, usual.arm_to_liver_seconds),
        ("{} slices at least", rules.minimum_slices, usual.minimum_slices),
        ("TR under {:g} ms", rules.maximum_tr_ms, usual.maximum_tr_ms),
    ):
        if mine != shipped:
            said.append(text.format(mine))
    return "; ".join(said)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame and everything its headers say that the phases are told apart by."""

    instance: Instance
    number: int
    plane: Plane | None
    rows: int
    columns: int
    part: str
    """Of a Dixon acquisition: "water", "fat", "in", "opposed"; "" = not one."""
    original: bool
    """Image Type value 1 is ORIGINAL, or the frame is the water image computed from a Dixon acquisition."""
    echo_number: int | None
    echo_ms: float | None
    keys: Mapping[str, float]
    """Attribute → value that may tell the phases apart; absent ones left out."""
    clock: float | None
    """Acquisition, seconds on a scale that goes on over midnight where the dates do."""
    zone: float | None
    """Seconds east of UTC, where said."""
    offsets: Mapping[str, float]
    """Attribute → seconds from a start that is the same in all phases of the series."""
    label: str
    """Contrast/Bolus Agent Phase (0018,9344)."""
    administered: str
    """Contrast/Bolus Agent Administered (0018,9342): YES, NO or ""."""
    slope: float
    intercept: float
    private_scale: float | None
    """Philips scale slope (2005,100E)."""
    stored_as: tuple[int, int, int]
    """Bits Allocated, Bits Stored, Pixel Representation."""
    written_spacing_mm: float | None
    """Spacing Between Slices (0018,0088): compared with the positions, never used."""

    @property
    def frame_of_reference(self) -> str:
        return self.instance.header.text("FrameOfReferenceUID")

    @property
    def series(self) -> str:
        return self.instance.series_instance_uid

    @property
    def ref(self) -> FrameRef:
        i = self.instance
        return FrameRef(i.sop_class_uid, i.sop_instance_uid, self.number, i.number_of_frames)


@dataclass(frozen=True, slots=True, eq=False)
class PhasePlan:
    """One phase: its frames in order along the normal, and where they lie."""

    name: str
    named_by: str
    """description | attribute | time | "" = not named."""
    seconds: float
    """From the first phase, or after the injection where the plan's notes say so; nan = unknown."""
    grid: Grid
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the phases of a study are stacked; from headers alone."""

    phases: tuple[PhasePlan, ...]
    rule: str
    """The encoding that was recognised, for example "series per phase"."""
    reference: int
    """Index of the phase on whose grid the others are laid."""
    frame_of_reference: str
    notes: Mapping[str, str]
    """For the report's algorithm parameters; free of PHI."""
    private_scale: bool = False
    """Values are Philips' floating-point values, because the rescaled ones are not comparable between the phases."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.phases)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Everything the stack is made of, each once, in order of the phases."""
        return tuple({f.instance.instance_id: f.instance for p in self.phases for f in p.frames}.values())


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The phases as one array on one grid."""

    volume: NDArray[np.float32]
    """(P, D, H, W), read-only, slope and intercept applied."""
    phases: tuple[str, ...]
    times: tuple[float, ...]
    """Seconds from the first phase, or after the injection where known; nan = unknown."""
    affine: NDArray[np.float64]
    """(4, 4): voxel (column, row, slice, 1) → mm in the patient (LPS)."""
    rule: str
    frames: tuple[tuple[FrameRef, ...], ...]
    """For each phase and slice where its voxels come from; the nearest slice where the phase was resampled."""
    frame_of_reference: str
    notes: Mapping[str, str]

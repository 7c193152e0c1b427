"""Arms of this task's comparisons: the clip or its middle frame; with calcification attention or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.thyroid_cine import engine
from engines.training.compare import Inputs, Margins, Question, Trio, network_arm, settings_of, with_inputs
from engines.training.recipe import Run

MIDDLE = engine.FRAMES // 2


def arm(run: Run, question: Question, name: str, seed: int, units: Trio, folder: Path) -> Margins:
    """`engines.training.compare.Arm`."""
    if name == "middle frame":
        units = with_inputs(units, _still)
    preset = {"clip": "nano", "middle frame": "nano", "no attention": "nano-plain"}[name]
    return network_arm(run, preset, settings_of(run, question, seed), units, folder)


def _still(x: Inputs, place: Inputs) -> tuple[Inputs, Inputs]:
    """The frame through the largest section, as often as a clip has frames: the same network sees no time."""
    cell = MIDDLE * place.shape[1] // engine.FRAMES
    frame, where = x[:, :, :, MIDDLE : MIDDLE + 1], place[:, cell : cell + 1]
    return np.repeat(frame, x.shape[3], axis=3), np.repeat(where, place.shape[1], axis=1)

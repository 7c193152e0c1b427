"""Arms of this task's comparisons: all phases or one; pre-trained or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engines.liver_dce.network import PHASES
from engines.liver_dce.recipe import pairs
from engines.training import fit, pretrain
from engines.training.compare import Inputs, Margins, Question, Trio, network_arm, with_inputs
from engines.training.recipe import Run

SINGLE = ("before contrast", "arterial", "portal venous", "delayed")
"""In the order of the input's channels."""


def arm(run: Run, question: Question, name: str, seed: int, units: Trio, folder: Path) -> Margins:
    """`engines.training.compare.Arm`."""
    settings = fit.Settings(
        **{k: v for k, v in question.settings.items() if k != "pretraining"},
        seed=seed, threads=run.threads, device=run.device,
    )  # fmt: skip
    if name in SINGLE:
        units = with_inputs(units, _only(SINGLE.index(name)))
    if name == "pre-trained" and not (folder / "state.json").is_file():
        _pretrained(run, question.settings["pretraining"], settings, units, folder)
    return network_arm(run, "nano", settings, units, folder)


def _only(phase: int) -> Callable[[Inputs, Inputs], tuple[Inputs, Inputs]]:
    """This phase in the place of every other, so that the same network sees one phase."""

    def change(x: Inputs, place: Inputs) -> tuple[Inputs, Inputs]:
        one = np.repeat(x[:, :, phase : phase + 1], PHASES, axis=2)
        return np.concatenate([one, x[:, :, PHASES:]], axis=2), place

    return change


def _pretrained(run: Run, how: dict[str, Any], settings: fit.Settings, units: Trio, folder: Path) -> None:
    """The same first weights as without, the encoder then trained on the images of all training units."""
    fit.deterministic(settings.seed, run.threads)
    network: Any = run.recipe.network("nano")
    stage = pretrain.Settings(**how, seed=settings.seed, threads=run.threads, device=run.device)
    pretrain.pretrain(network.encoder, pairs(units.unlabelled.frames()[0]), stage, folder / "pretraining")
    pretrain.begin(network, settings, folder)

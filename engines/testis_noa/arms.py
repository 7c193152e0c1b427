"""Arms of this task's comparisons: the image alone, the clinical values alone, and the nomogram of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.testis_noa.recipe import TERMS, folds, temperature
from engines.training import fit, fusion
from engines.training.cohort import Cohort
from engines.training.compare import Margins, Question, Trio, network_arm, settings_of
from engines.training.recipe import Run
from engines.training.stats import Array

FOLDS = 2


def arm(run: Run, question: Question, name: str, seed: int, units: Trio, folder: Path) -> Margins:
    """`engines.training.compare.Arm`."""
    if name == "clinical values":
        return _clinical(units)
    settings, home = settings_of(run, question, seed), folder.with_name("network")
    image = network_arm(run, "nano", settings, units, home)
    return image if name == "image" else _nomogram(run, settings, units, image, home)


def _clinical(units: Trio) -> Margins:
    """Logistic regression on the values as the nomogram takes them."""

    def design(part: Cohort) -> Array:
        columns = [
            np.log(v) if term.transform == "log" else v for term, v in zip(TERMS, part.covariates.T, strict=True)
        ]
        return np.column_stack([np.ones(len(part.y)), *columns])

    beta, _ = fusion.logistic(design(units.train), units.train.y)
    return Margins(*(design(part) @ beta for part in (units.validation, units.test)))


def _nomogram(run: Run, settings: fit.Settings, units: Trio, image: Margins, home: Path) -> Margins:
    """As the recipe fits it: on log-odds out of fold, each network calibrated on validation."""
    train, held = units.train, units.validation
    fold, margin = folds(train, FOLDS), np.zeros(len(units.train.y))
    for k in range(FOLDS):
        out, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        model = fit.fit(run.task, "nano", settings, train.part(rest), train.part(out), home / f"fold-{k}")
        own = fit.clip_margins(model, held, run.device)
        margin[out] = fit.clip_margins(model, train.part(out), run.device) / temperature(held.y, own)
    spec = fusion.fit_fusion(margin, train.covariates, train.y, TERMS)
    scale = temperature(held.y, image.validation)
    fused = [
        fusion.probabilities(spec, said / scale, part.covariates)
        for said, part in ((image.validation, held), (image.test, units.test))
    ]
    return Margins(*(np.log(p / (1 - p)) for p in fused))

"""Arms of this task's comparisons: the picture super-resolved, interpolated or as acquired; and with blood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.testis_tumour import engine, phantom, samples
from engines.testis_tumour.measure import Table, plain_features
from engines.testis_tumour.recipe import TRANSFORMS, table_of
from engines.training import fusion, signature, superres
from engines.training.cohort import Cohort
from engines.training.compare import Margins, Question, Trio
from engines.training.recipe import Run

SUPER = "super-resolution"
PAIRS_FROM = 530_000
"""First seed of the pairs that super-resolution is trained on; in no cohort."""


def arm(run: Run, question: Question, name: str, seed: int, units: Trio, folder: Path) -> Margins:
    """`engines.training.compare.Arm`."""
    kind = {"radiomics": SUPER, "clinical-radiomics": SUPER}.get(name, name)
    tables = _tables(run, question, kind, seed, units, folder.with_name(kind))
    chosen = signature.select(tables[0], units.train.y, engine.FEATURES, seed)
    margins = Margins(*(chosen.margin(table.astype(np.float64)) for table in tables[1:]))
    return _fused(run, seed, units, tables[0], margins) if name == "clinical-radiomics" else margins


def _tables(
    run: Run, question: Question, kind: str, seed: int, units: Trio, folder: Path
) -> tuple[Table, Table, Table]:
    """Features of training, validation and test units; kept, since two questions ask for the same."""
    path = folder / "features.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = [part.x[:, 0] for part in units[:3]]
        model = _superres(run, question, seed, folder) if kind == SUPER else None
        made = [plain_features(x, kind) if model is None else table_of(x, model) for x in parts]
        np.savez(path, allow_pickle=False, train=made[0], validation=made[1], test=made[2])
    with np.load(path, allow_pickle=False) as kept:
        return kept["train"], kept["validation"], kept["test"]


def _superres(run: Run, question: Question, seed: int, folder: Path) -> Any:
    """A network of its own for every seed, as `engine.superresolve` calls it."""
    how = dict(question.settings)
    difficulty = phantom.generator(run.plan["comparisons"]["cohorts"]["train"]["generator"])
    pairs = samples.pairs_of(PAIRS_FROM, how.pop("pairs"), difficulty)
    settings = superres.Settings(**how, seed=seed, threads=run.threads, device=run.device)
    network = superres.fit(run.recipe.network("demo"), settings, pairs, folder).cpu()

    def model(_name: str, inputs: Any) -> dict[str, NDArray[np.float32]]:
        with torch.no_grad():
            return {"y": network(torch.from_numpy(inputs["x"])).numpy()}

    return model


def _fused(run: Run, seed: int, units: Trio, table: Table, margins: Margins) -> Margins:
    """As the recipe fits it: on log-odds of signatures selected and weighed without the man they are of."""
    own = signature.cross_fitted(table, units.train.y, engine.FEATURES, seed)
    terms = [fusion.Term(name, TRANSFORMS[name]) for name in run.recipe.covariates]  # type: ignore[arg-type]
    spec = fusion.fit_fusion(own, units.train.covariates, units.train.y, terms)

    def said(margin: NDArray[np.float64], part: Cohort) -> NDArray[np.float64]:
        p = fusion.probabilities(spec, margin, part.covariates)
        return np.asarray(np.log(p / (1 - p)), np.float64)

    return Margins(said(margins.validation, units.validation), said(margins.test, units.test))

"""Gates against fooling ourselves: labels that mean nothing, and weights that know nothing.

Permuted labels: the same training on shuffled labels must not find anything (DeLong 99 % interval holds 0.5).
Weight randomisation (Adebayo et al. 2018): a map that looks the same with random weights explains the image, not the
model; structural similarity of the two must be below 0.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.training import fit, stats
from engines.training.cohort import Cohort
from engines.training.package import activation_map
from engines.training.recipe import Run

UNITS = 30


def examine(run: Run) -> dict[str, Any]:
    """Both gates, where the recipe's network is of the plain kind and was fitted here."""
    found: dict[str, Any] = {}
    if run.recipe.plain and "gate" in run.plan["presets"]:
        found["permuted_labels"] = permuted(run).to_json()
    if run.recipe.plain and (run.checkpoint / "weights.safetensors").is_file():
        found["random_weights_ssim"] = random_weights(run)
    return found


def permuted(run: Run) -> stats.Interval:
    """AUC on true labels of the test cohort after the nano network was fitted to permuted ones; DeLong 99 %."""
    train, test = run.cohort("train"), run.cohort("test")
    rng = np.random.default_rng(0)
    shuffled = replace(train, y=rng.permutation(train.y), place=np.zeros_like(train.place))
    settings = fit.Settings(**run.plan["presets"]["gate"], threads=run.threads, device=run.device)
    folder = run.work / f"{run.task}-gate"
    model = fit.fit(run.task, "nano", settings, shuffled, test.part(np.arange(min(100, len(test.y)))), folder)
    return stats.delong(test.y, fit.clip_margins(model, test, run.device), 0.99)


def random_weights(run: Run) -> float:
    """Mean structural similarity of the maps of the fitted network and of one with random weights."""
    test = run.cohort("test")
    positives = test.part(np.flatnonzero(test.y == 1)[:UNITS])
    fitted = fit.load(run.task, run.preset, run.checkpoint)
    torch.manual_seed(1)
    random = run.recipe.network(run.preset).eval()
    similar = [ssim(a, b) for a, b in zip(_maps(fitted, positives), _maps(random, positives), strict=True)]
    return round(float(np.mean(similar)), 3)


def _maps(model: Any, cohort: Cohort) -> NDArray[np.float32]:
    """(n, *grid) of the last input of each unit."""
    with torch.no_grad():
        out = model(torch.from_numpy(cohort.x[:, 0].astype(np.float32)))
    if len(out) > 2:  # the graph's own map
        return np.asarray(out[2].numpy(), np.float32)
    return activation_map(out[1].numpy(), model.full_head()[0].numpy(), 1)


def ssim(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Structural similarity of two maps, each brought to zero mean and unit variance."""
    from monai.losses.ssim_loss import SSIMLoss

    def standard(values: NDArray[np.float32]) -> torch.Tensor:
        flat = values - values.mean()
        return torch.from_numpy(flat / max(float(flat.std()), 1e-9))[None, None]

    a, b = standard(first), standard(second)
    window = min(5, *(n if n % 2 else n - 1 for n in a.shape[2:]))
    loss = SSIMLoss(spatial_dims=a.ndim - 2, data_range=6.0, win_size=max(window, 1))
    return 1 - float(loss(a, b))

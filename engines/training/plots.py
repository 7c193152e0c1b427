"""ROC and reliability plots of an evaluation, as PNG. Draws, computes nothing new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.training import stats

BINS = 10


def draw(folder: Path, y: stats.Labels, probability: stats.Array, figures: Mapping[str, Any]) -> None:
    """`roc.png` and `reliability.png` in the folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(figure: Any, axes: Any, title: str, x: str, y_: str, name: str) -> None:
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        axes.set(title=title, xlabel=x, ylabel=y_, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=110)

    folder.mkdir(parents=True, exist_ok=True)
    auc = figures["auc"]
    low, high = auc["ci95"]
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    false, true = roc(y, probability)
    axes.step(false, true, where="post")
    title = f"n = {len(y)}\nAUC {auc['value']:.3f} (95 % DeLong {low:.3f} to {high:.3f})"
    save(figure, axes, title, "1 - specificity", "sensitivity", "roc.png")

    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for part in np.array_split(np.argsort(probability, kind="stable"), BINS):
        share = stats.proportion(int(y[part].sum()), len(part))
        bars = [[share.value - share.low], [share.high - share.value]]
        axes.errorbar(probability[part].mean(), share.value, bars, fmt="o", color="C0", capsize=3)
    title = f"Reliability, {BINS} equally filled bins, Wilson 95 %\nECE {figures['ece']}, Brier {figures['brier']}"
    save(figure, axes, title, "predicted probability", "observed share", "reliability.png")


def roc(y: stats.Labels, score: stats.Array) -> tuple[stats.Array, stats.Array]:
    """(1 - specificity, sensitivity) at every threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(y) - 1)
    hits, misses = np.cumsum(y[order] == 1)[last], np.cumsum(y[order] == 0)[last]
    return np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])

"""What is measured of a package of this task beside the common figures: the map, the gates, and what resolution brings.

Every number is of unseen seeds. Comparisons fall as they fall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engines.testis_tumour import engine
from engines.testis_tumour.chain import Chain, prepared
from engines.training import signature, stats
from engines.training.cohort import Cohort
from engines.training.recipe import Run

MAPS = 40
REACH = 2
"""Cells of 0.4 mm: a window of the map is wider than a cyst."""


Table: TypeAlias = NDArray[np.float32]


def measured(run: Run, chain: Chain, fitted: signature.Signature, table: Table) -> dict[str, Any]:
    """For `metrics` of the manifest; `table` holds the features of the training cohort."""
    train, test = run.cohort("train"), run.cohort("test")
    seed = int(run.plan["presets"][run.preset]["seed"])
    rows = chain.features(test.x[:, 0]).astype(np.float64)
    positives = test.part(np.flatnonzero(test.y == 1)[:MAPS])
    maps = np.stack([chain.map(one) for one in positives.x[:, 0]])
    compared = {name: arm(train, test, name, seed) for name in ("native", "bicubic")}
    own = fitted.margin(rows)
    lines = [_line(name, own, other, test.y) for name, other in compared.items()]
    return {
        "pointing": pointing(positives, maps),
        "permuted_labels": permuted(table, train.y, seed).to_json(),
        "random_weights_ssim": random_weights(chain, positives, maps, fitted),
        "more": lines,
    }


def _line(name: str, own: stats.Array, other: stats.Array, y: stats.Labels) -> str:
    difference, p = stats.delong_paired(y, own, other)
    kind = {"native": "on the picture as acquired", "bicubic": "after bicubic interpolation"}[name]
    return (
        f"Radiomics {kind}, selected and weighed in the same way: AUC {stats.delong(y, other)}; super-resolution less "
        f"that {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}), paired DeLong p {p:.3g}."
    )


# --- the map ---------------------------------------------------------------------------------------------------------


def pointing(cohort: Cohort, maps: Table) -> dict[str, Any]:
    """Is the map's maximum within 0.8 mm of a planted cyst or focus? Chance = share of such cells inside the region."""
    hits, chance = 0, []
    for one, place, shown in zip(cohort.x[:, 0], cohort.place, maps, strict=True):
        inside = np.asarray(one[1], np.float32).reshape(64, 2, 64, 2).mean(axis=(1, 3)) > 127
        cells = shown.reshape(64, 2, 64, 2).mean(axis=(1, 3))
        target = ndimage.maximum_filter(place.astype(np.float32), 2 * REACH + 1) > 0.05
        hits += bool(target[np.unravel_index(int(np.argmax(np.where(inside, cells, -np.inf))), cells.shape)])
        chance.append(float(target[inside].mean()))
    return {
        "hit_rate": stats.proportion(hits, len(maps)).to_json(),
        "chance": round(float(np.mean(chance)), 3),
        "n": len(maps),
    }


def random_weights(chain: Chain, cohort: Cohort, maps: Table, fitted: signature.Signature) -> float:
    """Mean structural similarity, in the box of the region, with maps of weights drawn at random (Adebayo 2018)."""
    from engines.training.gates import ssim as similarity

    rng = np.random.default_rng(1)
    weights = rng.standard_normal(len(fitted.terms))

    def scrambled(_name: str, inputs: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        margin = fitted.standardised(np.asarray(inputs["x"], np.float64)) @ weights
        return {"logits": np.stack([-margin / 2, margin / 2], axis=1).astype(np.float32)}

    found = []
    for one, shown in zip(cohort.x[:, 0], maps, strict=True):
        fine, inside = chain.fine(one)
        start = float(engine.margins(scrambled("", {"x": engine.features(fine[None], inside)})["logits"])[0])
        other = engine.sensitivity(fine, inside, start, scrambled)
        box = ndimage.find_objects((np.asarray(one[1], np.float32) > 127).astype(np.int8))[0]
        found.append(similarity(shown[box], other[box]))
    return round(float(np.mean(found)), 3)


# --- gates and comparisons -------------------------------------------------------------------------------------------


def permuted(table: Table, y: stats.Labels, seed: int) -> stats.Interval:
    """AUC out of fold of labels that mean nothing, selection within the folds; DeLong 99 %.

    Judged by the same permuted labels: any direction among features that carry the true label separates the true label
    somehow, to one side or the other, so an AUC on that says nothing about leakage.
    """
    shuffled = np.random.default_rng(seed).permutation(y)
    return stats.delong(shuffled, signature.cross_fitted(table, shuffled, engine.FEATURES, seed), 0.99)


def arm(train: Cohort, test: Cohort, name: str, seed: int) -> stats.Array:
    """Margins on the test cohort of a signature of pictures without super-resolution."""
    tables = [plain_features(cohort.x[:, 0], name) for cohort in (train, test)]
    return signature.select(tables[0], train.y, engine.FEATURES, seed).margin(tables[1].astype(np.float64))


def plain_features(x: NDArray[Any], name: str) -> Table:
    """Radiomics of the picture as acquired ("native"), or interpolated to the finer grid ("bicubic")."""
    return np.stack([_plain(one, _INTERPOLATED[name]) for one in x])


def _plain(one: NDArray[Any], interpolate: Callable[[engine.Image], engine.Image] | None) -> Table:
    p = prepared(one)
    if interpolate is None:
        return engine.features(p.image[None], p.share > 127)[0]
    return engine.features(interpolate(p.image)[None], engine.region_of(p.share))[0]


def _bicubic(image: engine.Image) -> engine.Image:
    import torch

    from engines.training.superres import bicubic

    tensor = torch.from_numpy(image.astype(np.float32) / np.float32(255))[None, None]
    return engine.levels(bicubic(tensor)[0, 0].numpy())


_INTERPOLATED: Mapping[str, Callable[[engine.Image], engine.Image] | None] = {"native": None, "bicubic": _bicubic}

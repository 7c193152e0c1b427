"""Super-resolution and signature: they learn what is there, and nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install 'dicom-node[train]')")
pytest.importorskip("nyxus", reason="nyxus is not installed (pip install 'dicom-node[radiomics]')")

from engines.testis_tumour import engine, network, recipe, samples  # noqa: E402
from engines.training import signature, stats, superres  # noqa: E402

NAMES = [f"feature {k}" for k in range(12)]


# --- networks --------------------------------------------------------------------------------------------------------


def test_paper_preset_has_75_thousand_parameters() -> None:
    assert sum(p.numel() for p in network.build("paper").parameters()) == 75_460


def test_super_resolution_starts_as_the_repeated_input() -> None:
    x = torch.rand(2, 1, 10, 12)
    y = network.build("nano").eval()(x)
    assert y.shape == (2, 1, 20, 24)
    assert torch.allclose(y, torch.repeat_interleave(torch.repeat_interleave(x, 2, 2), 2, 3))


def test_the_graph_of_the_signature_computes_the_signature() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=(40, 12)))
    y = (np.log(x[:, 3]) + x[:, 7] + rng.normal(size=40) * 0.3 > 1.2).astype(np.int64)
    chosen = signature.select(x, y, NAMES)
    terms = [network.Term(t.column, t.log, t.centre, t.scale, t.beta) for t in chosen.terms]
    model = network.Radiomics(terms, chosen.intercept).eval()
    with torch.no_grad():
        logits, features = model(torch.from_numpy(x.astype(np.float32)))
    assert (logits[:, 1] - logits[:, 0]).numpy() == pytest.approx(chosen.margin(x), abs=1e-3)
    assert features.shape == (40, len(terms), 1, 1)
    pooled = features.mean(dim=(2, 3))
    assert torch.allclose(pooled @ model.head.weight.T + model.head.bias, logits, atol=1e-5)
    assert any(t.log for t in chosen.terms)


# --- signature -------------------------------------------------------------------------------------------------------


def _table(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two columns that carry the label, one that repeats the first, one that never varies, eight of noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 12))
    x[:, 2] += 1.4 * y
    x[:, 5] -= 1.2 * y
    x[:, 6] = x[:, 2] * 3 + 1 + 0.02 * rng.normal(size=n)
    x[:, 9] = 4.0
    return x, y


def test_selects_what_carries_the_label_once() -> None:
    x, y = _table(300, 1)
    chosen = signature.select(x, y, NAMES)
    columns = {t.column for t in chosen.terms}
    assert len(columns & {2, 6}) == 1
    assert 5 in columns
    assert 9 not in columns
    assert chosen.steps["all"] == 12
    assert chosen.steps["varying"] == 11
    other, truth = _table(300, 2)
    assert stats.auc(truth, chosen.margin(other)) > 0.85
    assert signature.select(x, y, NAMES) == chosen
    assert signature.load(signature.dump(chosen)) == chosen


def test_labels_that_mean_nothing_give_nothing_out_of_fold() -> None:
    x, y = _table(300, 3)
    shuffled = np.random.default_rng(5).permutation(y)
    inside = signature.select(x, shuffled, NAMES).margin(x)
    outside = signature.cross_fitted(x, shuffled, NAMES)
    assert stats.auc(shuffled, inside) > 0.53
    interval = stats.delong(shuffled, outside, 0.99)
    assert interval.low <= 0.5 <= interval.high or interval.high < 0.5
    assert stats.auc(y, signature.cross_fitted(x, y, NAMES)) > 0.85


def test_a_table_with_holes_is_refused() -> None:
    x, y = _table(40, 4)
    x[3, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        signature.select(x, y, NAMES)


# --- super-resolution ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> superres.Pairs:
    return samples.pairs_of(100_000, 16)


SETTINGS = superres.Settings(seed=3, steps=300, batch=8, patch=32, learning_rate=4e-3)


@pytest.mark.long
def test_a_short_training_beats_interpolation_on_unseen_seeds_and_continues_where_it_stopped(
    pairs: superres.Pairs, tmp_path: Path
) -> None:
    model = superres.fit(network.build("nano"), SETTINGS, pairs, tmp_path / "a")
    found = superres.compare(model, samples.pairs_of(910_000, 8))
    assert found["psnr_db"]["gain"]["ci95"][0] > 0.3
    assert found["ssim"]["gain"]["ci95"][0] > 0
    weights = [p.detach().clone() for p in model.parameters()]
    again = superres.fit(network.build("nano"), SETTINGS, pairs, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(weights, again.parameters(), strict=True))
    # A finished training is not trained again; other pairs are another training.
    same = superres.fit(network.build("nano"), SETTINGS, pairs, tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(weights, same.parameters(), strict=True))
    other = superres.Pairs(pairs.low[:5], pairs.high[:5])
    short = replace(SETTINGS, steps=2)
    superres.fit(network.build("nano"), short, other, tmp_path / "a")
    assert not torch.equal(superres.load(network.build("nano"), tmp_path / "a").tail.weight, model.tail.weight)


def test_quality_is_measured_on_whole_grey_values(pairs: superres.Pairs) -> None:
    high = pairs.high[:2]
    perfect = {n: torch.from_numpy(high[n][None, None].astype(np.float32) / 255) for n in range(2)}
    order = iter(range(2))
    psnr, ssim = superres.quality(lambda _low: perfect[next(order)], superres.Pairs(pairs.low[:2], high))
    assert (psnr > 100).all() or np.isinf(psnr).all()
    assert ssim == pytest.approx(1.0, abs=1e-4)
    low = torch.from_numpy(pairs.low[:1, None].astype(np.float32) / 255)
    shown = (superres.bicubic(low).numpy()[0, 0] * 255).round() / 255
    mse = float(((shown - high[0] / 255) ** 2).mean())
    expected = superres.quality(superres.bicubic, superres.Pairs(pairs.low[:1], high[:1]))[0][0]
    assert expected == pytest.approx(-10 * np.log10(mse), abs=0.02)


def test_a_phantom_becomes_an_input_of_the_engine_in_every_encoding() -> None:
    made = recipe.RECIPE.sample(5, 1, recipe.phantom.generator(), "jpeg")
    assert not isinstance(made, recipe.Refusal)
    assert made.x.shape == (1, 2, engine.TILE, engine.TILE)
    assert made.x[0, 0].max() <= 255
    assert made.covariates.shape == (len(recipe.RECIPE.covariates),)
    assert made.place.any()
    assert not recipe.RECIPE.sample(5, 0, recipe.phantom.generator(), "raw").place.any()

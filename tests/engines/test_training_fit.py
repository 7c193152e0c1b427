"""Training learns, repeats itself, and continues where it was cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from dicom_node.result import Refusal  # noqa: E402
from engines.renal_ceus import phantom  # noqa: E402
from engines.renal_ceus.recipe import RECIPE  # noqa: E402
from engines.training import augment, cohort, fit  # noqa: E402
from engines.training.stats import auc  # noqa: E402

NANO = fit.Settings(seed=3, epochs=2, batch=16, frames_per_clip=2, learning_rate=5e-3, weight_decay=1e-3, localise=1.0)


def _synthetic(n: int, seed: int) -> cohort.Cohort:
    """Bright disc or none: enough to exercise the training without a phantom."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(0, 0.3, (n, 3, 1, 224, 224)).astype(np.float16)
    place = np.zeros((n, 28, 28), np.float16)
    for i in np.flatnonzero(y):
        row, column = rng.integers(8, 20, 2)
        x[i, :, :, row * 8 - 16 : row * 8 + 16, column * 8 - 16 : column * 8 + 16] += 2
        place[i, row - 2 : row + 2, column - 2 : column + 2] = 1
    return cohort.Cohort(x, np.full(n, 3), y, place, np.arange(n), rng.normal(size=(n, 3)), ())


def _weights(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def test_same_seed_same_weights_and_a_cut_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = _synthetic(16, 1), _synthetic(8, 2)
    once = fit.fit("renal_ceus", "nano", NANO, train, validation, tmp_path / "a")
    again = fit.fit("renal_ceus", "nano", NANO, train, validation, tmp_path / "b")
    assert np.array_equal(_weights(once), _weights(again))

    class CutError(Exception):
        pass

    real = fit._epoch

    def cut(*args: object) -> float:
        if args[-1] == 1:
            raise CutError
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(CutError):
        patch.setattr(fit, "_epoch", cut)
        fit.fit("renal_ceus", "nano", NANO, train, validation, tmp_path / "c")
    continued = fit.fit("renal_ceus", "nano", NANO, train, validation, tmp_path / "c")
    assert np.allclose(_weights(once), _weights(continued), atol=1e-6)
    assert np.array_equal(_weights(fit.load("renal_ceus", "nano", tmp_path / "c")), _weights(continued))


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    fit.fit("renal_ceus", "nano", NANO, _synthetic(16, 1), _synthetic(8, 2), tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"weights.safetensors", "optimiser.safetensors", "state.json"}


def test_augmentation_moves_the_place_with_the_image() -> None:
    rng = np.random.default_rng(4)
    x = np.full((20, 1, 224, 224), -1, np.float32)
    place = np.zeros((20, 28, 28), np.float32)
    x[:, :, 80:96, 120:136] = 3
    place[:, 10:12, 15:17] = 1
    moved, where = augment.stills(x, place, rng)
    for image, cells in zip(moved[:, 0], where, strict=True):
        coarse = image.reshape(28, 8, 28, 8).mean(axis=(1, 3))
        assert np.unravel_index(coarse.argmax(), (28, 28)) == np.unravel_index(cells.argmax(), (28, 28))


def _easy(first_seed: int, count: int) -> cohort.Cohort:
    """Short clips without the decoy: what a nano network can learn in seconds."""
    settings = phantom.generator()
    quiet = {"frame_ms": 900, "arrival_s": [3.6, 4.4], "cysts": 0, "blotch": 0, "mottle": 0.05, "shadow_probability": 0}
    settings["nuisance"] |= quiet | {"mass_px": [38, 44], "dose": [0.6, 0.8], "tints": {"gold": 1.0}}
    settings["low"]["texture_beside_mass"] = settings["high"]["texture_beside_mass"] = 0
    settings["texture"]["core"] = 0.75
    done = []
    for seed in range(first_seed, first_seed + count):
        found = RECIPE.prepared(phantom.make(seed, seed % 2, settings, frames=18), "raw")
        value = str(found) if isinstance(found, Refusal) else found
        done.append((seed, seed % 2, value))
    return cohort.from_arrays(cohort.arrays(done))


@pytest.mark.long
def test_a_nano_network_learns_the_planted_signal(tmp_path: Path) -> None:
    train, held = _easy(500_000, 90), _easy(510_000, 40)
    assert len(train.y) >= 80
    # Small batches: at twice the size, the steps of so small a cohort end before anything is learnt.
    settings = fit.Settings(
        seed=1, epochs=14, batch=12, frames_per_clip=3, learning_rate=6e-3, weight_decay=1e-3, localise=1.0
    )
    model = fit.fit("renal_ceus", "nano", settings, train, held, tmp_path)
    assert auc(held.y, fit.clip_margins(model, held)) > 0.85

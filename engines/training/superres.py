"""Super-resolution: a x2 network on pairs of one scene, as acquired and sharp. Deterministic by seed, resumable.

The degradation is the acquisition's (wider point spread, every second sample, noise, compression), made by the phantom,
not a blur made up here. Measured against bicubic interpolation by PSNR and SSIM (monai) on pairs of unseen seeds.
Checkpoints are safetensors, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from engines.training import stats

Grey: TypeAlias = NDArray[np.uint8]
Upscale: TypeAlias = Callable[[Tensor], Tensor]
"""(N, 1, H, W) grey 0..1 to twice the size."""


@dataclass(frozen=True)
class Settings:
    """The super-resolution part of a preset."""

    seed: int
    steps: int
    batch: int
    patch: int
    """Side of the acquired patch; the sharp one is twice as large."""
    learning_rate: float
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Pairs:
    """Acquired (n, H, W) and sharp (n, 2H, 2W)."""

    low: Grey
    high: Grey

    def __post_init__(self) -> None:
        n, h, w = self.low.shape
        if self.high.shape != (n, 2 * h, 2 * w):
            raise ValueError("superres: the sharp image is exactly twice as large")

    @property
    def digest(self) -> str:
        """A training is continued on the same pairs only."""
        return hashlib.sha256(self.low.tobytes() + self.high.tobytes()).hexdigest()


def fit(model: nn.Module, settings: Settings, pairs: Pairs, folder: Path) -> nn.Module:
    """Train on random patches, keep a checkpoint twenty times; a folder with one is continued."""
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    _start(model, settings.seed)
    model.to(settings.device).train()
    optimiser = torch.optim.Adam(model.parameters(), settings.learning_rate)
    about = asdict(settings) | {"pairs": pairs.digest}
    first = _resume(folder, about, model, optimiser)
    every, started, total = max(1, settings.steps // 20), time.monotonic(), 0.0
    for step in range(first, settings.steps):
        # The rate and the patches are functions of the step alone, so a continued training is the same training.
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _rate(step / settings.steps)
        low, high = _batch(pairs, settings, step)
        loss = (model(low.to(settings.device)) - high.to(settings.device)).square().add(1e-6).sqrt().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.item()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            seconds = time.monotonic() - started
            print(f"superres: step {step + 1}/{settings.steps} loss {total / every:.5f} {seconds:.0f} s", flush=True)
            total = 0.0
            _checkpoint(folder, about, step + 1, model, optimiser)
    return model.eval()


def load(model: nn.Module, folder: Path) -> nn.Module:
    """The weights of a finished fit."""
    model.load_state_dict(load_file(folder / "superres.safetensors"))
    return model.eval()


def bicubic(low: Tensor) -> Tensor:
    """The interpolation that a network must beat."""
    return interpolate(low, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)


def quality(upscale: Upscale, pairs: Pairs) -> tuple[stats.Array, stats.Array]:
    """PSNR (dB) and SSIM of each pair, on what a node would use: clipped, in whole grey values."""
    from monai.metrics.regression import PSNRMetric, SSIMMetric

    psnr, ssim = PSNRMetric(max_val=1.0), SSIMMetric(spatial_dims=2, data_range=1.0)
    found: list[tuple[float, float]] = []
    with torch.no_grad():
        for low, high in zip(pairs.low, pairs.high, strict=True):
            y = torch.round(upscale(_grey(low[None])).clamp(0, 1) * 255) / 255
            target = _grey(high[None])
            found.append((_mean(psnr(y, target)), _mean(ssim(y, target))))
    both = np.array(found)
    return both[:, 0], both[:, 1]


def _mean(value: Any) -> float:
    return float(torch.as_tensor(value).mean())


def compare(upscale: Upscale, pairs: Pairs) -> dict[str, Any]:
    """PSNR and SSIM beside those of bicubic interpolation, and the mean paired difference with its 95 % interval."""
    result: dict[str, Any] = {"n": len(pairs.low)}
    for name, ours, theirs in zip(("psnr_db", "ssim"), quality(upscale, pairs), quality(bicubic, pairs), strict=True):
        difference = ours - theirs
        half = 1.959963984540054 * difference.std(ddof=1) / np.sqrt(len(difference))
        gain = stats.Interval(
            float(difference.mean()), float(difference.mean() - half), float(difference.mean() + half)
        )
        result[name] = {
            "network": round(float(ours.mean()), 4),
            "bicubic": round(float(theirs.mean()), 4),
            "gain": gain.to_json(),
        }
    return result


def _grey(images: Grey) -> Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None]


def _start(model: nn.Module, seed: int) -> None:
    """First weights by the seed, whatever was drawn before; layers that start at zero stay there."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and bool(module.weight.detach().any()):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _rate(done: float) -> float:
    """Cosine from 1 to 0 after a short warm-up."""
    return float(min(1.0, done / 0.02 + 0.02) * 0.5 * (1 + np.cos(np.pi * done)))


def _batch(pairs: Pairs, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Patches of random pairs, mirrored: echoes come from above, so not upside down."""
    rng = np.random.default_rng([settings.seed, step])
    side, (_, height, width) = settings.patch, pairs.low.shape
    low, high = [], []
    for index in rng.integers(0, len(pairs.low), settings.batch):
        y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        a = pairs.low[index, y : y + side, x : x + side]
        b = pairs.high[index, 2 * y : 2 * (y + side), 2 * x : 2 * (x + side)]
        turn = -1 if rng.random() < 0.5 else 1
        low.append(a[:, ::turn])
        high.append(b[:, ::turn])
    return _grey(np.stack(low)), _grey(np.stack(high))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path, about: dict[str, Any], step: int, model: nn.Module, optimiser: torch.optim.Adam) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    moments = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }
    _replace(folder / "superres-optimiser.safetensors", moments)
    _replace(folder / "superres.safetensors", {k: v.contiguous() for k, v in model.state_dict().items()})
    state = json.dumps({"step": step, "about": about})
    (folder / "superres.json").write_text(state, "utf-8")


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)


def _resume(folder: Path, about: dict[str, Any], model: nn.Module, optimiser: torch.optim.Adam) -> int:
    """Steps already done with the same settings and pairs; anything else starts afresh."""
    state = folder / "superres.json"
    if not state.is_file():
        return 0
    kept = json.loads(state.read_text("utf-8"))
    if kept.get("about") != about:
        return 0
    model.load_state_dict(load_file(folder / "superres.safetensors"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "superres-optimiser.safetensors").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    whole = optimiser.state_dict()
    whole["state"] = moments
    optimiser.load_state_dict(whole)
    return int(kept["step"])

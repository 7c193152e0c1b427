"""The locator: a small U-Net (Ronneberger et al. 2015) that says where on a B-mode still the testis lies. torch.

A place, never an indication: its box takes the part of a region of interest that nobody drew. Input and output share
one grid (`engine.LOCATOR_SIZE`); the output `probability` goes through the sigmoid in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

WIDTHS = (8, 12, 16)


@dataclass(frozen=True)
class Settings:
    """`locator` of training.yaml."""

    seed: int
    epochs: int
    batch: int
    learning_rate: float
    threads: int = 1
    device: str = "cpu"


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels below the input's own; `forward` gives (N, 1, H, W) in 0..1. H and W are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.halve = nn.AvgPool2d(2)
        self.down1, self.down2, self.down3 = _block(1, first), _block(first, second), _block(second, third)
        self.bottom = _block(third, third)
        self.up2, self.up1 = _block(third + third, second), _block(second + second, first)
        self.last = nn.Conv2d(first + first, 1, 1)

    def logits(self, x: Tensor) -> Tensor:
        one = self.down1(self.halve(x))
        two = self.down2(self.halve(one))
        three = self.down3(self.halve(two))
        below = self.bottom(self.halve(three))
        below = self.up2(torch.cat([_twice(below), three], dim=1))
        below = self.up1(torch.cat([_twice(below), two], dim=1))
        return _twice(self.last(torch.cat([_twice(below), one], dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x))


def _twice(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")


def fit(x: NDArray[Any], masks: NDArray[np.bool_], settings: Settings, folder: Path) -> UNet:
    """Train on stills (n, 1, H, W) and where the testis lies (n, H, W); loss: cross entropy and Dice."""
    from engines.training.fit import deterministic

    deterministic(settings.seed, settings.threads)
    model = UNet().to(settings.device).train()
    steps = settings.epochs * -(-len(x) // settings.batch)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, steps)
    rng = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(order), settings.batch):
            loss = _loss(model, *_batch(x, masks, order[start : start + settings.batch], rng, settings.device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "locator.safetensors")
    return model.eval()


def _batch(
    x: NDArray[Any], masks: NDArray[np.bool_], chosen: NDArray[Any], rng: np.random.Generator, device: str
) -> tuple[Tensor, Tensor]:
    """Mirrored half of the time, with another gain; black is -1."""
    images, truth = x[chosen].astype(np.float32), masks[chosen, None].astype(np.float32)
    if rng.random() < 0.5:
        images, truth = images[..., ::-1], truth[..., ::-1]
    gain = rng.uniform(0.8, 1.2, (len(chosen), 1, 1, 1)).astype(np.float32)
    images = np.ascontiguousarray((images + 1) * gain - 1)
    return torch.from_numpy(images).to(device), torch.from_numpy(np.ascontiguousarray(truth)).to(device)


def _loss(model: UNet, images: Tensor, truth: Tensor) -> Tensor:
    logits = model.logits(images)
    p = torch.sigmoid(logits)
    dice = 1 - 2 * ((p * truth).sum(dim=(1, 2, 3)) + 1) / ((p + truth).sum(dim=(1, 2, 3)) + 2)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth) + dice.mean()


def load(folder: Path) -> UNet:
    """The network of a finished fit."""
    model = UNet()
    model.load_state_dict(load_file(folder / "locator.safetensors"))
    return model.eval()

"""Masked pre-training of an encoder on unlabelled volumes (fully convolutional masked autoencoder, Woo et al. 2023).

Cells of the encoder's last grid are hidden at random; the encoder sees the rest (`visible`: masked voxels are zero
before and after every stage), a small decoder fills the hidden patches in, and the loss counts hidden voxels only.
Patches are brought to zero mean and unit spread first, so that contrast counts and not brightness. The decoder is
thrown away. Deterministic by seed; checkpoints are safetensors, no pickle.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from engines.training import fit


@dataclass(frozen=True)
class Settings:
    """`pretraining` of training.yaml, for one preset."""

    seed: int
    epochs: int
    """0: no pre-training."""
    batch: int
    learning_rate: float
    masked: float = 0.6
    """Share of the cells that are hidden."""
    volumes: int = 0
    """Volumes drawn in an epoch; 0 = all."""
    threads: int = 1
    device: str = "cpu"


class Autoencoder(nn.Module):
    """An encoder with a decoder of one convolution block; what it says of every voxel of the first channel."""

    def __init__(self, encoder: Any, width: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        channels = int(encoder.channels)
        self.token = nn.Parameter(torch.zeros(channels))
        """Stands where a cell is hidden."""
        self.mix = nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.GELU())
        self.width = width
        self.say: nn.Module | None = None

    def prepare(self, x: Tensor) -> Tensor:
        """Patches (n, voxels, d, h, w) of the first channel, standardised; makes the last layer for their size."""
        with torch.no_grad():
            grid = self.encoder(x[:1]).shape[2:]
        cut = patches(x[:, :1], grid)
        if self.say is None:
            self.say = nn.Conv3d(self.width, cut.shape[1], 1).to(x.device)
        return cut

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Reconstructed patches (n, voxels, d, h, w)."""
        seen = self.encoder(x, visible)
        filled = seen + (1 - visible) * self.token[:, None, None, None]
        if self.say is None:
            raise RuntimeError("prepare comes first")
        out: Tensor = self.say(self.mix(filled))
        return out


def patches(x: Tensor, grid: Any) -> Tensor:
    """(n, 1, D, H, W) to (n, voxels of a patch, d, h, w), each patch of zero mean and unit spread."""
    n = len(x)
    sizes = [a // b for a, b in zip(x.shape[2:], grid, strict=True)]
    d, h, w = grid
    cut = x.reshape(n, d, sizes[0], h, sizes[1], w, sizes[2]).permute(0, 2, 4, 6, 1, 3, 5).reshape(n, -1, d, h, w)
    centred = cut - cut.mean(dim=1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + 1e-2)


def hide(n: int, grid: Any, share: float, generator: torch.Generator) -> Tensor:
    """(n, 1, d, h, w): 1 where a cell is visible; columns through the slices are hidden together, since neighbouring
    slices would give the answer away."""
    d, h, w = grid
    order = torch.rand((n, h * w), generator=generator).argsort(dim=1)
    visible = torch.ones((n, h * w))
    visible.scatter_(1, order[:, : round(share * h * w)], 0.0)
    return visible.reshape(n, 1, 1, h, w).expand(n, 1, d, h, w).contiguous()


def loss(said: Tensor, truth: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the voxels of hidden cells, and no others."""
    hidden = 1 - visible
    return ((said - truth).square().mean(dim=1, keepdim=True) * hidden).sum() / hidden.sum()


def pretrain(encoder: nn.Module, volumes: NDArray[Any], settings: Settings, folder: Path) -> list[float]:
    """Train `encoder` in place on volumes (n, channels, D, H, W); the mean loss of each epoch. What stands finished in
    `folder` by the same settings is read, not repeated."""
    kept = _finished(folder, settings, encoder)
    if kept is not None:
        return kept
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    model = Autoencoder(encoder).to(settings.device)
    model.prepare(torch.from_numpy(volumes[:2].astype(np.float32)).to(settings.device))
    count = min(settings.volumes or len(volumes), len(volumes))
    steps = settings.epochs * -(-count // settings.batch)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, steps)
    started, history = time.monotonic(), []
    model.train()
    for epoch in range(settings.epochs):
        chosen, total = rng.permutation(len(volumes))[:count], 0.0
        for start in range(0, count, settings.batch):
            x = torch.from_numpy(volumes[np.sort(chosen[start : start + settings.batch])].astype(np.float32))
            x = x.to(settings.device)
            truth = model.prepare(x)
            visible = hide(len(x), truth.shape[2:], settings.masked, generator).to(x.device)
            value = loss(model(x, visible), truth, visible)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            schedule.step()
            total += value.item() * len(x)
        history.append(total / count)
        seconds = time.monotonic() - started
        print(f"pre-training: epoch {epoch + 1}/{settings.epochs} loss {history[-1]:.4f} {seconds:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, folder / "encoder.safetensors")
    (folder / "state.json").write_text(json.dumps({"settings": asdict(settings), "loss": history}), "utf-8")
    return history


def _finished(folder: Path, settings: Settings, encoder: nn.Module) -> list[float] | None:
    state = folder / "state.json"
    if not state.is_file():
        return None
    kept = json.loads(state.read_text("utf-8"))
    if kept["settings"] != asdict(settings):
        return None
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    losses: list[float] = kept["loss"]
    return losses


def begin(network: nn.Module, settings: fit.Settings, folder: Path) -> None:
    """A network as the checkpoint "no epoch done yet" of a fit, which then goes on from these weights."""
    from engines.training.fit import LocalLoss

    both = nn.ModuleDict({"model": network, "local": LocalLoss()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in both.state_dict().items()}, folder / "weights.safetensors")
    save_file({}, folder / "optimiser.safetensors")
    (folder / "state.json").write_text(json.dumps({"epoch": 0, "settings": asdict(settings)}), "utf-8")

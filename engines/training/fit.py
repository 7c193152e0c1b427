"""Fit: the network of a task on a cohort, deterministic by seed, resumable, checkpoints as safetensors (no pickle)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate
from tqdm import tqdm

from engines.training.cohort import Cohort
from engines.training.recipe import Recipe, recipe_of
from engines.training.stats import auc


@dataclass(frozen=True)
class Settings:
    """One preset of training.yaml."""

    seed: int
    epochs: int
    batch: int
    frames_per_clip: int
    """Inputs drawn of each unit in an epoch."""
    learning_rate: float
    weight_decay: float
    localise: float = 0.0
    """Weight of the map's own loss, for cohorts that know where the lesion lies; 0 = image labels only."""
    threads: int = 1
    device: str = "cpu"


def fit(task: str, preset: str, settings: Settings, train: Cohort, validation: Cohort, folder: Path) -> nn.Module:
    """Train, keep the weights of every epoch's end, return the last. A folder with a checkpoint is continued."""
    deterministic(settings.seed, settings.threads)
    recipe = recipe_of(task)
    model = recipe.network(preset).to(settings.device)
    local = LocalLoss().to(settings.device)
    steps = settings.epochs * -(-len(train.y) * settings.frames_per_clip // settings.batch)
    optimiser = torch.optim.AdamW(
        [*model.parameters(), *local.parameters()], settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, steps, pct_start=0.2)
    both = nn.ModuleDict({"model": model, "local": local})
    first = _resume(folder, settings, both, optimiser, schedule)
    started = time.monotonic()
    for epoch in range(first, settings.epochs):
        loss = _epoch(recipe, both, optimiser, schedule, train, settings, epoch)
        score = auc(validation.y, clip_margins(model, validation, settings.device))
        print(
            f"fit {task} {preset}: epoch {epoch + 1}/{settings.epochs} loss {loss:.4f} "
            f"validation AUC {score:.4f} {time.monotonic() - started:.0f} s",
            flush=True,
        )
        _checkpoint(folder, settings, epoch + 1, both, optimiser)
    return model.eval()


def load(task: str, preset: str, folder: Path) -> nn.Module:
    """The network of a finished fit, train form, evaluation mode."""
    model = recipe_of(task).network(preset)
    weights = load_file(folder / "weights.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return model.eval()


def clip_margins(model: nn.Module, cohort: Cohort, device: str = "cpu") -> NDArray[np.float64]:
    """Logit of the positive class less the other, mean over the inputs of a unit."""
    logits = clip_logits(model, cohort, device)[0]
    return logits[:, 1] - logits[:, 0]


def clip_logits(
    model: nn.Module, cohort: Cohort, device: str = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean logits per unit (n, K), pooled features per input (m, C), and the unit of each input (m,)."""
    frames, owner = cohort.frames()
    model.eval()
    logits, pooled = [], []
    with torch.no_grad():
        for start in range(0, len(frames), 64):
            x = torch.from_numpy(frames[start : start + 64].astype(np.float32)).to(device)
            out, features = model(x)[:2]
            logits.append(out.double().cpu().numpy())
            pooled.append(features.flatten(2).mean(dim=2).double().cpu().numpy())
    per_frame = np.concatenate(logits)
    sums = np.zeros((len(cohort.y), per_frame.shape[1]))
    np.add.at(sums, owner, per_frame)
    return sums / cohort.counts[:, None], np.concatenate(pooled), owner


def deterministic(seed: int, threads: int) -> None:
    """The same seed gives the same weights, on the same build of torch and number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # cuBLAS needs a setting for it


class LocalLoss(nn.Module):
    """Asks the class activation map itself to be high in the lesion and low elsewhere (simulated cohorts only).

    It sees the map through a scale and an offset of its own, so it shapes the features and leaves the score's level
    to the image label. Without it a network meets the planted signal as an exclusive-or: the same texture counts in
    the mass and does not count beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(-2.0))
        self.weight = 4.0

    def forward(self, features: Tensor, head: Tensor, place: Tensor) -> Tensor:
        last = features[:, -head.shape[1] :]  # channels before these are the gate's
        cells = torch.einsum("nc...,c->n...", last, head[1] - head[0]) * self.scale.exp() + self.offset
        target = interpolate(place[:, None], cells.shape[1:], mode="area")[:, 0]
        return binary_cross_entropy_with_logits(cells, target, pos_weight=cells.new_tensor(self.weight))


def _epoch(
    recipe: Recipe, both: nn.ModuleDict, optimiser: Any, schedule: Any, train: Cohort, settings: Settings, epoch: int
) -> float:
    model: Any = both["model"]
    model.train()
    rng = np.random.default_rng([settings.seed, epoch])
    total, seen = 0.0, 0
    batches = -(-len(train.y) * settings.frames_per_clip // settings.batch)
    for x, y, place in tqdm(_batches(recipe, train, settings, rng), "fit", batches, False, mininterval=5, ascii=True):
        logits, features = model(x.to(settings.device))[:2]
        loss = cross_entropy(logits, y.to(settings.device), label_smoothing=0.05)
        if settings.localise:
            loss = loss + settings.localise * both["local"](features, model.head.weight, place.to(settings.device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        total, seen = total + loss.item() * len(y), seen + len(y)
    return total / seen


def _batches(
    recipe: Recipe, train: Cohort, settings: Settings, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random inputs of every unit, augmented; each unit equally often."""
    units = np.repeat(np.arange(len(train.y)), settings.frames_per_clip)
    rng.shuffle(units)
    for start in range(0, len(units), settings.batch):
        chosen = units[start : start + settings.batch]
        which = rng.integers(0, train.counts[chosen])
        x, place = recipe.augment(
            train.x[chosen, which].astype(np.float32), train.place[chosen].astype(np.float32), rng
        )
        yield torch.from_numpy(x), torch.from_numpy(train.y[chosen]), torch.from_numpy(place)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path, settings: Settings, epoch: int, model: nn.Module, optimiser: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    moments = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }
    _replace(folder / "weights.safetensors", weights)
    _replace(folder / "optimiser.safetensors", moments)
    (folder / "state.json").write_text(json.dumps({"epoch": epoch, "settings": asdict(settings)}), "utf-8")


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)


def _resume(folder: Path, settings: Settings, model: nn.Module, optimiser: Any, schedule: Any) -> int:
    """Epochs already done by the same settings; anything else starts afresh."""
    state = folder / "state.json"
    if not state.is_file():
        return 0
    kept = json.loads(state.read_text("utf-8"))
    if kept["settings"] != asdict(settings):
        return 0
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    whole = optimiser.state_dict()
    whole["state"] = moments
    # One-cycle momentum and rate live in the parameter groups: replay the schedule, then put the moments back.
    per_epoch = schedule.total_steps // settings.epochs
    for _ in range(kept["epoch"] * per_epoch):
        optimiser.step()
        schedule.step()
    whole["param_groups"] = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict(whole)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return int(kept["epoch"])

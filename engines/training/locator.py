"""A locator: where on a picture the organ or lesion lies, when nobody drew it. A place, never an indication.

A tiny U-Net (three levels) on a small grid of the whole picture: one more model of a package. An engine uses it so:

    cells = run("locator", {"x": locator_input(grey)})["probability"][0, 0]     # x: (1, 1, H, W) float32, as trained
    place = dicom_node.pixels.roi.locate(cells, minimum_cells)                   # None: nothing, or two places as good

and scales the box of the place back to the picture; `roi_source` is then "auto". The recipe of the task fits it on
phantom pictures with their masks (`fit_locator`), writes it (`export_locator`), adds `manifest_entry()` to `models` and
`golden_cases` to golden.npz. Deterministic by seed, resumable; checkpoints are safetensors, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from dicom_node.pixels import roi
from engines.training import export

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
"""Largest absolute difference of a probability."""
MODEL = "locator"
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """How a locator is trained. The defaults take 800 pictures of 64 x 64 less than two minutes on one core."""

    seed: int = 1
    steps: int = 500
    batch: int = 16
    width: int = 8
    """Channels of the first level; 8 = 25 thousand parameters."""
    learning_rate: float = 4e-3
    gain: float = 0.15
    """Largest relative change of contrast, and of brightness in standard deviations of the cohort."""
    mirror: bool = True
    """Left and right swapped for half of the pictures."""
    threads: int = 1


class TinyUNet(nn.Module):
    """(n, 1, H, W) → logits (n, 1, H, W); H and W are multiples of four."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.down1 = nn.Sequential(_conv(1, w), _conv(w, w))
        self.down2 = nn.Sequential(_conv(w, 2 * w, stride=2), _conv(2 * w, 2 * w))
        # Dilated at the coarsest level: an organ that fills half of the picture must fit into what a cell sees.
        self.deep = nn.Sequential(_conv(2 * w, 3 * w, stride=2), _conv(3 * w, 3 * w, 2), _conv(3 * w, 3 * w, 4))
        self.up2 = _conv(5 * w, 2 * w)
        self.up1 = _conv(3 * w, w)
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(fine)
        middle = self.up2(torch.cat([_twice(self.deep(middle)), middle], 1))
        logits: Tensor = self.head(self.up1(torch.cat([_twice(middle), fine], 1)))
        return logits


def _conv(channels: int, out: int, dilation: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _twice(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")


class _Probability(nn.Module):
    """What is exported."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.module(x))


def untrained(width: int) -> nn.Module:
    """What is exported, with weights as they begin: for timing."""
    return _Probability(TinyUNet(width))


# --- fit -------------------------------------------------------------------------------------------------------------


def fit_locator(images: Images, masks: Images, settings: Settings, folder: Path | None = None) -> nn.Module:
    """Train on pictures (n, 1, H, W) and their masks (n, H, W), 0..1; what stands in `folder` is continued.

    A picture whose mask is empty teaches that there may be nothing.
    """
    _check(images, masks)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    model = TinyUNet(settings.width)
    _start(model, settings.seed)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=1e-3)
    about = asdict(settings) | {"data": hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()}
    first = _resume(folder, about, model, optimiser)
    every, started, total = max(1, settings.steps // 5), time.monotonic(), 0.0
    model.train()
    for step in range(first, settings.steps):
        # Rate and pictures are functions of the step alone, so a continued training is the same training.
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _rate(step / settings.steps)
        x, y = _batch(images, masks, settings, step)
        loss = dice_bce(model(x)[:, 0], y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.item()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            seconds = time.monotonic() - started
            print(f"locator: step {step + 1}/{settings.steps} loss {total / every:.4f} {seconds:.0f} s", flush=True)
            total = 0.0
            _checkpoint(folder, about, step + 1, model, optimiser)
    return model.eval()


def dice_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice of each picture (Milletari 2016) plus binary cross-entropy, (n, H, W) both."""
    probability = torch.sigmoid(logits)
    overlap = (probability * masks).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return dice.mean() + binary_cross_entropy_with_logits(logits, masks)


def _check(images: Images, masks: Images) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or masks.shape != (len(images), *images.shape[2:]):
        raise ValueError("locator: images (n, 1, H, W) and masks (n, H, W)")
    if any(side % 4 for side in images.shape[2:]):
        raise ValueError("locator: height and width are multiples of four")


def _start(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _rate(done: float) -> float:
    """Cosine from 1 to 0 after a short warm-up."""
    return float(min(1.0, done / 0.05 + 0.05) * 0.5 * (1 + np.cos(np.pi * done)))


def _batch(images: Images, masks: Images, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Random pictures with another gain; mirrored, but not upside down: echoes come from above."""
    rng = np.random.default_rng([settings.seed, step])
    chosen = rng.integers(0, len(images), settings.batch)
    x, y = images[chosen].astype(np.float32), masks[chosen].astype(np.float32)
    contrast = 1 + settings.gain * rng.uniform(-1, 1, (settings.batch, 1, 1, 1))
    brightness = settings.gain * rng.uniform(-1, 1, (settings.batch, 1, 1, 1)) * float(x.std())
    x = (x * contrast + brightness).astype(np.float32)
    if settings.mirror:
        turned = rng.random(settings.batch) < 0.5
        x[turned], y[turned] = x[turned, ..., ::-1], y[turned, ..., ::-1]
    return torch.from_numpy(x), torch.from_numpy(y)


def _checkpoint(
    folder: Path | None, about: dict[str, Any], step: int, model: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    partial = folder / f"{MODEL}.safetensors.part"
    save_file(tensors, partial, {"about": json.dumps(about | {"step": step}, sort_keys=True)})
    partial.replace(folder / f"{MODEL}.safetensors")


def _resume(folder: Path | None, about: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Steps done of the same training; 0 = begin anew."""
    from safetensors import safe_open

    path = None if folder is None else folder / f"{MODEL}.safetensors"
    if path is None or not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {}).get("about", "{}"))
    step = int(said.pop("step", 0))
    if said != about:
        return 0
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return step


def load(folder: Path, width: int = 8) -> nn.Module:
    """The weights of a finished fit."""
    model = TinyUNet(width)
    tensors = load_file(folder / f"{MODEL}.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    return model.eval()


# --- package ---------------------------------------------------------------------------------------------------------


def export_locator(module: nn.Module, example: Images, folder: Path) -> dict[str, Any]:
    """Write models/locator/{fp32,fp16}.onnx into the package folder. `example` has at least three pictures.

    Returns parity and size for the card. Raises RuntimeError where a graph says something else than torch.
    """
    if len(example) < 3:
        raise ValueError("locator: the example needs three pictures")
    deployed = _Probability(module).eval()
    x = np.ascontiguousarray(example, np.float32)
    paths = export.export(deployed, x[:2], ("probability",), folder / "models" / MODEL)
    parity: dict[str, float] = {}
    for precision, path in paths.items():
        worst = [_difference(deployed, export.session(path), x[:batch]) for batch in (1, 2, 3)]
        parity[precision] = max(worst)
        if not parity[precision] <= TOLERANCE[precision]:
            raise RuntimeError(f"locator: {precision} differs from torch by {parity[precision]:.2e}")
    return {"parity": parity, "parameters": sum(p.numel() for p in module.parameters())}


def _difference(deployed: nn.Module, session: onnxruntime.InferenceSession, x: Images) -> float:
    with torch.no_grad():
        expected = deployed(torch.from_numpy(x)).numpy()
    return float(np.abs(session.run(["probability"], {"x": x})[0] - expected).max())


def manifest_entry() -> dict[str, Any]:
    """`models.locator` of the manifest."""
    return {"inputs": ["x"], "outputs": ["probability"], "tolerance": dict(TOLERANCE)}


def golden_cases(folder: Path, images: Images) -> dict[str, NDArray[Any]]:
    """The locator's cases for golden.npz, as the exported fp32 graph answers them: what the node replays."""
    x = np.ascontiguousarray(images, np.float32)
    session = export.session(folder / "models" / MODEL / "fp32.onnx")
    return {f"{MODEL}.x": x, f"{MODEL}.probability": session.run(["probability"], {"x": x})[0]}


# --- evaluation ------------------------------------------------------------------------------------------------------


def report(module: nn.Module, images: Images, masks: Images, minimum_cells: int = 1) -> dict[str, float]:
    """On unseen pictures: Dice of the place against the mask, and how often there is a place, and it is right.

    `found`: share of the pictures with something to find where the node would take a place; `centre_inside`: share of
    these places whose box has its centre inside the mask; `false_places`: share of the empty pictures with a place.
    """
    _check(images, masks)
    dice: list[float] = []
    inside: list[bool] = []
    empty: list[bool] = []
    for x, mask in zip(images, masks > 0.5, strict=True):
        with torch.no_grad():
            probability = torch.sigmoid(module(torch.from_numpy(np.ascontiguousarray(x[None], np.float32))))[0, 0]
        place = roi.locate(probability.numpy(), minimum_cells)
        if not mask.any():
            empty.append(place is not None)
            continue
        dice.append(0.0 if place is None else float(2 * (place & mask).sum() / (place.sum() + mask.sum())))
        if place is not None:
            rows, columns = np.flatnonzero(place.any(axis=1)), np.flatnonzero(place.any(axis=0))
            inside.append(bool(mask[(rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2]))
    result = {
        "n": float(len(images)),
        "dice": float(np.mean(dice)) if dice else float("nan"),
        "found": len(inside) / len(dice) if dice else float("nan"),
        "centre_inside": float(np.mean(inside)) if inside else float("nan"),
    }
    return result | ({"false_places": float(np.mean(empty))} if empty else {})

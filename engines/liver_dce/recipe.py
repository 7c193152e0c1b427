"""How the packages of this task are made: masked pre-training of the encoder, then the fit. No torch at import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.liver_dce import engine, phantom
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Run, Sample, Settings

if TYPE_CHECKING:
    from torch import nn

PLACE = (4, 16, 16)
OUTPUTS = ("logits", "features", "cam", "attention")


class LiverDce(Recipe):
    """Per-phase encoder, phase attention, and the map of its gradient."""

    task = "liver_dce"
    method = "head-gradient activation map"
    network_name = "per-phase 3D encoder, masked pre-training, phase self-attention"
    value_range = (-2.0, 6.0)

    def write(self, args: argparse.Namespace) -> list[Path]:
        from engines.liver_dce import objects

        said = {
            key: getattr(args, key)
            for key in ("description", "body_part", "patient_name", "patient_id", "agent", "uid_seed")
            if getattr(args, key, None) is not None
        }
        exam = phantom.make(args.seed, args.label, phantom.generator(args.generator))
        encoding = args.encoding or "series"
        return objects.write(exam, args.out, encoding, objects.Labels(**said), bool(args.roi))

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        del encoding  # the same voxels, however the phases are encoded
        exam = phantom.make(seed, label, settings)
        found = engine.prepare(exam.volume.astype(np.float32), exam.affine, exam.drawn_mask)
        if isinstance(found, Refusal):
            return found
        place = _place(exam.signal, found) if label else np.zeros(PLACE, np.float32)
        return Sample(found.x, place, _nuisance(exam, found))

    # -- training

    def augment(
        self, x: NDArray[np.float32], place: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return augment(x, place, rng)

    def fit(self, run: Run) -> None:
        """Two stages: the encoder learns to fill in masked patches of unlabelled volumes, then the whole is fitted."""
        from engines.training import fit, pretrain

        settings = fit.Settings(**run.plan["presets"][run.preset], threads=run.threads, device=run.device)
        train = run.cohort("train")
        if not (run.checkpoint / "state.json").is_file():
            how = pretrain.Settings(**run.plan["pretraining"][run.preset], threads=run.threads, device=run.device)
            fit.deterministic(settings.seed, run.threads)
            network: Any = self.network(run.preset)
            if how.epochs:
                pretrain.pretrain(network.encoder, pairs(train.frames()[0]), how, run.checkpoint / "pretraining")
            pretrain.begin(network, settings, run.checkpoint)
        fit.fit(run.task, run.preset, settings, train, run.cohort("validation"), run.checkpoint)

    # -- the package

    def export(self, run: Run) -> dict[str, Any]:
        import torch

        from engines.training import export, fit, package

        torch.set_num_threads(run.threads)
        network: Any = fit.load(run.task, run.preset, run.checkpoint)
        deployed = network.deploy()
        sample = run.cohort("validation").frames()[0][:3].astype(np.float32)
        paths = export.export(deployed, sample[:2], OUTPUTS, run.out / "models" / self.explained)
        weights, bias = first_order(deployed, sample)
        package.write_arrays(run.out, "head.npz", {"W": weights, "b": bias})
        count = sum(p.numel() for p in deployed.parameters())
        return {"parity": export.parity(deployed, paths, sample), "parameters": count}

    def models(self, run: Run) -> dict[str, Any]:
        whole = super().models(run)
        whole[self.explained]["outputs"] = list(OUTPUTS)
        return whole

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "x", "kind": "phases", "frames": engine.GRID[0], "size": list(engine.GRID[1:]),
                "channels": 5, "normalise": {"mean": 0.0, "std": 1.0},
            }
        ]  # fmt: skip

    # -- evaluation

    def image_input(self, grey: list[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        """Slices as one volume, the same in all phases, and a region in the middle."""
        depth, side = engine.GRID[0], engine.GRID[1:]
        planes = np.stack([np.asarray(resize(g, side), np.float32) for g in grey])
        volume = planes[np.linspace(0, len(planes) - 1, depth).round().astype(int)]
        volume = (volume - volume.mean()) / max(float(volume.std()), 1e-6)
        z, y, x = (np.linspace(-1, 1, n) for n in engine.GRID)
        region = ((z[:, None, None] ** 2 + y[:, None] ** 2 + x**2) < 0.16).astype(np.float32)
        return np.asarray(np.stack([*[volume] * 4, region])[None], np.float32)


def pairs(x: NDArray[Any]) -> NDArray[Any]:
    """(n, 5, ...) to what the encoder sees of it: (n * 4, 2, ...), a phase and the region."""
    region = np.broadcast_to(x[:, 4:5], x[:, :4].shape)
    return np.stack([x[:, :4], region], axis=2).reshape(-1, 2, *x.shape[2:])


def augment(
    x: NDArray[np.float32], place: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mirrored in each direction and turned by quarters (a tumour has no right way up), another enhancement and
    scale of the phases together, with MONAI's transforms; region and place move along."""
    from monai.transforms.intensity.array import RandScaleIntensity, RandShiftIntensity

    scale, shift = RandScaleIntensity(factors=0.15, prob=1.0), RandShiftIntensity(offsets=0.15, prob=1.0)
    out, moved = np.empty_like(x), np.empty_like(place)
    for transform in (scale, shift):
        transform.set_random_state(seed=int(rng.integers(2**31)))
    for i in range(len(x)):
        flips = tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5)
        turns = int(rng.integers(4))
        image = np.rot90(np.flip(x[i], flips), turns, (2, 3))
        moved[i] = np.rot90(np.flip(place[i], tuple(a - 1 for a in flips)), turns, (1, 2))
        out[i, 4] = image[4]
        out[i, :4] = np.asarray(shift(np.asarray(scale(np.ascontiguousarray(image[:4])))), np.float32)
    return out, moved


def first_order(network: nn.Module, sample: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """head.npz: the head is not linear, so what stands there is its tangent at the mean of a few cases: how the logits
    move with each pooled channel. The node takes the map from the graph and the number of channels from here."""
    import torch

    net: Any = network
    with torch.no_grad():
        features = net(torch.from_numpy(sample))[1].mean(dim=(0, 2, 3, 4))
    early = net.encoder.early_channels
    tokens = features.reshape(1, 4, -1)[..., early:].clone().requires_grad_(True)
    logits = net.head(tokens)[0]
    rows = []
    for value in logits:
        (gradient,) = torch.autograd.grad(value, tokens, retain_graph=True)
        rows.append(torch.nn.functional.pad(gradient[0], [early, 0]).flatten())
    weights = torch.stack(rows)
    return weights.numpy(), (logits.detach() - weights @ features).numpy()


def _place(signal: NDArray[np.float32], found: engine.Prepared) -> NDArray[np.float32]:
    """Share of each cell of the map that the planted texture fills."""
    weights = [
        engine.interpolation(n, engine.places(middle, g, s), s)
        for n, middle, g, s in zip(signal.shape, found.centre, engine.GRID, found.step, strict=True)
    ]
    fine = np.einsum("ka,ib,jc,abc->kij", *weights, signal, optimize=True)
    cells = [v for n, g in zip(PLACE, engine.GRID, strict=True) for v in (n, g // n)]
    return np.asarray(fine.reshape(cells).mean(axis=(1, 3, 5)), np.float32)


def _nuisance(exam: phantom.Exam, found: engine.Prepared) -> NDArray[np.float64]:
    """Statistics of the middle slices, levels of each phase in the crop, the size of the region, the header."""
    phases = found.x[0, :4].astype(np.float64)
    middle = np.clip((phases[:, engine.GRID[0] // 2] + 2) / 10, 0, 1)
    levels = [*phases.mean(axis=(1, 2, 3)), *phases.std(axis=(1, 2, 3))]
    size = float(np.log(exam.drawn_mask.sum() * exam.pixel_mm**2 * exam.slice_mm))
    header = [
        exam.pixel_mm,
        exam.slice_mm,
        exam.tr_ms,
        exam.flip_deg,
        *exam.times[1:],
        size,
        float(found.x[0, 4].sum()),
    ]
    return np.concatenate([image_statistics(middle), levels, header])


RECIPE = LiverDce()

"""How the packages of this task are made: phantom clips through the engine, one volume a nodule; and its locator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels import ultrasound
from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.thyroid_cine import dicom, engine, phantom, segmentation
from engines.training import dicomfile
from engines.training.headers import MemoryReader, instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Run, Sample, Settings, plan_of

if TYPE_CHECKING:
    from torch import nn

GRID = (4, 14, 14)
JITTER = 0.08
"""Of the box's side: a reader outlines a nodule, and the locator finds it, only so exactly."""


class ThyroidCine(Recipe):
    """3D Inception-ResNet-v2 with calcification attention on 16 frames."""

    task = "thyroid_cine"
    method = "3D Grad-CAM"  # of a linear head on pooled features: the class activation map, exactly
    network_name = "3D Inception-ResNet-v2 topology with calcification attention"

    def write(self, args: argparse.Namespace) -> list[Path]:
        said = {
            key: getattr(args, key)
            for key in ("description", "body_part", "patient_name", "patient_id", "uid_seed")
            if getattr(args, key) is not None
        }
        clip = phantom.make(args.seed, args.label, phantom.generator(args.generator), args.frames or phantom.FRAMES)
        encoding = args.encoding or "jpeg"
        stem = f"{self.task}-{args.seed}-{args.label}"
        image = dicom.dataset(clip, encoding, dicom.labels(**said))
        made = {f"{stem}-{encoding}.dcm": image}
        if args.roi:
            made[f"{stem}-seg.dcm"] = segmentation.segmentation(image, [clip.nodule], args.uid_seed)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, ds in made.items():
            ds.save_as(args.out / name, enforce_file_format=True)
        return [args.out / name for name in made]

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        return self.prepared(phantom.make(seed, label, settings), encoding)

    def prepared(self, clip: phantom.Clip, encoding: str) -> Sample | Refusal:
        """A clip in memory, as the node would see it in that encoding, with the box that a reader would draw."""
        header = _header(clip)
        frames = clip.frames
        if encoding == "jpeg":
            frames = np.stack([dicomfile.jpeg_round_trip(frame, 92) for frame in frames])
        found = engine.prepare(instance_of(header), MemoryReader(frames), reader_box(clip))
        if isinstance(found, Refusal):
            return found
        x0, y0, x1, y1 = found.region
        area = float(np.log((x1 - x0) * (y1 - y0)))
        metadata = [clip.frame_ms, clip.mm_per_px, area, (y1 - y0) / (x1 - x0)]
        nuisance = np.concatenate([image_statistics(found.crops.astype(np.float64) / 255), metadata])
        return Sample(found.x, _place(clip, found), nuisance, extra=_for_locator(clip, frames))

    def augment(
        self, x: NDArray[np.float32], place: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As for stills; and a sweep may as well run the other way."""
        x, place = super().augment(x, place, rng)
        turned = rng.random(len(x)) < 0.5
        x[turned], place[turned] = x[turned, :, ::-1], place[turned, ::-1]
        return x, place

    def sources(self) -> list[Path]:
        return [*super().sources(), Path(dicom.__file__)]

    # -- training and package: the classifier is the default one; beside it stands a locator

    def networks(self, preset: str) -> dict[str, nn.Module]:
        from engines.training import locator

        return super().networks(preset) | {locator.MODEL: locator.untrained(plan_of(self.task)["locator"]["width"])}

    def fit(self, run: Run) -> None:
        from engines.training import locator

        super().fit(run)
        train = run.cohort("train")
        if "locator_mask" in train.extra:  # a folder of a site's own clips brings its regions, and keeps the given one
            settings = locator.Settings(**run.plan["locator"], threads=run.threads)
            x, masks = (train.extra[f"locator_{name}"].astype(np.float32) for name in ("x", "mask"))
            locator.fit_locator(x, masks, settings, run.checkpoint)

    def export(self, run: Run) -> dict[str, Any]:
        from engines.training import locator

        said = super().export(run)
        held = run.cohort("validation").extra
        x, masks = (held[f"locator_{name}"].astype(np.float32) for name in ("x", "mask"))
        network = locator.load(run.checkpoint)
        beside = locator.export_locator(network, x[:3], run.out)
        said["parity"] |= {f"locator {precision}": value for precision, value in beside["parity"].items()}
        about = locator.report(network, x, masks, engine.LOCATOR_CELLS)
        said["more"] = {"locator": about | {"parameters": beside["parameters"]}}
        return said

    def models(self, run: Run) -> dict[str, Any]:
        from engines.training import locator

        return super().models(run) | {locator.MODEL: locator.manifest_entry()}

    def golden(self, run: Run) -> dict[str, NDArray[Any]]:
        from engines.training import locator

        x = run.cohort("validation").extra["locator_x"][:2].astype(np.float32)
        return locator.golden_cases(run.out, x)

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "x", "kind": "cine", "frames": engine.FRAMES, "size": list(engine.INPUT_SIZE), "channels": 1,
                "normalise": {"mean": engine.MEAN, "std": engine.STD},
            }
        ]  # fmt: skip

    def image_input(self, grey: list[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        stills = super().image_input([grey[round(k)] for k in np.linspace(0, len(grey) - 1, engine.FRAMES)])
        return None if stills is None else np.ascontiguousarray(stills.transpose(1, 0, 2, 3)[None])


def reader_box(clip: phantom.Clip) -> engine.Box:
    """The box of the outline, drawn as exactly as people draw."""
    rows, columns = np.flatnonzero(clip.nodule.any(axis=1)), np.flatnonzero(clip.nodule.any(axis=0))
    x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
    size = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    moved = np.random.default_rng([clip.seed, 9]).uniform(-JITTER, JITTER, 4) * size
    x0, y0, x1, y1 = (round(v) for v in np.array([x0, y0, x1, y1]) + moved)
    left, top, right, bottom = clip.region
    return max(x0, left), max(y0, top), min(x1, right), min(y1, bottom)


def _header(clip: phantom.Clip) -> Any:
    """The header without 5 MB of pixels that would be encoded only to be dropped."""
    thin = phantom.Clip(
        clip.seed, clip.label, np.zeros((1, 1, 1, 3), np.uint8), clip.frame_ms, clip.region, clip.mm_per_px,
        clip.nodule, clip.foci, clip.inside,
    )  # fmt: skip
    header = dicom.dataset(thin, "raw", dicom.labels(uid_seed=clip.seed))
    header.NumberOfFrames, header.Rows, header.Columns = clip.frames.shape[:3]
    return header


def _place(clip: phantom.Clip, found: engine.Prepared) -> NDArray[np.float32]:
    """Cells of the map that hold a punctate echo inside the nodule."""
    x0, y0, x1, y1 = found.region
    place = np.zeros(GRID, np.float32)
    frames = np.array(found.numbers) - 1
    for (when, row, column), inside in zip(clip.foci, clip.inside, strict=True):
        if not inside:
            continue
        near = np.flatnonzero(np.abs(frames - when) <= 1.5)
        r, c = int((row - y0) / (y1 - y0 + 1) * GRID[1]), int((column - x0) / (x1 - x0 + 1) * GRID[2])
        if 0 <= r < GRID[1] and 0 <= c < GRID[2]:
            place[near * GRID[0] // len(frames), r, c] = 1
    return place


def _for_locator(clip: phantom.Clip, frames: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The picture that the locator sees, and the nodule on its grid."""
    x0, y0, x1, y1 = clip.region
    numbers = np.linspace(1, len(frames), engine.LOCATOR_FRAMES + 2).round()[1:-1].astype(int)
    grey = [ultrasound.to_gray(frames[n - 1, y0 : y1 + 1, x0 : x1 + 1]) for n in numbers]
    mask = resize(clip.nodule[y0 : y1 + 1, x0 : x1 + 1].astype(np.float32), engine.LOCATOR_SIZE) > 0.5
    return {"locator_x": engine.locator_input(grey)[0].astype("f2"), "locator_mask": mask.astype("u1")}


RECIPE = ThyroidCine()

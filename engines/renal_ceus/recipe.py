"""How the packages of this task are made: phantoms through the engine, stills of one clip averaged. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.renal_ceus import engine, phantom
from engines.training import dicomfile
from engines.training.headers import MemoryReader, instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Sample, Settings

PLACE = (28, 28)


class RenalCeus(Recipe):
    """RepVGG on stills at fixed times after the arrival of the agent."""

    task = "renal_ceus"
    network_name = "RepVGG-A0 topology"

    def write(self, args: argparse.Namespace) -> list[Path]:
        said = {
            key: getattr(args, key)
            for key in ("description", "body_part", "laterality", "patient_name", "patient_id", "agent", "uid_seed")
            if getattr(args, key) is not None
        }
        if said.get("laterality") == "none":
            said["laterality"] = ""
        clip = phantom.make(args.seed, args.label, phantom.generator(args.generator), args.frames or phantom.FRAMES)
        encoding = args.encoding or "jpeg"
        name = f"{self.task}-{args.seed}-{args.label}-{encoding}.dcm"
        return [dicomfile.write(clip, args.out / name, encoding, dicomfile.Labels(**said))]

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        return self.prepared(phantom.make(seed, label, settings), encoding)

    def prepared(self, clip: phantom.Clip, encoding: str) -> Sample | Refusal:
        """A clip in memory, as the node would see it in that encoding."""
        labels = dicomfile.Labels(uid_seed=clip.seed)
        header = dicomfile.dataset(_Thin(clip), "raw", labels)
        header.NumberOfFrames, header.Rows, header.Columns = clip.frames.shape[:3]
        frames = clip.frames
        if encoding == "jpeg":
            frames = np.stack([dicomfile.jpeg_round_trip(frame, labels.jpeg_quality) for frame in frames])
        found = engine.prepare(instance_of(header), MemoryReader(frames))
        if isinstance(found, Refusal):
            return found
        place = resize(clip.mass * np.float32(clip.label), PLACE)
        metadata = [clip.frame_ms, clip.mm_per_px, float(clip.contrast[0]), float(len(found.crops))]
        nuisance = np.concatenate([image_statistics(found.crops.astype(np.float64) / 255), metadata])
        return Sample(found.x, np.asarray(place, np.float32), nuisance)

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "x", "kind": "cine", "frames": len(engine.SECONDS_AFTER_ARRIVAL),
                "size": list(engine.INPUT_SIZE), "channels": 1, "normalise": {"mean": engine.MEAN, "std": engine.STD},
            }
        ]  # fmt: skip


class _Thin:
    """A clip with one pixel, for its header: encoding 22 MB only to drop them would double the time."""

    def __init__(self, clip: phantom.Clip) -> None:
        self.frames = np.zeros((1, 1, 1, 3), np.uint8)
        self.frame_ms, self.contrast, self.tissue, self.mm_per_px = (
            clip.frame_ms,
            clip.contrast,
            clip.tissue,
            clip.mm_per_px,
        )


RECIPE = RenalCeus()

"""How the packages of this task are made: one testis of each phantom patient through the engine. No torch.

A cohort holds one side of each patient, so that its units are independent and threshold, gate and nomogram fit the unit
that is reported. The nomogram is fitted on log-odds out of fold: for each fold of the training cohort a network of the
same kind is trained on the others, calibrated, and asked about it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.testis_noa import dicom, engine, phantom
from engines.training import stats
from engines.training.fusion import Term, fit_fusion
from engines.training.headers import MemoryReader, instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Run, Sample, Settings, plan_of

if TYPE_CHECKING:
    from torch import nn

    from engines.training.cohort import Cohort

PLACE = (28, 28)
TERMS = (Term("FSH", "log"), Term("TESTICULAR_VOLUME"), Term("EDV"))
GOLDEN_STILLS = 2
JITTER = 0.06
"""Of the box's side: a reader outlines a testis, and the locator finds it, only so exactly."""


class TestisNoa(Recipe):
    """NASNet-A Mobile on the testis, and the nomogram."""

    task = "testis_noa"
    covariates = tuple(term.name for term in TERMS)
    method = "Grad-CAM"  # of a linear head on pooled features: the class activation map, exactly
    network_name = "NASNet-A Mobile topology"

    def write(self, args: argparse.Namespace) -> list[Path]:
        said = {
            key: getattr(args, key)
            for key in ("description", "body_part", "patient_name", "patient_id", "uid_seed")
            if getattr(args, key, None) is not None
        }
        side = getattr(args, "laterality", None)
        if side == "none":
            said["lateral"] = False
        elif side in phantom.SIDES:
            said["sides"] = side
        patient = phantom.make(args.seed, args.label, phantom.generator(args.generator))
        return dicom.write(patient, args.out, args.encoding or "jpeg", dicom.Labels(**said), bool(args.roi))

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        side = phantom.SIDES[seed // 2 % 2]
        return self.prepared(phantom.make(seed, label, settings, (side,)), encoding)

    def prepared(self, patient: phantom.Patient, encoding: str) -> Sample | Refusal:
        """The first testis of a patient in memory, as the node would see it in that encoding."""
        still = patient.stills[0]
        ds = dicom.header(still, 1, dicom.Labels(uid_seed=patient.seed), b"")
        image = dicom.jpeg_round_trip(still.image) if encoding == "jpeg" else still.image
        found = engine.prepare(instance_of(ds), MemoryReader(image[None]), reader_box(patient.seed, still))
        if isinstance(found, Refusal):
            return found
        x0, y0, x1, y1 = found.region
        signal = still.signal[y0 : y1 + 1, x0 : x1 + 1]
        place = resize(signal, PLACE) * np.float32(patient.label)
        area = float(np.log(still.mask.sum()))
        shape = (y1 - y0 + 1) / (x1 - x0 + 1)
        metadata = [still.mm_per_px, area, shape, float(still.side == "R")]
        nuisance = np.concatenate([image_statistics(found.crops.astype(np.float64) / 255), metadata])
        return Sample(
            found.x, np.asarray(place, np.float32), nuisance, np.array(patient.covariates(still.side)),
            {"strength": np.array(still.strength), **_for_locator(still, image)},
        )  # fmt: skip

    def sources(self) -> list[Path]:
        return [*super().sources(), Path(dicom.__file__)]

    # -- training

    def networks(self, preset: str) -> dict[str, nn.Module]:
        from engines.training import locator

        return super().networks(preset) | {locator.MODEL: locator.untrained(plan_of(self.task)["locator"]["width"])}

    def fit(self, run: Run) -> None:
        """The network that is shipped; one for each fold where patients are known; the locator where outlines are."""
        super().fit(run)
        train = run.cohort("train")
        if run.folder is None or "patient" in train.extra:
            self._fit_folds(run)
        if "locator_mask" in train.extra:
            self._fit_locator(run)

    def _fit_folds(self, run: Run) -> None:
        """Log-odds out of fold, each calibrated on validation, into the checkpoint."""
        from engines.training import fit

        train, validation, plan = run.cohort("train"), run.cohort("validation"), run.plan
        how = plan["folds"][run.preset]
        settings = fit.Settings(
            **(plan["presets"][run.preset] | {"epochs": how["epochs"]}), threads=run.threads, device=run.device
        )
        fold = folds(train, how["count"])
        margin = np.full(len(train.y), np.nan)
        for k in range(how["count"]):
            held, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
            model = fit.fit(
                run.task, run.preset, settings, train.part(rest), train.part(held), run.checkpoint / f"fold-{k}"
            )
            t = temperature(validation.y, fit.clip_margins(model, validation, run.device))
            margin[held] = fit.clip_margins(model, train.part(held), run.device) / t
        np.savez(run.checkpoint / "folds.npz", allow_pickle=False, margin=margin, fold=fold, seeds=train.seeds)

    def _fit_locator(self, run: Run) -> None:
        from engines.training import locator

        settings = locator.Settings(**run.plan["locator"], threads=run.threads)
        locator.fit_locator(*places(run.cohort("train")), settings, run.checkpoint)

    def _has_locator(self, run: Run) -> bool:
        return (run.checkpoint / "locator.safetensors").is_file()

    # -- the package

    def export(self, run: Run) -> dict[str, Any]:
        from engines.training import locator

        said = super().export(run)
        if not self._has_locator(run):
            return said
        network = locator.load(run.checkpoint, run.plan["locator"]["width"])
        images, masks = places(run.cohort("validation"))
        written = locator.export_locator(network, images[:3], run.out)
        said["parity"] |= {f"locator {precision}": value for precision, value in written["parity"].items()}
        found = locator.report(network, images, masks, engine.LOCATOR_CELLS)
        unseen = {name: round(value, 4) for name, value in found.items()}
        return said | {"more": {"locator_parameters": written["parameters"], "locator_unseen": unseen}}

    def models(self, run: Run) -> dict[str, Any]:
        from engines.training import locator

        own = {locator.MODEL: locator.manifest_entry()} if self._has_locator(run) else {}
        return super().models(run) | own

    def golden(self, run: Run) -> dict[str, NDArray[Any]]:
        from engines.training import locator

        if not self._has_locator(run):
            return {}
        return locator.golden_cases(run.out, places(run.cohort("validation"))[0][:GOLDEN_STILLS])

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "x", "kind": "still", "frames": 1, "size": list(engine.INPUT_SIZE), "channels": 1,
                "normalise": {"mean": engine.MEAN, "std": engine.STD},
            },
            {
                "name": "locator.x", "kind": "still", "frames": 1, "size": list(engine.LOCATOR_SIZE), "channels": 1,
                "normalise": {"mean": engine.MEAN, "std": engine.STD},
            },
        ]  # fmt: skip

    def fusion(self, run: Run) -> dict[str, Any] | None:
        """The nomogram, of the patients who have all values (nothing is imputed)."""
        train = run.cohort("train")
        if not (run.checkpoint / "folds.npz").is_file():
            return None
        with np.load(run.checkpoint / "folds.npz", allow_pickle=False) as file:
            margin, count = file["margin"], len(set(file["fold"].tolist()))
        whole = np.isfinite(train.covariates).all(axis=1)
        if len(margin) != len(train.y):
            raise ValueError("folds.npz belongs to another cohort: run fit again")
        if not whole.any():
            return None
        about = f"training cohort, log-odds out of fold ({count} folds)"
        return fit_fusion(margin[whole], train.covariates[whole], train.y[whole], TERMS, about)


def folds(cohort: Cohort, count: int) -> NDArray[np.int64]:
    """The fold of each unit. Phantoms are one unit a patient, in pairs of both labels; images of a folder are divided
    by patient, because a second image of a patient in another fold would be half in-sample."""
    if "patient" in cohort.extra:
        return np.asarray(np.unique(cohort.extra["patient"], return_inverse=True)[1] % count, np.int64)
    return np.asarray(np.arange(len(cohort.y)) // 2 % count, np.int64)


def temperature(y: NDArray[np.int64], margin: NDArray[np.float64]) -> float:
    """T of a fold's network, as the package's own: never below 1, and 1 where it does not help."""
    t = max(1.0, stats.temperature(y, margin))
    return t if stats.nll(y, margin / t) < stats.nll(y, margin) else 1.0


def places(cohort: Cohort) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole B-mode images on the locator's grid, and the testis in them."""
    return cohort.extra["locator_x"].astype(np.float32), cohort.extra["locator_mask"].astype(np.float32)


def _for_locator(still: phantom.Still, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """What the locator sees of a still, and where the testis lies on its grid."""
    x0, y0, x1, y1 = still.region
    x = engine.locator_input(image[y0 : y1 + 1, x0 : x1 + 1])[0]
    mask = resize(still.mask[y0 : y1 + 1, x0 : x1 + 1].astype(np.float32), engine.LOCATOR_SIZE)
    return {"locator_x": x.astype(np.float16), "locator_mask": mask > 0.5}


def reader_box(seed: int, still: phantom.Still) -> engine.Box:
    """The box of the testis as somebody would have outlined it."""
    rows, columns = np.nonzero(still.mask.any(axis=1))[0], np.nonzero(still.mask.any(axis=0))[0]
    x0, x1, y0, y1 = columns[0], columns[-1], rows[0], rows[-1]
    off = np.random.default_rng([seed, 7]).uniform(-JITTER, JITTER, 4)
    wide, high = x1 - x0 + 1, y1 - y0 + 1
    return (
        int(x0 + off[0] * wide), int(y0 + off[1] * high), int(x1 + off[2] * wide), int(y1 + off[3] * high)
    )  # fmt: skip


RECIPE = TestisNoa()

"""How the packages of this task are made: super-resolution on pairs, radiomics of what it gives, signature, fusion."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.testis_tumour import engine, objects, phantom, samples
from engines.training.recipe import Recipe, Run, Sample, Settings, plan_of, task_folder

if TYPE_CHECKING:
    from torch import nn

    from engines.testis_tumour.chain import Chain
    from engines.training.cohort import Cohort
    from engines.training.signature import Signature

MAPS = 24
UNSEEN = 60
"""Pairs on which super-resolution is compared with interpolation."""
TRANSFORMS = {"AGE": "none", "AFP": "log", "B_HCG": "log", "LDH": "log"}


class TestisTumour(Recipe):
    """Two graphs: "superres" and, on the features of its output, "radiomics"."""

    task = "testis_tumour"
    covariates = phantom.MARKERS
    method = "sensitivity map"
    explained = "radiomics"
    value_range = (0.0, 255.0)
    network_name = "x2 super-resolution (plain convolutions, pixel shuffle) and a logistic radiomics signature"
    plain = False
    points = False

    # -- phantoms

    def write(self, args: argparse.Namespace) -> list[Path]:
        keys = ("description", "body_part", "laterality", "patient_name", "patient_id", "uid_seed")
        said = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
        if said.get("laterality") == "none":
            said["laterality"] = ""
        encoding = args.encoding or "jpeg"
        made = phantom.make(args.seed, args.label, phantom.generator(args.generator))
        image = objects.still(made, encoding, objects.Labels(**said))
        files = {"": image, "-lab": objects.laboratory(made, image, args.uid_seed)}
        if args.roi:
            files["-seg"] = objects.segmentation(made, image)
        args.out.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, ds in files.items():
            path = args.out / f"{self.task}-{args.seed}-{args.label}-{encoding}{name}.dcm"
            ds.save_as(path, enforce_file_format=True)
            paths.append(path)
        return paths

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        return samples.sample(seed, label, settings, encoding)

    def sources(self) -> list[Path]:
        names = ("phantom.py", "phantom.yaml", "objects.py", "engine.py", "samples.py")
        return [*super().sources()[:1], *(task_folder(self.task) / name for name in names)]

    # -- training

    def networks(self, preset: str) -> dict[str, nn.Module]:
        """A signature of every fifth feature, on the scale of the golden cases, stands for the one a fit selects."""
        from engines.testis_tumour import network
        from engines.training import locator

        presets = plan_of(self.task)["presets"]
        with np.load(task_folder(self.task) / "model" / "golden.npz", allow_pickle=False) as golden:
            table = golden["radiomics.x"]
        centre, scale = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-3 + np.abs(table).mean(axis=0) / 10)
        columns = range(0, len(engine.FEATURES), 5)
        terms = [network.Term(k, False, float(centre[k]), float(scale[k]), 0.1) for k in columns]
        return {
            "locator": locator.untrained(presets[preset]["locator"]["width"]),
            "superres": self.network(preset),
            "radiomics": network.Radiomics(terms, 0.0),
        }

    def fit(self, run: Run) -> None:
        import torch

        from engines.training import locator, signature, superres

        preset = dict(run.plan["presets"][run.preset])
        place = locator.Settings(**preset.pop("locator"), seed=preset["seed"], threads=run.threads)
        pairs = samples.pairs_of(run.plan["cohorts"]["train"]["first_seed"], preset.pop("pairs"))
        settings = superres.Settings(**preset, threads=run.threads, device=run.device)
        network = superres.fit(self.network(run.preset), settings, pairs, run.checkpoint).cpu()

        def model(_name: str, inputs: Any) -> dict[str, NDArray[np.float32]]:
            with torch.no_grad():
                return {"y": network(torch.from_numpy(inputs["x"])).numpy()}

        train = run.cohort("train")
        table = table_of(train.x[:, 0], model)
        np.savez(run.checkpoint / "features.npz", x=table, y=train.y)
        chosen = signature.select(table, train.y, engine.FEATURES, settings.seed)
        (run.checkpoint / "signature.json").write_text(json.dumps(signature.dump(chosen)), "utf-8")
        locator.fit_locator(*_places(train), place, run.checkpoint)

    def export(self, run: Run) -> dict[str, Any]:
        import torch

        from engines.testis_tumour import network
        from engines.training import export, locator, package, superres

        torch.set_num_threads(run.threads)
        upscale = superres.load(self.network(run.preset), run.checkpoint)
        tiles = run.cohort("validation").x[:3, 0, :1].astype(np.float32) / np.float32(255)
        graphs = export.export(upscale, tiles[:2], ("y",), run.out / "models/superres")
        parity = {f"superres {k}": v for k, v in export.parity(upscale, graphs, tiles).items()}
        chosen = _signature(run)
        score = network.Radiomics([network.Term(t.column, t.log, t.centre, t.scale, t.beta) for t in chosen.terms],
                                  chosen.intercept).eval()  # fmt: skip
        with np.load(run.checkpoint / "features.npz") as kept:
            table: NDArray[np.float32] = kept["x"][:3].astype(np.float32)
        graphs = export.export(score, table[:2], ("logits", "features"), run.out / "models/radiomics")
        # Raw features span eight powers of ten: half precision would round away what tells the classes apart.
        graphs.pop("fp16").unlink()
        parity |= {f"radiomics {k}": v for k, v in export.parity(score, graphs, table).items()}
        head = {"W": score.head.weight.detach().numpy(), "b": score.head.bias.detach().numpy()}
        package.write_arrays(run.out, "head.npz", head)
        unseen = run.plan["cohorts"]["test"]["first_seed"]
        quality = superres.compare(upscale, samples.pairs_of(unseen, UNSEEN))
        place = locator.load(run.checkpoint, run.plan["presets"][run.preset]["locator"]["width"])
        images, masks = _places(run.cohort("test"))
        written = locator.export_locator(place, images[:3], run.out)
        parity |= {f"locator {k}": v for k, v in written["parity"].items()}
        found = locator.report(place, images, masks, engine.MIN_PLACE)
        parameters = sum(p.numel() for p in upscale.parameters()) + score.head.weight.numel() // 2 + 1
        return {
            "parity": parity,
            "parameters": parameters + written["parameters"],
            "more": {
                "signature": chosen.to_json(),
                "super_resolution_unseen": quality,
                "locator_unseen": {name: round(value, 4) for name, value in found.items()},
            },
        }

    # -- the package

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {"name": "superres.x", "kind": "still", "size": [engine.TILE, engine.TILE], "channels": 1,
             "normalise": {"mean": 0.0, "std": 255.0}},
            {"name": "locator.x", "kind": "still", "size": list(engine.LOCATOR_SIZE), "channels": 1,
             "normalise": {"mean": 0.0, "std": 255.0}},
            {"name": "radiomics.x", "kind": "still", "size": [len(engine.FEATURES)], "channels": 1},
        ]  # fmt: skip

    def models(self, run: Run) -> dict[str, Any]:
        from engines.training import locator
        from engines.training.export import TOLERANCE

        del run
        return {
            "locator": locator.manifest_entry(),
            "superres": {"inputs": ["x"], "outputs": ["y"], "tolerance": dict(TOLERANCE)},
            "radiomics": {"inputs": ["x"], "outputs": ["logits", "features"], "tolerance": {"fp32": TOLERANCE["fp32"]}},
        }

    def graph(self, folder: Path) -> Chain:
        from engines.testis_tumour.chain import Chain

        return Chain.of(folder)

    def golden(self, run: Run) -> dict[str, NDArray[Any]]:
        from engines.training import locator

        chain = self.graph(run.out)
        x = run.cohort("validation").x[:4, 0]
        table = chain.features(x)
        tiles = x[:2, :1].astype(np.float32) / np.float32(255)
        cases = {"superres.x": tiles, **{f"superres.{k}": v for k, v in chain.model("superres", {"x": tiles}).items()}}
        scored = chain.model("radiomics", {"x": table})
        cases |= locator.golden_cases(run.out, _places(run.cohort("validation"))[0][:2])
        return {**cases, "radiomics.x": table, **{f"radiomics.{k}": v for k, v in scored.items()}}

    def fusion(self, run: Run) -> dict[str, Any] | None:
        """On log-odds of signatures that were selected and weighed without the man they are of."""
        from engines.training import evaluate, fusion, package, signature

        with np.load(run.checkpoint / "features.npz") as kept:
            table, y = kept["x"], kept["y"]
        chosen, settings = _signature(run), run.plan["presets"][run.preset]
        train = package.Scored(y, chosen.margin(table), chosen.standardised(table), np.arange(len(y)))
        validation = evaluate.score(self.graph(run.out), run.cohort("validation"))
        temperature = package.choose(train, validation).temperature
        margin = signature.cross_fitted(table, y, engine.FEATURES, settings["seed"]) / temperature
        terms = [fusion.Term(name, TRANSFORMS[name]) for name in self.covariates]  # type: ignore[arg-type]
        return fusion.fit_fusion(margin, run.cohort("train").covariates, y, terms, "train seeds, log-odds out of fold")

    def scale_maps(self, run: Run, graph: Any, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        del weights
        held = run.cohort("validation")
        return np.stack([graph.map(one) for one in held.x[held.y == 1][:MAPS, 0]])

    # -- evaluation

    def measured(self, run: Run) -> dict[str, Any]:
        """Figures beside the common ones, under the names the card knows."""
        from engines.testis_tumour import measure

        with np.load(run.checkpoint / "features.npz") as kept:
            table = kept["x"]
        return measure.measured(run, self.graph(run.out), _signature(run), table)

    def image_input(self, grey: list[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        from engines.testis_tumour.chain import middle

        side = (engine.TILE, engine.TILE)
        images = [np.stack([np.rint(resize(g, side)), middle(side)]) for g in grey]
        return np.asarray(np.stack(images), np.float32)


def table_of(x: NDArray[Any], model: Any) -> NDArray[np.float32]:
    """(n, len(FEATURES)) of inputs (n, 2, H, W) through a super-resolution model."""
    from engines.testis_tumour.chain import prepared as as_prepared

    rows = []
    for one in x:
        fine, inside = engine.superresolve(as_prepared(one), model)
        rows.append(engine.features(fine[None], inside)[0])
    return np.stack(rows)


def _places(cohort: Cohort) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole pictures on the locator's grid, and the tumour in them."""
    return cohort.extra["locator_x"].astype(np.float32), cohort.extra["locator_mask"].astype(np.float32)


def _signature(run: Run) -> Signature:
    from engines.training import signature

    return signature.load(json.loads((run.checkpoint / "signature.json").read_text("utf-8")))


RECIPE = TestisTumour()

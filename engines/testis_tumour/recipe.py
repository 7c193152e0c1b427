"""How the packages of this task are made: super-resolution on pairs, radiomics of what it gives, signature, fusion."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.engine import Selection
from dicom_node.pixels import ultrasound
from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from dicom_node.study import Study
from engines.testis_tumour import engine, objects, phantom
from engines.training.headers import instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Run, Sample, Settings, task_folder

if TYPE_CHECKING:
    from engines.testis_tumour.chain import Chain
    from engines.training.signature import Signature
    from engines.training.superres import Pairs

MAPS = 24
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
        made = phantom.make(seed, label, settings)
        found = prepared(made, encoding)
        if isinstance(found, Refusal):
            return found
        native = _on_panel(made.signal, made, found)
        metadata = [made.mm_per_px, float((found.share > 127).sum()), float(made.picture.shape[0])]
        nuisance = np.concatenate([image_statistics(found.image[None] / 255.0), metadata[:2]])
        return Sample(
            np.stack([found.image, found.share]).astype(np.float32)[None],
            native,
            nuisance,
            np.array([made.blood[name] for name in phantom.MARKERS]),
            _for_locator(made),
        )

    def sources(self) -> list[Path]:
        return [*super().sources(), task_folder(self.task) / "objects.py"]

    # -- training

    def fit(self, run: Run) -> None:
        import torch

        from engines.training import signature, superres

        preset = dict(run.plan["presets"][run.preset])
        pairs = make_pairs(run.plan["cohorts"]["train"]["first_seed"], preset.pop("pairs"))
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

    def export(self, run: Run) -> dict[str, Any]:
        import torch

        from engines.testis_tumour import network
        from engines.training import export, package, superres

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
        quality = superres.compare(upscale, make_pairs(run.plan["cohorts"]["test"]["first_seed"], 60))
        parameters = sum(p.numel() for p in upscale.parameters()) + score.head.weight.numel() // 2 + 1
        more = {"signature": chosen.to_json(), "super_resolution_unseen": quality}
        return {"parity": parity, "parameters": parameters, "more": more}

    # -- the package

    def inputs(self) -> list[dict[str, Any]]:
        return [
            {"name": "superres.x", "kind": "still", "size": [engine.TILE, engine.TILE], "channels": 1,
             "normalise": {"mean": 0.0, "std": 255.0}},
            {"name": "radiomics.x", "kind": "still", "size": [len(engine.FEATURES)], "channels": 1},
        ]  # fmt: skip

    def models(self, run: Run) -> dict[str, Any]:
        from engines.training.export import TOLERANCE

        del run
        return {
            "superres": {"inputs": ["x"], "outputs": ["y"], "tolerance": dict(TOLERANCE)},
            "radiomics": {"inputs": ["x"], "outputs": ["logits", "features"], "tolerance": {"fp32": TOLERANCE["fp32"]}},
        }

    def graph(self, folder: Path) -> Chain:
        from engines.testis_tumour.chain import Chain

        return Chain.of(folder)

    def golden(self, run: Run) -> dict[str, NDArray[Any]]:
        chain = self.graph(run.out)
        x = run.cohort("validation").x[:4, 0]
        table = chain.features(x)
        tiles = x[:2, :1].astype(np.float32) / np.float32(255)
        cases = {"superres.x": tiles, **{f"superres.{k}": v for k, v in chain.model("superres", {"x": tiles}).items()}}
        scored = chain.model("radiomics", {"x": table})
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


# --- a phantom as the node sees it -----------------------------------------------------------------------------------


def prepared(made: phantom.Still, encoding: str) -> engine.Prepared | Refusal:
    """A phantom through the engine's own selection and preparation, its hand-drawn region as a SEG would give it."""
    labels = objects.Labels(uid_seed=made.seed)
    ds = objects.header(made, labels)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    instance = instance_of(ds)
    selection = engine.select(Study.from_instances("1.2", 1, [instance]), {})
    if not isinstance(selection, Selection):
        return selection
    picture = objects.jpeg_round_trip(made.picture) if encoding == "jpeg" else made.picture
    mask = np.zeros(picture.shape, np.bool_)
    panel = ultrasound.tissue_regions(instance.header)[0]
    panel.crop(mask)[:] = made.roi
    return engine.prepare(picture, panel, mask)


def make_pairs(first_seed: int, count: int) -> Pairs:
    """Acquired and sharp pictures of the same tissue, the window that the engine would cut."""
    from engines.training.superres import Pairs

    low, high = [], []
    for index in range(count):
        made = phantom.make(first_seed + index, index % 2, sharp=True)
        found = prepared(made, ("raw", "jpeg")[index // 2 % 2])
        if isinstance(found, Refusal) or made.sharp is None:
            continue
        low.append(found.image)
        high.append(np.rint(_window(made.sharp, made, found, 2)).astype(np.uint8))
    return Pairs(np.stack(low), np.stack(high))


def _window(image: NDArray[Any], made: phantom.Still, found: engine.Prepared, finer: int = 1) -> NDArray[np.float32]:
    """Another image of the panel, resampled and cut as `prepare` cut the picture; borders repeated."""
    size = [finer * max(1, round(n * made.mm_per_px / engine.NATIVE_MM)) for n in phantom.PANEL]
    resampled = resize(image, (size[0], size[1]))
    at = [
        np.clip(finer * start + np.arange(finer * n), 0, whole - 1)
        for start, n, whole in zip(found.corner, found.image.shape, size, strict=True)
    ]
    return np.asarray(resampled[np.ix_(*at)], np.float32)


def _on_panel(signal: NDArray[np.float32], made: phantom.Still, found: engine.Prepared) -> NDArray[np.float32]:
    """The planted signal on a grid of 64 cells of 0.4 mm a side."""
    return resize(_window(signal, made, found), (64, 64))


def _for_locator(made: phantom.Still) -> dict[str, NDArray[np.float16]]:
    """The whole panel and the tumour on the locator's grid."""
    x0, y0, x1, y1 = made.region
    seen = engine.locator_input(made.picture[y0 : y1 + 1, x0 : x1 + 1])[0]
    mask = resize(made.tumour.astype(np.float32), engine.LOCATOR_SIZE)
    return {"locator_x": seen.astype(np.float16), "locator_y": mask[None].astype(np.float16)}


def table_of(x: NDArray[Any], model: Any) -> NDArray[np.float32]:
    """(n, len(FEATURES)) of inputs (n, 2, H, W) through a super-resolution model."""
    from engines.testis_tumour.chain import prepared as as_prepared

    rows = []
    for one in x:
        fine, inside = engine.superresolve(as_prepared(one), model)
        rows.append(engine.features(fine[None], inside)[0])
    return np.stack(rows)


def _signature(run: Run) -> Signature:
    from engines.training import signature

    return signature.load(json.loads((run.checkpoint / "signature.json").read_text("utf-8")))


RECIPE = TestisTumour()

"""The verbs of the command line: fit, export, package, evaluate, reproduce. Composes the other modules; prints figures.

Work folder: cohorts, `<task>-<preset>/` with the checkpoint. Package folder: `engines/<task>/model/` unless `--out`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engines.training import card, cohort, evaluate, export, fit, package, real
from engines.training.cohort import Cohort, Spec
from engines.training.evaluate import Graph
from engines.training.package import Choices

GOLDEN_CLIPS = 4


@dataclass(frozen=True)
class Options:
    """One run."""

    task: str
    preset: str
    work: Path
    out: Path
    processes: int
    threads: int
    device: str
    real: tuple[Path, ...]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        out = args.out or Path(__file__).parents[1] / args.task / "model"
        return cls(args.task, args.preset, args.work, out, args.processes, args.threads, args.device, tuple(args.real))

    @property
    def plan(self) -> dict[str, Any]:
        """training.yaml of the task."""
        path = Path(__file__).parents[1] / self.task / "training.yaml"
        plan: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        return plan

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.task}-{self.preset}"

    def cohort(self, name: str) -> Cohort:
        return cohort.build(Spec(self.task, **self.plan["cohorts"][name]), self.work, self.processes)


def run(verb: str, options: Options) -> int:
    """One verb."""
    verbs: dict[str, Callable[[Options], None]] = {
        "fit": do_fit,
        "export": do_export,
        "package": do_package,
        "evaluate": do_evaluate,
        "reproduce": do_reproduce,
    }
    verbs[verb](options)
    return 0


def do_fit(o: Options) -> None:
    """Train; the checkpoint lies in the work folder."""
    settings = fit.Settings(**o.plan["presets"][o.preset], threads=o.threads, device=o.device)
    fit.fit(o.task, o.preset, settings, o.cohort("train"), o.cohort("validation"), o.checkpoint)


def do_export(o: Options) -> None:
    """Checkpoint to ONNX, compared with torch."""
    torch.set_num_threads(o.threads)
    network: Any = fit.load(o.task, o.preset, o.checkpoint)
    deployed = network.deploy()
    x, _ = o.cohort("validation").frames()
    sample = x[:3].astype(np.float32)
    with torch.no_grad():
        fused = float((network(torch.from_numpy(sample))[0] - deployed(torch.from_numpy(sample))[0]).abs().max())
    folder = o.out / "models" / "classifier"
    shutil.rmtree(folder, ignore_errors=True)
    paths = export.export(deployed, sample[:2], ("logits", "features"), folder)
    worst = export.parity(deployed, paths, sample)
    weights, bias = deployed.full_head()
    package.write_arrays(o.out, "head.npz", {"W": weights.numpy(), "b": bias.numpy()})
    _note(o, {"fuse_error": fused, "parity": worst, "parameters": sum(p.numel() for p in deployed.parameters())})
    print(f"export {o.task}: re-parameterised within {fused:.1e}; ONNX against torch {_differences(worst)}")


def do_package(o: Options) -> None:
    """Statistics and decisions from validation, then every file with its digest."""
    graph = graph_of(o.out)
    train, validation = (evaluate.score(graph, o.cohort(name)) for name in ("train", "validation"))
    choices = package.choose(train, validation)
    package.write_arrays(o.out, "ood.npz", {"mean": choices.ood_mean, "precision": choices.ood_precision})
    held = o.cohort("validation")
    positives = held.x[held.y == 1][:, : int(held.counts.min())]
    maps = package.activation_map(
        graph(positives[:60].reshape(-1, *positives.shape[2:]).astype(np.float32))[1], head_of(o.out), 1
    )
    x = np.stack([held.x[i, 2] for i in range(GOLDEN_CLIPS)]).astype(np.float32)
    logits, features = graph(x)
    package.write_arrays(
        o.out, "golden.npz", {"classifier.x": x, "classifier.logits": logits, "classifier.features": features}
    )
    _note(o, {"choices": _chosen(choices), "scale": package.scale(maps)})
    _finish(o)


def do_evaluate(o: Options) -> None:
    """Figures on unseen seeds into metrics of the manifest and the card."""
    started = time.monotonic()
    graph, choices = graph_of(o.out), choices_of(o.out)
    found: dict[str, Any] = {}
    for name in ("test", "test_jpeg", "shifted"):
        data = o.cohort(name)
        scored = evaluate.score(graph, data)
        found[name] = evaluate.figures(scored, choices, len(data.refused))
        print(f"{name}: AUC {found[name]['auc']}, right as reported {found[name]['right_as_reported']}", flush=True)
    test = o.cohort("test")
    found["shortcut_auc"] = evaluate.shortcut(o.cohort("train"), test).to_json()
    found["single_frame_auc"] = evaluate.single_frame(graph, test)
    generator = cohort.phantom_of(o.task).generator("training")
    found["pointing"] = evaluate.pointing(graph, head_of(o.out), test, o.task, generator)
    found["gate_corrupted"] = evaluate.corruption_table(graph, choices, test)
    if o.real:
        found["gate_real"] = real.summary(real.examine(o.task, graph, choices, o.real))
    else:
        found["gate_real"] = _notes(o).get("metrics", {}).get("gate_real", {})
    _note(o, {"metrics": found})
    _finish(o)
    print(json.dumps(found, indent=2))
    print(f"evaluate {o.task}: {time.monotonic() - started:.0f} s")


def do_reproduce(o: Options) -> None:
    """Everything, in order."""
    for step in (do_fit, do_export, do_package, do_evaluate):
        started = time.monotonic()
        step(o)
        print(f"reproduce {o.task}: {step.__name__[3:]} took {time.monotonic() - started:.0f} s", flush=True)


# --- the package on disk ---------------------------------------------------------------------------------------------


def graph_of(folder: Path) -> Graph:
    """The fp32 classifier of a package."""
    return Graph(export.session(folder / "models" / "classifier" / "fp32.onnx"))


def head_of(folder: Path) -> Any:
    """Weights of the linear head, (K, C)."""
    with np.load(folder / "head.npz", allow_pickle=False) as head:
        return head["W"]


def choices_of(folder: Path) -> Choices:
    """What validation decided, read back from the manifest."""
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text("utf-8"))
    with np.load(folder / "ood.npz", allow_pickle=False) as ood:
        decision = manifest["decision"]
        return Choices(
            manifest["calibration"]["T"], 0.0, 0.0, decision["threshold"], decision["abstain"]["lower"],
            decision["abstain"]["upper"], ood["mean"], ood["precision"], manifest["ood"]["limit"],
        )  # fmt: skip


def _finish(o: Options) -> None:
    """Card, metadata and manifest from what is known so far; the manifest last, since it lists the others."""
    notes, plan = _notes(o), o.plan
    content = _manifest(o, plan, notes)
    (o.out / "MODEL_CARD.md").write_text(card.text(content, notes, plan), "utf-8")
    package.write_json(o.out, "metadata.json", card.metadata(content, notes))
    manifest = package.write_manifest(o.out, content)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"package {o.task} {manifest.version}: {len(manifest.files)} files, {size / 1e6:.2f} MB in {o.out.name}/")


def _manifest(o: Options, plan: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    engine: Any = cohort.engine_of(o.task)
    chosen, about = notes["choices"], plan["package"]
    vmin, vmax = notes["scale"]
    return {
        "schema": 1,
        "task": o.task,
        "version": about["version"],
        "algorithm": about["algorithm"],
        "intended_use": "demonstration",
        "classes": about["classes"],
        "positive": about["positive"],
        "models": {
            "classifier": {"inputs": ["x"], "outputs": ["logits", "features"], "tolerance": dict(export.TOLERANCE)}
        },
        "inputs": [
            {
                "name": "x", "kind": "cine", "frames": len(engine.SECONDS_AFTER_ARRIVAL),
                "size": list(engine.INPUT_SIZE), "channels": 1, "normalise": {"mean": engine.MEAN, "std": engine.STD},
            }
        ],
        "calibration": chosen["calibration"],
        "decision": chosen["decision"],
        "explain": {"model": "classifier", "method": "class activation map", "vmin": vmin, "vmax": vmax},
        "ood": {"file": "ood.npz", "limit": chosen["ood_limit"], "quantile": 0.99},
        "metrics": notes.get("metrics", {}),
        "provenance": {
            "network": f"RepVGG-A0 topology, preset {o.preset}",
            "parameters": notes["parameters"],
            "training": plan["presets"][o.preset],
            "data": {"kind": "phantom", "generator": f"engines/{o.task}/phantom.py", "cohorts": plan["cohorts"]},
            "fuse_error": notes["fuse_error"],
            "parity": notes["parity"],
            "torch": str(torch.__version__),
            "git": notes["git"],
            "created": notes["created"],
            "licence": "Apache-2.0",
        },
    }  # fmt: skip


def _chosen(choices: Choices) -> dict[str, Any]:
    method = "none" if choices.temperature == 1.0 else "temperature"
    return {
        "calibration": {"method": method, "T": round(choices.temperature, 6), "fitted_on": "validation seeds"},
        "nll": {"before": round(choices.nll_before, 5), "with_temperature": round(choices.nll_after, 5)},
        "decision": {
            "threshold": round(choices.threshold, 6),
            "rule": "youden on validation seeds",
            "abstain": {"lower": round(choices.lower, 6), "upper": round(choices.upper, 6)},
        },
        "ood_limit": round(choices.ood_limit, 6),
    }


def _notes(o: Options) -> dict[str, Any]:
    path = o.checkpoint / f"notes-{o.out.name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _note(o: Options, more: dict[str, Any]) -> None:
    """What one verb leaves for the next."""
    notes = _notes(o) | {"git": _commit(), "created": datetime.date.today().isoformat()} | more
    o.checkpoint.mkdir(parents=True, exist_ok=True)
    package.write_json(o.checkpoint, f"notes-{o.out.name}.json", notes)


def _commit() -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _differences(worst: dict[str, float]) -> str:
    return ", ".join(f"{precision} {value:.1e}" for precision, value in worst.items())

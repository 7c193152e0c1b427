"""The verbs of the command line: fit, export, package, evaluate, reproduce, compare. Calls the others; prints figures.

Work folder: cohorts, `<task>-<preset>/` with the checkpoint. Package folder: `engines/<task>/model/` unless `--out`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engines.training import card, compare, evaluate, gates, package, plots, real
from engines.training.evaluate import Graph
from engines.training.package import Choices
from engines.training.recipe import Run

GOLDEN_CASES, GOLDEN_BYTES = 4, 2_000_000
"""Cases of the scoring model for golden.npz: so many, fewer where inputs are volumes, never less than two."""


def run(verb: str, o: Run) -> int:
    """One verb."""
    verbs: dict[str, Callable[[Run], None]] = {
        "fit": do_fit,
        "export": do_export,
        "package": do_package,
        "evaluate": do_evaluate,
        "reproduce": do_reproduce,
        "compare": do_compare,
    }
    verbs[verb](o)
    return 0


def do_fit(o: Run) -> None:
    """Train; the checkpoint lies in the work folder."""
    started = time.monotonic()
    o.recipe.fit(o)
    _note(o, {"fit_seconds": round(time.monotonic() - started)})


def do_export(o: Run) -> None:
    """Checkpoint to ONNX, compared with torch."""
    said = o.recipe.export(o)
    _note(o, said)
    print(f"export {o.task}: ONNX against torch {_differences(said['parity'])}")


def do_package(o: Run) -> None:
    """Statistics and decisions from validation, then every file with its digest."""
    recipe = o.recipe
    graph = recipe.graph(o.out)
    held = o.cohort("validation")
    train, validation = (evaluate.score(graph, data) for data in (o.cohort("train"), held))
    choices = package.choose(train, validation)
    package.write_arrays(o.out, "ood.npz", {"mean": choices.ood_mean, "precision": choices.ood_precision})
    maps = recipe.scale_maps(o, graph, head_of(o.out))
    cases_wanted = min(GOLDEN_CASES, max(2, GOLDEN_BYTES // (4 * held.x[0, 0].size)))
    x = np.stack([held.x[i, min(2, held.counts[i] - 1)] for i in range(cases_wanted)]).astype(np.float32)
    cases = {f"{recipe.explained}.{name}": value for name, value in graph.run(x).items()}
    package.write_arrays(o.out, "golden.npz", {f"{recipe.explained}.x": x, **cases, **recipe.golden(o)})
    _note(o, {"choices": _chosen(choices), "scale": package.scale(maps), "fusion": recipe.fusion(o)})
    _finish(o)


def do_evaluate(o: Run) -> None:
    """Figures on unseen seeds into metrics of the manifest and the card."""
    started = time.monotonic()
    recipe = o.recipe
    graph, choices, notes = recipe.graph(o.out), choices_of(o.out), _notes(o)
    found: dict[str, Any] = {}
    scores = {}
    for name in ["test"] if o.folder else [n for n in o.plan["cohorts"] if n not in ("train", "validation")]:
        data = o.cohort(name)
        scores[name] = evaluate.score(graph, data)
        found[name] = evaluate.figures(scores[name], choices, len(data.refused))
        print(f"{name}: AUC {found[name]['auc']}, right as reported {found[name]['right_as_reported']}", flush=True)
        if notes.get("fusion"):
            found[name]["fused"] = evaluate.fused(notes["fusion"], recipe.covariates, choices, scores[name], data)
    train, test = o.cohort("train"), o.cohort("test")
    found["shortcut_auc"] = evaluate.shortcut(train, test).to_json()
    if test.covariates.size:
        found["covariates_auc"] = evaluate.covariates_alone(train, test).to_json()
    found["single_input_auc"] = evaluate.single_input(graph, test)
    if recipe.points and o.folder is None:  # a folder does not say where the lesion lies
        found["pointing"] = evaluate.pointing(graph, head_of(o.out), test)
    found["gate_corrupted"] = evaluate.corruption_table(recipe, graph, choices, test)
    if o.real:
        found["gate_real"] = real.summary(real.examine(recipe, o.out, graph, choices, o.real))
    else:
        found["gate_real"] = notes.get("metrics", {}).get("gate_real", {})
    if o.readers is not None:
        found["readers"] = evaluate.readers(o.readers, test, scores["test"].margin)
    found |= gates.examine(o) | recipe.measured(o)
    plots.draw(o.checkpoint, scores["test"].y, choices.probability(scores["test"].margin), found["test"])
    package.write_json(o.checkpoint, "evaluation.json", found)
    _note(o, {"metrics": found})
    _finish(o)
    print(json.dumps(found, indent=2))
    print(f"evaluate {o.task}: {time.monotonic() - started:.0f} s; plots in {o.checkpoint.name}/")


def do_reproduce(o: Run) -> None:
    """Everything, in order; for task "all" every task that comes with a training.yaml. Prints the cards' tables."""
    tasks = _tasks(o)
    whole = time.monotonic()
    for task in tasks:
        out = o.out if o.task != "all" else Path(__file__).parents[1] / task / "model"
        one = replace(o, task=task, out=out)
        for step in (do_fit, do_export, do_package, do_evaluate):
            started = time.monotonic()
            step(one)
            print(f"reproduce {task}: {step.__name__[3:]} took {time.monotonic() - started:.0f} s", flush=True)
    for task in tasks:
        out = o.out if o.task != "all" else Path(__file__).parents[1] / task / "model"
        print(f"\n{task}\n" + card.measured_of((out / "MODEL_CARD.md").read_text("utf-8")))
    print(f"reproduce {o.task}: {time.monotonic() - whole:.0f} s in all")


def do_compare(o: Run) -> None:
    """The comparisons of a task, into its comparisons.json."""
    for task in _tasks(o):
        one = replace(o, task=task)
        if "comparisons" in one.plan:
            started = time.monotonic()
            compare.compare(one)
            print(f"compare {task}: {time.monotonic() - started:.0f} s", flush=True)


def _tasks(o: Run) -> list[str]:
    """The task, or every task that comes with a training.yaml."""
    if o.task != "all":
        return [o.task]
    return sorted(p.parent.name for p in Path(__file__).parents[1].glob("*/training.yaml"))


# --- the package on disk ---------------------------------------------------------------------------------------------


def graph_of(folder: Path, model: str = "classifier") -> Graph:
    """The fp32 graph of a model of a package."""
    return Graph.of(folder / "models" / model / "fp32.onnx")


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


def _finish(o: Run) -> None:
    """Card, metadata and manifest from what is known so far; the manifest last, since it lists the others."""
    notes, plan = _notes(o), o.plan
    content = _manifest(o, plan, notes)
    (o.out / "MODEL_CARD.md").write_text(card.text(content, notes, plan), "utf-8")
    package.write_json(o.out, "metadata.json", card.metadata(content, notes, plan))
    manifest = package.write_manifest(o.out, content)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"package {o.task} {manifest.version}: {len(manifest.files)} files, {size / 1e6:.2f} MB in {o.out.name}/")


def _manifest(o: Run, plan: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    recipe, chosen, about = o.recipe, notes["choices"], plan["package"]
    vmin, vmax = notes["scale"]
    data: dict[str, Any] = {"kind": "folder", "licence": plan["package"].get("data_licence", "the site's own")}
    if o.folder is None:
        data = {"kind": "phantom", "generator": f"engines/{o.task}/phantom.py", "cohorts": plan["cohorts"]}
    return {
        "schema": 1,
        "task": o.task,
        "version": about["version"],
        "algorithm": about["algorithm"],
        "intended_use": "demonstration" if o.folder is None else "research",
        "classes": about["classes"],
        "positive": about["positive"],
        "models": recipe.models(o),
        "inputs": recipe.inputs(),
        "calibration": chosen["calibration"],
        "decision": chosen["decision"],
        "explain": {"model": recipe.explained, "method": recipe.method, "vmin": vmin, "vmax": vmax},
        "ood": {"file": "ood.npz", "limit": chosen["ood_limit"], "quantile": 0.99},
        **({"fusion": notes["fusion"]} if notes.get("fusion") else {}),
        "metrics": notes.get("metrics", {}),
        "provenance": {
            "network": f"{recipe.network_name}, preset {o.preset}",
            "parameters": notes["parameters"],
            "training": plan["presets"][o.preset],
            "data": data,
            **{key: notes[key] for key in ("fuse_error", "more") if key in notes},
            "parity": notes["parity"],
            "torch": str(torch.__version__),
            "git": notes["git"],
            "created": notes["created"],
            "licence": "Apache-2.0",
        },
    }


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


def _notes(o: Run) -> dict[str, Any]:
    path = o.checkpoint / f"notes-{o.out.name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _note(o: Run, more: dict[str, Any]) -> None:
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

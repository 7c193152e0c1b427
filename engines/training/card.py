"""MODEL_CARD.md and metadata.json of a package, from the manifest, the figures and the task's own words. Text only.

Every figure is printed by `python -m engines.training evaluate`; nothing is typed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = Mapping[str, Any]


def text(manifest: Table, notes: Table, plan: Table) -> str:
    """The card."""
    words = plan["card"]
    parts = [
        f"# {words['title']}",
        f"Package `{manifest['task']}` {manifest['version']} · {manifest['algorithm']} · intended use: "
        f"**{manifest['intended_use']}** · {notes['parameters']:,} parameters.",
        "## Intended use\n\n" + words["intended_use"],
        "## What it computes\n\n" + words["task"],
        _published(words["published"]),
        "## What is ours\n\n" + words["ours"],
        "## Training data\n\n" + words["data"] + "\n\n" + _cohorts(plan["cohorts"]),
        _measured(notes.get("metrics", {})),
        _decision(manifest, notes),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in words["limits"]),
        _provenance(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _published(published: Table) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in published["figures"].items())
    return (
        f"## The published study\n\n{published['reference']}\n\n| figure | published, on patients |\n| --- | --- |\n"
        f"{rows}\n\n{published['text']}"
    )


def _cohorts(cohorts: Table) -> str:
    head = "| cohort | seeds | clips | generator | encoding |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(
        f"| {name} | {c['first_seed']} to {c['first_seed'] + c['count'] - 1} | {c['count']} | "
        f"{c.get('generator', 'training')} | {c.get('encoding', 'raw')} |"
        for name, c in cohorts.items()
    )


def _ci(entry: Table) -> str:
    low, high = entry["ci95"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"


def _measured(metrics: Table) -> str:
    if not metrics:
        return "## Measured\n\nNot evaluated yet: run `python -m engines.training evaluate`."
    names = {"test": "unseen seeds", "test_jpeg": "the same seeds, JPEG", "shifted": "shifted generator"}
    tables = {title: metrics[key] for key, title in names.items() if key in metrics}
    rows = {
        "clips scored (refused by rule)": lambda m: f"{m['n']} ({m['refused_by_rule']})",
        "AUC of the planted signal, DeLong": lambda m: _ci(m["auc"]),
        "sensitivity, Wilson": lambda m: _ci(m["sensitivity"]),
        "specificity, Wilson": lambda m: _ci(m["specificity"]),
        "indeterminate": lambda m: _ci(m["indeterminate"]),
        "refused as out of distribution": lambda m: _ci(m["out_of_distribution"]),
        "right as reported (indeterminate and refused count as wrong)": lambda m: _ci(m["right_as_reported"]),
        "Brier / expected calibration error": lambda m: f"{m['brier']:.3f} / {m['ece']:.3f}",
        "calibration slope / intercept": lambda m: f"{m['calibration_slope']:.2f} / {m['calibration_intercept']:.2f}",
    }
    head = "| | " + " | ".join(tables) + " |\n| --- |" + " --- |" * len(tables) + "\n"
    body = "\n".join(
        f"| {name} | " + " | ".join(show(m) for m in tables.values()) + " |" for name, show in rows.items()
    )
    return (
        "## Measured\n\nOn simulated clips: the network **recovers a planted signal**. This is not a figure of the "
        "clinical task. 95 % intervals; printed by `python -m engines.training evaluate`.\n\n" + head + body + "\n\n"
        + _beside(metrics)
    )  # fmt: skip


def _beside(metrics: Table) -> str:
    lines = [
        f"- Shortcut check: a logistic model on image statistics, spectrum and metadata alone reaches AUC "
        f"{_ci(metrics['shortcut_auc'])} on the same test clips (bound: 0.70).",
        "- One time after arrival alone, AUC: " + ", ".join(f"{v:.3f}" for v in metrics["single_frame_auc"]) + ".",
        f"- Pointing game: the maximum of the map lies in the mass in {_ci(metrics['pointing']['hit_rate'])} of "
        f"{metrics['pointing']['n']} positives; chance {metrics['pointing']['chance']:.2f}.",
        "- Gate, corrupted clips refused: "
        + ", ".join(f"{name} {share:.0%}" for name, share in metrics["gate_corrupted"].items()) + ".",
    ]  # fmt: skip
    real = metrics.get("gate_real")
    if real:
        lines.append(
            f"- Gate, real files: of {real['files']} images, {_ci(real['refused'])} refused by rule or gate; by the "
            f"gate alone {_ci(real['by_gate_alone'])}. Of {real['dicom_files']} DICOM files, "
            f"{_ci(real['dicom_refused_by_rule'])} by rule and {_ci(real['dicom_by_gate_alone'])} by the gate alone."
        )
    return "\n".join(lines)


def _decision(manifest: Table, notes: Table) -> str:
    decision, nll = manifest["decision"], notes["choices"]["nll"]
    kept = "kept" if manifest["calibration"]["method"] == "temperature" else "not used"
    return (
        "## Decision\n\nChosen on validation seeds. "
        f"Threshold {decision['threshold']:.3f} ({decision['rule']}); indeterminate from "
        f"{decision['abstain']['lower']:.3f} to {decision['abstain']['upper']:.3f}. Temperature (never below 1) "
        f"{kept}: T = {manifest['calibration']['T']:.3f}, validation loss {nll['before']:.4f}, cross-validated with a "
        f"temperature {nll['with_temperature']:.4f}. Out of distribution above a mean squared Mahalanobis distance of "
        f"{manifest['ood']['limit']:.1f} (99th percentile). Map painted from {manifest['explain']['vmin']:.4f} to "
        f"{manifest['explain']['vmax']:.4f}: cam = sum over channels of (W[positive] - W[negative]) f / Z, Z = number "
        "of cells of the feature map, so that the map sums to the logit difference without its bias."
    )


def _provenance(manifest: Table) -> str:
    p = manifest["provenance"]
    parity = ", ".join(f"{precision} {value:.1e}" for precision, value in p["parity"].items())
    return (
        f"## Provenance\n\nRepository commit {p['git']}, {p['created']}, torch {p['torch']}, licence {p['licence']}. "
        f"Re-parameterisation moved a logit by at most {p['fuse_error']:.1e}; ONNX against torch at most {parity}. "
        f"Made again by `python -m engines.training reproduce {manifest['task']}`."
    )


def metadata(manifest: Table, notes: Table) -> dict[str, Any]:
    """The vocabulary of MONAI bundles (names only; nothing here is executed)."""
    size = manifest["inputs"][0]["size"]
    test = notes.get("metrics", {}).get("test", {})
    return {
        "version": manifest["version"],
        "changelog": {manifest["version"]: "first demonstration weights"},
        "task": manifest["task"],
        "description": manifest["algorithm"],
        "authors": "dicom-node",
        "copyright": "Apache-2.0",
        "intended_use": manifest["intended_use"],
        "data_source": "simulated (phantom.py)",
        "data_type": "dicom",
        "image_classes": "grey value of the contrast panel, 0 to 255",
        "label_classes": dict(enumerate(manifest["classes"])),
        "pred_classes": dict(enumerate(manifest["classes"])),
        "eval_metrics": {"planted_signal_auc": test["auc"]["value"]} if test else {},
        "references": [],
        "network_data_format": {
            "inputs": {
                "x": {
                    "type": "image", "format": "magnitude", "num_channels": 1, "spatial_shape": size,
                    "dtype": "float32",
                    "value_range": [-1.0, 3.0], "is_patch_data": False, "channel_def": {"0": "grey"},
                }
            },
            "outputs": {
                "logits": {"type": "probabilities", "num_channels": len(manifest["classes"]), "dtype": "float32"},
                "features": {"type": "feature map", "dtype": "float32"},
            },
        },
    }  # fmt: skip

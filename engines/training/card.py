"""MODEL_CARD.md and metadata.json of a package, from the manifest, the figures and the task's own words. Text only.

Every figure is printed by `python -m engines.training evaluate`; nothing is typed by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

Table = Mapping[str, Any]


def text(manifest: Table, notes: Table, plan: Table) -> str:
    """The card."""
    if manifest["provenance"]["data"]["kind"] == "folder":
        return _of_folder(manifest, notes, plan)
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
        _decision(manifest, notes, plan),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in words["limits"]),
        _provenance(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _of_folder(manifest: Table, notes: Table, plan: Table) -> str:
    """The card of weights trained on a site's own images: what was measured, and nothing that was not."""
    metrics = notes.get("metrics", {})
    parts = [
        f"# {manifest['task']}: weights trained on a folder of images",
        f"Package `{manifest['task']}` {manifest['version']} · {manifest['algorithm']} · intended use: "
        f"**{manifest['intended_use']}** · {notes['parameters']:,} parameters.",
        "Classes: " + ", ".join(manifest["classes"]) + ". Patients were divided into training, validation and test; "
        "threshold, temperature and gate come from validation, figures from the test part. Write here what the images "
        "are, where they come from, and for whom the weights are meant.",
    ]
    if metrics:
        parts.append("## Measured\n\n95 % intervals.\n\n" + _table({"test part": metrics["test"]}))
        parts.append(_beside(metrics))
    parts += [_decision(manifest, notes, plan), _provenance(manifest)]
    return "\n\n".join(parts) + "\n"


def _published(published: Table) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in published["figures"].items())
    return (
        f"## The published study\n\n{published['reference']}\n\n| figure | published, on patients |\n| --- | --- |\n"
        f"{rows}\n\n{published['text']}"
    )


def _cohorts(cohorts: Table) -> str:
    head = "| cohort | seeds | units | generator | encoding |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(
        f"| {name} | {c['first_seed']} to {c['first_seed'] + c['count'] - 1} | {c['count']} | "
        f"{c.get('generator', 'training')} | {c.get('encoding', 'raw')} |"
        for name, c in cohorts.items()
    )


def _ci(entry: Table) -> str:
    low, high = entry["ci95"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"


_TITLES = {
    "test": "unseen seeds",
    "test_jpeg": "the same seeds, JPEG",
    "shifted": "shifted generator",
}


def _measured(metrics: Table) -> str:
    if not metrics:
        return "## Measured\n\nNot evaluated yet: run `python -m engines.training evaluate`."
    tables = {title: metrics[key] for key, title in _TITLES.items() if key in metrics}
    parts = [
        "## Measured\n\nOn simulated images: the network **recovers a planted signal**. This is not a figure of the "
        "clinical task. 95 % intervals; printed by `python -m engines.training evaluate`.",
        _table(tables),
    ]
    fused = {title: m["fused"] for title, m in tables.items() if m.get("fused")}
    if fused:
        parts.append("With the clinical values (fusion):\n\n" + _table(fused))
    return "\n\n".join([*parts, _beside(metrics)])


def measured_of(text: str) -> str:
    """The section of a card that holds its figures."""
    return "## Measured" + text.partition("## Measured")[2].partition("\n## ")[0]


def _table(tables: Mapping[str, Table]) -> str:
    rows = {
        "units scored (refused by rule)": lambda m: f"{m['n']} ({m['refused_by_rule']})",
        "AUC, DeLong": lambda m: _ci(m["auc"]),
        "AUC less that of the image alone, paired DeLong": lambda m: f"{_ci(m['auc_minus_image'])}, p {m['p']:.3g}",
        "sensitivity, Wilson": lambda m: _ci(m["sensitivity"]),
        "specificity, Wilson": lambda m: _ci(m["specificity"]),
        "indeterminate": lambda m: _ci(m["indeterminate"]),
        "refused as out of distribution": lambda m: _ci(m["out_of_distribution"]),
        "right as reported (indeterminate and refused count as wrong)": lambda m: _ci(m["right_as_reported"]),
        "Brier / expected calibration error": lambda m: f"{m['brier']:.3f} / {m['ece']:.3f}",
        "calibration slope / intercept": lambda m: f"{m['calibration_slope']:.2f} / {m['calibration_intercept']:.2f}",
    }
    head = "| | " + " | ".join(tables) + " |\n| --- |" + " --- |" * len(tables) + "\n"
    lines = []
    for name, show in rows.items():
        with contextlib.suppress(KeyError):  # a row that this kind of table does not have
            lines.append(f"| {name} | " + " | ".join(show(m) for m in tables.values()) + " |")
    return head + "\n".join(lines)


def _beside(metrics: Table) -> str:
    """What stands beside the network: baselines, chance, and the gates."""
    lines = [
        f"- Shortcut check: a logistic model on image statistics, spectrum and metadata alone reaches AUC "
        f"{_ci(metrics['shortcut_auc'])} on the same test units."
    ]
    if "covariates_auc" in metrics:
        lines.append(f"- The clinical values alone: AUC {_ci(metrics['covariates_auc'])}.")
    if metrics.get("single_input_auc"):
        lines.append("- One input alone, AUC: " + ", ".join(f"{v:.3f}" for v in metrics["single_input_auc"]) + ".")
    if "permuted_labels" in metrics:
        value, (low, high) = metrics["permuted_labels"]["value"], metrics["permuted_labels"]["ci95"]
        lines.append(f"- Trained on permuted labels: AUC {value:.3f} (99 % interval {low:.3f} to {high:.3f}).")
    if "random_weights_ssim" in metrics:
        lines.append(f"- Map and that of random weights: structural similarity {metrics['random_weights_ssim']:.2f}.")
    if "pointing" in metrics:
        lines.append(
            f"- Pointing game: the maximum of the map lies at the signal in {_ci(metrics['pointing']['hit_rate'])} of "
            f"{metrics['pointing']['n']} positives; chance {metrics['pointing']['chance']:.2f}."
        )
    if metrics.get("gate_corrupted"):
        shares = (f"{name} {share:.0%}" for name, share in metrics["gate_corrupted"].items())
        lines.append("- Gate, corrupted units refused: " + ", ".join(shares) + ".")
    real = metrics.get("gate_real")
    if real:
        lines.append(
            f"- Gate, real files: of {real['files']} images, {_ci(real['refused'])} refused by rule or gate; by the "
            f"gate alone {_ci(real['by_gate_alone'])}. Of {real['dicom_files']} DICOM files, "
            f"{_ci(real['dicom_refused_by_rule'])} by rule and {_ci(real['dicom_by_gate_alone'])} by the gate alone."
        )
    lines += [f"- {text}" for text in metrics.get("more", [])]
    return "\n".join(lines)


def _decision(manifest: Table, notes: Table, plan: Table) -> str:
    decision, nll = manifest["decision"], notes["choices"]["nll"]
    kept = "kept" if manifest["calibration"]["method"] == "temperature" else "not used"
    return (
        "## Decision\n\nChosen on validation seeds. "
        f"Threshold {decision['threshold']:.3f} ({decision['rule']}); indeterminate from "
        f"{decision['abstain']['lower']:.3f} to {decision['abstain']['upper']:.3f}. Temperature (never below 1) "
        f"{kept}: T = {manifest['calibration']['T']:.3f}, validation loss {nll['before']:.4f}, cross-validated with a "
        f"temperature {nll['with_temperature']:.4f}. Out of distribution above a mean squared Mahalanobis distance of "
        f"{manifest['ood']['limit']:.1f} (99th percentile). Map ({manifest['explain']['method']}) painted from "
        f"{manifest['explain']['vmin']:.4g} to {manifest['explain']['vmax']:.4g}."
        + (f" {plan['card']['map']}" if "map" in plan["card"] else "")
    )


def _provenance(manifest: Table) -> str:
    p = manifest["provenance"]
    parity = ", ".join(f"{precision} {value:.1e}" for precision, value in p["parity"].items())
    fused = f"The deployed form moved a logit by at most {p['fuse_error']:.1e}; " if "fuse_error" in p else ""
    return (
        f"## Provenance\n\nRepository commit {p['git']}, {p['created']}, torch {p['torch']}, licence {p['licence']}. "
        f"{fused}ONNX against torch at most {parity}. "
        f"Made again by `python -m engines.training reproduce {manifest['task']}`."
    )


def metadata(manifest: Table, notes: Table, plan: Table) -> dict[str, Any]:
    """The vocabulary of MONAI bundles (names only; nothing here is executed)."""
    test = notes.get("metrics", {}).get("test", {})
    return {
        "version": manifest["version"],
        "changelog": {manifest["version"]: plan["package"].get("changelog", "first demonstration weights")},
        "task": manifest["task"],
        "description": manifest["algorithm"],
        "authors": "dicom-node",
        "copyright": "Apache-2.0",
        "intended_use": manifest["intended_use"],
        "data_source": "simulated (phantom.py)" if manifest["provenance"]["data"]["kind"] == "phantom" else "folder",
        "data_type": "dicom",
        "image_classes": plan["package"].get("image_classes", "grey value, 0 to 255"),
        "label_classes": dict(enumerate(manifest["classes"])),
        "pred_classes": dict(enumerate(manifest["classes"])),
        "eval_metrics": {"planted_signal_auc": test["auc"]["value"]} if test else {},
        "references": [],
        "network_data_format": {
            "inputs": {entry["name"]: _input(entry) for entry in manifest["inputs"]},
            "outputs": {
                "logits": {"type": "probabilities", "num_channels": len(manifest["classes"]), "dtype": "float32"},
                "features": {"type": "feature map", "dtype": "float32"},
            },
        },
    }


def _input(entry: Table) -> dict[str, Any]:
    return {
        "type": "image",
        "format": "magnitude",
        "num_channels": entry.get("channels", 1),
        "spatial_shape": list(entry["size"]),
        "dtype": "float32",
        "value_range": entry.get("normalise", {}),
        "is_patch_data": False,
        "channel_def": {"0": "grey"},
    }

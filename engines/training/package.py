"""Package: everything a node needs of a trained network, in one folder, every file with its SHA-256. No torch here.

Threshold, temperature, abstention band, OOD limit and the scale of the map come from validation seeds; the figures of
the card from test seeds that nothing was chosen on.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dicom_node.packages import Manifest
from engines.training import stats
from engines.training.stats import Array, Labels

ABSTAIN_SHARE = 0.02
"""Share of the validation units nearest to the threshold that are called indeterminate."""


@dataclass(frozen=True)
class Scored:
    """A cohort through the network."""

    y: Labels
    margin: Array
    """Logit of the positive class less the other, mean over inputs."""
    pooled: Array
    """Globally averaged features, one row per input."""
    owner: Labels
    """The unit of each input."""


@dataclass(frozen=True)
class Choices:
    """What validation decides."""

    temperature: float
    nll_before: float
    nll_after: float
    threshold: float
    lower: float
    upper: float
    ood_mean: Array
    ood_precision: Array
    ood_limit: float

    def probability(self, margin: Array) -> Array:
        """Calibrated probability of the positive class."""
        return stats.sigmoid(margin / self.temperature)

    def called(self, margin: Array) -> NDArray[np.int64]:
        """1 high, 0 low, -1 indeterminate."""
        p = self.probability(margin)
        return np.where((p >= self.lower) & (p <= self.upper), -1, (p >= self.threshold).astype(np.int64))

    def ood(self, scored: Scored) -> Array:
        """The statistic of `packages.OodSpec` for each unit."""
        distance = stats.mahalanobis2(scored.pooled, self.ood_mean, self.ood_precision)
        return stats.per_unit(distance, scored.owner, len(scored.y))


def choose(train: Scored, validation: Scored) -> Choices:
    """Temperature only if it lowers the validation loss, cross-validated; Youden threshold; narrow band."""
    t, before, after = _temperature(validation)
    p = stats.sigmoid(validation.margin / t)
    threshold = float(np.clip(stats.youden(validation.y, p), 0.05, 0.95))
    centre = np.log(threshold / (1 - threshold)) * t
    half = float(np.quantile(np.abs(validation.margin - centre), ABSTAIN_SHARE))
    lower, upper = stats.sigmoid(np.array([centre - half, centre + half]) / t)
    mean, precision = _gaussian(train.pooled)
    distance = stats.mahalanobis2(validation.pooled, mean, precision)
    limit = float(np.quantile(stats.per_unit(distance, validation.owner, len(validation.y)), 0.99))
    return Choices(t, before, after, threshold, float(lower), float(upper), mean, precision, limit)


def _gaussian(samples: Array) -> tuple[Array, Array]:
    """Mean and precision; shrunk among standardised channels, because early and late maps differ in scale."""
    spread = samples.std(axis=0)
    spread = np.maximum(spread, 1e-6 * spread.max())
    _, covariance = stats.ledoit_wolf((samples - samples.mean(axis=0)) / spread)
    return samples.mean(axis=0), np.asarray(np.linalg.inv(covariance) / np.outer(spread, spread), np.float64)


def _temperature(validation: Scored) -> tuple[float, float, float]:
    """(T, loss without, loss with a T fitted on the other half); 1 where that does not help.

    T never sharpens (T >= 1): validation clips that the network separates perfectly would ask for certainty without
    end, and the first harder clip would pay for it.
    """
    y, margin = validation.y, validation.margin
    halves = np.arange(len(y)) // 2 % 2

    def fitted(part: NDArray[np.bool_]) -> float:
        return max(1.0, stats.temperature(y[part], margin[part]))

    losses = [stats.nll(y[halves == k], margin[halves == k] / fitted(halves != k)) for k in (0, 1)]
    before, after = stats.nll(y, margin), float(np.mean(losses))
    return (fitted(halves >= 0), before, after) if after < before else (1.0, before, after)


def activation_map(features: NDArray[np.float32], weights: NDArray[np.float32], positive: int) -> NDArray[np.float32]:
    """Signed class activation map of two classes, (n, h, w) or (n, d, h, w).

    cam = sum_c (W[positive, c] - W[other, c]) f_c / Z with Z the number of cells of the feature map: its sum over the
    map is the logit difference without the bias, so a cell's value is its share of the decision.
    """
    direction = weights[positive] - weights[1 - positive]
    cells = int(np.prod(features.shape[2:]))
    return np.asarray(np.einsum("nc...,c->n...", features, direction) / cells, np.float32)


def scale(maps: NDArray[np.float32]) -> tuple[float, float]:
    """Fixed scale of the picture from the maps of validation positives: full colour at the 99.5th percentile of all
    cells, nothing below a fifth of it."""
    vmax = float(np.quantile(maps, 0.995))
    return round(0.2 * vmax, 6), round(vmax, 6)


# --- the folder ------------------------------------------------------------------------------------------------------


def write_arrays(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A compressed `.npz` without pickles."""
    np.savez_compressed(folder / name, allow_pickle=False, **arrays)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> Manifest:
    """List every file with its digest, check the whole against the schema, write manifest.yaml."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.yaml"
    }
    whole = dict(content) | {"files": files}
    manifest = Manifest.model_validate(whole)
    text = "# Written by `python -m engines.training package`; its SHA-256 is the package's digest.\n"
    (folder / "manifest.yaml").write_text(text + yaml.safe_dump(whole, sort_keys=False, width=120), "utf-8")
    return manifest


def sign(folder: Path, key_file: Path) -> str:
    """Ed25519 over manifest.yaml, as its last block; a signature that stood there is replaced. `key_file` is a private
    key in PEM without a passphrase (`openssl genpkey -algorithm ed25519`), its stem the key_id.

    Returns the public key, 32 bytes in base64, as a site keeps it in `<store.root>/keys/<key_id>.pub`.
    Raises ValueError when it is no such key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(key_file.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{key_file.name}: not an Ed25519 key")
    path = folder / "manifest.yaml"
    text = path.read_text("utf-8").partition("\nsignature:")[0].rstrip("\n") + "\n"
    signature = {"alg": "ed25519", "key_id": key_file.stem, "sig": base64.b64encode(key.sign(text.encode())).decode()}
    Manifest.model_validate(yaml.safe_load(text) | {"signature": signature})
    path.write_text(text + yaml.safe_dump({"signature": signature}, sort_keys=False, width=200), "utf-8")
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Readable JSON."""
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

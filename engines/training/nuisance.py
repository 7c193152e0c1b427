"""Shortcut features: what a network could use without seeing what the study is about. numpy only.

A logistic model on these is the baseline that every network must beat (the cards call it the shortcut check).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

_EDGES = (0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1)


def image_statistics(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """(21,) of images (n, H, W) in 0..1: mean, spread, lit area, median, changes, histogram, spectrum."""
    per_frame = images.mean(axis=(1, 2))
    summary = [
        images.mean(),
        images.std(),
        (images > 0.08).mean(),
        float(np.median(images)),
        per_frame[-1] - per_frame[0],
        per_frame.std(),
    ]
    histogram = np.histogram(images, bins=8, range=(0, 1))[0] / images.size
    power = (np.abs(np.fft.rfft2(images - images.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    rows = np.abs(np.fft.fftfreq(images.shape[1]))[:, None]
    radius = np.hypot(rows, np.fft.rfftfreq(images.shape[2])[None])
    spectrum = [power[(radius >= a) & (radius < b)].sum() for a, b in itertools.pairwise(_EDGES)]
    shares = np.log(np.array(spectrum) / max(sum(spectrum), 1e-12) + 1e-9)
    return np.concatenate([summary, histogram, shares])

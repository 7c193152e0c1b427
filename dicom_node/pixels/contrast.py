"""The time-intensity curve of a contrast clip and the moment the agent arrives. Pure numpy on values.

Stands under `ultrasound.py`; the engines import these names from there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dicom_node.result import Refusal, RefusalCode

MIN_RISE = 2.0
"""Grey levels of the panel's mean: less is gain drift or breathing."""


def contrast_arrival(tic: NDArray[np.float64], times: NDArray[np.float64]) -> float | Refusal:
    """Seconds (on the clock of `times`) at which the curve leaves its baseline for good.

    The baseline is the level before the rise; its noise comes from frame-to-frame differences (median absolute
    deviation, so neither the rise itself nor a single bright frame widens it). The rise must be sustained, start
    after at least three baseline frames, and exceed both the noise and MIN_RISE. The arrival is where the straight
    line through the early rise meets the baseline: a threshold alone would be late by an amount that grows with noise.
    """
    tic, times = np.asarray(tic, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if tic.shape != times.shape or tic.ndim != 1 or len(tic) < 8:
        return _not_found("fewer than 8 frames")
    if not (np.isfinite(tic).all() and np.isfinite(times).all() and (np.diff(times) >= 0).all()):
        return _not_found("the curve or its times are not usable")
    noise = _noise(tic)
    smooth = _median_filter(tic, 5 if len(tic) >= 20 else 3)
    peak = int(np.argmax(smooth))
    baseline = _baseline(smooth, peak)
    rise = smooth[peak] - baseline
    if rise < max(6.0 * noise, MIN_RISE, 0.1 * baseline):  # breathing moves a bright panel by some per cent
        return _not_found("no rise above the noise")
    threshold = baseline + max(3.0 * noise, 0.1 * rise)
    below = np.flatnonzero(smooth[:peak] <= threshold)
    if len(below) < 3:
        return _not_found("the clip starts after the arrival")
    first = int(below[-1]) + 1  # sustained: never back under the threshold before the peak
    arrival = _extrapolate(smooth, times, baseline, rise, first, peak)
    still = below[times[below] < arrival]  # without the foot of the rise, which climbs as it should
    climbs_on = _slope(times[still], smooth[still]) * (times[peak] - arrival) > rise / 3.0  # a ramp has no arrival
    if len(still) < 3 or climbs_on or _climbs(smooth[still], max(3.0 * noise, 0.1 * rise)):
        return _not_found("the curve climbs from the first frame on")
    return arrival


def _climbs(level: NDArray[np.float64], much: float) -> bool:
    """The last third lies higher than the first by more than `much`."""
    third = max(1, len(level) // 3)
    return bool(np.median(level[-third:]) - np.median(level[:third]) > much)


def _slope(t: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Grey levels a second; 0 where no time passes."""
    return float(np.polyfit(t, y, 1)[0]) if len(t) >= 2 and t[-1] > t[0] else 0.0


def _not_found(why: str) -> Refusal:
    return Refusal(RefusalCode.CONTRAST_ARRIVAL_NOT_FOUND, why)


def _noise(tic: NDArray[np.float64]) -> float:
    steps = np.diff(tic)
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2.0))


def _median_filter(tic: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    padded = np.pad(tic, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1))


def _baseline(smooth: NDArray[np.float64], peak: int) -> float:
    """Median of the frames before the peak that lie in the lowest quarter of the range up to it."""
    before = smooth[: peak + 1]
    low = before.min()
    return float(np.median(before[before <= low + 0.25 * (smooth[peak] - low)]))


def _extrapolate(
    smooth: NDArray[np.float64], times: NDArray[np.float64], baseline: float, rise: float, first: int, peak: int
) -> float:
    after = smooth[first : peak + 1]
    half = first + int(np.argmax(after >= baseline + 0.5 * rise))
    t, y = times[first - 1 : half + 1], smooth[first - 1 : half + 1] - baseline
    slope = _slope(t, y)
    if slope <= 0:
        return float(times[first])
    meets = float(t.mean() - y.mean() / slope)
    return float(np.clip(meets, times[0], times[first]))

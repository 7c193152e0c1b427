"""The arrival of the agent: against the truth on gamma-variate curves, and refused where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dicom_node.pixels.contrast import contrast_arrival
from dicom_node.result import Refusal, RefusalCode

SEEDS = st.integers(0, 2**32 - 1)


def bolus(t: NDArray[np.float64], arrival: float, to_peak: float, alpha: float, height: float) -> NDArray[np.float64]:
    s = np.clip((t - arrival) / to_peak, 0, None)
    return height * s**alpha * np.exp(alpha * (1 - s))


def refused(tic: NDArray[np.float64], times: NDArray[np.float64]) -> bool:
    answer = contrast_arrival(tic, times)
    return isinstance(answer, Refusal) and answer.code is RefusalCode.CONTRAST_ARRIVAL_NOT_FOUND


def near(found: object, arrival: float, to_peak: float, fps: float) -> bool:
    # The foot of a gamma-variate is flat: at alpha 3 it stands under 4 % of its peak for a sixth of the way up.
    return isinstance(found, float) and -0.12 * to_peak - 1 / fps <= found - arrival <= 0.28 * to_peak + 1 / fps


@settings(max_examples=150, deadline=None)
@given(
    arrival=st.floats(4, 15), to_peak=st.floats(4, 10), alpha=st.floats(1.2, 3), height=st.floats(20, 60),
    noise=st.floats(0, 1 / 40), base=st.floats(0, 25), fps=st.sampled_from([2, 5, 12, 25]), seed=SEEDS,
)  # fmt: skip
@example(arrival=4.25, to_peak=7.0, alpha=1.5, height=20.0, noise=1 / 40, base=0.0, fps=2, seed=86400)
def test_arrival_is_within_a_quarter_of_the_time_to_peak(
    arrival: float, to_peak: float, alpha: float, height: float, noise: float, base: float, fps: int, seed: int
) -> None:
    """`noise`: of the height."""
    t = np.arange(0, 40, 1 / fps)
    random = np.random.default_rng(seed).normal(0, noise * height, len(t))
    assert near(contrast_arrival(base + bolus(t, arrival, to_peak, alpha, height) + random, t), arrival, to_peak, fps)


def test_much_noise_hardly_ever_moves_the_arrival() -> None:
    """A chance dip can always move it; the rate is bounded."""
    rng, missed = np.random.default_rng(20_261), 0
    for _ in range(2000):
        arrival, to_peak, fps = rng.uniform(4, 15), rng.uniform(4, 10), float(rng.choice([2, 5, 12, 25]))
        t = np.arange(0, 40, 1 / fps)
        curve = rng.uniform(0, 25) + bolus(t, arrival, to_peak, rng.uniform(1.2, 3), rng.uniform(20, 60))
        missed += not near(contrast_arrival(curve + rng.normal(0, 1.5, len(t)), t), arrival, to_peak, fps)
    assert missed <= 10


def test_noise_alone_is_hardly_ever_an_arrival() -> None:
    """Short noisy curves can climb by chance; the rate is bounded, and the gate behind sees what is left."""
    rng = np.random.default_rng(20_260)
    taken = 0
    for _ in range(1000):
        n = int(rng.integers(8, 300))
        curve = rng.uniform(2, 120) + rng.normal(0, rng.uniform(0, 3), n)
        taken += not refused(curve, np.arange(n) / 10)
    assert taken <= 10


@pytest.mark.parametrize(
    "tic",
    [
        np.full(60, 7.0),
        np.linspace(5, 60, 60),  # a gain drift from the first frame on: no baseline
        np.linspace(60, 5, 60),  # wash-out only
        60 + 2 * np.sin(np.arange(60) / 4),  # breathing in a bright panel
        np.where(np.arange(60) == 30, 200.0, 5.0),  # one bright frame
        np.where(np.arange(60) % 20 == 10, 200.0, 5.0),
        np.full(60, np.nan),
    ],
    ids=["flat", "drift", "wash-out", "breathing", "flash", "flashes", "nan"],
)
def test_what_is_no_arrival_is_refused(tic: NDArray[np.float64]) -> None:
    assert refused(tic, np.arange(len(tic)) / 5)


def test_too_few_frames_or_unequal_lengths_are_refused() -> None:
    assert refused(np.array([0.0, 0, 9, 9]), np.arange(4.0))
    assert refused(np.zeros(20), np.arange(19.0))


def test_the_clock_of_the_clip_is_kept_and_uneven_frames_are_allowed() -> None:
    t = 100 + np.concatenate([np.arange(0, 8, 0.5), np.arange(8, 30, 0.2)])  # the scanner changed its rate
    found = contrast_arrival(5 + bolus(t, 110.0, 6.0, 1.5, 50.0), t)
    assert isinstance(found, float)
    assert found == pytest.approx(110, abs=0.8)


def test_a_flash_before_the_bolus_does_not_move_the_arrival() -> None:
    t = np.arange(0, 30, 0.2)
    curve = 5 + bolus(t, 10, 6, 1.5, 50)
    flashed = curve.copy()
    flashed[10] = 255
    assert contrast_arrival(flashed, t) == pytest.approx(contrast_arrival(curve, t), abs=0.2)

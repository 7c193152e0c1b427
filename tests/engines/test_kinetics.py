"""Liver kinetics against closed forms, the sequence's signal against its own, and noise against its distribution."""

from __future__ import annotations

import numpy as np
import pytest

from engines.training import kinetics


@pytest.mark.parametrize("k2", [0.005, 0.05, 0.4])
def test_constant_inflow_fills_the_compartment_exactly(k2: float) -> None:
    t = np.arange(0, 200, 2.0)
    found = kinetics.compartment(np.full(len(t), 0.03), k2, 2.0)
    assert found == pytest.approx(0.03 / k2 * (1 - np.exp(-k2 * t)), abs=1e-12)


@pytest.mark.parametrize("k2", [0.004, 0.06])
def test_linear_inflow_is_exact_however_coarse_the_grid(k2: float) -> None:
    """dC/dt = a t - k2 C: C = a (t/k2 - (1 - exp(-k2 t)) / k2²)."""
    t = np.arange(0, 300, 7.5)
    expected = 0.002 * (t / k2 - (1 - np.exp(-k2 * t)) / k2**2)
    assert kinetics.compartment(0.002 * t, k2, 7.5) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_exponential_inflow_converges_to_the_convolution_of_exponentials() -> None:
    a, k2, errors = 0.03, 0.08, []
    for dt in (1.0, 0.5):
        t = np.arange(0, 120, dt)
        expected = (np.exp(-a * t) - np.exp(-k2 * t)) / (k2 - a)
        errors.append(float(np.abs(kinetics.compartment(np.exp(-a * t), k2, dt) - expected).max()))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # second order


def test_without_outflow_all_agent_stays() -> None:
    t = np.arange(0, 50, 0.5)
    found = kinetics.compartment(np.sin(t / 20), 0.0, 0.5)
    assert found == pytest.approx(20 * (1 - np.cos(t / 20)), abs=5e-3)


def test_tissue_is_the_sum_of_both_inputs_and_follows_the_dose() -> None:
    feed, twice = (kinetics.inputs(dose, 15, 8, 14) for dose in (4.0, 8.0))
    whole = feed.tissue(0.01, 0.03, 0.05)
    assert whole == pytest.approx(feed.tissue(0.01, 0, 0.05) + feed.tissue(0, 0.03, 0.05))
    assert twice.tissue(0.01, 0.03, 0.05) == pytest.approx(2 * whole)
    late = feed.tissue(0.01, 0.03, 0.05, delay=10.0)
    assert late[20:] == pytest.approx(whole[:-20])  # 10 s on a grid of 0.5 s
    assert not late[: int(25 / feed.dt)].any()


def test_portal_vein_follows_the_artery_later_and_lower_and_carries_the_same_agent() -> None:
    feed = kinetics.inputs(4.0, 15, 8, 14, seconds=4000)
    assert not feed.artery[feed.t < 15].any()
    assert not feed.portal[feed.t < 19].any()
    assert feed.t[feed.portal.argmax()] > feed.t[feed.artery.argmax()] + 5
    assert feed.portal.max() < feed.artery.max()
    assert feed.portal.sum() == pytest.approx(feed.artery.sum(), rel=0.01)
    assert feed.at(feed.artery, np.array([-25.0]))[0] == 0


def test_early_and_late_phase_see_artery_and_portal_vein() -> None:
    """A tumour fed by the artery takes up early, and loses its lead over the portal liver (washout)."""
    feed = kinetics.inputs(4.0, 14, 9, 14)
    early, late = np.array([30.0]), np.array([190.0])
    tumour, liver = feed.tissue(0.06, 0.002, 0.07), feed.tissue(0.004, 0.017, 0.04)
    lead = [feed.at(tumour, at)[0] / feed.at(liver, at)[0] for at in (early, late)]
    assert lead[0] > 4
    assert lead[1] < 2


def test_signal_peaks_at_the_ernst_angle_and_saturates() -> None:
    r1, one = np.full(1, 1.25, np.float32), np.ones(1, np.float32)
    angles = np.arange(1, 60)
    signal = [float(kinetics.spgr(one, r1, 5.0, float(a))[0]) for a in angles]
    ernst = np.rad2deg(np.arccos(np.exp(-1.25 * 0.005)))
    assert abs(angles[int(np.argmax(signal))] - ernst) <= 1
    assert kinetics.spgr(one, r1, 20_000, 90)[0] == pytest.approx(1)
    bright = kinetics.spgr(one, r1 + 4.3, 4.0, 12)[0]
    assert bright > 2 * kinetics.spgr(one, r1, 4.0, 12)[0]


def test_noise_is_rayleigh_without_signal_and_gaussian_with_much() -> None:
    rng = np.random.default_rng(0)
    dark = kinetics.rician(rng, np.zeros(200_000, np.float32), 3.0)
    assert dark.mean() == pytest.approx(3 * np.sqrt(np.pi / 2), rel=0.01)
    assert dark.std() == pytest.approx(3 * np.sqrt(2 - np.pi / 2), rel=0.01)
    bright = kinetics.rician(rng, np.full(200_000, 60, np.float32), 3.0)
    assert bright.mean() == pytest.approx(np.sqrt(60**2 + 9), rel=0.001)
    assert bright.std() == pytest.approx(3.0, rel=0.02)

"""The image formation behind the phantoms obeys the physics it claims."""

from __future__ import annotations

import numpy as np
import pytest

from engines.training import physics

SHAPE = (256, 224)


def test_fully_developed_speckle_is_rayleigh() -> None:
    psf = physics.Psf(1.2, 1.8, SHAPE)
    envelopes = [np.abs(psf(physics.scatterers(np.random.default_rng(seed), SHAPE))) for seed in range(8)]
    pooled = np.concatenate([e.ravel() for e in envelopes])
    assert pooled.mean() / pooled.std() == pytest.approx(1.91, rel=0.05)
    assert (pooled**2).mean() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("axial", "lateral"), [(1.0, 2.0), (1.5, 1.5)])
def test_speckle_is_as_wide_as_the_point_spread_function(axial: float, lateral: float) -> None:
    psf = physics.Psf(axial, lateral, SHAPE)
    field = psf(physics.scatterers(np.random.default_rng(3), SHAPE))
    power = np.abs(np.fft.ifft2(np.abs(np.fft.fft2(field)) ** 2))
    correlation = power / power[0, 0]
    for lag, sigma, along in ((2, axial, (2, 0)), (2, lateral, (0, 2))):
        # The autocorrelation of a Gaussian point-spread function is a Gaussian of sqrt(2) times its width.
        assert correlation[along] == pytest.approx(np.exp(-(lag**2) / (4 * sigma**2)), abs=0.05)


def test_gamma_variate_peaks_where_it_says_and_is_dark_before() -> None:
    t = np.linspace(0, 60, 6001)
    curve = physics.gamma_variate(t, arrival=7.0, time_to_peak=5.0, shape=2.5)
    assert not curve[t <= 7.0].any()
    assert t[np.argmax(curve)] == pytest.approx(12.0, abs=0.02)
    assert curve.max() == pytest.approx(1.0, abs=1e-6)


def test_bubble_power_grows_with_the_dose_and_with_the_curve() -> None:
    rng = np.random.default_rng(5)
    power = [
        np.mean([(np.abs(physics.bubbles(rng, np.full(SHAPE, d, np.float32))) ** 2).mean() for _ in range(8)])
        for d in (0.05, 0.1, 0.4)
    ]
    assert power[1] / power[0] == pytest.approx(2, rel=0.1)
    assert power[2] / power[0] == pytest.approx(8, rel=0.1)
    # An exponential amplitude has a mean square of 2 before the field's factor of one half: unit power per bubble.
    assert power[2] == pytest.approx(0.4, rel=0.05)


def test_log_compression_and_gain_compensation_are_in_decibels() -> None:
    shown = physics.log_compress(np.array([1.0, 0.1, 0.001], np.float32), 60, 0)
    assert shown == pytest.approx([1.0, 1 - 20 / 60, 0.0], abs=1e-5)
    column = physics.attenuation(100, total_db=20, compensated_db=14)
    assert 20 * np.log10(column[-1, 0]) == pytest.approx(-6, abs=1e-4)


def test_smooth_field_is_standardised_and_repeatable() -> None:
    a, b = (physics.smooth_field(np.random.default_rng(1), SHAPE, 9) for _ in range(2))
    assert np.array_equal(a, b)
    assert abs(a.mean()) < 1e-5
    assert a.std() == pytest.approx(1, abs=1e-4)

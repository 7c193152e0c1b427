"""Contrast kinetics of the liver and the signal of a spoiled gradient echo. numpy and scipy only; knows no task.

The liver is fed twice: by the hepatic artery and, later and rounder, by the portal vein. One well-mixed compartment
(Materne et al. 2002): dC/dt = k1a Ca + k1p Cp - k2 C. Fenestrated sinusoids let extracellular agents pass freely, so
one compartment holds blood and interstitium. Times in seconds, rate constants in 1/s, concentrations in mmol/l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from engines.training.physics import gamma_variate

Curve: TypeAlias = NDArray[np.float64]
Field: TypeAlias = NDArray[np.float32]


def compartment(inflow: Curve, k2: float, dt: float) -> Curve:
    """C of dC/dt = inflow - k2 C with C(0) = 0, on the uniform grid of `inflow`.

    Exact where the inflow is linear between its samples (so for a constant one): the integral of
    exp(-k2 (dt - s)) (f0 + (f1 - f0) s / dt) over a step has a closed form.
    """
    x = k2 * dt
    if x < 1e-6:  # no outflow: the trapezium is exact
        decay, new, old = 1.0 - x, dt / 2, dt / 2
    else:
        decay = float(np.exp(-x))
        new = (1 - (1 - decay) / x) / k2
        old = ((1 - decay) / x - decay) / k2
    driven = old * inflow[:-1] + new * inflow[1:]
    return np.concatenate([[0.0], lfilter([1.0], [1.0, -decay], driven)])


@dataclass(frozen=True)
class Inputs:
    """What artery and portal vein carry, on a uniform grid of times after the injection."""

    t: Curve
    artery: Curve
    portal: Curve

    @property
    def dt(self) -> float:
        return float(self.t[1] - self.t[0])

    def tissue(self, k1a: float, k1p: float, k2: float, delay: float = 0.0) -> Curve:
        """Concentration in a tissue; `delay` of both inputs, as a lesion behind narrow vessels has it."""
        inflow = k1a * self.artery + k1p * self.portal
        if delay:
            inflow = np.interp(self.t - delay, self.t, inflow, left=0.0)
        return compartment(inflow, k2, self.dt)

    def at(self, curve: Curve, times: Curve) -> Curve:
        """A curve at the times of the phases; 0 before the injection."""
        return np.asarray(np.interp(times, self.t, curve, left=0.0), np.float64)


def inputs(
    dose: float, arrival: float, time_to_peak: float, transit: float, seconds: float = 420.0, dt: float = 0.5
) -> Inputs:
    """First pass (gamma-variate) and slow washout of the recirculating agent in the aorta; the portal vein carries what
    the gut lets pass: the artery's curve through a compartment of mean transit time `transit`."""
    t = np.arange(0.0, seconds + dt, dt)
    first = gamma_variate(t, arrival, time_to_peak, 3.0)
    # Fed by the first pass, so that nothing recirculates before it has passed; two-minute plasma washout.
    recirculating = compartment(first, 1 / 240.0, dt)
    artery = dose * (first + 0.35 * recirculating / max(float(recirculating.max()), 1e-12))
    portal = compartment(artery / transit, 1 / transit, dt)
    return Inputs(t, artery, np.asarray(np.interp(t - 4.0, t, portal, left=0.0), np.float64))


def spgr(m0: Field, r1: Field, tr_ms: float, flip_deg: float) -> Field:
    """Steady-state signal of a spoiled gradient echo (Ernst): m0 sin a (1 - E1) / (1 - cos a E1), E1 = exp(-TR R1).

    `r1` in 1/s. T2* decay is left out: the echo time of a volumetric breath-hold sequence is about 1 ms.
    """
    angle = np.deg2rad(flip_deg)
    e1 = np.exp(r1 * np.float32(-tr_ms / 1000))
    return np.asarray(m0 * np.float32(np.sin(angle)) * (1 - e1) / (1 - np.float32(np.cos(angle)) * e1), np.float32)


def rician(rng: np.random.Generator, signal: Field, sigma: float) -> Field:
    """Magnitude of a complex image with Gaussian noise in both parts (Gudbjartsson and Patz 1995)."""
    noise = rng.standard_normal((2, *signal.shape), dtype=np.float32)
    noise *= np.float32(sigma)
    noise[0] += signal
    return np.asarray(np.hypot(noise[0], noise[1]), np.float32)

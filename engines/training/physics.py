"""Ultrasound image formation, shared by the phantoms: scatterers, point spread, attenuation, compression, contrast.

numpy and scipy only, so that a phantom can be made where just the node is installed. Knows no task and no DICOM.

An image is the envelope of `reflectivity x white circular Gaussian scatterers`, convolved at baseband with a separable
Gaussian point-spread function; so fully developed speckle is Rayleigh distributed by construction (mean/std 1.91;
Burckhardt 1978). Contrast agent is a Poisson process of bubbles whose rate follows a gamma-variate time-intensity curve
(Thompson 1964), every bubble with an exponential amplitude and a random phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import scipy.fft
from numpy.typing import NDArray

Field: TypeAlias = NDArray[np.float32]
Complex: TypeAlias = NDArray[np.complex64]


def scatterers(rng: np.random.Generator, shape: tuple[int, int]) -> Complex:
    """White circular complex Gaussian field of unit mean power."""
    parts = rng.standard_normal((*shape, 2), dtype=np.float32)
    return (parts.view(np.complex64)[..., 0]) * np.float32(np.sqrt(0.5))


@dataclass(frozen=True)
class Psf:
    """Separable Gaussian point-spread function at baseband, unit gain for the power of a white field."""

    axial: float
    """Standard deviation along depth (rows), pixels."""
    lateral: float
    """Standard deviation across (columns), pixels."""
    shape: tuple[int, int]

    @cached_property
    def transfer(self) -> Field:
        """Frequency response; the field is taken as periodic, so a border of 3 sigma sees the opposite side."""
        rows = np.exp(-2 * (np.pi * self.axial * scipy.fft.fftfreq(self.shape[0])) ** 2)
        columns = np.exp(-2 * (np.pi * self.lateral * scipy.fft.fftfreq(self.shape[1])) ** 2)
        response = np.outer(rows, columns)
        return np.asarray(response / np.sqrt((response**2).mean()), np.float32)

    def __call__(self, field: Complex) -> Complex:
        """Convolve."""
        spectrum = scipy.fft.fft2(field)
        spectrum *= self.transfer
        return np.asarray(scipy.fft.ifft2(spectrum, overwrite_x=True), np.complex64)


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Field:
    """Gaussian random field of zero mean and unit variance with correlation length `scale` pixels."""
    psf = Psf(scale, scale, shape)
    field = psf(scatterers(rng, shape)).real
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def gamma_variate(t: NDArray[np.float64], arrival: float, time_to_peak: float, shape: float) -> NDArray[np.float64]:
    """Time-intensity curve with peak 1 at `arrival + time_to_peak`; a larger `shape` washes in late and out fast."""
    u = np.maximum(t - arrival, 0.0) / time_to_peak
    return np.asarray(u**shape * np.exp(shape * (1.0 - u)), np.float64)


def bubbles(rng: np.random.Generator, density: Field) -> Complex:
    """One frame of a Poisson bubble process: `density` is the expected number of bubbles per pixel."""
    counts = rng.poisson(density)
    rows, columns = np.nonzero(counts)
    number = counts[rows, columns]
    # k bubbles of exponential amplitude and independent phases: the power grows with k, not with k squared.
    amplitude = rng.standard_exponential(number.size, dtype=np.float32) * np.sqrt(number, dtype=np.float32)
    phase = rng.random(number.size, dtype=np.float32) * np.float32(2 * np.pi)
    field = np.zeros(density.shape, np.complex64)
    field[rows, columns] = amplitude * np.exp(1j * phase)
    return field * np.float32(np.sqrt(0.5))


def attenuation(depth_px: int, total_db: float, compensated_db: float) -> Field:
    """Residual gain (amplitude, column vector) of tissue attenuation against time-gain compensation over the depth."""
    depth = np.linspace(0.0, 1.0, depth_px, dtype=np.float32)[:, None]
    return np.asarray(10 ** ((compensated_db - total_db) * depth / 20), np.float32)


def log_compress(envelope: Field, dynamic_range_db: float, gain_db: float) -> Field:
    """Display value 0..1: amplitude 1 with 0 dB gain is white, `dynamic_range_db` below it is black."""
    db = 20 * np.log10(np.maximum(envelope, np.float32(1e-6))) + np.float32(gain_db)
    return np.asarray(np.clip(1 + db / np.float32(dynamic_range_db), 0, 1), np.float32)


def sector(shape: tuple[int, int], apex: float, half_angle: float) -> NDArray[np.bool_]:
    """Field of view of a curved array: `apex` = height of the virtual apex above the image, in image heights."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    up = rows / shape[0] + apex
    across = (columns - (shape[1] - 1) / 2) / shape[0]
    radius = np.hypot(up, across)
    return np.asarray(
        (np.abs(np.arctan2(across, up)) <= half_angle) & (radius >= apex) & (radius <= 1 + apex), np.bool_
    )


def ellipse(shape: tuple[int, int], centre: tuple[float, float], axes: tuple[float, float], angle: float) -> Field:
    """Squared normalised distance from the centre: below 1 is inside. Coordinates are (row, column) in pixels."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    y, x = rows - np.float32(centre[0]), columns - np.float32(centre[1])
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.asarray(
        ((c * y + s * x) / np.float32(axes[0])) ** 2 + ((c * x - s * y) / np.float32(axes[1])) ** 2, np.float32
    )


def soft(distance2: Field, edge: float) -> Field:
    """Smooth 0..1 membership of an ellipse distance: 1 inside, 0.5 on the outline, width `edge` of the radius."""
    return np.asarray(1 / (1 + np.exp(np.clip((np.sqrt(distance2) - 1) / edge, -30, 30))), np.float32)

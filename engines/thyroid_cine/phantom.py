"""Phantom of a cine sweep through a thyroid nodule, B-mode. numpy, scipy and Pillow only.

Label 1: punctate calcifications (small bright echoes without shadow) in the nodule, each seen only near its own slice.
Label 0: as many, as bright, in the gland around it. Some nodules of either label hold one large calcification with an
acoustic shadow. So neither a bright spot, nor a shadow, nor how many, nor any statistic of a frame tells the label;
where the small echoes lie does, and one still mostly misses them. Everything but their place comes from random streams
that never see the label. The numbers stand in phantom.yaml, the physics in `engines.training.physics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engines.training import physics
from engines.training.physics import Field

PANEL = (208, 272)
TOP, LEFT = 32, 8
ROWS, COLUMNS = TOP + PANEL[0] + 8, PANEL[1] + 16
FRAMES = 24

Settings: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Clip:
    """One phantom as the scanner shows it, and what was planted."""

    seed: int
    label: int
    frames: NDArray[np.uint8]
    """(n, 248, 288, 3)."""
    frame_ms: float
    region: tuple[int, int, int, int]
    """x0, y0, x1, y1 inclusive."""
    mm_per_px: float
    nodule: NDArray[np.bool_]
    """(248, 288): the largest section of the nodule over the clip, as a reader would outline it."""
    foci: NDArray[np.float64]
    """(k, 3): frame, row, column of every punctate echo on the full image."""
    inside: NDArray[np.bool_]
    """(k,): which lie in the nodule."""


def generator(name: str = "training") -> dict[str, dict[str, Any]]:
    """The difficulty of phantom.yaml; a variant inherits what it does not say from `training`."""
    text: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("phantom.yaml").read_text("utf-8"))
    base, own = text["training"], text[name]
    return {part: base[part] | own.get(part, {}) for part in base}


def make(seed: int, label: int, settings: Settings | None = None, frames: int = FRAMES) -> Clip:
    """One clip. The same seed with the other label differs only in where the punctate echoes lie."""
    settings = settings or generator()
    scene = _Scene(seed, label, settings, frames)
    canvas = np.zeros((frames, ROWS, COLUMNS, 3), np.uint8)
    canvas[:, : TOP - 4] = _banner(seed)
    for index in range(frames):
        canvas[index, TOP : TOP + PANEL[0], LEFT : LEFT + PANEL[1]] = scene.frame(index)[..., None]
    nodule = np.zeros((ROWS, COLUMNS), np.bool_)
    nodule[TOP : TOP + PANEL[0], LEFT : LEFT + PANEL[1]] = scene.outline()
    box = (LEFT, TOP, LEFT + PANEL[1] - 1, TOP + PANEL[0] - 1)
    foci = scene.foci + np.array([0, TOP, LEFT])
    mm = scene.n["depth_cm"] * 10 / PANEL[0]
    return Clip(seed, label, canvas, scene.n["frame_ms"], box, mm, nodule, foci, scene.inside)


class _Scene:
    """Anatomy of one seed; renders one section after the other."""

    def __init__(self, seed: int, label: int, settings: Settings, frames: int) -> None:
        self.n = _draw(np.random.default_rng([seed, 0]), settings["nuisance"])
        self.frames = frames
        anatomy = np.random.default_rng([seed, 1])
        self.noise = np.random.default_rng([seed, 2])
        self.psf = physics.Psf(self.n["axial_px"], self.n["lateral_px"], PANEL)
        self.gain = physics.attenuation(PANEL[0], 0.0, self.n["tgc_db"])
        self._shape(anatomy)
        self._sweep(np.random.default_rng([seed, 3]))
        self._echoes(np.random.default_rng([seed, 4]), label, float(settings["planted"]["stray"]))
        self.speckle = physics.scatterers(self.noise, PANEL)

    def _shape(self, rng: np.random.Generator) -> None:
        n = self.n
        self.centre = (PANEL[0] * rng.uniform(0.42, 0.58), PANEL[1] * rng.uniform(0.42, 0.58))
        self.axes = (n["nodule_px"] * n["nodule_aspect"], n["nodule_px"] / n["nodule_aspect"])
        self.turn = float(rng.uniform(-0.5, 0.5))
        rows = np.arange(PANEL[0], dtype=np.float32)[:, None] / PANEL[0]
        skin, gland = rng.uniform(0.1, 0.16), rng.uniform(0.86, 0.95)
        wave = np.float32(0.02) * physics.smooth_field(rng, PANEL, 40)
        inside = 1 / (1 + np.exp(-(rows + wave - skin) / 0.01)) - 1 / (1 + np.exp(-(rows + wave - gland) / 0.015))
        fine = physics.smooth_field(rng, PANEL, 7)
        uneven = np.exp(np.float32(n["mottle"]) * fine)
        muscle = 0.45 * (1 + 0.5 * np.sin(rows * 90 + 8 * wave))
        tissue = inside * 10 ** (n["gland_db"] / 20) + (1 - inside) * muscle
        if rng.random() < n["vessel_probability"]:
            side = rng.choice([0.08, 0.92])
            at = (PANEL[0] * rng.uniform(0.4, 0.65), PANEL[1] * side)
            vessel = physics.ellipse(PANEL, at, (26.0, 22.0), 0.0)
            tissue = tissue * (1 - 0.96 * physics.soft(vessel, 0.05))
        self.tissue = np.asarray(tissue * uneven, np.float32)
        self.wobble = np.float32(0.06) * physics.smooth_field(rng, PANEL, 16)
        self.cysts = rng.uniform(-0.5, 0.5, (int(n["cysts"]), 3))

    def _sweep(self, rng: np.random.Generator) -> None:
        """Position along the nodule (-1..1 of its half length) and shift in the plane, of every frame."""
        n, t = self.n, np.linspace(-1, 1, self.frames)
        self.z = t * n["sweep"]
        drift = np.outer(t / 2, [n["drift_px"] * rng.uniform(-1, 1), n["drift_px"]])
        self.shift = drift + rng.normal(0, n["jitter_px"], (self.frames, 2))

    def _echoes(self, rng: np.random.Generator, label: int, stray: float) -> None:
        """Punctate echoes: their number, size and brightness know no label, their place does."""
        n = self.n
        count = int(n["foci"])
        when = rng.uniform(0.12, 0.88, count) * (self.frames - 1)
        angle, radius = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0.02, 0.5, count))
        beyond, elsewhere = rng.uniform(1.3, 1.65, count), rng.random(count) < stray
        elsewhere[0] = False  # at least one lies where the label says
        self.inside = (label == 1) ^ elsewhere
        reach = np.where(self.inside, radius, beyond)
        z = np.interp(when, np.arange(self.frames), self.z)
        section = np.sqrt(np.clip(1 - z**2, 0.15, 1))
        # Outside, the distance is that of the largest section, so that no section cuts it off the crop.
        size = np.where(self.inside, section, 1.0) * reach
        c, s = np.cos(self.turn), np.sin(self.turn)
        a, b = size * self.axes[0] * np.sin(angle), size * self.axes[1] * np.cos(angle)
        rows, columns = self.centre[0] + c * a - s * b, self.centre[1] + s * a + c * b
        rows = np.clip(rows, 0.2 * PANEL[0], 0.84 * PANEL[0])
        self.foci = np.stack([when, rows, columns], axis=1)
        low, high = n["foci_amplitude_range"]
        self.amplitude = rng.uniform(float(low), float(high), count)
        self.phase = np.exp(2j * np.pi * rng.random(count))
        self.macro: tuple[float, float, float, float] | None = None
        if rng.random() < n["macro_probability"]:
            down, across = rng.uniform(-0.4, 0.4, 2) * self.axes
            z, half = float(rng.uniform(-0.4, 0.4)), float(rng.uniform(5, 9))
            self.macro = (self.centre[0] + float(down), self.centre[1] + float(across), z, half)

    def outline(self) -> NDArray[np.bool_]:
        """Union of the sections of the clip, with their shifts."""
        whole = np.zeros(PANEL, np.bool_)
        for index in range(0, self.frames, 3):
            whole |= self._distance(index) < 1
        return whole

    def _distance(self, index: int) -> Field:
        """Normalised distance from the nodule's centre in the section of a frame."""
        section = np.sqrt(max(1 - self.z[index] ** 2, 0.05))
        centre = (self.centre[0] + self.shift[index, 0], self.centre[1] + self.shift[index, 1])
        axes = (self.axes[0] * section, self.axes[1] * section)
        return np.asarray(np.sqrt(physics.ellipse(PANEL, centre, axes, self.turn)) * (1 + self.wobble), np.float32)

    def frame(self, index: int) -> NDArray[np.uint8]:
        """Grey 0..255."""
        n, rho = self.n, np.float32(self.n["decorrelation"])
        fresh = physics.scatterers(self.noise, PANEL)
        self.speckle = rho * self.speckle + np.sqrt(1 - rho**2) * fresh
        distance = self._distance(index)
        nodule = physics.soft(distance**2, 0.05)
        rim = np.exp(-0.5 * ((distance - 1) / 0.06) ** 2) * 0.35
        moved = np.roll(self.tissue, tuple(np.rint(self.shift[index]).astype(int)), (0, 1))
        echo = moved * (1 - nodule * (1 - np.float32(10 ** (n["nodule_db"] / 20)))) * (1 - rim)
        echo = echo * (1 - self._cysts(index))
        shadow = np.ones(PANEL, np.float32)
        field = self.speckle * echo.astype(np.float32)
        self._add_foci(field, index)
        if self.macro is not None:
            shadow = self._add_macro(field, index, *self.macro)
        shown = self.psf(np.asarray(field, np.complex64)) * shadow
        shown = shown + np.float32(10 ** (n["noise_db"] / 20)) * fresh
        value = physics.log_compress(np.abs(shown) * self.gain, n["dynamic_range_db"], n["gain_db"])
        return np.asarray(np.rint(value * 255), np.uint8)

    def _cysts(self, index: int) -> Field:
        found = np.zeros(PANEL, np.float32)
        for down, across, z in self.cysts:
            near = np.exp(-0.5 * ((self.z[index] - z) / 0.2) ** 2)
            at = self.centre + np.array([down, across]) * self.axes + self.shift[index]
            found = np.maximum(found, near * physics.soft(physics.ellipse(PANEL, tuple(at), (6.0, 6.0), 0.0), 0.1))
        return np.asarray(0.95 * found, np.float32)

    def _add_foci(self, field: NDArray[np.complex64], index: int) -> None:
        """Small coherent reflectors; a Gaussian of one pixel before the point-spread function."""
        n = self.n
        for (when, row, column), amplitude, phase in zip(self.foci, self.amplitude, self.phase, strict=True):
            near = amplitude * np.exp(-0.5 * ((index - when) / n["foci_frames"]) ** 2)
            if near < 0.3:
                continue
            r, c = row + self.shift[index, 0], column + self.shift[index, 1]
            r0, c0 = round(r) - 3, round(c) - 3
            rows, columns = np.arange(r0, r0 + 7)[:, None], np.arange(c0, c0 + 7)[None]
            spot = near * np.exp(-((rows - r) ** 2 + (columns - c) ** 2) / (2 * n["foci_px"] ** 2)) * phase
            field[r0 : r0 + 7, c0 : c0 + 7] += spot.astype(np.complex64)

    def _add_macro(
        self, field: NDArray[np.complex64], index: int, row: float, column: float, z: float, half: float
    ) -> Field:
        """A bright cap, and what it leaves of the echoes below."""
        n = self.n
        near = np.exp(-0.5 * ((self.z[index] - z) / 0.3) ** 2)
        row, column = row + self.shift[index, 0], column + self.shift[index, 1]
        rows, columns = np.mgrid[0 : PANEL[0], 0 : PANEL[1]].astype(np.float32)
        across = (columns - column) / half
        cap = np.exp(-0.5 * ((rows - row - 1.5 * across**2) / 1.2) ** 2) * (np.abs(across) < 1)
        field += (n["macro_amplitude"] * near * cap).astype(np.complex64) * self.speckle
        below = 1 / (1 + np.exp(-(rows - row - 3) / 2)) * np.exp(-0.5 * across**4)
        return np.asarray(10 ** (-n["shadow_db"] * near * below / 20), np.float32)


def _draw(rng: np.random.Generator, ranges: Mapping[str, Any]) -> dict[str, Any]:
    """One value per key, in the order of the file; scalars draw nothing. The foci's brightness stays a range."""
    drawn: dict[str, Any] = {"foci_amplitude_range": tuple(ranges["foci_amplitude"])}
    for key, value in ranges.items():
        drawn[key] = float(rng.uniform(value[0], value[1])) if isinstance(value, list) else float(value)
    drawn["foci"] = int(rng.integers(ranges["foci"][0], ranges["foci"][1] + 1))
    return drawn


def _banner(seed: int) -> NDArray[np.uint8]:
    """What scanners burn in above the image: names and numbers that no model and no picture may ever see."""
    strip = Image.new("L", (COLUMNS, TOP - 4), 30)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default()
    for row, line in enumerate(("PHANTOM^BURNED IN  ID 000-PHANTOM", f"SIMULATED THYROID  seed {seed}  L12-5")):
        pen.text((8, 2 + 12 * row), line, fill=230, font=font)
    return np.asarray(strip, np.uint8)[..., None]

"""Phantom of a contrast-enhanced ultrasound clip of a renal mass, dual display. numpy, scipy and Pillow only.

Label 1 (high grade): early and short enhancement, patchy, with an avascular core. Label 0 (low grade): later, even and
lasting, but mostly with the same patches and core in a hump of normal cortex beside the mass. Everything else (gain,
depth, probe, dose, breathing, tint, which panel stands left) comes from a random stream that never sees the label.
The numbers stand in phantom.yaml. The physics is `engines.training.physics`. No patient looked like this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engines.training import physics
from engines.training.physics import Field

ROWS, COLUMNS = 320, 480
PANEL = (256, 224)
TOP, LEFTS = 48, (8, 248)
"""Panels begin and end on multiples of 16 rows, so a JPEG block never mixes banner and image."""
FRAMES = 48

Draw: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Clip:
    """One phantom as the scanner shows it, and what was planted."""

    seed: int
    label: int
    frames: NDArray[np.uint8]
    """(n, 320, 480, 3)."""
    frame_ms: float
    contrast: tuple[int, int, int, int]
    """x0, y0, x1, y1 inclusive."""
    tissue: tuple[int, int, int, int]
    mm_per_px: float
    arrival_s: float
    mass: NDArray[np.bool_]
    """On the panel, without breathing."""
    drawn: dict[str, float] = field(default_factory=dict)


def generator(name: str = "training") -> dict[str, dict[str, Any]]:
    """The difficulty of phantom.yaml; a variant inherits what it does not say from `training`."""
    text: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("phantom.yaml").read_text("utf-8"))
    base, own = text["training"], text[name]
    return {part: base[part] | own.get(part, {}) for part in base}


def make(seed: int, label: int, settings: Mapping[str, Mapping[str, Any]] | None = None, frames: int = FRAMES) -> Clip:
    """One clip. The same seed with the other label differs only in the perfusion of mass and hump."""
    settings = settings or generator()
    rng = np.random.default_rng([seed, 0])
    nuisance = _draw(rng, settings["nuisance"])
    tint = str(rng.choice(list(settings["nuisance"]["tints"]), p=list(settings["nuisance"]["tints"].values())))
    swapped = int(rng.integers(2))
    grade = _draw(np.random.default_rng([seed, 1]), settings["high" if label else "low"])
    texture = _draw(np.random.default_rng([seed, 5]), settings["texture"])
    scene = _Scene(seed, nuisance, texture, grade)
    left, right = ((x, TOP, x + PANEL[1] - 1, TOP + PANEL[0] - 1) for x in LEFTS)
    contrast, tissue = (right, left) if swapped else (left, right)
    canvas = np.zeros((frames, ROWS, COLUMNS, 3), np.uint8)
    canvas[:, : TOP - 4] = _banner(seed)
    table = _tint(tint)
    for index in range(frames):
        seconds = index * nuisance["frame_ms"] / 1000
        perfused, grey = scene.frame(seconds)
        _paste(canvas[index], contrast, table[perfused])
        _paste(canvas[index], tissue, grey[..., None])
        canvas[index, TOP + PANEL[0] + 2 :, : LEFTS[1]] = _timer(seconds)
    drawn = nuisance | {f"grade_{k}": v for k, v in (texture | grade).items()} | {"swapped": float(swapped)}
    return Clip(
        seed, label, canvas, nuisance["frame_ms"], contrast, tissue,
        nuisance["depth_cm"] * 10 / PANEL[0], nuisance["arrival_s"], scene.mass > 0.5, drawn,
    )  # fmt: skip


def enhancement(
    t: NDArray[np.float64], arrival: float, peak: float, shape: float, plateau: float
) -> NDArray[np.float64]:
    """First pass (gamma-variate) and the recirculating plateau it leaves behind; 0 before the arrival."""
    rise = 1 - np.exp(-np.maximum(t - arrival, 0) / peak)
    return np.asarray((1 - plateau) * physics.gamma_variate(t, arrival, peak, shape) + plateau * rise, np.float64)


def _draw(rng: np.random.Generator, ranges: Mapping[str, Any]) -> dict[str, float]:
    """One value per key, in the order of the file; scalars and tables draw nothing."""
    drawn = {}
    for key, value in ranges.items():
        if isinstance(value, list):
            drawn[key] = float(rng.uniform(value[0], value[1]))
        elif isinstance(value, (int, float)):
            drawn[key] = float(value)
    return drawn


class _Scene:
    """Anatomy and perfusion of one seed; renders the two panels at a time."""

    def __init__(self, seed: int, nuisance: Draw, texture: Draw, grade: Draw) -> None:
        self.n, self.t, self.g = nuisance, texture, grade
        anatomy = np.random.default_rng([seed, 2])
        self._noise = np.random.default_rng([seed, 3])
        self.psf = physics.Psf(nuisance["axial_px"], nuisance["lateral_px"], PANEL)
        self.view = physics.sector(PANEL, nuisance["sector_apex"], nuisance["sector_half_angle"])
        self._shape_anatomy(anatomy)
        self._perfuse(anatomy, np.random.default_rng([seed, 4]))
        residual = physics.attenuation(PANEL[0], 0.0, nuisance["tgc_db"])
        self.gain = residual * self._shadow(anatomy)
        self.pool = [self.psf(physics.scatterers(anatomy, PANEL)) for _ in range(3)]
        self.speckle = self.pool[0]

    def _shape_anatomy(self, rng: np.random.Generator) -> None:
        n = self.n
        axes = (n["kidney_rows"] * PANEL[0], n["kidney_columns"] * PANEL[0])
        centre = (PANEL[0] * rng.uniform(0.45, 0.6), PANEL[1] * rng.uniform(0.42, 0.58))
        kidney = physics.ellipse(PANEL, centre, axes, n["kidney_angle"])
        self.kidney, self.sinus = physics.soft(kidney, 0.03), physics.soft(kidney * 7, 0.1)
        self.medulla = physics.soft(kidney * 2.2, 0.06) * (1 - self.sinus)
        towards = rng.uniform(0, 2 * np.pi)
        # On the side where the sector shows it: the mass stays on the panel whatever the draw.
        at = (
            np.clip(centre[0] + n["mass_at"] * axes[0] * np.sin(towards), 60, PANEL[0] - 60),
            np.clip(centre[1] + n["mass_at"] * axes[1] * np.cos(towards) * 0.7, 58, PANEL[1] - 58),
        )
        size = (n["mass_px"] * n["mass_aspect"], n["mass_px"] / n["mass_aspect"])
        turn = rng.uniform(0, np.pi)
        wobble = np.float32(0.07) * physics.smooth_field(rng, PANEL, 14)
        self.distance = np.sqrt(physics.ellipse(PANEL, at, size, turn)) * (1 + wobble)
        self.mass = physics.soft(self.distance**2, 0.03)
        self.mass_at, self.mass_size = at, size
        self.echo = np.float32(10 ** (rng.uniform(-5, 3) / 20))

    def _perfuse(self, anatomy: np.random.Generator, rng: np.random.Generator) -> None:
        """Maps of bubbles per pixel, each with its own curve: (map, arrival, peak, shape, plateau)."""
        n, g = self.n, self.g
        fine, coarse = (physics.smooth_field(anatomy, PANEL, scale) for scale in (9, n["blotch_px"]))
        uneven = np.exp(np.float32(n["mottle"]) * fine + np.float32(n["blotch"]) * coarse)
        uneven *= 1 - np.float32(n["capsule"]) * np.exp(-0.5 * ((self.distance - 1) / 0.07) ** 2)
        uneven *= 1 + np.float32(n["halo"]) * np.exp(-0.5 * ((self.distance - 1.22) / 0.07) ** 2)
        outside = 1 - self.mass
        cortex = (self.kidney * (1 - self.medulla - self.sinus).clip(0, 1) * outside).astype(np.float32)
        cyst = self._cysts(anatomy)
        beside = self._beside(anatomy)
        # A hump of normal cortex (the pseudo-mass of practice), in both classes, as large as the mass.
        cortex = np.maximum(cortex, physics.soft(beside**2, 0.04) * outside)
        inside = self.mass * self._texture(rng, self.distance, g["texture_in_mass"])
        uneven *= 1 - outside * (1 - self._texture(rng, beside, g["texture_beside_mass"]))
        arrival, peak, shape, plateau = n["arrival_s"], n["cortex_peak_s"], n["cortex_shape"], n["cortex_plateau"]
        free = uneven * (1 - cyst) * np.float32(n["dose"])
        self.maps = [
            (cortex * free, arrival, peak, shape, plateau),
            (self.medulla * self.kidney * outside * free * 0.55, arrival + 2.5, peak * 1.6, shape, plateau),
            ((1 - self.kidney) * outside * free * 0.09, arrival + 1.0, peak * 1.5, shape, plateau),
            (
                inside * uneven * np.float32(n["dose"] * g["amplitude"]),
                arrival + g["delay_s"],
                g["peak_s"],
                shape,
                g["plateau"],
            ),
        ]
        self.cyst = cyst

    def _texture(self, rng: np.random.Generator, distance: Field, probability: float) -> Field:
        """1 where perfused: poor patches within distance 1, an avascular ragged core in the middle."""
        t = self.t
        field = physics.smooth_field(rng, PANEL, t["patch_px"])
        ragged = 1 + np.float32(t["core_ragged"]) * physics.smooth_field(rng, PANEL, 8)
        if rng.random() >= probability:
            return np.ones(PANEL, np.float32)
        poor = (field < np.quantile(field, t["patch_share"])) * physics.soft(distance**2, 0.05)
        core = physics.soft(np.asarray((distance * ragged / t["core"]) ** 2, np.float32), 0.06)
        return np.asarray((1 - (1 - t["patch_level"]) * poor) * (1 - 0.96 * core), np.float32)

    def _beside(self, rng: np.random.Generator) -> Field:
        """Normalised distance from a place of the mass's size that touches it, where the kidney is widest."""
        radius = self.n["mass_px"] * rng.uniform(0.9, 1.05)
        reach = max(self.mass_size) + 0.85 * radius
        turned = np.linspace(0, 2 * np.pi, 24, endpoint=False) + rng.uniform(0, 0.2)
        places = [(self.mass_at[0] + reach * np.sin(a), self.mass_at[1] + reach * np.cos(a)) for a in turned]
        rows, columns = np.clip(np.rint(places).astype(int), 12, np.array(PANEL) - 13).T
        room = self.kidney * self.view * (1 - self.sinus)
        best = int(
            np.argmax([room[r - 12 : r + 12, c - 12 : c + 12].mean() for r, c in zip(rows, columns, strict=True)])
        )
        return np.sqrt(physics.ellipse(PANEL, places[best], (radius, radius), 0.0))

    def _cysts(self, rng: np.random.Generator) -> Field:
        """Simple cysts of the kidney, in both classes."""
        found = np.zeros(PANEL, np.float32)
        rows, columns = np.nonzero((self.kidney > 0.5) & (self.distance > 1.3) & self.view)
        draws = rng.random((3, 2))
        for where, size in draws[: int(self.n["cysts"]) if rows.size else 0]:
            at = int(where * rows.size)
            radius = (self.n["cyst_radius"] + 0.3 * (size - 0.5)) * self.n["mass_px"]
            place = (float(rows[at]), float(columns[at]))
            found = np.maximum(found, physics.soft(physics.ellipse(PANEL, place, (radius, radius), 0.0), 0.05))
        return np.asarray(0.97 * found * (1 - self.mass), np.float32)

    def _shadow(self, rng: np.random.Generator) -> Field:
        at, width, start = rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.1), rng.uniform(0.0, 0.4)
        if rng.random() >= self.n["shadow_probability"]:
            return np.ones(PANEL, np.float32)
        across = np.exp(-0.5 * ((np.arange(PANEL[1]) / PANEL[1] - at) / width) ** 2)
        below = 1 / (1 + np.exp(-(np.arange(PANEL[0]) / PANEL[0] - start) / 0.03))
        return np.asarray(10 ** (-self.n["shadow_db"] * np.outer(below, across) / 20), np.float32)

    def density(self, seconds: float) -> Field:
        """Bubbles per pixel at a time."""
        at = np.array([seconds])
        level = [np.float32(enhancement(at, *curve)[0]) for _, *curve in self.maps]
        total = self.maps[0][0] * level[0]
        for (area, *_), now in zip(self.maps[1:], level[1:], strict=True):
            if now > 0:
                total = total + area * now
        return np.asarray(total, np.float32)

    def frame(self, seconds: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Contrast panel and B-mode panel, grey 0..255."""
        n, rng = self.n, self._noise
        shift = round(n["breathing_px"] * np.sin(2 * np.pi * seconds / n["breathing_s"]))
        tissue = self._tissue(rng)
        noise = np.float32(10 ** (n["noise_db"] / 20)) * np.roll(self.pool[1], tuple(rng.integers(0, 200, 2)), (0, 1))
        field = np.float32(10 ** (n["leak_db"] / 20)) * tissue + noise
        density = self.density(seconds)
        if density.any():
            field = field + self.psf(physics.bubbles(rng, density))
        gain_db = n["gain_db"] + 4.0 + n["drift_db"] * max(seconds - n["arrival_s"], 0.0) / 30
        shown = physics.log_compress(np.abs(field) * self.gain, n["dynamic_range_db"], gain_db)
        bmode = physics.log_compress(np.abs(tissue) * self.gain, 60, -12)
        return self._display(shown, shift), self._display(bmode, shift)

    def _tissue(self, rng: np.random.Generator) -> physics.Complex:
        """B-mode speckle that decorrelates slowly from frame to frame (a rolled copy is an independent field)."""
        fresh = np.roll(self.pool[2], tuple(rng.integers(8, 200, 2)), (0, 1))
        self.speckle = np.float32(0.9) * self.speckle + np.float32(np.sqrt(1 - 0.81)) * fresh
        amplitude = 0.55 - 0.25 * self.kidney + 0.7 * self.sinus * self.kidney - 0.12 * self.medulla * self.kidney
        amplitude = amplitude * (1 - self.mass) + self.mass * 0.33 * self.echo
        return np.asarray(self.speckle * (amplitude * (1 - 0.95 * self.cyst)).astype(np.float32), np.complex64)

    def _display(self, value: Field, shift: int) -> NDArray[np.uint8]:
        moved = np.roll(value, shift, axis=0) if shift else value
        return np.asarray(np.rint(moved * 255) * self.view, np.uint8)


def _tint(name: str) -> NDArray[np.uint8]:
    """Colour table of the contrast panel: (256, 3)."""
    scale = {"gold": (1.0, 0.78, 0.34), "copper": (1.0, 0.62, 0.3), "grey": (1.0, 1.0, 1.0)}[name]
    return np.asarray(np.rint(np.arange(256)[:, None] * np.array(scale)), np.uint8)


def _paste(frame: NDArray[np.uint8], box: tuple[int, int, int, int], image: NDArray[np.uint8]) -> None:
    x0, y0, x1, y1 = box
    frame[y0 : y1 + 1, x0 : x1 + 1] = image


def _text(lines: tuple[str, ...], size: tuple[int, int], level: int) -> NDArray[np.uint8]:
    strip = Image.new("L", (size[1], size[0]), level)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default()
    for row, line in enumerate(lines):
        pen.text((8, 3 + 12 * row), line, fill=230, font=font)
    return np.asarray(strip, np.uint8)[..., None]


def _banner(seed: int) -> NDArray[np.uint8]:
    """What scanners burn in above the image: names and numbers that no model and no picture may ever see."""
    lines = (
        "PHANTOM^BURNED IN   ID 000-PHANTOM   01.01.1900",
        f"SIMULATED CEUS   seed {seed}",
        "MI 0.08  TIS 0.1  C1-5",
    )
    return _text(lines, (TOP - 4, COLUMNS), 30)


def _timer(seconds: float) -> NDArray[np.uint8]:
    return _text((f"T {int(seconds) // 60:02d}:{seconds % 60:04.1f}",), (ROWS - TOP - PANEL[0] - 2, LEFTS[1]), 0)

"""Phantom of a scrotal B-mode still with a testicular tumour. numpy, scipy and Pillow only.

Label 1 (non-seminoma): echo-poor and echo-rich patches, small cysts and calcified foci in the tumour. Label 0
(seminoma): an even tumour, and mostly the same texture in the testis beside it. Tumour markers are drawn per class and
overlap. Everything else (gain, probe, size, place, outline, how the region was drawn) comes from a random stream that
never sees the label. The numbers stand in phantom.yaml.

The texture is finer than the acquisition: its point-spread function is wide, and the picture has half as many samples
a side as the grid the tissue lives on. `sharp` is the same tissue through a good probe without noise, on the full grid:
the target of super-resolution. No patient looked like this.
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
from scipy import ndimage

from dicom_node.pixels.grey import resize
from engines.training import physics
from engines.training.physics import Field

ROWS, COLUMNS = 272, 288
PANEL = (208, 240)
TOP, LEFT = 48, 16
"""The panel begins and ends on multiples of 16 pixels, so a JPEG block never mixes banner and image."""
FINE = (2 * PANEL[0], 2 * PANEL[1])
SHARP_MM = (0.10, 0.15)
"""Axial and lateral standard deviation of the good probe."""
MARKERS = ("AGE", "AFP", "B_HCG", "LDH")

Draw: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Still:
    """One phantom as the scanner shows it, and what was planted."""

    seed: int
    label: int
    picture: NDArray[np.uint8]
    """(ROWS, COLUMNS): banner, panel, grey bar."""
    region: tuple[int, int, int, int]
    """x0, y0, x1, y1 inclusive of the image panel."""
    mm_per_px: float
    tumour: NDArray[np.bool_]
    """The true outline, on the panel."""
    roi: NDArray[np.bool_]
    """As drawn by hand, on the panel."""
    signal: NDArray[np.float32]
    """1 where a cyst or a calcified focus was planted in the tumour, on the panel; zero for label 0."""
    sharp: NDArray[np.uint8] | None
    """(2H, 2W) the panel through a good probe, where it was asked for."""
    blood: dict[str, float]
    drawn: dict[str, float] = field(default_factory=dict)


def generator(name: str = "training") -> dict[str, dict[str, Any]]:
    """The difficulty of phantom.yaml; a variant inherits what it does not say from `training`."""
    text: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("phantom.yaml").read_text("utf-8"))
    base, own = text["training"], text[name]
    return {part: base[part] | own.get(part, {}) for part in base}


def make(
    seed: int, label: int, settings: Mapping[str, Mapping[str, Any]] | None = None, *, sharp: bool = False
) -> Still:
    """One still. The same seed with the other label differs only in where the texture lies, and in the blood."""
    settings = settings or generator()
    nuisance = _draw(np.random.default_rng([seed, 0]), settings["nuisance"])
    kind = "nonseminoma" if label else "seminoma"
    grade = _draw(np.random.default_rng([seed, 1]), settings[kind])
    texture = _draw(np.random.default_rng([seed, 5]), settings["texture"])
    scene = _Scene(seed, nuisance, texture, grade)
    picture = np.zeros((ROWS, COLUMNS), np.uint8)
    picture[: TOP - 4] = _banner(seed)
    x1, y1 = LEFT + PANEL[1] - 1, TOP + PANEL[0] - 1
    picture[TOP : y1 + 1, LEFT : x1 + 1] = scene.acquired()
    picture[TOP : y1 + 1, x1 + 12 : x1 + 20] = np.linspace(255, 0, PANEL[0]).astype(np.uint8)[:, None]
    return Still(
        seed, label, picture, (LEFT, TOP, x1, y1), nuisance["mm_per_px"], scene.distance < 1, scene.roi(),
        scene.signal * np.float32(label), scene.sharp() if sharp else None,
        blood(np.random.default_rng([seed, 7]), settings["blood"][kind]),
        nuisance | {f"grade_{k}": v for k, v in (texture | grade).items()},
    )  # fmt: skip


def blood(rng: np.random.Generator, kind: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Age and markers of one man: a mixture of secreting and silent tumours."""
    age = kind["AGE"]
    found = {"AGE": float(np.clip(np.rint(rng.normal(age["mean"], age["sd"])), 16, 75))}
    for name in MARKERS[1:]:
        spread = kind[name]
        raised = rng.random() < spread["share"]
        median, sigma = (spread["median"], spread["sigma"]) if raised else (spread["normal"], spread["normal_sigma"])
        found[name] = float(f"{median * np.exp(sigma * rng.standard_normal()):.3g}")
    return found


def _draw(rng: np.random.Generator, ranges: Mapping[str, Any]) -> dict[str, float]:
    """One value per key, in the order of the file; scalars draw nothing."""
    drawn = {}
    for key, value in ranges.items():
        if isinstance(value, list):
            drawn[key] = float(rng.uniform(value[0], value[1]))
        elif isinstance(value, (int, float)):
            drawn[key] = float(value)
    return drawn


class _Scene:
    """Anatomy and texture of one seed; the tissue lives on a grid twice as fine as the picture."""

    def __init__(self, seed: int, nuisance: Draw, texture: Draw, grade: Draw) -> None:
        self.n, self.t, self.g = nuisance, texture, grade
        self.mm = nuisance["mm_per_px"]
        anatomy, planted = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 4])
        self._noise, self._hand = np.random.default_rng([seed, 3]), np.random.default_rng([seed, 6])
        self._shape(anatomy)
        self.signal = np.zeros(PANEL, np.float32)
        decibels = self._tissue(anatomy) + self._patches(planted)
        amplitude = 10 ** (_twice(decibels) / 20)
        amplitude *= self._holes(planted)
        self.tissue = physics.scatterers(anatomy, FINE) * np.asarray(amplitude, np.float32)
        self._foci(planted)
        self.gain = physics.attenuation(PANEL[0], 0.0, nuisance["tgc_db"]) * self._shadow(anatomy)

    def _shape(self, rng: np.random.Generator) -> None:
        n, mm = self.n, self.mm
        centre = np.array(PANEL) * (rng.uniform(0.46, 0.56), rng.uniform(0.46, 0.54))
        axes = (n["testis_rows_mm"] / mm, n["testis_columns_mm"] / mm)
        self.testis = np.sqrt(physics.ellipse(PANEL, tuple(centre), axes, n["testis_angle"]))
        at = centre + np.array([rng.uniform(-0.3, 0.3) * axes[0], rng.uniform(-0.45, 0.45) * axes[1]])
        size = (n["tumour_mm"] * n["tumour_aspect"] / mm, n["tumour_mm"] / n["tumour_aspect"] / mm)
        plain = np.sqrt(physics.ellipse(PANEL, tuple(at), size, rng.uniform(0, np.pi)))
        wave = physics.smooth_field(rng, PANEL, 2.2 / mm).clip(-2, 2)
        self.distance = np.asarray(plain * (1 + np.float32(n["lobes"]) * wave), np.float32)
        self.inside = physics.soft(self.distance**2, 0.03)
        reach = np.abs(np.indices(PANEL) - at[:, None, None]).max(axis=0) * mm
        self.around = (self.testis < 0.95) & (self.distance > 1.1) & (reach < 11.5)
        """Testis beside the tumour, within what the engine cuts out."""
        self.beside = self._neighbour(rng)
        """The part of it, as large as the tumour, where the texture of a seminoma lies."""

    def _neighbour(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        rows, columns = np.nonzero(self.around)
        found = np.zeros(PANEL, np.bool_)
        if rows.size:
            seed = int(rng.integers(rows.size))
            order = np.argsort(np.hypot(rows - rows[seed], columns - columns[seed]), kind="stable")
            nearest = order[: int((self.distance < 1).sum())]
            found[rows[nearest], columns[nearest]] = True
        return found

    def _tissue(self, rng: np.random.Generator) -> Field:
        """Level of the echoes in dB, 0 = parenchyma."""
        n = self.n
        testis = physics.soft(self.testis**2, 0.015)
        around = -38.0 if n["fluid"] > 0.5 else -3.0
        wall = n["wall_db"] * np.exp(-0.5 * ((self.testis - 1.03) / 0.025) ** 2)
        outer = physics.soft(np.asarray((self.testis / 1.24) ** 2, np.float32), 0.02)
        outside = around * outer + (1 - outer) * n["wall_db"] * 0.6
        line = np.abs(self.testis - 0.72) / 0.05
        column = np.arange(PANEL[1])[None] / PANEL[1]
        mediastinum = n["mediastinum_db"] * np.exp(-0.5 * line**2) * np.exp(-0.5 * ((column - 0.3) / 0.06) ** 2)
        level = testis * mediastinum + (1 - testis) * outside + wall
        level = level * (1 - self.inside) + n["tumour_echo_db"] * self.inside
        return np.asarray(level + n["mottle_db"] * physics.smooth_field(rng, PANEL, 2.5 / self.mm), np.float32)

    def _patches(self, rng: np.random.Generator) -> Field:
        g = self.g
        field = physics.smooth_field(rng, PANEL, self.t["patch_mm"] / self.mm)
        stray = physics.smooth_field(rng, PANEL, self.t["patch_mm"] / self.mm) * self.n["stray_patch_db"] * self.around
        level = (self.n["stray_level_db"] + g["beside_level_db"]) * self.beside
        own = field * (g["patch_db"] * self.inside + g["beside_patch_db"] * self.beside) + level
        return np.asarray(own + stray, np.float32)

    def _places(self, rng: np.random.Generator, what: str) -> list[tuple[int, int]]:
        """Pixels of the fine grid: places in the tumour, beside it, and of strays that both classes have alike."""
        found: list[tuple[int, int]] = []
        counts = (self.g[what], self.g[f"beside_{what}"], self.n[f"stray_{what}"])
        areas = (self.distance < 0.88, self.beside, self.around)
        for count, area in zip(map(int, counts), areas, strict=True):
            rows, columns = np.nonzero(area)
            if rows.size:
                picked = rng.integers(0, rows.size, count)
                half = rng.integers(0, 2, (count, 2))
                found += [
                    (int(2 * rows[k] + a), int(2 * columns[k] + b)) for k, (a, b) in zip(picked, half, strict=True)
                ]
        return found

    def _holes(self, rng: np.random.Generator) -> Field:
        """Small cysts: nothing scatters in them."""
        left = np.ones(FINE, np.float32)
        for row, column in self._places(rng, "cysts"):
            radius = self.t["cyst_mm"] * rng.uniform(0.7, 1.3) / self.mm * 2
            reach = int(np.ceil(radius * 1.6)) + 1
            part = left[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
            away = np.hypot(rows - min(row, reach), columns - min(column, reach)) / radius
            part *= np.asarray(1 - 0.98 / (1 + np.exp(np.clip((away - 1) / 0.12, -30, 30))), np.float32)
            self._mark(row, column, radius)
        return left

    def _foci(self, rng: np.random.Generator) -> None:
        """Calcified foci: a few strong scatterers side by side."""
        for row, column in self._places(rng, "foci"):
            strength = 10 ** (self.t["focus_db"] * rng.uniform(0.85, 1.1) / 20)
            for _ in range(3):
                y, x = row + int(rng.integers(-1, 2)), column + int(rng.integers(-1, 2))
                if 0 <= y < FINE[0] and 0 <= x < FINE[1]:
                    self.tissue[y, x] += np.complex64(strength * np.exp(2j * np.pi * rng.random()))
            self._mark(row, column, 0.4 / self.mm * 2)

    def _mark(self, row: int, column: int, radius: float) -> None:
        """Planted texture of the tumour, for the map's judge."""
        y, x, r = row // 2, column // 2, max(int(radius / 2), 1)
        if self.distance[min(y, PANEL[0] - 1), min(x, PANEL[1] - 1)] < 1:
            self.signal[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1] = 1.0

    def _shadow(self, rng: np.random.Generator) -> Field:
        at, width = rng.uniform(0.1, 0.9), rng.uniform(0.03, 0.08)
        if rng.random() >= self.n["shadow_probability"]:
            return np.ones(PANEL, np.float32)
        across = np.exp(-0.5 * ((np.arange(PANEL[1]) / PANEL[1] - at) / width) ** 2)
        return np.asarray(np.repeat(10 ** (-self.n["shadow_db"] * across / 20)[None], PANEL[0], 0), np.float32)

    def _echo(self, axial_mm: float, lateral_mm: float) -> physics.Complex:
        pitch = self.mm / 2
        return physics.Psf(axial_mm / pitch, lateral_mm / pitch, FINE)(self.tissue)

    def acquired(self) -> NDArray[np.uint8]:
        """What the machine shows: wide point-spread function, half as many samples, noise."""
        n = self.n
        echo = self._echo(n["axial_mm"], n["lateral_mm"])
        # The mean of four lies where the picture's pixel lies; every second sample would be shifted against `sharp`.
        echo = (echo[::2, ::2] + echo[1::2, ::2] + echo[::2, 1::2] + echo[1::2, 1::2]) / np.float32(4)
        noise = np.float32(10 ** (n["noise_db"] / 20)) * physics.scatterers(self._noise, PANEL)
        return self._shown(np.abs(echo + noise) * self.gain)

    def sharp(self) -> NDArray[np.uint8]:
        """The same tissue through a good probe, on the full grid."""
        return self._shown(np.abs(self._echo(*SHARP_MM)) * _twice(self.gain))

    def _shown(self, envelope: Field) -> NDArray[np.uint8]:
        value = physics.log_compress(envelope, self.n["dynamic_range_db"], self.n["gain_db"])
        return np.asarray(np.rint(value * 255), np.uint8)

    def roi(self) -> NDArray[np.bool_]:
        """The outline as a hand draws it: a little outside, a little unsteady."""
        edge = ndimage.distance_transform_edt(self.distance >= 1) - ndimage.distance_transform_edt(self.distance < 1)
        wave = physics.smooth_field(self._hand, PANEL, 3.0 / self.mm).clip(-2, 2)
        unsteady = self.n["roi_wobble_mm"] * wave
        return np.asarray(edge * self.mm < self.n["roi_mm"] + unsteady, np.bool_)


def _twice(value: Field) -> Field:
    """To the fine grid."""
    return resize(value, FINE)


def _banner(seed: int) -> NDArray[np.uint8]:
    """What scanners burn in above the image: names and numbers that no model and no picture may ever see."""
    strip = Image.new("L", (COLUMNS, TOP - 4), 30)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default()
    for row, line in enumerate(
        ("PHANTOM^BURNED IN   ID 000-PHANTOM", f"SIMULATED SCROTUM   seed {seed}", "MI 0.9  L4-12")
    ):
        pen.text((8, 3 + 12 * row), line, fill=230, font=font)
    return np.asarray(strip, np.uint8)

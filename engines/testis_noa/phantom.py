"""Phantom of a man with azoospermia: a B-mode still of each testis, and his blood. numpy, scipy and Pillow only.

Label 1 (non-obstructive): the parenchyma holds coarse patches of low echo; FSH is raised, the testes are small, the end
diastolic velocity in their arteries is low. Label 0 (obstructive): even parenchyma, and mostly the same patches in the
tissue around the testis, so that a coarse or dark place somewhere is no evidence. Strength of the texture and all blood
values overlap between the labels: neither the image nor the blood decides alone. The operator's depth and zoom make
every testis fill its share of the screen; the size on the screen tells nothing.
The numbers stand in phantom.yaml, the physics in `engines.training.physics`. No patient looked like this.
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

ROWS, COLUMNS = 360, 480
IMAGE = (288, 400)
TOP, LEFT = 56, 40
SIDES = ("R", "L")
_AROUND = (1.10, 1.46)
"""Where the texture lies in the tissue around the testis: a ring of the testis's own area, in its radii."""
_LABELS = ("oa", "noa")

Draw: TypeAlias = Mapping[str, float]
Settings: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Still:
    """One testis on the screen, and what was measured of it."""

    side: str
    """R | L."""
    image: NDArray[np.uint8]
    """(360, 480) with banner and measurement bar."""
    region: tuple[int, int, int, int]
    """x0, y0, x1, y1 inclusive of the B-mode image."""
    mask: NDArray[np.bool_]
    """(360, 480): the testis, as a reader would outline it."""
    mm_per_px: float
    volume_ml: float
    edv_cm_s: float
    strength: float
    """Of the texture in the parenchyma, 0..1: what was planted."""
    signal: NDArray[np.float32]
    """(360, 480): where and how strongly, 0..1."""


@dataclass(frozen=True)
class Patient:
    """One phantom."""

    seed: int
    label: int
    stills: tuple[Still, ...]
    fsh: float
    """[IU]/L."""
    drawn: dict[str, float] = field(default_factory=dict)

    def covariates(self, side: str) -> tuple[float, float, float]:
        """FSH, volume and velocity of a side; of a patient ("B") the means of his sides."""
        chosen = [s for s in self.stills if side in ("B", s.side)]
        return (
            self.fsh,
            float(np.mean([s.volume_ml for s in chosen])),
            float(np.mean([s.edv_cm_s for s in chosen])),
        )


def generator(name: str = "training") -> dict[str, dict[str, Any]]:
    """The difficulty of phantom.yaml; a variant inherits what it does not say from `training`."""
    text: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("phantom.yaml").read_text("utf-8"))
    base, own = text["training"], text[name]
    return {part: base[part] | own.get(part, {}) for part in base}


def make(seed: int, label: int, settings: Settings | None = None, sides: tuple[str, ...] = SIDES) -> Patient:
    """One patient. The same seed with the other label has the same anatomy, speckle and machine settings."""
    settings = settings or generator()
    values = _blood(seed, label, settings["blood"])
    strengths = _strengths(seed, label, settings["azoospermia"])
    nuisance = _draw(np.random.default_rng([seed, 0]), settings["nuisance"])
    texture = _draw(np.random.default_rng([seed, 1]), settings["texture"])
    stills = []
    for index, side in enumerate(SIDES):
        if side not in sides:
            continue
        screen = _draw(np.random.default_rng([seed, 2, index]), settings["screen"])
        scene = _Scene(seed, index, nuisance, texture, screen)
        stills.append(_still(seed, side, scene, strengths[index], values[side]))
    return Patient(seed, label, tuple(stills), values["FSH"], nuisance | texture)


def _draw(rng: np.random.Generator, ranges: Mapping[str, Any]) -> dict[str, float]:
    """One value per key, in the order of the file; scalars draw nothing."""
    drawn = {}
    for key, value in ranges.items():
        drawn[key] = float(rng.uniform(value[0], value[1])) if isinstance(value, list) else float(value)
    return drawn


def _blood(seed: int, label: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """FSH, and volume and velocity of both sides; the same seed draws the same quantiles for either label."""
    rng = np.random.default_rng([seed, 3])
    law, shared = settings[_LABELS[label]], float(settings["shared"])
    median, spread = law["FSH"]
    values: dict[str, Any] = {"FSH": round(float(median * np.exp(spread * rng.standard_normal())), 2)}
    sides: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    for name in ("TESTICULAR_VOLUME", "EDV"):
        median, spread = law[name]
        common = rng.standard_normal()
        for side in SIDES:
            z = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.standard_normal()
            sides[side][name] = round(float(median * np.exp(spread * z)), 2)
    return values | sides


def _strengths(seed: int, label: int, settings: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(in the testis, around it) of the right and the left side."""
    rng = np.random.default_rng([seed, 4])
    law = settings[_LABELS[label]]
    inside, around = (float(rng.uniform(*law[key])) for key in ("inside", "around"))
    if rng.random() < law["exchanged"]:
        inside, around = around, inside
    spread = float(settings["sides"]) * rng.standard_normal((len(SIDES), 2))
    return [(float(np.clip(inside + a, 0, 1)), float(np.clip(around + b, 0, 1))) for a, b in spread]


class _Scene:
    """Anatomy and machine of one side; renders the image for given strengths of the texture."""

    def __init__(self, seed: int, side: int, nuisance: Draw, texture: Draw, screen: Draw) -> None:
        self.n, self.t = nuisance, texture
        rng = np.random.default_rng([seed, 5, side])
        self.size = (screen["half_rows"], screen["half_columns"])
        self.plane = float(np.exp(screen["plane"] * rng.standard_normal()))
        reach = 1.5  # the engine's crop must fit on the image
        centre = (
            float(rng.uniform(reach * self.size[0] + 4, IMAGE[0] - reach * self.size[0] - 4)),
            float(
                rng.uniform(
                    reach * self.size[1] + 4, max(IMAGE[1] - reach * self.size[1] - 4, reach * self.size[1] + 5)
                )
            ),
        )
        wobble = 1 + np.float32(0.025) * physics.smooth_field(rng, IMAGE, 26)
        self.distance = np.asarray(
            np.sqrt(physics.ellipse(IMAGE, centre, self.size, screen["angle"])) * wobble, np.float32
        )
        self.centre, self.angle = centre, screen["angle"]
        self.testis = physics.soft(self.distance**2, 0.02)
        self.ring = physics.soft((self.distance / _AROUND[1]) ** 2, 0.03) * (
            1 - physics.soft((self.distance / _AROUND[0]) ** 2, 0.02)
        )
        self.base = self._anatomy(rng)
        self.patches = (self._patches(rng), self._patches(rng))
        self.gain = physics.attenuation(IMAGE[0], 0.0, nuisance["tgc_db"]) * self._shadow(rng)
        psf = physics.Psf(nuisance["axial_px"], nuisance["lateral_px"], IMAGE)
        speckle = np.random.default_rng([seed, 6, side])
        self.white = physics.scatterers(speckle, IMAGE)
        self.psf = psf
        self.noise = psf(physics.scatterers(speckle, IMAGE)) * np.float32(10 ** (nuisance["noise_db"] / 20))

    def _anatomy(self, rng: np.random.Generator) -> Field:
        """Amplitude of the scatterers without the texture."""
        n = self.n
        inside, around = (np.float32(10 ** (n[key] / 20)) for key in ("testis_db", "around_db"))
        amplitude = 0.5 * (self.testis * inside + (1 - self.testis) * around)
        amplitude *= 10 ** (np.float32(n["ring_db"] / 20) * self.ring)
        amplitude *= np.exp(np.float32(n["blotch"]) * physics.smooth_field(rng, IMAGE, n["blotch_px"]))
        amplitude *= 1 + np.float32(n["tunica"]) * np.exp(-0.5 * ((self.distance - 1.02) / 0.025) ** 2)
        amplitude *= 1 + np.float32(n["mediastinum"]) * self._line(rng)
        amplitude *= 1 - 0.8 * self._dots(rng, int(n["vessels"]), 0.035) * self.testis
        amplitude *= 1 + 2.5 * self._dots(rng, int(n["specks"]), 0.015)
        if rng.random() < n["fluid_probability"]:
            rim = 1.08 + n["fluid"] / 2
            amplitude *= 1 - 0.92 * np.exp(-0.5 * ((self.distance - rim) / (n["fluid"] / 2)) ** 2)
        depth = np.arange(IMAGE[0], dtype=np.float32)[:, None]
        return np.asarray(amplitude * (1 + 1.2 * np.exp(-0.5 * ((depth - 6) / 4) ** 2)), np.float32)  # skin

    def _line(self, rng: np.random.Generator) -> Field:
        """The mediastinum: an echogenic line along the long axis, off the middle."""
        at = (self.centre[0] + self.size[0] * rng.uniform(-0.45, 0.45), self.centre[1])
        axes = (0.06 * self.size[0], rng.uniform(0.35, 0.7) * self.size[1])
        return physics.soft(physics.ellipse(IMAGE, at, axes, self.angle), 0.3) * self.testis

    def _dots(self, rng: np.random.Generator, count: int, radius: float) -> Field:
        """Round spots anywhere within 1.3 radii; `radius` of the long axis."""
        found = np.zeros(IMAGE, np.float32)
        draws = rng.random((5, 2))
        for turn, reach in draws[:count]:
            away = 1.3 * np.sqrt(reach)
            at = (
                self.centre[0] + away * self.size[0] * np.sin(2 * np.pi * turn),
                self.centre[1] + away * self.size[1] * np.cos(2 * np.pi * turn),
            )
            size = radius * self.size[1]
            found = np.maximum(found, physics.soft(physics.ellipse(IMAGE, at, (size, size), 0.0), 0.2))
        return found

    def _patches(self, rng: np.random.Generator) -> Field:
        """0..1: where the echo-poor patches lie."""
        field = physics.smooth_field(rng, IMAGE, self.t["patch_px"])
        edge = float(np.quantile(field[::4, ::4], self.t["patch_share"]))
        return np.asarray(1 / (1 + np.exp(np.clip((field - np.float32(edge)) / 0.15, -30, 30))), np.float32)

    def _shadow(self, rng: np.random.Generator) -> Field:
        at, width, start = rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.1), rng.uniform(0.0, 0.5)
        if rng.random() >= self.n["shadow_probability"]:
            return np.ones(IMAGE, np.float32)
        across = np.exp(-0.5 * ((np.arange(IMAGE[1]) / IMAGE[1] - at) / width) ** 2)
        below = 1 / (1 + np.exp(-(np.arange(IMAGE[0]) / IMAGE[0] - start) / 0.03))
        return np.asarray(10 ** (-self.n["shadow_db"] * np.outer(below, across) / 20), np.float32)

    def image(self, inside: float, around: float) -> NDArray[np.uint8]:
        """Grey 0..255."""
        lost_db = inside * self._lost(0) * self.testis + around * self._lost(1) * self.ring
        amplitude = self.base * 10 ** (-lost_db / 20)
        field = self.psf(self.white * amplitude.astype(np.float32)) + self.noise
        shown = physics.log_compress(np.abs(field) * self.gain, self.n["dynamic_range_db"], self.n["gain_db"])
        return np.asarray(np.rint(shown * 255), np.uint8)

    def _lost(self, which: int) -> Field:
        """Decibels lost at strength 1."""
        drop, depth = np.float32(self.t["drop_db"]), np.float32(self.t["depth_db"])
        return np.asarray(drop + depth * self.patches[which], np.float32)


def _still(seed: int, side: str, scene: _Scene, strength: tuple[float, float], values: Mapping[str, float]) -> Still:
    canvas = np.zeros((ROWS, COLUMNS), np.uint8)
    canvas[: TOP - 8] = _banner(seed, side)
    box = (LEFT, TOP, LEFT + IMAGE[1] - 1, TOP + IMAGE[0] - 1)
    canvas[TOP : TOP + IMAGE[0], LEFT : LEFT + IMAGE[1]] = scene.image(*strength)
    mask = np.zeros((ROWS, COLUMNS), np.bool_)
    mask[TOP : TOP + IMAGE[0], LEFT : LEFT + IMAGE[1]] = scene.distance < 1
    signal = np.zeros((ROWS, COLUMNS), np.float32)
    signal[TOP : TOP + IMAGE[0], LEFT : LEFT + IMAGE[1]] = strength[0] * scene.patches[0] * scene.testis
    # An ellipsoid of revolution about the long axis, seen in a plane that is seldom the largest one.
    half_mm = (values["TESTICULAR_VOLUME"] * 1000 / (4 / 3 * np.pi)) ** (1 / 3) * scene.plane
    half_px = (scene.size[0] ** 2 * scene.size[1]) ** (1 / 3)
    volume, edv = values["TESTICULAR_VOLUME"], values["EDV"]
    return Still(side, canvas, box, mask, float(half_mm / half_px), volume, edv, strength[0], signal)


def _banner(seed: int, side: str) -> NDArray[np.uint8]:
    """What scanners burn in above the image: names and numbers that no model and no picture may ever see."""
    strip = Image.new("L", (COLUMNS, TOP - 8), 30)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default()
    lines = (
        "PHANTOM^BURNED IN   ID 000-PHANTOM   01.01.1900",
        f"SIMULATED SCROTUM {side}   seed {seed}",
        "MI 0.7  L12-5",
    )
    for row, line in enumerate(lines):
        pen.text((8, 4 + 13 * row), line, fill=230, font=font)
    return np.asarray(strip, np.uint8)

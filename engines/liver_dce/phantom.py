"""Phantom of a dynamic contrast-enhanced MRI of the liver with a tumour and a second lesion. numpy and scipy only.

Label 1 (proliferative): the tumour has a rim that enhances early and washes out fast, around an ill-perfused core.
Label 0: the tumour enhances evenly; mostly the same rim and core stand in the second lesion. In both classes the tumour
may have a capsule, a rim of the late phases only. Everything else (dose, timing, coil, noise, breathing, sizes) comes
from random streams that never see the label. The numbers stand in phantom.yaml; kinetics and signal are
`engines.training.kinetics`. No patient looked like this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from engines.training import kinetics

SHAPE = (20, 104, 104)
PHASES = ("pre", "arterial", "portal venous", "delayed")
PRE_S = -25.0
"""Acquisition of the phase before contrast, from the injection."""
RELAXIVITY = 4.3
"""1/s per mmol/l, extracellular gadolinium agent at 1.5 T."""

Field: TypeAlias = NDArray[np.float32]
Draw: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Exam:
    """One phantom as the scanner stores it, and what was planted."""

    seed: int
    label: int
    volume: NDArray[np.uint16]
    """(4, 20, 104, 104): phase, slice from feet to head, row, column."""
    times: tuple[float, ...]
    """Seconds after the injection, per phase."""
    pixel_mm: float
    slice_mm: float
    tr_ms: float
    flip_deg: float
    drawn_mask: NDArray[np.bool_]
    """(20, 104, 104): the tumour as a reader outlined it."""
    signal: NDArray[np.float32]
    """(20, 104, 104): where the planted texture lies in the tumour; zero for label 0."""
    drawn: dict[str, float] = field(default_factory=dict)

    @property
    def affine(self) -> NDArray[np.float64]:
        """(column, row, slice, 1) → patient mm (LPS): axial, no angulation; the centre of the field lies right."""
        rows = SHAPE[1]
        matrix = np.diag([self.pixel_mm, self.pixel_mm, self.slice_mm, 1.0])
        matrix[:3, 3] = (-self.pixel_mm * rows / 2 - 40.0, -self.pixel_mm * rows / 2, -self.slice_mm * SHAPE[0] / 2)
        return matrix


def generator(name: str = "training") -> dict[str, dict[str, Any]]:
    """The difficulty of phantom.yaml; a variant inherits what it does not say from `training`."""
    text: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("phantom.yaml").read_text("utf-8"))
    base, own = text["training"], text[name]
    return {part: base[part] | own.get(part, {}) for part in base}


def make(seed: int, label: int, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Exam:
    """One examination. The same seed with the other label differs only in what tumour and second lesion hold."""
    settings = settings or generator()
    n = _draw(np.random.default_rng([seed, 0]), settings["nuisance"])
    texture = _draw(np.random.default_rng([seed, 1]), settings["texture"])
    plain = _draw(np.random.default_rng([seed, 2]), settings["plain"])
    where = settings["high" if label else "low"]
    lots = np.random.default_rng([seed, 3]).random(2)
    textured = (bool(lots[0] < where["texture_in_tumour"]), bool(lots[1] < where["texture_in_other"]))
    times = (PRE_S, n["arterial_s"], n["portal_s"], n["delayed_s"])
    anatomy = _Anatomy(np.random.default_rng([seed, 4]), n, texture)
    tissues = _tissues(anatomy, n, texture, plain, textured, np.asarray(times))
    volume = _acquire(np.random.default_rng([seed, 5]), anatomy, tissues, n)
    signal = anatomy.tumour.inside if label else np.zeros(SHAPE, np.float32)
    drawn = dict(n) | {f"texture_{k}": v for k, v in texture.items()} | {f"plain_{k}": v for k, v in plain.items()}
    return Exam(
        seed, label, volume, times, n["pixel_mm"], n["slice_mm"], n["tr_ms"], n["flip_deg"],
        anatomy.outlined(n["drawn_mm"]), signal, drawn,
    )  # fmt: skip


def _draw(rng: np.random.Generator, ranges: Mapping[str, Any]) -> dict[str, float]:
    """One value per key, in the order of the file; scalars draw nothing."""
    return {k: float(rng.uniform(*v)) if isinstance(v, list) else float(v) for k, v in ranges.items()}


# --- anatomy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lesion:
    """A lesion on the grid: 1 where a voxel belongs to it."""

    inside: Field
    core: Field
    """The middle of it, within the rim."""
    rim: Field
    shell: Field
    """Just around it: the capsule."""
    distance: Field
    radius_mm: float


class _Anatomy:
    """Where things lie in one seed; the first phase is the reference."""

    def __init__(self, rng: np.random.Generator, n: Draw, texture: Draw) -> None:
        self.n = n
        size = np.array([n["slice_mm"], n["pixel_mm"], n["pixel_mm"]])
        self.axes = [
            (np.arange(count, dtype=np.float32) - np.float32((count - 1) / 2)) * np.float32(mm)
            for count, mm in zip(SHAPE, size, strict=True)
        ]
        self.uneven = [smooth(rng, 5), smooth(rng, 9)]
        self.body, self.liver = self._body(rng)
        first, second = self._places(rng)
        self.tumour = self._lesion(first, n["tumour_mm"], texture)
        self.other = self._lesion(second, n["other_mm"], texture)
        self.vessels = self._vessels(rng)
        self.aorta = self._tube(float(self.axes[2][-1]) * 0.72, float(self.axes[1][-1]) * 0.66, 9.0)
        self.cyst = self._cyst(rng)
        self.capsule = rng.random() < n["capsule_probability"]

    def _body(self, rng: np.random.Generator) -> tuple[Field, Field]:
        """The wall of the body runs through the left and upper corners of the field; the liver fills most of it."""
        half = float(self.axes[2][-1])
        centre = (rng.uniform(0.1, 0.25) * half, rng.uniform(0.15, 0.3) * half)
        radius = np.hypot(self.axes[1][:, None] - centre[1], (self.axes[2][None] - centre[0]) * 0.92)
        wall = rng.uniform(1.16, 1.24) * half
        body = _inside((wall - radius) / 2)[None]
        liver = _inside((wall - rng.uniform(9, 14) - radius) / 2)
        left = _inside((half * rng.uniform(0.55, 0.75) - self.axes[2] + 0.15 * self.axes[1][:, None]) / 3)
        ones = np.ones((SHAPE[0], 1, 1), np.float32)
        return body * ones, np.asarray((liver * left)[None] * ones, np.float32)

    def _places(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres (slice, row, column) in mm: the tumour near the middle of the field, the other beside it."""
        n = self.n
        first = np.array([rng.uniform(-7, 7), rng.uniform(-14, 14), rng.uniform(-24, 4)])
        reach = n["tumour_mm"] + n["other_mm"] + n["gap_mm"]
        angle = rng.uniform(0, 2 * np.pi)
        second = first + np.array([rng.uniform(-3, 3), reach * np.sin(angle), reach * np.cos(angle)])
        return first, second

    def _lesion(self, at: NDArray[np.float64], mm: float, texture: Draw) -> _Lesion:
        aspect = self.n["aspect"]
        z, y, x = (axis - np.float32(c) for axis, c in zip(self.axes, at, strict=True))
        square = (z**2)[:, None, None] + ((y * np.float32(aspect)) ** 2)[:, None] + ((x / np.float32(aspect)) ** 2)
        wobble = 1 + np.float32(self.n["wobble"]) * self.uneven[0]
        distance = np.sqrt(square) / np.float32(mm) * wobble
        edge = np.float32(1.1 / mm)
        ragged = 1 + np.float32(texture["core_ragged"]) * self.uneven[1]
        inside = _inside((1 - distance) / edge)
        core = _inside((np.float32(1 - texture["rim"]) - distance * ragged) / edge) * inside
        shell = np.exp(-0.5 * ((distance - 1) / (1.6 * edge)) ** 2)
        return _Lesion(inside, core, inside - core, np.asarray(shell, np.float32), distance, mm)

    def _vessels(self, rng: np.random.Generator) -> Field:
        """Portal and hepatic veins: straight tubes that avoid the lesions."""
        total = np.zeros(SHAPE, np.float32)
        half = float(self.axes[2][-1])
        for _ in range(int(self.n["vessels"])):
            at, angle = rng.uniform(-0.9, 0.6, 2) * half, rng.uniform(0, np.pi)
            depth, slope, radius = rng.uniform(-30, 30), rng.uniform(-0.3, 0.3), rng.uniform(2.0, 4.2)
            y, x = self.axes[1][:, None] - at[0], self.axes[2][None] - at[1]
            across, along = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
            height = self.axes[0][:, None, None] - np.float32(depth) - np.float32(slope) * along
            tube = (np.float32(radius) - np.sqrt(across**2 + height**2)) / np.float32(0.9)
            total = np.maximum(total, _inside(np.asarray(tube, np.float32)))
        free = (1 - self.tumour.inside) * (1 - self.other.inside)
        return np.asarray(total * self.liver * free, np.float32)

    def _tube(self, x: float, y: float, radius: float) -> Field:
        inside = _inside((radius - np.hypot(self.axes[1][:, None] - y, self.axes[2][None] - x)) / 0.9)
        return np.asarray(np.broadcast_to(inside, SHAPE), np.float32)

    def _cyst(self, rng: np.random.Generator) -> Field:
        centre, radius = rng.uniform(-0.7, 0.3, 3) * float(self.axes[2][-1]) * (0.4, 1, 1), rng.uniform(4, 9)
        if rng.random() >= self.n["cyst_probability"]:
            return np.zeros(SHAPE, np.float32)
        z, y, x = (axis - np.float32(c) for axis, c in zip(self.axes, centre, strict=True))
        distance = np.sqrt((z**2)[:, None, None] + (y**2)[:, None] + x**2)
        free = (1 - self.tumour.inside) * (1 - self.other.inside)
        return np.asarray(_inside((np.float32(radius) - distance) / np.float32(0.9)) * self.liver * free, np.float32)

    def outlined(self, off_mm: float) -> NDArray[np.bool_]:
        """The tumour as drawn: a little too small or too large."""
        return np.asarray(self.tumour.distance < 1 + off_mm / self.tumour.radius_mm, np.bool_)


def _inside(x: Any) -> Field:
    return np.asarray(1 / (1 + np.exp(np.clip(-x, -30, 30))), np.float32)


def smooth(rng: np.random.Generator, cells: int) -> Field:
    """Smooth random field of zero mean and unit spread: white noise on `cells` x `cells` knots, cubic between them."""
    knots = rng.standard_normal((3, cells, cells)).astype(np.float32)
    rows, columns = (ndimage.zoom(np.eye(cells), (n / cells, 1), order=3) for n in SHAPE[1:])
    slices = ndimage.zoom(np.eye(3), (SHAPE[0] / 3, 1), order=1)
    whole = np.einsum("zk,yi,xj,kij->zyx", slices, rows, columns, knots, optimize=True).astype(np.float32)
    return np.asarray((whole - whole.mean()) / whole.std(), np.float32)


# --- perfusion and signal --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tissues:
    """Maps of the share of each tissue, with its concentration at the phases."""

    maps: tuple[Field, ...]
    curves: NDArray[np.float64]
    """(tissues, phases), mmol/l."""
    r1: Field
    m0: Field


def _tissues(
    a: _Anatomy, n: Draw, texture: Draw, plain: Draw, textured: tuple[bool, bool], times: NDArray[np.float64]
) -> _Tissues:
    feed = kinetics.inputs(n["dose"], n["cardiac_s"], n["peak_s"], n["transit_s"])

    def curve(k1a: float, k1p: float, k2: float, delay: float = 0.0) -> NDArray[np.float64]:
        return feed.at(feed.tissue(k1a, k1p, k2, delay), times)

    k1, share = n["liver_k1"], n["liver_arterial"]
    rim = curve(texture["rim_arterial"], texture["rim_portal"], texture["rim_k2"])
    core = curve(texture["core_k1"], 0.0, texture["core_k2"], 4.0)
    even = curve(plain["arterial"], plain["portal"], plain["k2"])
    capsule = curve(0.004, 0.012, 0.008, 10.0)  # fibrous: slow in, slower out
    lesions = [a.tumour, a.other]
    outside = (1 - a.tumour.inside) * (1 - a.other.inside)
    parenchyma = a.liver * outside * (1 - a.vessels) * (1 - a.cyst)
    rest = a.body * (1 - a.liver) * outside * (1 - a.aorta)
    maps: list[Field] = [parenchyma, a.vessels, a.aorta * a.body * outside, rest]
    curves = [
        curve(k1 * share, k1 * (1 - share), n["liver_k2"]), 0.58 * feed.at(feed.portal, times),
        0.58 * feed.at(feed.artery, times), curve(0.004, 0.0, 0.012),
    ]  # fmt: skip
    for lesion, has in zip(lesions, textured, strict=True):
        parts = [(lesion.rim, rim), (lesion.core, core)] if has else [(lesion.inside, even)]
        maps += [part for part, _ in parts]
        curves += [said for _, said in parts]
    if a.capsule:
        maps.append(np.asarray(a.tumour.shell * np.float32(0.8), np.float32))
        curves.append(capsule)
    inside = a.tumour.inside + a.other.inside
    blood = a.vessels + maps[2]
    r1 = parenchyma * np.float32(1000 / n["liver_t1_ms"]) + inside * np.float32(1000 / n["lesion_t1_ms"])
    r1 += blood * np.float32(1 / 1.4) + rest * np.float32(1 / 0.95) + a.cyst * np.float32(1 / 2.6)
    m0 = a.body * (1 - np.float32(0.15) * inside)
    return _Tissues(tuple(maps), np.stack(curves), np.asarray(np.maximum(r1, 0.2), np.float32), m0)


def _acquire(rng: np.random.Generator, a: _Anatomy, tissues: _Tissues, n: Draw) -> NDArray[np.uint16]:
    """Every phase through sequence, coil, breathing and noise, as the scanner stores it."""
    mottle = 1 + np.float32(n["mottle"]) * a.uneven[1]
    coil = np.exp(np.float32(n["bias"]) * smooth(rng, 3)) * np.float32(n["gain"])
    unit, t1 = np.ones(1, np.float32), np.full(1, 1000 / n["liver_t1_ms"], np.float32)
    liver = kinetics.spgr(unit, t1, n["tr_ms"], n["flip_deg"])[0]
    phases = []
    for index in range(len(PHASES)):
        r1 = tissues.r1.copy()
        if index:  # the first stands before the contrast
            agent = np.zeros(SHAPE, np.float32)
            for share, value in zip(tissues.maps, tissues.curves[:, index], strict=True):
                agent += share * np.float32(value)
            r1 += np.float32(RELAXIVITY) * agent * mottle
        clean = kinetics.spgr(tissues.m0, r1, n["tr_ms"], n["flip_deg"])
        if index:
            far = rng.uniform(-1, 1, 2) * n["breathing_mm"] / n["pixel_mm"]
            clean = _moved(_moved(clean, round(far[0]), 1), round(far[1] / 3), 2)
        noisy = kinetics.rician(rng, clean * coil / liver, n["noise"] * n["gain"])
        phases.append(np.minimum(np.rint(noisy * np.float32(0.25)), 4095).astype(np.uint16))
    return np.stack(phases)


def _moved(image: Field, by: int, axis: int) -> Field:
    """Shifted by whole voxels; the border is extended."""
    index = np.clip(np.arange(image.shape[axis]) - by, 0, image.shape[axis] - 1)
    return np.take(image, index, axis=axis)

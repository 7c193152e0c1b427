"""Radiomics of the testicular tumour engine against the IBSI definitions, computed here with plain numpy."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

pytest.importorskip("nyxus", reason="nyxus is not installed (pip install 'dicom-node[radiomics]')")

from engines.testis_tumour import engine

ROOT = Path(__file__).parents[2]
SHAPE = (72, 80)


def _case(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A correlated texture and an irregular region."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.2)
    image = 120 + 55 * (image - image.mean()) / image.std()
    outline = ndimage.gaussian_filter(rng.normal(size=SHAPE), 6)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    away = np.hypot(rows - 36, columns - 40) / 25 + outline / outline.std() * 0.08
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), away < 1


def _features(image: NDArray[np.uint8], inside: NDArray[np.bool_]) -> dict[str, float]:
    return dict(zip(engine.FEATURES, engine.features(image[None], inside)[0].tolist(), strict=True))


@pytest.fixture(scope="module", params=[1, 2])
def case(request: pytest.FixtureRequest) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, float]]:
    image, inside = _case(request.param)
    return image.astype(np.int64), inside, _features(image, inside)


def _levels(image: NDArray[np.int64], inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.where(inside, image // engine.BIN + 1, 0)


Case = tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, float]]
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def _shifted(levels: NDArray[np.int64], step: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of neighbours, both inside."""
    padded = np.pad(levels, 1)
    first = padded[1:-1, 1:-1]
    second = padded[1 + step[0] : padded.shape[0] - 1 + step[0], 1 + step[1] : padded.shape[1] - 1 + step[1]]
    both = (first > 0) & (second > 0)
    return first[both], second[both]


def test_intensity_features_are_those_of_the_pixels_inside(case: Case) -> None:
    image, inside, found = case
    v = image[inside].astype(np.float64)
    deviation = v - v.mean()
    expected = {
        "MEAN": v.mean(),
        "MEDIAN": np.median(v),
        "MIN": v.min(),
        "MAX": v.max(),
        "RANGE": np.ptp(v),
        "VARIANCE_BIASED": v.var(),
        "MEAN_ABSOLUTE_DEVIATION": np.abs(deviation).mean(),
        "MEDIAN_ABSOLUTE_DEVIATION": np.abs(v - np.median(v)).mean(),
        "SKEWNESS": (deviation**3).mean() / v.std() ** 3,
        "EXCESS_KURTOSIS": (deviation**4).mean() / v.var() ** 2 - 3,
        "COV": v.std() / v.mean(),
        "ROOT_MEAN_SQUARED": np.sqrt((v**2).mean()),
    }
    for name, value in expected.items():
        assert found[f"INTENSITY_{name}"] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    for name, percent in (("P10", 10), ("P90", 90)):  # nyxus interpolates in a histogram
        assert found[f"INTENSITY_{name}"] == pytest.approx(np.percentile(v, percent), abs=1.0), name
    assert found["SHAPE_AREA_MM2"] == pytest.approx(inside.sum() * 0.01, rel=1e-5)


def test_histogram_features_are_those_of_the_levels(case: Case) -> None:
    image, inside, found = case
    share = np.bincount(_levels(image, inside)[inside]) / inside.sum()
    share = share[share > 0]
    assert found["HISTOGRAM_ENTROPY"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-4)
    assert found["HISTOGRAM_UNIFORMITY"] == pytest.approx((share**2).sum(), rel=1e-4)


def test_glcm_is_that_of_neighbours_one_pixel_apart(case: Case) -> None:
    image, inside, found = case
    sums: dict[str, list[float]] = {}
    for step in DIRECTIONS:
        a, b = _shifted(_levels(image, inside), step)
        p = np.zeros((33, 33))
        np.add.at(p, (a, b), 1)
        p = (p + p.T) / (2 * len(a))
        i, j = np.indices(p.shape)
        mean = (p * i).sum()
        variance = (p * (i - mean) ** 2).sum()
        parts = {
            "CONTRAST": (p * (i - j) ** 2).sum(),
            "ASM": (p**2).sum(),
            "CORRELATION": (p * (i - mean) * (j - mean)).sum() / variance,
            "ID": (p / (1 + np.abs(i - j))).sum(),
            "IDM": (p / (1 + (i - j) ** 2)).sum(),
            "JAVE": mean,
            "JVAR": variance,
            "JE": -(p[p > 0] * np.log2(p[p > 0])).sum(),
            "DIFAVE": (p * np.abs(i - j)).sum(),
            "ACOR": (p * i * j).sum(),
            "CLUTEND": (p * (i + j - 2 * mean) ** 2).sum(),
            "CLUSHADE": (p * (i + j - 2 * mean) ** 3).sum(),
            "CLUPROM": (p * (i + j - 2 * mean) ** 4).sum(),
            "JMAX": p.max(),
        }
        for name, value in parts.items():
            sums.setdefault(name, []).append(float(value))
    for name, values in sums.items():
        assert found[f"GLCM_{name}"] == pytest.approx(np.mean(values), rel=2e-3, abs=1e-3), name
    assert found["GLCM_CONTRAST"] > 0.1  # an offset of 0 compares every pixel with itself


def _runs(lines: list[NDArray[np.int64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    grey, length = [], []
    for line in lines:
        edges = np.flatnonzero(np.diff(np.concatenate([[-1], line, [-1]])))
        for start, stop in itertools.pairwise(edges):
            if line[start]:
                grey.append(float(line[start]))
                length.append(float(stop - start))
    return np.array(grey), np.array(length)


def test_run_lengths_are_those_of_the_four_directions(case: Case) -> None:
    image, inside, found = case
    levels = _levels(image, inside)
    rows, columns = levels.shape
    directions = [
        list(levels),
        list(levels.T),
        [np.diag(levels, k) for k in range(1 - rows, columns)],
        [np.diag(levels[:, ::-1], k) for k in range(1 - rows, columns)],
    ]
    sums: dict[str, list[float]] = {}
    for lines in directions:
        grey, length = _runs(lines)
        parts = {
            "SRE": (1 / length**2).mean(),
            "LRE": (length**2).mean(),
            "RP": len(length) / inside.sum(),
            "GLV": grey.var(),
            "RV": length.var(),
            "HGLRE": (grey**2).mean(),
            "LGLRE": (1 / grey**2).mean(),
            "LRHGLE": (length**2 * grey**2).mean(),
            "SRLGLE": (1 / (length**2 * grey**2)).mean(),
        }
        for name, value in parts.items():
            sums.setdefault(name, []).append(float(value))
    for name, values in sums.items():
        assert found[f"GLRLM_{name}"] == pytest.approx(np.mean(values), rel=1e-4), name


def test_neighbourhood_features_are_those_of_the_eight_neighbours(case: Case) -> None:
    image, inside, found = case
    levels = _levels(image, inside)
    padded = np.pad(levels, 1)
    around = np.stack([
        padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx
    ])  # fmt: skip
    same = ((around == levels) & inside).sum(axis=0)[inside] + 1.0  # IBSI counts the pixel itself
    grey = levels[inside].astype(np.float64)
    expected = {
        "SDE": (1 / same**2).mean(),
        "LDE": (same**2).mean(),
        "DV": same.var(),
        "GLV": grey.var(),
        "HGLE": (grey**2).mean(),
        "LDHGLE": (same**2 * grey**2).mean(),
    }
    for name, value in expected.items():
        assert found[f"NGLDM_{name}"] == pytest.approx(value, rel=1e-4), name
    known = (around > 0).sum(axis=0)[inside]
    mean = around.sum(axis=0)[inside] / np.maximum(known, 1)
    away = np.where(known > 0, np.abs(grey - mean), 0)
    share = np.array([(grey == g).mean() for g in range(1, 34)])
    total = np.array([away[grey == g].sum() for g in range(1, 34)])
    assert found["NGTDM_COARSENESS"] == pytest.approx(1 / (share * total).sum(), rel=1e-3)


# --- what a clinical user relies on ----------------------------------------------------------------------------------


def test_nothing_outside_the_region_counts() -> None:
    image, inside = _case(3)
    other = np.where(inside, image, np.random.default_rng(9).integers(0, 256, SHAPE)).astype(np.uint8)
    assert _features(image, inside) == _features(other, inside)


def test_a_batch_gives_each_image_its_own_row_and_the_same_bits() -> None:
    _, inside = _case(4)
    images = np.stack([_case(seed)[0] for seed in range(4, 16)])
    alone = np.concatenate([engine.features(image[None], inside) for image in images])
    assert np.array_equal(engine.features(images, inside), alone)
    assert np.isfinite(alone).all()
    assert len({row.tobytes() for row in alone}) == len(images)


def test_another_process_gives_the_same_bits() -> None:
    code = (
        "import numpy as np; from engines.testis_tumour import engine;"
        "rng = np.random.default_rng(5); image = rng.integers(0, 256, (1, 60, 60)).astype(np.uint8);"
        "inside = np.zeros((60, 60), bool); inside[9:51, 12:48] = True;"
        "print(engine.features(image, inside).tobytes().hex())"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(seen) == 1
    assert len(seen.pop()) > 8 * len(engine.FEATURES)


def test_a_flat_region_gives_finite_features() -> None:
    inside = np.zeros(SHAPE, np.bool_)
    inside[20:50, 20:50] = True
    found = engine.features(np.full((1, *SHAPE), 77, np.uint8), inside)
    assert np.isfinite(found).all()


def test_many_calls_keep_their_memory() -> None:
    """A worker computes radiomics for weeks."""
    psutil = pytest.importorskip("psutil")
    image, inside = _case(6)
    process = psutil.Process()
    for _ in range(20):
        engine.features(image[None], inside)
    before = process.memory_info().rss
    for _ in range(150):
        engine.features(image[None], inside)
    assert process.memory_info().rss - before < 20e6

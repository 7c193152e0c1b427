"""The locator: it learns where a dark ellipse lies in speckle, repeats bit for bit, and a node accepts its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")

from torch import nn  # noqa: E402

from dicom_node.errors import PackageError  # noqa: E402
from dicom_node.packages.schema import ModelEntry  # noqa: E402
from dicom_node.runtime.accept import accept  # noqa: E402
from dicom_node.runtime.graph import check  # noqa: E402
from dicom_node.runtime.onnx import OnnxSession  # noqa: E402
from engines.training import locator  # noqa: E402
from engines.training.locator import Settings, TinyUNet  # noqa: E402

Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]


def pictures(n: int, seed: int, shape: tuple[int, int] = (32, 32)) -> Arrays:
    """Rayleigh speckle, darker inside an ellipse, with bright dots elsewhere; every eighth picture has no ellipse."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    images, masks = [], []
    for index in range(n):
        centre = rng.uniform(0.3, 0.7, 2) * shape
        axes = rng.uniform(0.14, 0.28, 2) * min(shape)
        mask = ((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 <= 1
        if index % 8 == 7:
            mask[:] = False
        speckle = ndimage.gaussian_filter(rng.rayleigh(1.0, shape), 0.7) * np.where(mask, 0.45, 1.0)
        for _ in range(rng.integers(0, 4)):
            speckle[tuple(rng.integers(0, s) for s in shape)] += 4.0
        images.append((np.log(speckle + 0.05) * rng.uniform(0.8, 1.2))[None])
        masks.append(mask)
    return np.asarray(images, np.float32), np.asarray(masks, np.float32)


QUICK = Settings(steps=90, batch=12)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return locator.fit_locator(*pictures(200, 1), QUICK)


@pytest.fixture(scope="module")
def package(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("package")
    locator.export_locator(trained, pictures(3, 5)[0], folder)
    return folder


def test_it_finds_the_place_on_unseen_pictures(trained: nn.Module) -> None:
    said = locator.report(trained, *pictures(160, 2), minimum_cells=12)
    assert said["dice"] > 0.8
    assert said["found"] > 0.9
    assert said["centre_inside"] > 0.95
    assert said["false_places"] < 0.2
    untrained = locator.report(TinyUNet().eval(), *pictures(160, 2), minimum_cells=12)
    assert untrained["dice"] < 0.3


def test_it_is_small_and_takes_pictures_of_other_sizes(trained: nn.Module) -> None:
    assert sum(p.numel() for p in trained.parameters()) == 25_713 <= 30_000
    assert trained(torch.zeros(2, 1, 96, 128)).shape == (2, 1, 96, 128)


def test_the_same_seed_gives_the_same_weights_and_a_stopped_training_goes_on(tmp_path: Path) -> None:
    images, masks = pictures(40, 3)
    short = Settings(steps=10, batch=4)
    whole = locator.fit_locator(images, masks, short)

    class Stop(Exception):  # noqa: N818
        pass

    seen = 0

    def stop(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 8:
            raise Stop
        return real(logits, target)

    real = locator.dice_bce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locator, "dice_bce", stop)
        with pytest.raises(Stop):
            locator.fit_locator(images, masks, short, tmp_path)
    seen = 100
    continued = locator.fit_locator(images, masks, short, tmp_path)
    again = locator.load(tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
    other = locator.fit_locator(images, masks, Settings(steps=10, batch=4, seed=2), tmp_path)
    assert not torch.equal(other.state_dict()["head.weight"], whole.state_dict()["head.weight"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_node_accepts_the_graph_by_its_golden_cases(trained: nn.Module, package: Path, precision: str) -> None:
    entry = ModelEntry.model_validate(locator.manifest_entry())
    golden = locator.golden_cases(package, pictures(4, 6)[0])
    assert {k: v.shape for k, v in golden.items()} == {
        "locator.x": (4, 1, 32, 32),
        "locator.probability": (4, 1, 32, 32),
    }
    graph = (package / "models" / "locator" / f"{precision}.onnx").read_bytes()
    check(graph, entry.inputs, entry.outputs, sizes={"x": (32, 32)}, thorough=True)
    session = OnnxSession("locator", graph, entry.inputs, entry.outputs, threads=1, precision=precision)
    row = accept("locator", session, golden, entry.tolerance[precision], entry.outputs)  # type: ignore[index]
    assert row.worst <= entry.tolerance[precision]  # type: ignore[index]
    with torch.no_grad():
        expected = torch.sigmoid(trained(torch.from_numpy(golden["locator.x"]))).numpy()
    assert np.abs(session.run({"x": golden["locator.x"]})["probability"] - expected).max() <= 2e-2


def test_a_wrong_answer_is_not_accepted(package: Path) -> None:
    entry = ModelEntry.model_validate(locator.manifest_entry())
    golden = dict(locator.golden_cases(package, pictures(2, 6)[0]))
    golden["locator.probability"] = golden["locator.probability"] * 0.9
    graph = (package / "models" / "locator" / "fp32.onnx").read_bytes()
    session = OnnxSession("locator", graph, entry.inputs, entry.outputs, threads=1)
    with pytest.raises(PackageError, match="golden replay of locator"):
        accept("locator", session, golden, entry.tolerance["fp32"], entry.outputs)


def test_wrong_shapes_are_refused() -> None:
    images, masks = pictures(3, 1)
    for x, y in ((images[:, 0], masks), (images, masks[:2]), (images[..., :30], masks[..., :30])):
        with pytest.raises(ValueError, match="locator"):
            locator.fit_locator(x, y, QUICK)


@pytest.mark.long
def test_eight_hundred_pictures_are_learned_in_two_minutes_on_one_core() -> None:
    from time import process_time

    images, masks = pictures(800, 7, (64, 64))
    started = process_time()
    trained = locator.fit_locator(images, masks, Settings())
    assert process_time() - started < 120
    said = locator.report(trained, *pictures(200, 8, (64, 64)), minimum_cells=40)
    assert said["dice"] > 0.9
    assert said["centre_inside"] > 0.98

"""The liver network: its gradient map against autograd, its graph against torch, masked pre-training without a leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")

from engines.liver_dce import network, recipe  # noqa: E402
from engines.training import fit, pretrain  # noqa: E402

SHAPE = (5, 16, 64, 64)


def _case(n: int, seed: int = 0) -> Any:
    x = torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(seed))
    x[:, 4] = 0
    x[:, 4, 4:12, 20:44, 20:44] = 1
    return x


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    model = network.build("nano")
    for parameter in model.head.parameters():  # a head that attends, not one at its initial near-uniform state
        torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    model(_case(6, 9))  # statistics of BatchNorm
    return model.eval()


def test_the_written_gradient_is_autograds(net: Any) -> None:
    tokens = torch.randn((5, 4, net.encoder.channels), generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits, attention, written = net.head.run(tokens)
    (expected,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), tokens)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(written, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    assert torch.allclose(attention.sum(dim=1), torch.ones(5))
    one = torch.func.grad(lambda t: net.head(t[None])[0, 1] - net.head(t[None])[0, 0])
    assert torch.allclose(
        torch.func.vmap(one)(tokens.detach()), written, atol=1e-5 * float(expected.detach().abs().max())
    )


def test_the_map_is_the_gradient_towards_the_maps_of_the_tumour(net: Any) -> None:
    """d(logit 1 - logit 0) / d f times f, for every phase and cell, by autograd through the pooling."""
    deployed = net.deploy()
    x = _case(2)
    kept: list[Any] = []
    handle = deployed.encoder.stages[-1].register_forward_hook(lambda *a: kept.append(a[2]))
    logits, features, cam, _ = deployed(x)
    handle.remove()
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), kept[0])
    expected = (gradient * kept[0]).sum(dim=1).reshape(cam.shape)
    assert torch.allclose(cam, expected, atol=1e-5 * float(expected.detach().abs().max()))
    assert cam[0, :, :, 0, 0].abs().max() == 0  # nothing outside the outline
    whole = net(x)[2]
    assert torch.allclose(whole, cam.sum(dim=1), atol=1e-6)
    assert features.shape[1] == 4 * (net.encoder.early_channels + net.encoder.channels)


@pytest.mark.parametrize(
    "preset",
    [network.Preset((8, 12, 16), (1, 0, 1), 2, False, 2), network.Preset((8, 12, 16, 16), (1, 1, 1, 1), 1, True, 2)],
    ids=["blocks", "ConvNeXt"],
)
def test_the_deployed_form_is_the_train_form(preset: Any) -> None:
    torch.manual_seed(4)
    model = network.PhaseNet(preset).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)  # nothing stays where it began: BatchNorm's scale 1, shift 0
    model(_case(6, 9))
    model.eval()
    kept, x = {k: v.clone() for k, v in model.state_dict().items()}, _case(2)
    deployed = model.deploy()
    with torch.no_grad():
        (logits, features, whole), (found, same, cam, _) = model(x), deployed(x)
    assert logits.abs().max() > 0.05 and whole.abs().max() > 1e-4
    assert torch.allclose(found, logits, atol=1e-4)
    assert torch.allclose(same, features, atol=1e-5 * float(features.abs().max()))
    assert torch.allclose(cam.sum(dim=1), whole, atol=1e-4 * float(whole.abs().max()))
    assert not [m for m in deployed.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert model.state_dict().keys() == kept.keys() and model.pool == 1
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_the_way_back_is_right_on_openvino_at_the_width_of_the_paper(tmp_path: Path) -> None:
    """OpenVINO takes a square constant that is multiplied both ways for one of them; exported graphs share constants
    from a certain size."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("openvino", reason="openvino is not installed (extra [openvino])")
    from dicom_node.runtime import Model, Place
    from dicom_node.runtime.openvino import OpenVinoBackend
    from engines.training import export

    class Head(torch.nn.Module):
        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head = head

        def forward(self, tokens: Any) -> Any:
            return self.head.run(tokens)

    torch.manual_seed(0)
    model = network.PhaseNet(network.Preset((8, 12, 96), (0, 0, 0), 4, False, 2)).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head, names = Head(model.deploy().head), ("logits", "attention", "gradient")
    tokens = torch.randn(2, 4, 96)
    path = export.export(head, tokens.numpy(), names, tmp_path, ("fp32",))["fp32"]
    exported = Model("head", ("x",), names, {"fp32": path.read_bytes()}, {}, {"fp32": 1e-3}, {"x": (4, 96)})
    found = OpenVinoBackend().open(exported, Place(threads=1)).run({"x": tokens.numpy()})
    with torch.no_grad():
        expected = dict(zip(names, head(tokens), strict=True))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.numpy(), abs=1e-4 * float(value.abs().max())), name


def test_every_phase_goes_through_one_encoder_and_its_place_counts(net: Any) -> None:
    x = _case(1)
    swapped = x[:, [0, 2, 1, 3, 4]]
    deployed = net.deploy()
    with torch.no_grad():
        (logits, features, *_), (other, moved, *_) = deployed(x), deployed(swapped)
    per_phase = features.reshape(4, -1), moved.reshape(4, -1)
    assert torch.allclose(per_phase[0][[0, 2, 1, 3]], per_phase[1], atol=1e-6)
    assert not torch.allclose(logits, other, atol=1e-4)


def test_export_has_any_batch_and_all_outputs(net: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from engines.training import export

    deployed, x = net.deploy(), _case(3, 5).numpy()
    paths = export.export(deployed, x[:2], recipe.OUTPUTS, tmp_path)
    export.parity(deployed, paths, x)  # batch 1, 2, 3; both precisions
    session = export.session(paths["fp32"])
    with torch.no_grad():
        expected = deployed(torch.from_numpy(x))
    for batch in (1, 3):
        found = session.run(list(recipe.OUTPUTS), {"x": x[:batch]})
        for name, a, b in zip(recipe.OUTPUTS, found, expected, strict=True):
            assert a == pytest.approx(b[:batch].numpy(), abs=1e-4), name
    kinds = {node.op_type for node in __import__("onnx").load(paths["fp32"]).graph.node}
    assert not kinds & {"LayerNormalization", "MultiHeadAttention", "Attention"}  # TensorRT refuses the traced ones


def test_the_presets_are_one_topology() -> None:
    counts = {name: sum(p.numel() for p in network.build(name).parameters()) for name in network.PRESETS}
    assert counts == {"paper": 3_963_978, "demo": 35_362, "nano": 10_106}
    torch.manual_seed(0)
    with torch.no_grad():
        logits, features, cam = network.build("paper").eval()(_case(1))
    assert (logits.shape, cam.shape) == ((1, 2), (1, 4, 8, 8))
    assert features.shape == (1, 4 * (40 + 320), 4, 8, 8)


# --- masked pre-training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nano", "paper"])
def test_nothing_of_a_hidden_cell_reaches_the_encoder(preset: str) -> None:
    torch.manual_seed(1)
    encoder = network.build(preset).encoder.eval()
    x = torch.randn(1, 2, 16, 64, 64)
    with torch.no_grad():
        grid = encoder(x).shape[2:]
        visible = pretrain.hide(1, grid, 0.6, torch.Generator().manual_seed(0))
        changed = x + 5 * (1 - network._hidden(torch.ones_like(x), visible))
        assert torch.equal(encoder(x, visible), encoder(changed, visible))
        assert not torch.equal(encoder(x), encoder(changed))
    assert float(visible.mean()) == pytest.approx(0.4, abs=0.02)


def test_the_loss_counts_hidden_voxels_only() -> None:
    truth = torch.zeros(1, 3, 2, 4, 4)
    visible = pretrain.hide(1, (2, 4, 4), 0.5, torch.Generator().manual_seed(0))
    said = truth + visible * 7.0
    assert float(pretrain.loss(said, truth, visible)) == 0
    assert float(pretrain.loss(truth + 2.0, truth, visible)) == pytest.approx(4)


def test_patches_are_the_volume_cut_up() -> None:
    x = torch.arange(2 * 4 * 4.0).reshape(1, 1, 2, 4, 4)
    cut = pretrain.patches(x, (1, 2, 2))
    assert cut.shape == (1, 8, 1, 2, 2)
    first = x[0, 0, :, :2, :2].flatten()
    assert torch.allclose(
        cut[0, :, 0, 0, 0], (first - first.mean()) / (first.square().mean() - first.mean() ** 2 + 1e-2).sqrt()
    )


def _blobs(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Volumes with structure that can be guessed from what stands around."""
    rng = np.random.default_rng(0)
    z, y, x = (np.linspace(-1, 1, k) for k in (16, 64, 64))
    made = np.zeros((n, 2, 16, 64, 64), np.float32)
    for image in made:
        turn, wave = rng.uniform(0, np.pi), rng.uniform(3, 5)
        image[0] = np.sin(wave * (np.cos(turn) * x + np.sin(turn) * y[:, None] + 0.2 * z[:, None, None]))
    return made


def test_pretraining_learns_and_is_not_repeated(tmp_path: Path) -> None:
    settings = pretrain.Settings(seed=1, epochs=4, batch=8, learning_rate=5e-3)
    volumes = _blobs(32)
    torch.manual_seed(0)
    first = network.build("nano").encoder
    losses = pretrain.pretrain(first, volumes, settings, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    again = network.build("nano").encoder
    assert pretrain.pretrain(again, volumes, settings, tmp_path) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_fit_goes_on_from_the_pretrained_weights(tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = network.build("nano")
    settings = fit.Settings(1, 2, 4, 1, 1e-3, 0.0)
    pretrain.begin(model, settings, tmp_path)
    loaded = fit.load("liver_dce", "nano", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    other = network.build("nano")
    both = torch.nn.ModuleDict({"model": other, "local": fit.LocalLoss()})
    optimiser = torch.optim.AdamW(both.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, 10)
    assert fit._resume(tmp_path, settings, both, optimiser, schedule) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- training side ---------------------------------------------------------------------------------------------------


def test_augmentation_moves_volume_region_and_place_together() -> None:
    rng = np.random.default_rng(0)
    place = np.zeros((6, 4, 16, 16), np.float32)
    place[:, 0, 2, 5] = 1
    x = np.zeros((6, *SHAPE), np.float32)
    x[:, :, :4, 8:12, 20:24] = 1
    out, moved = recipe.augment(x, place, rng)
    cells = out[:, 4].reshape(6, 4, 4, 16, 4, 16, 4).mean(axis=(2, 4, 6))
    assert np.array_equal(cells, moved)
    assert len({tuple(np.argwhere(m)[0]) for m in moved}) > 2
    for one in out:
        bright = one[:4].mean(axis=0) > one[:4].mean() + 0.4
        assert np.array_equal(bright, one[4] > 0.5)


def test_head_file_is_the_tangent_of_the_head(net: Any) -> None:
    deployed, x = net.deploy(), _case(2).numpy()
    weights, bias = recipe.first_order(deployed, x)
    with torch.no_grad():
        features = deployed(torch.from_numpy(x))[1].mean(dim=(0, 2, 3, 4))
        early = net.encoder.early_channels
        expected = net.head(features.reshape(1, 4, -1)[..., early:])[0]
    assert weights @ features.numpy() + bias == pytest.approx(expected.numpy(), abs=1e-4)
    assert not weights.reshape(2, 4, -1)[..., :early].any()

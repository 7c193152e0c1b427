"""3D Inception-ResNet-v2: the published size, calcification attention that gates, a class map that equals Grad-CAM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")

from engines.thyroid_cine import network  # noqa: E402
from engines.training.package import activation_map  # noqa: E402

CLIP = (1, 16, 112, 112)


def _trained(preset: str) -> network.InceptionResNet:
    """Random weights and non-trivial running statistics, as after a training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = network.build(preset)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="module")
def nano() -> network.InceptionResNet:
    return _trained("nano")


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(3, *CLIP)).astype(np.float32))


def test_reference_setting_is_inception_resnet_v2() -> None:
    """55.84 M parameters in 2D at 3 channels and 1000 classes, as published; the same code as the other presets."""
    model = network.build("reference", channels=3, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 55_843_464
    assert model.head.in_features == 1536


def test_reference_setting_has_the_published_strides() -> None:
    model = network.InceptionResNet(network.PRESETS["reference"]._replace(alpha=1 / 16, blocks=(1, 1, 1)), 3, 10)
    with torch.no_grad():
        logits, features = model.eval()(torch.randn(1, 3, 320, 320))
    assert logits.shape == (1, 10)
    assert features.shape[2:] == (10, 10)  # stride 32


@pytest.mark.parametrize(("preset", "blocks"), [("paper", (10, 20, 10)), ("demo", (2, 4, 2)), ("nano", (1, 2, 1))])
def test_every_preset_repeats_the_published_blocks_in_their_order(preset: str, blocks: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        body = network.build(preset).body
    scales = [layer.scale if isinstance(layer, network.Residual) else None for layer in body]
    a, b, c = blocks
    assert scales == [None, *[0.17] * a, None, *[0.1] * b, None, *[0.2] * (c - 1), 1.0, None]


@pytest.mark.parametrize("preset", ["demo", "nano"])
def test_the_map_keeps_stride_8_in_the_frame(preset: str, clips: torch.Tensor) -> None:
    model = _trained(preset)
    with torch.no_grad():
        logits, features = model(clips[:1])
    assert logits.shape == (1, 2)
    assert features.shape == (1, model.gate_channels + model.head.in_features, 4, 14, 14)


def test_the_head_reads_the_pooled_gated_map_and_nothing_of_the_gate(
    nano: network.InceptionResNet, clips: torch.Tensor
) -> None:
    weights, bias = nano.full_head()
    with torch.no_grad():
        logits, features = nano(clips)
    assert not weights[:, : nano.gate_channels].any()
    assert torch.allclose(features.mean(dim=(2, 3, 4)) @ weights.T + bias, logits, atol=1e-5)
    assert features[:, : nano.gate_channels].std() > 0


def test_analytic_map_is_three_dimensional_grad_cam(nano: network.InceptionResNet, clips: torch.Tensor) -> None:
    """MONAI's GradCAM on the gated map, class by class: the same to rounding; and the map sums to the logit."""
    from monai.visualize.class_activation_maps import GradCAM

    class Gated(torch.nn.Module):
        """The gated map as a layer of its own, so that a hook can see it."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nano, torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.net(x)[1][:, self.net.gate_channels :]
            return self.net.head(self.last(features).mean(dim=(2, 3, 4)))

    wrapper = Gated().eval()
    oracle = GradCAM(wrapper, "last", postprocessing=lambda cam: cam, upsampler=lambda spatial_size: lambda cam: cam)
    x = clips[:1]
    with torch.no_grad():
        logits, features = nano(x)
    weights = nano.full_head()[0].numpy()
    for k in (0, 1):
        # MONAI cuts the map off at zero, as Selvaraju et al. do.
        expected = oracle(x, class_idx=k)[0, 0].detach().numpy()
        analytic = np.einsum("c...,c->...", features[0].numpy(), weights[k]) / features[0, 0].numel()
        assert np.maximum(analytic, 0) == pytest.approx(expected, abs=1e-7)
    cam = activation_map(features.numpy(), weights, 1)[0]
    bias = (nano.head.bias[1] - nano.head.bias[0]).item()
    assert cam.shape == (4, 14, 14)
    assert cam.sum() + bias == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-4)


def test_analytic_map_is_the_gradient_by_autograd(nano: network.InceptionResNet, clips: torch.Tensor) -> None:
    features = nano(clips[:1])[1].detach().requires_grad_()
    weights, bias = nano.full_head()
    logits = features.mean(dim=(2, 3, 4)) @ weights.T + bias
    (logits[0, 1] - logits[0, 0]).backward()
    assert features.grad is not None
    by_gradient = (features.grad.mean(dim=(2, 3, 4), keepdim=True) * features).sum(dim=1)[0].detach().numpy()
    assert activation_map(features.detach().numpy(), weights.numpy(), 1)[0] == pytest.approx(by_gradient, abs=1e-7)


# --- calcification attention -----------------------------------------------------------------------------------------


def test_attention_gates_the_map(nano: network.InceptionResNet, clips: torch.Tensor) -> None:
    """Shut, nothing is left of the map and the logits are the bias; half open, it is halved; as trained, neither."""
    assert nano.attention is not None
    gate = nano.attention.gate
    kept = {name: value.clone() for name, value in gate.state_dict().items()}
    with torch.no_grad():
        trained = nano(clips[:1])
        gate.weight.zero_()
        gate.bias.fill_(-40)
        shut = nano(clips[:1])
        gate.bias.zero_()
        half = nano(clips[:1])
        gate.bias.fill_(40)
        whole = nano(clips[:1])
        gate.load_state_dict(kept)
    assert torch.allclose(shut[0], nano.head.bias, atol=1e-5)
    first = nano.gate_channels
    assert torch.allclose(half[1][:, first:], whole[1][:, first:] / 2, atol=1e-5)
    assert torch.equal(half[1][:, :first], whole[1][:, :first])  # the channels of the node's gate are not touched
    assert not torch.allclose(trained[0], whole[0], atol=1e-4)


def test_attention_sees_a_small_echo_where_it_lies(nano: network.InceptionResNet) -> None:
    """Only the fine branch can tell: the rest of the network is shown an even map."""
    assert nano.attention is not None
    x = torch.zeros(1, *CLIP)
    even = torch.zeros(1, nano.head.in_features, 4, 14, 14)
    speck = x.clone()
    speck[0, 0, 9, 50:52, 76:78] = 3.0
    with torch.no_grad():
        changed = (nano.attention(speck, even) - nano.attention(x, even)).abs()[0, 0]
    assert changed.max() > 0
    at = np.unravel_index(int(changed.argmax()), changed.shape)
    assert tuple(map(int, at)) == (9 // 4, 50 // 8, 76 // 8)
    assert changed[0].max() == changed[3].max() == 0  # frames far from it do not see it


def test_attention_looks_at_detail_and_not_at_brightness(nano: network.InceptionResNet) -> None:
    assert nano.attention is not None
    even = torch.zeros(1, nano.head.in_features, 4, 14, 14)
    with torch.no_grad():
        dark, bright = (nano.attention(torch.full((1, *CLIP), level), even) for level in (-1.0, 2.0))
    assert torch.allclose(dark, bright, atol=1e-5)


def test_without_attention_it_is_the_plain_network(clips: torch.Tensor) -> None:
    plain = _trained("nano-plain")
    assert plain.attention is None
    with torch.no_grad():
        logits, features = plain(clips[:1])
    assert torch.allclose(features.mean(dim=(2, 3, 4)) @ plain.full_head()[0].T + plain.head.bias, logits, atol=1e-5)


# --- export ----------------------------------------------------------------------------------------------------------


def test_the_deployed_copy_computes_the_same_and_stays_as_it_is(clips: torch.Tensor) -> None:
    model = _trained("nano")
    deployed = model.train().deploy()
    model.eval()
    with torch.no_grad():
        before = deployed(clips[:1])[0]
        assert torch.equal(model(clips[:1])[0], before)
        model.head.weight += 1.0
        assert torch.equal(deployed(clips[:1])[0], before)
        assert not torch.equal(model(clips[:1])[0], before)


@pytest.mark.long
def test_onnx_says_what_torch_says_at_batch_1_2_and_3(
    nano: network.InceptionResNet, clips: torch.Tensor, tmp_path: Path
) -> None:
    """`parity` compares the three batches and raises above the tolerance; here the features are compared as well."""
    export = pytest.importorskip("engines.training.export", reason="onnx is not installed")
    x = clips.numpy()
    deployed = nano.deploy()
    paths = export.export(deployed, x[:2], ("logits", "features"), tmp_path)
    worst = export.parity(deployed, paths, x)
    assert set(worst) == {"fp32", "fp16"}
    assert worst["fp32"] < 1e-4
    with torch.no_grad():
        expected = deployed(clips)[1].numpy()
    found = export.session(paths["fp32"]).run(["features"], {"x": x})[0]
    assert found == pytest.approx(expected, abs=1e-3)

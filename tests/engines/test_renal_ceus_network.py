"""RepVGG: the published size, the exact re-parameterisation, and a class activation map that equals Grad-CAM."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")

from engines.renal_ceus import network  # noqa: E402
from engines.training.package import activation_map  # noqa: E402


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trained(preset: str, seed: int = 0) -> network.RepVgg:
    """Random weights and non-trivial running statistics, as after a training."""
    torch.manual_seed(seed)
    model = network.build(preset)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_paper_preset_is_repvgg_a0() -> None:
    """9.11 M parameters in train form, 8.31 M deployed, at 3 channels and 1000 classes (Ding et al. 2021)."""
    model = network.build("paper", channels=3, classes=1000)
    assert round(_parameters(model) / 1e6, 2) == 9.11
    assert round(_parameters(model.deploy()) / 1e6, 2) == 8.31


@pytest.mark.parametrize("preset", ["demo", "nano"])
def test_deployed_network_computes_the_same(preset: str) -> None:
    model = _trained(preset)
    x = torch.randn(3, 1, 224, 224)
    with torch.no_grad():
        (logits, features), (fused, fused_features) = model(x), model.deploy()(x)
    scale = features.abs().max()
    assert (features - fused_features).abs().max() / scale < 1e-5
    assert (logits - fused).abs().max() / logits.abs().max() < 1e-5
    assert logits.abs().max() > 1e-3


def test_deploying_leaves_one_convolution_a_block_and_the_original_untouched() -> None:
    model = network.build("nano")
    before = _parameters(model)
    deployed = model.deploy()
    assert sum(isinstance(m, torch.nn.Conv2d) for m in deployed.modules()) == 1 + sum(network.BLOCKS)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.modules())
    assert _parameters(model) == before
    assert model.training


def test_presets_share_the_topology_and_keep_a_fine_map() -> None:
    demo = network.PRESETS["demo"]
    assert len(network.build("demo").body) == len(network.build("paper").body) == 22
    stride = int(np.prod(demo.strides))
    assert stride <= 8
    _, features = network.build("demo").eval()(torch.zeros(1, 1, 224, 224))
    assert features.shape == (1, sum(demo.widths[:3]) + demo.widths[-1], 14, 14)


def test_analytic_map_equals_autograd_grad_cam() -> None:
    """Global average pooling and a linear head: Grad-CAM is the class activation map, exactly."""
    model = _trained("nano").deploy()
    kept: list[torch.Tensor] = []
    model.body[-1].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logits, features = model(torch.randn(2, 1, 224, 224))
    margin = logits[:, 1] - logits[:, 0]
    (last,) = kept
    (gradient,) = torch.autograd.grad(margin.sum(), last)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1).detach().numpy()
    weights = model.full_head()[0].numpy()
    cam = activation_map(features.detach().numpy(), weights, positive=1)
    assert cam == pytest.approx(expected, rel=1e-3, abs=1e-6 * float(np.abs(expected).max()) + 1e-9)
    bias = float((model.head.bias[1] - model.head.bias[0]).detach())
    assert cam.sum(axis=(1, 2)) == pytest.approx(margin.detach().numpy() - bias, rel=1e-3, abs=1e-5)


def test_analytic_map_equals_monai_grad_cam() -> None:
    visualize = pytest.importorskip("monai.visualize", reason="monai is not installed")
    model = _trained("nano").deploy()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)[0]

    wrapper = Logits().eval()  # MONAI restores the mode of the wrapper, so the wrapper itself must be in eval mode
    x = torch.randn(1, 1, 224, 224)
    theirs = visualize.GradCAM(nn_module=wrapper, target_layers="net.body.21")(x, class_idx=1)[0, 0].detach().numpy()
    features = model(x)[1].detach().numpy()
    weights = model.full_head()[0].numpy()
    ours = np.maximum(np.einsum("nchw,c->nhw", features, weights[1])[0], 0)
    # MONAI enlarges and normalises for display: compare on the feature grid up to that affine change.
    small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(theirs)[None], ours.shape)[0].numpy()
    assert ours.max() > 0
    assert abs(np.corrcoef(small.ravel(), ours.ravel())[0, 1]) > 0.95


def test_random_weights_change_the_map() -> None:
    x = torch.randn(1, 1, 224, 224)
    maps = []
    for seed in (1, 2):
        model = _trained("nano", seed).deploy()
        maps.append(activation_map(model(x)[1].detach().numpy(), model.full_head()[0].numpy(), 1).ravel())
    assert abs(np.corrcoef(*maps)[0, 1]) < 0.5

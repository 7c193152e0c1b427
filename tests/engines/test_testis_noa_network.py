"""NASNet-A Mobile: the published size, the cells' wiring, and a class activation map that equals Grad-CAM."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")

from engines.testis_noa import network  # noqa: E402
from engines.training.package import activation_map  # noqa: E402


def _trained(preset: str) -> network.NasNet:
    """Random weights and non-trivial running statistics, as after a training."""
    torch.manual_seed(0)
    model = network.build(preset)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_paper_preset_is_nasnet_a_mobile() -> None:
    """5,289,978 trainable parameters at 3 channels and 1000 classes: the figure of the Keras reference."""
    model = network.build("paper", channels=3, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 5_289_978
    assert model.head.in_features == 1056


@pytest.mark.parametrize("preset", ["paper", "demo", "nano", "gate"])
def test_every_preset_has_the_published_topology(preset: str) -> None:
    """Two stem cells, then three stacks of four normal cells with a reduction cell between them."""
    kinds = [type(cell).__name__[0] for cell in network.build(preset).cells]
    assert "".join(kinds) == "NNNNRNNNNRNNNN"


@pytest.mark.parametrize(("preset", "cells"), [("demo", 10), ("nano", 14)])
def test_the_map_of_a_narrow_preset_is_fine_enough_to_point(preset: str, cells: int) -> None:
    model = _trained(preset)
    with torch.no_grad():
        logits, features = model(torch.randn(2, 1, 224, 224))
    assert logits.shape == (2, 2)
    assert features.shape == (2, model.gate_channels + model.head.in_features, cells, cells)


def test_the_head_reads_the_pooled_last_map_and_nothing_of_the_gate() -> None:
    model = _trained("demo")
    weights, bias = model.full_head()
    with torch.no_grad():
        logits, features = model(torch.randn(2, 1, 224, 224))
    assert not weights[:, : model.gate_channels].any()
    assert torch.allclose(features.mean(dim=(2, 3)) @ weights.T + bias, logits, atol=1e-5)
    assert features[:, : model.gate_channels].std() > 0


def test_the_gate_sees_light_and_roughness_of_the_image_itself() -> None:
    """A flat image has no roughness; a chequer of single pixels is rough at full size and flat at half size."""
    statistics = network.Statistics()
    flat, rows = torch.full((1, 1, 224, 224), 0.5), torch.zeros(1, 1, 224, 224)
    rows[:, :, ::2] = 1.0
    chequer = (rows + rows.transpose(2, 3)) % 2
    of_flat, of_rows, of_chequer = (statistics(x)[0, :, 0, 0] for x in (flat, rows, chequer))
    assert of_flat.tolist() == pytest.approx([0.0] * 12 + [0.5, 0.0, 0.0], abs=1e-6)
    assert of_rows[2].item() == pytest.approx(1.0)  # steps from row to row
    assert of_rows[3].item() == 0.0  # and none from column to column
    assert of_chequer[:2].min() > 0.2
    assert of_chequer[2:4].tolist() == pytest.approx([1.0, 1.0])
    assert of_chequer[4:12].abs().max() < 1e-6


def test_analytic_map_is_grad_cam() -> None:
    """d logit / d feature = W / Z: weighting the features by their averaged gradient gives the same map."""
    model = _trained("nano")
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model.cells[-1].register_forward_hook(keep)
    logits, features = model(torch.randn(1, 1, 224, 224))
    handle.remove()
    (logits[0, 1] - logits[0, 0]).backward()
    # The head stands behind a ReLU: its gradient with respect to the map after the ReLU is the one of positive cells.
    gradient = kept[0].grad[0]
    assert torch.allclose(
        gradient, (model.head.weight[1] - model.head.weight[0])[:, None, None] / gradient[0].numel() * (kept[0][0] > 0)
    )
    after = torch.relu(kept[0][0])
    by_gradient = ((model.head.weight[1] - model.head.weight[0])[:, None, None] / after[0].numel() * after).sum(dim=0)
    analytic = activation_map(features.detach().numpy(), model.full_head()[0].numpy(), 1)[0]
    assert analytic == pytest.approx(by_gradient.detach().numpy(), abs=1e-6)
    bias = (model.head.bias[1] - model.head.bias[0]).item()
    assert analytic.sum() + bias == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-4)


def test_a_map_of_the_cell_before_the_last_is_halved_on_two_shifted_grids() -> None:
    halve = network.Halve(1, 2)
    for conv in (halve.even, halve.odd):
        torch.nn.init.ones_(conv.weight)
    halve.norm = torch.nn.Identity()
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = halve(x)[0]
    assert out[0].tolist() == [[0, 2], [8, 10]]
    assert out[1].tolist() == [[5, 7], [13, 15]]


def test_the_deployed_copy_computes_the_same_and_stays_as_it_is() -> None:
    model = _trained("nano")
    x = torch.randn(3, 1, 224, 224)
    deployed = model.train().deploy()
    model.eval()
    with torch.no_grad():
        before = deployed(x)[0]
        assert torch.equal(model(x)[0], before)
        model.head.weight += 1.0
        assert torch.equal(deployed(x)[0], before)
        assert not torch.equal(model(x)[0], before)

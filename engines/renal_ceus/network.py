"""RepVGG (Ding et al., CVPR 2021): trained with three branches a block, deployed as plain 3x3 convolutions. torch.

`build("paper")` is the A0 setting at full width; `build("demo")` the same topology (1, 2, 4, 14, 1 blocks), narrow, and
without the last two strides: stride 8 of an image of 112² (the graph halves its 224² input), so that the last feature
map is fine enough to show where a score comes from. The head is global average pooling and one linear layer.

Outputs: `logits` and `features`. `features` holds the last feature map and, before it, the maps after the stem and the
first two stages, averaged to the same grid. The head ignores those (`full_head` gives them weight zero, so a class
activation map stays exact); they are for the out-of-distribution gate, because the last map alone has learnt to ignore
what makes an image foreign: white noise looks ordinary to it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

BLOCKS = (2, 4, 14, 1)


class Preset(NamedTuple):
    """Widths of the stem and the four stages, their strides, and the in-graph mean pooling before the stem."""

    widths: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]
    pool: int = 1


PRESETS = {
    "paper": Preset((48, 48, 96, 192, 1280), (2, 2, 2, 2, 2)),
    "demo": Preset((12, 16, 24, 32, 64), (2, 2, 2, 1, 1), pool=2),
    "stills": Preset((12, 16, 24, 32, 64), (2, 2, 2, 1, 1), pool=2),
    "nano": Preset((8, 8, 12, 16, 32), (2, 2, 2, 1, 1), pool=4),
}


class RepVggBlock(nn.Module):
    """ReLU(BN(3x3) + BN(1x1) + BN(identity)); `fused()` is the one 3x3 convolution that computes the same."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn3, self.bn1 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.bn0 = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        return torch.relu(y if self.bn0 is None else y + self.bn0(x))

    def fused(self) -> nn.Sequential:
        """The deploy form: convolution and BatchNorm are linear, so their sums are one kernel and one bias."""
        kernel, bias = _fold(self.conv3.weight, self.bn3)
        kernel1, bias1 = _fold(pad(self.conv1.weight, [1, 1, 1, 1]), self.bn1)
        kernel, bias = kernel + kernel1, bias + bias1
        if self.bn0 is not None:
            identity = torch.zeros_like(kernel)
            index = torch.arange(len(identity))
            identity[index, index, 1, 1] = 1
            kernel0, bias0 = _fold(identity, self.bn0)
            kernel, bias = kernel + kernel0, bias + bias0
        outputs, inputs = kernel.shape[:2]
        conv = nn.Conv2d(inputs, outputs, 3, self.conv3.stride, 1)  # type: ignore[arg-type]
        conv.weight.data, conv.bias.data = kernel, bias  # type: ignore[union-attr]
        return nn.Sequential(conv, nn.ReLU())


def _fold(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of `bn` after a convolution; in double precision, so that 22 folded blocks stay exact."""
    mean, variance = bn.running_mean, bn.running_var
    if mean is None or variance is None:
        raise ValueError("BatchNorm without running statistics cannot be folded")
    scale = bn.weight.double() / torch.sqrt(variance.double() + bn.eps)
    bias = bn.bias.double() - mean.double() * scale
    return (kernel.double() * scale[:, None, None, None]).float().detach(), bias.float().detach()


class RepVgg(nn.Module):
    """The network; `forward` gives (logits (N, K), features (N, C, h, w))."""

    def __init__(self, preset: Preset, channels: int = 1, classes: int = 2, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(preset.pool) if preset.pool > 1 else nn.Identity()
        layers: list[nn.Module] = []
        inputs = channels
        ends: list[int] = []
        for count, width, stride in zip((1, *blocks), preset.widths, preset.strides, strict=True):
            for index in range(count):
                layers.append(RepVggBlock(inputs, width, stride if index == 0 else 1))
                inputs = width
            ends.append(len(layers) - 1)
        self.early = tuple(ends[:3])
        """Blocks whose maps go to the gate: the ends of the stem and of the first two stages."""
        self.body = nn.Sequential(*layers)
        self.gate_channels = sum(preset.widths[:3])
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early: list[Tensor] = []
        x = self.pool(x)
        for index, block in enumerate(self.body):
            x = block(x)
            if index in self.early:
                early.append(x)
        features = [avg_pool2d(e, e.shape[-1] // x.shape[-1]) for e in early]
        return self.head(x.mean(dim=(2, 3))), torch.cat([*features, x], dim=1)

    def full_head(self) -> tuple[Tensor, Tensor]:
        """Weights (K, C) and bias (K,) over all channels of `features`: zero for the gate's."""
        return pad(self.head.weight.detach(), [self.gate_channels, 0]), self.head.bias.detach()

    def deploy(self) -> RepVgg:
        """A re-parameterised copy for inference; gives the same outputs to rounding."""
        copied = copy.deepcopy(self).eval()
        copied.body = nn.Sequential(*(b.fused() if isinstance(b, RepVggBlock) else b for b in copied.body))
        return copied


def build(preset: str = "demo", channels: int = 1, classes: int = 2) -> RepVgg:
    """The train form of a preset."""
    return RepVgg(PRESETS[preset], channels, classes)

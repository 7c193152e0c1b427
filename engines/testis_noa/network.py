"""NASNet-A (Zoph et al., CVPR 2018) in its Mobile setting: 4 normal cells a stack, 1056 penultimate filters. torch.

`build("paper")` is NASNet-A Mobile; with 3 channels and 1000 classes it has the 5,289,978 trainable parameters of the
Keras reference. `build("demo")` is the same topology, narrow, with stride 1 in the two reduction cells between the
stacks: stride 8 of an image of 74² (the graph averages its 224² input 3 x 3), so that the last feature map of 10 x 10
cells is fine enough to show where a score comes from. Padding is symmetric, where Keras pads strided layers on one
side. The auxiliary head of the training recipe on ImageNet is no part of the network in use and left out, as in Keras.

Outputs: `logits` and `features`. `features` holds the last feature map (after its ReLU) and, before it, what the
out-of-distribution gate needs beside it: the maps after the stem and the first stack, and statistics of the image
itself. The head ignores those (`full_head` gives them weight zero, so a class activation map stays exact). The last map
alone has learnt to ignore what makes an image foreign, and the mean pooling makes white noise look like speckle; light,
roughness and skewness of the grey values at three scales do not.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

CELLS = 4
"""Normal cells in each of the three stacks."""


class Preset(NamedTuple):
    """Filters of the first stack (doubled twice) and of the stem, strides, and the in-graph mean pooling before it."""

    filters: int
    stem: int
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    """Of the stem convolution, the two stem cells and the two reduction cells."""
    pool: int = 1


PRESETS = {
    "paper": Preset(44, 32),
    "demo": Preset(4, 8, (2, 2, 2, 1, 1), pool=3),
    "nano": Preset(4, 8, (2, 2, 1, 1, 1), pool=4),
    "gate": Preset(4, 8, (2, 2, 2, 1, 1), pool=3),
}


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Separable(nn.Sequential):
    """(ReLU, depthwise k x k, pointwise, BN) twice; the first one strides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(*self._half(inputs, outputs, kernel, stride), *self._half(outputs, outputs, kernel, 1))

    @staticmethod
    def _half(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
        depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        return nn.ReLU(), depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs)


class Squeeze(nn.Sequential):
    """ReLU, 1x1 convolution, BN: brings a cell's input to the cell's number of filters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs))


class Halve(nn.Module):
    """A map of twice the size to the cell's grid: two 1x1 convolutions on grids shifted by one pixel (factorised)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.norm = _norm(outputs // 2 * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = pad(x, [0, 1, 0, 1])[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))


def _adjust(inputs: int, outputs: int, halve: bool) -> nn.Module:
    """The module that fits the output of the cell before the last to this cell."""
    if halve:
        return Halve(inputs, outputs)
    return nn.Identity() if inputs == outputs else Squeeze(inputs, outputs)


def _average(stride: int = 1) -> nn.AvgPool2d:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


class NormalCell(nn.Module):
    """Normal cell A: keeps the grid, gives 6 x filters channels. `h` = last cell, `p` = the one before."""

    def __init__(self, last: int, before: int, filters: int, halve: bool) -> None:
        super().__init__()
        self.fit_p, self.fit_h = _adjust(before, filters, halve), Squeeze(last, filters)
        self.one_h, self.one_p = Separable(filters, filters, 5), Separable(filters, filters, 3)
        self.two_5, self.two_3 = Separable(filters, filters, 5), Separable(filters, filters, 3)
        self.five = Separable(filters, filters, 3)
        self.average = _average()

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        h, p = self.fit_h(x), self.fit_p(before)
        one = self.one_h(h) + self.one_p(p)
        two = self.two_5(p) + self.two_3(p)
        three = self.average(h) + p
        four = 2 * self.average(p)  # two average pools of the same map, added
        five = self.five(h) + h
        return torch.cat([p, one, two, three, four, five], dim=1)


class ReductionCell(nn.Module):
    """Reduction cell A: strides, gives 4 x filters channels. The first one of a network has no cell before the last."""

    def __init__(self, last: int, before: int | None, filters: int, halve: bool, stride: int) -> None:
        super().__init__()
        p = filters if before is not None else last
        self.fit_p = nn.Identity() if before is None else _adjust(before, filters, halve)
        self.fit_h = Squeeze(last, filters)
        self.one_h, self.one_p = Separable(filters, filters, 5, stride), Separable(p, filters, 7, stride)
        self.two_p, self.three_p = Separable(p, filters, 7, stride), Separable(p, filters, 5, stride)
        self.five = Separable(filters, filters, 3)
        self.maximum, self.average = nn.MaxPool2d(3, stride, 1), _average(stride)
        self.smooth = _average()

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        h, p = self.fit_h(x), self.fit_p(before)
        highest = self.maximum(h)
        one = self.one_h(h) + self.one_p(p)
        two = highest + self.two_p(p)
        three = self.average(h) + self.three_p(p)
        four = two + self.smooth(one)
        five = self.five(one) + highest
        return torch.cat([two, three, four, five], dim=1)


class Statistics(nn.Module):
    """(N, C, H, W) to (N, 15 C, 1, 1): how rough, how skewed and how bright an image is. No weights.

    At full, half and quarter size: what stands out above and below the 5 x 5 neighbourhood, and the mean step to the
    next row and column; then the mean, and how much is nearly white and nearly black.
    """

    channels = 15

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for size in (1, 2, 4):
            y = avg_pool2d(x, size) if size > 1 else x
            apart = y - avg_pool2d(y, 5, 1, 2, count_include_pad=False)
            found += [torch.relu(apart), torch.relu(-apart)]
            found += [(y[:, :, 1:] - y[:, :, :-1]).abs(), (y[..., 1:] - y[..., :-1]).abs()]
        found += [x, torch.relu(x - 2.5), torch.relu(-0.8 - x)]
        # In two steps: the sum of a whole image leaves the range of half precision.
        return torch.cat([avg_pool2d(f, 7).mean(dim=(2, 3), keepdim=True) for f in found], dim=1)


class NasNet(nn.Module):
    """The network; `forward` gives (logits (N, K), features (N, C, h, w))."""

    def __init__(self, preset: Preset, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        f, s = preset.filters, preset.strides
        self.statistics = Statistics()
        self.pool = nn.AvgPool2d(preset.pool) if preset.pool > 1 else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(channels, preset.stem, 3, s[0], 1, bias=False), _norm(preset.stem))
        self.stem1 = ReductionCell(preset.stem, None, f // 4, False, s[1])
        self.stem2 = ReductionCell(f // 4 * 4, preset.stem, f // 2, s[1] == 2, s[2])
        last, before, halve = f // 2 * 4, f // 4 * 4, s[2] == 2
        cells: list[nn.Module] = []
        for stack in range(3):
            filters = f * 2**stack
            if stack:
                cells.append(ReductionCell(last, before, filters, halve, s[2 + stack]))
                last, before, halve = 4 * filters, last, s[2 + stack] == 2
            for _ in range(CELLS):
                cells.append(NormalCell(last, before, filters, halve))
                last, before, halve = 6 * filters, last, False
        self.cells = nn.ModuleList(cells)
        self.gate_channels = Statistics.channels * channels + f // 2 * 4 + 6 * f
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = self.statistics(x)
        before = self.stem(self.pool(x))
        x = self.stem1(before, before)
        before, x = x, self.stem2(x, before)
        early = [torch.relu(x)]
        for index, cell in enumerate(self.cells):
            before, x = x, cell(x, before)
            if index == CELLS - 1:
                early.append(torch.relu(x))
        x = torch.relu(x)
        gate = [image.expand(-1, -1, *x.shape[2:]), *(avg_pool2d(e, e.shape[-1] // x.shape[-1]) for e in early)]
        return self.head(x.mean(dim=(2, 3))), torch.cat([*gate, x], dim=1)

    def full_head(self) -> tuple[Tensor, Tensor]:
        """Weights (K, C) and bias (K,) over all channels of `features`: zero for the gate's."""
        return pad(self.head.weight.detach(), [self.gate_channels, 0]), self.head.bias.detach()

    def deploy(self) -> NasNet:
        """A copy for inference. Nothing is folded here: runtimes fold BatchNorm into the convolution before it."""
        return copy.deepcopy(self).eval()


def build(preset: str = "demo", channels: int = 1, classes: int = 2) -> NasNet:
    """The network of a preset."""
    return NasNet(PRESETS[preset], channels, classes)

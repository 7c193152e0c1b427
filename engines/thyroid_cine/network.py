"""Inception-ResNet-v2 (Szegedy et al., AAAI 2017) in three dimensions, with calcification attention. torch.

The blocks, their widths and their order are the published ones; `alpha` scales the widths and `blocks` says how often a
residual block repeats. In 3D a k x k kernel becomes 3 x k x k, of a factorised pair the second one sees three frames;
the two reductions keep their size (stride 1), so that the last map has stride 8 in the frame: fine enough to point at a
calcification. In 2D, at `alpha` 1 with all strides, it is the published network of 55.84 M parameters.

The publication's "calcification attention" is not described in what was available to us; this one is ours. A branch of
its own looks at the fine detail (frame minus its local mean), keeps the strongest response of each cell and, together
with the last map, gates that map cell by cell.

Outputs: `logits` and `features`. The head is global average pooling and one linear layer on the gated map, so the class
activation map is exact (Grad-CAM). `features` holds that map and, before it, maps of the stem averaged to the same
grid. The head ignores those (`full_head` gives them weight zero); they are for the out-of-distribution gate, because
the last map alone has learnt to ignore what makes an image foreign.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d, pad

DETAIL = 8
"""Channels of the branch that looks at fine detail."""


class Preset(NamedTuple):
    """`alpha` scales all widths; `blocks` = how many of 35, 17 and 8; strides of the stem (frame, row, column)."""

    alpha: float
    blocks: tuple[int, int, int] = (10, 20, 10)
    dims: int = 3
    stem: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    reduce: int = 1
    """Stride of the two reductions; 2 in the publication."""
    attention: bool = True


_PAIR = ((2, 2, 2), (2, 2, 2), (1, 2, 2))  # halves the frames first: a third of the time
PRESETS = {
    "reference": Preset(1.0, dims=2, reduce=2, attention=False),
    "paper": Preset(1.0),
    "demo": Preset(1 / 12, (2, 4, 2), stem=_PAIR),
    "nano": Preset(1 / 16, (1, 2, 1), stem=_PAIR),
}
PRESETS["nano-plain"] = PRESETS["nano"]._replace(attention=False)  # for the comparison with attention


class Conv(nn.Sequential):
    """Convolution, BatchNorm, ReLU. `kernel` is in the frame; `frames` the extent over frames."""

    def __init__(
        self, dims: int, inputs: int, outputs: int, kernel: tuple[int, int], frames: int = 1,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:  # fmt: skip
        if dims == 3:
            size = (frames, kernel[0], kernel[1])
            half = (size[0] // 2, size[1] // 2, size[2] // 2)
            conv: nn.Module = nn.Conv3d(inputs, outputs, size, stride, half, bias=False)
            norm: nn.Module = nn.BatchNorm3d(outputs, eps=1e-3)
        else:
            padding = (kernel[0] // 2, kernel[1] // 2)
            conv = nn.Conv2d(inputs, outputs, kernel, stride[1:], padding, bias=False)
            norm = nn.BatchNorm2d(outputs, eps=1e-3)
        super().__init__(conv, norm, nn.ReLU())


class _Maker:
    """Convolutions and pools of one preset, by their published widths."""

    def __init__(self, preset: Preset) -> None:
        self.dims, self.alpha = preset.dims, preset.alpha

    def width(self, published: int) -> int:
        return max(4, round(self.alpha * published / 4) * 4)

    def one(self, inputs: int, outputs: int) -> Conv:
        return Conv(self.dims, inputs, self.width(outputs), (1, 1))

    def square(self, inputs: int, outputs: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> Conv:
        return Conv(self.dims, self.width(inputs), self.width(outputs), (kernel, kernel), 3, stride)

    def pair(self, inputs: int, middle: int, outputs: int, kernel: int) -> tuple[Conv, Conv]:
        a, b, c = self.width(inputs), self.width(middle), self.width(outputs)
        return Conv(self.dims, a, b, (1, kernel)), Conv(self.dims, b, c, (kernel, 1), 3)

    def max_pool(self, stride: tuple[int, int, int]) -> nn.Module:
        return nn.MaxPool3d(3, stride, 1) if self.dims == 3 else nn.MaxPool2d(3, stride[1:], 1)

    def mean_pool(self) -> nn.Module:
        kind = nn.AvgPool3d if self.dims == 3 else nn.AvgPool2d
        pool: nn.Module = kind(3, 1, 1, count_include_pad=False)
        return pool


class Branches(nn.Module):
    """Parallel branches, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Residual(nn.Module):
    """x + scale * (branches, brought back to the width of x by a 1 x 1 convolution); ReLU except for the last."""

    def __init__(
        self, dims: int, branches: Branches, joined: int, width: int, scale: float, *, relu: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        self.branches, self.scale, self.relu = branches, scale, relu
        self.back = nn.Conv3d(joined, width, 1) if dims == 3 else nn.Conv2d(joined, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * self.back(self.branches(x))
        return torch.relu(y) if self.relu else y


class Attention(nn.Module):
    """Where fine bright detail lies: a gate 0..1 for each cell of a map of stride 8 (in the frame)."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.find = Conv(3, 1, DETAIL, (3, 3), 3, (1, 2, 2))
        self.keep = nn.MaxPool3d((frames, 4, 4))
        self.gate = nn.Conv3d(DETAIL + width, 1, 1)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        frames = x[:, 0]  # the channel of frames as channels of a stack of images: the local mean is in the frame
        detail = torch.relu(frames - avg_pool2d(frames, 7, 1, 3, count_include_pad=False))[:, None]
        found = self.keep(self.find(detail))
        mask: Tensor = torch.sigmoid(self.gate(torch.cat([found, last], dim=1)))
        return mask


class InceptionResNet(nn.Module):
    """The network; `forward` gives (logits (N, K), features (N, C, d, h, w))."""

    def __init__(self, preset: Preset, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        m = _Maker(preset)
        first, second, third = preset.stem
        self.stem = nn.Sequential(
            Conv(preset.dims, channels, m.width(32), (3, 3), 3, first),
            m.square(32, 32), m.square(32, 64), m.max_pool(second),
            m.one(m.width(64), 80), m.square(80, 192), m.max_pool(third),
        )  # fmt: skip
        self.early = (0, 2, 5)
        """Layers of the stem whose maps go to the gate."""
        self.gate_channels = sum(m.width(published) for published in (32, 64, 192))
        layers: list[nn.Module] = [_mixed_5b(m)]
        width = sum(map(m.width, (96, 64, 96, 64)))
        layers += [_block_35(m, width) for _ in range(preset.blocks[0])]
        layers.append(_mixed_6a(m, width, preset.reduce))
        width += 2 * m.width(384)
        layers += [_block_17(m, width) for _ in range(preset.blocks[1])]
        layers.append(_mixed_7a(m, width, preset.reduce))
        width += sum(map(m.width, (384, 288, 320)))
        layers += [_block_8(m, width, last=i + 1 == preset.blocks[2]) for i in range(preset.blocks[2])]
        layers.append(m.one(width, 1536))
        self.body = nn.Sequential(*layers)
        last = m.width(1536)
        frames = first[0] * second[0] * third[0]
        self.attention = Attention(last, frames) if preset.attention else None
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early: list[Tensor] = []
        y = x
        for index, layer in enumerate(self.stem):
            y = layer(y)
            if index in self.early:
                early.append(y)
        y = self.body(y)
        if self.attention is not None:
            y = y * self.attention(x, y)
        pooled = y.mean(dim=tuple(range(2, y.ndim)))
        return self.head(pooled), torch.cat([*(_like(e, y) for e in early), y], dim=1)

    def full_head(self) -> tuple[Tensor, Tensor]:
        """Weights (K, C) and bias (K,) over all channels of `features`: zero for the gate's."""
        return pad(self.head.weight.detach(), [self.gate_channels, 0]), self.head.bias.detach()

    def deploy(self) -> InceptionResNet:
        """A copy for inference; gives the same outputs."""
        return copy.deepcopy(self).eval()


def _like(early: Tensor, last: Tensor) -> Tensor:
    """Averaged to the grid of `last`, with a kernel that is fixed in the graph."""
    kernel = [a // b for a, b in zip(early.shape[2:], last.shape[2:], strict=True)]
    return avg_pool3d(early, kernel) if early.ndim == 5 else avg_pool2d(early, kernel)


def _mixed_5b(m: _Maker) -> Branches:
    inputs = m.width(192)
    return Branches(
        m.one(inputs, 96),
        nn.Sequential(m.one(inputs, 48), m.square(48, 64, 5)),
        nn.Sequential(m.one(inputs, 64), m.square(64, 96), m.square(96, 96)),
        nn.Sequential(m.mean_pool(), m.one(inputs, 64)),
    )


def _block_35(m: _Maker, width: int) -> Residual:
    branches = Branches(
        m.one(width, 32),
        nn.Sequential(m.one(width, 32), m.square(32, 32)),
        nn.Sequential(m.one(width, 32), m.square(32, 48), m.square(48, 64)),
    )
    return Residual(m.dims, branches, 2 * m.width(32) + m.width(64), width, 0.17)


def _mixed_6a(m: _Maker, width: int, reduce: int) -> Branches:
    stride = (1, reduce, reduce)
    wide = Conv(m.dims, width, m.width(384), (3, 3), 3, stride)
    deep = nn.Sequential(m.one(width, 256), m.square(256, 256), m.square(256, 384, 3, stride))
    return Branches(wide, deep, m.max_pool(stride))


def _block_17(m: _Maker, width: int) -> Residual:
    branches = Branches(m.one(width, 192), nn.Sequential(m.one(width, 128), *m.pair(128, 160, 192, 7)))
    return Residual(m.dims, branches, 2 * m.width(192), width, 0.10)


def _mixed_7a(m: _Maker, width: int, reduce: int) -> Branches:
    stride = (1, reduce, reduce)
    return Branches(
        nn.Sequential(m.one(width, 256), m.square(256, 384, 3, stride)),
        nn.Sequential(m.one(width, 256), m.square(256, 288, 3, stride)),
        nn.Sequential(m.one(width, 256), m.square(256, 288), m.square(288, 320, 3, stride)),
        m.max_pool(stride),
    )


def _block_8(m: _Maker, width: int, *, last: bool) -> Residual:
    branches = Branches(m.one(width, 192), nn.Sequential(m.one(width, 192), *m.pair(192, 224, 256, 3)))
    return Residual(m.dims, branches, m.width(192) + m.width(256), width, 1.0 if last else 0.20, relu=not last)


def build(preset: str = "demo", channels: int = 1, classes: int = 2) -> InceptionResNet:
    """The network of a preset."""
    return InceptionResNet(PRESETS[preset], channels, classes)

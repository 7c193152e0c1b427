"""One encoder for every phase, self-attention over the phases, a classifier; its activation map in the graph. torch.

The encoder sees a phase and the outline of the tumour (two channels); its weights are the same for all phases. Its last
map, averaged over the tumour, is the phase's token: what stands beside the tumour counts as far as a cell sees.
`build("paper")` is a 3D ConvNeXt V2 (Woo et al. 2023), which fully convolutional masked pre-training was designed with;
`build("demo")` plain conv-BN blocks, which learn from few cases on a processor. `engines.training.pretrain` takes both.

Train form: (logits, features) and, in evaluation, the map over all phases. Deployed: logits, features, cam (a map per
phase), attention (the share of attention each phase receives); the same function with BatchNorm and residuals inside
the kernels, and with the five volumes pooled once, before the region is repeated for every phase. The head is not
linear, so its gradient differs from case to case. It is written out below by the chain rule, in plain arithmetic:
exporters refuse autograd, a traced gradient would fix the batch, and TensorRT refuses a fused layer normalisation.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d, gelu, linear

PHASES = 4
EPS = 1e-5


class Preset(NamedTuple):
    """Width and depth of each stage; in-plane mean pooling in the graph; kind of block."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    pool: int
    convnext: bool
    heads: int = 4


PRESETS = {
    "paper": Preset((40, 80, 160, 320), (2, 2, 6, 2), 1, True),
    "demo": Preset((12, 16, 24), (0, 0, 1), 2, False),
    "nano": Preset((8, 12, 16), (0, 0, 0), 4, False, 2),
}


# --- encoders --------------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """ReLU(BN(3x3x3)), with a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm3d(outputs)
        self.residual = inputs == outputs and stride == (1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return torch.relu(y + x if self.residual else y)

    def fused(self) -> nn.Sequential:
        """The deploy form: BatchNorm and the residual are linear, so one kernel and one bias hold them; in double
        precision until then."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        if mean is None or variance is None:
            raise ValueError("BatchNorm without running statistics cannot be folded")
        scale = self.bn.weight.double() / torch.sqrt(variance.double() + self.bn.eps)
        kernel = self.conv.weight.double() * scale[:, None, None, None, None]
        if self.residual:
            index = torch.arange(len(kernel))
            kernel[index, index, 1, 1, 1] += 1
        outputs, inputs = kernel.shape[:2]
        conv = nn.Conv3d(inputs, outputs, 3, self.conv.stride, 1)  # type: ignore[arg-type]
        conv.weight.data = kernel.float().detach()
        conv.bias.data = (self.bn.bias.double() - mean.double() * scale).float().detach()  # type: ignore[union-attr]
        return nn.Sequential(conv, nn.ReLU())


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a volume, in plain arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + EPS)
        return scaled * self.weight[:, None, None, None] + self.bias[:, None, None, None]


class ConvNextBlock(nn.Module):
    """ConvNeXt V2: depthwise convolution, normalisation, widen by 4, GELU, global response normalisation, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(width, width, (3, 7, 7), padding=(1, 3, 3), groups=width)
        self.norm = ChannelNorm(width)
        self.widen, self.narrow = nn.Conv3d(width, 4 * width, 1), nn.Conv3d(4 * width, width, 1)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(4 * width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = gelu(self.widen(self.norm(self.depthwise(x))))
        response = torch.sqrt((y * y).sum(dim=(2, 3, 4), keepdim=True) + EPS)
        share = response / (response.mean(dim=1, keepdim=True) + EPS)
        y = y + self.gamma[:, None, None, None] * (y * share) + self.beta[:, None, None, None]
        return x + self.narrow(y)


class Encoder(nn.Module):
    """(n, 2, 16, 64, 64) to (n, C, d, h, w); `forward_all` also gives the map of the first stage.

    With `visible` (n, 1, d, h, w) of the last grid the masked voxels are zero before and after every stage, so nothing
    of them leaks through a convolution: the dense form of the sparse encoder of masked pre-training.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.pool = preset.pool
        stages: list[nn.Module] = []
        inputs = 2
        for index, (width, depth) in enumerate(zip(preset.widths, preset.depths, strict=True)):
            stages.append(_stage(index, inputs, width, depth, preset.convnext))
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.channels, self.early_channels = inputs, preset.widths[0]

    def forward_all(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.pool > 1:
            x = avg_pool3d(x, (1, self.pool, self.pool))
        x = _hidden(x, visible)
        first = x
        for index, stage in enumerate(self.stages):
            x = _hidden(stage(x), visible)
            if index == 0:
                first = x
        return x, first

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.forward_all(x, visible)[0]


def _hidden(x: Tensor, visible: Tensor | None) -> Tensor:
    if visible is None:
        return x
    factors = [a // b for a, b in zip(x.shape[2:], visible.shape[2:], strict=True)]
    for axis, factor in enumerate(factors, start=2):
        visible = visible.repeat_interleave(factor, dim=axis)
    return x * visible


def _stage(index: int, inputs: int, width: int, depth: int, convnext: bool) -> nn.Module:
    """Down to (8, 16, 16) first, then to (4, 16, 16) without losing more in-plane; ConvNeXt: one more halving each."""
    if convnext:
        stride = ((2, 2, 2), (1, 2, 2), (2, 1, 1), (1, 2, 2))[index]
        down: list[nn.Module] = [nn.Conv3d(inputs, width, stride, stride), ChannelNorm(width)]
        if index:
            down.reverse()
            down[0] = ChannelNorm(inputs)
        return nn.Sequential(*down, *(ConvNextBlock(width) for _ in range(depth)))
    stride = ((2, 2, 2), (1, 1, 1), (2, 1, 1))[index]
    return nn.Sequential(ConvBlock(inputs, width, stride), *(ConvBlock(width, width) for _ in range(depth)))


# --- head ------------------------------------------------------------------------------------------------------------


class _Normed(NamedTuple):
    value: Tensor
    spread: Tensor


def _normed(x: Tensor) -> _Normed:
    centred = x - x.mean(dim=-1, keepdim=True)
    spread = torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + EPS)
    return _Normed(centred / spread, spread)


def _normed_back(gradient: Tensor, n: _Normed) -> Tensor:
    """Gradient through `_normed`."""
    along = (gradient * n.value).mean(dim=-1, keepdim=True)
    return (gradient - gradient.mean(dim=-1, keepdim=True) - n.value * along) / n.spread


class TwoWay(nn.Linear):
    """A layer that the gradient is taken back through."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("turned", None, persistent=False)
        """Deployed: the weights transposed. OpenVINO (2026.4) packs a square constant that is multiplied both as it is
        and transposed once, and takes that for both; so each way has a constant of its own."""

    def back(self, gradient: Tensor) -> Tensor:
        """From the gradient of what comes out to that of what goes in."""
        return torch.matmul(gradient, self.weight) if self.turned is None else linear(gradient, self.turned)

    def turn(self) -> None:
        """To the deployed form."""
        self.turned = self.weight.detach().t().contiguous()


class PhaseHead(nn.Module):
    """Tokens (N, P, C) to logits: pre-norm self-attention with a residual, mean over the phases, norm, two layers."""

    def __init__(self, channels: int, heads: int, classes: int = 2, hidden: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.phase = nn.Parameter(torch.randn(PHASES, channels) * 0.02)
        self.norm_in, self.shift_in = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.query, self.key = TwoWay(channels, channels), TwoWay(channels, channels)
        self.value, self.out = TwoWay(channels, channels), TwoWay(channels, channels)
        self.norm_out, self.shift_out = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.hidden, self.last = TwoWay(channels, hidden), nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens)[0]

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (N, K), attention (N, P), d(logit 1 - logit 0)/d tokens (N, P, C))."""
        first = _normed(tokens + self.phase)
        y = first.value * self.norm_in + self.shift_in
        q, k, v = (self._split(layer(y)) for layer in (self.query, self.key, self.value))
        scale = q.shape[-1] ** -0.5
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        shares = torch.softmax(scores, dim=-1)
        mixed = tokens + self.out(self._join(torch.matmul(shares, v)))
        second = _normed(mixed.mean(dim=1))
        z = second.value * self.norm_out + self.shift_out
        before = self.hidden(z)
        logits = self.last(torch.relu(before))

        # The same way back, by the chain rule.
        towards = (self.last.weight[1] - self.last.weight[0]) * (before > 0).to(before.dtype)
        d_mean = _normed_back(self.hidden.back(towards) * self.norm_out, second)
        d_mixed = (d_mean / PHASES)[:, None, :] + torch.zeros_like(tokens)
        d_heads = self._split(self.out.back(d_mixed))
        d_v = torch.matmul(shares.transpose(-1, -2), d_heads)
        d_shares = torch.matmul(d_heads, v.transpose(-1, -2))
        d_scores = shares * (d_shares - (d_shares * shares).sum(dim=-1, keepdim=True)) * scale
        d_q, d_k = torch.matmul(d_scores, k), torch.matmul(d_scores.transpose(-1, -2), q)
        d_y = sum(layer.back(self._join(d)) for d, layer in ((d_q, self.query), (d_k, self.key), (d_v, self.value)))
        gradient = d_mixed + _normed_back(d_y * self.norm_in, first)
        return logits, shares.mean(dim=(1, 2)), gradient

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, PHASES, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, PHASES, self.heads * x.shape[-1])


class PhaseNet(nn.Module):
    """The network. `features` (N, P * (E + C), d, h, w): for each phase the map of the first stage, averaged to the
    last grid, and the last map; the first is for the out-of-distribution gate only."""

    def __init__(self, preset: Preset, classes: int = 2) -> None:
        super().__init__()
        self.encoder = Encoder(preset)
        self.head = PhaseHead(self.encoder.channels, preset.heads, classes)
        self.per_phase = False
        """Deployed: a map per phase, and the attention."""
        self.pool = 1
        """Deployed: the encoder's mean pooling, done here."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.pool > 1:  # in two dimensions, which runtimes do without changing the layout
            pooled = avg_pool2d(x.flatten(1, 2), self.pool)
            x = pooled.reshape(-1, *x.shape[1:3], *pooled.shape[2:])
        phases, region = x[:, :PHASES], x[:, PHASES:]
        pairs = torch.stack([phases, region.expand_as(phases)], dim=2).flatten(0, 1)
        last, first = self.encoder.forward_all(pairs)
        grid = last.shape[2:]
        first = avg_pool3d(first, [a // b for a, b in zip(first.shape[2:], grid, strict=True)])
        maps = last.reshape(-1, PHASES, *last.shape[1:])
        features = torch.cat([first.reshape(-1, PHASES, *first.shape[1:]), maps], dim=2).flatten(1, 2)
        share = avg_pool3d(region, [a // b for a, b in zip(region.shape[2:], grid, strict=True)])[:, None]
        share = share / share.sum(dim=(3, 4, 5), keepdim=True).clamp_min(EPS)
        tokens = (maps * share).sum(dim=(3, 4, 5))
        if self.training:
            return self.head(tokens), features
        logits, attention, gradient = self.head.run(tokens)
        cam = (maps * gradient[..., None, None, None]).sum(dim=2) * share[:, :, 0]
        return (logits, features, cam, attention) if self.per_phase else (logits, features, cam.sum(dim=1))

    def deploy(self) -> PhaseNet:
        """A re-parameterised copy for inference; gives the same outputs to rounding."""
        copied = copy.deepcopy(self).eval()
        copied.per_phase = True
        encoder = copied.encoder
        copied.pool, encoder.pool = encoder.pool, 1
        encoder.stages = nn.ModuleList(
            nn.Sequential(*(b.fused() if isinstance(b, ConvBlock) else b for b in stage.children()))
            for stage in encoder.stages
        )
        for layer in copied.head.modules():
            if isinstance(layer, TwoWay):
                layer.turn()
        return copied


def build(preset: str = "demo", classes: int = 2) -> PhaseNet:
    """The train form of a preset."""
    return PhaseNet(PRESETS[preset], classes)

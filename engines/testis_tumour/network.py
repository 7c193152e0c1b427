"""Two graphs of the task: x2 super-resolution of the picture, and the linear score on the selected signature. torch.

`SuperResolution` is a plain stack of 3x3 convolutions with a pixel shuffle at its end, added to the input (the deployed
form of ECBSR, Zhang et al., ACM MM 2021; EDSR, Lim et al., CVPRW 2017, without its residual blocks). `paper` has 75 k
parameters. `Radiomics` takes every feature of `engine.FEATURES`, picks the columns of the signature, brings them to a
common scale and weighs them; so the graph itself says what the signature is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle


class Preset(NamedTuple):
    """Channels, and 3x3 convolutions between the first and the last."""

    width: int
    depth: int


PRESETS = {"paper": Preset(32, 9), "demo": Preset(20, 5), "nano": Preset(12, 3)}


class SuperResolution(nn.Module):
    """(N, 1, H, W) grey 0..1 to (N, 1, 2H, 2W); starts as the repeated input."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, preset.width, 3, padding=1), nn.ReLU()]
        for _ in range(preset.depth - 1):
            layers += [nn.Conv2d(preset.width, preset.width, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.tail = nn.Conv2d(preset.width, 4, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        # The anchor of ECBSR: the input in each of the four places, so that the network learns the difference.
        return pixel_shuffle(self.tail(self.body(x)) + x.repeat(1, 4, 1, 1), 2)


class Term(NamedTuple):
    """One column of the signature: beta * (t(value) - centre) / scale."""

    column: int
    log: bool
    centre: float
    scale: float
    beta: float


class Radiomics(nn.Module):
    """(N, F) features to logits (N, 2) and the standardised signature (N, S, 1, 1)."""

    columns: Tensor
    log: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, terms: Sequence[Term], intercept: float) -> None:
        super().__init__()
        self.register_buffer("columns", torch.tensor([t.column for t in terms], dtype=torch.int64))
        self.register_buffer("log", torch.tensor([float(t.log) for t in terms]))
        self.register_buffer("centre", torch.tensor([t.centre for t in terms], dtype=torch.float32))
        self.register_buffer("scale", torch.tensor([t.scale for t in terms], dtype=torch.float32))
        self.head = nn.Linear(len(terms), 2)
        beta = torch.tensor([t.beta for t in terms], dtype=torch.float32)
        # Half of the log-odds each way: the margin is the log-odds, and neither class is the reference.
        self.head.weight.data = torch.stack([-beta / 2, beta / 2])
        self.head.bias.data = torch.tensor([-intercept / 2, intercept / 2], dtype=torch.float32)

    def signature(self, x: Tensor) -> Tensor:
        """(N, S): picked, logarithm where the term says so, centred and scaled."""
        picked = torch.index_select(x, 1, self.columns)
        logged = torch.log(torch.clamp(picked, min=LOG_FLOOR))
        return ((picked + self.log * (logged - picked)) - self.centre) / self.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.signature(x)
        return self.head(z), z[:, :, None, None]


LOG_FLOOR = 1e-6
"""Below it a logarithm is taken of this."""


def build(preset: str = "demo") -> SuperResolution:
    """The super-resolution network of a preset; the signature is no network to train."""
    return SuperResolution(PRESETS[preset])

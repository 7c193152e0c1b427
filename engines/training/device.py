"""What torch reaches on a device, beside what the device can do: for `scripts/verify-gpu`. Prints JSON, keeps nothing.

For the largest network of each task: torch eager, torch.compile and CUDA graphs at fp32 and fp16, one case and the best
batch, with the floating-point operations and the bytes of memory a second against ceilings measured here and now (a
large matrix product, a large copy). Inputs lie on the device already: this is the network alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engines.training import deploy
from engines.training.eager import FOREIGN, VARIANTS, How, prepared

ROUNDS = 5
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NO_GAIN = 1.03
"""A larger batch that gives less than this more is not worth its wait."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One network, one way to run it."""

    task: str
    preset: str
    model: str
    variant: str
    precision: str
    reason: str = ""
    """Why there are no figures."""
    batch: int = 1
    milliseconds: float = 0.0
    """Of a pass: median of the rounds' medians."""
    per_second: float = 0.0
    flops: float = 0.0
    """A second, achieved."""
    bytes: float = 0.0
    """A second: what the operators of the network as written read and write."""
    of_flops: float = 0.0
    """Of the ceiling at this precision."""
    of_bytes: float = 0.0
    against_eager: float = 0.0
    """Eager's time at the same precision and batch over this one's, median of paired rounds."""


def examine(tasks: Sequence[str], presets: Sequence[str], device: str, seconds: float) -> dict[str, Any]:
    """Ceilings and rows. TF32 is off: its ten bits of mantissa would pass for single precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limits = ceilings(device, seconds)
    ways = variants_of(device)
    rows = [row for preset in presets for task in tasks for row in network(task, preset, device, seconds, limits, ways)]
    return {"device": about(device), "ceilings": limits, "rows": [asdict(row) for row in rows]}


def about(device: str) -> dict[str, Any]:
    """The device and its libraries."""
    said: dict[str, Any] = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        found = torch.cuda.get_device_properties(device)
        said |= {
            "name": found.name, "sm": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
            "memory_gb": round(found.total_memory / 1e9, 1), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return said


# -- ceilings


def ceilings(device: str, seconds: float) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product at each precision, bytes a second of a copy."""
    large = device.startswith("cuda")
    side, copied = (8192, 1 << 30) if large else (1024, 1 << 26)
    found = {}
    for precision, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.matmul(a, b, out=out)

        found[precision] = 2 * side**3 / fastest(multiply, device, seconds)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * copied / fastest(lambda: target.copy_(source), device, seconds)
    return found


def fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest call: a ceiling is what can be reached."""
    return min(passes(call, device, seconds))


def passes(call: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Seconds of each call, waited for; some that are not counted come first."""
    for _ in range(3):
        call()
    _wait(device)
    spent: list[float] = []
    begun = time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        call()
        _wait(device)
        spent.append(time.perf_counter() - started)
    return spent


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -- work of a network


class _Traffic(TorchDispatchMode):
    """Bytes of every tensor that an operator reads or writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@dataclass(frozen=True)
class Work:
    """Of one pass of a network as written, at single precision."""

    flops: int
    """Of a case."""
    weights: int
    """Bytes that every pass moves, whatever its batch."""
    case: int
    """Bytes of a case."""

    def bytes(self, batch: int) -> int:
        return self.weights + batch * self.case


def work(model: nn.Module, x: Tensor) -> Work:
    """`x`: one case."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        deploy.answers(model, x)
    moved = []
    for batch in (1, 2):
        given = torch.cat([x] * batch)
        with torch.no_grad(), _Traffic() as traffic:
            deploy.answers(model, given)
        moved.append(traffic.bytes)
    return Work(int(counted.get_total_flops()), 2 * moved[0] - moved[1], moved[1] - moved[0])


# -- one network


def variants_of(device: str) -> tuple[str, ...]:
    """The ways in which torch can run a network there."""
    return VARIANTS if device.startswith("cuda") else tuple(v for v in VARIANTS if v != "graph")


def network(
    task: str, preset: str, device: str, seconds: float, limits: dict[str, float], variants: Sequence[str]
) -> list[Row]:
    """The largest network of a task, in every way that this device can run it."""
    made = deploy.build(task, preset)
    costs = {name: work(net, torch.from_numpy(made.inputs[name][:1])) for name, net in made.networks.items()}
    name = max(costs, key=lambda n: costs[n].flops)
    x = torch.from_numpy(made.inputs[name][:1]).to(device)
    rows: list[Row] = []
    for precision in DTYPES:
        calls: dict[str, Any] = {}
        for variant in variants:
            how = How(device, variant, precision, torch.get_num_threads())
            empty = Row(task, preset, name, variant, precision)
            try:
                calls[variant] = prepared(deploy.build(task, preset).networks[name], how)
                _pass(calls[variant], x)()
            except FOREIGN as e:
                calls.pop(variant, None)
                rows.append(Row(**asdict(empty) | {"reason": f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"}))
        rows += _timed(Row(task, preset, name, "", precision), calls, x, device, seconds, costs[name], limits)
    return rows


def _timed(
    about_it: Row, calls: dict[str, Any], x: Tensor, device: str, seconds: float, cost: Work,
    limits: dict[str, float],
) -> list[Row]:  # fmt: skip
    """Rows at batch 1 and at the best batch of each variant."""
    alone = _rounds(calls, x, 1, device, seconds)
    rows = [_row(about_it, variant, 1, alone, cost, limits) for variant in calls]
    for variant in calls:
        batch = _best(calls[variant], x, device, seconds)
        if batch > 1:
            pair = {name: calls[name] for name in dict.fromkeys(("eager", variant)) if name in calls}
            rows.append(_row(about_it, variant, batch, _rounds(pair, x, batch, device, seconds), cost, limits))
    return rows


def _rounds(calls: dict[str, Any], x: Tensor, batch: int, device: str, seconds: float) -> dict[str, list[float]]:
    """Median seconds of each variant in each round, interleaved."""
    given = x.expand(batch, *x.shape[1:]).contiguous()
    found: dict[str, list[float]] = {variant: [] for variant in calls}
    for _ in range(ROUNDS):
        for variant, call in calls.items():
            found[variant].append(statistics.median(passes(_pass(call, given), device, seconds / ROUNDS)))
    return found


def _best(call: Any, x: Tensor, device: str, seconds: float) -> int:
    """The batch that gives the most cases a second; the device's memory, or no gain, ends the search."""
    best, most = 1, 0.0
    for batch in BATCHES:
        given = x.expand(batch, *x.shape[1:]).contiguous()
        try:
            rate = batch / statistics.median(passes(_pass(call, given), device, seconds / ROUNDS))
        except FOREIGN:
            break
        if rate < most * NO_GAIN:
            break
        best, most = batch, rate
    return best


def _pass(call: Any, x: Tensor) -> Callable[[], object]:
    def once() -> object:
        with torch.inference_mode():
            return call(x)

    return once


def _row(
    about_it: Row, variant: str, batch: int, rounds: dict[str, list[float]], cost: Work,
    limits: dict[str, float],
) -> Row:  # fmt: skip
    mine = statistics.median(rounds[variant])
    eager = [a / b for a, b in zip(rounds.get("eager", []), rounds[variant], strict=False)]
    size = DTYPES[about_it.precision].itemsize / DTYPES["fp32"].itemsize
    flops, moved = cost.flops * batch / mine, cost.bytes(batch) * size / mine
    return Row(
        about_it.task, about_it.preset, about_it.model, variant, about_it.precision, "", batch, 1000 * mine,
        batch / mine, flops, moved, flops / limits[about_it.precision], moved / limits["bytes"],
        statistics.median(eager) if eager else 0.0,
    )  # fmt: skip

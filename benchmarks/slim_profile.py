"""Where the time of a dense and a slim network goes, by kinds of operations, and how little it could be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_efficient.common.nests import tensors_in

COLUMNS = {
    "model": "model", "kind": "kind", "part": "share of dense time", "dense": "dense, ms", "slim": "slim, ms",
    "speed": "times faster", "macs": "MACs, dense ÷ slim", "bytes": "bytes, dense ÷ slim",
    "floor": "floors, dense ÷ slim", "reached": "slim, floor ÷ time",
}  # fmt: skip
KINDS = ("convolutions", "depthwise convolutions", "matrix products", "norms", "activations, sums, pooling", "copies")
Sums = dict[str, dict[str, float]]
_ELEMENTWISE = ("relu", "gelu", "silu", "hardtanh", "clamp", "add", "mul", "pool", "mean", "softmax", "sigmoid")


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of an operation, from its name and the shapes of its inputs."""
    if "conv" in name:
        weight = shapes[1] if len(shapes) > 1 else ()
        deep = len(weight) == 4 and weight[1] == 1 and shapes[0][1] == weight[0] > 1
        return KINDS[1] if deep else KINDS[0]
    if any(part in name for part in ("mm", "linear", "scaled_dot", "attention")):
        return KINDS[2]
    if "norm" in name:
        return KINDS[3]
    return KINDS[4] if any(part in name for part in _ELEMENTWISE) else KINDS[5]


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Processor time, multiply-accumulates and bytes of every operation that computes something, summed by kind."""

    def __init__(self, speeds: dict[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.speeds = speeds
        self.sums: dict[str, dict[str, float]] = {
            kind: dict.fromkeys(("ms", "macs", "bytes", "floor"), 0.0) for kind in KINDS
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        spent = time.process_time() - start
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(out))
        if func.is_view or not given:
            return out
        count = flop_registry.get(func.overloadpacket)
        macs = count(*args, **(kwargs or {}), out_val=out) / 2 if count else 0.0
        moved = float(sum(t.numel() * t.element_size() for t in given + made))
        floor = max(macs / self.speeds["macs"], moved / self.speeds["bytes"])
        mine = self.sums[kind_of(func.overloadpacket.__name__, [t.shape for t in given])]
        for key, value in (("ms", 1e3 * spent), ("macs", macs), ("bytes", moved), ("floor", 1e3 * floor)):
            mine[key] += value
        return out


def rates() -> dict[str, float]:
    """What this machine does in a second now: multiply-accumulates of a product, bytes read and written by a copy."""
    one, two = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.randn(1 << 20)
    target = torch.empty_like(source)
    return {
        "macs": 1024**3 / _least(lambda: torch.mm(one, two)),
        "bytes": 2 * source.numel() * source.element_size() / _least(lambda: target.copy_(source)),
    }


@torch.inference_mode()
def by_width() -> list[dict[str, float]]:
    """Rates of convolutions of 3 × 3 between as many channels, channels-last, at 16 × 16 pixels and batch 16."""
    rows = []
    for width in (24, 32, 40, 48, 56, 64, 80, 96, 112, 128):
        layer = nn.Conv2d(width, width, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(16, width, 16, 16).contiguous(memory_format=torch.channels_last)
        rows.append({"channels": width, "rate": 16**3 * width**2 * 9 / _least(lambda layer=layer, x=x: layer(x)) / 1e9})
    return rows


def _least(work: Any) -> float:
    times = []
    for _ in range(30):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@torch.no_grad()
def _watched(
    models: Sequence[nn.Module], x: Tensor, speeds: dict[str, float], rounds: int
) -> list[dict[str, dict[str, float]]]:
    """What each model does by kind, in turns; times are medians of the rounds."""
    every: list[list[Sums]] = [[] for _ in models]
    for _ in range(rounds + 2):  # the first ones warm up
        for model, found in zip(models, every, strict=True):
            with _Watched(speeds) as watched:
                model(x)
            found.append(watched.sums)
    result = []
    for found in every:
        times = {kind: sorted(one[kind]["ms"] for one in found[2:])[rounds // 2] for kind in KINDS}
        result.append({kind: found[0][kind] | {"ms": times[kind]} for kind in KINDS})
    return result


def explained(
    row: dict[str, Any],
    dense: nn.Module,
    slim: nn.Module,
    macs: float,
    x: Tensor,
    speeds: dict[str, float],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for every kind of operation that takes a hundredth of the time, and one for all.

    Args:
        row: What all rows begin with.
        dense: The network as it was.
        slim: The same, cut.
        macs: By how much fewer multiply-accumulates it has.
        x: Input of both.
        speeds: From :func:`rates`.
        rounds: To measure.
    """
    one, two = _watched((dense, slim), x, speeds, rounds)
    for sums in (one, two):
        sums["all"] = {key: sum(sums[kind][key] for kind in KINDS) for key in ("ms", "macs", "bytes", "floor")}
    rows = []
    for kind in (*KINDS, "all"):
        before, after = one[kind], two[kind]
        if max(before["ms"] / one["all"]["ms"], after["ms"] / two["all"]["ms"]) < 0.01:
            continue
        ratios = {key: before[key] / after[key] if after[key] else "" for key in ("macs", "bytes", "floor")}
        times = {"dense": before["ms"], "slim": after["ms"], "speed": before["ms"] / after["ms"]}
        shares = {"part": before["ms"] / one["all"]["ms"], "reached": after["floor"] / after["ms"]}
        rows.append({**row, "kind": kind, **times, **ratios, **shares})
    rows[-1]["macs"] = macs
    return rows

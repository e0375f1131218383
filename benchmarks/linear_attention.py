"""Simplified linear attention against fused softmax attention over the number of tokens: where is the crossover?

One whole attention layer, projections included, before and after the swap: timm's ``Attention``, which calls
``F.scaled_dot_product_attention``, and the ``LinearAttention`` that takes its place. Both run in every round, in
alternating order; the ratio is the median of the ratios within the rounds. CPU time on a CPU, wall time on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/linear_attention.py
    python benchmarks/linear_attention.py --device cuda --batch 64 --dtype float16
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import arguments, cpu_name, markdown, save
from timm.layers import Attention
from torch import Tensor, nn

from lightning_efficient.attention.linear import apply_linear_attention

WIDTHS = ((192, 3), (384, 6))
TOKENS = (196, 400, 784, 1024, 1600, 2304, 3136, 4096)
WARM_UP = 2
COLUMNS = {
    "model": "layer", "work": "work", "tokens": "tokens", "softmax_ms": "softmax, ms", "linear_ms": "linear, ms",
    "ratio": "linear ÷ softmax", "spread": "quartiles",
}  # fmt: skip


def layers(dim: int, heads: int, grid: int) -> tuple[nn.Module, nn.Module]:
    """The same weights behind softmax and behind linear attention."""
    torch.manual_seed(0)
    softmax = nn.Sequential(nn.Identity(), Attention(dim, heads, qkv_bias=True))
    linear = copy.deepcopy(softmax)
    apply_linear_attention(linear, {"grid": grid})
    return softmax[1], linear[1]


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def work() -> None:
        with torch.no_grad():
            layer(x)

    return work


def forward_backward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    gradient = torch.ones_like(x)

    def work() -> None:
        # No gradients kept from one round to the next: adding to them would cost as well.
        inputs = [x, *layer.parameters()]
        torch.autograd.grad(layer(x), inputs, gradient)

    return work


WORK = {"forward": forward, "forward + backward": forward_backward}


def seconds(work: Callable[[], Any], device: str) -> float:
    """CPU time of the process, so that other load does not count; wall time on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(dim: int, heads: int, tokens: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    pair = layers(dim, heads, math.isqrt(tokens))
    dtype = getattr(torch, options.dtype)
    x = torch.randn(options.batch, tokens, dim, device=options.device, dtype=dtype, requires_grad=True)
    works = [WORK[kind](layer.to(options.device, dtype), x) for layer in pair]
    times: list[list[float]] = [[], []]
    for step in range(-WARM_UP, options.rounds):
        for which in (0, 1) if step % 2 else (1, 0):
            elapsed = 1e3 * seconds(works[which], options.device)
            if step >= 0:
                times[which].append(elapsed)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "model": f"{dim} channels, {heads} heads",
        "work": kind,
        "tokens": tokens,
        "softmax_ms": statistics.median(times[0]),
        "linear_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "spread": f"{low:.3f} to {high:.3f}",
        "ratios": ratios,
    }


def crossover(rows: Sequence[dict[str, Any]]) -> float | None:
    """Tokens from which on linear attention stays faster, between measured counts on a logarithmic scale.

    Args:
        rows: One layer and kind of work, by rising number of tokens.

    Returns:
        The lowest measured count if it is faster there already; None if it is not faster at the highest.
    """
    if rows[-1]["ratio"] >= 1:
        return None
    slower = [i for i, row in enumerate(rows) if row["ratio"] >= 1]
    if not slower:
        return float(rows[0]["tokens"])
    (n, a), (m, b) = ((rows[i]["tokens"], math.log(rows[i]["ratio"])) for i in (slower[-1], slower[-1] + 1))
    return float(n * (m / n) ** (a / (a - b)))


def findings(rows: list[dict[str, Any]], tokens: Sequence[int]) -> list[str]:
    lines = []
    for name, work in dict.fromkeys((row["model"], row["work"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["work"]) == (name, work)]
        found = crossover(chosen)
        if found is None:
            where = f"not faster up to {tokens[-1]} tokens"
        elif found == tokens[0]:
            where = f"faster at every count measured, from {tokens[0]} tokens"
        else:
            where = f"faster from about {found:.0f} tokens"
        ends = f"{1 / chosen[0]['ratio']:.2f}× at {tokens[0]}, {1 / chosen[-1]['ratio']:.2f}× at {tokens[-1]}"
        lines.append(f"- {name}, {work}: {where} (speed-up {ends}).")
    return lines


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} thread"
    clock = "wall time" if cuda else "CPU time"
    head = f"{device}; {options.dtype}, batch {options.batch}; {clock}, medians of {options.rounds} interleaved rounds."
    unmeasured = [] if cuda else ["", "Not run on a GPU yet (`--device cuda`)."]
    counts = sorted({row["tokens"] for row in rows})
    return "\n".join([head, "", markdown(rows, COLUMNS), "", *findings(rows, counts), *unmeasured])


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="square numbers, rising")
    options = parser.parse_args(given)
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for dim, heads in WIDTHS:
        for kind in WORK:
            for tokens in options.tokens:
                rows.append(measure(dim, heads, tokens, kind, options))
    text = report(rows, options)
    print(text)
    save(f"linear_attention_{options.device}", rows).with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()

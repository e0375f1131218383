"""Latency of exported networks whose norms are folded away, against LayerNorm and against no norms at all (the limit).

The exported network is the timm model with every norm swapped for RepBN, random running statistics, finished and
exported; the limit is the same network with ``nn.Identity`` in the place of each norm. CPU time of the process, so that
other load does not count (wall time on a GPU); every variant once a round, in shuffled order.

    OMP_NUM_THREADS=1 python benchmarks/norm_latency.py                       # eight minutes
    python benchmarks/norm_latency.py --device cuda --dtype float16 --batches 1 64
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from common import arguments, machine, markdown, save
from norm_step import timed
from torch import nn

from lightning_efficient import export
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.swap import apply_norm_swap, find_norms
from lightning_efficient.surgery.replace import replace_modules

MODELS = {
    "ViT-T": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "PVTv2-b0": "pvt_v2_b0",
    "ConvNeXt-atto": "convnext_atto",
}
VARIANTS = ("LN", "exported", "norms deleted", "RepBN, not folded")


def swapped(model: nn.Module) -> nn.Module:
    """Every norm RepBN, with running statistics and learned values as training might leave them; finished."""
    model = copy.deepcopy(model)
    apply_norm_swap(model, {"target": "repbn"})
    for norm in blend_norms(model).values():
        target = norm.target
        assert isinstance(target, RepBN)
        bn = target.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        nn.init.normal_(bn.running_mean, std=0.3)
        nn.init.uniform_(bn.running_var, 0.5, 2.0)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.2)
        nn.init.normal_(target.eta, std=0.2)
        norm.finish()
    return model.eval()


def networks(name: str, size: int = 224) -> tuple[dict[str, nn.Module], Mapping[str, int]]:
    """The four networks, and how many norms vanished in the exported one or stayed as a multiply-add."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    found = find_norms(model).matched
    bare = copy.deepcopy(model)
    replace_modules(bare, {n: nn.Identity() for n in found})
    repbn = swapped(model)
    plain = export(repbn, torch.randn(2, 3, size, size))
    modules = dict(plain.named_modules())
    left = sum(not isinstance(modules.get(n), (nn.Identity, type(None))) for n in found)
    nets = {"LN": model, "exported": plain, "norms deleted": bare, "RepBN, not folded": repbn}
    return nets, {"norms": len(found), "left": left}


def measure(
    title: str, batches: Sequence[int], rounds: int, device: str, dtype: torch.dtype, size: int = 224
) -> list[dict[str, Any]]:
    nets, counts = networks(MODELS[title], size)
    nets = {name: net.to(device, dtype) for name, net in nets.items()}
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)

        def work(net: nn.Module, x: torch.Tensor = x) -> Callable[[], None]:
            @torch.inference_mode()
            def forward() -> None:
                net(x)

            return forward

        # A single image is quick, so it can have more rounds.
        times = timed({name: work(net) for name, net in nets.items()}, rounds * (3 if batch == 1 else 1), device)
        for name in VARIANTS:
            rows.append(
                {
                    "model": f"{title}, {counts['norms']} norms, {counts['left']} left",
                    "batch": batch,
                    "network": name,
                    "ms": 1e3 * statistics.median(times[name]),
                    "limit": speed(times["norms deleted"], times[name]),
                    "against_ln": speed(times["LN"], times[name]),
                    "interval": interval(times["LN"], times[name]),
                    "limit_interval": interval(times["norms deleted"], times[name]),
                    "times": times[name],
                }
            )
    return rows


def speed(reference: Sequence[float], times: Sequence[float]) -> float:
    """How many times as fast as the reference: median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(reference, times, strict=True))


def interval(reference: Sequence[float], times: Sequence[float]) -> str:
    """95 % interval of that median: order statistics of the ratios (sign test)."""
    from scipy import stats

    ratios = sorted(a / b for a, b in zip(reference, times, strict=True))
    n = len(ratios)
    k = max(0, int(stats.binom.ppf(0.025, n, 0.5)) - 1)
    return f"{ratios[k]:.3f} to {ratios[n - 1 - k]:.3f}"


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two lines: against the limit and against LayerNorm."""
    chosen = [row for row in rows if row["network"] == "exported"]

    def low(row: Mapping[str, Any], key: str) -> float:
        return float(row[key].split()[0])

    def high(row: Mapping[str, Any], key: str) -> float:
        return float(row[key].split()[-1])

    def names(some: Sequence[Mapping[str, Any]], key: str) -> str:
        cells = [f"{r['model'].split(',')[0]} batch {r['batch']} ({r[key]:.3f})" for r in some]
        return "; ".join(cells) or "none"

    under = [r for r in chosen if r["limit"] < 0.98]
    surely = [r for r in chosen if high(r, "limit_interval") < 0.98]
    slower = [r for r in chosen if r["against_ln"] < 1]
    clearly = [r for r in chosen if high(r, "interval") < 1]
    faster = [r for r in chosen if low(r, "interval") > 1]
    return (
        f"At least 0.98 of the limit's speed in {len(chosen) - len(under)} of {len(chosen)} cells; below: "
        f"{names(under, 'limit')}, of which beyond the 95 % interval: {names(surely, 'limit')}.\n"
        f"Against LN: clearly faster in {len(faster)}, clearly slower in {len(clearly)} of {len(chosen)}; medians "
        f"below 1: {names(slower, 'against_ln')}; the median cell is "
        f"{statistics.median(r['against_ln'] for r in chosen):.3f} times as fast."
    )


COLUMNS = {
    "model": "model",
    "batch": "batch",
    "network": "network",
    "ms": "ms",
    "against_ln": "speed ÷ LN",
    "interval": "95 % interval",
    "limit": "speed ÷ norms deleted",
    "limit_interval": "95 %",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="at batches over 1; three times as many at 1")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for title in args.models:
        new = measure(title, args.batches, args.rounds, args.device, getattr(torch, args.dtype))
        rows += new
        print(markdown(new, COLUMNS), flush=True)
    clock = "Wall time" if args.device == "cuda" else "CPU time of the process"
    gpu = "" if args.device == "cuda" else (
        "\n\nNot measured: a GPU. `python benchmarks/norm_latency.py --device cuda --dtype float16 --batches 1 64` is "
        "ready to run and has not been run; its results would stand in a file of their own."
    )  # fmt: skip
    text = (
        f"# Latency without norms\n\n{reading(rows)}\n\n{clock}, {args.dtype}; medians over {args.rounds} interleaved "
        f"rounds (three times as many at batch 1), ratios within a round; above 1 is faster.{gpu}\n\n"
        f"{markdown(rows, COLUMNS)}\n\n`{machine()}`\n"
    )
    path = save(f"norm_latency_{args.device}_{args.dtype}", rows)
    path.with_suffix(".md").write_text(text)
    print(reading(rows))


if __name__ == "__main__":
    main()

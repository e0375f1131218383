"""Measured speed of slim models against the multiply-accumulates that cutting saved, dense treated the same beside it.

45 % of the units of every group stay in randomly initialised networks, to the nearest multiple that ``round_to``
allows: widths such as 29 or 115 without it. Dense and slim get the same treatment (batch norms folded into convolutions
by ``export(fuse_norms=True)``, channels-last, ``torch.compile``), so that the gain is pruning's own; ``round_to`` is of
the cut alone. All variants run in one process, in turns, single-threaded by default. Counted is the processor time of
the process, which others on the machine disturb least; a figure is the median over rounds of the ratio within each
round, with its 95 % interval (order statistics). "share" is the speed-up divided by the reduction
of multiply-accumulates: 1 means that every multiply-accumulate saved is time saved. Where the time goes is the
profiler's: products with weights (convolutions, matrix products), norms, and the rest.

``--profile`` says what is missed: processor time of each kind of operation, dense and slim, beside a floor. The floor
of an operation is the larger of its multiply-accumulates at the rate of a large matrix product and its bytes (inputs,
weights, outputs) at that of a copy of 4 MiB, both measured in the same run.

    python benchmarks/slim_latency.py
    python benchmarks/slim_latency.py --profile
    python benchmarks/slim_latency.py --compiled --rounds 16
    python benchmarks/slim_latency.py --only "resnet" --rounds 40 --threads 2
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from common import RESULTS, arguments, machine, markdown, quiet, save
from slim_profile import COLUMNS as PROFILE
from slim_profile import by_width, explained, rates
from timm.models import VisionTransformer
from torch import Tensor, nn

from lightning_efficient import export
from lightning_efficient.common.running import as_call
from lightning_efficient.deploy.measure import count_macs, slim_report
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim

COLUMNS = {
    "model": "model", "treatment": "both treated", "batch": "batch", "macs": "MACs, dense ÷ slim",
    "speed": "times faster", "interval": "95 %", "share": "share", "dense": "dense treated, times faster than plain",
    "goes": "time of slim in products, norms, rest",
}  # fmt: skip
_KINDS = {"products": ("conv", "mm", "linear", "scaled_dot"), "norms": ("batch_norm", "layer_norm")}


def _vgg() -> nn.Module:
    """A plain stack of convolutions."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def _vit() -> nn.Module:
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=6, num_classes=10)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "plain CNN": (_vgg, 32, (1, 16)),
    "ResNet-18": (_timm("resnet18"), 64, (1, 16)),
    "MobileNetV2": (_timm("mobilenetv2_100"), 64, (1, 16)),
    "ViT (FFN and heads)": (_vit, 64, (1, 16)),
}
_LAST = torch.channels_last
BEST = {"ViT (FFN and heads)": "round_to=8"}  # for the others, the last of those that are not compiled
# Treatment → round_to of the cut, and what is done to both.
TREATMENTS: dict[str, tuple[int, bool, bool, bool]] = {
    "none": (1, False, False, False),
    "round_to=8": (8, False, False, False),
    "round_to=16": (16, False, False, False),
    "fused": (1, True, False, False),
    "fused, round_to=8": (8, True, False, False),
    "fused, round_to=16": (16, True, False, False),
    "fused, channels-last, round_to=8": (8, True, True, False),
    "fused, channels-last, round_to=16": (16, True, True, False),
    "fused, compiled, round_to=8": (8, True, False, True),
}


def kept(groups: Groups) -> dict[str, range]:
    """About 45 % of every group."""
    return {
        name: range(min(max(round(0.45 * g.units / g.divisor), 1) * g.divisor, g.units))
        for name, g in groups.found.items()
    }


def variants(build: Callable[[], nn.Module], example: Tensor, compile_too: bool) -> dict[str, tuple[Any, Any, float]]:
    """Treatment → dense, slim, and their ratio of multiply-accumulates."""
    torch.manual_seed(0)
    model, call = build().eval(), as_call(example)
    slims = {}
    for round_to in {r for r, *_ in TREATMENTS.values()}:
        groups = find_groups(model, example, round_to=round_to)
        slims[round_to] = copy.deepcopy(model)
        apply_slim(slims[round_to], kept(groups), groups)
    found: dict[str, tuple[Any, Any, float]] = {}
    fused: dict[int, nn.Module] = {}
    for name, (round_to, fuse, last, compiled) in TREATMENTS.items():
        both: list[Any] = []
        for key, one in ((0, model), (round_to, slims[round_to])):
            if fuse:
                fused[key] = one = fused.get(key) or export(one, example, fuse_norms=True)
            one = copy.deepcopy(one).to(memory_format=_LAST) if last else one  # type: ignore[call-overload]
            both.append(torch.compile(one, dynamic=False) if compiled and compile_too else one)
        if not compiled or compile_too:
            found[name] = (*both, count_macs(model, call) / count_macs(slims[round_to], call))
    return found


@torch.inference_mode()
def timed(found: Mapping[str, tuple[Any, Any, float]], x: Tensor, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Treatment → dense and slim → seconds of each round."""
    inputs = {name: x.contiguous(memory_format=_LAST) if "last" in name else x for name in found}
    times: dict[str, dict[str, list[float]]] = {name: {"dense": [], "slim": []} for name in found}
    for i in range(rounds + 2):
        for name, (dense, slim, _) in found.items():
            order = (("dense", dense), ("slim", slim))
            for which, model in order if i % 2 else order[::-1]:
                start = time.process_time()
                model(inputs[name])
                if i >= 2:  # the first ones compile and warm up
                    times[name][which].append(time.process_time() - start)
    return times


def median(values: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics around it that hold it with 95 %."""
    ranked, n = sorted(values), len(values)
    reach = max(math.floor(n / 2 - 0.98 * math.sqrt(n)), 0)
    return (ranked[(n - 1) // 2] + ranked[n // 2]) / 2, ranked[reach], ranked[n - 1 - reach]


@torch.inference_mode()
def goes(model: nn.Module, x: Tensor) -> str:
    """Where the time of a forward goes."""
    model(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(10):
            model(x)
    spent = dict.fromkeys((*_KINDS, "rest"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, parts in _KINDS.items() if any(part in event.key for part in parts)), "rest")
        spent[kind] += event.self_cpu_time_total
    return ", ".join(f"{value / sum(spent.values()):.0%}" for value in spent.values())


def run(name: str, rounds: int, compile_too: bool) -> list[dict[str, Any]]:
    """Cut half of the units and measure every treatment."""
    build, size, batches = MODELS[name]
    example = torch.randn(2, 3, size, size)
    found = variants(build, example, compile_too)
    if name == "ResNet-18" and len(found) > 2:
        dense, slim, _ = found["none"]
        RESULTS.mkdir(exist_ok=True)
        slim_report(dense, slim, example, (1,), 20).draw(RESULTS / "slim_widths.png")
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, size, size)
        times = timed(found, x, rounds)
        for treatment, (_, slim, macs) in found.items():
            one = times[treatment]
            speed, low, high = median([d / s for d, s in zip(one["dense"], one["slim"], strict=True)])
            plain = median([p / d for p, d in zip(times["none"]["dense"], one["dense"], strict=True)])[0]
            rows.append(
                {
                    "model": name, "treatment": treatment, "batch": batch, "macs": macs, "speed": speed,
                    "interval": f"{low:.2f} to {high:.2f}", "share": speed / macs, "dense": plain,
                    "goes": "" if "compiled" in treatment else goes(slim, x), "raw": one,
                }
            )  # fmt: skip
    return rows


def profile(names: Sequence[str], rounds: int) -> None:
    """Where the time of each model goes under its best treatment, written as a table."""
    rows, speeds = [], rates()
    for name in names:
        build, size, batches = MODELS[name]
        example, treatment = torch.randn(2, 3, size, size), BEST.get(name, "fused, channels-last, round_to=8")
        dense, slim, macs = variants(build, example, False)[treatment]
        x = torch.randn(batches[-1], 3, size, size)
        x = x.contiguous(memory_format=_LAST) if "last" in treatment else x
        rows += explained(
            {"model": name, "treatment": treatment, "batch": batches[-1]}, dense, slim, macs, x, speeds, rounds
        )
    print(table := markdown(rows, PROFILE))
    if len(names) == len(MODELS):
        widths = by_width()
        save("slim_profile", rows, rates=speeds, widths=widths)
        measured = f"{speeds['macs'] / 1e9:.0f} GMAC/s, {speeds['bytes'] / 1e9:.0f} GB/s"
        head = f"`{machine()['command']}`, batch {rows[0]['batch']}; in the same run {measured}."
        low = markdown(widths, {"channels": "channels of a 3 × 3 convolution", "rate": "GMAC/s"})
        (RESULTS / "slim_profile.md").write_text(f"{head}\n\n{table}\n\n{low}\n")


def main() -> None:
    """Measure every model and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="torch.compile beside untreated, a table of its own")
    parser.add_argument("--treatments", nargs="*", default=[""], help="parts of names; untreated always")
    parser.add_argument("--profile", action="store_true", help="where the time goes, and its floor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    whole = args.only == args.treatments == [""]
    treatments = ["none", "compiled"] if args.compiled else ["none", *args.treatments]
    for name in [name for name in TREATMENTS if not any(part in name for part in treatments)]:
        del TREATMENTS[name]
    if args.profile:
        profile([name for name in MODELS if any(part.lower() in name.lower() for part in args.only)], args.rounds)
        return
    rows = []
    for name in MODELS:
        if any(part.lower() in name.lower() for part in args.only):
            rows += run(name, args.rounds, not args.no_compile)
            if whole:
                table = "slim_compiled" if args.compiled else "slim_latency"
                save(table, rows)
                (RESULTS / f"{table}.md").write_text(markdown(rows, COLUMNS) + "\n")
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()

"""What the norm swap costs in training: each norm by itself, and whole training steps, against LayerNorm.

CPU time, so that other load on the machine does not count. In each round every variant runs once, in shuffled order;
tables show medians, and medians of the ratios within a round. Per norm there is also a module laid out as the published
one (SLAB, ``classification/models/prepbn.py``), restated from its description: both branches in every forward, channels
transposed to the middle for BatchNorm and back, a counter in a buffer, the blend written out.

    OMP_NUM_THREADS=1 python benchmarks/norm_step.py      # eight minutes
    python benchmarks/norm_step.py --device cuda          # wall clock
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import arguments, machine, markdown, save
from torch import Tensor, nn

from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.swap import TARGETS, NormSwapConfig, apply_norm_swap

SHAPES = ((32, 197, 192), (32, 197, 384), (8, 3136, 96))
AIMS = "aims: blend ÷ LN at most 1.35 and finished ÷ LN at most 1.10 a step; published ÷ blend at least 1.6 a norm"


class PublishedLayout(nn.Module):
    """``lam · LN(x) + (1 - lam) · (BN(x) + alpha · x)`` on (batch, tokens, channels), with the published layout.

    Args:
        channels: Of the input.
        steps: Forwards until ``lam`` is 0.
    """

    def __init__(self, channels: int, steps: int = 300_000) -> None:
        super().__init__()
        self.ln, self.bn = nn.LayerNorm(channels), nn.BatchNorm1d(channels)
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("left", torch.tensor(steps))
        self.register_buffer("total", torch.tensor(steps))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.rep(x)
        lam = self.left / self.total
        if self.left > 0:
            self.left.copy_(self.left - 1)
        old, new = self.ln(x), self.rep(x)
        return lam * old + (1 - lam) * new

    def rep(self, x: Tensor) -> Tensor:
        middle = x.transpose(1, 2)
        return (self.bn(middle) + self.alpha * middle).transpose(1, 2)


def swapped(target: str, channels: int, finished: bool) -> nn.Module:
    holder = nn.Sequential(nn.LayerNorm(channels))
    apply_norm_swap(holder, {"target": target, "init": "slab"})
    return set_phase(holder, finished)[0]


def set_phase(model: nn.Module, finished: bool) -> Any:
    """In the middle of the transition, or after it."""
    for norm in blend_norms(model).values():
        norm.resume(0.5)
        if finished:
            norm.finish()
    return model


def norm_variants(channels: int) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"LN": nn.LayerNorm(channels), "published layout": PublishedLayout(channels)}
    for target in TARGETS:
        modules[f"blend, {target}"] = swapped(target, channels, False)
    calibrating = swapped("affine", channels, False)
    assert isinstance(calibrating, BlendNorm)
    calibrating.target.calibrating = True
    modules["blend, affine, calibrating"] = calibrating
    return modules | {f"finished, {target}": swapped(target, channels, True) for target in TARGETS}


# -- timing ----------------------------------------------------------------------------------------------------------


def timed(work: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, the order shuffled anew every time."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in work}
    for name in work:
        work[name]()
    shuffled, order = random.Random(0), list(work)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            work[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return times


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> tuple[float, str]:
    """Median of ``one ÷ other`` within a round, and its quartiles."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 2 else [min(ratios), 0.0, max(ratios)]
    return statistics.median(ratios), f"{quarter[0]:.2f} to {quarter[2]:.2f}"


def measure_norms(shape: tuple[int, int, int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Forward and backward of each norm on one random input."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)

    def work(module: nn.Module) -> Callable[[], None]:
        parameters = [p for p in module.parameters() if p.requires_grad]

        def both() -> None:
            module(x).backward(grad)
            for tensor in (x, *parameters):
                tensor.grad = None

        return both

    variants = norm_variants(shape[-1])
    times = timed({name: work(m.to(device).train()) for name, m in variants.items()}, rounds, device)
    rows = []
    for name in variants:
        against, quartiles = ratio(times, name, "LN")
        rows.append(
            {
                "shape": str(shape),
                "norm": name,
                "ms": 1e3 * statistics.median(times[name]),
                "ratio": against,
                "quartiles": quartiles,
                "published": ratio(times, "published layout", name)[0],
                "times": times[name],
            }
        )
    return rows


# -- whole models ----------------------------------------------------------------------------------------------------


def decoder() -> nn.Module:
    """Llama, 4 layers of width 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, use_cache=False, **size))


@dataclass(frozen=True)
class Case:
    """A model to train a step of.

    Args:
        build: Makes it.
        batch: Examples in a batch.
        targets: What its norms become.
        tokens: It reads tokens, not images.
    """

    build: Callable[[], nn.Module]
    batch: int
    targets: tuple[str, ...] = ("repbn", "affine")
    tokens: bool = False


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=100)


MODELS = {
    "ViT-T": Case(of_timm("vit_tiny_patch16_224"), 8),
    "ViT-S": Case(of_timm("vit_small_patch16_224"), 4),
    "Swin-T": Case(of_timm("swin_tiny_patch4_window7_224"), 4),
    "PVTv2-b0": Case(of_timm("pvt_v2_b0"), 8),
    "ConvNeXt-atto": Case(of_timm("convnext_atto"), 8),
    "Llama, 4 layers, width 256": Case(decoder, 8, ("affine",), tokens=True),
}


def measure_steps(title: str, case: Case, rounds: int, device: str) -> list[dict[str, Any]]:
    """Whole training steps: forward, backward, AdamW."""
    torch.manual_seed(0)
    base = case.build().to(device).train()
    if case.tokens:
        x = torch.randint(0, 512, (case.batch, 128), device=device)
    else:
        x = torch.randn(case.batch, 3, 224, 224, device=device)
    y = torch.randint(0, 100, (case.batch,), device=device)

    def work(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            loss = model(x, labels=x).loss if case.tokens else F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    models = {"LN": base}
    norms = 0
    for target in case.targets:
        model = copy.deepcopy(base)
        norms = len(apply_norm_swap(model, NormSwapConfig(target=target)).targets)  # type: ignore[arg-type]
        models[f"blend, {target}"] = set_phase(model.to(device), False)
        models[f"finished, {target}"] = set_phase(copy.deepcopy(model), True)
    times = timed({name: work(model) for name, model in models.items()}, rounds, device)
    rows = []
    for name in models:
        against, quartiles = ratio(times, name, "LN")
        rows.append(
            {
                "model": f"{title}, batch {case.batch}, {norms} norms",
                "norms": name,
                "ms": 1e3 * statistics.median(times[name]),
                "ratio": against,
                "quartiles": quartiles,
                "times": times[name],
            }
        )
    return rows


def reading(norms: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    """Two lines: where the aims are met and where not."""
    cheaper = [row["published"] for row in norms if row["norm"] == "blend, repbn"]
    lines = [
        "Per norm, the RepBN blend is "
        + ", ".join(f"{value:.2f}" for value in cheaper)
        + f" times cheaper than the published layout over the shapes (aim 1.6: {sum(v >= 1.6 for v in cheaper)} of "
        f"{len(cheaper)})."
    ]
    missed = []
    for kind, aim in (("blend", 1.35), ("finished", 1.10)):
        chosen = [row for row in steps if row["norms"].startswith(kind)]
        over = [f"{r['model'].split(',')[0]} {r['norms']} {r['ratio']:.2f}" for r in chosen if r["ratio"] > aim]
        missed.append(f"{kind} ÷ LN ≤ {aim:.2f} in {len(chosen) - len(over)} of {len(chosen)}" + (
            f" (not: {'; '.join(over)})" if over else ""
        ))  # fmt: skip
    return "\n".join([*lines, f"Whole steps: {', '.join(missed)}."])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of the norms by themselves")
    parser.add_argument("--steps", type=int, default=9, help="rounds of whole training steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    norm_columns = {
        "shape": "shape", "norm": "norm", "ms": "ms", "ratio": "÷ LN", "quartiles": "quartiles",
        "published": "published layout ÷ this",
    }  # fmt: skip
    step_columns = {"model": "model", "norms": "norms", "ms": "step, ms", "ratio": "÷ LN", "quartiles": "quartiles"}
    norms, steps = [], []
    for shape in SHAPES:
        norms += (rows := measure_norms(shape, args.rounds, args.device))
        print(markdown(rows, norm_columns), flush=True)
    for title in args.models:
        steps += (rows := measure_steps(title, MODELS[title], args.steps, args.device))
        print(markdown(rows, step_columns), flush=True)
    clock = "wall time" if args.device == "cuda" else "CPU time of the process"
    text = (
        f"# What the norm swap costs in training\n\n{reading(norms, steps)}\n\n{clock}; medians over interleaved "
        f"rounds ({args.rounds} and {args.steps}), ratios within a round; {AIMS}. λ = 0.5 in the blends.\n\n"
        f"## Forward and backward of one norm\n\n{markdown(norms, norm_columns)}\n\n"
        f"## Training steps\n\n{markdown(steps, step_columns)}\n\n`{machine()}`\n"
    )
    path = save(f"norm_step_{args.device}", [*norms, *steps])
    path.with_suffix(".md").write_text(text)
    print(reading(norms, steps))


if __name__ == "__main__":
    main()

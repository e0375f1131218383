"""Training-step time of SigmaReparam against the plain model, torch's spectral_norm and a per-forward power iteration.

Every variant runs its own copy of the model and optimizer; in each round every variant makes one step, in shuffled
order, and the ratio to the plain model's step of the same round is kept. The table shows medians of ratios.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py     # CPU: CPU time, so that other load does not count
    python benchmarks/step_time.py --device cuda --compile
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import arguments, markdown, save
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_efficient.weightspace import leading_singular_triplet
from lightning_efficient.weightspace.sigma_reparam import (
    SigmaReparamConfig,
    apply_sigma_reparam,
    find_targets,
)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Six layers, width 256, 96 symbols."""

    def __init__(self, layers: int = 6, width: int = 256, heads: int = 4, symbols: int = 96, length: int = 512):
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.embed(x) + self.position(positions))).mean(1)


class PublishedSigma(nn.Module):
    """A learned gain over a spectral norm whose power iteration runs in every forward, as the published layer's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        _, sigma, v = leading_singular_triplet(weight.flatten(1))
        self.register_buffer("v", v)
        self.gain = nn.Parameter(sigma.reshape(1))

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.flatten(1)
        with torch.no_grad():
            u = F.normalize(torch.mv(w, self.v), dim=0)
            v = F.normalize(torch.mv(w.t(), u), dim=0)
            if self.training:
                self.v.copy_(v)
        return weight * (self.gain / torch.dot(u, torch.mv(w, v)))


def variant(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Change ``model`` as ``name`` says; every variant touches the same layers. Returns its optimizer."""
    targets = list(find_targets(model).matched)
    for target in targets:
        module = model.get_submodule(target.rpartition(".")[0])
        if name == "torch spectral_norm":
            parametrizations.spectral_norm(module, n_power_iterations=1)
        elif name == "per-forward iteration":
            parametrize.register_parametrization(module, "weight", PublishedSigma(module.weight), unsafe=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    if name.startswith("SigmaReparam"):
        apply_sigma_reparam(model, optimizer, SigmaReparamConfig(monitor_only="monitor" in name))
    return optimizer


VARIANTS = (
    "plain",
    "SigmaReparam",
    "SigmaReparam(monitor_only)",
    "torch spectral_norm",
    "per-forward iteration",
)

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "ViT-Tiny 224": (
        lambda: timm.create_model("vit_tiny_patch16_224"),
        lambda b: torch.randn(b, 3, 224, 224),
        8,
    ),
    "ViT-Small 224": (
        lambda: timm.create_model("vit_small_patch16_224"),
        lambda b: torch.randn(b, 3, 224, 224),
        16,
    ),
    "Decoder-6 T=512": (Decoder, lambda b: torch.randint(0, 96, (b, 512)), 8),
}


def measure(name: str, rounds: int, device: str, compiled: bool, batch: int | None) -> list[dict[str, Any]]:
    make, data, default_batch = MODELS[name]
    size = batch or default_batch
    torch.manual_seed(0)
    base = make().to(device).train()
    x = data(size).to(device)
    y = torch.randint(0, 10, (size,), device=device)
    steps: dict[str, Callable[[], None]] = {}
    for label in VARIANTS:
        model = copy.deepcopy(base)
        optimizer = variant(label, model)
        forward = torch.compile(model) if compiled else model

        def step(forward: Any = forward, optimizer: Any = optimizer) -> None:
            loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        steps[label] = step
    for step in steps.values():
        for _ in range(3 if compiled else 1):
            step()
    # CPU time, so that other load on the machine does not count; a GPU's work only shows on the wall clock.
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {label: [] for label in VARIANTS}
    order = list(VARIANTS)
    for _ in range(rounds):
        random.shuffle(order)
        for label in order:
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            steps[label]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[label].append(clock() - start)
    rows = []
    for label in VARIANTS:
        ratios = [a / b for a, b in zip(times[label], times["plain"], strict=True)]
        quarter = statistics.quantiles(ratios, n=4) if rounds > 2 else [ratios[0]] * 3
        rows.append(
            {
                "model": f"{name}, batch {size}",
                "variant": label,
                "step_ms": statistics.median(times[label]) * 1e3,
                "ratio": statistics.median(ratios),
                "quartiles": f"{quarter[0]:.3f} to {quarter[2]:.3f}",
                "ratios": ratios,
            }
        )
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = [v for v in VARIANTS if v != "plain"]
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        data = [next(r["ratios"] for r in rows if r["model"] == model and r["variant"] == v) for v in labels]
        axis.boxplot(data, orientation="horizontal", tick_labels=labels, showfliers=False, widths=0.6)
        axis.axvline(1.0, color="0.4", lw=1)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("step time / plain step of the same round")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    rows = []
    for name in args.models:
        rows += measure(name, args.rounds, args.device, args.compile, args.batch)
        columns = {
            "model": "model",
            "variant": "variant",
            "step_ms": "step, ms",
            "ratio": "÷ plain",
            "quartiles": "quartiles",
        }
        print(markdown([r for r in rows if r["model"].startswith(name)], columns), flush=True)
    path = save(f"step_time_{args.device}{'_compiled' if args.compile else ''}", rows)
    path.with_suffix(".md").write_text(markdown(rows, columns) + "\n")
    picture(rows, path.with_suffix(".png"))
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()

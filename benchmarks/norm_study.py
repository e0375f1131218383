"""Accuracy of the norm swap: a small ViT on 10,000 images of Fashion-MNIST, from scratch and from a trained LN model.

Every variant of a seed starts from the same weights and sees the same batches. The learning rate is chosen for the
LayerNorm model on validation images and used for all; the test images are looked at once, at the end of each run.
Finished runs are kept in ``benchmarks/runs``, so the study can be killed and continued; delete ``norm_study*`` there
after changing the code of a run.

    apt-get install dataset-fashion-mnist                  # or its four .gz files in benchmarks/runs/fashion-mnist
    OMP_NUM_THREADS=1 python benchmarks/norm_study.py      # three quarters of an hour on one free core
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import norm_report
import torch
import torch.nn.functional as F
from common import arguments, quiet
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from norm_tasks import RUNS, Batch, Finished, Images, Learner, TokenBatchNorm, batches, fashion, fit, vit
from torch import Tensor, nn

from lightning_efficient import PRepBN, export
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.recalibrate import recalibrate

TARGETS = ("repbn", "affine", "un", "dyt", "rms")
CHOOSING = 100  # the seed that learning rates are chosen with


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Args:
        name: Heading.
        swap: Arguments of ``PRepBN``; None: no swap.
        batch_norm: Build the model with BatchNorm from the start.
        tuned: Start from the seed's trained LayerNorm model.
        curve: Follow validation accuracy, of the blend and of the finished form.
    """

    name: str
    swap: dict[str, Any] | None = None
    batch_norm: bool = False
    tuned: bool = False
    curve: bool = False


JUMP = {"hold": 0, "transition": 0}
# The method by itself: recalibration is measured here, before and after, and no guard delays a transition.
BARE = {"recalibrate": 0, "finished_metrics": False, "guard": "off"}
SCRATCH = [
    Variant("LN", curve=True),
    Variant("BN from the start", batch_norm=True),
    Variant("RepBN, no transition", {"init": "slab", **JUMP}),
    Variant("PRepBN, slab init, T = 0.8", {"init": "slab", "hold": 0, "transition": 0.8}, curve=True),
    *(Variant(f"{t}, copy init", {"target": t}, curve=t in ("repbn", "affine")) for t in TARGETS),
    Variant("un, copy init, warm-up 100", {"target": "un", "warmup": 100}),
]
SWAP = [
    Variant("LN, trained on", tuned=True),
    *(
        Variant(f"{t}, {init} init, {how}", {"target": t, "init": init, **arguments}, tuned=True)
        for t in TARGETS
        for init in ("copy", "slab")
        # The jump comes after the same hold, so that statistics are warm and `affine` is calibrated.
        for how, arguments in (("abrupt", {"hold": 0.05, "transition": 0}), ("progressive", {}))
    ),
    *(Variant(f"{t}, copy init, T = 0.2", {"target": t, "transition": 0.2}, tuned=True) for t in TARGETS[:3]),
    Variant("repbn, copy init, T = 0.4", {"transition": 0.4}, tuned=True),
    Variant("repbn, slab init, progressive, guard", {"init": "slab", "guard": "pause"}, tuned=True),
]


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    seeds: int = 5
    steps: int = 930
    tune_steps: int = 300
    batch: int = 64
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    tune_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    recalibration: int = 40
    points: int = 16
    depth: int = 4


@dataclass
class Watch(Callback):
    """Largest gradient norm of a run; with ``points``, validation accuracy of the blend and of the finished form."""

    images: Batch
    steps: int
    points: int
    peak: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        start = time.process_time()
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).item()
        self.peak = norm if norm != norm else max(self.peak, norm)
        self.seconds += time.process_time() - start

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.points or trainer.global_step % max(1, self.steps // self.points):
            return
        start = time.process_time()
        norms = blend_norms(pl_module).values()
        point = {"step": float(trainer.global_step), "lam": max((float(n.lam) for n in norms), default=1.0)}
        point["blend"] = accuracy(pl_module, self.images)[0]
        before = [(n.phase, float(n.lam)) for n in norms]
        for norm in norms:
            norm.finish()
        point["finished"] = accuracy(pl_module, self.images)[0] if before else point["blend"]
        for norm, (phase, lam) in zip(norms, before, strict=True):
            if phase == "blend":
                norm.resume(lam)
        self.curve.append(point)
        self.seconds += time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Share of right answers in percent, and cross-entropy, in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    scores = torch.cat([model(x) for x in data[0].split(500)])
    model.train(training)
    right = (scores.argmax(1) == data[1]).float().mean().item()
    return 100 * right, F.cross_entropy(scores, data[1]).item()


def callback(variant: Variant) -> list[Callback]:
    if variant.swap is None:
        return []
    return [PRepBN(**{**BARE, **variant.swap})]


def run(variant: Variant, seed: int, images: Images, plan: Plan, lr: float, base_lr: float = 0.0) -> dict[str, Any]:
    """Train once, a tuned variant from the seed's LayerNorm model of ``base_lr``; a row of plain numbers."""
    torch.manual_seed(seed)
    net = vit(TokenBatchNorm if variant.batch_norm else None, plan.depth)
    steps = plan.tune_steps if variant.tuned else plan.steps
    if variant.tuned:
        net.load_state_dict(torch.load(base(seed, base_lr)))
    torch.manual_seed(seed + 1000 * variant.tuned)
    module = Learner(net, lr, steps)
    watch = Watch((images.validation[0][:1000], images.validation[1][:1000]), steps, plan.points * variant.curve)
    start = time.process_time()
    fit(module, batches(images.train, plan.batch, seed + 1000 * variant.tuned), [*callback(variant), watch])
    seconds = time.process_time() - start - watch.seconds
    module.eval()
    row = {"variant": variant.name, "seed": seed, "lr": lr, "steps": steps, "tuned": variant.tuned}
    row |= {"epochs": steps * plan.batch / len(images.train[0]), "seconds": seconds, "peak_grad_norm": watch.peak}
    row |= {"curve": watch.curve, "last_train_loss": fmean(module.losses[-50:])}
    row["lam_end"] = max((float(norm.lam) for norm in blend_norms(module).values()), default=0.0)
    row |= scores(module, images, "")
    start = time.process_time()
    row["recalibrated"] = renew_statistics(module, images, plan, seed)
    row["recalibration_seconds"] = time.process_time() - start
    row |= scores(module, images, "_recalibrated") if row["recalibrated"] else {}
    if variant.swap is not None:
        row["exported_agrees"] = exported_agreement(net, images)
    if variant.name == "LN":
        torch.save(net.state_dict(), base(seed, lr))
    return row


def scores(module: nn.Module, images: Images, suffix: str) -> dict[str, float]:
    names = ("val", images.validation), ("test", images.test)
    return {
        f"{name}_{what}{suffix}": value
        for name, data in names
        for what, value in zip(("acc", "loss"), accuracy(module, data), strict=True)
    }


def base(seed: int, lr: float) -> Path:
    return RUNS / f"norm_study_base_{seed}_{lr}.pt"


def renew_statistics(module: Learner, images: Images, plan: Plan, seed: int) -> bool:
    """Precise BatchNorm over training batches; False where there are no batch statistics."""
    data = [batch for _, batch in zip(range(plan.recalibration), batches(images.train, 256, seed), strict=False)]
    plain = [m for m in module.modules() if isinstance(m, TokenBatchNorm)]
    if not plain:
        return recalibrate(module, data).norms > 0
    for norm in plain:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x, _ in data:
            module(x)
    module.eval()
    return True


def exported_agreement(net: nn.Module, images: Images) -> float | None:
    """Share of validation images that the exported network classifies alike; None if export refuses."""
    x: Tensor = images.validation[0][:500]
    try:
        plain = export(net, x[:8])
    except Exception as error:
        print(f"export: {error}", flush=True)
        return None
    with torch.no_grad():
        return (plain(x).argmax(1) == net(x).argmax(1)).float().mean().item()


# -- the study -------------------------------------------------------------------------------------------------------


def choose(variant: Variant, images: Images, plan: Plan, finished: Finished, base_lr: float = 0.0) -> float:
    """The rate at which LayerNorm validates best, with a seed that is not used again."""
    rows = [
        finished.get(
            ("choose", variant.name, plan.steps, plan.tune_steps, lr, base_lr),
            partial(run, variant, CHOOSING, images, plan, lr, base_lr),
        )
        for lr in (plan.tune_rates if variant.tuned else plan.rates)
    ]
    return max(rows, key=lambda row: row["val_acc"])["lr"]


def cells(plan: Plan) -> Iterator[tuple[int, Variant]]:
    for seed in range(plan.seeds):  # seeds outermost: an interrupted study has whole seeds
        for variant in (*SCRATCH, *SWAP):
            yield seed, variant


def study(plan: Plan, images: Images) -> list[dict[str, Any]]:
    """Every run, those finished earlier read from disk."""
    finished = Finished("norm_study.jsonl")
    lr = choose(SCRATCH[0], images, plan, finished)
    tune_lr = choose(SWAP[0], images, plan, finished, lr)
    rows = []
    for seed, variant in cells(plan):
        rate = tune_lr if variant.tuned else lr
        key = (variant.name, seed, plan.steps, plan.tune_steps, rate)
        row = finished.get(key, partial(run, variant, seed, images, plan, rate, lr))
        rows.append(row)
        print(f"seed {seed}  {row['val_acc']:6.2f}  {row['seconds']:5.1f} s  {variant.name}", flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--tune-steps", type=int, default=Plan.tune_steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    plan, images = Plan(args.seeds, args.steps, args.tune_steps), fashion()
    print(norm_report.write_study(study(plan, images), vars(plan), len(images.train[0])))


if __name__ == "__main__":
    main()

"""A ViT pruned by MagnitudePruning and by Lightning's ModelPruning: accuracy, sparsity after a resume, step time.

Both follow the cubic schedule to the same amount over the same weights (all linear layers and the patch embedding, the
output layer among them); ``ModelPruning`` prunes at the end of epochs, by amounts relative to what is left. When the
amount has been reached a checkpoint is written, and a second run goes on from it to the end. Digits: 1,005 images for
training, 540 for the test, nothing is chosen on either. ``benchmarks/runs/pruning_vit.jsonl`` keeps finished runs.

    OMP_NUM_THREADS=1 python benchmarks/pruning_vit.py
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from common import RESULTS, arguments, markdown, save
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from pruning_study import RUNS, cell_text
from pruning_tasks import Batches, Data, Split, accuracy, digits
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_efficient import MagnitudePruning
from lightning_efficient.common.schedule import cubic
from lightning_efficient.pruning.selection import make_masks
from lightning_efficient.pruning.targets import find_targets
from lightning_efficient.weightspace import Boundary
from lightning_efficient.weightspace.mask import MaskTransform, set_mask

AMOUNTS = (0.5, 0.75, 0.9)
ARMS = ("MagnitudePruning", "ModelPruning")
TEXT = """# A ViT on digits, pruned by a cubic schedule

Per cent, mean and 95 % interval over {seeds} seeds; {epochs} epochs, the amount is reached in epoch {reached}. One of
the 540 test images is 0.19 points.

{table}

## MagnitudePruning minus ModelPruning

Points, mean and 95 % interval of the differences of each seed. Resumed, `ModelPruning` goes on without its masks,
with all weights.

{pairs}

## Step time

ViT-Tiny, 224 pixels, 75 % of the weights masked, one CPU thread; median of the ratios to the plain step of the same
round (CPU time), {rounds} rounds. `ModelPruning`'s masks are those of `torch.nn.utils.prune`. The time of
masks does not grow with the batch.

{times}

These ratios are of whole steps and noisy. What masks do, they do in the optimizer's step. AdamW's alone, ms of CPU
time, medians of {alone} alternating steps:

{optimizer}

Plain AdamW takes the square root of the second moments, which are zero where a weight is pruned, and on this machine
`torch.sqrt` is ten times slower on zeros; the fused one has a kernel of its own.
"""
BATCHES = (8, 32)
OPTIMIZER = {"optimizer": "optimizer", "plain": "plain", "masked": "masked"} | {
    f"share_{batch}": f"difference ÷ plain step, batch {batch}" for batch in BATCHES
}
EPOCHS, SAVED, BATCH = 20, 16, 100
TIMES = {"batch": "batch", "method": "method", "step_ms": "step, ms", "ratio": "÷ plain", "quartiles": "quartiles"}


class Vit(pl.LightningModule):
    """Two layers of width 48 on patches of 2 × 2; AdamW with a cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.models.VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=4, mlp_ratio=4, num_classes=10
        )

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


class Sparsity(Callback):
    """Share of zeros in the weights the network uses, at the end of every epoch, after it has been pruned."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = [m.weight for m in layers(pl_module)]
        zeros = sum(int((w == 0).sum()) for w in weights)
        self.seen[trainer.current_epoch] = zeros / sum(w.numel() for w in weights)


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def relative(amount: float) -> Callable[[int], float]:
    """What ``ModelPruning`` has to prune of the rest after an epoch, to be on the cubic schedule."""

    def share(epoch: int) -> float:
        return cubic(epoch + 1, round(0.1 * EPOCHS), round(0.6 * EPOCHS), amount)

    return lambda epoch: 1 - (1 - share(epoch)) / (1 - (share(epoch - 1) if epoch else 0.0))


def callbacks(arm: str, amount: float, module: Vit) -> list[Callback]:
    """The pruning callback of an arm; none for the dense one."""
    if arm == "MagnitudePruning":
        return [MagnitudePruning(amount=amount)]
    if arm == "ModelPruning":
        return [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=[(m, "weight") for m in layers(module)],
                amount=relative(amount),
                use_lottery_ticket_hypothesis=False,
            )
        ]
    return []


def run(data: Data, arm: str, amount: float, seed: int) -> dict[str, Any]:
    """Train, and go on from the checkpoint in a second run."""
    row: dict[str, Any] = {"arm": arm, "amount": amount, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("whole", "resumed"):
            pl.seed_everything(seed, verbose=False)
            module, sparsity = Vit(), Sparsity()
            files = ModelCheckpoint(folder, f"{part}-{{epoch}}", every_n_epochs=SAVED, save_top_k=-1)
            pruning = callbacks(arm, amount, module)
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, max_epochs=EPOCHS, callbacks=[*pruning, sparsity, files], logger=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            batches = Batches(data.train, BATCH, seed)
            saved = Path(folder) / f"whole-epoch={SAVED - 1}.ckpt"
            if part == "resumed":
                batches.epoch = SAVED
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.fit(module, batches, ckpt_path=saved if part == "resumed" else None)
            row[f"{part}_acc"] = accuracy(module.eval(), data.test)
            row[f"{part}_sparsity"] = sparsity.seen
            if not pruning:
                break
    return row


def runs(data: Data, seeds: int) -> list[dict[str, Any]]:
    """Every run, those finished earlier read from disk."""
    RUNS.mkdir(exist_ok=True)
    path = RUNS / "pruning_vit.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as file:
        for seed in range(seeds):
            for arm, amount in [("dense", 0.0), *itertools.product(ARMS, AMOUNTS)]:
                if not any((r["arm"], r["amount"], r["seed"]) == (arm, amount, seed) for r in done):
                    row = json.loads(json.dumps(run(data, arm, amount, seed)))
                    done.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    return [row for row in done if row["seed"] < seeds]


# -- step time -------------------------------------------------------------------------------------------------------


def mask(model: nn.Module, optimizer: torch.optim.Optimizer, amount: float) -> None:
    """Prune by magnitude, now, and keep it so at every step of the optimizer."""
    targets = {name: target.param for name, target in find_targets(model).matched.items()}
    boundary = Boundary()
    transforms = {name: MaskTransform(param.shape) for name, param in targets.items()}
    for name, param in targets.items():
        boundary.add(name, param, transforms[name])
    boundary.start()
    boundary.attach([optimizer])
    for name, kept in make_masks({n: p.detach().abs() for n, p in targets.items()}, amount).items():
        set_mask(boundary.sites[name], transforms[name], kept)


def optimizer_times(rounds: int, amount: float = 0.75) -> dict[str, list[float]]:
    """AdamW's step of ViT-Tiny alone, in ms of CPU time: masks cost nothing anywhere else in a step."""
    steps: dict[str, Callable[[], Any]] = {}
    for label in ("plain", "masked", "fused, plain", "fused, masked"):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224").train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=label.startswith("fused"))
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        if label.endswith("masked"):
            mask(model, optimizer, amount)
        optimizer.step()
        steps[label] = optimizer.step
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label in random.sample(list(steps), len(steps)):
            start = time.process_time()
            steps[label]()
            times[label].append(1e3 * (time.process_time() - start))
    return times


def step_times(rounds: int, batch: int, amount: float = 0.75) -> list[dict[str, Any]]:
    """Steps of ViT-Tiny at 224 pixels with masks of both kinds, each round in another order, in CPU time."""
    torch.manual_seed(0)
    base = timm.create_model("vit_tiny_patch16_224").train()
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    steps: dict[str, Callable[[], None]] = {}
    for label in ("plain", *ARMS):
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        if label == "MagnitudePruning":
            mask(model, optimizer, amount)
        elif label == "ModelPruning":
            where = [(m, "weight") for m in layers(model)]
            prune.global_unstructured(where, pruning_method=prune.L1Unstructured, amount=amount)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        step()
        steps[label] = step
    times: dict[str, list[float]] = {label: [] for label in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for label in order:
            start = time.process_time()
            steps[label]()
            times[label].append(time.process_time() - start)
    rows = []
    for label in steps:
        ratios = [a / b for a, b in zip(times[label], times["plain"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "batch": batch, "method": label, "step_ms": statistics.median(times[label]) * 1e3,
                "ratio": statistics.median(ratios),
                "quartiles": f"{low:.3f} to {high:.3f}", "ratios": ratios,
            }
        )  # fmt: skip
    return rows


# -- report ----------------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each arm and amount: mean and 95 % interval over seeds."""
    lines = []
    for arm, amount in [("dense", 0.0), *itertools.product(ARMS, AMOUNTS)]:
        some = [row for row in rows if (row["arm"], row["amount"]) == (arm, amount)]

        def zeros(part: str, epoch: int, some: list[dict[str, Any]] = some) -> str:
            return cell_text([row.get(f"{part}_sparsity", {}).get(str(epoch)) for row in some])

        line = {"arm": arm, "amount": f"{amount:.0%}", "acc": cell_text([r["whole_acc"] for r in some])}
        line |= {"before": zeros("whole", SAVED - 1), "end": zeros("whole", EPOCHS - 1)}
        if arm != "dense":
            line |= {"after": zeros("resumed", SAVED), "resumed_end": zeros("resumed", EPOCHS - 1)}
            line["resumed_acc"] = cell_text([row["resumed_acc"] for row in some])
        lines.append(line)
    return lines


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours minus theirs over the seeds, each of which gives both the same weights and batches."""
    lines = []
    for amount in AMOUNTS:
        line = {"amount": f"{amount:.0%}"}
        for part in ("whole_acc", "resumed_acc"):
            ours, theirs = (
                {r["seed"]: r[part] for r in rows if (r["arm"], r["amount"]) == (arm, amount)} for arm in ARMS
            )
            line[part] = cell_text([ours[seed] - theirs[seed] for seed in sorted(ours)])
        lines.append(line)
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=25, help="of the step times; 0: keeps those there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = runs(digits(), args.seeds)
    before = json.loads((RESULTS / "pruning_vit.json").read_text())
    alone = optimizer_times(8 * args.rounds) if args.rounds else before["optimizer_times"]
    times = (
        [row for batch in BATCHES for row in step_times(args.rounds, batch)] if args.rounds else before["step_times"]
    )
    heads = {
        "arm": "method", "amount": "amount", "acc": "accuracy", "before": f"zeros, epoch {SAVED} (saved)",
        "end": f"zeros, epoch {EPOCHS}", "after": f"resumed: zeros, epoch {SAVED + 1}",
        "resumed_end": f"resumed: zeros, epoch {EPOCHS}", "resumed_acc": "resumed: accuracy",
    }  # fmt: skip
    step_ms = {row["batch"]: row["step_ms"] for row in times if row["method"] == "plain"}
    optimizer = []
    for kind, prefix in (("AdamW", ""), ("AdamW(fused=True)", "fused, ")):
        plain, masked = (statistics.median(alone[prefix + label]) for label in ("plain", "masked"))
        shares = {f"share_{batch}": f"{(masked - plain) / ms:.1%}" for batch, ms in step_ms.items()}
        optimizer.append({"optimizer": kind, "plain": plain, "masked": masked, **shares})
    text = TEXT.format(
        seeds=args.seeds, epochs=EPOCHS, reached=round(0.7 * EPOCHS), table=markdown(summary(rows), heads),
        pairs=markdown(paired(rows), {"amount": "amount", "whole_acc": "whole run", "resumed_acc": "resumed"}),
        times=markdown(times, TIMES), rounds=len(times[0]["ratios"]), alone=len(alone["plain"]),
        optimizer=markdown(optimizer, OPTIMIZER),
    )  # fmt: skip
    save("pruning_vit", rows, step_times=times, optimizer_times=alone)
    (RESULTS / "pruning_vit.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

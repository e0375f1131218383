"""`CollapseGuard` on runs with an injected fault: does the run recover, how many steps are lost, where does it end?

A CNN on scikit-learn's digits, each method with three faults in the middle of the run: the learning rate times 30 for
ten steps, one batch of inputs times 1,000, one batch of NaN. Every faulty run has an undisturbed one with the same
seed, and one with the fault and without the guard. The canary is the validation split; accuracy is on other images.

    python benchmarks/guard_study.py --seeds 1 --epochs 4    # a slice, half a minute
    python benchmarks/guard_study.py                         # some 10 minutes on one core
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from pruning_tasks import Batches, Data, Split, accuracy, cnn, digits
from structured_study import Module as Trained
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import CollapseGuard, HESSOPruning, MagnitudePruning, PRepBN, SAPPruning, SigmaReparam
from lightning_efficient.comparison.estimate import Difference, plus_minus

METHODS: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "SigmaReparam": SigmaReparam,
    "PRepBN": partial(PRepBN, include=["net.norm"], target="affine"),
    "MagnitudePruning": partial(MagnitudePruning, amount=0.8),
    "SAPPruning": partial(SAPPruning, iterations=2),
    "HESSOPruning": HESSOPruning,
}
FAULTS = ("rate x 30", "poisoned batch", "NaN batch")
EVERY = 10
HEAD = """# CollapseGuard on injected faults

A CNN on scikit-learn's digits ({train} training images, batches of 32, AdamW, {steps} steps), {seeds} seeds. The fault
comes after half of the steps: the learning rate times 30 for ten steps, or one batch times 1,000, or one batch of NaN.
`CollapseGuard(every_n_steps={every})` with its other defaults: perplexity of the validation images, at most twice the
best; no rate is lowered, no batch skipped. `tripped`: runs in which it went back; `steps lost`: undone, their mean.
Accuracy in per cent on {test} images that decide nothing: without the fault, with fault and guard, with the fault
alone; `guarded minus undisturbed` over the same seeds, 95 % interval (Student's t). `recovered`: guarded runs within 2
points of the undisturbed one; `unguarded`: the same of the runs without the guard.

"""


class Net(torch.nn.Module):
    """The study's CNN, and a layer norm before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        layers = list(cnn(8))
        self.body, self.norm, self.head = torch.nn.Sequential(*layers[:-1]), torch.nn.LayerNorm(64), layers[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.body(images)))  # type: ignore[no-any-return]


class Module(Trained):
    def validation_step(self, batch: Split, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Fault(Callback):
    """Strikes once."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.kind != "rate x 30" and trainer.global_step == self.step:
            batch[0].mul_(1000.0 if self.kind == "poisoned batch" else math.nan)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.kind == "rate x 30" and self.step <= trainer.global_step < self.step + 10:
            for group in optimizer.param_groups:
                group["lr"] *= 30  # the scheduler sets it anew after the step


def run(data: Data, method: str, fault: str | None, guarded: bool, seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    module, batches = Module(Net(), 4e-3), Batches(data.train, 32, seed)
    steps = epochs * len(batches)
    make, guard = METHODS[method], CollapseGuard(every_n_steps=EVERY)
    callbacks = [*([] if make is None else [make()]), *([guard] if guarded else [])]
    callbacks += [] if fault is None else [Fault(fault, steps // 2 + 3)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )  # fmt: skip
    began, why = time.process_time(), ""
    try:
        trainer.fit(module, batches, DataLoader(TensorDataset(*data.val), len(data.val[0])))
    except Exception as error:  # a method may refuse weights that are not finite
        why = f"{type(error).__name__}: {error}"[:200]
    module.eval()
    with torch.no_grad():
        final = 100 * accuracy(module, data.test)
    return {
        "method": method, "fault": fault or "none", "guarded": guarded, "seed": seed, "accuracy": final, "error": why,
        "trips": guard.trips, "steps": steps, "seconds": time.process_time() - began,
        "lost": sum(row["step"] - row["back_to"] for row in guard.history),
        "history": [{**row, "value": str(row["value"])} for row in guard.history],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    def of(method: str, fault: str, guarded: bool) -> list[dict[str, Any]]:
        return [r for r in rows if (r["method"], r["fault"], r["guarded"]) == (method, fault, guarded)]

    def mean(found: list[dict[str, Any]], key: str = "accuracy") -> float:
        return sum(row[key] for row in found) / max(len(found), 1)

    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        plain = of(method, "none", False)
        for fault in FAULTS:
            saved, lost = of(method, fault, True), of(method, fault, False)
            gap = Difference(tuple(r["accuracy"] for r in plain), tuple(r["accuracy"] for r in saved), paired=True)
            tripped = [row for row in saved if row["trips"]]
            near = [
                [r["accuracy"] >= p["accuracy"] - 2 for r, p in zip(arm, plain, strict=True)] for arm in (saved, lost)
            ]
            out.append(
                {
                    "method": method, "fault": fault, "tripped": f"{len(tripped)} of {len(saved)}",
                    "lost": f"{mean(tripped, 'lost'):.1f}", "plain": f"{mean(plain):.2f}",
                    "saved": f"{mean(saved):.2f}",
                    "unguarded": f"{mean(lost):.2f}", "gap": plus_minus(gap.mean, gap.half_width, "+"),
                    "recovered": f"{sum(near[0])} of {len(saved)}", "without": f"{sum(near[1])} of {len(lost)}",
                }
            )  # fmt: skip
    columns = {
        "method": "method", "fault": "fault", "tripped": "tripped", "lost": "steps lost", "plain": "undisturbed",
        "saved": "guarded", "unguarded": "fault alone", "gap": "guarded minus undisturbed", "recovered": "recovered",
        "without": "unguarded",
    }  # fmt: skip
    return common.markdown(out, columns)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.quiet()
    warnings.filterwarnings("ignore", category=UserWarning)
    data = digits()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for method in METHODS:
            rows.append(run(data, method, None, False, seed, args.epochs))
            rows += [run(data, method, fault, guard, seed, args.epochs) for fault in FAULTS for guard in (True, False)]
            print(
                method,
                seed,
                [round(row["accuracy"], 1) for row in rows[-7:]],
                {row["error"] for row in rows[-7:]},
                flush=True,
            )
        path = common.save("guard_study", rows)
        head = HEAD.format(
            train=len(data.train[0]), steps=rows[0]["steps"], seeds=seed + 1, every=EVERY, test=len(data.test[0])
        )
        path.with_suffix(".md").write_text(head + table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

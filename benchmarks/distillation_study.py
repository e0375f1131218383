"""Does the network before the surgery, as a teacher, lower the cost of pruning it or of swapping its norms?

Each seed trains a network, then compresses it in a second fit, with `Distillation(teacher="initial")` and without, from
the same weights and on the same batches. Nothing is tuned: alpha and temperature are the defaults, and the rate of the
second fit is half the first one. Accuracy is that on images that decide nothing.

    python benchmarks/distillation_study.py --digits --seeds 1 --epochs 2   # a slice, some seconds
    python benchmarks/distillation_study.py                                 # Fashion-MNIST, some 15 minutes on one core
    python benchmarks/distillation_study.py --dense 24 --name distillation_study_trained    # a teacher trained longer
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from pruning_tasks import FASHION, Batches, Data, accuracy, digits, fashion
from structured_study import MODELS, RATE, Module

from lightning_efficient import Distillation, HESSOPruning, MagnitudePruning, PRepBN
from lightning_efficient.comparison.estimate import Difference, plus_minus

METHODS: dict[str, tuple[str, Callable[[], Any]]] = {
    "HESSO, 50 % of the units": ("CNN", partial(HESSOPruning, target=0.5)),
    "HESSO, 80 % of the units": ("CNN", partial(HESSOPruning, target=0.8)),
    "MagnitudePruning, 90 %": ("CNN", partial(MagnitudePruning, amount=0.9)),
    "MagnitudePruning, 98 %": ("CNN", partial(MagnitudePruning, amount=0.98)),
    "PRepBN": ("ViT", PRepBN),
}
ARMS: dict[str, Callable[[], Any] | None] = {
    "without": None, "distilled": Distillation, "distilled, alpha 0.9": partial(Distillation, alpha=0.9),
}  # fmt: skip
HEAD = """# Distillation from the network before the surgery

{data}, {train} training images, batches of {batch}, {seeds} seeds. Each network was trained for {dense} epochs, then
compressed in a second fit of {epochs}, with and without `Distillation(teacher="initial")` at its defaults (alpha
0.5, temperature 2), and once at alpha 0.9. Accuracy in per cent on {test} images that decide nothing; differences over
the same seeds, 95 % intervals (Student's t). `step`: median over seeds of the time of the second fit as a ratio to that
without, on a loaded machine. `dense`: the teacher. `further training`: the second fit without any method.

"""


class Seconds(Callback):
    """CPU time of the batches of a fit."""

    total, began = 0.0, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.total += time.process_time() - self.began


def fit(module: pl.LightningModule, data: Data, seed: int, epochs: int, batch: int, *callbacks: Any) -> float:
    seconds = Seconds()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[*callbacks, seconds], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.fit(module, Batches(data.train, batch, seed))
    module.eval()
    return seconds.total


@torch.no_grad()
def scored(module: Any, data: Data) -> float:
    return 100 * accuracy(module, data.test)


def seeds_rows(data: Data, seed: int, first: int, epochs: int, batch: int) -> list[dict[str, Any]]:
    rows, dense = [], {}
    for name in MODELS:
        torch.manual_seed(seed)
        dense[name] = Module(MODELS[name](data.train[0].shape[-1]), RATE[name])
        fit(dense[name], data, seed, first, batch)
        rows.append({"method": f"dense {name}", "arm": "dense", "seed": seed, "accuracy": scored(dense[name], data)})
    cells = [(method, net, make, arm) for method, (net, make) in METHODS.items() for arm in ARMS]
    cells += [(f"further training, {net}", net, None, "without") for net in MODELS]
    for method, net, make, arm in cells:
        module = Module(deepcopy(dense[net].net), RATE[net] / 2).train()
        teacher = ARMS[arm]
        callbacks = [*([] if teacher is None else [teacher()]), *([] if make is None else [make()])]
        seconds = fit(module, data, seed + 1000, epochs, batch, *callbacks)
        row = {"method": method, "arm": arm, "seed": seed, "accuracy": scored(module, data), "seconds": seconds}
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    def values(method: str, arm: str, key: str) -> list[float]:
        return [row[key] for row in rows if (row["method"], row["arm"]) == (method, arm)]

    out = []
    for method, arm in dict.fromkeys((row["method"], row["arm"]) for row in rows):
        found = values(method, arm, "accuracy")
        line: dict[str, Any] = {"method": method, "arm": arm, "accuracy": f"{sum(found) / len(found):.2f}"}
        if arm.startswith("distilled"):
            gap = Difference(tuple(values(method, "without", "accuracy")), tuple(found), paired=True)
            line["difference"] = plus_minus(gap.mean, gap.half_width, "+")
            times = sorted(
                a / b for a, b in zip(values(method, arm, "seconds"), values(method, "without", "seconds"), strict=True)
            )
            line["step"] = f"{times[len(times) // 2]:.2f}"
        out.append(line)
    columns = {"method": "method", "arm": "arm", "accuracy": "accuracy", "difference": "distilled minus without"}
    return common.markdown(out, columns | {"step": "step"})


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dense", type=int, help="epochs of the first fit; as many as of the second if not given")
    parser.add_argument("--name", default="distillation_study", help="of the files in results/")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.quiet()
    warnings.filterwarnings("ignore", category=UserWarning)
    data = digits() if args.digits else fashion(args.data)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        first = args.epochs if args.dense is None else args.dense
        rows += seeds_rows(data, seed, first, args.epochs, args.batch)
        path = common.save(args.name, rows, data=data.name)
        head = HEAD.format(
            data=data.name, train=len(data.train[0]), test=len(data.test[0]), seeds=seed + 1, epochs=args.epochs,
            dense=first, batch=args.batch,
        )  # fmt: skip
        path.with_suffix(".md").write_text(head + table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

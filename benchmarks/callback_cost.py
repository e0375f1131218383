"""What each companion costs a step of training: the step with it divided by the step without, interleaved.

A pre-norm encoder reads digits as eight tokens of eight pixels. In every round one run of ``--steps`` optimizer steps
is made with each callback and one without, in an order that turns; the time of a run is the CPU time of its steps, the
first few left out, its epoch end included. The table has the median of the ratios over rounds, with the interval that
holds it with 95 % (order statistics, distribution-free). Monitors read the training stage here, so that the figure
holds what every step pays; read validation (their default), and training steps pay nothing. Callbacks that measure
every so many steps have scripts of their own: ``monitor_cost.py``, ``module_timer.py``.

    OMP_NUM_THREADS=1 python benchmarks/callback_cost.py                 # a minute on one core
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import arguments, markdown, quiet, save
from lightning.pytorch.callbacks import Callback
from pruning_tasks import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import (
    AdaptiveGradientModulation,
    CollapseGuard,
    Distillation,
    FixedETFHead,
    ModuleTimer,
    NeuralCollapseMonitor,
    PaddingReport,
    PosteriorCollapseMonitor,
    RepresentationMonitor,
    RunCost,
    StateDriftMonitor,
)

WIDTH, BATCH, SKIPPED = 64, 32, 4


class Both(nn.Module):
    """A branch for each half of the tokens; they meet in an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        x = torch.cat([self.upper(upper), self.lower(lower)], 1)
        return self.head(self.layers(x).mean(1))  # type: ignore[no-any-return]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Both()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :4], x[:, 4:])  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


CALLBACKS: dict[str, Callable[[], Any]] = {
    "RepresentationMonitor, five metrics": lambda: RepresentationMonitor(module="net.layers", stage="train"),
    "NeuralCollapseMonitor": lambda: NeuralCollapseMonitor(head="net.head", stage="train"),
    "PosteriorCollapseMonitor": lambda: PosteriorCollapseMonitor(mu="net.layers", stage="train"),
    "StateDriftMonitor": lambda: StateDriftMonitor(module="net.layers", train_length=4, stage="train"),
    "CollapseGuard, every 50 steps": lambda: CollapseGuard(every_n_steps=50),
    "Distillation": Distillation,
    "AdaptiveGradientModulation, two": lambda: AdaptiveGradientModulation(
        modalities={"upper": 0, "lower": 1}, module="net", end=None
    ),
    "FixedETFHead": lambda: FixedETFHead(include=["net.head"], steps=10),
    "PaddingReport": PaddingReport,
    "ModuleTimer, between measured steps": lambda: ModuleTimer(table=False),
    "RunCost": RunCost,
}


class Clock(Callback):
    """CPU time from the start of a batch after the first few to the end of training."""

    def __init__(self) -> None:
        self.began = self.spent = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SKIPPED:
            self.began = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.spent = time.process_time() - self.began


def run(model: Module, data: list[dict[str, Any]], make: Callable[[], Any] | None, steps: int, folder: str) -> float:
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=steps + SKIPPED, max_epochs=-1, default_root_dir=folder,
        callbacks=[*([] if make is None else [make()]), clock], limit_val_batches=1, num_sanity_val_steps=0,
        check_val_every_n_epoch=10_000,
    )  # fmt: skip
    torch.manual_seed(0)
    loader: DataLoader[Any] = DataLoader(data, BATCH)  # type: ignore[arg-type]
    trainer.fit(copy.deepcopy(model), loader, loader)
    return clock.spent


def middle(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics between which it lies with at least 95 %."""
    found, n = sorted(values), len(values)
    low, tail = 0, 1 / 2**n
    while tail + math.comb(n, low + 1) / 2**n <= 0.025:
        low += 1
        tail += math.comb(n, low) / 2**n
    return statistics.median(found), found[low], found[n - 1 - low]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=46)
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    x, y = digits().train
    mask = torch.ones(8, dtype=torch.long)
    data = [{"x": image.view(8, 8), "attention_mask": mask, "y": label} for image, label in zip(x, y, strict=True)]
    data = data[: len(data) // BATCH * BATCH]
    pl.seed_everything(0, verbose=False)
    model = Module()
    names = list(CALLBACKS)
    times: dict[str, list[float]] = {name: [] for name in names}
    plain_ms = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            order: list[str | None] = [None, *names]
            order = order[number % len(order) :] + order[: number % len(order)]
            spent = {n: run(model, data, None if n is None else CALLBACKS[n], args.steps, folder) for n in order}
            plain_ms.append(1e3 * spent[None] / args.steps)
            for name in names:
                times[name].append(spent[name] / spent[None])
            print(number, {name: round(times[name][-1], 3) for name in names}, flush=True)
    rows = []
    for name in names:
        median, low, high = middle(times[name])
        rows.append({"callback": name, "ratio": median, "interval": f"{low:.3f} to {high:.3f}", "all": times[name]})
    columns = {"callback": "callback", "ratio": "step with ÷ without", "interval": "95 %"}
    text = (
        f"A step of {statistics.median(plain_ms):.1f} ms: pre-norm encoder, 3 layers, {WIDTH} wide, {BATCH} digits of "
        f"8 tokens. {args.rounds} rounds of {args.steps} steps.\n\n{markdown(rows, columns)}\n"
    )
    print(text)
    save("callback_cost", rows, plain_ms=plain_ms).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

"""What CollapseMonitor costs: a measured step against the plain steps beside it, in one run of one Trainer.

CPU time of the process is compared (wall time with ``--device cuda``), so that other load does not count. The cost at
the default cadence is the extra time of one measured step spread over 100.

    python benchmarks/monitor_cost.py
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import timm
import torch
from common import arguments, markdown, save
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_efficient import CollapseMonitor

EVERY = 4
CASES = {"ViT-Tiny 224": ("vit_tiny_patch16_224", 8), "ViT-Small 224": ("vit_small_patch16_224", 16)}


class Module(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm.create_model(name, num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def on_train_batch_start(self, *_: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() if self.device == "cuda" else time.process_time())


def measure(title: str, name: str, batch: int, measured: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    data = (torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,)))
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=device, devices=1, max_steps=EVERY * (measured + 1) + 2, logger=TensorBoardLogger(folder),
            callbacks=[clock, CollapseMonitor(every_n_steps=EVERY)], enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1000,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader([data] * (EVERY * (measured + 1) + 2), batch_size=None)
        trainer.fit(Module(name), loader)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    extra, ratios = [], []
    for i in range(EVERY, EVERY * (measured + 1), EVERY):  # not the first, which also imports and warms up
        beside = (steps[i - 1] + steps[i + 1]) / 2
        extra.append(steps[i] - beside)
        ratios.append(steps[i] / beside)
    plain = statistics.median(s for i, s in enumerate(steps) if i % EVERY and i > 1)
    return {
        "model": f"{title}, batch {batch}",
        "plain_ms": plain * 1e3,
        "ratio": statistics.median(ratios),
        "every_100": 1 + statistics.median(extra) / plain / 100,
        "ratios": ratios,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--measured", type=int, default=5, help="measured steps")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [measure(title, *case, args.measured, args.device) for title, case in CASES.items()]
    columns = {
        "model": "model",
        "plain_ms": "plain step, ms",
        "ratio": "measured step ÷ plain",
        "every_100": "at every 100",
    }
    table = markdown(rows, columns)
    print(table)
    save(f"monitor_cost_{args.device}", rows).with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()

"""What ``ModuleTimer`` costs a run at its default cadence: the time of a measured step against the one before it.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/module_timer.py [--rounds N]``. Every second step is measured; CPU time,
median.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from common import arguments, markdown, quiet, save
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import ModuleTimer


class Model(LightningModule):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layers(batch).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Clock(Callback):
    """CPU time from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.moments.append(time.process_time())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    quiet()
    rows = []
    for width, layers, batch in ((64, 2, 4), (256, 4, 8)):
        clock, timer = Clock(), ModuleTimer(every_n_steps=2, table=False)
        data = DataLoader(torch.randn(batch * (2 * rounds + 4), 64, width), batch)  # type: ignore[arg-type]
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, callbacks=[clock, timer], default_root_dir=tempfile.mkdtemp(),
        )  # fmt: skip
        trainer.fit(Model(width, layers), data)
        steps = [b - a for a, b in zip(clock.moments, clock.moments[1:], strict=False)][2:]
        measured, plain = statistics.median(steps[0::2]), statistics.median(steps[1::2])
        share = (measured - plain) / (ModuleTimer().every_n_steps * plain)
        rows.append(
            {
                "model": f"encoder {width} wide, {layers} layers, batch {batch}", "plain": round(1e3 * plain, 1),
                "measured": round(1e3 * measured, 1), "overhead": f"{share:.2%}",
            }
        )  # fmt: skip
    columns = {
        "model": "model",
        "plain": "plain step, ms",
        "measured": "measured step, ms",
        "overhead": "of a run, by default",
    }
    table = markdown(rows, columns)
    print(table)
    save("module_timer", rows).with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()

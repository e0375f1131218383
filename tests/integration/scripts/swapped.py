"""Swaps norms over two CPU processes (DDP, gloo) or in one, and leaves each process's tensors and schedule behind.

Usage: ``python swapped.py FOLDER [--processes N] [--target NAME] [--trouble] [--resume]``; needs ``tests`` on the
module path. Lightning starts the second process.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from zoo import Classifier, loader

from lightning_efficient import PRepBN
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.testing.case import ResumableLoader

STEPS, HALF, TROUBLE = 60, 33, 30


class Observed(Classifier):
    """Keeps the schedule; if asked, its loss jumps once, in the second process alone."""

    def __init__(self, trouble: bool) -> None:
        super().__init__()
        self.trouble = trouble
        self.lams: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.training:
            self.lams.append(float(next(iter(blend_norms(self).values())).lam))
        trouble = self.trouble and self.global_step == TROUBLE and self.global_rank == 1
        return loss * 100 if trouble else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Half(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == HALF:
            trainer.save_checkpoint(self.folder / "half.ckpt")


def train(folder: Path, processes: int, target: Any, trouble: bool, resume: bool) -> None:
    torch.manual_seed(0)
    swap = PRepBN(target=target, transition=40, hold=5, guard_length=3, recalibrate=4)
    two: dict[str, Any] = {"strategy": "ddp", "use_distributed_sampler": False} if processes > 1 else {}
    trainer = Trainer(
        accelerator="cpu", devices=processes, logger=False, max_steps=STEPS, callbacks=[swap, Half(folder)],
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, precision="64-true", **two,
    )  # fmt: skip
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # set by Lightning for the second process
    data = ResumableLoader(loader(STEPS, 8, dtype=torch.float64))
    data.batches = [[part[rank::processes] for part in batch] for batch in data.batches]
    module = Observed(trouble).double()
    validation = loader(1, 8, dtype=torch.float64)
    trainer.fit(module, data, validation, ckpt_path=folder / "half.ckpt" if resume else None)
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    torch.save(
        {"tensors": tensors, "lams": module.lams, "metrics": metrics}, folder / f"{target}.{processes}.{rank}.pt"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--target", default="repbn")
    parser.add_argument("--trouble", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    train(given.folder, given.processes, given.target, given.trouble, given.resume)

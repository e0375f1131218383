"""Prunes while training; can kill itself in the middle of an epoch, and can resume.

Usage: ``python killed_pruning.py METHOD FOLDER FINAL.ckpt [--kill-after STEP] [--resume]``; needs ``tests`` on the
module path.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from zoo import Classifier, loader

from lightning_efficient import HESSOPruning, MagnitudePruning, PAGCPPruning, SAPPruning, SigmaReparam
from lightning_efficient.testing.case import ResumableLoader

STEPS, BATCHES, EVERY = 17, 5, 3
# Each has something behind it and something before it at step 6, where the resumed run takes over.
METHODS: dict[str, Callable[[], list[Callback]]] = {
    "cubic": lambda: [MagnitudePruning(amount=0.8, start=2, length=10, every=2)],
    "ticket": lambda: [MagnitudePruning(schedule="iterative", rounds=3, rewind_to=1), SigmaReparam()],
    "hesso": lambda: [HESSOPruning(target=0.75, start=2, duration=9, periods=3)],
    "pagcp": lambda: [PAGCPPruning(budgets={"val_loss": 3.0}, start=3, rounds=2, every=5, step=0.25, most=0.5)],
    "sap": lambda: [SAPPruning(p=1.0, q=2.0, iterations=3)],
}


class Kill(Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def train(method: str, folder: Path, final: Path, kill_after: int = 0, resume: bool = False) -> None:
    seed_everything(3, verbose=False)
    keep = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True, save_top_k=1)
    callbacks = [*METHODS[method](), keep]
    if kill_after:
        callbacks.insert(0, Kill(kill_after))
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, max_steps=STEPS, callbacks=callbacks, num_sanity_val_steps=0,
        gradient_clip_val=0.5, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data = ResumableLoader(loader(BATCHES))
    trainer.fit(Classifier("cnn"), data, loader(1), ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(final)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("final", type=Path)
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    train(given.method, given.folder, given.final, given.kill_after, given.resume)

"""Prunes on two CPU processes, cuts the units out between two fits, and writes what each process has.

Usage: ``python hesso_ddp.py FOLDER``; needs ``tests`` on the module path. Each process gets its half of every batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from zoo import Classifier, loader

from lightning_efficient import HESSOPruning
from lightning_efficient.lifecycle.cuts import cut
from lightning_efficient.testing.case import Dealt


def fit(folder: Path, module: Classifier, callback: HESSOPruning) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback], max_steps=6, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(loader(6, 8).dataset, 4, sampler=Dealt(48, 2)))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    module = Classifier("cnn")
    first = HESSOPruning(target=0.5, start=1, duration=4, periods=2)
    fit(folder, module, first)
    found = {"keep": first.keep, "zeros": {n: t.clone() for n, t in module.state_dict().items()}}
    cut(module, first.keep, first.groups)
    found["cut"] = {n: t.clone() for n, t in module.state_dict().items()}
    second = HESSOPruning(target=0.5, start=1, duration=4, periods=1)
    trainer = fit(folder, module, second)
    torch.save(found | {"again": second.keep, "end": module.state_dict()}, folder / f"{trainer.global_rank}.pt")

"""Learns the temperature of a forward adapter on one or two CPU processes, the same samples a step either way.

Usage: ``python temp_scale_ddp.py FOLDER PROCESSES``; needs ``tests`` on the module path. Each process gets its half of
every batch, and gradients of two batches are accumulated.
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from zoo import Classifier, loader

from lightning_efficient import TempScale
from lightning_efficient.testing.case import Dealt

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes = sys.argv[1], int(sys.argv[2])
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", precision="64-true",
        callbacks=[TempScale(tau=0.5, learnable=True, per_head=True)], max_steps=4, accumulate_grad_batches=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    whole = loader(8, 8, dtype=torch.float64)
    trainer.fit(Classifier("capped").double(), DataLoader(whole.dataset, 8 // processes, sampler=Dealt(64, processes)))
    trainer.save_checkpoint(f"{folder}/{processes}.ckpt")

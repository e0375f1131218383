"""Trains with SimplifiedLinearAttention on one or two CPU processes, the same samples a step either way.

Usage: ``python linear_attention_ddp.py FOLDER PROCESSES``; needs ``tests`` on the module path. Lightning starts the
second process, whose random stream differs from the first one's.
"""

from __future__ import annotations

import os
import sys

import torch
from grid_models import GridClassifier
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from zoo import loader

from lightning_efficient import SimplifiedLinearAttention
from lightning_efficient.testing.case import Dealt

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", precision="64-true",
        callbacks=[SimplifiedLinearAttention()], max_steps=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    whole = loader(4, 8, dtype=torch.float64)
    trainer.fit(
        GridClassifier("grid").double(), DataLoader(whole.dataset, 8 // processes, sampler=Dealt(32, processes))
    )
    trainer.save_checkpoint(f"{folder}/{processes}.ckpt")

"""Distillation from the initial network on two CPU processes, or alone on their batches together (float64)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from zoo import Classifier, loader

from lightning_efficient import Distillation
from lightning_efficient.testing.case import Dealt

root, alone = Path(sys.argv[1]), len(sys.argv) > 2
processes = 1 if alone else 2
trainer = Trainer(
    accelerator="cpu", devices=processes, strategy="auto" if alone else "ddp", max_steps=6, logger=False,
    callbacks=[Distillation(temperature=3.0, alpha=0.6)], enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=root, use_distributed_sampler=False, limit_val_batches=0,
    precision="64-true", num_sanity_val_steps=0,
)  # fmt: skip
module = Classifier("encoder").double()
whole = loader(6, 8, dtype=torch.float64)
trainer.fit(module, DataLoader(whole.dataset, 8 // processes, sampler=Dealt(48, processes)))
found = [float(p.detach().sum()) for p in module.parameters()]
(root / f"{'alone' if alone else trainer.global_rank}.json").write_text(json.dumps({"weights": found}))
if not alone:
    torch.distributed.destroy_process_group()

"""Two processes; the canary of the second is NaN once."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from zoo import Classifier, loader

from lightning_efficient import CollapseGuard

warnings.filterwarnings("ignore", "CollapseGuard: the score")
root = Path(sys.argv[1])
calls: list[int] = []


def canary(module: Any) -> float:
    calls.append(module.trainer.global_step)
    return math.nan if module.trainer.global_rank == 1 and calls.count(4) == 1 and calls[-1] == 4 else 1.0


guard = CollapseGuard(canary=canary, every_n_steps=2)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=8, callbacks=[guard], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
    num_sanity_val_steps=0,
)  # fmt: skip
module = Classifier("cnn")
trainer.fit(module, loader(32), loader(2))
digest = float(sum(p.detach().double().sum() for p in module.parameters()))
state = {"history": [{**row, "value": str(row["value"])} for row in guard.history], "digest": digest}
(root / f"{trainer.global_rank}.json").write_text(json.dumps(state))
torch.distributed.destroy_process_group()

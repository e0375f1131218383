"""A model sharded over two CPU processes (FSDP2, gloo), with SigmaReparam: refused by our own error.

Usage: ``python sharded.py FOLDER on|off``; needs ``tests`` on the module path. Lightning starts the second process.
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from zoo import Classifier, loader

from lightning_efficient import SigmaReparam


class Sharded(Classifier):
    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        callbacks=[SigmaReparam(enabled=sys.argv[2] == "on")], max_steps=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[1],
    )  # fmt: skip
    trainer.fit(Sharded("encoder"), loader())
    print("trained", trainer.global_step)

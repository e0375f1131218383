"""A transformer sharded by FSDP2, with SigmaReparam and masks: training, a file of shards, one process that reads it.

Two GPUs, or two processes on the CPU::

    torchrun --nproc-per-node 2 examples/sharded.py
    torchrun --nproc-per-node 2 examples/sharded.py --device cpu

Four nodes of eight GPUs, the same command on each (``HOST`` is the first of them)::

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/sharded.py \
        --nodes 4 --processes 8

Going on, by the same number of processes or another one: ``--resume runs/step200.ckpt --steps 400``. That file is a
folder of shards; ``load_from_checkpoint`` reads it into one process, and ``lightning-efficient export`` makes a plain
model of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import MagnitudePruning, SigmaReparam, load_from_checkpoint


class Net(nn.Module):
    """An encoder over symbols."""

    def __init__(self, width: int, layers: int, symbols: int, length: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x) + self.places.weight))
        return out


class Backwards(LightningModule):
    """Learns to repeat a sequence from its end."""

    def __init__(self, width: int = 64, layers: int = 2, symbols: int = 32, length: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width, layers, symbols, length)

    def configure_model(self) -> None:
        """Cut the parameters: each layer gathers its own when it runs. In one process there is nothing to cut."""
        if self.device_mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (x,) = batch
        loss = F.cross_entropy(self.net(x).transpose(1, 2), x.flip(1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randint(32, (2048, 16))), batch_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--nodes", type=int, default=1, help="as many as torchrun starts")
    parser.add_argument("--processes", type=int, default=2, help="on each node")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    trainer = Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        num_nodes=args.nodes,
        devices=args.processes,
        strategy=ModelParallelStrategy(data_parallel_size=args.nodes * args.processes, tensor_parallel_size=1),
        callbacks=[SigmaReparam(), MagnitudePruning(amount=0.5, exclude=["head"])],
        max_steps=args.steps,
        default_root_dir=args.folder,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Backwards(), ckpt_path=args.resume)
    path = args.folder / f"step{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        model = load_from_checkpoint(Backwards, path, weights_only=False)  # a file of one's own
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        print(f"{path}: {sum(p.numel() for p in model.parameters())} parameters in one process, {zeros} of them zero")


if __name__ == "__main__":
    main()

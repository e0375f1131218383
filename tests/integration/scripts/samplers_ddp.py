"""Trains on batches by length in two processes, with Lightning's own distributed sampler left on.

Usage: ``python samplers_ddp.py FOLDER``; needs ``tests`` on the module path. Writes what each process saw and learned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from length_models import Tagger, Texts, collate, samplers
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader


class Data(LightningDataModule):
    """Makes the loader inside a hook, where Lightning records how batch samplers are made."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.texts = name, Texts(45)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.texts, batch_sampler=samplers(self.texts)[self.name], collate_fn=collate)


def run(folder: Path, name: str, in_hook: bool) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", precision="64-true", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    data, model = Data(name), Tagger().double()
    trainer.fit(model, data if in_hook else data.train_dataloader())
    loader: Any = trainer.train_dataloader
    predicted = trainer.predict(model, data.train_dataloader())
    assert predicted is not None
    return {
        "sampler": type(loader.batch_sampler).__name__,
        "expected": type(samplers(data.texts)[name]).__name__,
        "length": len(loader),
        "epochs": model.seen[:-1],
        "predicted": [i for batch in predicted for i in batch],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {f"{name}/{hook}": run(folder, name, hook) for name in samplers(Texts(45)) for hook in (False, True)}
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))

    # One step on the whole of the data, dealt out: the gradient is that of one process with all of it in one batch.
    seed_everything(0, verbose=False)
    texts, model = Texts(45), Tagger().double()
    batches = samplers(texts, batch_size=23)["balanced"]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", precision="64-true", max_steps=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(texts, batch_sampler=batches, collate_fn=collate))
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, folder / "two.pt")

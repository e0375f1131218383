"""What the tour exports: a model of each variant, from its checkpoint, checked and tested."""

from __future__ import annotations

from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from lightning_efficient.ablation.files import last_checkpoint
from lightning_efficient.ablation.run import Ablation
from lightning_efficient.common.comparing import difference
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.deploy.export import export, save_exported
from lightning_efficient.lifecycle.load import load_from_checkpoint


def export_all(done: Ablation) -> Table:
    """Export the first seed of each variant to ``<folder>/exported/<variant>.pt2``.

    Args:
        done: What ``ablate`` found; runs that did not finish are left out.

    Returns:
        A row a variant.
    """
    data = Digits()
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    table = Table(box=box.SIMPLE_HEAD, title="exported, first seed", title_justify="left")
    table.add_column("variant")
    for name in ("parameters", "file, MiB", "test accuracy", "to the checkpoint"):
        table.add_column(name, justify="right")
    first = min((run.seed for run in done.runs), default=0)
    for run in done.runs:
        if run.seed == first and run.state == "finished":
            file = done.folder / "exported" / f"{run.variant}.pt2"
            table.add_row(run.variant, *_export(Path(run.folder), file, images, labels))
    return table


def _export(folder: Path, file: Path, images: Tensor, labels: Tensor) -> tuple[str, ...]:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None  # a finished run has one
    model = load_from_checkpoint(DigitsViT, checkpoint, map_location="cpu").eval()
    plain = export(model, images)
    with torch.no_grad():
        logits = plain(images)
        apart = difference(model(images), logits)
    save_exported(plain, images, file, dynamic_batch=True)
    parameters = sum(p.numel() for p in plain.parameters())
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return f"{parameters:,}", f"{file.stat().st_size / 2**20:.2f}", f"{accuracy:.3f}", f"{apart.absolute:.1g}"

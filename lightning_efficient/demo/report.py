"""What the tour exports: a model of each variant, from its checkpoint, checked and tested."""

from __future__ import annotations

from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lightning_efficient.ablation.files import last_checkpoint
from lightning_efficient.ablation.run import Ablation
from lightning_efficient.ablation.variants import BASELINE
from lightning_efficient.common.comparing import difference
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.deploy.export import export, save_exported
from lightning_efficient.deploy.measure import compare_models
from lightning_efficient.lifecycle.load import load_from_checkpoint

_BATCH, _ROUNDS = 256, 40


def export_all(done: Ablation) -> Table:
    """Export the first seed of each variant to ``<folder>/exported/<variant>.pt2``, and time it beside the baseline.

    Nothing else runs by then, and the two take turns: the ratio is the median over 40 rounds, with its quartiles.

    Args:
        done: What ``ablate`` found; runs that did not finish are left out.

    Returns:
        A row a variant.
    """
    data = Digits()
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    table = Table(box=box.SIMPLE_HEAD, title="exported, first seed", title_justify="left", caption=_CAPTION)
    table.add_column("variant")
    for name in (
        "parameters",
        "÷ baseline",
        "test accuracy",
        f"time of {_BATCH} images ÷ baseline",
        "to the checkpoint",
    ):
        table.add_column(name, justify="right")
    first = min((run.seed for run in done.runs), default=0)
    runs = [run for run in done.runs if run.seed == first and run.state == "finished"]
    reference: nn.Module | None = None
    for run in sorted(runs, key=lambda run: run.variant != BASELINE):
        model = _trained(Path(run.folder))
        plain = export(model, images)
        reference = plain if run.variant == BASELINE else reference
        save_exported(plain, images, done.folder / "exported" / f"{run.variant}.pt2", dynamic_batch=True)
        table.add_row(run.variant, *_figures(model, plain, reference, images, labels))
    return table


_CAPTION = "Linear attention pays from about 400 tokens on, and these images have 16. Masks alone make nothing smaller."


def _trained(folder: Path) -> nn.Module:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None  # a finished run has one
    return load_from_checkpoint(DigitsViT, checkpoint, map_location="cpu").eval()


def _figures(
    model: nn.Module, plain: nn.Module, reference: nn.Module | None, images: Tensor, labels: Tensor
) -> tuple[str, ...]:
    with torch.no_grad():
        logits = plain(images)
        apart = difference(model(images), logits)
    parameters = sum(p.numel() for p in plain.parameters())
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    size = time = "–"
    if reference is not None and plain is not reference:
        report = compare_models(reference, plain, images[:1], (_BATCH,), _ROUNDS)
        rows = {row.quantity: row for row in report.rows}
        size, latency = f"{rows['parameters'].ratio:.2f}", rows[f"latency, batch {_BATCH}"]
        assert latency.ratio is not None
        assert latency.quartiles is not None
        time = "{:.2f} ({:.2f} to {:.2f})".format(latency.ratio, *latency.quartiles)
    return f"{parameters:,}", size, f"{accuracy:.3f}", time, f"{apart.absolute:.1g}"

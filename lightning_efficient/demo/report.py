"""What the tour exports: a model of each variant, from its checkpoint, checked, tested and timed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from timm.models import VisionTransformer
from torch import Tensor, nn

from lightning_efficient.ablation.files import last_checkpoint
from lightning_efficient.ablation.run import Ablation
from lightning_efficient.ablation.variants import BASELINE
from lightning_efficient.attention.linear import apply_linear_attention
from lightning_efficient.common.comparing import difference
from lightning_efficient.comparison import compare
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.deploy.export import export, save_exported
from lightning_efficient.deploy.measure import MeasuredRow, compare_models
from lightning_efficient.lifecycle.load import load_from_checkpoint

SMALL = "small_dense"
_PRUNED = ("hesso", "pagcp")
_BATCH, _ROUNDS = 256, 40
_SIDE = 40  # pixels: 400 tokens, from which on linear attention pays


@dataclass(frozen=True)
class Exported:
    """The exported model of a variant's first seed.

    Args:
        variant: Its name.
        parameters: Of the plain module.
        size: Parameters ÷ those of the baseline; ``None`` of the baseline itself, and without one.
        time: Of a batch ÷ the baseline's: median over rounds and quartiles.
        accuracy: On the test images.
        apart: Largest difference of its logits to the checkpoint's.
    """

    variant: str
    parameters: int
    size: float | None
    time: tuple[float, float, float] | None
    accuracy: float
    apart: float


def export_all(done: Ablation) -> list[Exported]:
    """Export the first seed of each variant to ``<folder>/exported/<variant>.pt2``, and time it beside the baseline.

    Nothing else runs by then, and the two take turns: the ratio is the median over 40 rounds, with its quartiles.

    Args:
        done: What ``ablate`` found; runs that did not finish are left out.

    Returns:
        One a variant, the baseline first.
    """
    data = Digits()
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    first = min((run.seed for run in done.runs), default=0)
    runs = [run for run in done.runs if run.seed == first and run.state == "finished"]
    reference: nn.Module | None = None
    found = []
    for run in sorted(runs, key=lambda run: run.variant != BASELINE):
        model = _trained(Path(run.folder))
        plain = export(model, images)
        reference = plain if run.variant == BASELINE else reference
        save_exported(plain, images, done.folder / "exported" / f"{run.variant}.pt2", dynamic_batch=True)
        found.append(_measured(run.variant, model, plain, reference, images, labels))
    return found


def table(rows: Sequence[Exported]) -> Table:
    """The rows for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, title="exported, first seed", title_justify="left")
    shown.add_column("variant", no_wrap=True)  # in 80 columns the headings fold, not the names
    time = f"time of {_BATCH} images ÷ baseline's"
    for name in ("parameters", "÷ baseline's", "test accuracy", time, "largest change of a logit"):
        shown.add_column(name, justify="right")
    for row in rows:
        size = "–" if row.size is None else f"{row.size:.2f}"
        took = "–" if row.time is None else "{:.2f} ({:.2f} to {:.2f})".format(*row.time)
        shown.add_row(row.variant, f"{row.parameters:,}", size, f"{row.accuracy:.3f}", took, f"{row.apart:.1g}")
    return shown


def claims(done: Ablation) -> list[str]:
    """What the comparison with the baseline cannot show, a sentence each.

    Pruned networks are judged by a dense one of the same size, linear attention by its time at 400 tokens.

    Args:
        done: What ``ablate`` found.
    """
    runs = [run for run in done.runs if run.state == "finished"]
    names = {run.variant for run in runs}
    said = []
    if SMALL in names and (pruned := [name for name in _PRUNED if name in names]):
        folders = [run.folder for run in runs if run.variant in (SMALL, *pruned)]
        against = compare(folders, ["val_acc"], SMALL).verdicts()
        said += [f"{verdict.variant}, judged by {SMALL}: {verdict.text}" for verdict in against]
    time = _linear_attention()
    assert time.ratio is not None
    return [
        *said,
        "linear attention is no variant of this tour: it is for 400 tokens and more, and these images have 16. At "
        f"{(_SIDE // 2) ** 2} tokens such a network takes {time.ratio:.2f} × the time with it.",
    ]


def _linear_attention() -> MeasuredRow:
    """Time of the tour's network on larger images, weights at random, with linear attention ÷ without."""
    plain = VisionTransformer(
        img_size=_SIDE, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4, class_token=False,
        global_pool="avg",
    ).eval()  # fmt: skip
    linear = deepcopy(plain)
    apply_linear_attention(linear)
    report = compare_models(plain, linear, torch.zeros(1, 1, _SIDE, _SIDE), (8,))
    return next(row for row in report.rows if row.quantity.startswith("latency"))


def _trained(folder: Path) -> nn.Module:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None  # a finished run has one
    return load_from_checkpoint(DigitsViT, checkpoint, map_location="cpu").eval()


def _measured(
    variant: str, model: nn.Module, plain: nn.Module, reference: nn.Module | None, images: Tensor, labels: Tensor
) -> Exported:
    with torch.no_grad():
        logits = plain(images)
        apart = difference(model(images), logits)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    size = time = None
    if reference is not None and plain is not reference:
        report = compare_models(reference, plain, images[:1], (_BATCH,), _ROUNDS)
        rows = {row.quantity: row for row in report.rows}
        size, latency = rows["parameters"].ratio, rows[f"latency, batch {_BATCH}"]
        assert latency.ratio is not None
        assert latency.quartiles is not None
        time = (latency.ratio, *latency.quartiles)
    return Exported(variant, sum(p.numel() for p in plain.parameters()), size, time, accuracy, apart.absolute)

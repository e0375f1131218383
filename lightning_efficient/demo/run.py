"""``lightning-efficient demo``: the tour. A small ViT on real images; plain, smaller, with each method; compared."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from lightning_efficient.ablation.run import Ablation, ablate
from lightning_efficient.ablation.starters import Warm
from lightning_efficient.common.escaping import printable_lines, write_whole
from lightning_efficient.common.running import logs_from
from lightning_efficient.comparison.pictures import png
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.picture import draw
from lightning_efficient.demo.report import claims, export_all, table

_HERE = Path(__file__).parent
# Each is a YAML file beside this one; so is the baseline. Linear attention is for long sequences: see `claims`.
VARIANTS = (
    "sigma_reparam", "prepbn", "temp_scale", "magnitude_pruning", "hesso", "pagcp", "small_dense",
)  # fmt: skip
SEEDS = (0, 1, 2)
# One of each kind: on the weights, in place of a layer, taking units out.
QUICK_VARIANTS, QUICK_SEEDS, QUICK_EPOCHS = ("sigma_reparam", "prepbn", "hesso"), (0,), 6
METRICS = ["val_acc", "val_loss"]
PICTURE = "tour.png"


def run(
    out: Path,
    quick: bool = False,
    variants: Sequence[str] | None = None,
    console: Console | None = None,
    warm: Warm | None = None,
) -> Ablation:
    """Train the baseline and every variant with ``ablate``, compare them, and export what was trained.

    Args:
        out: Folder for logs, checkpoints, the page and exported models; ``quick`` and ``full`` do not mix in it. A tour
            that was interrupted goes on, and one that is finished is only shown again.
        quick: Three methods, one seed, a few epochs.
        variants: Some of ``VARIANTS``; ``None``: all of them, or those of ``quick``.
        console: Where to report; ``None``: the terminal.
        warm: A process that is importing already, for ``ablate``.

    Returns:
        The runs and their comparison.

    Raises:
        ImportError: scikit-learn, which brings the images, is missing.
        ValueError: The folder holds runs of other settings.
    """
    console = console or Console()
    started = time.perf_counter()
    Digits().prepare_data()
    console.print("[bold]lightning-efficient demo[/]  a small ViT on 1,797 handwritten digits, CPU", highlight=False)
    done = ablate(
        {name: read(name) for name in variants or (QUICK_VARIANTS if quick else VARIANTS)},
        None,
        [f"--config={_HERE / 'baseline.yaml'}", *[f"--trainer.max_epochs={QUICK_EPOCHS}"] * quick],
        seeds=QUICK_SEEDS if quick else SEEDS,
        out=out / ("quick" if quick else "full"),
        metrics=METRICS,
        export=True,
        console=console,
        warm=warm,
    )
    with logs_from(logging.WARNING, "lightning.pytorch"):  # what each export reports is in the runs' logs
        exported = export_all(done)
        picture = None if done.comparison is None else draw(done.comparison, exported)
        if picture is not None:
            write_whole(done.folder / PICTURE, png(picture))
        console.print(table(exported))
        for text in claims(done):
            console.print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)
    files = {"page": "report.html", "models": "exported"}
    if picture is not None:
        files["picture"] = PICTURE
    for name, file in files.items():
        console.print(f"{name:<9} {done.folder / file}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)
    return done


def read(name: str) -> dict[str, Any]:
    """The methods of a variant, or what it changes of the configuration.

    Args:
        name: One of ``VARIANTS``.
    """
    methods: dict[str, Any] = yaml.safe_load((_HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return methods

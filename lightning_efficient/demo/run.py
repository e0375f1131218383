"""``lightning-efficient demo``: the same model with and without sigmaReparam, compared, exported, drawn."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from torch import Tensor

from lightning_efficient.cli.efficient_cli import EfficientCLI
from lightning_efficient.compare import Comparison, compare
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.demo.progress import ProgressLine, one_thread, progress_bars, quiet
from lightning_efficient.demo.report import summary
from lightning_efficient.export import export, save_exported
from lightning_efficient.inference import difference

_HERE = Path(__file__).parent
VARIANTS = {"baseline": ["baseline.yaml"], "sigma_reparam": ["baseline.yaml", "sigma_reparam.yaml"]}
METRICS = ["train_loss", "val_loss", "val_acc"]
QUICK_EPOCHS = 8


class _DemoCLI(EfficientCLI):
    """Takes its arguments from the demo, whatever the process was started with."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(list[str], args))


def run(out: Path, quick: bool = False, console: Console | None = None) -> Comparison:
    """Train both variants with the same seed and data order, compare them, export the second.

    Args:
        out: Folder for logs, checkpoints, exported models and the picture. What an earlier demo left there is replaced.
        quick: A few epochs only.
        console: Where to report; ``None``: the terminal.

    Returns:
        The comparison that was printed.

    Raises:
        ImportError: scikit-learn, which brings the images, is missing.
    """
    console = console or Console()
    started = time.perf_counter()
    Digits().prepare_data()
    console.print("[bold]lightning-efficient demo[/]  a small ViT on 1,797 handwritten digits, CPU", highlight=False)
    with quiet(), one_thread():
        with progress_bars(console) as bars:
            tasks = {name: bars.add_task(name, start=False, total=None, note="") for name in VARIANTS}
            lines = {name: ProgressLine(bars, task) for name, task in tasks.items()}
            best = {name: train(name, out, quick, line) for name, line in lines.items()}
        comparison = compare([out / "logs"], METRICS, "baseline")
        console.print(summary(comparison, {name: median(line.seconds) for name, line in lines.items()}))
        for text in export_plain(best["sigma_reparam"], out / "exported", with_onnx=not quick):
            console.print(text, highlight=False, soft_wrap=True)
    comparison.figure().savefig(out / "demo.png", dpi=150)
    console.print(f"\npicture   {out / 'demo.png'}", highlight=False, soft_wrap=True)
    console.print(f"curves    tensorboard --logdir {out / 'logs'}", highlight=False, soft_wrap=True)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)
    return comparison


def train(name: str, out: Path, quick: bool, line: ProgressLine) -> Path:
    """Fit one variant and test its best checkpoint; everything comes from the YAML files beside this one.

    Args:
        name: A key of ``VARIANTS``.
        out: The demo's folder.
        quick: A few epochs only.
        line: Its line on the terminal.

    Returns:
        The best checkpoint by validation accuracy.
    """
    folder = out / "logs" / name / "seed_0"
    shutil.rmtree(folder, ignore_errors=True)
    logger = {"save_dir": str(out / "logs"), "name": name, "version": "seed_0"}
    options: list[str] = [f"-c={_HERE / file}" for file in VARIANTS[name]]
    options += [f"--trainer.logger={json.dumps({'class_path': 'TensorBoardLogger', 'init_args': logger})}"]
    options += [f"--trainer.max_epochs={QUICK_EPOCHS}"] * quick
    checkpoint = ModelCheckpoint(monitor="val_acc", mode="max")
    defaults: dict[str, Any] = {
        "callbacks": [line, checkpoint],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    cli = _DemoCLI(args=options, run=False, trainer_defaults=defaults)
    trainer: Trainer = cli.trainer
    trainer.fit(cli.model, datamodule=cli.datamodule)
    trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best", verbose=False)
    return Path(checkpoint.best_model_path)


def export_plain(checkpoint: Path, folder: Path, with_onnx: bool) -> Sequence[str]:
    """Load a checkpoint with the stock method, export the network, and say how far apart the outputs are.

    Args:
        checkpoint: Of the variant with the method on.
        folder: Where the files go.
        with_onnx: Also write ONNX, if its packages are installed.

    Returns:
        Lines for the terminal.
    """
    data = Digits()
    data.setup("test")
    images: Tensor = next(iter(data.test_dataloader()))[0]
    model = DigitsViT.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    plain = export(model.net, images)
    with torch.no_grad():
        apart = difference(model(images), plain(images))
    lines = [f"exported  a plain {type(plain).__name__}; on {len(images)} test images, {apart}"]
    suffixes = [".safetensors", ".pt2"]
    if with_onnx and all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        suffixes.append(".onnx")
    for suffix in suffixes:
        file = folder / f"digits_vit{suffix}"
        read_back = save_exported(plain, images, file, dynamic_batch=True)
        note = "equal, bit for bit" if read_back is None else str(read_back)
        lines.append(f"          {file}   read back: {note}")
    return lines

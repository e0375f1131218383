"""ffn_skip_ on trained ViTs: accuracy and time against the share of feed-forward parts that are skipped.

Eight-block ViTs are trained on digits, the threshold is calibrated on 252 validation images, and accuracy is that on
540 test images. For comparison the same share is skipped at random: of the tokens in the blocks that may skip. Time is
CPU time of a forward divided by that of the whole model in the same round, median over rounds; once more for a
ViT-Small of 196 patches, whose weights are random, as time asks only for the share that is skipped.

    OMP_NUM_THREADS=1 python benchmarks/ffn_skip.py    # some five minutes on one core
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from common import arguments, markdown, quiet, save
from matplotlib.figure import Figure
from pruning_tasks import Batches, digits
from torch import Tensor

from lightning_efficient.comparison.estimate import Difference, plus_minus
from lightning_efficient.demo import DigitsViT
from lightning_efficient.functional import ffn_skip_

DOCS = Path(__file__).parents[1] / "docs"
TARGETS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)


def trained(data: Any, seed: int, epochs: int) -> DigitsViT:
    pl.seed_everything(seed, verbose=False)
    model = DigitsViT(lr=2e-3, depth=8, warmup=0.1, pool="avg")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, Batches(data.train, 32, seed))
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitsViT, part: tuple[Tensor, Tensor]) -> float:
    return 100 * float((model(part[0]).argmax(1) == part[1]).float().mean())


def at_random(model: DigitsViT, share: float, part: tuple[Tensor, Tensor], seed: int) -> float:
    """The same share of tokens in the blocks that ``ffn_skip_`` may skip."""
    generator = torch.Generator().manual_seed(seed)
    blocks = list(model.net.blocks)[2:-1]

    def hide(module: Any, args: Any, out: Tensor) -> Tensor:
        drawn = torch.rand(out.shape[:-1], generator=generator) < share * len(model.net.blocks) / len(blocks)
        return out.masked_fill(drawn[..., None], 0)

    handles = [block.mlp.register_forward_hook(hide) for block in blocks]
    found = accuracy(model, part)
    for handle in handles:
        handle.remove()
    return found


def cpu_seconds(work: Callable[[], Any], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - start


@torch.no_grad()
def time_ratio(model: torch.nn.Module, skip: Any, images: Tensor, times: int = 64, rounds: int = 7) -> float:
    ratios = []
    for _ in range(rounds):
        spent = {}
        for skip.enabled in (True, False):
            spent[skip.enabled] = cpu_seconds(lambda: model(images), max(2, times // len(images)))
        ratios.append(spent[True] / spent[False])
    skip.enabled = True
    return statistics.median(ratios)


def at_size() -> list[dict[str, Any]]:
    """Time alone, at the size of networks in use."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").eval()
    images, rows = torch.randn(8, 3, 224, 224), []
    for target in (0.25, 0.5):
        skip = ffn_skip_(model, [images], target)
        row: dict[str, Any] = {"model": "ViT-Small", "skipped": 100 * skip.skipped}
        rows.append(row | {f"time_{n}": time_ratio(model, skip, images[:n], times=8) for n in (1, 8)})
        skip.remove()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    data = digits()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        model = trained(data, seed, args.epochs)
        whole = accuracy(model, data.test)
        for target in TARGETS:
            skip = ffn_skip_(model, [data.val], target)
            row = {"target": target, "seed": seed, "whole": whole, "accuracy": accuracy(model, data.test)}
            layers = skip.layers
            done = sum(layer.counts[0] for layer in layers) / (layers[0].counts[1] * skip.total)
            row |= {"tau": skip.tau, "skipped": 100 * done, "error": skip.error}
            row |= {f"time_{n}": time_ratio(model, skip, data.test[0][:n]) for n in (1, 64)}
            skip.remove()
            rows.append(row | {"random": at_random(model, target, data.test, seed)})
            print(rows[-1], flush=True)
    lines = []
    for target in TARGETS:
        found = [row for row in rows if row["target"] == target]
        line: dict[str, Any] = {"target": f"{target:.0%}"}
        for key in ("accuracy", "random"):
            gap = Difference(tuple(r["whole"] for r in found), tuple(r[key] for r in found), paired=True)
            line[key] = plus_minus(gap.mean, gap.half_width, "+")
        for key, digits_ in (("skipped", 1), ("error", 2), ("time_1", 2), ("time_64", 2)):
            line[key] = f"{statistics.median(r[key] for r in found):.{digits_}f}"
        lines.append(line)
    columns = {
        "target": "asked for", "skipped": "skipped so far, %", "accuracy": "accuracy, minus that of the whole model",
        "random": "skipped at random", "error": "change of the outputs", "time_1": "time, one image",
        "time_64": "time, 64 images",
    }  # fmt: skip
    whole = statistics.fmean(row["whole"] for row in rows)
    sizes = at_size()
    timed = {"model": "", "skipped": "skipped, %", "time_1": "time, one image", "time_8": "time, 8 images"}
    text = (
        f"{args.seeds} ViTs of eight blocks, 64 wide, 16 tokens, digits; whole: {whole:.2f} %\n\n"
        f"{markdown(lines, columns)}\n\n"
        f"Time is that of a forward ÷ that of the whole model. 384 wide, 197 tokens:\n\n{markdown(sizes, timed)}\n"
    )
    print(text)
    save("ffn_skip", rows, sizes=sizes).with_suffix(".md").write_text(text)
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (key, label) in enumerate((("accuracy", "by saturation"), ("random", "at random"))):
        means = [statistics.fmean(r[key] - r["whole"] for r in rows if r["target"] == t) for t in TARGETS]
        left.plot([100 * t for t in TARGETS], means, marker=".", label=label, color=f"C{number}")
        left.plot([100 * r["target"] for r in rows], [r[key] - r["whole"] for r in rows], ".", alpha=0.3,
                  color=f"C{number}")  # fmt: skip
    for key, label in (("time_1", "one image"), ("time_64", "64 images")):
        means = [statistics.median(r[key] for r in rows if r["target"] == t) for t in TARGETS]
        right.plot([100 * t for t in TARGETS], means, marker=".", label=label)
    right.axhline(1, color="black", linewidth=0.6)
    left.set(xlabel="feed-forward parts skipped, %", ylabel="test accuracy, points lost or won")
    right.set(xlabel="feed-forward parts skipped, %", ylabel="time ÷ that of the whole model")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "ffn_skip.png", dpi=110)


if __name__ == "__main__":
    main()

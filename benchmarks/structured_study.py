"""Structured pruning: HESSO in one run against train, prune, fine-tune, at equal epochs and equal parameters.

Every arm of a seed gets the same epochs in all, starts from the same weights and sees batches in an order that depends
on the seed alone. Fine-tuning runs at two learning rates; the better one on the validation images is reported, chosen
over all seeds of an arm. Test images are looked at once, by the physically smaller network. Finished runs are kept in
``benchmarks/runs/structured_study.jsonl``, one line each, so the study can be killed and continued.

    python benchmarks/structured_study.py --digits --seeds 1 --epochs 4 --models CNN   # a slice, half a minute
    python benchmarks/structured_study.py                                               # Fashion-MNIST
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from pruning_tasks import FASHION, Batches, Data, Split, accuracy, cnn, digits, fashion
from scipy import stats
from torch import Tensor, nn

from lightning_efficient import HESSOPruning
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.hesso import Pruner
from lightning_efficient.structured.slim import apply_slim

RUNS = Path(__file__).parent / "runs"
TARGETS = {"CNN": (0.8, 0.5), "ViT": (0.5,)}
FINE_TUNED = ("L2", "group magnitude", "random")
RATES = (1.0, 0.3)
HEAD = """# Structured pruning on {data}

Test accuracy in per cent and its difference to HESSO's over the same seeds, means with 95 % intervals (Student's t),
measured on the cut network. `params`: share left. {epochs} epochs in all in every arm: HESSO trains once; L2, group
magnitude and random are trained, pruned and fine-tuned; the small dense network is made as small from the start.
`rate`: learning rate of the fine-tuning that was better on the validation images, as a share of the first. `seconds`
are of a loaded machine.

"""
# Hyper-parameters of the dense training, the same in every arm.
RATE = {"CNN": 4e-3, "ViT": 2e-3}


def vit(side: int) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=side, patch_size=7 if side == 28 else 2, in_chans=1, embed_dim=48, depth=3, num_heads=3,
        mlp_ratio=4, num_classes=10,
    )  # fmt: skip


MODELS = {"CNN": cnn, "ViT": vit}
# Attention heads are left alone, so that both kinds of networks have units of one kind.
INCLUDE = {"CNN": None, "ViT": ["net.blocks.*.mlp"]}


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        models: Keys of ``MODELS``.
        seeds: How many.
        epochs: Of every arm in all; an even number.
        batch: Images a batch.
        arms: Keys of :data:`ARMS`.
    """

    models: tuple[str, ...] = ("CNN", "ViT")
    seeds: int = 5
    epochs: int = 12
    batch: int = 64
    arms: tuple[str, ...] = ("dense", "HESSO", "HESSO, CRIC", "small dense", *FINE_TUNED)

    def cells(self) -> Iterator[tuple[str, str, float, float, int]]:
        """Model, arm, target, share of the learning rate in fine-tuning, seed.

        Seeds outermost, and first of all one target at one rate: an incomplete study has complete comparisons.
        """
        everything = [
            (target in (0.0, TARGETS[model][0]) and rate == 1.0, seed, model, arm, target, rate)
            for seed in range(self.seeds)
            for model in self.models
            for arm in self.arms
            for target in ((0.0,) if arm == "dense" else TARGETS[model])
            for rate in (RATES if arm in FINE_TUNED else (1.0,))
        ]
        for _, seed, model, arm, target, rate in sorted(everything, key=lambda cell: (not cell[0], cell[1])):
            yield model, arm, target, rate, seed


class Module(pl.LightningModule):
    """AdamW, the rate down to zero by a cosine over the run."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.05)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Study:
    """One data set, with the dense half-trained networks that several arms start from."""

    def __init__(self, data: Data, plan: Plan) -> None:
        self.data, self.plan = data, plan
        self.side = data.train[0].shape[-1]
        self._half: dict[tuple[str, int], nn.Module] = {}
        self._keep: dict[tuple[str, float, int], dict[str, list[int]]] = {}

    def fresh(self, model: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MODELS[model](self.side)

    def train(self, model: str, net: nn.Module, epochs: int, seed: int, rate: float = 1.0, *more: Callback) -> Module:
        module = Module(net, RATE[model] * rate)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=list(more),
        )  # fmt: skip
        torch.manual_seed(seed)
        trainer.fit(module, Batches(self.data.train, self.plan.batch, seed))
        return module.eval()  # type: ignore[no-any-return]

    def half(self, model: str, seed: int) -> nn.Module:
        """Trained for half of the epochs."""
        if (model, seed) not in self._half:
            self._half[model, seed] = self.train(model, self.fresh(model, seed), self.plan.epochs // 2, seed).net
        return deepcopy(self._half[model, seed])

    def groups(self, module: Module, model: str) -> Groups:
        example = self.data.train[0][:2]
        return find_groups(module, example, INCLUDE[model])

    def hesso(self, model: str, target: float, seed: int, cric: bool = False) -> tuple[Module, dict[str, Any]]:
        more = {"cric": True} if cric else {}
        callback = HESSOPruning(target=target, unit="params", include=INCLUDE[model], **more)  # type: ignore[arg-type]
        module = self.train(model, self.fresh(model, seed), self.plan.epochs, seed, 1.0, callback)
        keep = callback.keep
        if not cric:
            self._keep[model, target, seed] = keep
        return module, self.cut(module, keep, callback.groups)

    def cut(self, module: Module, keep: dict[str, list[int]], groups: Groups) -> dict[str, Any]:
        """Take the units out, and compare with the network in which they are zero."""
        x = self.data.val[0][:256]
        with torch.no_grad():
            masked = module.net(x)
            apply_slim(module, keep, groups)
            return {"masked_minus_cut": float((module.net(x) - masked).abs().max()), "keep": keep}

    def fine_tuned(self, model: str, arm: str, target: float, rate: float, seed: int) -> tuple[Module, dict[str, Any]]:
        """Train half of the epochs, cut at once, train the other half."""
        module = Module(self.half(model, seed), RATE[model])
        groups = self.groups(module, model)
        pruner = Pruner(groups, "params", cost=Cost.parameters(module, groups.found))
        scores = {name: score(arm, group, module, seed) for name, group in groups.found.items()}
        none = {name: torch.zeros(group.units, dtype=torch.bool) for name, group in groups.found.items()}
        gone = pruner.choose(scores, none, target)
        apply_slim(module, {name: (~where).nonzero().flatten().tolist() for name, where in gone.items()}, groups)
        epochs = self.plan.epochs - self.plan.epochs // 2
        return self.train(model, module.net, epochs, seed + 1000, rate), {}

    def small(self, model: str, target: float, seed: int) -> tuple[Module, dict[str, Any]]:
        """The widths that HESSO found, from scratch."""
        if (model, target, seed) not in self._keep:
            self.hesso(model, target, seed)
        module = Module(self.fresh(model, seed), RATE[model])
        apply_slim(module, self._keep[model, target, seed], self.groups(module, model))
        for layer in module.modules():  # initial weights for the widths that the layers have now
            if model == "CNN" and isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
        return self.train(model, module.net, self.plan.epochs, seed), {}

    def run(self, model: str, arm: str, target: float, rate: float, seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        dense = sum(p.numel() for p in self.fresh(model, seed).parameters())
        more: dict[str, Any] = {}
        if arm == "dense":
            module = self.train(model, self.fresh(model, seed), self.plan.epochs, seed)
        elif arm == "small dense":
            module, more = self.small(model, target, seed)
        elif arm in FINE_TUNED:
            module, more = self.fine_tuned(model, arm, target, rate, seed)
        else:
            module, more = self.hesso(model, target, seed, cric=arm == "HESSO, CRIC")
        with torch.no_grad():
            val, test = (accuracy(module.eval(), split) for split in (self.data.val, self.data.test))
        return {
            "data": self.data.name, "model": model, "arm": arm, "target": target, "rate": rate, "seed": seed,
            "epochs": self.plan.epochs, "params": sum(p.numel() for p in module.parameters()), "dense_params": dense,
            "val_acc": val, "test_acc": test, "seconds": time.perf_counter() - start, **more,
        }  # fmt: skip


def score(arm: str, group: UnitGroup, module: nn.Module, seed: int) -> Tensor:
    """What each unit is worth before it is cut at once: the norm of the layer that makes it; the norm of everything
    that is coupled, divided by the mean of its group, as DepGraph's group criterion does; or chance."""
    params = dict(module.named_parameters())
    if arm == "random":
        g = torch.Generator().manual_seed(seed + sum(map(ord, group.name)))
        return torch.rand(group.units, generator=g)
    parts = group.produced if arm == "L2" else group.slices
    rows = [part.rows(params[part.name].detach()) for part in parts if part.name in params]
    if arm == "L2":
        return max(rows, key=lambda r: r.shape[1]).norm(dim=1)
    norms = torch.cat(rows, 1).norm(dim=1)
    return norms / norms.mean()


def key_of(row: dict[str, Any]) -> str:
    return json.dumps([row[k] for k in ("data", "model", "arm", "target", "rate", "seed", "epochs")])


def study(data: Data, plan: Plan, budget: float = math.inf) -> list[dict[str, Any]]:
    """Run what is missing, for at most ``budget`` seconds."""
    file = RUNS / "structured_study.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done, start, bench = {key_of(row) for row in rows}, time.perf_counter(), Study(data, plan)
    for model, arm, target, rate, seed in plan.cells():
        cell = {"data": data.name, "model": model, "arm": arm, "target": target, "rate": rate, "seed": seed}
        if key_of(cell | {"epochs": plan.epochs}) in done or time.perf_counter() - start > budget:
            continue
        rows.append(bench.run(model, arm, target, rate, seed))
        with file.open("a") as f:
            f.write(json.dumps(rows[-1]) + "\n")
        print(f"{time.perf_counter() - start:6.0f} s", {k: rows[-1][k] for k in ("model", "arm", "target", "rate", "seed", "test_acc")}, flush=True)  # noqa: E501  # fmt: skip
    return [r for r in rows if r["data"] == data.name and r["epochs"] == plan.epochs and r["model"] in plan.models]


def chosen(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """(model, target, arm) → its runs, at the learning rate that was better on the validation images."""
    cells: dict[tuple[str, float, str], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["target"], row["arm"]), {}).setdefault(row["rate"], []).append(row)
    return {
        cell: max(rates.values(), key=lambda runs: (len(runs), float(np.mean([r["val_acc"] for r in runs]))))
        for cell, rates in cells.items()
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a model, target and arm: accuracy, and its difference to HESSO's over the seeds that both have."""
    cells, lines = chosen(rows), []
    for (model, target, arm), runs in sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1])):
        mean, half = interval([100 * r["test_acc"] for r in runs])
        line: dict[str, Any] = {
            "model": model, "target": target, "arm": arm, "seeds": len(runs), "rate": runs[0]["rate"],
            "params": round(float(np.mean([r["params"] / r["dense_params"] for r in runs])), 3),
            "test": f"{mean:.2f} ± {half:.2f}", "seconds": round(float(np.mean([r["seconds"] for r in runs])), 1),
        }  # fmt: skip
        base = {r["seed"]: r["test_acc"] for r in cells.get((model, target, "HESSO"), [])}
        pairs = [100 * (base[r["seed"]] - r["test_acc"]) for r in runs if r["seed"] in base]
        if pairs and arm != "HESSO":
            mean, half = interval(pairs)
            line["HESSO minus it"] = f"{mean:+.2f} ± {half:.2f}"
        lines.append(line)
    return lines


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy against the parameters left, one panel a model."""
    models = sorted({row["model"] for row in rows})
    figure = Figure(figsize=(5.2 * len(models), 4), layout="constrained")
    cells = chosen(rows)
    arms = [arm for arm in Plan().arms if arm != "dense" and any(cell[2] == arm for cell in cells)]
    for i, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), i + 1)
        for number, arm in enumerate(arms):
            points = []
            for (m, _, a), runs in sorted(cells.items(), key=lambda cell: cell[0][1]):
                if (m, a) == (model, arm):
                    left = float(np.mean([100 * r["params"] / r["dense_params"] for r in runs]))
                    points.append((left, *interval([100 * r["test_acc"] for r in runs])))
            if points:
                x, y, half = zip(*points, strict=True)
                shift = [v * (1 + 0.02 * (number - len(arms) / 2)) for v in x]
                axes.errorbar(shift, y, np.nan_to_num(half), marker="o", ms=4, lw=1.2, capsize=2, label=arm)
        if dense := cells.get((model, 0.0, "dense")):
            axes.axhline(100 * float(np.mean([r["test_acc"] for r in dense])), color="0.5", ls="--", label="dense")
        axes.set(xscale="log", xlabel="parameters left, %", ylabel="test accuracy, %", title=model)
        ticks = [20, 50] if model == "CNN" else [40, 50, 60]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--epochs", type=int, default=Plan.epochs)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=list(Plan.arms), default=list(Plan.arms))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further run is begun")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = digits() if args.digits else fashion(args.data)
    plan = Plan(tuple(args.models), args.seeds, args.epochs, arms=tuple(args.arms))
    rows = study(data, plan, args.budget)
    lines = table(rows)
    name = "structured_study" + ("_digits" if args.digits else "")
    path = common.save(name, rows, table=lines, plan=vars(plan), data=data.name)
    picture(rows).savefig(path.with_suffix(".png"), dpi=150)
    columns = ("model", "target", "arm", "params", "test", "HESSO minus it", "rate", "seeds", "seconds")
    text = common.markdown([{c: line.get(c, "") for c in columns} for line in lines], {c: c for c in columns})
    path.with_suffix(".md").write_text(HEAD.format(data=data.name, epochs=plan.epochs) + text + "\n")
    print(text)
    print(path)


if __name__ == "__main__":
    main()

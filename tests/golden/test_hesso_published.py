"""``HESSOPruning(published=True)`` against the published code's description, step by step in float64."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import HESSOPruning

LR, START, D, PERIODS, STEPS = 0.05, 3, 4, 3, 20
WIDTHS = (7, 9)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = [5, *WIDTHS, 3]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(sizes):
                layers += [nn.Linear(a, b), nn.ReLU()]
            self.net = nn.Sequential(*layers[:-1]).double()

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x[:, :3].sin()).square().mean()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def _data() -> Tensor:
    return torch.randn(STEPS * 4, 5, generator=torch.Generator().manual_seed(1)).double()


def _published(target: float, divisible: int) -> list[list[Tensor]]:
    """Weights after each step. A unit is a row of a weight with its bias; everything in the order of the layers."""
    module = Module()
    layers = [module.net[0], module.net[2]]
    total = sum(WIDTHS)
    count = int(total * min(target, 0.999))
    shares = [count // PERIODS] * (PERIODS - 1) + [count - (PERIODS - 1) * (count // PERIODS)]
    taken: list[int] = []  # the code notes what it chose before it rounds, and what it rounds away stays noted
    pruned: list[set[int]] = [set(), set()]
    active: list[list[int]] = [[], []]
    trail = []
    for n, x in enumerate(_data().split(4), start=1):
        module.zero_grad()
        module.loss(x).backward()
        if n >= START and (n - START - 1) % D == 0 and shares:
            rows = [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in layers]
            grads = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in layers]
            parts: list[list[Tensor]] = [[], [], [], [], []]
            for w, g in zip(rows, grads, strict=True):
                dot = (w * g).sum(1)
                both = w.norm(dim=1) * g.norm(dim=1)
                for part, value in zip(
                    parts,
                    (w.norm(dim=1), w.norm(dim=1) / w.shape[1], torch.where(both > 0, dot / both, 0.0) + 1,
                     dot.abs(), dot.square() / 2),
                    strict=True,
                ):  # fmt: skip
                    part.append(value)
            scores = sum(0.2 * torch.cat(part) / torch.cat(part).norm() for part in parts)
            share = shares.pop(0)
            lowest = scores.topk(len(taken) + share, largest=False).indices.tolist()  # type: ignore[union-attr]
            chosen = sorted(set(lowest) - set(taken))[:share]
            taken += chosen
            for i, offset in enumerate((0, WIDTHS[0])):
                mine = [c - offset for c in chosen if offset <= c < offset + WIDTHS[i]]
                left = WIDTHS[i] - len(pruned[i])
                after = left - len(mine)
                if mine and (after % divisible or after <= 0):
                    after = min(max(after // divisible + 1, 1) * divisible, left)
                active[i] = mine[: left - after]
        t = (n - START) % D
        with torch.no_grad():
            for p in module.parameters():
                p -= LR * p.grad
            for layer, going, gone in zip(layers, active, pruned, strict=True):
                factor = (D - t - 1) / (D - t)
                for tensor in (layer.weight, layer.bias):
                    tensor[going] *= factor
                    tensor[sorted(gone)] = 0
        if n >= START and t == D - 1:
            for going, gone in zip(active, pruned, strict=True):
                gone |= set(going)
                going.clear()
        trail.append([p.detach().clone() for p in module.parameters()])
    return trail


@pytest.mark.parametrize(("target", "divisible"), [(0.6, 1), (0.45, 1), (0.8, 1)])
def test_every_step_is_the_published_one(target: float, divisible: int) -> None:
    trail: list[list[Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            trail.append([p.detach().clone() for p in pl_module.parameters()])

    module = Module()
    hesso = HESSOPruning(
        target=target, start=START, duration=D * PERIODS, periods=PERIODS, group_divisible=divisible, published=True
    )
    Trainer(
        max_steps=STEPS, callbacks=[hesso, Keep()], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, precision="64-true",
    ).fit(module, DataLoader(TensorDataset(_data()), batch_size=4))  # fmt: skip
    expected = _published(target, divisible)
    for step, (ours, theirs) in enumerate(zip(trail, expected, strict=True)):
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12, msg=lambda m, s=step: f"step {s + 1}: {m}")
    assert sum(int((p == 0).all(1).sum()) for p in trail[-1] if p.ndim == 2) == int(sum(WIDTHS) * target)

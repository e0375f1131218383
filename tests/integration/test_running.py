"""Methods that run the user's module outside its loop, on models and runs that make it hard.

Each cell is a method on a run with one trait, against the same run where the trait is not needed (inputs prepared in
the data set, say): both must come to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from sigma_runs import Do, differing, trainer, weights
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_efficient import (
    CollapseMonitor,
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PRepBN,
    RepresentationMonitor,
    SAPPruning,
    SimplifiedLinearAttention,
    TempScale,
)
from lightning_efficient.trainer.replay import EmptyLoaderError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_.*_batch_transfer`"),
    pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero"),
]

SHIFT, SCALE = 3.0, 2.0
SIDE, TOKENS, WIDTH, CLASSES = 3, 9, 8, 3


class Grid(nn.Module):
    """A transformer block over a 3 x 3 grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(WIDTH, 2)
        self.attn.fused_attn = False  # fused attention has no second derivative on the CPU
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attn(self.norm1(h))
        h = h + self.down(F.silu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


class Task(pl.LightningModule):
    """A classifier as users write it.

    Args:
        prepare: Where inputs become what the network was made for: in the ``"data"``, or in the hook ``"before"`` or
            ``"after"`` the transfer.
        penalty: Weight of a gradient penalty on the inputs; None: there is none.
        teacher: Have a frozen reference network.
    """

    def __init__(self, prepare: str = "data", penalty: float | None = None, teacher: bool = False) -> None:
        super().__init__()
        self.prepare, self.penalty = prepare, penalty
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Grid()
        self.teacher = Grid().requires_grad_(False).eval() if teacher else None

    def _prepared(self, batch: Any, where: str) -> Any:
        return {**batch, "x": (batch["x"] - SHIFT) / SCALE} if self.prepare == where else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._prepared(batch, "before")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._prepared(batch, "after")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"] if self.penalty is None else batch["x"].requires_grad_()
        logits = self.net(x)
        loss = F.cross_entropy(logits, batch["y"])
        if self.teacher is not None:
            loss = loss + 0.1 * (logits - self.teacher(x)).square().mean()
        if self.penalty is not None:
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            loss = loss + self.penalty * slope.square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch["x"]), batch["y"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2, eps=1e-4)


def loader(prepared: bool, batches: int = 8, size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, TOKENS, 4, generator=g) * SCALE + SHIFT
    y = (x.mean((1, 2)) - SHIFT).mul(3).add(1).round().clamp(0, CLASSES - 1).long()
    if prepared:
        x = (x - SHIFT) / SCALE
    rows = [{"x": a, "y": b} for a, b in zip(x.to(dtype), y, strict=True)]
    return DataLoader(rows, size)  # type: ignore[arg-type]


METHODS: dict[str, Callable[[], Any]] = {
    "prepbn": lambda: PRepBN(transition=4, hold=1),
    "temp_scale": lambda: TempScale(tau=0.5),
    "hesso": lambda: HESSOPruning(target=0.3, start=2, duration=4, periods=2),
    "hesso macs": lambda: HESSOPruning(target=0.2, unit="macs", start=2, duration=4, periods=2),
    "cric": lambda: HESSOPruning(target=0.3, start=2, duration=6, periods=2, cric=True),
    "pagcp": lambda: PAGCPPruning(budgets={"val_loss": 0.2}, start=4),
    "linear attention": lambda: SimplifiedLinearAttention(grid=SIDE, kernel_size=3),
    "monitor": lambda: CollapseMonitor(every_n_steps=2),
    "representation": lambda: RepresentationMonitor(module="net.embed", metrics=["rankme"]),
    "wanda": lambda: MagnitudePruning(amount=0.3, criterion="wanda", scope="layer"),
    "taylor": lambda: MagnitudePruning(amount=0.3, criterion="taylor", scope="layer"),
}


class Data(pl.LightningDataModule):
    """Prepares inputs in its own hook, which comes before the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.data = loader(prepared=False)

    def train_dataloader(self) -> Any:
        return self.data

    def val_dataloader(self) -> Any:
        return self.data

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": (batch["x"] - SHIFT) / SCALE}


METHODS["sap"] = lambda: SAPPruning(iterations=2, scope="layer")


def fitted(root: Path, method: str, module: Task, data: DataLoader[Any] | Data, **kwargs: Any) -> dict[str, Tensor]:
    """Weights, statistics and logged numbers after ten steps."""
    t = trainer(root, METHODS[method](), max_steps=10, **kwargs)
    t.fit(module, datamodule=data) if isinstance(data, Data) else t.fit(module, data, data)
    state = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    return state | {k: torch.as_tensor(float(v)) for k, v in t.callback_metrics.items()}


@pytest.mark.parametrize("method", METHODS)
def test_inputs_prepared_in_a_hook(tmp_path: Path, method: str) -> None:
    expected = fitted(tmp_path, method, Task(), loader(prepared=True))
    for where in ("before", "after", "data module"):
        data = Data() if where == "data module" else loader(prepared=False)
        assert differing(fitted(tmp_path, method, Task(where), data), expected) == [], where


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", pytest.param("16-true", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("method", METHODS)
def test_in_true_precision(tmp_path: Path, method: str, precision: Any) -> None:
    """A loader of float32 is as good as one of what the precision plugin makes of it."""
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "16-true": torch.float16}[precision]
    expected = fitted(tmp_path, method, Task(), loader(prepared=True, dtype=dtype), precision=precision)
    found = fitted(tmp_path, method, Task(), loader(prepared=True), precision=precision)
    assert found["net.embed.weight"].dtype == dtype
    assert differing(found, expected) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_asks_for_gradients(tmp_path: Path, method: str) -> None:
    """A penalty of weight zero takes gradients and changes nothing."""
    expected = fitted(tmp_path, method, Task(), loader(prepared=True))
    assert differing(fitted(tmp_path, method, Task(penalty=0.0), loader(prepared=True)), expected) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*leaves .* alone")
def test_a_frozen_reference_network(tmp_path: Path, method: str) -> None:
    module = Task(teacher=True)
    assert module.teacher is not None
    before = weights(module.teacher)  # type: ignore[arg-type]
    fitted(tmp_path, method, module, loader(prepared=True))
    after = module.teacher.state_dict()
    assert [name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])] == []
    assert not any(parameter.requires_grad for name, parameter in module.teacher.named_parameters() if name in before)
    assert not module.teacher.training


class Gan(pl.LightningModule):
    """A Wasserstein GAN with a gradient penalty, as it has to be written: with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(
                nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)
            )
            self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch["x"][:, 0]
        for_generator, for_critic = self.optimizers()
        rates = self.lr_schedulers()
        fake = self.generator(torch.randn(len(real), 3))
        self.toggle_optimizer(for_critic)
        between = (real + fake.detach()).div(2).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean() + (slope.norm(dim=1) - 1).square().mean()
        for_critic.zero_grad()
        self.manual_backward(loss)
        assert all(p.grad is not None for p in self.critic.parameters())
        self.clip_gradients(for_critic, gradient_clip_val=1.0)
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        for group in for_generator.param_groups:
            group["lr"] *= 0.5
        with for_generator.toggle_model():
            loss = -self.critic(fake).mean()
            for_generator.zero_grad()
            self.manual_backward(loss)
            for_generator.step()
        rates.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.critic(batch["x"][:, 0]).square().mean())

    def configure_optimizers(self) -> Any:
        first, second = (torch.optim.AdamW(n.parameters(), 1e-3) for n in (self.generator, self.critic))
        return [first, second], [torch.optim.lr_scheduler.StepLR(second, 2, 0.5)]


def learning_rates(root: Path, *callbacks: Any) -> list[list[float]]:
    """Of both optimizers, after each batch."""
    rates: list[list[float]] = []
    look = Do(on_train_batch_end=lambda t, m: rates.append([o.param_groups[0]["lr"] for o in t.optimizers]))
    t = trainer(root, *callbacks, look, max_steps=12)
    t.fit(Gan(), loader(prepared=True), loader(prepared=True, batches=1))
    return rates


@pytest.mark.parametrize("method", ["prepbn", "hesso", "pagcp"])
def test_a_step_that_optimizes_by_itself(tmp_path: Path, method: str) -> None:
    """Both networks are found, and optimizers and schedulers step in the loop alone."""
    callback = METHODS[method]()
    assert learning_rates(tmp_path, callback) == learning_rates(tmp_path)
    if method != "prepbn":
        assert set(callback.groups.found) == {"generator.0", "critic.0"}


NEEDS_A_BATCH = {"temp_scale", "hesso", "hesso macs", "cric"}


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_loader(tmp_path: Path, method: str) -> None:
    empty: Any = DataLoader([], 4)
    if method == "pagcp":
        with pytest.raises(ValueError, match="checked on validation data, and there is none"):
            fitted(tmp_path, method, Task(), empty)
    elif method in NEEDS_A_BATCH:
        with pytest.raises(EmptyLoaderError, match=r"`train_dataloader` of this run \(DataLoader\) gave no batch"):
            fitted(tmp_path, method, Task(), empty)
    else:
        untouched = Task().state_dict()
        after = fitted(tmp_path, method, Task(), empty)
        assert (
            differing(
                {k: v for k, v in after.items() if k in untouched}, {k: v for k, v in untouched.items() if k in after}
            )
            == []
        )


class Nothing(IterableDataset[Any]):
    """A stream whose end is not known before it comes, at once."""

    def __iter__(self) -> Any:
        return iter(())


def test_an_empty_stream(tmp_path: Path) -> None:
    full, empty = loader(prepared=True), DataLoader(Nothing(), 4)
    with pytest.raises(EmptyLoaderError, match="`train_dataloader` of this run"):
        trainer(tmp_path, METHODS["temp_scale"]()).fit(Task(), empty, full)
    with pytest.raises(EmptyLoaderError, match=r"`val_dataloader` of this run.*`limit_val_batches`"):
        trainer(tmp_path, METHODS["pagcp"]()).fit(Task(), full, empty)
    with pytest.raises(EmptyLoaderError, match="`limit_train_batches=0` leaves none"):
        trainer(tmp_path, METHODS["temp_scale"](), limit_train_batches=0).fit(Task(), full, full)

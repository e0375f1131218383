"""The pictures of the monitors' cards: models of real digits, and of real texts, written to ``docs/``.

python benchmarks/monitors_on_digits.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches_by_length import Encoder, texts
from common import arguments, quiet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import (
    ModuleTimer,
    NeuralCollapseMonitor,
    PaddingReport,
    PosteriorCollapseMonitor,
    RepresentationMonitor,
    StateDriftMonitor,
)
from lightning_efficient.common.running import evaluating
from lightning_efficient.demo import Digits, DigitsViT
from lightning_efficient.metrics import NeuralCollapse, PosteriorCollapse, StateDrift
from lightning_efficient.metrics.functional import predict_active_units, singular_values, uniformity

DOCS = Path(__file__).parents[1] / "docs"


class History(Callback):
    """The monitored values of every epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append({k.rpartition("/")[2]: float(v) for k, v in trainer.callback_metrics.items()})


def fit(model: LightningModule, monitor: Callback, epochs: int) -> list[dict[str, float]]:
    history = History()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
            callbacks=[monitor, history], enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, datamodule=Digits())
    return history.rows


def save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    print(DOCS / f"{name}.png")


def validation() -> tuple[Tensor, Tensor]:
    data = Digits()
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    return images, labels


class Views(LightningModule):
    """Two shifted and noisy views of a digit shall agree; without the term that spreads them, they collapse."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch[0]
        views = [torch.roll(x, int(torch.randint(-1, 2, ())), 3) + 0.1 * torch.randn_like(x) for _ in range(2)]
        one, two = (F.normalize(self.encoder(view), dim=1) for view in views)
        loss = (one - two).square().sum(1).mean()
        return loss + self.spread * (uniformity(one) + uniformity(two)) / 2 if self.spread else loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.encoder(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def representation() -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, spread in (("alignment and uniformity", 1.0), ("alignment alone", 0.0)):
        seed_everything(0, verbose=False)
        model = Views(spread)
        rows = fit(model, RepresentationMonitor(module="encoder", metrics=["rankme"], center=True), 20)
        left.plot(range(1, len(rows) + 1), [row["rankme"] for row in rows], label=label)
        with torch.no_grad():
            values = singular_values(model.encoder(validation()[0]).double(), center=True)
        right.plot(range(1, len(values) + 1), values / values[0], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="RankMe, centred", ylim=(0, None))
    right.set(xlabel="rank", ylabel="singular value, relative", yscale="log")
    left.legend(frameon=False)
    save(figure, "representation_monitor")


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(n, 128), nn.BatchNorm1d(128), nn.ReLU()) for n in (64, 128, 128)]
        self.net = nn.Sequential(nn.Flatten(), *blocks)
        self.head = nn.Linear(128, 10)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=2e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]


def neural() -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    seed_everything(0, verbose=False)
    model, data = Classifier(), Digits()
    data.setup("fit")
    images, labels = (torch.stack([torch.as_tensor(row[i]) for row in data.parts[0]]) for i in (0, 1))

    def cosines() -> Tensor:
        metric = NeuralCollapse(10)
        with evaluating(model):
            metric.update(model.net(images), labels)
        return metric.cosines()

    before = cosines()
    rows = fit(model, NeuralCollapseMonitor(stage="train"), 100)
    for name in ("nc1", "nc2", "nc3", "nc4"):
        axes[0].plot(range(1, len(rows)), [row[name] for row in rows[1:]], label=name)
    axes[0].set(xlabel="epoch", yscale="log", title="training digits")
    axes[0].legend(frameon=False)
    for panel, values, title in ((axes[1], before, "before training"), (axes[2], cosines(), "after 100 epochs")):
        picture = panel.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        panel.set(title=f"class means, {title}", xlabel="class")
    figure.colorbar(picture, ax=axes[2])
    save(figure, "neural_collapse_monitor")


class Autoencoder(LightningModule):
    """Sixteen latent units for digits of 64 pixels."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def training_step(self, batch: Any, index: int) -> Tensor:
        mu, logvar = self.encoder(batch[0]).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1)
        return (0.5 * (self.decoder(z) - batch[0].flatten(1)).square().sum(1) + self.beta * kl).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def posterior() -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    images = validation()[0].flatten(1).double()
    spectrum = torch.linalg.eigvalsh(torch.cov(images.t())).clamp(min=0)
    for beta in (0.25, 1.0, 4.0):
        seed_everything(0, verbose=False)
        model = Autoencoder(beta)
        rows = fit(model, PosteriorCollapseMonitor(mu="encoder"), 60)
        metric = PosteriorCollapse()
        with torch.no_grad():
            metric.update(*model.encoder(validation()[0]).chunk(2, 1))
        found, linear = metric.compute(), predict_active_units(spectrum, beta, units=16)
        label = f"β = {beta:g} (a linear decoder keeps {linear})"
        left.plot(range(1, len(rows) + 1), [row["active_units"] for row in rows], label=label)
        right.plot(found["eps"], found["collapsed_curve"], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="active units of 16", ylim=(0, 16.5))
    right.set(xlabel="eps, nats", ylabel="share of units collapsed", xscale="log")
    left.legend(frameon=False, fontsize=8)
    save(figure, "posterior_collapse_monitor")


class Memory(nn.Module):
    """States ``S_t = a_t S_{t-1} + v_t k_tᵀ`` of eight heads, each with a forgetting factor that the input sets."""

    HEADS, SIZE = 8, 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.Linear(width, 2 * self.HEADS * self.SIZE)
        self.forget = nn.Linear(width, self.HEADS)
        nn.init.uniform_(self.forget.bias, 2.0, 8.0)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.parts(x).view(*x.shape[:2], self.HEADS, -1).chunk(2, 3)
        added, a = v[..., :, None] * k[..., None, :], self.forget(x).sigmoid()[..., None, None]
        states, state = [], torch.zeros_like(added[:, 0])
        for token in range(x.shape[1]):
            state = a[:, token] * state + added[:, token]
            states.append(state)
        return torch.stack(states, 1)


class Pixels(LightningModule):
    """Reads the pixels of digits that follow each other, and names the next one; validated on 16 of them."""

    def __init__(self, digits: int) -> None:
        super().__init__()
        self.digits, width = digits, 32
        self.embed, self.memory = nn.Embedding(5, width), Memory(width)
        self.query, self.out = nn.Linear(width, 64), nn.Linear(64 + width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        read = self.memory(x) @ self.query(x).view(*ids.shape, 8, 8, 1)
        return self.out(torch.cat([read.flatten(2), x], 2))  # type: ignore[no-any-return]

    def sequences(self, images: Tensor, digits: int) -> Tensor:
        ids = (images.flatten(1) * 4).round().long().clamp(0, 4)
        return ids[: len(ids) // digits * digits].view(-1, 64 * digits)

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self.sequences(batch[0], self.digits))

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(self.sequences(batch[0][:64], 16)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def drift() -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, digits in zip(panels[1:], (1, 8), strict=True):
        seed_everything(0, verbose=False)
        model, length = Pixels(digits), 64 * digits
        rows = fit(model, StateDriftMonitor(module="memory", train_length=length, max_length=1024), 4)
        panels[0].plot(
            range(1, len(rows) + 1), [row["ratio_max"] for row in rows], marker=".", label=f"trained on {length} pixels"
        )
        metric = StateDrift(length, 1024, bucket=16)
        with torch.no_grad():
            metric.update(model.memory(model.embed(model.sequences(validation()[0][:64], 16))))
        found = metric.compute()
        panel.plot(found["tokens"], found["curve"], linewidth=1)
        panel.axvline(length, color="black", linewidth=0.8, linestyle=":")
        panel.set(xlabel="pixels read", ylabel="variance of a head's state", yscale="log")
        panel.set_title(f"trained on {length} pixels, loss {rows[-1]['val_loss']:.2f}", fontsize=10)
    panels[0].set(xlabel="epoch", ylabel="ratio_max", ylim=(0, None), xticks=range(1, 5))
    panels[0].legend(frameon=False)
    save(figure, "state_drift_monitor")


class Reader(LightningModule):
    """Paragraphs of Python's documentation, padded."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.net = Encoder(words)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch["ids"])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def drawn(model: LightningModule, callback: Callback, data: Any, epochs: int, name: str) -> None:
    """The picture that a callback puts into TensorBoard."""
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, "log", "0")
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, logger=logger, enable_checkpointing=False, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(model, **({"datamodule": data} if isinstance(data, Digits) else {"train_dataloaders": data}))
        logger.finalize("success")
        events = EventAccumulator(str(Path(folder, "log", "0")), {"images": 0}).Reload()
        (tag,) = (tag for tag in events.Tags()["images"] if f"/{callback.method}/" in tag)  # type: ignore[attr-defined]
        (DOCS / f"{name}.png").write_bytes(events.Images(tag)[0].encoded_image_string)
    print(DOCS / f"{name}.png")


def padding() -> None:
    seed_everything(0, verbose=False)
    data = texts()[:512]

    def collate(some: list[Tensor]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
        return {"ids": ids, "attention_mask": (ids > 0).long()}

    report = PaddingReport()
    words = max(int(text.max()) for text in data) + 1
    loader: DataLoader[Any] = DataLoader(data, 16, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    drawn(Reader(words), report, loader, 1, "padding_report")
    print(report.advice)


def timer() -> None:
    seed_everything(0, verbose=False)
    drawn(DigitsViT(depth=2), ModuleTimer(every_n_steps=10, table=False), Digits(batch_size=64), 2, "module_timer")


FIGURES: dict[str, Callable[[], None]] = {
    "representation": representation, "neural": neural, "posterior": posterior, "drift": drift, "padding": padding,
    "timer": timer,
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=list(FIGURES))
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    for name, draw in FIGURES.items():
        if args.only in (None, name):
            draw()


if __name__ == "__main__":
    main()

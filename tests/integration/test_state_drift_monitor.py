"""StateDriftMonitor in a real Trainer: recurrent layers, cells, packed and padded sequences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_efficient import StateDriftMonitor
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.metrics import StateDrift

TRAIN, LONG, WIDTH = 6, 20, 8
PREFIX = "efficient/state_drift_monitor"


class Memory(nn.Module):
    """Adds up outer products and forgets nothing: ``(samples, tokens, 2 heads, 4, 4)``, token by token or at once."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        parts = x.unflatten(-1, (2, 4))
        states = torch.einsum("...hp,...hn->...hpn", parts, parts).cumsum(1)
        return states if state is None else state + states


class Reader(LightningModule):
    """Sequences are read by a GRU, a memory, and a cell."""

    def __init__(self, how: str = "whole") -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Linear(3, WIDTH)
        self.gru, self.first = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.GRU(WIDTH, WIDTH)
        self.memory, self.cell, self.head = Memory(), nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.embed(x)
        if self.how == "packed":
            packed = pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out = pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        else:
            out = self.gru(h)[0]
            self.first(h.transpose(0, 1))
        state = None
        for part in h.split(5, 1):
            state = self.memory(part, None if state is None else state[:, -1:])
        hidden = torch.zeros_like(h[:, 0])
        for token in h.unbind(1):
            hidden = self.cell(token, hidden)
        if not self.training:
            self.seen.append(out.detach())
        return self.head(out.mean(1) + hidden)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch["x"], batch["length"]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data(tokens: int = LONG, count: int = 10) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(3)
    rows = [{"x": torch.randn(tokens, 3, generator=g), "length": tokens - i % 5} for i in range(count)]
    return DataLoader(rows, 4)  # type: ignore[arg-type]


def fit(
    root: Path, *callbacks: Callback, how: str = "whole", tokens: int = LONG, **options: Any
) -> tuple[Trainer, Reader]:
    seed_everything(5, verbose=False)
    model = Reader(how)
    trainer = Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=list(callbacks), **{"max_epochs": 2, "enable_checkpointing": False, "logger": False} | options,
    )  # fmt: skip
    trainer.fit(model, data(TRAIN, 12), data(tokens))
    return trainer, model


def logged(trainer: Trainer) -> dict[str, float]:
    return {k.removeprefix(f"{PREFIX}/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(PREFIX)}


@pytest.mark.parametrize(("module", "how"), [("gru", "whole"), ("first", "whole"), ("gru", "packed")])
def test_recurrent_layers(module: str, how: str, tmp_path: Path) -> None:
    monitor = StateDriftMonitor(module=module, train_length=TRAIN, heads=2, time_axis=0 if module == "first" else 1)
    trainer, model = fit(tmp_path, monitor, how=how)
    assert logged(trainer)["samples"] == 10
    if module == "gru":
        metric = StateDrift(TRAIN)
        for out, batch in zip(model.seen[-3:], data(), strict=True):
            inside = torch.arange(out.shape[1])[None] < batch["length"][:, None]
            metric.update(out.unflatten(2, (2, -1)), mask=inside if how == "packed" else None)
        expected = metric.compute()
        assert logged(trainer)["ratio_max"] == pytest.approx(float(expected["ratio_max"]), rel=1e-5)
        assert logged(trainer)["drifting"] == float(expected["drifting"])


def test_a_memory_that_forgets_nothing_and_a_cell_that_does(tmp_path: Path) -> None:
    """The memory comes in pieces of five tokens; its outer products add up, so that its variance grows as t² or so."""
    memory = StateDriftMonitor(module="memory", train_length=TRAIN, name="memory")
    cell = StateDriftMonitor(module="cell", train_length=TRAIN, time_axis=None, name="cell")
    trainer, _ = fit(tmp_path, memory, cell)
    found = logged(trainer)
    assert found["memory/drifting"] == 1
    assert found["memory/ratio_max"] > LONG / TRAIN
    assert found["cell/ratio_max"] < 2
    chunks = StateDriftMonitor(module="cell", train_length=4 * TRAIN, time_axis=None, call_tokens=4)
    trainer, _ = fit(tmp_path, chunks)  # as if every call had taken four tokens in: the same states at the same calls
    assert logged(trainer)["ratio_max"] == pytest.approx(found["cell/ratio_max"], rel=1e-5)


def test_nothing_changes_and_others_can_read_it(tmp_path: Path) -> None:
    def trained(*callbacks: Callback, **options: Any) -> dict[str, Tensor]:
        return fit(tmp_path, *callbacks, **options)[1].state_dict()

    monitor = StateDriftMonitor(module="memory", train_length=TRAIN)
    stop = EarlyStopping(f"{PREFIX}/ratio_max", patience=5)
    with_it = trained(monitor, stop, logger=TensorBoardLogger(tmp_path, "log", "0"), log_every_n_steps=1)
    assert all(torch.equal(value, with_it[name]) for name, value in trained().items())
    events = EventAccumulator(str(tmp_path / "log" / "0"), {"images": 0}).Reload()
    assert f"{PREFIX}/variance" in events.Tags()["images"]


def test_no_sequence_is_longer(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no sequence of the val stage was longer than train_length=20"):
        trainer, _ = fit(tmp_path, StateDriftMonitor(module="gru", train_length=LONG))
    assert math.isnan(logged(trainer)["ratio_max"])


def test_states_that_are_no_numbers(tmp_path: Path) -> None:
    class Break(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                pl_module.embed.weight.data.fill_(math.inf)

    with pytest.warns(UserWarning, match="outputs of 'gru' are NaN or infinite"):
        trainer, _ = fit(tmp_path, StateDriftMonitor(module="gru", train_length=TRAIN), Break(), max_epochs=1)
    assert math.isnan(logged(trainer)["drifting"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"train_length": 6}, "`module` is None and `train_length` 6: name the module"),
        ({"module": "gru"}, "`module` is 'gru' and `train_length` None"),
        ({"module": "first", "train_length": 6}, r"the batch 4 samples: axis 1 is not that of the.*Set time_axis=0"),
        ({"module": "cell", "train_length": 6}, r"module='cell' cannot be read: .*\(4, 8\); expected at least 3 axes"),
        ({"module": "gru", "train_length": 6, "heads": 3}, "8 features cannot be split into `heads`=3"),
        ({"module": "gru", "train_length": 6, "heads": 8}, "at least two entries a head"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"StateDriftMonitor: .*{match}"):
        fit(tmp_path, StateDriftMonitor(**arguments))


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(NoMatchError, match=r"`module` 'grus' matches no module name"):
        fit(tmp_path, StateDriftMonitor(module="grus", train_length=6))
    for arguments, match in (
        ({"call_tokens": 0}, "`call_tokens` is 0"), ({"heads": 0}, "`heads` is 0"),
        ({"train_length": 8, "max_length": 8}, "`max_length` is 8; expected more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            StateDriftMonitor(module="gru", **arguments)

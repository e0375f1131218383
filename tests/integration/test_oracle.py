"""ValidationOracle: the same numbers as the Trainer's own validation, and a fit that does not notice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sigma_runs import Do, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from two_heads import TwoTasks, train_loader, val_loader

from lightning_efficient.trainer.validation import ValidationOracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),
]

NAMES = ("val_digit", "val_parity", "val_accuracy", "val_even")


def asked(
    root: Path, module: LightningModule, names: Any, loaders: Any = None, batches: Any = None, **kwargs: Any
) -> Any:
    """What the oracle says before the third step, and what the Trainer's validation says of the same weights."""
    said: dict[str, float] = {}

    def ask(t: Any, m: Any) -> None:
        if t.global_step == 2 and not said:
            oracle = ValidationOracle(t, m, names, batches)
            with oracle.quiet():
                said.update(oracle())
            assert all(oracle_flag for oracle_flag in (m.training, m.net.training))

    data = kwargs.pop("datamodule", None)
    arguments = (
        {"datamodule": data}
        if data
        else {"train_dataloaders": train_loader(), "val_dataloaders": loaders or val_loader()}
    )
    # Validation after two steps, where the oracle is asked.
    t = trainer(root, Do(on_train_batch_start=ask), max_steps=3, val_check_interval=2, **kwargs)
    seen: dict[str, float] = {}
    t.callbacks.append(
        Do(on_validation_end=lambda t, m: seen.update({k: float(v) for k, v in t.callback_metrics.items()}))
    )
    t.fit(module, **arguments)
    return said, {name: seen[name] for name in names}


def test_the_numbers_are_those_of_validation(tmp_path: Path) -> None:
    said, seen = asked(tmp_path, TwoTasks(), NAMES)
    assert said == pytest.approx(seen, rel=1e-6)
    assert list(said) == list(NAMES)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_in_every_precision(tmp_path: Path, precision: Any) -> None:
    said, seen = asked(tmp_path, TwoTasks(), NAMES[:2], precision=precision)
    assert said == pytest.approx(seen, rel=1e-6)


class ManyWays(TwoTasks):
    """Reductions, weights, collections, names by step and epoch."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"acc": MulticlassAccuracy(10), "f1": MulticlassF1Score(10)}
        self.collection = MetricCollection(parts, prefix="all_")
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        digit, parity, logits, _ = self.losses(batch)
        self.collection.update(logits, batch[1])
        self.mean.update(parity, len(batch[1]))
        self.log("sum", digit, reduce_fx="sum")
        self.log("least", digit, reduce_fx=torch.min)
        self.log("most", digit, reduce_fx="max")
        self.log("weighted", digit, batch_size=1)
        self.log("both", digit, on_step=True, on_epoch=True)
        self.log("mean", self.mean)
        self.log_dict(self.collection)

    def on_validation_epoch_end(self) -> None:
        self.log("end", 3.0)


def test_every_way_of_logging(tmp_path: Path) -> None:
    names = ["sum", "least", "most", "weighted", "both", "both_epoch", "mean", "all_acc", "all_f1", "end"]
    said, seen = asked(tmp_path, ManyWays(), names)
    assert said == pytest.approx(seen, rel=1e-6)
    assert len({round(said[name], 4) for name in ("sum", "least", "most", "weighted", "both")}) == 5


class Several(TwoTasks):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        digit, parity, *_ = self.losses(batch)
        self.log("val_digit", digit)
        self.log("together", parity, add_dataloader_idx=False) if dataloader_idx == 0 else None

    def on_validation_epoch_end(self) -> None:
        pass


def test_several_loaders(tmp_path: Path) -> None:
    names = ["val_digit/dataloader_idx_0", "val_digit/dataloader_idx_1", "together"]
    said, seen = asked(tmp_path, Several(), names, [val_loader(100), val_loader(70)])
    assert said == pytest.approx(seen, rel=1e-6)
    assert said[names[0]] != said[names[1]]


class Data(LightningDataModule):
    """Scales images in a transfer hook."""

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1, batch[1]


def test_batches_pass_the_hooks_of_a_datamodule(tmp_path: Path) -> None:
    said, seen = asked(tmp_path, TwoTasks(), NAMES, datamodule=Data())
    assert said == pytest.approx(seen, rel=1e-6)


def test_a_sample_is_the_same_every_time(tmp_path: Path) -> None:
    class InPlace(TwoTasks):
        """Works on its input, as models do."""

        def losses(self, batch: Any) -> Any:
            batch[0].mul_(0.5)
            return super().losses(batch)

    found: list[Any] = []
    drawn: list[int] = []

    class Counted(DataLoader[Any]):
        def __iter__(self) -> Any:
            drawn.append(1)
            return super().__iter__()

    def ask(t: Any, m: Any) -> None:
        if not found:
            sample = ValidationOracle(t, m, NAMES[:2], 2)
            assert sample.size == 2
            whole = ValidationOracle(t, m, NAMES[:2])
            assert whole.size == 3
            drawn.clear()
            with sample.quiet():
                found.extend(sample() for _ in range(3))
            assert len(drawn) == 1, "a sample is drawn once"
            with whole.quiet():
                found.append(whole())

    loader = val_loader()
    t = trainer(tmp_path, Do(on_train_batch_start=ask), max_steps=1)
    t.fit(InPlace(), train_loader(), Counted(loader.dataset, 64))
    assert found[0] == found[1] == found[2] != found[3]


def test_validation_that_draws_numbers(tmp_path: Path) -> None:
    class Noisy(TwoTasks):
        def losses(self, batch: Any) -> Any:
            noise = torch.randn_like(batch[0]) * (0.1 + random.random() + np.random.rand())
            return super().losses((batch[0] + noise, batch[1]))

    found: list[Any] = []

    def ask(t: Any, m: Any) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        oracle = ValidationOracle(t, m, NAMES)
        with oracle.quiet():
            found.extend((oracle(), oracle()))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    loader = val_loader(shuffle=True)
    trainer(tmp_path, Do(on_train_batch_start=ask), max_steps=2).fit(Noisy(), train_loader(), loader)
    assert found[0] == found[1], "networks are compared on the same noise"
    assert found[0] != found[2], "after a step the network is another"


def test_nothing_of_the_module_counts_it(tmp_path: Path) -> None:
    def ask(t: Any, m: Any) -> None:
        state = {n: b.clone() for n, b in m.named_buffers()}
        flags = [x.training for x in m.modules()]
        counted, listed = m.accuracy.update_count, list(m.right)
        metrics = dict(t.callback_metrics), dict(t.logged_metrics)
        oracle = ValidationOracle(t, m, NAMES)
        with oracle.quiet():
            oracle()
        assert m.accuracy.update_count == counted
        assert len(m.right) == len(listed)
        assert [x.training for x in m.modules()] == flags
        assert all(torch.equal(b, state[n]) for n, b in m.named_buffers())
        assert (dict(t.callback_metrics), dict(t.logged_metrics)) == metrics
        assert (t.training, t.sanity_checking) == (True, False)

    module = TwoTasks()
    module.net.bn1.eval()  # flags come back one by one
    trainer(tmp_path, Do(on_train_batch_start=ask), max_steps=3, val_check_interval=1).fit(
        module, train_loader(), val_loader()
    )


@pytest.mark.parametrize("how", ["none", "limit", "no step"])
def test_without_validation(tmp_path: Path, how: str) -> None:
    class NoStep(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0].flatten(1)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = NoStep() if how == "no step" else TwoTasks()
    loaders = {} if how != "limit" else {"val_dataloaders": val_loader()}
    limits = {"limit_val_batches": 0} if how == "limit" else {}
    t = trainer(tmp_path, Do(on_train_start=lambda t, m: ValidationOracle(t, m, NAMES)), **limits)
    with pytest.raises(ValueError, match="there is none: give the Trainer `val_dataloaders`"):
        t.fit(module, train_loader(), **loaders)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "val_digits",
            r"names 'val_digits' \(did you mean 'val_digit' or 'val_parity'\?\), which the validation of TwoTasks",
        ),
        ("mse", r"names 'mse', which .* it logs \['val_accuracy', 'val_digit', 'val_even', 'val_parity'\]"),
    ],
)
def test_a_metric_that_is_not_logged(tmp_path: Path, name: str, message: str) -> None:
    def ask(t: Any, m: Any) -> None:
        oracle = ValidationOracle(t, m, [name])
        with oracle.quiet():
            oracle()

    module = TwoTasks().train()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, Do(on_train_start=ask)).fit(module, train_loader(), val_loader())
    assert module.net.training

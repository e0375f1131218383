"""Batches by length inside Lightning: processes, prediction, resumed epochs, YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forking import forked
from length_models import Tagger, Texts, collate, samplers
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_efficient import BalancedDistributedBatchSampler, LengthGroupedBatchSampler, TokenBudgetBatchSampler

SCRIPT = Path(__file__).parent / "scripts" / "samplers_ddp.py"


@pytest.mark.forks
def test_two_processes_share_an_epoch_and_its_gradient(tmp_path: Path) -> None:
    """Lightning's distributed sampler is on: the loader of a hook, and one that is passed to ``fit``."""
    ended = forked(SCRIPT, tmp_path, processes=2)
    assert ended.code == 0, ended.output
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(one) == 6
    for name in one:
        a, b = one[name], two[name]
        assert a["sampler"] == a["expected"], name
        assert len(a["epochs"]) == 2
        for first, second in zip(a["epochs"], b["epochs"], strict=True):
            assert len(first) == len(second) == a["length"] == b["length"]
            assert sorted(i for batch in first + second for i in batch) == list(range(45)), name
        assert a["epochs"][0] != a["epochs"][1], f"{name}: Lightning did not say the epoch"
        assert sorted(a["predicted"] + b["predicted"]) == list(range(45)), name
    assert one["grouped/False"] == one["grouped/True"]

    seed_everything(0, verbose=False)
    model, texts = Tagger().double(), Texts(45)
    model.training_step(collate([texts[i] for i in range(45)]), 0).backward()
    for name, grad in torch.load(tmp_path / "two.pt", weights_only=True).items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=0, atol=1e-5, msg=name)


class Counting(DataLoader[Any]):
    """A loader that can be resumed: it counts what it has given, since one with workers reads ahead."""

    given = resumed = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given, self.resumed = self.resumed, 0
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {**self.batch_sampler.state_dict(), "batches": self.given}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_sampler.load_state_dict(state)  # type: ignore[union-attr]
        self.resumed = state["batches"]


class Killed(Callback):
    """Saves after a step."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at = folder, at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.folder / "middle.ckpt")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.14
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["counting", "torchdata"])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on(kind: str, workers: int, tmp_path: Path) -> None:
    loader_class: Any = Counting
    if kind == "torchdata":
        loader_class = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def fit(name: str, epoch: float, **kwargs: Any) -> tuple[Tagger, int]:
        seed_everything(0, verbose=False)
        texts, model = Texts(45), Tagger()
        loader = loader_class(texts, batch_sampler=samplers(texts)[name], collate_fn=collate, num_workers=workers)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
            callbacks=[Killed(tmp_path, at := int(len(loader) * epoch))],
        )  # fmt: skip
        trainer.fit(model, loader, **kwargs)
        return model, at

    for name, epoch in (
        [*((n, 1.5) for n in samplers(Texts(45))), ("grouped", 2)] if workers == 0 else [("budget", 1.5)]
    ):
        whole, at = fit(name, epoch)
        model, _ = fit(name, epoch, ckpt_path=tmp_path / "middle.ckpt")
        rest = [batch for epoch in whole.seen for batch in epoch][at:]
        assert [batch for epoch in model.seen for batch in epoch] == rest, name
        for key, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


class FromYaml(LightningDataModule):
    """Its batches are a matter of configuration. jsonargparse does not see subclasses of ``Sampler[list[int]]``."""

    def __init__(self, batch_sampler: Sampler, texts: Dataset | None = None) -> None:  # type: ignore[type-arg]
        super().__init__()
        self.texts = texts or Texts(45)
        self.batch_sampler: Any = batch_sampler

    def train_dataloader(self) -> DataLoader[Any]:
        if self.batch_sampler._lengths is None:
            self.batch_sampler.bind(self.texts)
        return DataLoader(self.texts, batch_sampler=self.batch_sampler, collate_fn=collate)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LengthGroupedBatchSampler", {"lengths": "n_tokens", "batch_size": 4, "pool": 3}),
        ("TokenBudgetBatchSampler", {"lengths": "n_tokens", "tokens": 100}),
        ("BalancedDistributedBatchSampler", {"lengths": Texts(45).n_tokens, "batch_size": 4, "method": "snake"}),
        (
            "LengthGroupedBatchSampler",
            {
                "lengths": "n_tokens",
                "batch_size": 5,
                "dataset": {"class_path": "length_models.Texts", "init_args": {"count": 45}},
            },
        ),
    ],
)
def test_in_yaml(name: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = {"class_path": f"lightning_efficient.{name}", "init_args": arguments}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "data": {"batch_sampler": sampler},
        "trainer": {"max_epochs": 1, "logger": False, "devices": 1},
    }
    quiet = {"devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    config["trainer"] |= {"accelerator": "cpu", "default_root_dir": str(tmp_path), **quiet}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "-c", str(path)])
    cli = LightningCLI(Tagger, FromYaml, save_config_callback=None)
    made = cli.datamodule.batch_sampler
    kinds = (LengthGroupedBatchSampler, TokenBudgetBatchSampler, BalancedDistributedBatchSampler)
    assert isinstance(made, kinds)
    assert sorted(i for batch in cli.model.seen[0] for i in batch) == list(range(45))

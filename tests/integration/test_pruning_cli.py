"""A stock LightningCLI configures every kind of pruning from YAML, with names and globs only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from zoo import Classifier, loader

from lightning_efficient import MagnitudePruning, SAPPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.* leaves .* alone"),  # --include of whole blocks with granularity: head
]

QUIET = {
    "accelerator": "cpu", "max_epochs": 4, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
    "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip
MAGNITUDE = [
    {"schedule": "one_shot", "start": 0.25},
    {"schedule": "constant"},
    {"schedule": "cubic", "start": 1, "length": 4, "every": 2},
    {"schedule": "iterative", "rounds": 2},
    {"schedule": "iterative", "rounds": 1, "rewind": "learning_rate", "rewind_to": 1},
    {"schedule": "iterative", "rounds": 1, "rewind": "none"},
    *({"criterion": criterion} for criterion in ("taylor", "random")),
    {"criterion": "wanda", "scope": "neuron"},
    *({"scope": scope} for scope in ("layer", "neuron")),
    *({"granularity": cut} for cut in ("row", "channel", "2:4", "4x1")),
]
SAP: list[dict[str, Any]] = [
    {"p": 1.0, "q": 2.0, "eta": 0.01, "gamma": 1.5, "beta": 0.8, "scope": "layer", "epochs_per_iteration": 2},
    {"p": 0.5, "q": 1.0, "scope": "neuron", "iterations": 1},
    {"gamma": 2.0, "iterations": 3, "monitor": "val_loss", "mode": "min", "select": "best", "stop_at": "collapse"},
]


class Batches(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(2)

    def val_dataloader(self) -> Any:
        return loader(1)


def train(path: Path, name: str, arguments: dict[str, Any]) -> LightningCLI:
    callback = {"class_path": f"lightning_efficient.{name}", "init_args": arguments}
    config = {"trainer": {**QUIET, "callbacks": [callback]}, "model": {"net": "timm_vit"}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    args = ["fit", "-c", str(path / "config.yaml")]
    return LightningCLI(Classifier, Batches, args=args, save_config_callback=None, seed_everything_default=1)


def share(model: nn.Module, names: Any) -> float:
    params = dict(model.named_parameters())
    return sum(int((params[n] == 0).sum()) for n in names) / max(sum(params[n].numel() for n in names), 1)


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])


@pytest.mark.parametrize("arguments", MAGNITUDE, ids=str)
def test_magnitude_pruning(tmp_path: Path, arguments: dict[str, Any]) -> None:
    globs = {"include": ["net.blocks.*.mlp", "net.blocks.0.attn"], "exclude": ["net.blocks.1.*.fc2"]}
    cli = train(tmp_path, "MagnitudePruning", {"amount": 0.5, **globs, **arguments})
    ours = next(cb for cb in cli.trainer.callbacks if isinstance(cb, MagnitudePruning))  # type: ignore[attr-defined]
    weights = ["0.attn.qkv", "0.attn.proj", "0.mlp.fc1", "0.mlp.fc2", "1.mlp.fc1"]
    assert list(ours.masks) == [f"net.blocks.{name}.weight" for name in weights]
    whole_units = arguments.get("granularity") in ("row", "channel")  # these differ in size
    assert share(cli.model, ours.masks) == pytest.approx(0.5, abs=0.15 if whole_units else 0.01)
    others = [n for n, p in cli.model.named_parameters() if n not in ours.masks and p.ndim > 1 and p.numel() > 24]
    assert share(cli.model, others) == 0


def test_heads_and_amounts_by_glob(tmp_path: Path) -> None:
    glob = {"include": ["net.blocks.*.attn.proj"], "granularity": "head", "amounts": {"net.blocks.1": 0.0}}
    cli = train(tmp_path, "MagnitudePruning", {"amount": 0.5, **glob})
    first, second = (cli.model.net.blocks[i].attn.proj.weight for i in (0, 1))
    heads = [bool((first[:, h : h + 12] == 0).all()) for h in (0, 12)]
    assert sum(heads) == 1
    assert bool((second != 0).all())


@pytest.mark.parametrize("arguments", SAP, ids=str)
def test_sap_pruning(tmp_path: Path, arguments: dict[str, Any]) -> None:
    cli = train(tmp_path, "SAPPruning", {"include": ["net.blocks.*"], "exclude": ["net.blocks.*.attn"], **arguments})
    ours = next(cb for cb in cli.trainer.callbacks if isinstance(cb, SAPPruning))  # type: ignore[attr-defined]
    assert list(ours.masks) == [f"net.blocks.{i}.mlp.fc{j}.weight" for i in (0, 1) for j in (1, 2)]
    params = dict(cli.model.named_parameters())
    assert all(torch.equal(params[name] != 0, mask) for name, mask in ours.masks.items())
    assert 0 < share(cli.model, ours.masks) < 1
    assert [row["iteration"] for row in ours.history] == list(range(len(ours.history)))

"""A stock LightningCLI configures MagnitudePruning from YAML, with names and globs only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from zoo import Classifier, loader

from lightning_efficient import MagnitudePruning

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
    *({"granularity": cut} for cut in ("row", "channel", "2:4")),
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

"""A method from another package, ``tests/third_party/clipped``, is one like ours everywhere that methods are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forking import forked
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from zoo import Classifier, Lazy, Manual, loader

from lightning_efficient import EfficientCLI, MagnitudePruning, SAPPruning, SigmaReparam, load_from_checkpoint
from lightning_efficient.cli import main
from lightning_efficient.common.registry import METHODS
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.lifecycle.methods import read_methods_file
from lightning_efficient.lifecycle.recipe import RecipeError, read
from lightning_efficient.testing import assert_method_contract

HERE = Path(__file__).parents[1] / "third_party"
INSTALLED = Path(__file__).parent / "scripts" / "installed.py"


@pytest.fixture(scope="module", autouse=True)
def clipped() -> Iterator[Any]:
    """The package, imported; what it registers is gone when these tests are over."""
    sys.path.insert(0, str(HERE))
    with METHODS.preserved():
        import clipped

        clipped.register()  # imported before, if these tests ran before
        yield clipped
    sys.path.remove(str(HERE))


def data(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


def trainer(folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 4, "logger": False, "log_every_n_steps": 1, "enable_checkpointing": False}
    settings |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings | kwargs)


# -- its own promises


SCENARIOS = (
    "plain", "disabled", "accumulation", "bf16_true", "ema_after", "manual", "configure_model", "ddp", "resume",
    "fit_twice_then_test", "weights_only", "copy_and_pickle",
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_battery(clipped: Any, scenario: str) -> None:
    modules: dict[str, Callable[[], Classifier]] = {
        "plain": partial(Classifier, "cnn"),
        "configure_model": partial(Lazy, "cnn", build="configure_model"),
        "manual": partial(Manual, "cnn"),
    }
    callback = partial(clipped.Clipped, include=["net"])
    assert assert_method_contract(callback, modules, data, scenarios=[scenario]) == {scenario: "passed"}


def test_the_weights_follow_the_bound(clipped: Any, tmp_path: Path) -> None:
    module = Classifier("cnn")
    trainer(tmp_path, clipped.Clipped(bound=0.1, shrink=0.9)).fit(module, loader(), loader(1))
    largest = [float(layer.weight.detach().abs().max()) for layer in (module.net.stem, module.net.conv)]
    assert largest == pytest.approx([0.1 * 0.9**4] * 2)


def test_it_chains_with_ours(clipped: Any, tmp_path: Path) -> None:
    """On one weight: masked, divided by its norm, then clamped."""
    module = Classifier("cnn")
    masks = MagnitudePruning(amount=0.5, schedule="one_shot", start=0, scope="layer")
    ours = (clipped.Clipped(bound=0.3, shrink=1.0), SigmaReparam(init="one"), masks)
    trainer(tmp_path, *ours).fit(module, loader(), loader(1))
    weight = module.net.head.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(0.3)
    assert float((weight == 0).float().mean()) == 0.5


# -- where methods are named


def test_a_methods_file_in_any_order(clipped: Any, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("run_cost: true\nclipped: {bound: 0.5, include: [head]}\nsigma_reparam: true\n", encoding="utf-8")
    callbacks = read_methods_file(file)
    assert [callback.method for callback in callbacks] == ["sigma_reparam", "clipped", "run_cost"]
    assert callbacks[1].config() == clipped.Clipped(bound=0.5, include=["head"]).config()
    file.write_text("clipped: {bund: 0.5}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`clipped` has no argument 'bund' \(did you mean 'bound'\?\)"):
        read_methods_file(file)
    file.write_text("cliped: true\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'cliped' \(did you mean 'clipped'\?\)"):
        read_methods_file(file)


def test_a_key_of_its_own_on_the_command_line(
    clipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("on.yaml").write_text("clipped: {enabled: true, bound: 0.5}\n", encoding="utf-8")
    options = ["-c", "on.yaml", "--clipped.shrink=0.9", "--seed_everything=false", "--trainer.logger=false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    made = EfficientCLI(DigitsViT, run=False)
    (callback,) = [cb for cb in made.trainer.callbacks if isinstance(cb, clipped.Clipped)]
    assert callback.config() == clipped.Clipped(bound=0.5, shrink=0.9).config()
    monkeypatch.setattr(sys, "argv", ["lightning-efficient", "fit", "--model=DigitsViT", "--print_config"])
    with pytest.raises(SystemExit, match="0"):
        main()
    saved = yaml.safe_load(capsys.readouterr().out)
    assert saved["clipped"] == clipped.Clipped(enabled=False).config()
    command = ["targets", "--model=lightning_efficient.demo.model.DigitsViT", "--clipped.exclude=[net.head]"]
    monkeypatch.setattr(sys, "argv", ["lightning-efficient", *command])
    main()
    shown = capsys.readouterr().out
    assert "✓ net.blocks.*.attn.qkv.weight" in shown.split("\nclipped")[1].split("hesso_pruning")[0]


def test_columns_and_charts(clipped: Any, tmp_path: Path) -> None:
    logger, board = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")
    trainer(tmp_path, clipped.Clipped(bound=0.5), logger=[logger, board]).fit(Classifier("cnn"), loader(), loader(1))
    saved = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text("utf-8"))
    assert saved["efficient/clipped"] is True
    assert (saved["efficient/clipped/bound"], saved["efficient/clipped/shrink"]) == (0.5, 0.95)
    header = (Path(logger.log_dir) / "metrics.csv").read_text("utf-8").splitlines()[0]
    assert "efficient/clipped/bound" in header.split(",")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    log = EventAccumulator(board.log_dir)
    log.Reload()
    layout = layout_pb2.Layout.FromString(log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [(c.title, [chart.title for chart in c.chart]) for c in layout.category] == [
        ("clipped", ["bound", "share at the bound"])
    ]
    other = CSVLogger(tmp_path, "other")  # a run without it has the same columns
    trainer(tmp_path, SigmaReparam(), logger=other).fit(Classifier("cnn"), loader(), loader(1))
    assert yaml.safe_load((Path(other.log_dir) / "hparams.yaml").read_text("utf-8"))["efficient/clipped"] is False


def test_conflicts_are_refused_from_either_side(clipped: Any, tmp_path: Path) -> None:
    for callbacks in ((clipped.Clipped(), SAPPruning()), (SAPPruning(), clipped.Clipped())):
        with pytest.raises(ValueError, match="cannot be used together: SAP scores the weights"):
            trainer(tmp_path, *callbacks).fit(Classifier("cnn"), loader(), loader(1))


# -- files


def test_files_load_where_it_is_known_and_say_so_where_it_is_not(clipped: Any, tmp_path: Path) -> None:
    module, run = Classifier("cnn"), trainer(tmp_path, clipped.Clipped())
    run.fit(module, loader(), loader(1))
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    (entry,) = read(torch.load(path, weights_only=True))
    assert (entry.method, entry.config) == ("clipped", clipped.Clipped().config())
    loaded = load_from_checkpoint(Classifier, path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    before = METHODS._methods
    with METHODS.preserved():
        METHODS._methods = {name: method for name, method in before.items() if name != "clipped"}
        with pytest.raises(RecipeError, match=r"'clipped', which is not known here.*Import the package"):
            load_from_checkpoint(Classifier, path)
        with pytest.raises(ValueError, match=r"unknown method 'clipped'.*register_method"):
            trainer(tmp_path, clipped.Clipped()).fit(Classifier("cnn"), loader(), loader(1))


SCRIPT = """
import json, sys
import torch, lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
model = BoringModel()
trainer.fit(model)
names = [type(cb).__name__ for cb in trainer.callbacks]
json.dump([names, model.layer.weight.abs().max().item()], open("result.json", "w"))
"""


@pytest.mark.forks
def test_an_installed_package_needs_no_import(tmp_path: Path) -> None:
    """Its entry point makes it known to a script that has heard of neither package."""
    metadata = tmp_path / "clipped-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: clipped\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[lightning_efficient.methods]\nclipped = clipped\n", encoding="utf-8")
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "m.yaml").write_text("clipped: {bound: 0.01}\n", encoding="utf-8")
    code, output = forked(INSTALLED, tmp_path, HERE)
    assert code == 0, output
    names, largest = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert names == ["Clipped"]
    assert largest == pytest.approx(0.0095)

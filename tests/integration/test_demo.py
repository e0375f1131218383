"""The demo from end to end, a slice of it; and every variant for a few steps."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from rich.console import Console

import lightning_efficient.demo.run as demo
from lightning_efficient import export, load_from_checkpoint
from lightning_efficient.ablation.variants import methods_of, options_of, read_variants
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.lifecycle.methods import build_callback


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = Digits(), Digits(data_seed=5)
    for data in (first, second):
        data.setup("fit")
    rows = [tuple(part.indices) for part in first.parts]
    assert rows == [tuple(part.indices) for part in second.parts]
    assert sorted(sum(rows, ())) == list(range(1797))
    batches = [[labels.tolist() for _, labels in data.train_dataloader()] for data in (first, Digits(), second)[::2]]
    assert batches[0] != batches[1]
    again = Digits()
    again.setup("fit")
    assert [labels.tolist() for _, labels in again.train_dataloader()] == batches[0]


@pytest.mark.slow
def test_a_tour_of_one_method_and_its_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: ``ablate`` with ``lightning-efficient fit``, where the methods are keys of the configuration, and with
    options of a variant's own."""
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 1)
    monkeypatch.setattr("lightning_efficient.demo.report._ROUNDS", 20)
    screen = io.StringIO()
    done = demo.run(tmp_path, quick=True, variants=["hesso", "small_dense"], console=Console(file=screen, width=120))
    shown = screen.getvalue()
    assert [(run.variant, run.seed, run.state, run.step) for run in done.runs] == [
        (name, 0, "finished", 37) for name in ("baseline", "hesso", "small_dense")
    ], [run.error for run in done.runs]  # fmt: skip
    assert "No verdict from 1 seed" in shown
    assert "warning" not in shown.lower()

    folders = [tmp_path / "quick" / name for name in ("baseline", "hesso", "small_dense")]
    configs = [yaml.safe_load((folder / "seed_0" / "config.yaml").read_text("utf-8")) for folder in folders]
    assert [config["hesso_pruning"]["enabled"] for config in configs] == [False, True, False]
    assert [config["model"]["init_args"].get("embed_dim", 64) for config in configs] == [64, 64, 52]
    assert all(config["run_cost"]["enabled"] and config["seed_everything"] == 0 for config in configs)
    assert done.comparison is not None
    names = {quantity.name for quantity in done.comparison.quantities}
    assert {"val_acc, final", "peak memory, MiB", "exported: parameters"} <= names
    assert (tmp_path / "quick" / "report.html").stat().st_size > 20_000

    # The exported program runs without this package and agrees with the checkpoint.
    (checkpoint,) = (folders[1] / "seed_0").rglob("*.ckpt")
    model = load_from_checkpoint(DigitsViT, checkpoint).eval()
    program = torch.export.load(tmp_path / "quick" / "exported" / "hesso.pt2").module()
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    assert re.search(r"hesso, judged by small_dense: No verdict from 1 seed: val_acc", shown)
    assert (tmp_path / "quick" / demo.PICTURE).stat().st_size > 20_000
    assert not any("latency" in name for name in names), "several runs shared the machine"
    assert re.search(r"hesso +[\d,]+ +0\.\d\d +\d\.\d{3} +\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", shown)


def test_every_file_is_a_variant() -> None:
    files = {file.stem for file in Path(demo.__file__).parent.glob("*.yaml")}
    assert files == {"baseline", *demo.VARIANTS}
    assert list(read_variants({name: demo.read(name) for name in demo.VARIANTS})) == ["baseline", *demo.VARIANTS]


@pytest.mark.parametrize("name", [name for name in demo.VARIANTS if "config" not in demo.read(name)])
def test_every_variant_trains_and_exports(name: str, tmp_path: Path) -> None:
    model = DigitsViT(lr=2e-3, depth=1, embed_dim=16, num_heads=2, pool="avg")
    dense = sum(p.numel() for p in model.parameters())
    methods = methods_of(demo.read(name))
    callbacks = [build_callback(method, arguments) for method, arguments in methods.items()]
    trainer = Trainer(
        max_epochs=2, limit_train_batches=12, accelerator="cpu", logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits())
    exported = sum(p.numel() for p in export(model).parameters())
    assert (exported < dense) == (name in ("prepbn", "hesso", "pagcp")), "norms fold away, units are cut out"


def test_the_small_dense_network_is_as_small_as_hesso_leaves_it() -> None:
    (option,) = options_of(demo.read("small_dense"))
    small = DigitsViT(depth=2, pool="avg", embed_dim=int(option.removeprefix("--model.init_args.embed_dim=")))
    dense = DigitsViT(depth=2, pool="avg")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, dense)]
    assert sizes[0] / sizes[1] == pytest.approx(0.67, abs=0.02)


def test_missing_scikit_learn_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-efficient\[demo\]'"):
        demo.run(tmp_path)

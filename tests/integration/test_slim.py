"""A smaller model's life: training goes on, files rebuild it, export cuts what is zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import HESSOPruning, MagnitudePruning, export, load_from_checkpoint
from lightning_efficient.deploy.export import ExportError
from lightning_efficient.deploy.formats import to_onnx, to_torch_export
from lightning_efficient.lifecycle.cuts import cut, mark_zeroed
from lightning_efficient.lifecycle.hooks import hook_files
from lightning_efficient.lifecycle.recipe import KEY, RecipeError
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from tests.slim_models import ResNet, images, lively

KEEP = {"a.0": [0, 2, 5], "c.0": range(4), "stem.0": [1, 2, 3, 4]}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 3, 8, 8, generator=generator)
        return DataLoader(TensorDataset(x, torch.randint(0, 5, (32,), generator=generator)), batch_size=8)

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]


def _named(groups: Groups) -> dict[str, Any]:
    return {f"net.{name}": stay for name, stay in KEEP.items() if f"net.{name}" in groups.found}


class CutAt(Callback):
    """Cuts after some epochs, as a user's own callback may."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            groups = find_groups(pl_module, images())
            cut(pl_module, _named(groups), groups, trainer)


class Resumes(Callback):
    """What a structured pruning callback does in ``setup``."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        hook_files(pl_module)


def _trainer(tmp_path: Path, epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


def test_a_smaller_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Module()
    whole = copy.deepcopy(start)
    trainer = _trainer(tmp_path, 6, CutAt(1))
    trainer.fit(whole)
    assert whole.net.a[0].weight.shape == (3, 4, 3, 3)
    first = copy.deepcopy(start)
    half = _trainer(tmp_path, 4, CutAt(1))
    half.fit(first)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = copy.deepcopy(start)
    rest = _trainer(tmp_path, 6, Resumes())
    rest.fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in resumed.state_dict().items())
    one, two = trainer.optimizers[0].state_dict(), rest.optimizers[0].state_dict()
    assert one["param_groups"] == two["param_groups"]
    for key, state in one["state"].items():
        assert all(torch.equal(value, two["state"][key][name]) for name, value in state.items())
    # The file of the resumed run says what was cut, too.
    rest.save_checkpoint(tmp_path / "end.ckpt")
    assert load_from_checkpoint(Module, tmp_path / "end.ckpt").net.a[0].out_channels == 3


def test_files_rebuild_the_smaller_model(tmp_path: Path) -> None:
    model = lively(Module())
    groups = find_groups(model, images())
    cut(model, _named(groups), groups)
    again = find_groups(model, images())
    cut(model, {"net.a.0": [0, 2]}, again)  # a second round, on what the first left
    trainer = _trainer(tmp_path, 1)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    torch.load(tmp_path / "small.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Module, tmp_path / "small.ckpt")
    assert type(loaded) is Module
    assert loaded.net.a[0].weight.shape == (2, 4, 3, 3)
    x = images()
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):  # never other numbers
        Module.load_from_checkpoint(tmp_path / "small.ckpt")
    # It trains on, and its files hold both rounds still.
    trainer = _trainer(tmp_path, 1)
    trainer.fit(loaded.train())
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    assert load_from_checkpoint(Module, tmp_path / "more.ckpt").net.a[0].out_channels == 2
    assert export(loaded, x).net.a[0].out_channels == 2


def test_files_of_other_sizes_are_refused(tmp_path: Path) -> None:
    model = Module()
    trainer = _trainer(tmp_path, 1)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "large.ckpt")
    groups = find_groups(model, images())
    cut(model, _named(groups), groups)
    with pytest.raises(RecipeError, match="written before Module was cut"):
        _trainer(tmp_path, 2).fit(model, ckpt_path=tmp_path / "large.ckpt", weights_only=True)
    trainer = _trainer(tmp_path, 1)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "small.ckpt")

    class Wider(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net.a[0], self.net.a[1] = nn.Conv2d(8, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
            self.net.b[0] = nn.Conv2d(7, 8, 3, padding=1, bias=False)

    with pytest.raises(RecipeError, match=r"holds a smaller model.*'net\.a\.0\.weight' from 6 to 3"):
        load_from_checkpoint(Wider, tmp_path / "small.ckpt")


def test_a_mask_that_a_file_lacks_is_missed_before_the_module_is_cut(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, 1, CutAt(0))
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    content = torch.load(tmp_path / "small.ckpt", weights_only=True)
    entry = next(e for e in content[KEY]["methods"] if e["method"] == "slim")
    for name in list(entry["tensors"]):
        entry["tensors"] = dict(entry["tensors"])
        mask = entry["tensors"].pop(name)
        entry["count"] = len(entry["tensors"])
        torch.save(content, tmp_path / "spoilt.ckpt")
        model = Module()
        before = {key: value.shape for key, value in model.state_dict().items()}
        with pytest.raises(RecipeError, match=r"slim in (the checkpoint's|its) recipe"):
            _trainer(tmp_path, 2, Resumes()).fit(model, ckpt_path=tmp_path / "spoilt.ckpt", weights_only=True)
        assert {key: value.shape for key, value in model.state_dict().items()} == before, name
        entry["tensors"][name] = mask


def _zeroed() -> tuple[Module, Groups]:
    model = lively(Module())
    groups = find_groups(model, images())
    for name, stay in _named(groups).items():
        group = groups.found[name]
        group.zero(dict(model.named_parameters()), set(range(group.units)) - set(stay))
    mark_zeroed(model, _named(groups), groups)
    return model, groups


def test_export_cuts_out_what_is_zero(tmp_path: Path) -> None:
    model, _ = _zeroed()
    x = images()
    small = export(model, x)
    assert small.net.a[0].out_channels == 3
    assert model.net.a[0].out_channels == 6
    torch.testing.assert_close(small(x), model.eval()(x), rtol=0, atol=1e-5)
    assert export(model, x, slim=False).net.a[0].out_channels == 6
    for save, name in ((to_torch_export, "small.pt2"), (to_onnx, "small.onnx")):
        assert save(small, x, tmp_path / name).absolute < 1e-4
    # A file keeps the promise; its weights are plain and whole.
    trainer = _trainer(tmp_path, 0)
    trainer.fit(model.train())
    trainer.save_checkpoint(tmp_path / "zeros.ckpt", weights_only=True)
    assert Module.load_from_checkpoint(tmp_path / "zeros.ckpt").net.a[0].out_channels == 6
    loaded = load_from_checkpoint(Module, tmp_path / "zeros.ckpt")
    assert loaded.net.a[0].out_channels == 6
    assert export(loaded, x).net.a[0].out_channels == 3
    with torch.no_grad():
        model.net.a[0].weight.add_(1.0)  # a promise not kept
        model.net.a[1].bias.add_(1.0)
    with pytest.raises(ExportError, match="differs from the model"):
        export(model, x)


def test_a_submodule_is_cut_too_or_says_why_not(tmp_path: Path) -> None:
    model, _ = _zeroed()
    x = images()
    small = export(model.net, x)
    assert [small.a[0].out_channels, small.c[0].out_channels, small.stem[0].out_channels] == [3, 4, 4]
    torch.testing.assert_close(small(x), model.net.eval()(x), rtol=0, atol=1e-5)
    assert export(model.net, x, slim=False).a[0].out_channels == 6
    assert not [m for m in small.modules() if any("lightning_efficient" in key for key in vars(m))]
    hidden = export(model.net.a, torch.randn(2, 8, 8, 8), slim=False)  # a part whose own width others share
    assert hidden[0].out_channels == 6
    with pytest.raises(ExportError, match=r"cut out of this submodule alone.*export the LightningModule"):
        export(model.net.a, torch.randn(2, 8, 8, 8))
    # Also from a file, and not after the units are gone for good.
    trainer = _trainer(tmp_path, 0)
    trainer.fit(model.train())
    trainer.save_checkpoint(tmp_path / "zeros.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Module, tmp_path / "zeros.ckpt")
    assert export(loaded.net, x).a[0].out_channels == 3
    groups = find_groups(loaded, x)
    cut(loaded, _named(groups), groups)
    assert export(loaded.net, x).a[0].out_channels == 3


def test_a_run_with_hesso_exports_a_smaller_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Module()
    trainer = _trainer(tmp_path, 4, HESSOPruning(target=0.5, start=0.1, duration=0.5, periods=2))
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    small = export(model, images())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert sizes[1] < 0.7 * sizes[0]
    again = export(load_from_checkpoint(Module, tmp_path / "end.ckpt"), images())
    torch.testing.assert_close(again(images()), small(images()), rtol=0, atol=0)
    # Cut between two fits, it trains on; a run resumed from its file, with the callback, is as small.
    callback = trainer.callbacks[0]  # type: ignore[attr-defined]
    cut(model, callback.keep, callback.groups)
    second = _trainer(tmp_path, 1, HESSOPruning(target=0.2, start=0, duration=4, periods=1))
    second.fit(model)
    second.save_checkpoint(tmp_path / "second.ckpt")
    third, resumed = Module(), _trainer(tmp_path, 2, HESSOPruning(target=0.2, start=0, duration=4, periods=1))
    resumed.fit(third, ckpt_path=tmp_path / "second.ckpt", weights_only=True)
    assert {n: p.shape for n, p in third.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_cutting_while_others_train_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, 1, MagnitudePruning(amount=0.5), CutAt(0))
    model = Module()
    with pytest.raises(ValueError, match="cannot be cut while MagnitudePruning trains it"):
        trainer.fit(model)
    assert model.net.a[0].weight.shape == (6, 8, 3, 3)
    model = Module()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, strategy="ddp", callbacks=[CutAt(0)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot be cut while DDPStrategy trains it"):
        trainer.fit(model)
    assert model.net.a[0].weight.shape == (6, 8, 3, 3)

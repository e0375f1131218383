"""The rows of docs/lora.md that no other test holds: what methods do in training to a ViT with PEFT's adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_efficient as le
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.match import NoMatchError

RANK = 4


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Which of the two decides does not matter to what may be cut."""
    return cell.get("kind") == "pagcp"


class Adapted(LightningModule):
    """Args: targets: of LoRA. save: trained whole beside it. grid: no class token."""

    def __init__(
        self, targets: tuple[str, ...] = ("qkv", "fc1"), save: tuple[str, ...] = ("head",), grid: bool = False
    ):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = timm.models.VisionTransformer(
                img_size=8, patch_size=2, in_chans=1, num_classes=4, embed_dim=16, depth=2, num_heads=2,
                class_token=not grid, global_pool="avg" if grid else "token",
            )  # fmt: skip
            config = peft.LoraConfig(
                target_modules=list(targets), r=RANK, modules_to_save=list(save), init_lora_weights=False
            )
            self.net = peft.get_peft_model(net, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def data() -> DataLoader[Any]:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(16) % 4), 4)


def trained(root: Path, callback: Any, module: Adapted | None = None, **options: Any) -> tuple[Trainer, Adapted]:
    module = module or Adapted()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=root,
        enable_model_summary=False, callbacks=[callback], num_sanity_val_steps=0, **{"max_epochs": 2} | options,
    )  # fmt: skip
    trainer.fit(module, data(), data())
    return trainer, module


def frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


MASKS: dict[str, Callable[[], Any]] = {
    "magnitude": partial(le.MagnitudePruning, amount=0.5, scope="layer", exclude=["head"]),
    "sap": partial(le.SAPPruning, iterations=1, p=1.0, q=2.0, exclude=["head"]),
}


@pytest.mark.filterwarnings("ignore:(Magnitude|SAP)Pruning leaves 9 weight.* alone")  # the frozen ones
@pytest.mark.parametrize("kind", MASKS)
def test_masks_lie_on_the_factors_and_not_on_their_product(kind: str, tmp_path: Path) -> None:
    before = frozen(Adapted())
    _, module = trained(tmp_path, MASKS[kind]())
    zero = {
        name: int((p == 0).sum()) for name, p in module.named_parameters() if p.requires_grad and "head" not in name
    }
    assert set(zero) == {name for name in zero if "lora_" in name}
    assert sum(zero.values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in frozen(module).items())
    layer = module.net.base_model.model.blocks[0].mlp.fc1
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if kind == "magnitude":
        assert all(count > 0 for count in zero.values())
        assert float((product == 0).double().mean()) < 0.4  # of factors that are half zero
        merged = layer.base_layer.weight + product * layer.scaling["default"]
        assert int((merged == 0).sum()) == 0


UNITS: dict[str, Callable[[], Any]] = {
    "hesso": partial(le.HESSOPruning, target=0.5, start=0.1, duration=0.5, periods=2),
    "pagcp": partial(le.PAGCPPruning, budgets={"val_loss": 5.0}, start=0.3, rounds=1, step=0.5, most=0.5),
}


@pytest.mark.filterwarnings("ignore:export. save_pretrained of the copy would write a model that")
@pytest.mark.parametrize("kind", UNITS)
def test_ranks_are_cut_and_no_frozen_weight(kind: str, tmp_path: Path) -> None:
    before = frozen(Adapted())
    _, module = trained(tmp_path, UNITS[kind]())
    assert all(torch.equal(value, before[name]) for name, value in frozen(module).items())
    x = next(iter(data()))[0]
    plain = le.export(module, (x,))
    layers = [layer for block in plain.net.base_model.model.blocks for layer in (block.attn.qkv, block.mlp.fc1)]
    ranks = [layer.lora_A["default"].weight.shape[0] for layer in layers]
    assert min(ranks) < RANK
    assert all(layer.lora_B["default"].weight.shape[1] == rank for layer, rank in zip(layers, ranks, strict=True))
    assert all(layer.base_layer.weight.shape[1] == 16 for layer in layers)
    torch.testing.assert_close(plain(x), module.eval()(x), rtol=1e-4, atol=1e-5)

    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # what holds the ranks is not trained
    with pytest.raises(NoMatchError, match=r"lora_A\.default\.weight' is frozen"):
        trained(tmp_path, UNITS[kind](), module)


def test_norms_are_outside_of_the_pairs(tmp_path: Path) -> None:
    _, module = trained(tmp_path, le.PRepBN(transition=0.5), max_epochs=1)
    norms = [m for m in module.modules() if type(m).__name__ == "BlendNorm"]
    assert len(norms) == 5
    x = next(iter(data()))[0]
    torch.testing.assert_close(le.export(module, (x,))(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    # Norms that PEFT trains are copies, and the originals, which no longer run, have no statistics.
    with pytest.raises(ValueError, match=r"norm1\.original_module.*exclude=\["):
        trained(tmp_path, le.PRepBN(transition=0.5), Adapted(save=("head", "norm1", "norm2")), max_epochs=1)
    without = le.PRepBN(transition=0.5, exclude=["**.original_module"])
    _, module = trained(tmp_path, without, Adapted(save=("head", "norm1", "norm2")), max_epochs=1)
    assert sum(type(m).__name__ == "BlendNorm" for m in module.modules()) == 5


def test_an_attention_that_holds_a_pair_can_become_linear(tmp_path: Path) -> None:
    callback = partial(le.SimplifiedLinearAttention, kernel_size=3)
    _, module = trained(tmp_path, callback(), Adapted(grid=True))
    swapped = [m for m in module.modules() if type(m).__name__ == "LinearAttention"]
    assert len(swapped) == 2
    assert all("lora_A" in dict(m.qkv.named_children()) for m in swapped)
    with pytest.raises(NoMatchError, match=r"frozen.*another function takes its place, and must be able to train"):
        trained(tmp_path, callback(), Adapted(("fc1",), grid=True))


def test_a_frozen_base_takes_the_temperature_of_an_adapter_once_it_is_merged(tmp_path: Path) -> None:
    """PEFT writes its own adapters alone: before, the temperature would be in a weight that is not saved."""
    _, model = trained(tmp_path, le.TempScale(tau=0.6), Adapted(targets=("fc1",)))
    model, x = model.eval(), torch.randn(3, 1, 8, 8)
    with pytest.raises(ExportError, match=r"PEFT does not save 'net.*qkv.*', .*`merge_and_unload\(\)` first"):
        le.export(model, x)
    expected = model(x)
    model.net = model.net.merge_and_unload()
    plain = le.export(model, x)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_read_as_that_of_the_merged_model(tmp_path: Path) -> None:
    """What the monitor logs of the first step, of a model and of the same one with its pairs merged."""
    found = []
    for merged in (False, True):
        module = Adapted(("qkv",))
        if merged:
            module.net = module.net.merge_and_unload().requires_grad_(True)
        trainer, _ = trained(tmp_path, le.CollapseMonitor(every_n_steps=1), module, limit_train_batches=1, max_epochs=1)
        found.append({name: float(v) for name, v in trainer.callback_metrics.items() if "/entropy_m" in name})
    assert found[0]
    assert found[0] == pytest.approx(found[1], rel=1e-4)

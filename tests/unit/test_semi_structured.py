"""2:4 in PyTorch's format: the pattern, what is compressed and why not the rest, the numbers; on a GPU the real thing.

Without a GPU PyTorch refuses to make such a tensor, but its conversion to the compressed layout and back runs
anywhere, so that here stands in for the compressed weight what comes back from that layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from zoo import Classifier, loader

from lightning_efficient import MagnitudePruning
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.deploy import semi_structured
from lightning_efficient.deploy.export import export
from lightning_efficient.deploy.semi_structured import find_semi_structured, holds_pattern, to_semi_structured
from lightning_efficient.pruning.selection import make_masks

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def there_and_back(weight: Tensor) -> Tensor:
    values, positions = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (weight.shape[0], weight.shape[1] // 2)
    return sparse_semi_structured_to_dense_cutlass(values, positions)


def halved(layer: nn.Linear) -> nn.Linear:
    layer.weight.data *= make_masks({"": layer.weight.detach().abs()}, 0.5, granularity="2:4", scope="layer")[""]
    return layer


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [halved(nn.Linear(64, 128)), nn.ReLU(), halved(nn.Linear(128, 64)), nn.ReLU(), nn.Linear(64, 8)]
    return nn.Sequential(*layers).bfloat16()


def batch(size: int = 4) -> Tensor:
    return torch.randn(size, 64, dtype=torch.bfloat16)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "_check_device", lambda device, found: None)


def test_the_pattern_by_brute_force() -> None:
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        weight = (torch.rand(3, 8, generator=g) < 0.4).float()
        runs = [row[i : i + 4] for row in weight.tolist() for i in (0, 4)]
        assert holds_pattern(weight) == all(sum(v != 0 for v in run) <= 2 for run in runs)
    assert holds_pattern(torch.tensor([[0.0, 0, 0, 5]]), 1, 4)
    assert not holds_pattern(torch.tensor([[torch.nan, 1, 1, 0]])), "a NaN is not zero"
    assert not holds_pattern(torch.zeros(4, 6)), "four does not divide six"
    assert not holds_pattern(torch.zeros(4, 4, 3, 3)), "a convolution"


@pytest.mark.usefixtures("anywhere")
def test_compressed_and_checked() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = batch(16)
    seen: list[tuple[int, ...]] = []
    copy = to_semi_structured(model.train(), x, compress=lambda w: seen.append(tuple(w.shape)) or there_and_back(w))  # type: ignore[func-returns-value]
    assert seen == [(128, 64), (64, 128)]
    assert torch.equal(copy(x), model(x)), "nothing but zeros is dropped"
    assert not copy.training
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not copy[0].weight.requires_grad


@pytest.mark.usefixtures("anywhere")
def test_what_torch_refuses_stays_dense() -> None:
    def small_ones_only(weight: Tensor) -> Tensor:
        if weight.shape[0] > 64:
            raise RuntimeError("Error original_tensor.shape is not supported!\nmore")
        return there_and_back(weight)

    model, x = mlp(), batch()
    copy = to_semi_structured(model, x, compress=small_ones_only)
    assert torch.equal(copy[0].weight, model[0].weight)

    def none(weight: Tensor) -> Tensor:
        raise RuntimeError("no library")

    with pytest.raises(ExportError, match=r"can compress none of the layers .*0: RuntimeError: no library"):
        to_semi_structured(model, x, compress=none)


@pytest.mark.usefixtures("anywhere")
def test_other_numbers_are_refused() -> None:
    with pytest.raises(ExportError, match=r"the compressed copy differs from the model.*`tolerance` is 0.05"):
        to_semi_structured(mlp(), batch(), compress=lambda w: w * 1.5)

    def broken(weight: Tensor) -> Tensor:
        return weight[:, :32]

    with pytest.raises(ExportError, match="the compressed copy fails where the model does not: RuntimeError"):
        to_semi_structured(mlp(), batch(), compress=broken)
    with pytest.raises(ValueError, match="`tolerance` is -1; expected a number >= 0"):
        to_semi_structured(mlp(), batch(), tolerance=-1)


def test_why_not_float32() -> None:
    weight = halved(nn.Linear(64, 64)).weight.detach()
    assert torch.equal(there_and_back(weight.half()), weight.half())
    assert bool((there_and_back(weight) != weight).any()), "float32 may be compressed too: add it to DTYPES"


def test_reasons() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = halved(nn.Linear(64, 64)).bfloat16()
            self.full = nn.Linear(64, 64).bfloat16()
            self.wide = halved(nn.Linear(64, 64))
            self.one = halved(nn.Linear(64, 64)).bfloat16()
            self.other = nn.Linear(64, 64)
            self.other.weight = self.one.weight
            self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)).bfloat16()
            self.attention = nn.MultiheadAttention(64, 4, dtype=torch.bfloat16)
            halved(self.attention.out_proj)

    found = find_semi_structured(Model())
    assert found.compressed == ["good"]
    assert found.dense == {
        "full": "no 2:4 pattern",
        "wide": "torch.float32 has no such kernel",
        "one": "its weight is tied",
        "other": "its weight is tied",
        "computed": "its weight is computed, not a parameter",
        "attention.out_proj": "inside nn.MultiheadAttention, whose fused kernels read the weight themselves",
    }
    assert str(found).startswith("1 linear layers compressed 2:4, 6 dense (full: no 2:4 pattern; ")


@pytest.mark.usefixtures("anywhere")
def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ExportError, match=r"no linear layer holds the 2:4 pattern.*granularity='2:4'"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 64).bfloat16()), batch())


def test_the_processor_is_refused_with_what_is_needed() -> None:
    with pytest.raises(
        ExportError,
        match=r"compute capability 8.0 \(Ampere\) or newer.*the model is on cpu. Move it there: "
        r"`model.cuda\(\).half\(\)`. Of this model: 2 linear layers compressed 2:4, 1 dense \(4: no 2:4 pattern\)",
    ):
        to_semi_structured(mlp(), batch())


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ExportError, match=r"the model is on cuda:0, compute capability 7.5"):
        semi_structured._check_device(torch.device("cuda:0"), find_semi_structured(mlp()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    semi_structured._check_device(torch.device("cuda:0"), find_semi_structured(mlp()))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_from_training_to_the_compressed_copy(tmp_path: Path) -> None:
    module = Classifier("timm_vit")
    pruning = MagnitudePruning(amount=0.5, granularity="2:4", schedule="one_shot", include=["net.blocks"])
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=4, accelerator="cpu", default_root_dir=tmp_path, callbacks=[pruning], **quiet)
    trainer.fit(module, loader(8))
    x = next(iter(loader(8)))[0].bfloat16()
    plain = export(module.net, x.float()).bfloat16()
    found = find_semi_structured(plain)
    blocks = [name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks")]
    assert found.compressed == blocks
    assert set(found.dense.values()) == {"no 2:4 pattern"}
    copy = to_semi_structured(plain, x, compress=lambda w: w.clone())
    assert torch.equal(copy(x), plain(x))


@pytest.mark.skipif(not GPU, reason="PyTorch has kernels for NVIDIA GPUs of compute capability 8.0 or newer only")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_thing(dtype: torch.dtype) -> None:
    model, x = mlp().to("cuda", dtype), torch.randn(32, 64, device="cuda", dtype=dtype)
    copy = to_semi_structured(model, x)
    assert type(copy[0].weight.data) is not Tensor
    torch.testing.assert_close(copy(x), model(x), rtol=5e-2, atol=5e-2)

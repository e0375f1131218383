"""What sigmaReparam covers beyond layers that are known, what it does not, and that it says so; low-rank updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import SigmaReparam
from lightning_efficient.weightspace import Block, SpectralTransform
from lightning_efficient.weightspace.sigma_reparam import (
    SigmaReparamConfig,
    apply_sigma_reparam,
    find_targets,
    find_uses,
)
from lightning_efficient.weightspace.used import low_rank

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Odd(nn.Module):
    """Matrices in every place that is no layer, and parameters that are none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.experts = nn.Parameter(torch.randn(3, 6, 4))
        self.back = nn.ParameterList([nn.Parameter(torch.randn(3, 4, 6))])
        self.gathered = nn.Parameter(torch.randn(4, 6, 6))
        self.heads = nn.Parameter(torch.randn(2, 3, 6))  # summed over: one matrix of another shape
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.expert_bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x + self.positions) @ self.matrix.t()
        y = torch.einsum("bti,eio->beto", x, self.experts) + self.expert_bias[:, None]
        y = torch.stack([F.linear(y[:, e], self.back[0][e].t()) for e in range(3)]).sum(0)
        y = torch.bmm(y, self.gathered[torch.tensor([3, 1])])
        return torch.einsum("bthd,hdo->bto", y.unflatten(-1, (2, 3)), self.heads)


def run(model: Odd) -> Tensor:
    return model(torch.randn(2, 5, 6))


def test_parameters_are_matrices_by_what_they_do() -> None:
    model = Odd()
    uses = find_uses(model, lambda: run(model))
    assert uses == {
        "matrix": "matrix", "experts": "stack", "back.0": "stack", "gathered": "stack", "heads": "other",
    }  # fmt: skip
    found = find_targets(model, uses=uses)
    assert set(found.matched) == {"inner.weight", "matrix", "experts", "back.0", "gathered"}
    assert "another shape" in found.skipped["heads"]
    total = sum(p.numel() for p in model.parameters())
    covered = sum(p.numel() for p, _ in found.matched.values())
    assert found.coverage.startswith(f"{covered / total:.2%} of {total:,} trained parameters; not bounded: ")
    for words in (f"in no matrix product {42 / total:.2%}", "heads (multiplied in another shape", "vectors"):
        assert words in found.coverage


def test_without_a_forward_they_are_named() -> None:
    found = find_targets(Odd())
    assert set(found.matched) == {"inner.weight"}
    assert all("give an `example`" in found.skipped[name] for name in ("matrix", "experts", "back.0", "positions"))


def test_globs_reach_them() -> None:
    model = Odd()
    uses = find_uses(model, lambda: run(model))
    assert set(find_targets(model, exclude=["experts", "back"], uses=uses).matched) == {
        "inner.weight", "matrix", "gathered",
    }  # fmt: skip
    assert set(find_targets(model, include=["back"], uses=uses).matched) == {"back.0"}


@pytest.mark.parametrize("init", ["preserve", "one"])
def test_a_stack_is_trained_as_so_many_matrices(init: str) -> None:
    """Against autograd on γ W / σ(W), each matrix by itself, in float64."""
    torch.manual_seed(0)
    raw = torch.randn(3, 5, 4, dtype=torch.float64)
    grad = torch.randn(3, 5, 4, dtype=torch.float64)
    transform = SpectralTransform((Block(0, 3, stack=True),), init=init)
    weight = raw.clone()
    transform.start(weight)
    transform.push(weight)
    sigma = torch.linalg.matrix_norm(raw, 2)
    gain = (sigma if init == "preserve" else torch.ones(3, dtype=torch.float64)).clone().requires_grad_()
    w = raw.clone().requires_grad_()
    u, v = torch.stack(transform.left), torch.stack(transform.right)
    hat = (gain / torch.einsum("km,kmn,kn->k", u, w, v))[:, None, None] * w
    torch.testing.assert_close(weight, hat.detach(), rtol=1e-12, atol=1e-12)
    hat.backward(grad)
    pulled = grad.clone()
    transform.pull(weight, pulled)
    torch.testing.assert_close(weight, raw, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pulled, w.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform.theta.grad, gain.grad, rtol=1e-11, atol=1e-11)
    weight.mul_(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None])
    transform.advance(weight)
    torch.testing.assert_close(transform.sigma, sigma * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    transform.push(weight)
    assert transform.fits(weight, 1e-9)
    again = SpectralTransform((Block(0, 3, stack=True),))
    again.load_state_dict(transform.state_dict(), weight)
    assert again.fits(weight, 1e-9)
    with pytest.raises(ValueError, match="holds"):
        SpectralTransform((Block(0, 2, stack=True),)).load_state_dict(transform.state_dict(), weight[:2])


class Lit(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, index: int) -> Tensor:
        if isinstance(self.model, Odd):
            return self.model(batch).square().mean()
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def fit(
    model: nn.Module, data: Any, folder: Path, epochs: int, callback: SigmaReparam, path: str | None = None
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Lit(model), DataLoader(data, batch_size=2), ckpt_path=path)
    return trainer


@pytest.mark.filterwarnings("ignore:SigmaReparam leaves 1 weight")  # `heads`, which cannot be covered
def test_in_fit_and_resumed(tmp_path: Path) -> None:
    data = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    whole, callback = Odd(), SigmaReparam()
    fit(whole, data, tmp_path, 2, callback)
    assert callback.change is not None
    assert "3 gains" in callback.change.targets["model.experts"]
    assert "not bounded: " in callback.change.report()
    half = Odd()
    fit(half, data, tmp_path, 1, SigmaReparam()).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Odd()
    fit(resumed, data, tmp_path, 2, SigmaReparam(), str(tmp_path / "half.ckpt"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


_SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_experts_of_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=4)
    )
    callback = SigmaReparam()
    fit(model, torch.arange(3, 31).view(4, 7), tmp_path, 1, callback)
    assert callback.change is not None
    assert "4 gains" in callback.change.targets["model.model.layers.0.mlp.experts.gate_up_proj"]
    assert "model.model.layers.0.mlp.gate.weight" in callback.change.targets
    assert not callback.change.skipped


def test_by_hand_with_an_example() -> None:
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = run(model).detach()
    change, boundary = apply_sigma_reparam(model, optimizer, SigmaReparamConfig(), example=torch.randn(2, 5, 6))
    assert "gathered" in change.targets
    run(model).square().mean().backward()
    optimizer.step()
    boundary.detach()
    assert before.shape == (2, 5, 6)
    assert change.notes[0].endswith("%")


def test_a_flattened_kernel_is_no_bound_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change, boundary = apply_sigma_reparam(model, optimizer)
    boundary.detach()
    assert "no bound of the convolution" in change.targets["0.weight"]
    assert "no bound" not in change.targets["1.weight"]


def test_layers_that_are_not_covered_are_in_the_line() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LSTM(4, 4), "c": nn.ConvTranspose1d(4, 4, 3)})
    coverage = find_targets(model, uses={}).coverage
    assert "of LSTM" in coverage
    assert "of ConvTranspose1d" in coverage


# -- low-rank updates --------------------------------------------------------------------------------------------------

PEFT = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    "dora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, use_dora=True, init_lora_weights=False),
    "loha": peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=2),
    "lokr": peft.LoKrConfig(target_modules=["q_proj", "v_proj"], r=2),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=10),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)), PEFT[kind])
    with pytest.raises(ValueError, match=r"(low-rank updates of frozen weights.*q_proj|no weight it can work on)"):
        fit(model, torch.arange(3, 31).view(4, 7), tmp_path, 1, SigmaReparam())


def test_a_head_trained_beside_lora_is_taken_when_the_pairs_are_excluded() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    model = peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)), config)
    with pytest.raises(ValueError, match="exclude=") as error:
        find_targets(model)
    exclude = listed(str(error.value))
    matched = find_targets(model, exclude=exclude).matched
    assert [name for name in matched if "lora" in name] == []
    assert any("lm_head" in name for name in matched)


def listed(text: str) -> list[str]:
    return [part.strip(" '\"") for part in text.partition("exclude=[")[2].partition("]")[0].split(",")]


class ByHand(nn.Module):
    def __init__(self, parameters: bool) -> None:
        super().__init__()
        self.base = nn.Linear(8, 6).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 8)) if parameters else nn.Linear(8, 2, bias=False)
        self.up = nn.Parameter(torch.randn(6, 2)) if parameters else nn.Linear(2, 6, bias=False)


class Bottleneck(nn.Module):
    """Not low-rank updates of a matrix: layers of their own, beside frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = (nn.Linear(8, 8).requires_grad_(False) for _ in range(2))
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)


def test_pairs_by_hand_are_known_by_their_shapes() -> None:
    assert {name for name, _ in low_rank(nn.ModuleList([ByHand(False)]))} == {"0.down.weight", "0.up.weight"}
    assert {name for name, _ in low_rank(nn.ModuleList([ByHand(True)]))} == {"0.down", "0.up"}
    assert not list(low_rank(nn.ModuleList([Bottleneck(), nn.Linear(4, 4)])))
    with pytest.raises(ValueError, match=r"low-rank updates.*exclude="):
        find_targets(nn.ModuleList([ByHand(False), nn.Linear(8, 8)]))
    found = find_targets(nn.ModuleList([Bottleneck()]))
    assert set(found.matched) == {"0.down.weight", "0.up.weight"}

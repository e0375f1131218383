"""Hugging Face's ``config`` after a cut: it says what is left, or ``save_pretrained`` refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_efficient.functional as LF
from lightning_efficient import HESSOPruning, cut, export, load_from_checkpoint
from lightning_efficient.common.nests import tensors_behind
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.pretrained import numbers

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40,
    "pad_token_id": 0,
}  # fmt: skip
_CAUSAL = _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}
TOKENS = torch.arange(3, 17).view(2, 7)
WORDS = {"input_ids": TOKENS}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def _model(kind: str, config: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(hf, kind)(getattr(hf, f"{config}Config")(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model  # type: ignore[no-any-return]


def _outputs(model: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tensors_behind(model(**example)) if t.is_floating_point()]


def _alike(groups: Groups, share: Callable[[str, int], int]) -> dict[str, list[int]]:
    """The same number of units in every layer, not the same units."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randperm(g.units, generator=generator)[: share(name, g.units)].tolist()
        for name, g in groups.found.items()
    }


def _comes_back(model: nn.Module, folder: Path, example: Mapping[str, Tensor]) -> Any:
    model.save_pretrained(folder)  # type: ignore[operator]
    again, said = type(model).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(said.values()), said
    for one, two in zip(_outputs(model, example), _outputs(again.eval(), example), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    return again


CASES: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Tensor], dict[str, Any]]] = {
    "grouped queries": (
        lambda: _model("Qwen3ForCausalLM", "Qwen3", head_dim=8, **_CAUSAL), WORDS,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8},
    ),
    "heads with a width that the config derives": (
        lambda: _model("LlamaForCausalLM", "Llama", **_CAUSAL), WORDS,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
    ),
    "a fused projection, split by the config": (
        lambda: _model("Phi3ForCausalLM", "Phi3", eos_token_id=None, bos_token_id=None, head_dim=8, **_CAUSAL), WORDS,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8},
    ),
    "a width that is a ratio": (
        lambda: _model("Dinov2Model", "Dinov2", mlp_ratio=2, image_size=32, patch_size=8, hidden_size=32,
                       num_hidden_layers=2, num_attention_heads=4),
        IMAGES, {"mlp_ratio": 1.0},
    ),
    "a width that is left to a default": (
        lambda: _model("GPTJModel", "GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=40,
                       n_positions=16),
        WORDS, {"n_inner": 64},
    ),
    "encoder and decoder": (
        lambda: _model("T5Model", "T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=40),
        WORDS | {"decoder_input_ids": TOKENS}, {"num_heads": 2, "d_ff": 24, "d_kv": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_config_says_what_is_left(case: str, tmp_path: Path) -> None:
    build, example, expected = CASES[case]
    model = build()
    groups = LF.find_groups(model, dict(example))
    before = sum(p.numel() for p in model.parameters())
    keep = _alike(groups, lambda name, units: units // 2)
    if case in ("a width that is a ratio", "a width that is left to a default"):
        # its heads are as wide as the input, divided by their number
        keep = {name: units for name, units in keep.items() if not groups.found[name].heads}
    LF.apply_slim(model, keep, groups)
    again = _comes_back(model, tmp_path, example)
    assert sum(p.numel() for p in again.parameters()) < 0.9 * before
    assert {name: getattr(again.config, name) for name in expected} == expected


REFUSED = "save_pretrained would write a model that from_pretrained cannot build: units were cut out of it, and "


@pytest.mark.parametrize(
    ("build", "keep", "why"),
    [
        (CASES["grouped queries"][0], lambda name, units: units // 2 - ("1.mlp" in name), "one number for layers"),
        (
            lambda: _model("BertForSequenceClassification", "Bert", **_SIZES),
            lambda name, units: units // 2,
            "from no config",
        ),  # heads are as wide as the input, divided by their number
    ],
)
def test_what_no_config_can_say_is_refused(
    build: Callable[[], nn.Module], keep: Callable[[str, int], int], why: str, tmp_path: Path
) -> None:
    model = build()
    if why == "one number for layers":
        model = _model("Qwen3ForCausalLM", "Qwen3", head_dim=8, **_CAUSAL | {"num_hidden_layers": 4})
        keep = lambda name, units: units - int(name.split(".")[2]) if "mlp" in name else units  # noqa: E731
    groups = LF.find_groups(model, WORDS)
    LF.apply_slim(model, _alike(groups, keep), groups)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=f"{REFUSED}.*{why}.*load_from_checkpoint"):
            one.save_pretrained(tmp_path / "no")  # type: ignore[operator]
    assert not (tmp_path / "no").exists()


def test_a_config_that_another_model_has_too_stays() -> None:
    config = hf.LlamaConfig(**_CAUSAL)
    one, two = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    groups = LF.find_groups(one, WORDS)
    LF.apply_slim(one, _alike(groups, lambda name, units: units // 2), groups)
    assert two.config.intermediate_size == config.intermediate_size == 48
    assert {one.config.intermediate_size, one.model.config.intermediate_size} == {24}
    assert one.model.layers[0].self_attn.config.num_attention_heads == 2


def test_as_many_channels_as_heads_that_stay_are_no_heads() -> None:
    """Half of the channels of each head would have the same shapes as half of the heads."""
    model = _model("LlamaForCausalLM", "Llama", **_CAUSAL)
    groups = LF.find_groups(model, WORDS)
    LF.apply_slim(model, {n: range(g.units // 2) for n, g in groups.found.items() if g.heads}, groups)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)


class Lit(LightningModule):
    """A model of Hugging Face's is a part of it."""

    def __init__(self, kind: str = "LlamaForCausalLM", config: str = "Llama") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.ModuleDict({"lm": _model(kind, config, **_CAUSAL if config == "Llama" else _SIZES)}).train()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net["lm"](input_ids=tokens).logits  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def _pruned(module: LightningModule, **options: Any) -> tuple[HESSOPruning, Trainer]:
    hesso = HESSOPruning(start=0, duration=3, periods=1, **options)
    trainer = Trainer(
        max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[hesso], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(TOKENS.repeat(4, 1), batch_size=2))
    return hesso, trainer


def test_a_part_of_a_module_pruned_in_training_and_exported(tmp_path: Path) -> None:
    module = Lit()
    _pruned(module, uniform=True)
    small = export(module, TOKENS)
    lm = small.net["lm"]
    assert lm.config.intermediate_size < 48 == module.net["lm"].config.intermediate_size
    _comes_back(lm, tmp_path, WORDS)


def test_a_part_of_a_module_cut_saved_and_loaded(tmp_path: Path) -> None:
    module = Lit()
    hesso, trainer = _pruned(module, uniform=True)
    cut(module, hesso.keep, hesso.groups)
    _comes_back(module.net["lm"].eval(), tmp_path / "one", WORDS)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(Lit, tmp_path / "small.ckpt").eval()
    assert dict(numbers(again.net["lm"].config)) == dict(numbers(module.net["lm"].config))
    _comes_back(again.net["lm"], tmp_path / "two", WORDS)


def test_what_was_refused_is_refused_after_loading_and_said_at_export(tmp_path: Path) -> None:
    module = Lit("BertForSequenceClassification", "Bert")
    hesso, trainer = _pruned(module, include=["*attention*"])
    with pytest.warns(UserWarning, match=REFUSED.replace("would", "of the copy would")):
        export(module, TOKENS)
    cut(module, hesso.keep, hesso.groups)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    for one in (module, load_from_checkpoint(Lit, tmp_path / "small.ckpt")):
        with pytest.raises(RuntimeError, match=REFUSED):
            one.net["lm"].save_pretrained(tmp_path / "no")


def test_numbers_of_a_config_in_a_file_are_those_that_build_the_weights(tmp_path: Path) -> None:
    """Others are not believed: nothing is set, and saving is refused."""
    module = Lit()
    hesso, trainer = _pruned(module, uniform=True)
    cut(module, hesso.keep, hesso.groups)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    content = torch.load(tmp_path / "small.ckpt", weights_only=True)
    slim = next(e for e in content["lightning_efficient"]["methods"] if e["method"] == "slim")
    fields = slim["config"]["configs"]["net.lm"]
    fields["intermediate_size"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    again = load_from_checkpoint(Lit, tmp_path / "other.ckpt")
    assert again.net["lm"].config.intermediate_size == 48
    with pytest.raises(RuntimeError, match=REFUSED):
        again.net["lm"].save_pretrained(tmp_path / "no")

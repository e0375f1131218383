"""A temperature does not get lost in Hugging Face's and PEFT's own files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_efficient.functional as LF
from lightning_efficient import TempScale

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40,
}  # fmt: skip
TOKENS = torch.arange(3, 17).view(2, 7)
LOSES = "save_pretrained would lose the temperature.*load_from_checkpoint"


def llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, num_key_value_heads=2)).eval()


def needs_adapters() -> nn.Module:
    torch.manual_seed(0)
    config = hf.BloomConfig(
        hidden_size=16, n_layer=2, n_head=4, vocab_size=40, attention_dropout=0.0, hidden_dropout=0.0
    )
    return hf.BloomForCausalLM(config).eval()


def lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **options)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


class Lit(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, callbacks=[TempScale(tau=0.5, **options)], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Lit(model.train()), DataLoader(TOKENS, batch_size=2))
    model.eval()
    return trainer


def test_weights_are_saved_as_they_are(tmp_path: Path) -> None:
    model = llama()
    LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_weights_after_training(tmp_path: Path) -> None:
    model = llama()
    fit(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("options", [{}, {"mode": "ssmax"}, {"learnable": True}])
def test_adapters_refuse_to_be_lost(tmp_path: Path, options: dict[str, Any]) -> None:
    model = needs_adapters()
    fit(model, tmp_path, **options)
    for part in (model, model.transformer, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=LOSES):
            part.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_is_taken_off_can_be_saved_again(tmp_path: Path) -> None:
    model = needs_adapters()
    before = logits(model)
    LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS})
    with pytest.raises(RuntimeError, match=LOSES):
        model.save_pretrained(tmp_path)
    LF.remove_temp_scale(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.BloomForCausalLM.from_pretrained(tmp_path)), before)


def test_an_own_save_on_the_instance_comes_back() -> None:
    model = needs_adapters()
    model.save_pretrained = own = lambda path: "saved"
    LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS})
    with pytest.raises(RuntimeError, match=LOSES):
        model.save_pretrained("x")
    LF.remove_temp_scale(model)
    assert vars(model)["save_pretrained"] is own


def test_a_callback_that_only_evaluates_leaves_nothing(tmp_path: Path) -> None:
    class Tested(Lit):
        def test_step(self, batch: Tensor, index: int) -> None:
            self.log("loss", self.model(input_ids=batch, labels=batch).loss)

    model = needs_adapters()
    trainer = Trainer(
        logger=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path,
        accelerator="cpu", callbacks=[TempScale(tau=0.5)],
    )  # fmt: skip
    trainer.test(Tested(model), DataLoader(TOKENS, batch_size=2), verbose=False)
    assert "save_pretrained" not in vars(model)


def test_what_peft_writes_may_hold_it(tmp_path: Path) -> None:
    model = lora(llama(), use_dora=True)  # the magnitudes scale the queries
    LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS})
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}])
def test_lora(tmp_path: Path, options: dict[str, Any]) -> None:
    model = lora(llama(), **options)
    before = logits(model)
    LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS})
    assert (logits(model) - before).abs().max() > 1e-4
    with pytest.raises(RuntimeError, match=LOSES):
        model.save_pretrained(tmp_path)
    LF.remove_temp_scale(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), before)


def test_lora_in_training(tmp_path: Path) -> None:
    model = lora(llama())
    fit(model, tmp_path)
    with pytest.raises(RuntimeError, match=LOSES):
        model.save_pretrained(tmp_path / "no")
    merged = model.merge_and_unload()
    with pytest.raises(RuntimeError, match=LOSES):
        merged.save_pretrained(tmp_path / "no")


def test_a_frozen_network_that_is_evaluated_is_no_reference(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config).eval()
    assert len(LF.apply_temp_scale(model, 0.5, example={"input_ids": TOKENS}).targets) == 2
    with pytest.raises(RuntimeError, match=LOSES):
        model.save_pretrained(tmp_path)

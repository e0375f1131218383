"""Folders of exported models: read by the libraries' own loaders, with a card; refused where these cannot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import lightning_efficient.functional as LF
from lightning_efficient import attach, export, save_pretrained
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.saving import refuse_saving

TOKENS = {"input_ids": torch.arange(3, 17).view(2, 7)}
IMAGES = torch.randn(2, 3, 32, 32)
MASKS: dict[str, dict[str, Any]] = {"magnitude_pruning": {"amount": 0.5, "schedule": "constant"}}


def vit() -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=4
    )
    return net


def bert() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    return hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


def masked(net: nn.Module) -> nn.Module:
    driver = attach(net, torch.optim.SGD(net.parameters(), 0.1), MASKS, total_steps=1)
    driver.step()
    return driver.finish()


@pytest.mark.parametrize(("make", "inputs"), [(vit, IMAGES), (bert, TOKENS)], ids=["timm", "transformers"])
def test_round_trip(make: Any, inputs: Any, tmp_path: Path) -> None:
    plain = export(masked(make()), inputs)
    folder = tmp_path / "new" / "model"
    assert save_pretrained(plain, folder, inputs, methods=MASKS, before=make()).absolute == 0
    if make is vit:
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        again = type(plain).from_pretrained(folder)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    card = (folder / "README.md").read_text("utf-8")
    assert '"amount": 0.5' in card
    assert "| before |" in card
    assert "max abs difference 0" in card
    assert (folder / "model.safetensors").is_file()
    assert (folder / "config.json").is_file()


def test_methods_as_attach_takes_them(tmp_path: Path) -> None:
    save_pretrained(bert().eval(), tmp_path, TOKENS, methods={"sigma_reparam": None, **MASKS})
    assert "- `sigma_reparam`\n\n  ```json\n  {}" in (tmp_path / "README.md").read_text("utf-8")


def test_a_changed_form_is_refused(tmp_path: Path) -> None:
    """Folded norms: the architecture's name builds another network."""
    net = vit()
    driver = attach(
        net, torch.optim.SGD(net.parameters(), 0.01), {"norm_swap": {"hold": 1, "transition": 1}}, total_steps=2,
        example=IMAGES,
    )  # fmt: skip
    net.train()
    for _ in range(2):
        net(IMAGES).square().mean().backward()
        driver.before_step()
        driver.step()
    plain = export(driver.finish([IMAGES]), IMAGES)
    (tmp_path / "model").mkdir()
    with pytest.raises(ExportError, match="timm cannot build VisionTransformer as it is now"):
        save_pretrained(plain, tmp_path / "model", IMAGES)
    assert not list((tmp_path / "model").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def pruned(model: Any, example: dict[str, torch.Tensor], heads: bool = True) -> Any:
    """Heads, and other widths in each layer: no config says any of that."""
    groups = LF.find_groups(model, example)
    found = [(name, g.units) for name, g in groups.found.items() if heads or not g.heads]
    keep = {name: range(max(1, units - 1 - i)) for i, (name, units) in enumerate(found)}
    LF.apply_slim(model, keep, groups)
    return model.eval()


def small(kind: str, **options: Any) -> Any:
    """A model of Hugging Face's with two layers, perturbed, as initial biases are zero."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = getattr(hf, kind.partition("For")[0].removesuffix("Model") + "Config")(**sizes, **options)
    model = getattr(hf, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


PRUNED: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "AutoModelForSequenceClassification": (
        lambda: small("ElectraForSequenceClassification", vocab_size=32, embedding_size=8), TOKENS
    ),
    "AutoModel": (lambda: small("DebertaModel", vocab_size=32, pos_att_type="c2p", relative_attention=True), TOKENS),
    "AutoModelForImageClassification": (
        lambda: small("DeiTForImageClassification", image_size=32, patch_size=8), {"pixel_values": IMAGES}
    ),
}  # fmt: skip


@pytest.mark.parametrize("auto", PRUNED)
def test_what_no_config_can_say_is_built_by_code(auto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded without this package, trained as it is, and written once more."""
    import transformers as hf

    monkeypatch.setattr(hf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    make, example = PRUNED[auto]
    model = pruned(make(), example)
    with pytest.raises(RuntimeError, match=r"lightning_efficient\.save_pretrained"):
        model.save_pretrained(tmp_path / "no")
    folder = tmp_path / "model"
    assert save_pretrained(model, folder, example).absolute == 0
    with pytest.raises(RuntimeError, match="ismatch"):
        type(model).from_pretrained(folder)
    assert f"{auto}.from_pretrained(folder, trust_remote_code=True)" in (folder / "README.md").read_text("utf-8")
    assert "lightning_efficient" not in (folder / "modeling_cut.py").read_text("utf-8")
    again = getattr(hf, auto).from_pretrained(folder, trust_remote_code=True)
    assert isinstance(again, type(model))
    with torch.no_grad():
        torch.testing.assert_close(again(**example)[0], model(**example)[0], rtol=0, atol=0)
    smaller = pruned(again, example, heads=False)
    assert save_pretrained(smaller, folder, example).absolute == 0
    again = getattr(hf, auto).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**example)[0], smaller(**example)[0], rtol=0, atol=0)


def test_tensors_that_the_class_does_not_build_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = bert()
    model.bert.encoder.layer[0].extra = nn.Linear(2, 2)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with pytest.raises(ExportError, match=r"does not build: \['bert\.encoder\.layer\.0\.extra\.bias'"):
        save_pretrained(model.eval(), tmp_path / "model", TOKENS)
    assert not list(tmp_path.iterdir())
    logger.removeHandler(caplog.handler)
    assert caplog.messages == [], "the loader's report"


def test_a_model_that_refuses_by_itself_says_why_in_its_own_words(tmp_path: Path) -> None:
    model = bert().eval()
    refuse_saving(model, "cut", "would lose a cut.", of=[model])
    with pytest.raises(ExportError, match=r"^save_pretrained would lose a cut\.$"):
        save_pretrained(model, tmp_path / "model", TOKENS)
    assert not list(tmp_path.iterdir())


def test_other_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Linear is a model of neither.*\.pt2"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "model", torch.randn(1, 2))

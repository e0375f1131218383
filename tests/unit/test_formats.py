"""Files of exported models are read back, run and compared before they take their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from lightning_efficient import formats
from lightning_efficient.formats import save_exported, to_onnx, to_torch_export
from lightning_efficient.inference import Difference, ExportError


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Decoder(nn.Module):
    """Causal, plain attention, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.head(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ManyOutputs(nn.Module):
    """Keyword inputs in another order than the signature's, and outputs whose names are not sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"z": self.linear(a) - b, "a": (a + b, b * 2)}


def cnn() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    for _ in range(3):
        net(torch.randn(8, 3, 8, 8))  # moves the running statistics
    return net


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    net = BertModel(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return net, {"input_ids": torch.randint(20, (2, 5)), "attention_mask": mask}


def vit() -> tuple[nn.Module, Any]:
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    return net, torch.randn(2, 3, 32, 32)


MODELS = {
    "timm_vit": vit,
    "encoder": lambda: (EncoderClassifier(), torch.randn(2, 5, 16)),
    "decoder": lambda: (Decoder(), torch.randint(12, (2, 7))),
    "cnn": lambda: (cnn(), torch.randn(2, 3, 8, 8)),
    "bert": bert,
    "lightning": lambda: (Lit(cnn()), torch.randn(2, 3, 8, 8)),
    "weight_norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)),
    "many_outputs": lambda: (ManyOutputs(), {"b": torch.randn(2, 3), "a": torch.randn(2, 3)}),
}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", MODELS)
def test_programs_compute_what_the_model_computes(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.train()
    path = tmp_path / "made" / f"model{suffix}"
    state = torch.get_rng_state()
    apart = save_exported(model, inputs, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert isinstance(apart, Difference)
    assert apart.relative <= 1e-5
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # Read back here too, with other values: what was compared must be in the file under its final name.
    kwargs = inputs if isinstance(inputs, dict) else {"x": inputs}
    kwargs = {k: v.flip(0) for k, v in kwargs.items()}
    args = () if isinstance(inputs, dict) else (kwargs.pop("x"),)
    with torch.no_grad():
        expected = next(iter(formats.named_tensors(model.eval()(*args, **kwargs))))[1]
        if suffix == ".pt2":
            found = next(iter(formats.named_tensors(torch.export.load(path).module()(*args, **kwargs))))[1]
        else:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            feed = [t.numpy() for t in (*args, *kwargs.values())]
            names = [node.name for node in session.get_inputs()]
            found = torch.from_numpy(session.run(None, dict(zip(names, feed, strict=True)))[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save", [to_torch_export, to_onnx])
@pytest.mark.parametrize("name", ["cnn", "bert", "timm_vit"])
def test_dynamic_batch(name: str, save: Any, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    one = {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    path = tmp_path / "model.bin"
    save(model, one, path, dynamic_batch=True)
    if save is to_torch_export:
        many = (
            {k: v.repeat(3, 1) for k, v in inputs.items()} if isinstance(inputs, dict) else (inputs.repeat(3, 1, 1, 1),)
        )
        program = torch.export.load(path).module()
        out = program(**many) if isinstance(many, dict) else program(*many)
        assert next(iter(formats.named_tensors(out)))[1].shape[0] == 6


def test_a_fixed_batch_program_refuses_other_sizes(tmp_path: Path) -> None:
    to_torch_export(cnn(), torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    with pytest.raises(AssertionError):
        torch.export.load(tmp_path / "m.pt2").module()(torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dict_loads_weights_only(suffix: str, tmp_path: Path) -> None:
    model, other = Decoder(), Decoder()
    assert save_exported(model, None, tmp_path / f"m{suffix}") is None
    other.load_state_dict(torch.load(tmp_path / f"m{suffix}", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_safetensors_holds_tied_weights_once(tmp_path: Path) -> None:
    model, other = Decoder(), Decoder()
    model.qkv.weight.data = model.qkv.weight.data.t().contiguous().t()  # safetensors alone refuses these strides
    with torch.no_grad():
        model.qkv.bias[0] = float("nan")  # a diverged model is still the model
    save_exported(model, None, tmp_path / "m.safetensors")
    assert len(load_file(tmp_path / "m.safetensors")) == len(list(model.parameters())) == 3
    load_model(other, tmp_path / "m.safetensors")
    assert other.head.weight is other.embed.weight
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("suffix", ["", ".bin", ".ckpt"])
def test_unknown_suffix(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.pt2, \.onnx, \.safetensors, \.pt, \.pth"):
        save_exported(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "deep" / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_program_needs_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass `example_inputs`"):
        save_exported(nn.Linear(2, 2), None, tmp_path / "model.pt2")


def _wrong(*args: Any, **kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [torch.zeros(1, 2)]

    return run


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_wrong_program_replaces_nothing(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("the old file")
    wrong = type("Program", (), {"module": _wrong})()
    monkeypatch.setattr(torch.export, "load", lambda path: wrong)
    monkeypatch.setattr(formats, "_onnxruntime", _wrong)
    with pytest.raises(ExportError, match=r"program differs from the model.*max abs difference"):
        save_exported(nn.Linear(2, 2), torch.randn(1, 2), path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_tensors_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    model = nn.Linear(2, 2)
    for read, message in [
        ({**model.state_dict(), "bias": torch.ones(2)}, "'bias' was read back differently"),
        ({"weight": model.weight.detach()}, "missing from the file: \\['bias'\\]"),
    ]:
        monkeypatch.setattr(torch, "load", lambda path, weights_only, read=read: read)
        with pytest.raises(ExportError, match=message):
            save_exported(model, None, path)
    assert not list(tmp_path.iterdir())


class Unsafe(nn.Linear):
    def get_extra_state(self) -> Any:
        return Path("somewhere")

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_objects_in_the_state_dict(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="state dict"):
        save_exported(Unsafe(2, 2), None, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_models_that_cannot_be_traced(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch\.export cannot trace the model: \w+"):
        save_exported(DataDependent(), torch.ones(2), tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_models_that_onnx_cannot_express(tmp_path: Path) -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, 3

    with pytest.raises(ExportError, match=r"torch\.onnx cannot convert the model: \w+"):
        to_onnx(Number(), torch.ones(2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "package"),
    [(".onnx", "onnx"), (".onnx", "onnxscript"), (".onnx", "onnxruntime"), (".safetensors", "safetensors")],
)
def test_missing_packages_say_how_to_install(
    suffix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^{package} missing; install with `pip install {package}`.$"):
        save_exported(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_weights_of_large_models_lie_beside_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PROTOBUF_LIMIT", 1000)
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    to_onnx(model, x, tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())

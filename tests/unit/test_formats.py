"""Files of exported models are read back, run and compared before they take their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from export_models import MODELS, Decoder, cnn
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from lightning_efficient.common.comparing import Difference, ExportError
from lightning_efficient.common.running import Call, as_call
from lightning_efficient.deploy import formats
from lightning_efficient.deploy.formats import save_exported, to_onnx, to_torch_export


def tail(test: str, cell: dict[str, Any]) -> bool:
    """ONNX takes longest: what its exporter finds in these models, it finds in the others, too."""
    if test == "test_dynamic_batch":
        return cell["name"] == "bert" and cell["save"] is to_onnx
    programs = test == "test_programs_compute_what_the_model_computes" and cell["suffix"] == ".onnx"
    return programs and cell["name"] in ("timm_vit", "encoder")


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
    flipped = {k: v.flip(0) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.flip(0)
    with torch.no_grad():
        expected = formats._flat(as_call(flipped).run(model.eval()))[0]
    torch.testing.assert_close(_first_output(path, as_call(flipped), suffix == ".onnx"), expected, rtol=1e-4, atol=1e-5)


def _first_output(path: Path, call: Call, onnx: bool) -> Tensor:
    """Of a program, run without any code of the package."""
    if not onnx:
        return formats._flat(torch.export.load(path).module()(*call.args, **(call.kwargs or {})))[0].detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = [t.numpy() for t in (*call.args, *(call.kwargs or {}).values())]
    feed = dict(zip([node.name for node in session.get_inputs()], values, strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("save", [to_torch_export, to_onnx])
@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_dynamic_batch(name: str, save: Any, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    one = {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    save(model.eval(), one, tmp_path / "model", dynamic_batch=True)
    call = as_call(inputs).resized(6)
    with torch.no_grad():
        expected = formats._flat(call.run(model))[0]
    assert len(expected) == 6
    torch.testing.assert_close(_first_output(tmp_path / "model", call, save is to_onnx), expected, rtol=1e-4, atol=1e-5)


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
    save_exported(model, None, tmp_path / "m.safetensors")
    assert len(load_file(tmp_path / "m.safetensors")) == len(list(model.parameters())) == 3
    load_model(other, tmp_path / "m.safetensors")
    assert other.head.weight is other.embed.weight
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_arguments_in_another_order() -> None:
    with pytest.raises(TypeError, match="`path` should name a file; got Tensor: it is the last"):
        save_exported(torch.nn.Linear(2, 2), "model.pt2", torch.zeros(1, 2))  # type: ignore[arg-type]


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

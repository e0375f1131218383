"""Small models for the attention temperature, one for each way of writing attention, with an example of their input."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


def benchmark(name: str) -> Any:
    """A module beside the benchmark scripts."""
    if BENCHMARKS not in sys.path:
        sys.path.append(BENCHMARKS)
    return importlib.import_module(name)


class Split(nn.Module):
    """Projections in one module, attention in another, and a plain residual."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.k = self.q if tied else self.k
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.core(q, k, v).transpose(1, 2).flatten(2)


class Core(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out = self.layers(x, src_key_padding_mask=padding)
        # The fused path writes zeros where the other one writes whatever comes out.
        return out if padding is None else out.masked_fill(padding[..., None], 0.0)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.attn(x, y, y, attn_mask=mask, need_weights=False)[0]


def timm_model(name: str, fused: bool = True, size: int = 32, **options: Any) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, img_size=size, num_classes=3, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model, torch.randn(2, 3, size, size)


def vit(**options: Any) -> tuple[nn.Module, Any]:
    return timm_model("vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, **options)


def hugging_face(family: str, kind: str = "sdpa") -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: benchmark("tiny_transformers").build(family, kind)


SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4}
# Name -> (model and example, where the temperature goes).
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
    "vit": (vit, "weights"),
    "vit unfused": (lambda: vit(fused=False), "weights"),
    "vit, query norm": (lambda: vit(qk_norm=True), "weights"),
    "beit": (
        lambda: timm_model("beit_base_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3), "weights",
    ),
    "swin": (lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN), "weights"),
    "swin v2": (lambda: timm_model("swinv2_tiny_window8_256", **SWIN), "adapter"),
    "eva": (lambda: timm_model("eva02_tiny_patch14_224", size=28, embed_dim=24, depth=2, num_heads=3), "weights"),
    "split": (lambda: (Split(), torch.randn(2, 5, 8)), "weights"),
    "tied": (lambda: (Split(tied=True), torch.randn(2, 5, 8)), "adapter"),
    "encoder": (
        lambda: (Encoder(), (torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))), "weights",
    ),
    "cross": (lambda: (Cross(), (torch.randn(2, 5, 8), torch.randn(2, 6, 8), torch.zeros(5, 6))), "weights"),
    "bert": (hugging_face("bert"), "weights"),
    "bert eager": (hugging_face("bert", "eager"), "weights"),
    "mpnet": (hugging_face("mpnet"), "weights"),
    "t5": (hugging_face("t5"), "weights"),
    "deberta": (hugging_face("deberta-v2, own positions"), "weights"),
    "gpt2": (hugging_face("gpt2"), "weights"),
    "gpt_neox": (hugging_face("gpt_neox"), "weights"),
    "llama": (hugging_face("llama"), "weights"),
    "qwen3": (hugging_face("qwen3"), "weights"),
    "gemma3": (hugging_face("gemma3"), "adapter"),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode in which no parameter is zero and nothing is dropped, and its example."""
    torch.manual_seed(0)
    model, example = MODELS[name][0]()
    for module in model.modules():
        rates = [key for key, value in vars(module).items() if isinstance(value, float) and "drop" in key]
        vars(module).update(dict.fromkeys([*rates, *["p"] * isinstance(module, nn.Dropout)], 0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), example


def call(model: nn.Module, example: Any) -> Tensor:
    """The model's first output."""
    if isinstance(example, dict):
        return first(model(**example))
    return first(model(*example) if isinstance(example, tuple) else model(example))


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def cast(example: Any, dtype: torch.dtype) -> Any:
    if isinstance(example, dict):
        return {key: cast(value, dtype) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(cast(value, dtype) for value in example)
    return example.to(dtype) if example.is_floating_point() else example

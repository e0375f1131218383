"""Models whose norms are replaced by random per-channel affines, for the tests and the table of folding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from lightning_efficient.surgery.replace import replace_modules

Table = dict[str, tuple[Tensor, Tensor, Any]]


class Affine(nn.Module):
    """What a finished norm is: ``a * x + b``. ``eps`` is what nn.TransformerEncoderLayer asks a norm for."""

    eps = math.nan

    def __init__(self, a: Tensor, b: Tensor, axis: Any = "last") -> None:
        super().__init__()
        self.weight, self.bias, self.axis = nn.Parameter(a), nn.Parameter(b), axis

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2)) if self.axis == 1 else (-1,)
        return self.weight.view(shape) * x + self.bias.view(shape)


def is_norm(module: nn.Module) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return isinstance(module, nn.LayerNorm | LlamaRMSNorm)


def swap(model: nn.Module, shift: float = 0.5) -> Table:
    """Put a random affine in the place of every norm; every other parameter is drawn anew, so that none is zero."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    table: Table = {}
    for name, module in model.named_modules():
        if is_norm(module):
            a = torch.rand(module.weight.shape, dtype=module.weight.dtype) + 0.5
            axis = 1 if isinstance(module, LayerNorm2d) else "last"
            table[name] = (a, shift * torch.randn_like(a), axis)
    replace_modules(model, {name: Affine(*affine) for name, affine in table.items()})
    return table


def deepest_difference(before: Any, after: Any) -> float:
    """Relative to the largest value, over all tensors of two outputs."""
    one, two = (_leaves(output) for output in (before, after))
    assert len(one) == len(two) > 0
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, two, strict=True))


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [leaf for item in items for leaf in _leaves(item)]


class Decoder(nn.Module):
    """One causal block and a head tied to the embedding."""

    def __init__(self, tied: bool = True, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.norm1, self.norm2, self.final = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        n = self.norm1(h)
        split = [f(n).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        a = F.scaled_dot_product_attention(*split, is_causal=True)
        h = h + self.proj(a.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(self.final(h))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` and a classifier on the mean token."""

    def __init__(self, norm_first: bool, bias: bool = True, depth: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, bias=bias)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=not norm_first and bias)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def vit(**kwargs: Any) -> nn.Module:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    return timm.models.VisionTransformer(**(options | kwargs))


def hugging_face(name: str, **kwargs: Any) -> nn.Module:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "bert":
        config = BertConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )  # fmt: skip
        return BertModel(config)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=16, n_embd=16, n_layer=2, n_head=2, **kwargs))
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=16, **kwargs,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def images(size: int, batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, size, size, dtype=torch.float64)}


def tokens(length: int = 6) -> dict[str, Any]:
    return {"input_ids": torch.randint(12, (2, length)), "use_cache": False}


# name -> (model, inputs)
MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "vit": lambda: (vit(), images(16)),
    "vit_gap": lambda: (vit(global_pool="avg", class_token=False), images(16)),
    "deit_distilled": lambda: (
        timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=2, num_classes=10),
        images(32),
    ),
    "swin": lambda: (swin(224), images(224, 1)),
    "swin_padded": lambda: (swin(192), images(192, 1)),
    "swin_any_size": lambda: (swin(56, strict_img_size=False), images(56, 1)),
    "pvt": lambda: (
        timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 16), num_classes=10),
        images(64),
    ),
    "convnext": lambda: (
        timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10),
        images(64),
    ),
    "mixer": lambda: (
        timm.models.MlpMixer(img_size=16, patch_size=8, num_blocks=2, embed_dim=24, num_classes=10),
        images(16),
    ),
    "bert": lambda: (
        hugging_face("bert"),
        {"input_ids": torch.randint(12, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
    ),
    "gpt2": lambda: (hugging_face("gpt2"), tokens()),
    "llama": lambda: (hugging_face("llama"), tokens()),
    "llama_eager": lambda: (hugging_face("llama", attn_implementation="eager"), tokens()),
    "decoder": lambda: (Decoder(), {"tokens": torch.randint(12, (2, 6))}),
    "decoder_untied": lambda: (Decoder(tied=False), {"tokens": torch.randint(12, (2, 6))}),
    "encoder_pre": lambda: (Encoder(norm_first=True), {"x": torch.randn(2, 5, 16, dtype=torch.float64)}),
    "encoder_pre_no_bias": lambda: (
        Encoder(norm_first=True, bias=False),
        {"x": torch.randn(2, 5, 16, dtype=torch.float64)},
    ),
    "encoder_post": lambda: (Encoder(norm_first=False), {"x": torch.randn(2, 5, 16, dtype=torch.float64)}),
}


def swin(size: int, **kwargs: Any) -> nn.Module:
    options = {"img_size": size, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    return timm.create_model("swin_tiny_patch4_window7_224", **options, **kwargs)

"""The models and data of ``sigma_gain_study.py``: several small transformers of one shape, trained side by side.

A weight of ``n`` of them is one parameter ``(n, out, in)``, a stack of matrices, which ``SigmaReparam`` gives a gain
each. Nothing couples them: on one core they cost little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from stability_tasks import Batch, read_text
from torch import Tensor, nn

from lightning_efficient.demo.data import Digits

LENGTH = 32  # characters of a window


@dataclass(frozen=True)
class Shape:
    """A transformer.

    Args:
        tokens: Of an image, or of a window of text.
        width, depth, heads: The usual.
        outputs: Classes or symbols.
        inputs: Values of a patch; None: a table of symbols is read instead.
        norm: Where the norms stand; ``"none"``: there are none.
        small: Linear layers start as N(0, 0.02), as timm's ViT does; otherwise uniform in ±1/√inputs, as torch's do.
    """

    tokens: int
    width: int
    depth: int
    outputs: int
    inputs: int | None = None
    heads: int = 4
    norm: Literal["pre", "post", "none"] = "pre"
    small: bool = False


class Transformers(nn.Module):
    """One transformer for every seed; images are averaged over their patches, text is read causally."""

    def __init__(self, shape: Shape, seeds: Sequence[int]) -> None:
        super().__init__()
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        width, std = shape.width, 0.02
        if shape.inputs is None:
            self.table = nn.Parameter(self.drawn(shape.outputs, width) * std)
        else:
            self.add_linear("embed", shape.inputs, width, small=False)
        self.position = nn.Parameter(self.drawn(shape.tokens, width) * std)
        for i in range(shape.depth):
            for name, inputs, outputs in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1)):
                self.add_linear(f"{name}{i}", inputs * width, outputs * width, shape.small)
            self.add_norm(f"norm1_{i}")
            self.add_norm(f"norm2_{i}")
        if shape.norm == "pre":
            self.add_norm("norm")
        self.add_linear("head", width, shape.outputs, shape.small)

    def drawn(self, *size: int) -> Tensor:
        return torch.stack([torch.randn(*size, generator=generator) for generator in self.generators])

    def add_linear(self, name: str, inputs: int, outputs: int, small: bool) -> None:
        count, bound = len(self.generators), 1 / math.sqrt(inputs)

        def uniform(*size: int) -> Tensor:
            return torch.stack([torch.rand(*size, generator=g) * 2 * bound - bound for g in self.generators])

        weight = self.drawn(outputs, inputs).clamp(-2, 2) * 0.02 if small else uniform(outputs, inputs)
        # Of one seed a matrix, as a stack of one is nothing that SigmaReparam takes for matrices.
        self.register_parameter(name, nn.Parameter(weight if count > 1 else weight[0]))
        bias = torch.zeros(count, 1, outputs) if small else uniform(1, outputs)
        self.register_parameter(f"{name}_bias", nn.Parameter(bias))

    def add_norm(self, name: str) -> None:
        if self.shape.norm != "none":
            size = (len(self.generators), 1, self.shape.width)
            self.register_parameter(name, nn.Parameter(torch.ones(size)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(size)))

    def apply_linear(self, name: str, x: Tensor) -> Tensor:
        weight = self._parameters[name]
        assert weight is not None
        stack = weight.view(-1, *weight.shape[-2:]).transpose(1, 2)
        return torch.baddbmm(self._parameters[f"{name}_bias"], x, stack)  # type: ignore[arg-type]

    def apply_norm(self, name: str, x: Tensor) -> Tensor:
        if self.shape.norm == "none":
            return x
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(self._parameters[f"{name}_bias"], normed, self._parameters[name])  # type: ignore[arg-type]

    def attention(self, i: int, x: Tensor) -> Tensor:
        """``x``: (seeds, batch · tokens, width)."""
        count, _, width = x.shape
        parts = self.apply_linear(f"qkv{i}", x).view(count, -1, self.shape.tokens, 3, self.shape.heads, width // 4)
        q, k, v = parts.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.shape.inputs is None)
        return self.apply_linear(f"proj{i}", mixed.transpose(1, 2).reshape(x.shape))

    def mlp(self, i: int, x: Tensor) -> Tensor:
        return self.apply_linear(f"fc2{i}", F.gelu(self.apply_linear(f"fc1{i}", x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(seeds, batch, classes)`` of images ``(seeds, batch, patches, inputs)``, or for every character."""
        count, batch = x.shape[:2]
        if self.shape.inputs is None:
            x = self.table[torch.arange(count)[:, None, None], x]
        else:
            x = self.apply_linear("embed", x.flatten(1, 2)).view(count, batch, self.shape.tokens, -1)
        x = (x + self.position.unsqueeze(1)).flatten(1, 2)
        for i in range(self.shape.depth):
            if self.shape.norm == "post":
                x = self.apply_norm(f"norm1_{i}", x + self.attention(i, x))
                x = self.apply_norm(f"norm2_{i}", x + self.mlp(i, x))
            else:
                x = x + self.attention(i, self.apply_norm(f"norm1_{i}", x))
                x = x + self.mlp(i, self.apply_norm(f"norm2_{i}", x))
        if self.shape.inputs is not None:
            x = x.view(count, batch, self.shape.tokens, -1).mean(2)
        if self.shape.norm == "pre":
            x = self.apply_norm("norm", x)
        return self.apply_linear("head", x)


def patches(images: Tensor) -> Tensor:
    """The 16 patches of 2 × 2 of images ``(n, 1, 8, 8)``."""
    return F.unfold(images, 2, stride=2).transpose(1, 2)


class Task:
    """Data and the shape of its model: 1,097 digits (300 more for validation, 400 for test), or characters.

    Args:
        name: ``"ViT"``, ``"post-norm, 12 layers"`` or ``"character LM"``.
    """

    def __init__(self, name: str) -> None:
        self.language, self.batch = name == "character LM", 8 if "post" in name else 16
        if self.language:
            text, self.source = read_text()
            lookup = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
            self.text = torch.tensor([lookup[symbol] for symbol in text])
            self.cut = len(text) * 8 // 10
            ends = torch.linspace(self.cut, len(text) - LENGTH - 1, 256, dtype=torch.float64).long()
            self.validation, self.test = self.windows(ends[:128]), self.windows(ends[128:])
            self.shape = Shape(LENGTH, 32, 2, len(lookup))
        else:
            self.source = "digits (scikit-learn)"
            data = Digits(val=300, test=400)
            data.setup("fit")
            parts = [[torch.stack(x) for x in zip(*part, strict=True)] for part in data.parts]  # type: ignore[arg-type]
            self.train, self.validation, self.test = ((patches(images), labels) for images, labels in parts)
            post = "post" in name
            self.shape = Shape(16, 24, 12, 10, 4, norm="post") if post else Shape(16, 32, 2, 10, 4, small=True)

    def windows(self, starts: Tensor) -> Batch:
        chosen = self.text[starts[..., None] + torch.arange(LENGTH + 1)]
        return chosen[..., :-1], chosen[..., 1:]

    def draw(self, generators: Sequence[torch.Generator]) -> Batch:
        """A batch of its own for every seed."""
        size = self.cut - LENGTH if self.language else len(self.train[0])
        index = torch.stack([torch.randint(size, (self.batch,), generator=g) for g in generators])
        return self.windows(index) if self.language else (self.train[0][index], self.train[1][index])


@lru_cache
def task_of(name: str) -> Task:
    """Read once."""
    return Task(name)

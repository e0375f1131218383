"""Tiny models, one for each way in which widths of a network are coupled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class ResNet(nn.Module):
    """Shortcuts, one of them through a convolution, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = _conv(3, 8), _conv(8, 6), _conv(6, 8)
        self.c, self.d, self.short = _conv(8, 10), _conv(10, 12), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(self.a(x))
        x = self.d(self.c(x)) + self.short(x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class MobileNet(nn.Module):
    """Depthwise convolution with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.deep = _conv(3, 6), _conv(6, 16, 1), _conv(16, 16, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.down, self.head = nn.Conv2d(16, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.deep(self.up(y))
        z = z * self.excite(self.squeeze(z.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((y + self.down(z)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution keeps as many channels in every group; a transposed one has its axes the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.last = _conv(3, 8), _conv(8, 12, groups=4), _conv(12, 6)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.last(self.wide(self.stem(x)))).relu())


class DenseNet(nn.Module):
    """Everything before is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = _conv(3, 6), _conv(6, 4), _conv(10, 4), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(x)], 1)
        x = torch.cat([x, self.b(x)], 1)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """A skip around the bottom, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up, self.head = _conv(3, 6), _conv(6, 10), _conv(16, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = F.interpolate(self.bottom(F.max_pool2d(skip, 2)), scale_factor=2.0)
        return self.head(self.up(torch.cat([skip, deep], 1)))


class TwoTasks(nn.Module):
    """One trunk, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = _conv(3, 8), _conv(8, 6), _conv(8, 4)
        self.digit, self.parity = nn.Linear(6, 10), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"digit": self.digit(self.left(x).mean((2, 3))), "parity": self.parity(self.right(x).mean((2, 3)))}


class Attention(nn.Module):
    """Fused projections of (3, heads, size), as timm writes them."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Grouping(nn.Module):
    """Queries that share keys and values, and a table of position biases by head."""

    def __init__(self, dim: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, shared, dim // heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * shared * self.head_dim)
        self.bias, self.out = nn.Parameter(torch.randn(heads, 1, 6)), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.num_kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        y = ((q @ k.transpose(-1, -2)) / self.head_dim**0.5 + self.bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A block with an attention and a plain or gated MLP."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention, gated: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), attention(), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 24 * (1 + gated)), nn.Linear(24, 16)
        self.norm, self.head, self.gated = nn.LayerNorm(16), nn.Linear(16, 5), gated

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.fc1(self.norm2(x))
        if self.gated:
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        x = x + self.fc2(F.gelu(y))
        return self.head(self.norm(x).mean(1))


def images() -> Tensor:
    """Two small ones."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    """Two sequences of six."""
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


# Name → (model, example, groups that it should have).
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]] = {
    "resnet": (ResNet, images, {"stem.0", "a.0", "c.0", "d.0"}),
    "mobilenet": (MobileNet, images, {"stem.0", "up.0", "squeeze"}),
    "grouped": (Grouped, images, {"stem.0", "wide.0", "last.0", "up"}),
    "densenet": (DenseNet, images, {"stem.0", "a.0", "b.0"}),
    "unet": (UNet, images, {"down.0", "bottom.0", "up.0"}),
    "two tasks": (TwoTasks, images, {"trunk.0", "left.0", "right.0"}),
    "attention": (Transformer, tokens, {"attn", "fc1"}),
    "grouped queries": (lambda: Transformer(Grouping), tokens, {"attn", "fc1"}),
    "gated": (lambda: Transformer(gated=True), tokens, {"attn", "fc1"}),
}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """No weight, bias or statistic of it as it is initialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) - 0.4, alpha=0.3)
    return model

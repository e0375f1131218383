"""Small networks as people write them, for ``structured_zoo.py``: one for every way in which widths are coupled."""

# ruff: noqa: E501  (tables of networks, one a line)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Build = Callable[[], nn.Module]
Example = Callable[[], Any]


def images(size: int = 32, channels: int = 3) -> Example:
    """Two of them."""
    return lambda: torch.randn(2, channels, size, size)


def sequences(length: int = 12, width: int = 16) -> Example:
    """Two of vectors."""
    return lambda: torch.randn(2, length, width)


def tokens(length: int = 12) -> Example:
    """Two of token ids."""
    return lambda: torch.randint(1, 90, (2, length))


class Apply(nn.Module):
    """A forward written as a function of the module."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        """What the function returns."""
        return self.function(self, *args)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    """Convolution, batch norm, activation."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), *([nn.SiLU()] if act else []))


def classifier(body: nn.Module, width: int) -> nn.Module:
    """A mean over pixels and a linear layer behind a body."""
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        return x + self.body(x)


class Concat(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Along the channels."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class C2f(nn.Module):
    """YOLOv8's block."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2, fixed: bool = False) -> None:
        super().__init__()
        self.c, self.fixed = outputs // 2, fixed
        self.cv1, self.cv2 = conv(inputs, 2 * self.c, 1), conv((2 + depth) * self.c, outputs, 1)
        self.m = nn.ModuleList(
            Residual(nn.Sequential(conv(self.c, self.c), conv(self.c, self.c))) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """All of the intermediate results, concatenated."""
        y = self.cv1(x)
        parts = list(y.split((self.c, self.c), 1) if self.fixed else y.chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class C3(nn.Module):
    """YOLOv5's block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1, self.cv2, self.cv3 = conv(inputs, hidden, 1), conv(inputs, hidden, 1), conv(2 * hidden, outputs, 1)
        self.m = Residual(nn.Sequential(conv(hidden, hidden, 1), conv(hidden, hidden)))

    def forward(self, x: Tensor) -> Tensor:
        """Two branches."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """Pooling at several scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = conv(width, width // 2, 1), conv(2 * width, width, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated."""
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A trunk, a pyramid, and a box and a class head at each of its levels."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.stem, self.p3 = conv(3, 16, stride=2), nn.Sequential(conv(16, 32, stride=2), C2f(32, 32, fixed=fixed))
        self.p4 = nn.Sequential(conv(32, 64, stride=2), C2f(64, 64, fixed=fixed), SPPF(64))
        self.up, self.neck = nn.Upsample(scale_factor=2), C2f(96, 32, 1, fixed)
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 16), nn.Conv2d(16, 4, 1)) for c in (32, 64))
        self.classes = nn.ModuleList(nn.Sequential(conv(c, 24), nn.Conv2d(24, 5, 1)) for c in (32, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(batch, 4 + classes, h, w) for each level."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        levels = [self.neck(torch.cat([self.up(p4), p3], 1)), p4]
        return [torch.cat((b(y), c(y)), 1) for b, c, y in zip(self.boxes, self.classes, levels, strict=True)]


class SE(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class CBAM(nn.Module):
    """Attention over channels, then over pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        x = x * (self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))).sigmoid()
        return x * self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class ECA(nn.Module):
    """A convolution along the channels: their neighbours are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: one half passes, then channels are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, groups=half, act=False), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.branch(right)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class UNet(nn.Module):
    """Two levels with skips and a norm of choice, and an embedding of the time step if asked for."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, time: bool = False) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), norm(o), nn.SiLU())

        self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 64)
        self.up2, self.up1, self.head = block(96, 32), block(48, 16), nn.Conv2d(16, 3, 1)
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 64)) if time else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Of the input's shape."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.bottom(F.max_pool2d(two, 2))
        if self.time is not None:
            y = y + self.time(torch.ones(len(x), 8).to(x))[:, :, None, None]
        y = self.up2(torch.cat([two, F.interpolate(y, scale_factor=2.0)], 1))
        return self.head(self.up1(torch.cat([one, F.interpolate(y, scale_factor=2.0)], 1)))


class RMSNorm(nn.Module):
    """As LLaMA's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Attention in one of the ways that people write it.

    Args:
        kind: See the forward.
        width: Of the residual stream.
        heads: Their number.
    """

    def __init__(self, kind: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.h, self.size = kind, heads, width // heads
        self.norm = nn.LayerNorm(width)
        shared = {"mqa": 1, "gqa": heads // 2, "fused gqa": heads // 2}.get(kind, heads)
        self.kv = shared
        if kind in ("fused", "lucid", "fused gqa", "neox", "linear"):
            self.qkv = nn.Linear(width, (heads + 2 * shared) * self.size)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n * self.size) for n in (heads, shared, shared))
        self.proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1)) if kind == "cosine" else None
        self.bias = nn.Parameter(torch.randn(heads, 64)) if kind == "bias" else None
        self.qn, self.kn = (RMSNorm(self.size), RMSNorm(self.size)) if kind == "qk norm" else (None, None)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, size)."""
        b, n, _ = x.shape
        if self.kind == "lucid":
            return tuple(rearrange(t, "b n (h d) -> b h n d", h=self.h) for t in self.qkv(x).chunk(3, -1))  # type: ignore
        if self.kind == "neox":
            return self.qkv(x).view(b, n, self.h, -1).transpose(1, 2).chunk(3, -1)  # type: ignore[return-value]
        if self.kind == "fused gqa":
            sizes = [self.h * self.size, self.kv * self.size, self.kv * self.size]
            q, k, v = (t.view(b, n, -1, self.size).transpose(1, 2) for t in self.qkv(x).split(sizes, -1))
            return q, *(t.repeat_interleave(self.h // self.kv, 1) for t in (k, v))  # type: ignore[return-value]
        if self.kind in ("fused", "linear"):
            return self.qkv(x).reshape(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x[:, :1] if self.kind == "class" else x).view(b, -1, self.h, self.size).transpose(1, 2)
        k, v = (layer(x).view(b, n, -1, self.size).transpose(1, 2) for layer in (self.k, self.v))
        if self.kind == "gqa":
            k, v = (t.repeat_interleave(self.h // self.kv, 1) for t in (k, v))
        if self.kind == "mqa":
            k, v = k.expand_as(q), v.expand_as(q)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        q, k, v = self.project(self.norm(x))
        if self.kind == "cosine":
            q, k = F.normalize(q, dim=-1) * self.scale.exp(), F.normalize(k, dim=-1)
        if self.qn is not None:
            q, k = self.qn(q), self.kn(k)
        if self.kind == "rope":
            angle = torch.arange(q.shape[2])[:, None] * torch.arange(1, self.size // 2 + 1).to(q) * 0.1
            sin, cos = (torch.cat([f(angle)] * 2, -1) for f in (torch.sin, torch.cos))
            q, k = (
                t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin for t in (q, k)
            )
        if self.kind == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            y = (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(2)[..., None])
        elif self.kind == "bias":
            y = (q @ k.transpose(-1, -2) + self.bias[:, None, : q.shape[2]]).softmax(-1) @ v
        elif self.kind == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "gqa")
        y = self.proj(y.transpose(1, 2).flatten(2))
        return torch.cat([y, torch.zeros_like(x[:, 1:])], 1) if self.kind == "class" else y


class MLP(nn.Module):
    """Plain, gated, or gated from one projection, by ``chunk`` or by slices."""

    def __init__(self, kind: str = "plain", width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.kind, self.norm, self.hidden = kind, nn.LayerNorm(width), hidden
        self.up = nn.Linear(width, hidden * (1 + (kind in ("fused", "sliced"))))
        self.gate = nn.Linear(width, hidden) if kind == "gated" else None
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        x = self.norm(x)
        y = self.up(x)
        if self.kind == "fused":
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        elif self.kind == "sliced":
            y = F.gelu(y[..., : self.hidden]) * y[..., self.hidden :]
        elif self.gate is not None:
            y = F.silu(self.gate(x)) * y
        return self.down(F.gelu(y))


def transformer(kind: str, mlp: str = "plain") -> nn.Module:
    """Two blocks."""
    blocks = [Residual(part) for _ in range(2) for part in (Attention(kind), MLP(mlp))]
    return nn.Sequential(nn.Linear(16, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 5))


class DiT(nn.Module):
    """Blocks whose norms are modulated by a condition."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.condition = nn.Linear(16, width), nn.Sequential(nn.Linear(8, width), nn.SiLU())
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = Attention("fused"), MLP()
        self.modulation, self.head = nn.Linear(width, 6 * width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        x = self.embed(x)
        c = self.condition(torch.ones(len(x), 8).to(x))[:, None]
        s1, b1, g1, s2, b2, g2 = self.modulation(c).chunk(6, -1)
        x = x + g1 * self.attention(self.norm1(x) * (1 + s1) + b1)
        return self.head(x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2))


class Mixer(nn.Module):
    """MLPs over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 24, 8, 8), nn.LayerNorm(24), nn.Linear(24, 5)
        self.tokens = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.channels = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norm(x))).mean(1))


class Mamba(nn.Module):
    """A selective scan written as a loop."""

    def __init__(self, width: int = 16, inner: int = 24, state: int = 4) -> None:
        super().__init__()
        self.rank, self.state = 3, state
        self.inp, self.conv = nn.Linear(width, 2 * inner), nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt = nn.Linear(inner, self.rank + 2 * state, bias=False), nn.Linear(self.rank, inner)
        self.A, self.D = nn.Parameter(torch.rand(inner, state)), nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width)

    def forward(self, u: Tensor) -> Tensor:
        """Of the input's shape."""
        x, z = self.inp(u).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        d, b, c = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        d = F.softplus(self.dt(d))
        h = torch.zeros(len(u), x.shape[-1], self.state).to(u)
        steps = []
        for i in range(u.shape[1]):
            h = h * torch.exp(-d[:, i, :, None] * self.A.exp()) + (d[:, i] * x[:, i])[..., None] * b[:, i, None]
            steps.append((h * c[:, i, None]).sum(-1))
        return self.out((torch.stack(steps, 1) + x * self.D) * F.silu(z))


class VAE(nn.Module):
    """Convolutions there and back, with a mean and a variance between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 16, stride=2), conv(16, 24, stride=2), nn.Conv2d(24, 16, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 20, 4, 2, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.ConvTranspose2d(20, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image again, and the divergence."""
        mean, log = self.encoder(x).chunk(2, 1)
        noise = torch.ones_like(mean)
        return self.decoder(mean + noise * (0.5 * log).exp()), (mean.square() + log.exp() - log - 1).mean((1, 2, 3))


class Graph(nn.Module):
    """Two steps of message passing over fixed edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, nodes, 3)."""
        near = torch.ones(x.shape[1], x.shape[1]).to(x) / x.shape[1]
        x = (near @ self.first(x)).relu()
        return self.head((near @ self.second(x)).relu())


class Recommender(nn.Module):
    """Embeddings of fields, concatenated, and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(90, 8) for _ in range(3))
        self.deep = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, 1)."""
        found = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack(found, 1)
        crossed = (stacked.sum(1).square() - stacked.square().sum(1)).sum(-1, keepdim=True)
        return self.deep(torch.cat(found, -1)) + 0.5 * crossed


class Siamese(nn.Module):
    """One encoder for two views."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = classifier(nn.Sequential(conv(3, 16), conv(16, 24)), 24), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Cosine of both."""
        return F.cosine_similarity(self.head(self.encoder(x).relu()), self.head(self.encoder(x.flip(-1)).relu()))


class MaskedSpans(nn.Module):
    """A language model of one's own, untied, with a causal mask as buffer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(90, 32), nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Residual(part) for _ in range(2) for part in (Attention("fused"), MLP("fused")))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 90, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.words(ids) * math.sqrt(32) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Seq2Seq(nn.Module):
    """Recurrent, with attention over what the encoder saw."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(90, 16), nn.GRU(16, 24, batch_first=True)
        self.decoder, self.out = nn.LSTM(16, 24, batch_first=True), nn.Linear(48, 90)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.words(ids)
        memory, answer = self.encoder(x)[0], self.decoder(x.flip(1))[0]
        seen = (answer @ memory.transpose(1, 2)).softmax(-1) @ memory
        return self.out(torch.cat([answer, seen], -1))


class Experts(nn.Module):
    """Two of four experts by a gate, all computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 3)."""
        weights = self.gate(x).softmax(-1)
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head(x + (y * weights[..., None, :]).sum(-1))


def _plain(*layers: nn.Module) -> Build:
    return lambda: nn.Sequential(*layers)


def _group(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


def _bottleneck(width: int, groups: int = 1, extra: nn.Module | None = None) -> nn.Module:
    parts = [conv(width, width // 2, 1), conv(width // 2, width // 2, groups=groups), conv(width // 2, width, 1)]
    return Residual(nn.Sequential(*parts, *([extra] if extra else [])))


def _super(x: int = 2) -> nn.Module:
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(16, 3 * x * x, 3, padding=1), nn.PixelShuffle(x))


def _stem(*parts: nn.Module) -> nn.Module:
    return classifier(nn.Sequential(conv(3, 24, stride=2), *parts), 24)


ATTENTIONS = (
    "fused", "lucid", "separate", "mqa", "gqa", "fused gqa", "neox", "class", "rope", "qk norm", "cosine", "bias",
    "einsum", "linear",
)  # fmt: skip

# Name → how to build it, and an example.
OWN: dict[str, tuple[Build, Example]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5)), sequences()),
    "MLP with batch norm": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)), lambda: torch.randn(4, 16)),
    "MLP with sigmoid": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 5)), sequences()),
    "LeNet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 40), nn.ReLU(), nn.Linear(40, 10)), images()),
    "ResNet block": (lambda: _stem(_bottleneck(24), _bottleneck(24)), images()),
    "ResNeXt block": (lambda: _stem(_bottleneck(24, 3)), images()),
    "MobileNet block": (lambda: _stem(_bottleneck(24, 12)), images()),
    "squeeze and excitation": (lambda: _stem(_bottleneck(24, 1, SE(24))), images()),
    "CBAM": (lambda: _stem(_bottleneck(24, 1, CBAM(24))), images()),
    "ECA": (lambda: _stem(_bottleneck(24, 1, ECA())), images()),
    "inception": (lambda: _stem(Concat(conv(24, 8, 1), conv(24, 12), conv(24, 4, 5))), images()),
    "DenseNet block": (lambda: classifier(nn.Sequential(conv(3, 16), Concat(nn.Identity(), conv(16, 8)), Concat(nn.Identity(), conv(24, 8))), 32), images()),
    "C2f": (lambda: _stem(C2f(24, 24)), images()),
    "C2f, fixed split": (lambda: _stem(C2f(24, 24, fixed=True)), images()),
    "C3": (lambda: _stem(C3(24, 24)), images()),
    "YOLO": (Yolo, images(64)),
    "YOLO, fixed split": (lambda: Yolo(True), images(64)),
    "ShuffleNet unit": (lambda: _stem(ShuffleUnit(24)), images()),
    "channel shuffle": (lambda: _stem(conv(24, 24, groups=3), nn.ChannelShuffle(3), conv(24, 24, groups=3)), images()),
    "super-resolution": (_super, images(16)),
    "U-Net": (UNet, images()),
    "U-Net, GroupNorm": (lambda: UNet(_group), images()),
    "U-Net, InstanceNorm": (lambda: UNet(lambda w: nn.InstanceNorm2d(w, affine=True)), images()),
    "U-Net with a time step": (lambda: UNet(_group, True), images()),
    "depth to space and back": (lambda: _stem(nn.PixelUnshuffle(2), conv(96, 24, 1)), images()),
    "PReLU": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 4, 3)), images()),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 4, 1)), images(8)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(16, 24, 3), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 4, 3)), sequences(16, 12)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 12, 3), nn.BatchNorm3d(12), nn.ReLU(), nn.Conv3d(12, 4, 3)), lambda: torch.randn(2, 3, 6, 6, 6)),
    "VAE": (VAE, images()),
    "Siamese": (Siamese, images()),
    **{f"attention, {kind}": ((lambda kind=kind: transformer(kind)), sequences()) for kind in ATTENTIONS},
    "MLP, gated": (lambda: transformer("fused", "gated"), sequences()),
    "MLP, gated and fused": (lambda: transformer("fused", "fused"), sequences()),
    "MLP, sliced": (lambda: transformer("fused", "sliced"), sequences()),
    "nn.TransformerEncoder": (
        lambda: nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2), nn.Linear(16, 3)), sequences()),
    "nn.TransformerDecoder": (
        lambda: Apply(lambda m, x: m.out(m.body(x, x)), body=nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), 2), out=nn.Linear(16, 3)), sequences()),
    "DiT": (DiT, sequences()),
    "Mixer": (Mixer, images()),
    "Mamba, by hand": (lambda: nn.Sequential(Residual(Mamba()), nn.Linear(16, 3)), sequences()),
    "LSTM": (lambda: Apply(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.LSTM(16, 24, 2, batch_first=True), out=nn.Linear(24, 3)), sequences()),
    "GRU, both ways": (lambda: Apply(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.GRU(16, 24, batch_first=True, bidirectional=True), out=nn.Linear(48, 3)), sequences()),
    "seq2seq": (Seq2Seq, tokens()),
    "message passing": (Graph, sequences()),
    "recommender": (Recommender, tokens(3)),
    "experts": (Experts, sequences()),
    "language model": (MaskedSpans, tokens()),
    "language model, tied": (lambda: MaskedSpans(True), tokens()),
}  # fmt: skip

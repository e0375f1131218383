"""Networks in styles that came up after the code was written, each tried once before anything was done for it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Siamese(nn.Module):
    """One encoder for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 14),
        )
        self.head = nn.Linear(28, 2)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        x, y = self.enc(a), self.enc(b)
        return self.head(torch.cat([(x - y).abs(), x * y], 1)), F.cosine_similarity(x, y)


class FiLM(nn.Module):
    """Another input scales and shifts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12, affine=False)
        self.film = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 24))
        self.c2 = nn.Conv2d(12, 7, 3)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor, c: Tensor) -> Any:
        g, b = self.film(c)[..., None, None].chunk(2, 1)
        x = F.relu(self.bn(self.c1(x)) * (1 + g) + b)
        return self.out(F.relu(self.c2(x)).mean((2, 3)))


class FuncSE(nn.Module):
    """Squeeze and excitation with weights of its own, through ``F.linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.w1 = nn.Parameter(torch.randn(4, 16) * 0.3)
        self.b1 = nn.Parameter(torch.zeros(4))
        self.w2 = nn.Parameter(torch.randn(16, 4) * 0.3)
        self.b2 = nn.Parameter(torch.zeros(16))
        self.c2 = nn.Conv2d(16, 8, 3)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.c1(x))
        g = torch.sigmoid(F.linear(F.relu(F.linear(x.mean((2, 3)), self.w1, self.b1)), self.w2, self.b2))
        x = x * g[:, :, None, None]
        return self.out(F.relu(self.c2(x)).mean((2, 3)))


class InterGLU(nn.Module):
    """Gates that lie between the values."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)
        self.up2 = nn.Linear(8, 24)
        self.down2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.up(x)
        a, b = h[..., ::2], h[..., 1::2]
        x = x + self.down(F.silu(a) * b)
        h = self.up2(x).unflatten(-1, (12, 2))
        return self.down2(F.silu(h[..., 0]) * h[..., 1])


class FPN(nn.Module):
    """A feature pyramid with lateral sums."""

    def __init__(self) -> None:
        super().__init__()
        cs = (8, 12, 16)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)])
        self.lat = nn.ModuleList([nn.Conv2d(c, 10, 1) for c in cs])
        self.smooth = nn.ModuleList([nn.Conv2d(10, 10, 3, padding=1) for _ in cs])
        self.cls = nn.Conv2d(10, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        f = [F.relu(self.stem(x))]
        for d in self.down:
            f.append(F.relu(d(f[-1])))
        p = [line(t) for line, t in zip(self.lat, f, strict=False)]
        for i in (1, 0):
            p[i] = p[i] + F.interpolate(p[i + 1], scale_factor=2.0)
        return [self.cls(F.relu(m(t))) for m, t in zip(self.smooth, p, strict=False)]


class Shuffles(nn.Module):
    """Space to depth and back."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, padding=1)
        self.c2 = nn.Conv2d(24, 20, 3, padding=1)
        self.c3 = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.c3(F.pixel_shuffle(F.relu(self.c2(F.pixel_unshuffle(F.relu(self.c1(x)), 2))), 2))


class TCN(nn.Module):
    """Dilated causal convolutions with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        cs = (4, 10, 10, 14)
        self.convs = nn.ModuleList()
        self.res = nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(cs)):
            self.convs.append(
                nn.Sequential(
                    nn.Conv1d(a, b, 3, dilation=2**i, padding=2 * 2**i),
                    nn.ReLU(),
                    nn.Conv1d(b, b, 3, dilation=2**i, padding=2 * 2**i),
                )
            )
            self.res.append(nn.Conv1d(a, b, 1) if a != b else nn.Identity())
        self.out = nn.Linear(14, 2)

    def forward(self, x: Tensor) -> Any:
        for c, r in zip(self.convs, self.res, strict=False):
            y = c(x)[..., : x.shape[-1]]
            x = F.relu(y + r(x))
        return self.out(x[..., -1])


class KANLayer(nn.Module):
    """Bumps on a grid, and a base."""

    def __init__(self, i: int, o: int, k: int = 5) -> None:
        super().__init__()
        self.coef = nn.Parameter(torch.randn(o, i, k) * 0.3)
        self.base = nn.Parameter(torch.randn(o, i) * 0.3)
        self.register_buffer("grid", torch.linspace(-1, 1, k).repeat(i, 1))

    def forward(self, x: Tensor) -> Any:
        b = torch.exp(-((x[..., None] - self.grid) ** 2) * 4)
        return torch.einsum("bik,oik->bo", b, self.coef) + F.linear(F.silu(x), self.base)


class KAN(nn.Module):
    """Three such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(KANLayer(4, 9), KANLayer(9, 7), KANLayer(7, 2))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class AttGate(nn.Module):
    """A gate on what a U-Net skips."""

    def __init__(self, g: int, line: int, i: int) -> None:
        super().__init__()
        self.wg = nn.Sequential(nn.Conv2d(g, i, 1), nn.BatchNorm2d(i))
        self.wx = nn.Sequential(nn.Conv2d(line, i, 1), nn.BatchNorm2d(i))
        self.psi = nn.Sequential(nn.Conv2d(i, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Any:
        return x * self.psi(F.relu(self.wg(g) + self.wx(x)))


class AttUNet(nn.Module):
    """A U-Net with such a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.d1 = nn.Conv2d(3, 8, 3, padding=1)
        self.d2 = nn.Conv2d(8, 14, 3, padding=1)
        self.up = nn.ConvTranspose2d(14, 9, 2, 2)
        self.att = AttGate(9, 8, 6)
        self.dec = nn.Conv2d(17, 10, 3, padding=1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Any:
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        u = self.up(b)
        return self.out(F.relu(self.dec(torch.cat([self.att(u, a), u], 1))))


class NeRF(nn.Module):
    """Encoded positions that are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.ModuleList([nn.Linear(15, 20), nn.Linear(20, 20), nn.Linear(35, 20), nn.Linear(20, 20)])
        self.sigma = nn.Linear(20, 1)
        self.feat = nn.Linear(20, 16)
        self.view = nn.Linear(16 + 3, 12)
        self.rgb = nn.Linear(12, 3)
        self.register_buffer("f", torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor, d: Tensor) -> Any:
        e = (x[..., None] * self.f).flatten(-2)
        e = torch.cat([x, e.sin(), e.cos()], -1)
        h = e
        for i, line in enumerate(self.line):
            if i == 2:
                h = torch.cat([e, h], -1)
            h = F.relu(line(h))
        return torch.cat(
            [torch.sigmoid(self.rgb(F.relu(self.view(torch.cat([self.feat(h), d], -1))))), F.softplus(self.sigma(h))],
            -1,
        )


class GRUAttn(nn.Module):
    """An encoder, and a decoder that looks at all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.enc = nn.GRU(8, 10, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(20, 12)
        self.cell = nn.GRUCell(8 + 20, 12)
        self.wa = nn.Linear(20, 7)
        self.ua = nn.Linear(12, 7)
        self.va = nn.Linear(7, 1)
        self.out = nn.Linear(12 + 20, 20)

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        m, _ = self.enc(self.emb(src))
        h = torch.tanh(self.bridge(m[:, -1]))
        o = []
        for t in range(tgt.shape[1]):
            a = self.va(torch.tanh(self.wa(m) + self.ua(h)[:, None])).softmax(1)
            c = (a * m).sum(1)
            h = self.cell(torch.cat([self.emb(tgt[:, t]), c], -1), h)
            o.append(self.out(torch.cat([h, c], -1)))
        return torch.stack(o, 1)


class EMATeacher(nn.Module):
    """A frozen copy beside the student."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.pred = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12))

    def forward(self, x: Tensor) -> Any:
        p = self.pred(self.student(x))
        with torch.no_grad():
            t = self.teacher(x)
        return F.normalize(p, dim=-1), F.normalize(t, dim=-1)


class Perceiver(nn.Module):
    """Latents that attend to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.lat = nn.Parameter(torch.randn(5, 16))
        self.inp = nn.Linear(6, 10)
        self.q = nn.Linear(16, 16)
        self.kv = nn.Linear(10, 32)
        self.o = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.out = nn.Linear(16, 3)
        self.heads = 4

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x)
        line = self.lat.expand(len(x), -1, -1)
        q = self.q(line).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        line = line + self.o(y)
        line = line + self.mlp(line)
        return self.out(line.mean(1))


class RWKV(nn.Module):
    """Token shift and a decaying sum."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.mk = nn.Parameter(torch.rand(d))
        self.mv = nn.Parameter(torch.rand(d))
        self.mr = nn.Parameter(torch.rand(d))
        self.key = nn.Linear(d, 16, bias=False)
        self.value = nn.Linear(d, 16, bias=False)
        self.rec = nn.Linear(d, 16, bias=False)
        self.out = nn.Linear(16, d, bias=False)
        self.decay = nn.Parameter(-torch.rand(16))
        self.first = nn.Parameter(torch.rand(16))
        self.emb = nn.Linear(5, d)
        self.head = nn.Linear(d, 3)
        self.fk = nn.Linear(d, 30, bias=False)
        self.fv = nn.Linear(30, d, bias=False)

    def forward(self, x: Tensor) -> Any:
        x = self.emb(x)
        p = F.pad(x, (0, 0, 1, -1))

        def mix(m):
            return x * m + p * (1 - m)

        k, v, r = self.key(mix(self.mk)), self.value(mix(self.mv)), self.rec(mix(self.mr)).sigmoid()
        num = den = torch.zeros_like(k[:, 0])
        o = []
        for t in range(x.shape[1]):
            e = torch.exp(self.first + k[:, t])
            o.append((num + e * v[:, t]) / (den + e))
            w = torch.exp(self.decay)
            num, den = num * w + torch.exp(k[:, t]) * v[:, t], den * w + torch.exp(k[:, t])
        x = x + self.out(r * torch.stack(o, 1))
        return self.head(x + self.fv(F.relu(self.fk(x)) ** 2))


class Retention(nn.Module):
    """Attention with a decay in place of a softmax."""

    def __init__(self, d: int = 12, h: int = 3) -> None:
        super().__init__()
        self.h = h
        self.q, self.k, self.v, self.g, self.o = (
            nn.Linear(d, 12),
            nn.Linear(d, 12),
            nn.Linear(d, 24),
            nn.Linear(d, 24),
            nn.Linear(24, d),
        )
        self.gn = nn.GroupNorm(h, 24, affine=False)
        self.register_buffer("gamma", 1 - 2.0 ** (-2 - torch.arange(h)))
        self.emb = nn.Linear(5, d)
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.emb(x)
        B, T, _ = x.shape

        def sp(t):
            return t.view(B, T, self.h, -1).transpose(1, 2)

        q, k, v = sp(self.q(x)), sp(self.k(x)), sp(self.v(x))
        i = torch.arange(T)
        d = self.gamma[:, None, None] ** (i[:, None] - i).clamp(min=0) * (i[:, None] >= i)
        y = ((q @ k.transpose(-1, -2) * d) @ v).transpose(1, 2).reshape(B * T, -1)
        y = self.gn(y).view(B, T, -1)
        return self.head(x + self.o(F.silu(self.g(x)) * y))


class EarlyExit(nn.Module):
    """Leaves when it is sure; all exits are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ModuleList([nn.Sequential(nn.Linear(6 if i == 0 else 12, 12), nn.ReLU()) for i in range(3)])
        self.exits = nn.ModuleList([nn.Linear(12, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        for b, e in zip(self.b, self.exits, strict=False):
            x = b(x)
            y = e(x)
            if not self.training and y.softmax(-1).max(-1).values.min() > 0.3:
                return y
        return y


class MoEDense(nn.Module):
    """Experts as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.w1 = nn.Parameter(torch.randn(3, 6, 14) * 0.3)
        self.w2 = nn.Parameter(torch.randn(3, 14, 5) * 0.3)

    def forward(self, x: Tensor) -> Any:
        g = self.gate(x).softmax(-1)
        h = torch.einsum("bi,eih->beh", x, self.w1).relu()
        return torch.einsum("beh,eho,be->bo", h, self.w2, g)


class DictSplit(nn.Module):
    """Sizes in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.dims = {"q": 8, "k": 8, "v": 12}
        self.p = nn.Linear(6, 28)
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.p(x).split(list(self.dims.values()), -1)
        return self.o((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Graph(nn.Module):
    """Messages by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(5, 12)
        self.l2 = nn.Linear(24, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor, a: Tensor) -> Any:
        a = a / a.sum(-1, keepdim=True)
        h = F.relu(a @ self.l1(x))
        h = F.relu(self.l2(torch.cat([h, torch.zeros_like(h).index_add(1, torch.arange(h.shape[1]), a @ h)], -1)))
        return self.out(h.amax(1))


class Maxout(nn.Module):
    """The largest of three."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 3
        self.l1 = nn.Linear(5, 24)
        self.l2 = nn.Linear(8, 12)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.l2(self.l1(x).unflatten(-1, (-1, self.k)).amax(-1)).view(len(x), 4, self.k).amax(-1))


class HyperNet(nn.Module):
    """Weights that another network makes."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 8 * 6))
        self.inp = nn.Linear(4, 6)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor, c: Tensor) -> Any:
        w = self.hyper(c).view(-1, 8, 6)
        return self.out(torch.bmm(w, F.relu(self.inp(x)).unsqueeze(-1)).squeeze(-1).relu())


class ODEBlock(nn.Module):
    """One block, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 10)
        self.f = nn.Sequential(nn.Linear(11, 18), nn.Tanh(), nn.Linear(18, 10))
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.inp(x)
        for t in (0.0, 0.5):
            h = h + 0.5 * self.f(torch.cat([h, torch.full_like(h[:, :1], t)], -1))
        return self.out(h)


class VQ(nn.Module):
    """A codebook between encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 8))
        self.code = nn.Embedding(9, 8)
        self.d = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Any:
        z = self.e(x)
        i = torch.cdist(z, self.code.weight).argmin(-1)
        q = self.code(i)
        return self.d(z + (q - z).detach()), (q - z).square().mean()


class Mamba2Conv(nn.Module):
    """One projection into all parts of a state space."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 12
        self.state = 4
        self.inp = nn.Linear(6, 12 * 2 + 8)
        self.conv = nn.Conv1d(12, 12, 3, groups=12, padding=2)
        self.out = nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        z, h, bc = torch.split(self.inp(x), [self.inner, self.inner, 2 * self.state], -1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        b, c = bc.chunk(2, -1)
        y = torch.einsum("btn,bsn,bsd->btd", c, b, h)
        return self.head(x + self.out(y * F.silu(z)))


STYLES: dict[str, tuple[Any, Any]] = {
    "one encoder, two images": (Siamese, lambda: (torch.randn(4,3,12,12),torch.randn(4,3,12,12),)),
    "film": (FiLM, lambda: (torch.randn(4,3,12,12),torch.randn(4,5),)),
    "functional SE": (FuncSE, lambda: (torch.randn(4,3,12,12),)),
    "interleaved GLU": (InterGLU, lambda: (torch.randn(3,5,8),)),
    "FPN": (FPN, lambda: (torch.randn(2,3,16,16),)),
    "shuffles": (Shuffles, lambda: (torch.randn(2,3,8,8),)),
    "TCN": (TCN, lambda: (torch.randn(3,4,17),)),
    "KAN": (KAN, lambda: (torch.randn(6,4),)),
    "attention U-Net": (AttUNet, lambda: (torch.randn(2,3,8,8),)),
    "NeRF": (NeRF, lambda: (torch.randn(7,3),torch.randn(7,3),)),
    "GRU attention": (GRUAttn, lambda: (torch.randint(0, 20, (3, 6)),torch.randint(0, 20, (3, 4)),)),
    "EMA teacher": (EMATeacher, lambda: (torch.randn(8,6),)),
    "Perceiver": (Perceiver, lambda: (torch.randn(3,7,6),)),
    "RWKV": (RWKV, lambda: (torch.randn(3,6,5),)),
    "retention": (Retention, lambda: (torch.randn(3,6,5),)),
    "early exit": (EarlyExit, lambda: (torch.randn(4,6),)),
    "dense MoE": (MoEDense, lambda: (torch.randn(4,6),)),
    "dict split": (DictSplit, lambda: (torch.randn(3,5,6),)),
    "messages by an index": (Graph, lambda: (torch.randn(3,6,5),torch.rand(3,6,6),)),
    "maxout": (Maxout, lambda: (torch.randn(4,5),)),
    "hypernet": (HyperNet, lambda: (torch.randn(4,4),torch.randn(4,3),)),
    "one block, twice": (ODEBlock, lambda: (torch.randn(4,4),)),
    "VQ": (VQ, lambda: (torch.randn(5,6),)),
    "mamba2-like": (Mamba2Conv, lambda: (torch.randn(3,6,6),)),
}  # fmt: skip

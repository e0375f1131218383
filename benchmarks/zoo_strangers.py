"""Networks as strangers may write them: every one was written before it was tried."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

R = torch.randn


class MultiTask(nn.Module):
    """A head of several, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 14), nn.SiLU())
        self.heads = nn.ModuleDict(
            {
                "a": nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 3)),
                "b": nn.Linear(14, 1),
                "c": nn.Linear(14, 4),
            }
        )

    def forward(self, x: Any, task: Any) -> Any:
        return self.heads[task](self.trunk(x))


class CRNN(nn.Module):
    """Columns of an image, read by recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 6, 3, 1, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 10, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.map = nn.Linear(10 * 4, 12)
        self.r1 = nn.GRU(12, 9, bidirectional=True)
        self.r2 = nn.LSTM(18, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Any) -> Any:
        f = self.cnn(x)
        b, c, h, w = f.size()
        f = f.permute(3, 0, 1, 2).reshape(w, b, c * h)
        f = self.map(f)
        y, _ = self.r1(f)
        y, _ = self.r2(y)
        return self.out(y).log_softmax(2)


class Seq2SeqTied(nn.Module):
    """Self and cross attention that one number counts; the embedding is the last layer."""

    def __init__(self, d: Any = 16, v: Any = 30) -> None:
        super().__init__()
        self.emb = nn.Embedding(v, d)
        self.pos = nn.Parameter(R(20, d) * 0.1)
        self.h = 4
        self.eq, self.ek, self.ev, self.eo = (nn.Linear(d, d) for _ in range(4))
        self.cq, self.ck, self.cv, self.co = (nn.Linear(d, 24), nn.Linear(d, 24), nn.Linear(d, 24), nn.Linear(24, d))
        self.f1, self.f2 = (nn.Linear(d, 40), nn.Linear(40, d))
        self.g1, self.g2 = (nn.Linear(d, 40), nn.Linear(40, d))
        self.n1, self.n2, self.n3 = (nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d))
        self.out = nn.Linear(d, v, bias=False)
        self.out.weight = self.emb.weight

    def att(self, q: Any, k: Any, v: Any) -> Any:
        def sp(t):
            return t.view(t.size(0), t.size(1), self.h, -1).transpose(1, 2)

        q, k, v = (sp(q), sp(k), sp(v))
        w = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1)
        return (w @ v).transpose(1, 2).contiguous().flatten(-2)

    def forward(self, src: Any, tgt: Any) -> Any:
        x = self.emb(src) + self.pos[: src.size(1)]
        y = self.n1(x)
        x = x + self.eo(self.att(self.eq(y), self.ek(y), self.ev(y)))
        x = x + self.f2(F.gelu(self.f1(x)))
        t = self.emb(tgt) + self.pos[: tgt.size(1)]
        t = t + self.co(self.att(self.cq(self.n2(t)), self.ck(x), self.cv(x)))
        t = t + self.g2(F.relu(self.g1(self.n3(t))))
        return self.out(t)


class AdaIN(nn.Module):
    """A style that scales and shifts normalised channels, from a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Linear(5, 12), nn.LeakyReLU(0.2), nn.Linear(12, 8))
        self.const = nn.Parameter(R(1, 10, 4, 4))
        self.c1 = nn.Conv2d(10, 12, 3, padding=1)
        self.a1 = nn.Linear(8, 24)
        self.c2 = nn.Conv2d(12, 9, 3, padding=1)
        self.a2 = nn.Linear(8, 18)
        self.noise = nn.Parameter(torch.zeros(12))
        self.rgb = nn.Conv2d(9, 3, 1)

    def ada(self, x: Any, st: Any) -> Any:
        m, sd = (x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1e-05)
        g, b = st.view(st.size(0), 2, -1, 1, 1).unbind(1)
        return (x - m) / sd * (1 + g) + b

    def forward(self, z: Any) -> Any:
        w = self.map(z)
        x = self.const.repeat(z.size(0), 1, 1, 1)
        x = self.c1(x)
        x = x + self.noise.view(1, -1, 1, 1) * 0.1
        x = F.leaky_relu(self.ada(x, self.a1(w)), 0.2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.leaky_relu(self.ada(self.c2(x), self.a2(w)), 0.2)
        return self.rgb(x)


class DynConv(nn.Module):
    """A kernel for each sample, mixed of several."""

    def __init__(self, i: Any, o: Any, k: Any = 3, K: Any = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(R(K, o, i, k, k) * 0.2)
        self.b = nn.Parameter(torch.zeros(K, o))
        self.att = nn.Sequential(nn.Linear(i, K))
        self.k = k
        self.o = o

    def forward(self, x: Any) -> Any:
        B, C, H, W = x.shape
        a = F.softmax(self.att(x.mean((2, 3))) / 4, -1)
        w = torch.mm(a, self.w.view(self.w.size(0), -1)).view(B * self.o, C, self.k, self.k)
        b = torch.mm(a, self.b).view(-1)
        return F.conv2d(x.reshape(1, B * C, H, W), w, b, padding=self.k // 2, groups=B).view(B, self.o, H, W)


class DynNet(nn.Module):
    """One between two plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c0 = nn.Conv2d(3, 8, 3)
        self.d = DynConv(8, 12)
        self.c1 = nn.Conv2d(12, 6, 3)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(F.relu(self.c1(F.relu(self.d(F.relu(self.c0(x)))))).mean((2, 3)))


class MoEIndexAdd(nn.Module):
    """Experts of several widths, added where their tokens are."""

    def __init__(self, d: Any = 8) -> None:
        super().__init__()
        self.inp = nn.Linear(5, d)
        self.router = nn.Linear(d, 3, bias=False)
        self.ex = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 12 + 2 * i), nn.GELU(), nn.Linear(12 + 2 * i, d)) for i in range(3)
        )
        self.out = nn.Linear(d, 2)

    def forward(self, x: Any) -> Any:
        x = self.inp(x)
        sh = x.shape
        t = x.reshape(-1, sh[-1])
        p = self.router(t).softmax(-1)
        w, i = p.topk(2, -1)
        w = w / w.sum(-1, keepdim=True)
        y = torch.zeros_like(t)
        m = F.one_hot(i, 3).permute(2, 1, 0)
        for e in range(3):
            k, tok = torch.where(m[e])
            y.index_add_(0, tok, self.ex[e](t[tok]) * w[tok, k, None])
        return self.out(y.view(sh))


class GCNScatter(nn.Module):
    """Messages along edges, weighted and summed by scatter_add."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(6, 14)
        self.msg = nn.Linear(28 + 2, 11)
        self.up = nn.GRUCell(11, 14)
        self.att = nn.Linear(28, 1)
        self.out = nn.Linear(14, 3)

    def forward(self, x: Any, ei: Any, ea: Any, batch: Any) -> Any:
        h = F.elu(self.l1(x))
        src, dst = ei
        for _ in range(2):
            m = F.relu(self.msg(torch.cat([h.index_select(0, src), h.index_select(0, dst), ea], -1)))
            a = F.leaky_relu(self.att(torch.cat([h[src], h[dst]], 1)), 0.2).exp()
            den = torch.zeros(h.size(0), 1, dtype=h.dtype).scatter_add_(0, dst[:, None], a)
            agg = torch.zeros(h.size(0), m.size(1), dtype=h.dtype).scatter_add_(
                0, dst[:, None].expand_as(m), m * a / (den[dst] + 1e-09)
            )
            h = self.up(agg, h)
        g = torch.zeros(2, h.size(1), dtype=h.dtype).index_add_(0, batch, h)
        return self.out(g)


class STN(nn.Module):
    """An image straightened, and features sampled, where networks say."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Sequential(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(6 * 36, 10), nn.ReLU(), nn.Linear(10, 6))
        self.c1 = nn.Conv2d(1, 9, 3)
        self.off = nn.Conv2d(9, 2, 3, padding=1)
        self.c2 = nn.Conv2d(9, 7, 3)
        self.o = nn.Linear(7, 4)

    def forward(self, x: Any) -> Any:
        th = self.fc(torch.flatten(self.loc(x), 1)).view(-1, 2, 3)
        g = F.affine_grid(th, x.size(), align_corners=False)
        x = F.grid_sample(x, g, align_corners=False)
        f = F.relu(self.c1(x))
        o = self.off(f).permute(0, 2, 3, 1).tanh() * 0.1
        base = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(x.size(0), -1, -1), f.size(), align_corners=False)
        f = F.grid_sample(f, base + o, align_corners=False)
        return self.o(F.relu(self.c2(f)).amax((2, 3)))


class FuncMHA(nn.Module):
    """The function behind nn.MultiheadAttention."""

    def __init__(self, d: Any = 16, h: Any = 4) -> None:
        super().__init__()
        self.d, self.h = (d, h)
        self.wi = nn.Parameter(R(3 * d, d) * 0.2)
        self.bi = nn.Parameter(R(3 * d) * 0.1)
        self.o = nn.Linear(d, d)
        self.emb = nn.Linear(5, d)
        self.f1 = nn.Linear(d, 20)
        self.f2 = nn.Linear(20, d)
        self.head = nn.Linear(d, 3)

    def forward(self, x: Any) -> Any:
        x = self.emb(x).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            self.d,
            self.h,
            self.wi,
            self.bi,
            None,
            None,
            False,
            0.0,
            self.o.weight,
            self.o.bias,
            training=self.training,
            need_weights=False,
        )
        x = x + y
        x = x + self.f2(F.relu(self.f1(x)))
        return self.head(x.mean(0))


class GQASDPA(nn.Module):
    """Fewer keys than queries, by a flag."""

    def __init__(self, d: Any = 16) -> None:
        super().__init__()
        self.n_q, self.n_kv, self.hd = (4, 2, 6)
        self.q = nn.Linear(d, 24, bias=False)
        self.k = nn.Linear(d, 12, bias=False)
        self.v = nn.Linear(d, 12, bias=False)
        self.o = nn.Linear(24, d, bias=False)
        self.emb = nn.Linear(3, d)
        self.head = nn.Linear(d, 2)

    def forward(self, x: Any) -> Any:
        x = self.emb(x)
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_q, self.hd).transpose(1, 2)
        k = self.k(x).view(B, T, self.n_kv, self.hd).transpose(1, 2)
        v = self.v(x).view(B, T, self.n_kv, self.hd).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(B, T, -1)
        return self.head(x + self.o(y))


class RopeComplex(nn.Module):
    """LLaMA as its authors wrote it: rotary positions as complex numbers."""

    def __init__(self, d: Any = 16, h: Any = 4) -> None:
        super().__init__()
        self.h = h
        self.hd = d // h
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.emb = nn.Embedding(11, d)
        self.w1, self.w2, self.w3 = (
            nn.Linear(d, 28, bias=False),
            nn.Linear(28, d, bias=False),
            nn.Linear(d, 28, bias=False),
        )
        self.head = nn.Linear(d, 11)
        f = 1 / 100 ** (torch.arange(0, self.hd, 2).float() / self.hd)
        t = torch.outer(torch.arange(16), f)
        self.register_buffer("fc", torch.polar(torch.ones_like(t), t), persistent=False)

    def rot(self, x: Any) -> Any:
        c = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        f = self.fc[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(c * f).flatten(3).type_as(x)

    def forward(self, i: Any) -> Any:
        x = self.emb(i)
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.hd) for w in (self.wq, self.wk, self.wv))
        q, k = (self.rot(q), self.rot(k))
        y = (
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
            .transpose(1, 2)
            .reshape(B, T, -1)
        )
        x = x + self.wo(y)
        x = x + self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.head(x)


class RelBias(nn.Module):
    """A table of biases for each head."""

    def __init__(self, d: Any = 16, h: Any = 4) -> None:
        super().__init__()
        self.num_heads = h
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.o = nn.Linear(d, d)
        self.table = nn.Embedding(9, h)
        self.emb = nn.Linear(3, d)
        self.head = nn.Linear(d, 2)

    def forward(self, x: Any) -> Any:
        x = self.emb(x)
        B, T, _D = x.shape

        def sp(t):
            return t.view(B, T, self.num_heads, -1).permute(0, 2, 1, 3)

        k, v = self.kv(x).split(self.kv.out_features // 2, -1)
        i = (torch.arange(T)[:, None] - torch.arange(T)).clamp(-4, 4) + 4
        a = (sp(self.q(x)) @ sp(k).transpose(2, 3) + self.table(i).permute(2, 0, 1)[None]).softmax(-1)
        return self.head(x + self.o((a @ sp(v)).permute(0, 2, 1, 3).flatten(2)))


class TalkingHeads(nn.Module):
    """Heads mixed before and after the softmax."""

    def __init__(self, d: Any = 16, h: Any = 4) -> None:
        super().__init__()
        self.h = h
        self.qkv = nn.Linear(d, 3 * d)
        self.pl = nn.Linear(h, h)
        self.pw = nn.Linear(h, h)
        self.o = nn.Linear(d, d)
        self.emb = nn.Linear(3, d)
        self.f = nn.Sequential(nn.Linear(d, 22), nn.GELU(), nn.Linear(22, d))
        self.head = nn.Linear(d, 2)

    def forward(self, x: Any) -> Any:
        x = self.emb(x)
        B, T, _D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.h, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = q @ k.transpose(-1, -2)
        a = self.pl(a.permute(0, 2, 3, 1)).softmax(2)
        a = self.pw(a).permute(0, 3, 1, 2)
        x = x + self.o((a @ v).transpose(1, 2).reshape(B, T, -1))
        return self.head((x + self.f(x)).mean(1))


class ConvLSTM(nn.Module):
    """Gates by a convolution, with a peephole."""

    def __init__(self, i: Any = 2, h: Any = 7) -> None:
        super().__init__()
        self.hid = h
        self.conv = nn.Conv2d(i + h, 4 * h, 3, padding=1)
        self.wci = nn.Parameter(torch.zeros(1, h, 1, 1))
        self.out = nn.Conv2d(h, 1, 1)

    def forward(self, x: Any) -> Any:
        B, T, _C, H, W = x.shape
        h = x.new_zeros(B, self.hid, H, W)
        c = torch.zeros_like(h)
        ys = []
        for t in range(T):
            i, f, o, g = torch.split(self.conv(torch.cat([x[:, t], h], 1)), self.hid, 1)
            i = torch.sigmoid(i + self.wci * c)
            c = torch.sigmoid(f) * c + i * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            ys.append(self.out(h))
        return torch.stack(ys, 1)


class WaveNet(nn.Module):
    """Gated dilated convolutions behind padding on the left."""

    def __init__(self, c: Any = 8, sk: Any = 10) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, c, 1)
        self.dil = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=2**i) for i in range(3))
        self.res = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(c, sk, 1) for _ in range(3))
        self.o1 = nn.Conv1d(sk, 12, 1)
        self.o2 = nn.Conv1d(12, 6, 1)

    def forward(self, x: Any) -> Any:
        x = self.inp(x)
        tot = 0
        for i, (d, r, k) in enumerate(zip(self.dil, self.res, self.skip, strict=False)):
            y = d(F.pad(x, (2**i, 0)))
            a, b = y.chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            tot = tot + k(y)
            x = x + r(y)
        return self.o2(F.relu(self.o1(F.relu(tot))))


class CSP(nn.Module):
    """Halves at a fixed place."""

    def __init__(self) -> None:
        super().__init__()
        self.st = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.m = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Mish(), nn.Conv2d(6, 8, 3, padding=1))
        self.tr = nn.Conv2d(16, 10, 1)
        self.o = nn.Linear(10 * 4, 3)

    def forward(self, x: Any) -> Any:
        x = F.mish(self.bn(self.st(x)))
        a, b = (x[:, :8], x[:, 8:])
        b = b + self.m(b)
        x = F.mish(self.tr(torch.cat((a, b), 1)))
        return self.o(F.adaptive_max_pool2d(x, 2).flatten(1))


class CSPshape(CSP):
    """Halves of whatever came in."""

    def forward(self, x: Any) -> Any:
        x = F.mish(self.bn(self.st(x)))
        c = x.shape[1] // 2
        a, b = (x[:, :c], x[:, c:])
        b = b + self.m(b)
        x = F.mish(self.tr(torch.cat((a, b), 1)))
        return self.o(F.adaptive_max_pool2d(x, 2).flatten(1))


class RepVGG(nn.Module):
    """Three branches, one of them a norm alone."""

    def __init__(self, c: Any = 8) -> None:
        super().__init__()
        self.st = nn.Conv2d(3, c, 3, padding=1)
        self.k3 = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2))
        self.k1 = nn.ModuleList(nn.Conv2d(c, c, 1, bias=False) for _ in range(2))
        self.b3 = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(2))
        self.b1 = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(2))
        self.bi = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(2))
        self.o = nn.Conv2d(c, 3, 1)

    def forward(self, x: Any) -> Any:
        x = self.st(x)
        for a, b, c, d, e in zip(self.k3, self.k1, self.b3, self.b1, self.bi, strict=False):
            x = F.relu(c(a(x)) + d(b(x)) + e(x))
        return self.o(x)


class BSpline(nn.Module):
    """B-splines on a grid, with sizes of its own."""

    def __init__(self, i: Any, o: Any, g: Any = 4, k: Any = 3) -> None:
        super().__init__()
        self.in_features, self.out_features, self.k = (i, o, k)
        h = 2 / g
        self.register_buffer("grid", (torch.arange(-k, g + k + 1) * h - 1).expand(i, -1).contiguous())
        self.base_weight = nn.Parameter(R(o, i) * 0.3)
        self.spline_weight = nn.Parameter(R(o, i, g + k) * 0.3)
        self.scaler = nn.Parameter(torch.ones(o, i))

    def bases(self, x: Any) -> Any:
        x = x.unsqueeze(-1)
        g = self.grid
        b = ((x >= g[:, :-1]) & (x < g[:, 1:])).to(x.dtype)
        for k in range(1, self.k + 1):
            b = (x - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)]) * b[:, :, :-1] + (g[:, k + 1 :] - x) / (
                g[:, k + 1 :] - g[:, 1:-k]
            ) * b[:, :, 1:]
        return b.contiguous()

    def forward(self, x: Any) -> Any:
        base = F.linear(F.silu(x), self.base_weight)
        sp = F.linear(
            self.bases(x).view(x.size(0), -1),
            (self.spline_weight * self.scaler.unsqueeze(-1)).view(self.out_features, -1),
        )
        return base + sp


class LoRALinear(nn.Module):
    """Two narrow matrices beside a frozen one."""

    def __init__(self, base: Any, r: Any = 4) -> None:
        super().__init__()
        self.base = base
        base.requires_grad_(False)
        self.A = nn.Parameter(R(r, base.in_features) * 0.1)
        self.B = nn.Parameter(R(base.out_features, r) * 0.1)
        self.scaling = 2.0

    def forward(self, x: Any) -> Any:
        return self.base(x) + x @ self.A.T @ self.B.T * self.scaling


class ScriptSub(nn.Module):
    """A scripted part among plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 12)
        self.m = torch.jit.script(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9)))
        self.b = nn.Linear(9, 14)
        self.c = nn.Linear(14, 2)

    def forward(self, x: Any) -> Any:
        return self.c(F.gelu(self.b(F.relu(self.m(F.relu(self.a(x)))))))


class PList(nn.Module):
    """Weights in a list."""

    def __init__(self, sizes: Any = (6, 12, 9, 3)) -> None:
        super().__init__()
        self.w = nn.ParameterList((nn.Parameter(R(o, i) * 0.3) for i, o in itertools.pairwise(sizes)))
        self.b = nn.ParameterDict({str(k): nn.Parameter(torch.zeros(o)) for k, o in enumerate(sizes[1:])})

    def forward(self, x: Any) -> Any:
        for k, w in enumerate(self.w):
            x = F.linear(x, w, self.b[str(k)])
            x = x if k == len(self.w) - 1 else x.relu()
        return x


class MoCo(nn.Module):
    """A second encoder that follows, and a queue."""

    def __init__(self) -> None:
        super().__init__()

        def mk():
            return nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 8))

        self.q = mk()
        self.k = mk()
        self.k.load_state_dict(self.q.state_dict())
        self.k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(R(8, 32), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def upd(self, k: Any) -> Any:
        for a, b in zip(self.q.parameters(), self.k.parameters(), strict=False):
            b.data.mul_(0.99).add_(a.data, alpha=0.01)
        p = int(self.ptr)
        self.queue[:, p : p + len(k)] = k.T
        self.ptr[0] = (p + len(k)) % 32

    def forward(self, x: Any) -> Any:
        q = F.normalize(self.q(x), dim=1)
        with torch.no_grad():
            k = F.normalize(self.k(x + 0.1), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach()], 1) / 0.2
        if self.training:
            self.upd(k)
        return logits


class WNormLog(nn.Module):
    """The sizes of its weights beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 12)
        self.b = nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        y = self.b(F.relu(self.a(x)))
        reg = sum(p.pow(2).sum() for p in self.parameters())
        ortho = (self.a.weight @ self.a.weight.T - torch.eye(self.a.weight.shape[0], dtype=x.dtype)).pow(2).sum()
        return (y, reg, ortho)


class Flow(nn.Module):
    """Features of one image, moved onto another."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(3, 8, 3, padding=1)
        self.flow = nn.Sequential(nn.Conv2d(16, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 2, 3, padding=1))
        self.h = nn.Conv2d(16, 6, 3, padding=1)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, a: Any, b: Any) -> Any:
        x, y = (F.relu(self.f(a)), F.relu(self.f(b)))
        fl = self.flow(torch.cat([x, y], 1)).permute(0, 2, 3, 1).tanh()
        _B, H, W, _ = fl.shape
        gy, gx = torch.meshgrid(
            torch.linspace(-1, 1, H, dtype=x.dtype), torch.linspace(-1, 1, W, dtype=x.dtype), indexing="ij"
        )
        g = torch.stack([gx, gy], -1) + 0.1 * fl
        return self.o(F.relu(self.h(torch.cat([x, F.grid_sample(y, g, align_corners=True)], 1))))


class OptionA(nn.Module):
    """A shortcut padded with empty channels."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 16, 3, 2, 1)
        self.bn = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.o = nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.s(x))
        y = self.b(F.relu(self.bn(self.a(x))))
        return self.o(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class DomainBN(nn.Module):
    """A norm for each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3)
        self.bn = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.d = nn.Conv2d(8, 6, 3)
        self.bn2 = nn.ModuleDict({"a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)})
        self.o = nn.Linear(6, 3)

    def forward(self, x: Any, dom: Any = 0) -> Any:
        x = F.relu(self.bn[dom](self.c(x)))
        x = F.relu(self.bn2["ab"[dom]](self.d(x)))
        return self.o(x.mean((2, 3)))


class S4D(nn.Module):
    """A diagonal state space as a long convolution."""

    def __init__(self, h: Any = 8, n: Any = 4) -> None:
        super().__init__()
        self.i = nn.Linear(3, h)
        self.lr = nn.Parameter(torch.rand(h, n))
        self.im = nn.Parameter(torch.rand(h, n) * 3)
        self.C = nn.Parameter(R(h, n, 2))
        self.D = nn.Parameter(R(h))
        self.dt = nn.Parameter(torch.rand(h) - 3)
        self.o = nn.Linear(h, 2)

    def forward(self, x: Any) -> Any:
        u = self.i(x).transpose(1, 2)
        L = u.size(-1)
        A = -torch.exp(self.lr) + 1j * self.im
        dt = self.dt.exp()
        dA = A * dt[:, None]
        K = dA.unsqueeze(-1) * torch.arange(L)
        C = torch.view_as_complex(self.C) * (torch.exp(dA) - 1) / A
        K = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(K)).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(K, n=2 * L), n=2 * L)[..., :L]
        return self.o(F.gelu(y + u * self.D[:, None]).transpose(1, 2))


def lora() -> nn.Module:
    """Two wrapped layers and a plain one."""
    wrapped = [LoRALinear(nn.Linear(6, 14)), nn.ReLU(), LoRALinear(nn.Linear(14, 12)), nn.ReLU()]
    return nn.Sequential(*wrapped, nn.Linear(12, 3))


def splines() -> nn.Module:
    """Three layers of splines."""
    return nn.Sequential(BSpline(4, 8), BSpline(8, 6), BSpline(6, 2))


def normed() -> nn.Module:
    """Weight norm, behind which nothing of it is found."""
    norm = nn.utils.parametrizations.weight_norm
    body = [norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv1d(6, 4, 1))


def padded() -> nn.Module:
    """All kinds of padding."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(8, 10, 3),
        nn.ELU(), nn.Conv2d(10, 6, 3, padding="same", padding_mode="replicate"), nn.ReLU(), nn.ZeroPad2d(1),
        nn.Conv2d(6, 3, 3),
    )  # fmt: skip


STRANGERS: dict[str, tuple[Any, Any]] = {
    "heads by key": (MultiTask, lambda: (R(4, 6), "a")),
    "text in images": (CRNN, lambda: (R(2, 1, 16, 20),)),
    "seq2seq, tied": (
        Seq2SeqTied,
        lambda: (
            torch.randint(0, 30, (2, 7)),
            torch.randint(0, 30, (2, 5)),
        ),
    ),
    "AdaIN": (AdaIN, lambda: (R(2, 5),)),
    "dynamic convolution": (DynNet, lambda: (R(2, 3, 10, 10),)),
    "experts by index_add": (MoEIndexAdd, lambda: (R(2, 6, 5),)),
    "messages by scatter": (
        GCNScatter,
        lambda: (
            R(7, 6),
            torch.randint(0, 7, (2, 15)),
            R(15, 2),
            torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        ),
    ),
    "spatial transformer": (STN, lambda: (R(2, 1, 16, 16),)),
    "functional attention": (FuncMHA, lambda: (R(2, 5, 5),)),
    "enable_gqa": (GQASDPA, lambda: (R(2, 5, 3),)),
    "rotary, complex": (RopeComplex, lambda: (torch.randint(0, 11, (2, 6)),)),
    "relative positions": (RelBias, lambda: (R(2, 6, 3),)),
    "talking heads": (TalkingHeads, lambda: (R(2, 6, 3),)),
    "ConvLSTM": (ConvLSTM, lambda: (R(2, 3, 2, 5, 5),)),
    "WaveNet": (WaveNet, lambda: (R(2, 1, 18),)),
    "CSP, halves by size": (CSPshape, lambda: (R(2, 3, 8, 8),)),
    "RepVGG": (RepVGG, lambda: (R(2, 3, 8, 8),)),
    "scripted part": (ScriptSub, lambda: (R(4, 5),)),
    "parameter list": (PList, lambda: (R(4, 6),)),
    "queue of keys": (MoCo, lambda: (R(4, 6),)),
    "penalty as an output": (WNormLog, lambda: (R(4, 5),)),
    "warped features": (
        Flow,
        lambda: (
            R(2, 3, 8, 8),
            R(2, 3, 8, 8),
        ),
    ),
    "padded shortcut": (OptionA, lambda: (R(2, 3, 8, 8),)),
    "norms by domain": (DomainBN, lambda: (R(2, 3, 8, 8),)),
    "S4D": (S4D, lambda: (R(2, 9, 3),)),
    "LoRA": (lora, lambda: (R(4, 6),)),
    "B-splines": (splines, lambda: (R(5, 4).clamp(-0.9, 0.9),)),
    "weight norm": (normed, lambda: (R(2, 3, 12),)),
    "padding": (padded, lambda: (R(2, 3, 10, 10),)),
}

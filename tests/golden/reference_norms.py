"""The norms and their gradients as written in the papers: float64 numpy, one channel or one row at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, list[tuple[Array, float]]]:
    """Output, and for each row (normalized row, 1 / std)."""
    y, saved = np.empty_like(x), []
    for i, row in enumerate(x):
        mean = sum(row) / len(row)
        var = sum((v - mean) ** 2 for v in row) / len(row)
        inv = 1 / np.sqrt(var + eps)
        hat = (row - mean) * inv
        y[i] = w * hat + b
        saved.append((hat, inv))
    return y, saved


def layer_norm_backward(g: Array, w: Array, saved: list[tuple[Array, float]]) -> tuple[Array, Array, Array]:
    """Gradients of input, weight, bias."""
    gx, gw, gb = np.zeros_like(g), np.zeros_like(w), np.zeros_like(w)
    for i, (hat, inv) in enumerate(saved):
        gw += g[i] * hat
        gb += g[i]
        d = g[i] * w
        gx[i] = inv * (d - d.mean() - hat * (d * hat).mean())
    return gx, gw, gb


@dataclass
class BatchNorm:
    """torch's BatchNorm1d on rows: biased variance to normalize, unbiased in the running one."""

    gamma: Array
    beta: Array
    eps: float = 1e-5
    momentum: float = 0.1
    running_mean: Array = field(init=False)
    running_var: Array = field(init=False)

    def __post_init__(self) -> None:
        self.running_mean, self.running_var = np.zeros_like(self.gamma), np.ones_like(self.gamma)

    def forward(self, x: Array, counted: list[int] | None = None) -> Array:
        rows = list(range(len(x))) if counted is None else counted
        y = np.empty_like(x)
        self.saved = (x, rows, [])
        for c in range(x.shape[1]):
            values = [x[i, c] for i in rows]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
            s = np.sqrt(var + self.eps)
            y[:, c] = self.gamma[c] * (x[:, c] - mean) / s + self.beta[c]
            self.saved[2].append((mean, s))
            unbiased = var * len(values) / (len(values) - 1)
            self.running_mean[c] += self.momentum * (mean - self.running_mean[c])
            self.running_var[c] += self.momentum * (unbiased - self.running_var[c])
        return y

    def backward(self, g: Array) -> tuple[Array, Array, Array]:
        x, rows, stats = self.saved
        gx, gg, gb = np.zeros_like(x), np.zeros_like(self.gamma), np.zeros_like(self.beta)
        for c, (mean, s) in enumerate(stats):
            hat = (x[:, c] - mean) / s
            gg[c], gb[c] = (g[:, c] * hat).sum(), g[:, c].sum()
            d = g[:, c] * self.gamma[c]
            gx[:, c] = d / s
            # every row's output depends on the rows that were counted, through mean and s
            for i in rows:
                gx[i, c] -= (d.sum() + hat[i] * (d * hat).sum()) / (s * len(rows))
        return gx, gg, gb

    def evaluate(self, x: Array) -> Array:
        return self.gamma * (x - self.running_mean) / np.sqrt(self.running_var + self.eps) + self.beta


@dataclass
class Unified:
    """Unified Normalization; the list of windows is written as in its equations, a deque of the last iterations."""

    weight: Array
    bias: Array
    window: int
    warmup: int
    filtration: bool
    per_channel: bool = False
    alpha: float = 0.9
    eps: float = 1e-5

    def __post_init__(self) -> None:
        n = len(self.weight)
        self.running_var, self.ema, self.t, self.skipped = np.ones(n), np.zeros(n), 0, 0
        self.x2, self.gz = np.zeros((self.window, n)), np.zeros((self.window, n))

    def forward(self, x: Array, counted: list[int] | None = None) -> Array:
        self.t += 1
        m, slot, n = self.window, self.t % self.window, x.shape[1]
        self.counted = list(range(len(x))) if counted is None else counted
        x2 = np.array([sum(x[i, c] ** 2 for i in self.counted) / len(self.counted) for c in range(n)])
        roots = np.sqrt(self.x2)
        whole = ((roots - roots.mean()) ** 2).sum() / (roots.size - 1)
        scatter = [((roots[:, c] - roots[:, c].mean()) ** 2).sum() / (m - 1) for c in range(n)]
        self.x2[slot] = x2
        self.skip = False
        geometric = np.empty(n)
        for c in range(n):
            geometric[c] = np.prod(self.x2[:, c]) ** (1 / m)
            limit = m * (scatter[c] if self.per_channel else whole)
            if self.filtration and self.t >= self.warmup and self.x2[:, c].mean() - geometric[c] > limit:
                self.skip = True
        if self.skip:
            self.x2[slot] = self.running_var
            self.skipped += 1
        self.plain = self.t <= m or self.t < self.warmup or self.skip
        var = x2 if self.plain else geometric
        self.s = np.sqrt(var + self.eps)
        self.r = np.clip(self.s / np.sqrt(self.running_var + self.eps), 1 / 5, 5)
        if self.t <= max(1000, self.warmup) or self.skip:
            self.r = np.ones(n)
        self.running_var = self.alpha * self.running_var + (1 - self.alpha) * var
        self.z = x / self.s
        return self.weight * self.z + self.bias

    def backward(self, out: Array) -> tuple[Array, Array, Array]:
        n, slot = len(self.weight), self.t % self.window
        gx, gw, gb = np.empty_like(out), np.empty(n), np.empty(n)
        for c in range(n):
            g, z = out[:, c] * self.weight[c] * self.r[c], self.z[:, c]
            mean = sum(g[i] * z[i] for i in self.counted) / len(self.counted)
            self.gz[slot, c] = self.ema[c] if self.skip else mean
            psi = mean if self.plain else self.gz[:, c].mean()
            self.ema[c] = self.alpha * self.ema[c] + (1 - self.alpha) * psi
            gx[:, c] = (g - (psi if self.skip else self.ema[c]) * z) / self.s[c]
            gw[c] = (out[:, c] * self.r[c] * z).sum()
            gb[c] = out[:, c].sum()
        return gx, gw, gb

    def evaluate(self, x: Array) -> Array:
        return self.weight * x / np.sqrt(self.running_var + self.eps) + self.bias

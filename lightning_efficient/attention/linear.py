"""Simplified linear attention (SLA) in the place of softmax attention on square token grids (SLAB, arXiv 2405.11582).

Per head, with φ = ReLU: ``out_i = φ(q_i) Σ_j φ(k_j + p_j)ᵀ v_j / (φ(q_i) · Σ_j φ(k_j + p_j) + eps)``, plus a depthwise
convolution of the values on their grid, then the old output projection. The cost is linear in the number of tokens.
Differences from the published code (xinghaochen/SLAB): the weights of the attention in place are reused, the sums over
tokens are means (the same number, which half precision can hold), and query-key norms, output norms and gates stay.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast
from zlib import crc32

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, fx, nn

from lightning_efficient.attention.token_grid import token_grids, why_not
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import (
    NoMatchError,
    canonical_name,
    modules_by_name,
    select_modules,
)
from lightning_efficient.common.near import near_names
from lightning_efficient.surgery.replace import replace_modules

METHOD = "linear_attention"


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Hyper-parameters of simplified linear attention.

    Args:
        kernel_size: Side of the depthwise convolution on the grid of values: odd, in tokens.
        grid: Side of the square token grid. None: read off the timm ``VisionTransformer`` around the attention.
        eps: Added to the normaliser, as in the published code.

    Raises:
        ValueError: A value is of the wrong type or out of range.
    """

    kernel_size: int = 5
    grid: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require("kernel_size", self.kernel_size, _is_count(self.kernel_size) and self.kernel_size % 2, "an odd number")
        _require("grid", self.grid, self.grid is None or _is_count(self.grid), "tokens a side, from 1, or None")
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        _require("eps", self.eps, number and 0 < self.eps < 1, "a number between 0 and 1")

    @classmethod
    def of(cls, config: Mapping[str, Any] | LinearAttentionConfig | None) -> LinearAttentionConfig:
        """The part of a callback's arguments, or of a recipe, that is about the attention itself."""
        if isinstance(config, LinearAttentionConfig):
            return config
        config = config or {}
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _require(name: str, value: object, valid: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"linear attention: `{name}` must be {expected}; got {value!r}.")


class LinearAttention(nn.Module):
    """Simplified linear attention with the projections of a softmax attention.

    Input and output are (batch, grid², channels), tokens row by row. Children have the names they had in ``attention``;
    new are ``position`` (1, grid², channels), added to the keys before the ReLU and zero at first, and ``dwc``, the
    convolution, whose weights all heads share and which starts as ``nn.Conv2d`` does. Sums run in float32 (float64 in a
    float64 model), also under autocast. Attention dropout has nothing to act on and is left out.

    Args:
        attention: timm's attention. Its children become ours, with the identity of their parameters.
        grid: Side of the square token grid.
        config: ``kernel_size`` and ``eps``.
        seed: Of the convolution's first weights; the global random state is left alone.
    """

    def __init__(self, attention: Attention, grid: int, config: LinearAttentionConfig, seed: int = 0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = int(attention.num_heads), int(attention.head_dim)
        self.grid, self.eps = grid, config.eps
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate: nn.Module | None = getattr(attention, "gate", None)
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.position = nn.Parameter(torch.zeros(1, grid * grid, self.num_heads * self.head_dim))
        self.dwc = _depthwise(self.head_dim, config.kernel_size, seed)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            x: Tokens, (batch, grid², channels).
            attn_mask: None: linear attention forms no pairs of tokens that could be masked.
            is_causal: False, for the same reason.

        Raises:
            ValueError: There is a mask, or another number of tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(f"{METHOD}: {_MASKED}. Leave this model's attention alone: `exclude`.")
        if x.dim() != 3 or x.shape[1] != self.grid**2:
            raise ValueError(
                f"{METHOD}: got input of shape {tuple(x.shape)}; expected (batch, {self.grid**2}, channels), a grid of "
                f"{self.grid}×{self.grid} tokens without class or register tokens. Set `grid`, or `exclude` the module."
            )
        q, k, v = self._heads(x)
        with torch.autocast(x.device.type, enabled=False):
            y = self._mix(q, k, v)
        return self._leave(x, y, v)

    def fuse(self) -> nn.Module:
        """The same function as a ``torch.fx`` graph of torch operations, for export (masks are refused in it as well).

        Without the switch that turns autocast off, since neither torch.export nor ONNX programs know it: run under
        autocast, its matrix products are in half precision. It never overflows, because sums over tokens are means.
        """

        # Local: a GraphModule keeps the name of a global tracer class, and would need this package to be loaded.
        class Tracer(fx.Tracer):
            traced_func_name = "_plain"

            def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
                return True

        return fx.GraphModule(self, Tracer().trace(self), type(self).__name__).train(self.training)

    def extra_repr(self) -> str:
        """Heads, grid and the order of the products."""
        order = "(qk)v" if self._pairs_are_cheaper else "q(kv)"
        return f"num_heads={self.num_heads}, grid={self.grid}, order={order}, eps={self.eps}"

    @property
    def _pairs_are_cheaper(self) -> bool:
        # N²·2d multiplications against d²·2N, as the published code compares them.
        return self.grid**2 <= self.head_dim

    @property
    def _wide(self) -> torch.dtype:
        # Not `self.position`: while `fuse` traces, that is a symbol without a dtype.
        (own,) = self.parameters(recurse=False)
        return torch.promote_types(own.dtype, torch.float32)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, tokens, heads, head_dim)."""
        shape = (self.num_heads, self.head_dim)
        q, k, v = torch.unflatten(self.qkv(x), -1, (3, *shape)).unbind(2)
        return self.q_norm(q), self.k_norm(k) + torch.unflatten(self.position, -1, shape), v

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.to(self._wide) for t in (q, k, v))
        tokens = self.grid**2
        # Numerator and denominator divided by the number of tokens: sums of thousands would leave float16's range.
        q, k = q.relu(), k.relu() / tokens
        weights = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        if self._pairs_are_cheaper:
            y = torch.einsum("bhnm,bmhd->bnhd", torch.einsum("bnhc,bmhc->bhnm", q, k), v)
        else:
            y = torch.einsum("bnhc,bhcd->bnhd", q, torch.einsum("bnhc,bnhd->bhcd", k, v))
        return y * (1 / (weights + self.eps / tokens))

    def _leave(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Add the local part and project."""
        channels = self.num_heads * self.head_dim
        image = torch.unflatten(v.flatten(2).transpose(1, 2), 2, (self.grid, self.grid))  # a view, channels last
        weight, bias = (
            self.dwc.weight.repeat(self.num_heads, 1, 1, 1),
            cast(Tensor, self.dwc.bias).repeat(self.num_heads),
        )
        local = F.conv2d(image, weight, bias, padding=self.dwc.padding, groups=channels)
        y = self.norm(y.type_as(v).flatten(2) + local.flatten(2).transpose(1, 2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(y))
        return out

    def _plain(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """What ``fuse`` traces: comparisons as calls, which a trace keeps."""
        torch._assert(operator.eq(attn_mask, None), _MASKED)
        torch._assert(operator.eq(is_causal, False), _MASKED)
        q, k, v = self._heads(x)
        return self._leave(x, self._mix(q, k, v), v)


_MASKED = "linear attention takes no attention mask and is not causal"


def _depthwise(channels: int, kernel_size: int, seed: int) -> nn.Conv2d:
    shape: dict[str, Any] = {"padding": kernel_size // 2, "groups": channels, "device": "meta"}
    conv = nn.Conv2d(channels, channels, kernel_size, **shape).to_empty(device="cpu")  # on meta, nothing is drawn
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():  # nn.Conv2d's own distribution, for a fan-in of kernel_size²
            parameter.uniform_(-1 / kernel_size, 1 / kernel_size, generator=generator)
    return conv


@dataclass
class Attentions:
    """What to swap.

    Args:
        matched: Name -> (attention, side of its token grid).
        skipped: Name -> why an attention is left alone.
    """

    matched: dict[str, tuple[Attention, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_attention(
    model: nn.Module,
    config: Mapping[str, Any] | LinearAttentionConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Attentions:
    """Choose the softmax attention that linear attention can stand in for; nothing is changed.

    Args:
        model: Any module. Attention that is linear already does not count.
        config: ``grid`` decides what matches.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.

    Raises:
        NoMatchError: There is no such attention (left), none that the globs allow, or each is refused; says why.
        ValueError: ``config`` is invalid.
    """
    grid = LinearAttentionConfig.of(config).grid
    modules = {module: canonical_name(name) for name, module in model.named_modules()}
    done = [module for module in modules if isinstance(module, LinearAttention)]
    others = {modules[module]: why for module in modules if module not in done and (why := why_not(module))}
    if not any(isinstance(module, Attention) for module in modules):
        left = [f"{len(done)} are linear already"] * bool(done) + list(dict.fromkeys(others.values()))
        raise NoMatchError(f"{METHOD}: no timm.layers.Attention to swap ({'; '.join(left[:5]) or 'none found'}).")
    selection = select_modules(model, types=(Attention,), include=include, exclude=exclude, method=METHOD)
    found = Attentions(skipped=dict(selection.skipped) | others)
    grids = token_grids(model, grid)
    for name, module in selection.matched.items():
        side = grids[module]
        if isinstance(side, int) and not any(p.requires_grad for p in module.parameters()):
            side = "frozen (requires_grad=False): another function takes its place, and must be able to train"
        if isinstance(side, int):
            found.matched[name] = (module, side)
        else:
            found.skipped[name] = side
    if not found.matched:
        reasons = list(dict.fromkeys(found.skipped[name] for name in selection.matched))
        raise NoMatchError(
            f"{METHOD}: none of {len(selection.matched)} attention modules can be swapped: {'; '.join(reasons[:5])}."
        )
    return found


def _named(model: nn.Module, config: LinearAttentionConfig, names: Sequence[str]) -> Attentions:
    modules, grids = modules_by_name(model), token_grids(model, config.grid)
    found = Attentions()
    for name in names:
        if name not in modules:
            raise ValueError(f"{METHOD}: the model has no module {name!r}; close names: {near_names(name, modules)}.")
        module = modules[name]
        side = grids.get(module, why_not(module) or "it is no attention of timm's")
        if not isinstance(side, int):
            raise ValueError(f"{METHOD}: {name!r} ({type(module).__name__}) cannot be swapped: {side}.")
        found.matched[name] = (module, side)
    if not found.matched:
        raise NoMatchError(f"{METHOD}: no attention named.")
    return found


def apply_linear_attention(
    model: nn.Module,
    config: Mapping[str, Any] | LinearAttentionConfig | None = None,
    names: Sequence[str] | None = None,
) -> Change:
    """Put a :class:`LinearAttention` in the place of each softmax attention. The model's function changes: train it.

    Args:
        model: The model.
        config: A ``LinearAttentionConfig``, or a mapping with (some of) its fields; ``include`` and ``exclude`` are
            read from a mapping too, other keys are not.
        names: Exactly these modules instead (replaying a recipe).

    Returns:
        What was done. The old parameters stay; new ones follow the learning rate of the old projections.

    Raises:
        NoMatchError: There is nothing to swap.
        ValueError: The configuration is invalid, or a name is no attention that can be swapped. Nothing is changed.
    """
    options = LinearAttentionConfig.of(config)
    globs = config if isinstance(config, Mapping) else {}
    if names is None:
        found = find_attention(model, options, globs.get("include"), globs.get("exclude"))
    else:
        found = _named(model, options, names)
    change = Change(METHOD, targets=describe(found), skipped=found.skipped)
    new = {
        # Another start for every seed and layer, drawn without touching the user's random stream.
        name: LinearAttention(module, side, options, seed=torch.initial_seed() ^ crc32(name.encode()))
        for name, (module, side) in found.matched.items()
    }
    for name, layer in new.items():
        follows = next((p for p in found.matched[name][0].parameters() if p.requires_grad), None)
        change.added += [(parameter, follows) for parameter in (layer.position, *layer.dwc.parameters())]
    change.swaps = replace_modules(model, new)
    return change


def describe(found: Attentions) -> dict[str, str]:
    """What happens to each matched attention, for reports.

    Args:
        found: What :func:`find_attention` returned.
    """
    targets = {}
    for name, (module, side) in found.matched.items():
        targets[name] = f"{type(module).__name__} becomes linear on {side}×{side} tokens"
        if module.attn_drop.p:
            targets[name] += f"; attention dropout of {module.attn_drop.p} no longer applies"
    return targets

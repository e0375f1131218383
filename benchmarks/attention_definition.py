"""softmax(logits / tau) from its definition, in the attention of chosen modules: what results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def attend(logits: Tensor, values: Tensor, tau: float | Tensor) -> Tensor:
    """Values averaged with weights exp(logits / tau) / sum; a row of -inf is NaN."""
    if isinstance(tau, Tensor):
        logits = logits.clamp(min=-1e30)  # -inf has no gradient by tau
    exponents = logits / tau
    weights = (exponents - exponents.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ values


class Definition(TorchFunctionMode):
    """Computes the attention of some modules from its definition, with logits / tau.

    Args:
        modules: Modules whose calls, and those of the modules in them, are computed here.
        tau: Temperature; or one a module, a tensor ``(heads, 1, 1)``.
    """

    def __init__(self, modules: list[nn.Module], tau: float | Sequence[Tensor]) -> None:
        super().__init__()
        self.taus = dict(zip(modules, [tau] * len(modules) if isinstance(tau, float) else tau, strict=True))
        self.running: list[float | Tensor] = []
        self.count = 0

    @property
    def tau(self) -> float | Tensor:
        """Of the innermost of the modules that is running."""
        return self.running[-1]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward, in which only these modules' attention is changed."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(self.taus[module])

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.running.pop()

        handles = [m.register_forward_pre_hook(enter) for m in self.taus]
        handles += [m.register_forward_hook(leave) for m in self.taus]
        with self:
            yield
        for handle in handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not self.running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.count += 1
            return self.sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self.count += 1
            return self.multihead(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            x, *rest = args
            if x.dim() > 2 and (rest[0] if rest else kwargs["dim"]) in (-1, x.dim() - 1):
                self.count += 1
                # finfo.min stays what it is, or a row in which it masks everything would become NaN.
                masked = x <= torch.finfo(x.dtype).min / 2
                return func(torch.where(masked, x, torch.where(masked, 0.0, x) / self.tau), *rest, **kwargs)
        return func(*args, **kwargs)

    def sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        logits = torch.einsum("...qd,...kd->...qk", q, k) * (scale or q.shape[-1] ** -0.5)
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).tril() == 0, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return attend(logits, v, self.tau)

    def multihead(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Packed projections, no extra keys; masks as ``nn.MultiheadAttention`` passes them on (floating)."""
        query, key, value, _, heads, weight, bias = args[:7]
        out_weight, out_bias = args[11:13]
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for x, w, b in zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        for mask, shape in ((kwargs["key_padding_mask"], (len(q), 1, 1, -1)), (kwargs["attn_mask"], None)):
            if mask is not None:
                logits = logits + (mask if shape is None else mask.view(shape))
        return F.linear(attend(logits, v, self.tau).permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None

"""The same attention with sharper or flatter logits: what every way of writing attention has to be given instead.

``softmax(logits / τ)`` divides the whole of the logits, additive biases included (Zhou et al., arXiv 2410.24200, and
their code); boolean masks, ``-inf`` and ``finfo.min`` mean the same before and after.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.attention.multihead import arguments_of_multihead, mask_of_multihead
from lightning_efficient.attention.softmax import SOFTMAX

Mode = Literal["constant", "log_n", "ssmax"]
_MULTIHEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
# As in `visible_keys`, which also has the content to look at.
_MASK_GAP = 87.0
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Law:
    """The factor on the logits of one module's attention.

    Args:
        tau: Temperature; the logits are divided by it.
        mode: ``"constant"``; or by the number ``n`` of keys that a query may see, which is the sequence's own length
            without padding, and the position under a causal mask: ``"log_n"`` multiplies by ``log n / log length``
            (Su, entropy-invariant softmax), ``"ssmax"`` by ``log n`` (Scalable-Softmax, arXiv 2501.19399, with
            ``s = 1 / τ``).
        length: The number of keys at which ``"log_n"`` changes nothing.
        log_tau: A temperature that moves, its logarithm, beside ``tau``; ``(heads,)``, or ``(1,)`` for all heads.

    Raises:
        ValueError: ``tau`` is no finite number above 0, or ``length`` none above 1.
    """

    tau: float = 1.0
    mode: Mode = "constant"
    length: float = 512.0
    log_tau: nn.Parameter | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, low in (("tau", 0), ("length", 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > low):
                raise ValueError(f"`{name}` of attention's temperature is a finite number above {low}; got {value!r}.")

    @property
    def factor(self) -> float:
        """What is not a function of the length and does not move."""
        return 1.0 / self.tau / (math.log(self.length) if self.mode == "log_n" else 1.0)

    @property
    def number(self) -> float | None:
        """The temperature, where it is one for all heads, queries and lengths."""
        moved = [] if self.log_tau is None else [float(tau) for tau in self.log_tau.detach().double().exp()]
        alike = self.mode == "constant" and len(set(moved)) <= 1
        return (self.tau * moved[0] if moved else self.tau) if alike else None

    def of(self, keys: Tensor | None) -> Tensor | float:
        """The factor on logits ``(..., heads, queries, keys)``.

        Args:
            keys: How many keys each query sees, ``(..., queries, 1)``; not looked at in the mode ``"constant"``.
        """
        factor: Tensor | float = self.factor
        if self.log_tau is not None:
            factor = factor * torch.exp(-self.log_tau).view(-1, 1, 1)
        if self.mode == "constant" or keys is None:
            return factor
        return factor * keys.clamp(min=1).double().log()


class Temper(TorchFunctionMode):
    """Context manager: every attention inside has its logits multiplied, forward and backward.

    Args:
        law: By how much.
    """

    def __init__(self, law: Law) -> None:
        super().__init__()
        self.law = law

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call, with other arguments if it is attention."""
        return tempered(self.law, func, args, dict(kwargs or {}))


def tempered(law: Law, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a torch call with its logits multiplied, if it is one that has logits.

    Args:
        law: By how much.
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if func is F.scaled_dot_product_attention:
        return func(**_sdpa(law, *args, **kwargs))
    if func is F.multi_head_attention_forward:
        call = dict(zip(_MULTIHEAD, args, strict=False)) | kwargs
        one_number = law.mode == "constant" and law.log_tau is None
        return _multihead(law, call) if one_number else _multihead_written_out(law, call)
    if func in SOFTMAX and (logits := logits_of_softmax(args, kwargs)) is not None:
        if (dtype := kwargs.get("dtype")) is not None:
            logits = logits.to(dtype)
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        return func(logits_under(law, logits), *args[1:], **rest)
    return func(*args, **kwargs)


def logits_of_softmax(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a softmax over the last of three or more axes, which attention's is; else None."""
    logits = args[0] if args else kwargs["input"]
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(logits, Tensor) or logits.dim() < 3 or axis not in (-1, logits.dim() - 1):
        return None
    return logits if logits.is_floating_point() and logits.numel() else None


def visible(logits: Tensor) -> Tensor:
    """Which keys an additive mask, or logits with one in them, leaves."""
    return logits > torch.finfo(logits.dtype).min / 4


def logits_under(law: Law, logits: Tensor) -> Tensor:
    """Logits that were written out, multiplied, for a softmax; what hides a key hides it still.

    Args:
        law: By how much.
        logits: ``(..., heads, queries, keys)``, masks among them.
    """
    top = logits.amax(-1, keepdim=True)
    if law.mode != "constant":
        seen = _near(logits, top)
        return _where(seen, logits, law.of(seen.sum(-1, keepdim=True, dtype=torch.int32)))
    factor = law.of(None)
    if (isinstance(factor, Tensor) and factor.requires_grad) or logits.dtype == torch.float16:
        return _where(visible(logits), logits, factor)
    # A masked key beside visible ones stays hidden under any factor, finfo.min at the latest as -inf. Only in a row
    # that is masked altogether would that be NaN: such a row is left as it is. No more passes over all logits.
    ones = torch.ones_like(top, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = torch.where(visible(top), factor.to(ones) if isinstance(factor, Tensor) else factor, ones)
    return (logits * rows).to(logits.dtype)


def keys_seen(logits: Tensor) -> Tensor:
    """How many keys each query sees, ``(..., queries, 1)``: also masks of -100 or -1e4 hide one.

    Args:
        logits: Or what is added to them.
    """
    return _near(logits, logits.amax(-1, keepdim=True)).sum(-1, keepdim=True, dtype=torch.int32)


def _near(logits: Tensor, top: Tensor) -> Tensor:
    """What a finite mask leaves, too: such a mask lies far below the largest of its row."""
    info = torch.finfo(logits.dtype)
    return logits >= (top - _MASK_GAP).clamp_min(info.min / 4 * (1 - info.eps))  # none that is not `visible`


def without_blind(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The arguments of an attention call in which every query sees a key, for checks.

    What a query yields that sees none (left padding under a causal mask) is NaN or the mean of all values, whatever its
    logits are, and autograd differentiates it wrongly: it carries no information, and would hide that of the rest.

    Args:
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The arguments, and which queries saw a key, ``(..., queries, 1)``: the results of the others are to be put to
        zero. None, if all did.
    """
    if func is F.scaled_dot_product_attention:
        call = dict(zip(_SDPA, args, strict=False)) | dict(kwargs)
        mask = call.get("attn_mask")
        if mask is None or call["query"].is_nested:
            return args, dict(kwargs), None
        sees = _keys_seen(call["query"], call["key"], mask, call.get("is_causal", False)) > 0
        if not bool(sees.all()):
            mask = mask | ~sees if mask.dtype == torch.bool else torch.where(sees, mask, 0.0)
            return (), call | {"attn_mask": mask}, sees
    elif func in SOFTMAX and (logits := logits_of_softmax(args, kwargs)) is not None:
        sees = visible(logits).any(-1, keepdim=True)
        # NaN is no mask.
        sees = sees | logits.isnan().any(-1, keepdim=True)
        if not bool(sees.all()):
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            return (torch.where(sees, logits, 0.0), *args[1:]), rest, sees
    return args, dict(kwargs), None


def _times(logits: Tensor, factor: Tensor | float, by_length: bool = False) -> Tensor:
    """What masks stays as it is: ``finfo.min`` would overflow, and times ``log 1`` any mask would mask no more."""
    seen = _near(logits, logits.amax(-1, keepdim=True)) if by_length else visible(logits)
    return _where(seen, logits, factor)


def _where(seen: Tensor, logits: Tensor, factor: Tensor | float) -> Tensor:
    if isinstance(factor, Tensor) and factor.requires_grad:
        # Not what is masked: the gradient of the factor would be 0 times -inf.
        return torch.where(seen, _product(torch.where(seen, logits, 0.0), factor), logits)
    return torch.where(seen, _product(logits, factor), logits)


def _product(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """In float32 at least, as a gradient of ``factor`` is a sum over all of ``tensor``."""
    if not isinstance(factor, Tensor):
        return tensor * factor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor * factor.to(tensor.device, wide)).to(tensor.dtype)


def _sdpa(
    law: Law,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> dict[str, Any]:
    factor = law.of(None if law.mode == "constant" else _keys_seen(query, key, attn_mask, is_causal))
    if isinstance(factor, Tensor):
        scaled = _product(query, factor)
        if factor.requires_grad and attn_mask is not None and attn_mask.is_floating_point():
            # Not of a query that sees no key: finfo.min swallows its logits, and their gradient would go on.
            scaled = torch.where(visible(attn_mask).any(-1, keepdim=True), scaled, query)
        query = scaled
    else:
        scale = (query.shape[-1] ** -0.5 if scale is None else scale) * factor
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = _times(attn_mask, factor, law.mode != "constant")
    call = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "dropout_p": dropout_p}
    return call | {"is_causal": is_causal, "scale": scale} | others


def _keys_seen(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Number of keys that each query sees, broadcastable to ``(..., queries, 1)``."""
    queries, keys = query.shape[-2], key.shape[-2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        seen = seen.tril()
    if mask is None:
        return seen.sum(-1, keepdim=True, dtype=torch.int32)
    if mask.dtype == torch.bool:
        return (seen & mask).sum(-1, keepdim=True)
    return keys_seen(torch.where(seen, mask, -torch.inf))


def _multihead(law: Law, call: dict[str, Any]) -> Any:
    """Torch runs its body with function modes off, but it is linear in the rows of ``q``."""
    width = call["query"].shape[-1]
    changed = dict(call)
    if call.get("use_separate_proj_weight"):
        changed["q_proj_weight"] = call["q_proj_weight"] * law.factor
    else:
        changed["in_proj_weight"] = _rows_times(call["in_proj_weight"], width, law.factor)
    if call["in_proj_bias"] is not None:
        changed["in_proj_bias"] = _rows_times(call["in_proj_bias"], width, law.factor)
    for name in ("attn_mask", "key_padding_mask"):
        if (mask := call.get(name)) is not None and mask.is_floating_point():
            changed[name] = _times(mask, law.factor)
    return F.multi_head_attention_forward(**changed)


def _rows_times(weight: Tensor, rows: int, factor: float) -> Tensor:
    return torch.cat([weight[:rows] * factor, weight[rows:]])


def _multihead_written_out(law: Law, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The body of ``F.multi_head_attention_forward``, written out: there no argument scales single queries or heads."""
    c = arguments_of_multihead(**call)
    if c.static_k is not None or c.static_v is not None:
        raise ValueError("`static_k`/`static_v` of multi_head_attention_forward cannot be scaled by query or head.")
    unbatched = c.query.dim() == 2
    query, key, value = (x.unsqueeze(1) if unbatched else x for x in (c.query, c.key, c.value))
    separate = (c.q_proj_weight, c.k_proj_weight, c.v_proj_weight)
    weights = separate if c.use_separate_proj_weight else c.in_proj_weight.chunk(3)
    biases = (None,) * 3 if c.in_proj_bias is None else c.in_proj_bias.chunk(3)
    if c.query is c.key is c.value and not c.use_separate_proj_weight:  # one large product
        q, k, v = F.linear(query, c.in_proj_weight, c.in_proj_bias).chunk(3, -1)
    else:
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if c.bias_k is not None:
        k = torch.cat([k, c.bias_k.expand(1, k.shape[1], -1)])
        v = torch.cat([v, c.bias_v.expand(1, v.shape[1], -1)])
    q, k, v = (x.reshape(*x.shape[:2], c.num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if c.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = mask_of_multihead(c, batch=query.shape[1], keep=query.shape[1], extra=k.shape[2] - key.shape[0])
    mask = None if mask is None else mask.to(q.dtype)
    dropout = c.dropout_p if c.training else 0.0
    if c.need_weights:
        logits = q @ k.mT * q.shape[-1] ** -0.5
        logits = logits if mask is None else logits + mask
        attention = F.dropout(torch.softmax(logits_under(law, logits), -1), dropout)
        attended = attention @ v
        attention = attention.mean(1) if c.average_attn_weights else attention
    else:  # as torch's own body, which writes no logits out then
        attended, attention = F.scaled_dot_product_attention(**_sdpa(law, q, k, v, mask, dropout)), None
    out = F.linear(attended.permute(2, 0, 1, 3).flatten(2), c.out_proj_weight, c.out_proj_bias)
    if unbatched:
        out, attention = out.squeeze(1), None if attention is None else attention.squeeze(0)
    return out, attention

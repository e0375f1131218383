"""Attention that writes its logits out: ``softmax(logits) @ values`` (Hugging Face eager, timm unfused).

Not every softmax is attention. One counts if it normalises the last axis of a 3-D or 4-D tensor and its
result, possibly after dropout or a cast, is then the left factor of a matrix product: the weights of a mean
over values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.attention.biases import Biases
from lightning_efficient.attention.sdpa import Limits
from lightning_efficient.metrics.functional import AttentionRows, query_indices, rows_from_logits

SOFTMAX: frozenset[Callable[..., Any]] = frozenset(
    {F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax}
)
_PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.einsum}
)
# What may stand between the softmax and the product; none of them moves the keys off the last axis.
_KEEPS_KEYS = frozenset(
    {F.dropout, F.alpha_dropout, torch.dropout, torch.clone, torch.mul, torch.masked_fill, torch.nan_to_num}
    | {torch.reshape, torch.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten}
    | {torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.half}
    | {torch.Tensor.bfloat16, torch.Tensor.double, torch.Tensor.contiguous, torch.Tensor.clone}
    | {torch.Tensor.detach, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.masked_fill}
    | {torch.Tensor.nan_to_num, torch.Tensor.expand}
)

T = TypeVar("T")


def rows_of_softmax(limits: Limits, biases: Biases, *args: Any, **kwargs: Any) -> AttentionRows | None:
    """Attention rows of a softmax call, or ``None`` if its shape or axis rules attention out.

    Args:
        limits: How much of the call is measured.
        biases: What was added to the product of queries and keys: it says which keys are hidden. Where there was no
            product, ``-inf`` and ``finfo.min`` are masks, and any other number is an ordinary logit.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    logits = args[0] if args else kwargs["input"]
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(logits, Tensor) or logits.dim() < 3 or axis not in (-1, logits.dim() - 1):
        return None
    if not logits.is_floating_point() or not logits.numel():
        return None
    index = query_indices(logits.shape[-2], limits.max_queries).to(logits.device)
    bias = biases.of(logits)
    parts = [None if t is None else limits.by_head(t)[:, :, index] for t in (logits, bias)]
    return rows_from_logits(cast(Tensor, parts[0]), bias=parts[1])


class Follower(Generic[T]):
    """Follows softmax results until they are multiplied with values. Holds the tensors weakly."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def start(self, result: Tensor, record: T) -> None:
        """Follow ``result``; ``record`` comes back when it turns out to be attention."""
        self._open = {key: entry for key, entry in self._open.items() if entry[0]() is not None}
        self._open[id(result)] = (weakref.ref(result), record)

    def see(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> T | None:
        """Look at a torch call; return the record that it confirms, if any."""
        if not self._open:
            return None
        if func in _KEEPS_KEYS or func is torch.Tensor.__getitem__:
            record = self._find(args[0] if args else None)
            if record is not None and isinstance(out, Tensor):
                # A slice may only drop keys: an attention sink, which has no value.
                sliced = func is torch.Tensor.__getitem__ and out.shape[:-1] == args[0].shape[:-1]
                if sliced or (func in _KEEPS_KEYS and out.shape[-1:] == args[0].shape[-1:]):
                    self.start(out, record)
        elif func in _PRODUCTS:
            weights = _weights_of_product(func, (*args, *kwargs.values()))
            if (record := self._find(weights)) is not None:
                self._open = {key: e for key, e in self._open.items() if e[1] is not record}
                return record
        return None

    def _find(self, tensor: Any) -> T | None:
        entry = self._open.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None


def _weights_of_product(func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The operand that a product sums over by its last axis, if batch and heads run along beside it."""
    if func is not torch.einsum:
        return args[0] if args else None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return None
    # What "..." stands for is in both terms, or broadcast, and never summed: one letter of its own will do.
    inputs, _, output = args[0].replace(" ", "").replace("...", ".").partition("->")
    terms = inputs.split(",")
    if "." in inputs and not all("." in part for part in (*terms, output)):
        return None
    for term, other, operand in ((*terms, operands[0]), (*reversed(terms), operands[1])):
        # "bhqk,bhkd->bhqd": k is summed, q belongs to this term alone, the rest is shared.
        shared = all(letter in other and letter in output for letter in term[:-2])
        summed = len(term) >= 3 and term[-1] in other and term[-1] not in output
        if summed and shared and term[-2] in output and term[-2] not in other:
            return operand
    return None

"""What is added to the product of queries and keys before a softmax that is written out: masks, position biases.

A key is hidden by a mask or left by its content: from the logits alone the two cannot be told, as -100 may be either.
So beside the product, and whatever is made of it up to the softmax, the same is computed with queries that are zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_efficient.common.nests import mapped, tensors_in

PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm, Tensor.baddbmm}
)
# torch calls between a product and its softmax; what is older is something else.
_LONGEST = 16


class _Entry(NamedTuple):
    of: weakref.ref[Tensor]
    twin: Tensor
    age: int
    summed: int | None


class Biases:
    """Follows products of two activations, and holds for each what it would be if the queries were zero.

    Nothing that runs is changed: no random number is drawn, no tensor but its own written to, no history kept.
    """

    def __init__(self) -> None:
        self._open: dict[int, _Entry] = {}

    def of(self, logits: Tensor) -> Tensor | None:
        """What the logits would be if the queries were zero, of the same shape; None: no product was seen."""
        entry = self._entry(logits)
        return entry.twin if entry is not None and entry.twin.shape == logits.shape else None

    def summed(self, logits: Tensor) -> int | None:
        """The length of the axis that the product summed over: a head's width; None: not known."""
        entry = self._entry(logits)
        return None if entry is None else entry.summed

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Look at a torch call that was made."""
        with torch.no_grad():
            factors = list(tensors_in((args, kwargs)))[-2:]
            if func in PRODUCTS and isinstance(out, Tensor) and _of_activations(factors):
                twin = torch.zeros_like(out) if len(args) < 3 else _without(func, args, kwargs, out)
                self._keep(out, twin, 0, None if func is torch.einsum else factors[0].shape[-1])
            elif self._open:
                self._follow(func, args, dict(kwargs), out)

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        known = [entry for t in tensors_in((args, kwargs)) if (entry := self._entry(t)) is not None]
        age = max((entry.age for entry in known), default=0) + 1
        if not known or age > _LONGEST or not _safe(func, args, kwargs, lambda t: self._entry(t) is not None):
            return
        made = list(tensors_in(out))
        if not made and func is not Tensor.__setitem__:
            return  # a shape, a dtype
        try:
            # What draws random numbers draws them from here.
            with torch.random.fork_rng([out.device] if isinstance(out, Tensor) and out.is_cuda else []):
                twin = func(*mapped(args, self._twin), **mapped(kwargs, self._twin))
        except Exception:  # the user's call went through; that this one does not only means that nothing is known
            return
        for one, other in zip(made, list(tensors_in(twin)), strict=False):
            self._keep(one, other, age, known[0].summed)

    def _twin(self, value: Any) -> Any:
        entry = self._entry(value)
        return value if entry is None else entry.twin

    def _entry(self, value: Any) -> _Entry | None:
        entry = self._open.get(id(value))
        return entry if entry is not None and entry.of() is value else None

    def _keep(self, tensor: Tensor, twin: Tensor, age: int, summed: int | None) -> None:
        self._open = {key: entry for key, entry in self._open.items() if entry.of() is not None}
        self._open[id(tensor)] = _Entry(weakref.ref(tensor), twin, age, summed)


def _of_activations(factors: Sequence[Tensor]) -> bool:
    return len(factors) == 2 and all(t.dim() >= 3 and not isinstance(t, nn.Parameter) for t in factors)


def _without(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Tensor:
    """``baddbmm`` without its product."""
    if func in (torch.einsum, torch.matmul, torch.bmm):
        return torch.zeros_like(out)
    made: Tensor = func(args[0], torch.zeros_like(args[1]), *args[2:], **kwargs)
    return made


def _safe(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], mine: Callable[[Any], bool]
) -> bool:
    """Whether making a call again, on tensors of ours, leaves those of others, and their generators, alone."""
    name = getattr(func, "__name__", "")
    writes = func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__")) or name[:3] == "__i"
    inplace = kwargs.get("inplace", False) or any(a is True for a in args[1:])
    foreign = kwargs.keys() & {"out", "generator"} or name in ("backward", "register_hook", "requires_grad_", "set_")
    return not foreign and (not (writes or inplace) or (bool(args) and mine(args[0])))

"""What is added to the product of queries and keys before a softmax that is written out: masks, position biases.

A key is hidden by a mask or left by its content: from the logits alone the two cannot be told, as -100 may be either.
So beside the product, and whatever is made of it up to the softmax, the same is computed with queries that are zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.nests import mapped, tensors_in

PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm, Tensor.baddbmm}
)
# torch calls between a product and its softmax; what is older is something else.
_LONGEST = 16


class Biases:
    """Follows products of two activations, and holds for each what it would be if the queries were zero.

    Nothing that runs is changed: no random number is drawn, no tensor but its own written to, no history kept.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}

    def of(self, logits: Tensor) -> Tensor | None:
        """What the logits would be if the queries were zero, of the same shape; None: no product was seen."""
        entry = self._open.get(id(logits))
        return entry[1] if entry is not None and entry[0]() is logits and entry[1].shape == logits.shape else None

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Look at a torch call that was made."""
        with torch.no_grad():
            if func in PRODUCTS and isinstance(out, Tensor) and _of_activations(args):
                self._keep(out, torch.zeros_like(out) if len(args) < 3 else _without(func, args, kwargs, out), 0)
            elif self._open:
                self._follow(func, args, dict(kwargs), out)

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        known = [e for t in tensors_in((args, kwargs)) if (e := self._open.get(id(t))) is not None and e[0]() is t]
        age = max((entry[2] for entry in known), default=0) + 1
        if not known or age > _LONGEST or not _safe(func, args, kwargs, self._is_open):
            return
        made = out if isinstance(out, Tensor) else (list(out) if isinstance(out, list | tuple) else [])
        if not len(made) and func is not Tensor.__setitem__:
            return  # a shape, a dtype
        try:
            # What draws random numbers draws them from here.
            with torch.random.fork_rng([out.device] if isinstance(out, Tensor) and out.is_cuda else []):
                twin = func(*mapped(args, self._twin), **mapped(kwargs, self._twin))
        except Exception:  # the user's call went through; that this one does not only means that nothing is known
            return
        for one, other in zip(*(list(tensors_in(x)) for x in (out, twin)), strict=False):
            self._keep(one, other, age)

    def _twin(self, value: Any) -> Any:
        return self._open[id(value)][1] if self._is_open(value) else value

    def _is_open(self, value: Any) -> bool:
        entry = self._open.get(id(value))
        return entry is not None and entry[0]() is value

    def _keep(self, tensor: Tensor, twin: Tensor, age: int) -> None:
        self._open = {key: entry for key, entry in self._open.items() if entry[0]() is not None}
        self._open[id(tensor)] = (weakref.ref(tensor), twin, age)


def _of_activations(args: tuple[Any, ...]) -> bool:
    factors = list(tensors_in(args))[-2:]
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

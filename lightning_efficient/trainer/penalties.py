"""Summands of a loss that are made of weights alone: weight decay, norms of weights that a step logs.

Without some units such a summand is another number, whatever the network computes. It is followed from the weights to
where it is added to something else, and taken off what comes out. Beyond scaling and adding nothing is followed: a
number that does more than join a loss as a summand stays in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_efficient.common.nests import tensors_in

_SAME = frozenset(("clone", "detach", "alias", "_to_copy", "lift_fresh", "view", "squeeze", "mean", "sum"))


class Penalties(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is made of weights alone while a model runs in its context.

    Args:
        weights: Parameters and buffers, as wide as they are now.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alone = {_place(tensor) for tensor in weights}  # where a tensor of weights alone is stored
        self._kept: list[Tensor] = []  # so that no other tensor comes to be stored there
        self._terms: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then note what its result is made of."""
        kwargs = kwargs or {}
        operands = list(tensors_in((args, kwargs)))
        alone = all(self._is_alone(tensor) for tensor in operands)
        out = func(*args, **kwargs)
        results = list(tensors_in(out))
        if alone:
            self._alone |= {_place(tensor) for tensor in results}
            self._kept += results
            return out
        self._alone -= {_place(tensor) for tensor in results}  # written to in place
        if len(results) == 1 and not results[0].ndim:
            name = func.overloadpacket.__name__.removesuffix("_") if func.namespace == "aten" else ""
            if (term := self._term(name, args, kwargs)) is not None:
                self._terms[results[0]] = term
        return out

    def _is_alone(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._alone

    def _part(self, value: Any) -> Any:
        """The summand of a number that is made of weights alone; None: there is none."""
        if not isinstance(value, Tensor):
            return None
        if not value.ndim and self._is_alone(value):
            return value.detach().clone()
        return self._terms.get(value)

    def _term(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of the result of an operation."""
        if name in _SAME or name == "neg":
            term = self._part(args[0])
            return term if term is None or name != "neg" else -term
        if name in ("add", "sub", "rsub"):
            one, two = self._part(args[0]), self._part(args[1])
            if one is None and two is None:
                return None
            one, two = 0.0 if one is None else one, (0.0 if two is None else two) * kwargs.get("alpha", 1)
            return {"add": one + two, "sub": one - two, "rsub": two - one}[name]
        if name in ("mul", "div") and (term := self._part(args[0])) is not None and not isinstance(args[1], Tensor):
            return term * args[1] if name == "mul" else term / args[1]
        return None

    def without(self, value: Any) -> Any:
        """A number less its summand of weights alone; all else as it is.

        Args:
            value: Anything that came out of the run.
        """
        part = self._part(value)
        return value if part is None else value - part


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else -1

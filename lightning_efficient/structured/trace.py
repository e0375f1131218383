"""Following labels of channels through a forward, one torch operation at a time.

Operations that only move elements (views, concatenation, splitting, indexing) are done to the labels, too, so that any
layout is followed. Sums, products, convolutions and reductions have a rule each; whatever else keeps its shape is taken
to work element by element, and what does not fixes the labels that go in. Nothing of this is believed: ``trial.py``
tries what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient.common.nests import tensors_behind, tensors_in
from lightning_efficient.structured.book import Book, Label
from lightning_efficient.structured.rules import Rules

_LINEAR = frozenset(["add", "sub", "mul", "neg", "rsub"])


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels while the model runs in its context.

    Args:
        book: Where they are written down.
    """

    def __init__(self, book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.book = book
        self.stack: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then say what its result is made of."""
        kwargs = kwargs or {}
        operands = list(tensors_in((args, kwargs)))
        before = [self.book.of(t) for t in operands]
        shapes = [t.shape for t in operands]  # `transpose_` changes that of its operand
        out = func(*args, **kwargs)
        self.book.touched |= {self.book.names[t] for t in operands if t in self.book.names}
        name = func.overloadpacket.__name__.removesuffix("_") if func.namespace == "aten" else func.name()
        results = [t for t in tensors_in(out) if not any(t is one for one in operands)] or list(tensors_in(out))
        if not results:  # `.item()`, `equal`: a number that the model's code goes on with
            return out
        try:
            made = Rules(self.book, name, args, kwargs, operands, shapes, before, results, func).made()
        except Exception as error:  # a rule that does not fit a rare overload must not end the whole search
            for label in before:
                for grid in label.grids:
                    self.book.labels.fix(grid, f"{name!r} reads it, which cannot be followed ({type(error).__name__})")
            made = [Label([]) for _ in results]
        pure = all(label.pure for label in before)
        linear = pure and name in _LINEAR and any(label.raw for label in before)
        for tensor, label in zip(results, made, strict=True):
            label.pure, label.raw = pure, label.raw or linear
            self.book.known[tensor] = label
            if func._schema.is_mutable and (whole := tensor._base) is not None:
                self.book.written(tensor, whole)
            if self.stack and not pure and self.stack[-1] in self.book.looked:
                self.book.looked[self.stack[-1]] += label.grids
        return out


def watch(model: nn.Module, trace: Trace, names: Callable[[nn.Module], str]) -> list[Any]:
    """Keep the names of the modules whose forward is running on ``trace.stack``; the hooks are returned.

    A module handles what it is given, what its operations make, and what the modules that it calls give back.
    """

    def handled(values: Any) -> None:
        if trace.stack and trace.stack[-1] in trace.book.looked:
            known = (trace.book.of(tensor) for tensor in tensors_behind(values))
            trace.book.looked[trace.stack[-1]] += [grid for label in known if not label.pure for grid in label.grids]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.stack.append(names(module))
        handled((args, kwargs))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        trace.stack.pop()
        handled(out)

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its forward does not run in Python
            continue
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles

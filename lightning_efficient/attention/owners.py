"""Which module's forward is running, and which modules claim to have attention heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.match import canonical_name

# The attributes in which modules keep their number of heads. What attends is read off what runs, never off these.
HEAD_COUNTS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads")

# What stands for the model itself among the names of modules that attend.
ROOT = "(model)"
_FUSED = {"aten::scaled_dot_product_attention", "aten::_native_multi_head_attention"}
_SOFTMAX = {"aten::softmax", "aten::_softmax"}
_PRODUCTS = {"aten::matmul", "aten::bmm", "aten::einsum", "aten::baddbmm"}


def head_count(module: object) -> int | None:
    """How many attention heads a module says it has; ``None`` if it says nothing.

    Args:
        module: Any object.
    """
    return next((n for name in HEAD_COUNTS if type(n := getattr(module, name, None)) is int and n > 0), None)


class Owners(AbstractContextManager["Owners"]):
    """A stack of the names of the modules whose forward is running, kept by hooks that are removed on exit.

    Args:
        model: Names are relative to it; ``""`` while none of its modules is running.
        transparent: What modules of these types do belongs to the module that called them.
    """

    def __init__(self, model: nn.Module, transparent: tuple[type[nn.Module], ...] = (nn.Softmax,)) -> None:
        self.model = model
        self.transparent = transparent
        self.ran: set[str] = set()
        self.modules: dict[str, nn.Module] = {}
        self._stack: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> str:
        """Name of the innermost running module."""
        return self._stack[-1] if self._stack else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first tensor that the innermost running module was given; empty: none."""
        return self._shapes[-1] if self._shapes else ()

    def __enter__(self) -> Owners:
        for name, module in self.model.named_modules():
            name = canonical_name(name)  # a wrapper and what it wraps share one
            if isinstance(module, (torch.jit.ScriptModule, *self.transparent)):
                continue  # its forward does not run in Python: what happens inside belongs to its caller
            self.modules[name] = module
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            # always_call: a forward that raises must leave the stack, too, as its caller may catch and go on.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the hooks; may be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._shapes.clear()

    def silent(self, sites: Iterable[str]) -> list[str]:
        """Innermost modules that ran and have a number of heads, but are not related to any of ``sites``."""
        sites = set(sites)
        related = [name for name, module in self.modules.items() if name in self.ran and head_count(module)]
        quiet = [name for name in related if not any(_inside(s, name) or _inside(name, s) for s in sites)]
        return [name for name in quiet if not any(other != name and _inside(other, name) for other in quiet)]

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            given = (*args, *kwargs.values())
            self._shapes.append(next((tuple(a.shape) for a in given if isinstance(a, torch.Tensor)), ()))
            self.ran.add(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._stack:
            self._stack.pop()
            self._shapes.pop()


def scripted_attention(model: nn.Module) -> dict[str, str]:
    """Outermost TorchScript modules that seem to attend, and why that cannot be read: no Python runs in them.

    Args:
        model: Names are relative to it; ``"(model)"`` for itself.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or any(_inside(name, n) or n == ROOT for n in found):
            continue
        kinds = {node.kind().removesuffix("_") for node in _nodes(module)}
        if kinds & _FUSED or (kinds & _SOFTMAX and kinds & _PRODUCTS):
            found[canonical_name(name) or ROOT] = (
                "attends in TorchScript, which cannot be read: use the module that it was made from"
            )
    return found


def _nodes(module: torch.jit.ScriptModule) -> Iterator[Any]:
    # Traced and scripted modules have a graph; what has a method of another name instead has none.
    blocks: list[Any] = [module.inlined_graph] if hasattr(module, "inlined_graph") else []
    while blocks:
        for node in blocks.pop().nodes():
            yield node
            blocks.extend(node.blocks())


def _inside(name: str, parent: str) -> bool:
    """Whether ``name`` is ``parent`` or below it; nothing counts as below the root."""
    return name == parent or (parent != "" and name.startswith(parent + "."))

"""How a step calls a network: what went in, what came out, what some of its modules gave on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.nests import tensors_behind


@dataclass
class NetworkCall:
    """One call of a module.

    Args:
        name: Of the module; empty: the root itself.
        args: Copies of its positional arguments, from before the call.
        kwargs: Of the keyword arguments, likewise.
        derived: Whether an argument was computed from what is trained.
        output: What it returned.
        hidden: Name of a module → what it returned inside this call, one item for each of its calls.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    derived: bool
    output: Any = None
    hidden: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether what came out has gradients."""
        return any(tensor.requires_grad for tensor in tensors_behind(self.output))


class Recorder:
    """Hooks that record while it is open, and are idle otherwise (recomputations in the backward are not calls).

    Args:
        root: Names count from here.
        name: Of the module whose calls are recorded. None: of the outermost modules that are called.
        hidden: Names of modules whose outputs are kept, too.
    """

    def __init__(self, root: nn.Module, name: str | None, hidden: Sequence[str] = ()) -> None:
        self._calls: list[NetworkCall] | None = None
        self._open: list[NetworkCall | None] = []
        self._handles: list[RemovableHandle] = []
        modules = dict(root.named_modules())
        for found, module in modules.items() if name is None else [(name, modules[name])]:
            if not isinstance(module, torch.jit.ScriptModule):
                self._hook(module.register_forward_pre_hook, partial(self._enter, found), with_kwargs=True)
                self._hook(module.register_forward_hook, self._leave, always_call=True)
        for found in hidden:
            self._hook(modules[found].register_forward_hook, partial(self._keep, found))

    def _hook(self, register: Callable[..., RemovableHandle], hook: Callable[..., Any], **how: bool) -> None:
        self._handles.append(register(hook, **how))

    def start(self) -> None:
        """Record from here."""
        self._calls, self._open = [], []

    def stop(self) -> list[NetworkCall]:
        """Record no longer; what was recorded."""
        calls, self._calls = self._calls or [], None
        return calls

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._calls is None:
            return
        if any(call is not None for call in self._open):  # inside one that is recorded
            self._open.append(None)
            return
        given = list(tensors_behind((args, dict(kwargs))))
        derived = any(t.requires_grad and not t.is_leaf for t in given)
        fresh = apply_to_collection((args, dict(kwargs)), Tensor, lambda t: t.detach().clone())
        self._open.append(NetworkCall(name, fresh[0], fresh[1], derived))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._calls is not None and self._open and (call := self._open.pop()) is not None:
            call.output = output
            self._calls.append(call)

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        call = next((call for call in self._open if call is not None), None)
        if self._calls is not None and call is not None:
            call.hidden.setdefault(name, []).append(output)


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: it itself, its ``logits``, or the first tensor of a sequence.

    Args:
        output: A tensor, an object or mapping with ``logits``, a tuple or list.

    Raises:
        ValueError: There are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor) and item.is_floating_point():
                return item
    raise ValueError(
        f"a network that is distilled returns {type(output).__name__}; expected a tensor, an object or mapping with "
        "`logits`, or a tuple whose first tensor they are. Name the module that returns them: `student`, and "
        "`teacher_module` for the teacher."
    )

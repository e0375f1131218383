"""Watches one forward: where the outputs of chosen modules go, and what is done to every weight."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.nests import tensors_behind, tensors_in
from lightning_efficient.common.running import evaluating
from lightning_efficient.folding.readers import Contraction, contractions
from lightning_efficient.folding.tags import (
    Axis,
    Function,
    Space,
    Tag,
    along,
    asks,
    constant_along_others,
    label,
)

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__"})


@dataclass(frozen=True)
class Slot:
    """Where a parameter is registered."""

    module: str
    owner: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """Dotted name of the parameter."""
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class Call:
    """One call with a weight: ``channels[i]`` are the numbers that block ``i`` reads, None if it reads others."""

    contraction: Contraction
    channels: tuple[Tensor | None, ...]
    norms: frozenset[str]


@dataclass(frozen=True)
class Feed:
    """A norm's input in one call: all of it rows of one weight; the norm's channel of every row, -1 for none."""

    weight: int
    channels: Tensor


class Tracker(TorchFunctionMode):
    """Context manager around one forward; afterwards its attributes say what was seen.

    Args:
        model: Names are relative to it.
        axes: Module name -> channel axis of its output; operations inside these modules are not looked at. Empty:
            only ``fingerprints`` is filled.

    Raises:
        ValueError: A name is not in the model (when entered).
    """

    def __init__(self, model: nn.Module, axes: Mapping[str, Axis]) -> None:
        super().__init__()
        self.model, self.axes = model, {canonical_name(name): axis for name, axis in axes.items()}
        self.channels: Space[str] = Space()  # of the chosen modules' outputs
        self.rows: Space[int] = Space()  # of the weights' products
        self.slots: dict[int, list[Slot]] = defaultdict(list)
        self.calls: dict[int, list[Call]] = defaultdict(list)
        self.blocked: dict[str, str] = {}
        self.uses: dict[int, str] = {}  # what else a parameter is used for
        self.leaks: dict[int, list[Tensor]] = defaultdict(list)  # numbers of rows that something else reads
        self.feeds: dict[str, list[Feed | None]] = defaultdict(list)
        # Of every product, "<weight>#<call>", and its inputs, "... input <i>".
        self.fingerprints: dict[str, Tensor] = {}
        self.storages: Counter[int] = Counter()
        self._stack: list[str] = []
        self._paused = 0
        self._visits: Counter[int] = Counter()
        self._handles: list[RemovableHandle] = []
        self._exits = ExitStack()

    def __enter__(self) -> Tracker:
        modules = modules_by_name(self.model)
        if missing := [name for name in self.axes if name not in modules]:
            raise ValueError(f"The model has no module {missing[0]!r}; expected names as in `model.named_modules()`.")
        targets = {modules[name]: name for name in self.axes}
        for name, module in modules.items():
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if all((s.owner, s.attribute) != (module, attribute) for s in self.slots[id(parameter)]):
                    self.slots[id(parameter)].append(Slot(name, module, attribute))
        plain = [p for p in self.model.parameters() if type(p) is nn.Parameter]
        self.storages.update(p.untyped_storage().data_ptr() for p in plain)
        first_names = {module: name for name, module in reversed(modules.items())}
        for module, name in first_names.items() if self.axes else ():
            if not isinstance(module, torch.jit.ScriptModule):  # its forward does not run in Python
                self._watch_module(module, name, targets.get(module))
        self._exits.enter_context(uncompiled())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._exits.close()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call as it is, then look at what it did."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused:
            self._see(func, args, kwargs, out)
        return out

    def leaked(self, weight: int) -> set[int]:
        """Rows of a weight's product that something else than a norm reads."""
        return {row for ids in self.leaks[weight] for row in set(self.rows.local(weight, ids).flatten().tolist())}

    def finish(self, result: Any) -> None:
        """Say what the forward returned; call it once, at the end."""
        if not self.axes:
            return
        self._returns(result, "returned by the model")
        for name, module in modules_by_name(self.model).items():
            for attribute, value in vars(module).items():
                if isinstance(value, Tensor | list | tuple | dict):
                    self._returns(list(tensors_in(value)), f"kept in {attribute!r} of {self.place(name)}")

    def _returns(self, result: Any, how: str) -> None:
        for tensor in tensors_behind(result):
            self._lose(self.channels.of(tensor), self.rows.of(tensor), how)

    def place(self, name: str | None = None) -> str:
        """A module for people; the innermost running one if none is named."""
        name = (self._stack[-1] if self._stack else "") if name is None else name
        return repr(name) if name else "the model"

    def _watch_module(self, module: nn.Module, name: str, target: str | None) -> None:
        if target is not None and module._forward_hooks:
            self.blocked[target] = "a forward hook reads its output"

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if target is not None:
                self._paused += 1
                self._norm_reads(target, next(tensors_in((args, kwargs)), None))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if self._stack:
                self._stack.pop()
            if target is not None:
                self._norm_returns(target, out)
                self._paused -= 1
            if module is self.model:
                self._returns(out, "returned by the model")

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        # always_call: a forward that raises must leave the stack, too, as its caller may catch and go on.
        self._handles.append(module.register_forward_hook(leave, prepend=True, always_call=True))

    def _norm_reads(self, name: str, value: Tensor | None) -> None:
        if value is None or self._paused > 1:
            return
        self._lose(self.channels.of(value), None, f"feeds the norm {name!r}")
        rows = self.rows.of(value)
        feed = self._feed(rows, self._axis(name))
        self.feeds[name].append(feed)
        if feed is None:
            self._lose(None, rows, "")

    def _feed(self, tag: Tag | None, axis: int) -> Feed | None:
        keys = self.rows.keys(tag) if tag is not None else frozenset()
        if tag is None or len(keys) != 1 or bool((tag.ids == 0).any()):
            return None
        (weight,) = keys
        rows = self.rows.local(weight, tag.ids).flatten()
        wanted = along(torch.arange(tag.ids.shape[axis]), tag.ids, axis).flatten()
        channels = torch.full((self.rows.size(weight),), -1)
        channels[rows] = wanted
        return Feed(weight, channels) if torch.equal(channels[rows], wanted) else None

    def _norm_returns(self, name: str, out: Any) -> None:
        if self._paused > 1:
            return
        if not isinstance(out, Tensor):
            self.blocked.setdefault(name, "its output is not one tensor")
        else:
            self.channels.mark(name, out, self._axis(name))

    def _axis(self, name: str) -> int:
        axis = self.axes[name]
        return -1 if axis == "last" else axis

    def _see(self, function: Function, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        found = contractions(function, args, kwargs)
        if not self.axes:
            for contraction in found:
                self._print(contraction, out)
            return
        self._note_uses(function, args, kwargs, out, found)
        if not found:
            kind = "the residual addition" if label(function) in _ADDITIONS else f"`{label(function)}`"
            for tag in self.channels.follow(function, args, kwargs, out):
                self._lose(tag, None, f"also feeds {kind} in {self.place()}")
            for tag in self.rows.follow(function, args, kwargs, out):
                self._lose(None, tag, "")
            return
        for contraction in found:
            self._read(contraction, out)
        sources = {id(block.source) for contraction in found for block in contraction.blocks}
        for tensor in tensors_in((args, kwargs)):
            other = None if id(tensor) in sources else self.channels.of(tensor)
            self._lose(other, self.rows.of(tensor), f"also feeds `{label(function)}` in {self.place()}")
        for contraction in found:
            if contraction.out_axis is not None and id(contraction.weight) in self.slots:
                self.rows.mark(id(contraction.weight), out, contraction.out_axis)

    def _note_uses(self, function: Function, args: Any, kwargs: Any, out: Any, found: list[Contraction]) -> None:
        if asks(function):
            return
        claimed = {id(t) for contraction in found for t in (contraction.weight, contraction.bias)}
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self.slots and id(tensor) not in claimed and out is not tensor:
                self.uses.setdefault(id(tensor), f"`{label(function)}` in {self.place()}")

    def _read(self, contraction: Contraction, out: Any) -> None:
        weight, bias = id(contraction.weight), contraction.bias
        tags = [self.channels.of(block.source) for block in contraction.blocks]
        reader = self.place(self.slots[weight][0].module) if weight in self.slots else self.place()
        for what, tensor in (("weight", contraction.weight), ("bias", bias)):
            if tensor is not None and id(tensor) not in self.slots:
                for tag in tags:
                    self._lose(tag, None, f"{reader} reads it with a {what} computed in the forward, not a parameter")
        if weight not in self.slots:
            return
        numbers = []
        for block, tag in zip(contraction.blocks, tags, strict=True):
            read = constant_along_others(tag.ids, block.axis) if tag is not None else None
            if tag is not None and read is None:
                self._lose(tag, None, _misfit(tag, block.axis, reader))
            numbers.append(read)
        norms = frozenset(name for tag in tags if tag is not None for name in self.channels.keys(tag))
        self.calls[weight].append(Call(contraction, tuple(numbers), norms))
        self._print(contraction, out)

    def _print(self, contraction: Contraction, out: Any) -> None:
        weight = id(contraction.weight)
        if weight not in self.slots:
            return
        self._visits[weight] += 1
        visit = f"{self.slots[weight][0].name}#{self._visits[weight]}"
        self.fingerprints[visit] = _fingerprint(next(tensors_in(out)))
        for index, source in enumerate({id(block.source): block.source for block in contraction.blocks}.values()):
            self.fingerprints[f"{visit} input {index}"] = _fingerprint(source)

    def _lose(self, channels: Tag | None, rows: Tag | None, reason: str) -> None:
        """Something else than a weight reads these channels, something else than a norm reads these rows."""
        if channels is not None:
            for name in self.channels.keys(channels):
                self.blocked.setdefault(name, reason)
        if rows is not None:
            for weight in rows.keys:
                self.leaks[weight].append(rows.ids)


def watch(model: nn.Module, axes: Mapping[str, Axis], call: Callable[[], Any]) -> tuple[Tracker, Any]:
    """Run ``call`` once in evaluation mode under a ``Tracker``; the tracker and what the call returned."""
    with evaluating(model, randomness=False):  # two runs show whether it draws
        with Tracker(model, axes) as tracker:
            result = call()
        tracker.finish(result)
    return tracker, result


def _misfit(tag: Tag, axis: int, reader: str) -> str:
    rows = tag.ids.movedim(axis, -1).reshape(-1, tag.ids.shape[axis])
    if rows.shape[1] > 1 and bool((rows == rows[:, :1]).all()):
        return f"{reader} mixes tokens, not channels"
    if "pad" in tag.via:
        return f"padded by F.pad before {reader}"
    if tag.via:
        return f"joined with other tensors by {', '.join(sorted(tag.via))} before {reader}"
    return f"{reader} reads another channel at every position"


def _fingerprint(tensor: Tensor) -> Tensor:
    """A fixed pseudo-random projection and the norm: a difference anywhere shows, and it fits in 16 bytes."""
    flat = tensor.detach().double().flatten()
    steps = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    return torch.stack([torch.frac(steps.mul_(math.sqrt(2))).sub_(0.5) @ flat, flat.norm()]).cpu()

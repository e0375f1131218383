"""Finding the feed-forward part of a network's blocks, by what happens when its output is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.match import canonical_name, select_modules
from lightning_efficient.common.nests import outputs_in
from lightning_efficient.common.running import Call, evaluating

_TOLERANCE = 1e-3  # of a token alone against the token among others, relative to the largest: float32, other kernels


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one pre-norm block, ``y = x + ffn(norm(x))``.

    Args:
        name: Of the block.
        block: Returns ``y``.
        reader: Its first input is ``x``: the norm, as a rule.
        gates: Modules between the two that work on each token alone, and hold the weights of the feed-forward part.
    """

    name: str
    block: nn.Module
    reader: nn.Module
    gates: tuple[nn.Module, ...]


@dataclass
class _Seen:
    module: nn.Module
    given: Tensor
    returned: Tensor | None
    more: bool
    calls: int = 1


class _Run:
    """One run of a model: what every module inside of some blocks got and returned, in the order of the calls."""

    def __init__(self, model: nn.Module, call: Call, blocks: Mapping[str, nn.Module], zero: str | None = None) -> None:
        self.seen: dict[str, dict[str, _Seen]] = {name: {} for name in blocks}
        self.outputs: dict[str, Tensor] = {}
        handles = []
        for name, block in blocks.items():
            handles.append(block.register_forward_hook(partial(self._leave_block, name)))
            for inner, module in block.named_modules():
                if inner:
                    handles.append(
                        module.register_forward_pre_hook(partial(self._enter, name, inner), with_kwargs=True)
                    )
                    handles.append(module.register_forward_hook(partial(self._leave, name, inner, inner == zero)))
        try:
            with evaluating(model):
                call.run(model)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, block: str, inner: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        found = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if not found:
            return
        if inner in self.seen[block]:
            self.seen[block][inner].calls += 1
        else:
            self.seen[block][inner] = _Seen(module, found[0].detach().clone(), None, len(found) > 1)

    def _leave(self, block: str, inner: str, zero: bool, module: nn.Module, args: Any, output: Any) -> Any:
        if inner in self.seen[block] and isinstance(output, Tensor):
            self.seen[block][inner].returned = output.detach()
        return torch.zeros_like(output) if zero and isinstance(output, Tensor) else None

    def _leave_block(self, block: str, module: nn.Module, args: Any, output: Any) -> None:
        first = next(iter(outputs_in(output)), None)
        if first is not None:
            self.outputs[block] = first.detach().clone()


def find_feed_forwards(
    model: nn.Module, call: Call, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[FeedForward]:
    """The feed-forward parts of the blocks that follow each other in a list of equal ones.

    A part is one whose output can be made zero, whereupon each block returns what a module before it was given; which
    is so in pre-norm blocks, whoever wrote them, and in no others. It has to work on each token alone.

    Args:
        model: Runs on ``call``.
        call: On at least two samples or tokens.
        include: Globs over names of blocks. ``None``: all.
        exclude: Globs over names of blocks.

    Returns:
        In the order in which they run.

    Raises:
        ValueError: There is none, or there are several lists of blocks.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    stacks: dict[str, dict[str, nn.Module]] = {}
    for name, container in lists.items():
        children = {f"{name}.{key}" if name else key: child for key, child in container.named_children()}
        if len(children) > 1 and len({type(child) for child in children.values()}) == 1:
            stacks[name] = children
    chosen = _chosen(model, stacks, include, exclude)
    found = {name: parts for name, blocks in chosen.items() if (parts := _parts(model, call, blocks))}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks `x + ffn(norm(x))` whose feed-forward part can be left out: blocks "
            f"that follow each other were looked for in {list(chosen) or 'no list'}. Post-norm and parallel blocks, "
            "and parts that mix tokens, cannot be skipped by this rule."
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has several lists of blocks, {list(found)}: name one by `include`, such as "
            f"include=['{next(iter(found))}']."
        )
    return next(iter(found.values()))


def _chosen(
    model: nn.Module,
    stacks: dict[str, dict[str, nn.Module]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, dict[str, nn.Module]]:
    if include is None and exclude is None:
        return stacks
    types = tuple({type(block) for blocks in stacks.values() for block in blocks.values()})
    picked = select_modules(
        model, types=types, include=None if include is None else list(include),
        exclude=None if exclude is None else list(exclude), method="ffn_skip_",
    ).matched  # fmt: skip
    ids = {id(module) for module in picked.values()}
    kept = {name: {key: block for key, block in blocks.items() if id(block) in ids} for name, blocks in stacks.items()}
    return {name: blocks for name, blocks in kept.items() if len(blocks) > 1}


def _parts(model: nn.Module, call: Call, blocks: dict[str, nn.Module]) -> list[FeedForward]:
    whole = _Run(model, call, blocks)
    if any(name not in whole.outputs or not whole.seen[name] for name in blocks):
        return []
    first = next(iter(blocks))
    # Modules that return something of the block's own size, once: the larger ones hold the smaller ones.
    names = [
        inner
        for inner, seen in whole.seen[first].items()
        if seen.calls == 1 and seen.returned is not None and seen.returned.numel() == whole.outputs[first].numel()
        and any(True for _ in seen.module.parameters())
    ]  # fmt: skip
    names.sort(key=lambda inner: -sum(p.numel() for p in whole.seen[first][inner].module.parameters()))
    for inner in names:
        zeroed = _Run(model, call, blocks, zero=inner)
        parts = [_part(name, block, inner, whole, zeroed) for name, block in blocks.items()]
        if all(parts):
            order = list(whole.outputs)
            return sorted((part for part in parts if part), key=lambda part: order.index(part.name))
    return []


def _part(name: str, block: nn.Module, inner: str, whole: _Run, zeroed: _Run) -> FeedForward | None:
    """The part that ends in ``inner``, if the block without it returns what a module before it was given."""
    seen, y = zeroed.seen[name], zeroed.outputs.get(name)
    if inner not in seen or y is None or not bool(y.isfinite().all()) or torch.equal(y, whole.outputs[name]):
        return None
    order = list(seen)
    last = order.index(inner)
    reader = next((n for n in order[: last + 1] if _same(seen[n].given, y)), None)
    if reader is None:
        return None
    start = order.index(reader)
    outer: list[str] = []
    for n in order[start : last + 1]:
        inside = any(n.startswith(f"{other}.") for other in outer) or inner.startswith(f"{n}.")
        if n != reader and not inside and any(True for _ in seen[n].module.parameters()):
            outer.append(n)
    if inner == reader or not outer or any(whole.seen[name][n].calls > 1 for n in outer):
        return None
    if not all(_tokenwise(whole.seen[name][n]) for n in outer):
        return None
    return FeedForward(canonical_name(name), block, seen[reader].module, tuple(seen[n].module for n in outer))


def _same(one: Tensor, two: Tensor) -> bool:
    """Equal, but for how the tokens are laid out (windows, rows of an image)."""
    return one.shape[-1:] == two.shape[-1:] and torch.equal(one.flatten(), two.flatten())


def _tokenwise(seen: _Seen) -> bool:
    """Whether a module gives some of the tokens what it gives them among all."""
    x, whole = seen.given, seen.returned
    if seen.more or whole is None or whole.shape[:-1] != x.shape[:-1] or x[..., 0].numel() < 2:
        return False
    pick = torch.arange(x[..., 0].numel(), device=x.device).flip(0)[::2]
    with torch.no_grad():
        try:
            some, none = (seen.module(x.flatten(0, -2)[rows][None]) for rows in (pick, pick[:0]))
        except (RuntimeError, ValueError, TypeError, IndexError):  # it wants the tokens as they were
            return False
    expected = whole.flatten(0, -2)[pick]
    return (
        some.shape[1:] == expected.shape
        and none.shape == (1, 0, expected.shape[-1])
        and bool((some[0] - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    )

"""Sums over the processes that hold parts of a weight, for all weights at once.

What a transform needs to know of a weight that is cut over processes is always a sum: of inner products, of products of
a matrix with a vector. A method that needs some is a generator: it yields ``(process groups, tensors)`` and is sent the
sums. :func:`run` drives those of all weights in lockstep, so that a round costs one all-reduce for each set of groups,
however many weights there are. Where nothing is cut, nothing is called.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import wraps
from types import GeneratorType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.weightspace.layout import Groups, Layout

T = TypeVar("T")
P = ParamSpec("P")
Sums: TypeAlias = Generator[tuple[Groups, list[Tensor]], list[Tensor], T]


class _Laid(Protocol):
    @property
    def layout(self) -> Layout:
        """How the weight is cut."""


L = TypeVar("L", bound=_Laid)


def summed(method: Callable[Concatenate[L, P], Sums[T]]) -> Callable[Concatenate[L, P], Any]:
    """A method that asks for sums: of a weight that is cut it returns the generator, for :func:`run`; else it runs.

    Args:
        method: Of an object with a ``layout``; a generator.
    """

    @wraps(method)
    def call(self: L, *args: P.args, **kwargs: P.kwargs) -> Any:
        made = method(self, *args, **kwargs)
        if self.layout.groups:
            return made
        try:  # nothing is to be summed: every answer is what was asked with
            _, tensors = next(made)
            while True:
                _, tensors = made.send(tensors)
        except StopIteration as stop:
            return stop.value

    return cast(Callable[Concatenate[L, P], Any], call)


def steps(made: Any) -> Sums[Any]:
    """What a method returned that may ask for sums, to ``yield from``; the value is the method's."""
    return (yield from made) if isinstance(made, GeneratorType) else made


def total(layout: Layout, value: Tensor) -> Sums[Tensor]:
    """The sum of a value over all parts of a weight."""
    (found,) = yield layout.everyone, [value]
    return found


def run(made: Iterable[Any]) -> list[Any]:
    """Drive everything to its end, all in lockstep.

    Args:
        made: What methods have returned that may ask for sums. All processes give the same ones, in the same order.

    Returns:
        Their values.
    """
    results: list[Any] = list(made)
    generators = {i: one for i, one in enumerate(results) if isinstance(one, GeneratorType)}
    waiting: dict[int, list[Tensor] | None] = dict.fromkeys(generators)
    while waiting:
        asked: dict[int, tuple[Groups, list[Tensor]]] = {}
        for i, reply in waiting.items():
            try:
                asked[i] = generators[i].send(reply)
            except StopIteration as stop:
                results[i] = stop.value
        waiting = _sum(asked)
    return results


def _sum(asked: dict[int, tuple[Groups, list[Tensor]]]) -> dict[int, list[Tensor] | None]:
    """One round: what is asked of the same groups travels together."""
    buckets: dict[Any, list[tuple[int, int]]] = {}
    for i, (groups, tensors) in asked.items():
        for j, tensor in enumerate(tensors):
            buckets.setdefault((groups, tensor.dtype, tensor.device), []).append((i, j))
    replies = {i: list(tensors) for i, (_, tensors) in asked.items()}
    for (groups, _, _), places in buckets.items():
        if not groups:
            continue
        parts = [replies[i][j] for i, j in places]
        together = torch.cat([part.reshape(-1) for part in parts])
        for group in groups:
            dist.all_reduce(together, group=group)
        for (i, j), part, total in zip(
            places, parts, torch.split(together, [part.numel() for part in parts]), strict=True
        ):
            replies[i][j] = total.view(part.shape)
    return dict(replies)

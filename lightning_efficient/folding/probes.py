"""Running a model in float64 at several inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.common.nests import mapped, tensors_behind, tensors_in
from lightning_efficient.common.running import Float64, _double, evaluating
from lightning_efficient.folding.tags import Axis
from lightning_efficient.folding.tracking import Tracker, watch


@dataclass(frozen=True)
class Probe:
    """One set of inputs.

    Args:
        label: For people.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module, axes: Mapping[str, Axis]) -> tuple[Tracker, dict[str, Tensor]]:
        """A float64 forward of a float64 model under a ``Tracker``.

        Returns:
            The tracker, and what was computed: the model's outputs and the fingerprint of every product with a
            weight.
        """
        args, kwargs = mapped((self.args, self.kwargs), _double)
        with Float64():
            tracker, result = watch(model, axes, lambda: model(*args, **kwargs))
        outputs = {f"output {i}": tensor.detach().clone() for i, tensor in enumerate(tensors_behind(result))}
        return tracker, outputs | tracker.fingerprints


def capture(model: nn.Module, call: Callable[[], Any]) -> Probe:
    """Run ``call`` once in evaluation mode, and keep the arguments the model was given first.

    Raises:
        ValueError: ``call`` did not call the model, or not with tensors.
    """
    return captured(model, call)[0]


def captured(model: nn.Module, call: Callable[[], Any]) -> list[Probe]:
    """Run ``call`` once in evaluation mode, and keep the arguments of the ways in which it calls the model.

    The first call is one way, and each later one of tensors and plain values alone that differs in more than the
    tensors' sizes and values.

    Raises:
        ValueError: ``call`` did not call the model, or not with tensors.
    """
    seen: dict[str, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        plain = True

        def looks(value: Any) -> Any:
            nonlocal plain
            plain &= isinstance(value, Tensor | bool | int | float | str | None)
            return (value.ndim, value.dtype) if isinstance(value, Tensor) else value

        way = repr(mapped((args, dict(kwargs)), looks))
        if not seen or plain:
            fresh = mapped((args, dict(kwargs)), lambda v: v.detach().clone() if isinstance(v, Tensor) else v)
            seen.setdefault(way, fresh)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with evaluating(model):
            call()
    finally:
        handle.remove()
    ways = [way for way in seen.values() if next(tensors_in(way), None) is not None]
    if not ways:
        raise ValueError("`call` did not call the model with a tensor; expected something like `lambda: model(x)`.")
    return [Probe("the given input", *way) for way in ways]


def others(probe: Probe) -> Iterator[tuple[str, Probe]]:
    """Other inputs the model may accept: (what is tried, inputs). Each kind shows another dynamic of a forward.

    Another batch size with other values; another image size, one a multiple of 32 and one odd; a shorter sequence.
    """
    first = next(t for t in tensors_in((probe.args, probe.kwargs)) if t.dim() > 0)
    batch = first.shape[0]

    def changed(kind: str, change: Callable[[Tensor], Tensor]) -> tuple[str, Probe]:
        def leaf(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return kind, Probe(kind, mapped(probe.args, leaf), mapped(probe.kwargs, leaf))

    def more(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == batch:
            tensor = torch.cat([tensor, tensor[:1]])
        return tensor.roll(1, -1) if tensor.dim() and tensor.is_floating_point() else tensor

    yield changed(f"first axis {batch + 1}", more)
    if first.dim() == 4 and first.is_floating_point():
        height, width = first.shape[2:]
        for size in ((height + 32, width + 32), (height + 9, width + 5)):
            yield changed(f"image size {size[0]} x {size[1]}", partial(_resized, like=first, size=size))
    elif first.dim() in (2, 3) and first.shape[1] > 2:
        length = first.shape[1]
        yield changed(f"second axis {length - 1}", partial(_shorter, length=length))


def is_output(name: str) -> bool:
    """Whether a name of ``Probe.run`` is one of the model's outputs, not something inside it."""
    return "#" not in name


def _resized(tensor: Tensor, like: Tensor, size: tuple[int, int]) -> Tensor:
    if tensor.dim() != 4 or tensor.shape[2:] != like.shape[2:] or not tensor.is_floating_point():
        return tensor
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)


def _shorter(tensor: Tensor, length: int) -> Tensor:
    return tensor[:, :-1] if tensor.dim() > 1 and tensor.shape[1] == length else tensor

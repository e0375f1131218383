"""A copy of a model to try things on, the inputs that it is tried on, and what runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.attention.sites import as_probe, perturbed, run_float64
from lightning_efficient.common.nests import mapped, tensors_in
from lightning_efficient.common.running import float64_copy, forget
from lightning_efficient.folding.probes import Probe, captured
from lightning_efficient.structured.cuts import tensors_by_name

METHOD = "structured pruning"
# Images are tried at this size, where a model takes it: 32 halvings and more still leave something.
_PIXELS = 64
# The label of a probe that holds the arguments of several calls.
_SEVERAL = "several calls"
Run = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Twin:
    """A perturbed copy of a model.

    Args:
        model: The copy, in float64 where all of it can.
        run: Gives what runs it on inputs.
        tolerance: How exactly it computes.
        small: Inputs: few.
        two: Two samples.
    """

    model: nn.Module
    run: Callable[[Probe], Run]
    tolerance: float
    small: Probe
    two: Probe

    @classmethod
    def of(cls, model: nn.Module, probe: Probe) -> Twin:
        """A copy.

        Args:
            model: Not touched.
            probe: The example.

        Raises:
            ValueError: The model cannot be copied or run.
        """
        try:
            # A weight that a hook recomputes is no leaf, which `deepcopy` refuses.
            held = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
            loose = {id(v): v.detach().clone() for v in held if v.grad_fn}
            own = copy.deepcopy(model, loose) if loose else model
            twin = perturbed(float64_copy(own))
        except Exception as why:
            raise ValueError(f"{METHOD}: {type(model).__name__} cannot be copied to be tried on: {why}") from why

        def run(probe: Probe) -> Run:
            return lambda: [run_float64(twin, way) for way in _ways(probe)]

        try:
            return cls(twin, run, 1e-9, *_smallest(probe, run))
        except ValueError as why:
            low = perturbed(copy.deepcopy(own).eval())
            try:
                return cls(low, _plain(low), 1e-4, *_smallest(probe, _plain(low)))
            except Exception:
                raise ValueError(f"{METHOD}: {why}") from why

    def lowered(self, model: nn.Module) -> Run:
        """Turn the copy into one of the model's own precision.

        Args:
            model: The model.

        Returns:
            What runs it.
        """
        own = tensors_by_name(model)
        for name, tensor in tensors_by_name(self.model).items():
            tensor.data = tensor.data.to(own[name].dtype)
        forget(self.model)
        return _plain(self.model)(self.small)


def _plain(model: nn.Module) -> Callable[[Probe], Run]:
    """A run in the model's own precision."""

    def fresh(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    def once(probe: Probe) -> Any:
        return model(*mapped(probe.args, fresh), **mapped(probe.kwargs, fresh))

    return lambda probe: lambda: [once(way) for way in _ways(probe)]


def all_ways(model: nn.Module, example: Any) -> Probe:
    """An example as one probe; of a function, all the ways in which it calls the model.

    Args:
        model: The model.
        example: See :func:`~lightning_efficient.attention.sites.as_probe`.

    Raises:
        ValueError: The function did not call the model, or not with tensors.
    """
    if not callable(example):
        return as_probe(model, example)
    ways = captured(model, example)
    return ways[0] if len(ways) == 1 else Probe(_SEVERAL, tuple((way.args, way.kwargs) for way in ways), {})


def _ways(probe: Probe) -> list[Probe]:
    """The calls that a probe stands for."""
    return [Probe("", *way) for way in probe.args] if probe.label == _SEVERAL else [probe]


def _small(probe: Probe, samples: int) -> Probe:
    """The first samples of the example, where its tensors share a first axis."""
    sizes = {t.shape[:1] for t in tensors_in((probe.args, probe.kwargs))}
    if len(sizes) != 1 or (size := next(iter(sizes))) == () or size[0] <= samples:
        return probe

    def few(value: Any) -> Any:
        return value[:samples] if isinstance(value, Tensor) else value

    return Probe(probe.label, mapped(probe.args, few), mapped(probe.kwargs, few))


def _smallest(probe: Probe, run: Callable[[Probe], Run]) -> tuple[Probe, Probe]:
    """Inputs that a model runs on: the fewest that say enough, and two samples.

    Two samples; of large images one, and smaller if the model takes them: a trial is a dozen forwards.
    """
    small, two = (_small(probe, samples) for samples in (1, 2))
    images = [t for t in tensors_in((probe.args, probe.kwargs)) if t.ndim == 4 and t.is_floating_point()]
    with torch.no_grad():
        if not images or max(t.shape[2:].numel() for t in images) <= _PIXELS**2:
            run(two)()
            return two, two
        shape = images[0].shape[2:]

        def resized(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape[2:] != shape or not value.is_floating_point():
                return value
            return nn.functional.interpolate(value, size=(_PIXELS, _PIXELS), mode="nearest")

        def smaller(probe: Probe) -> Probe:
            return Probe(probe.label, mapped(probe.args, resized), mapped(probe.kwargs, resized))

        try:
            run(smaller(small))()
        except Exception:  # its size is fixed
            run(small)()
            return small, two
        return smaller(small), smaller(two)

"""What moves in a model when parts of its inputs are exchanged: random projections of the outputs of all modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import tensors_in
from lightning_efficient.common.running import as_found
from lightning_efficient.norms.blend import blend_norms


class Key(NamedTuple):
    """One tensor of one call of a module."""

    module: str
    call: int
    output: int


Sketch = tuple[Tensor, ...]
"""What is kept of a tensor: for each axis a vector, in which an entry changes when something at that index does."""

Moved = dict[Key, tuple[Tensor, ...] | None]
"""Outputs that changed -> for each axis, where (bool, on the CPU); None: by so little that it may be rounding."""


class Watch:
    """Runs a model with hooks on all its modules but the insides of norms.

    Args:
        model: The model.
        run: Runs it.
    """

    def __init__(self, model: nn.Module, run: Callable[[Any], object]) -> None:
        self._model, self._run, self._seen = model, run, dict[Key, Sketch]()
        self._calls: Counter[str] = Counter()
        self._weights: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        inside = {m for norm in blend_norms(model).values() for m in norm.modules() if m is not norm}
        self._handles = [
            module.register_forward_hook(self._hook(canonical_name(name)))
            for name, module in model.named_modules()
            if module is not model and module not in inside and not isinstance(module, torch.jit.ScriptModule)
        ]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def outputs(self, inputs: Any) -> dict[Key, Sketch]:
        """Sketches of all outputs, in the order in which they were made; the inputs stay as they are."""
        self._seen, self._calls = {}, Counter()
        with as_found(self._model):  # the same random numbers and the same memory each time
            self._run(apply_to_collection(inputs, Tensor, torch.clone))
        return self._seen

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._calls[name] += 1
            for index, tensor in enumerate(tensors_in(out)):
                if tensor.dim() and tensor.numel() and not tensor.is_nested:
                    if tensor.shape not in self._weights:
                        self._weights[tensor.shape] = _weights(tensor.shape)
                    self._seen[Key(name, self._calls[name], index)] = _sketch(tensor, self._weights[tensor.shape])

        return hook


def _weights(shape: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each axis a random vector, and the product of those of all axes before it."""
    generator, before, found = torch.Generator().manual_seed(0), torch.ones(1), []
    for size in shape:
        weight = torch.randn(size, generator=generator)
        found.append((weight, before))
        before = torch.outer(before, weight).flatten()
    return found


def _sketch(tensor: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> Sketch:
    """Random projections onto each axis. An entry stays, up to the rounding of sums, if nothing at its index moved.

    Args:
        tensor: Read twice, however many axes it has.
        weights: Of its shape.
    """
    x = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    parts = [x]  # the last axes are gone, one more each
    for weight, _ in reversed(weights[1:]):
        parts.append(parts[-1] @ weight.to(x))
    axes = [
        before.to(x) @ part.reshape(len(before), -1) for part, (_, before) in zip(reversed(parts), weights, strict=True)
    ]
    if not all(torch.isfinite(axis).all() for axis in axes) and not torch.isfinite(x).all():
        return _sketch(torch.nan_to_num(x), weights)
    return tuple(axes)


def _moved(base: Mapping[Key, Sketch], other: Mapping[Key, Sketch]) -> Moved:
    """Where outputs differ, by more than the rounding of an FFT or of a sum in another order."""
    moved: Moved = {}
    for key, before in base.items():
        after = other.get(key, ())
        if [len(vector) for vector in after] != [len(vector) for vector in before]:
            continue
        changes = [(new - old).abs() for old, new in zip(before, after, strict=True)]
        rounding = [16 * torch.finfo(old.dtype).eps * old.abs().max() for old in before]
        axes = tuple((c > r).cpu() for c, r in zip(changes, rounding, strict=True))
        if any(axis.any() for axis in axes):
            clear = all(c.max() > 30 * r for c, r in zip(changes, rounding, strict=True))
            moved[key] = axes if clear else None
    return moved


class Base:
    """What comes out of the inputs as they are, and what of it does not come out again.

    Args:
        watch: Runs the model.
        inputs: All inputs.
    """

    def __init__(self, watch: Watch, inputs: Any) -> None:
        self.watch, self.inputs, self.outputs = watch, inputs, watch.outputs(inputs)
        # Output -> for each axis, where it has moved by anything.
        self.heard: dict[Key, list[Tensor]] = {}
        # Output -> for each axis, where it has moved whatever was compared: that may be noise.
        self._restless = {key: [torch.ones(len(v), dtype=torch.bool) for v in s] for key, s in self.outputs.items()}

    def moved(self, before: Mapping[Key, Sketch], after: Mapping[Key, Sketch]) -> Moved:
        """What two runs on other inputs differ in."""
        moved = _moved(before, after)
        for key, places in moved.items():
            if places is not None:
                known = self.heard.get(key, places)
                self.heard[key] = [was | now for was, now in zip(known, places, strict=True)]
        for key in [key for key in self._restless if key in before and key in after]:
            axes = moved.get(key, ())
            if axes is not None:
                left = [was & now for was, now in zip(self._restless[key], axes, strict=True)] if axes else []
                self._restless[key] = left
        self._restless = {key: axes for key, axes in self._restless.items() if axes and all(map(torch.any, axes))}
        return moved

    def trust(self, key: Key) -> None:
        """Take an output for none that is another in every run: where it should stay it did."""
        self._restless.pop(key, None)

    def run(self, changed: Mapping[int, Tensor]) -> dict[Key, Sketch]:
        """All outputs with other tensors in the place of some, by their ``id``; empty if the model does not take them.

        It may check its inputs (sorted lengths, ...).
        """
        inputs = apply_to_collection(self.inputs, Tensor, lambda t: changed.get(id(t), t))
        try:
            return self.watch.outputs(inputs)
        except Exception:
            return {}

    @cached_property
    def noise(self) -> Container[Key]:
        """Outputs that are others in every run; asked only where nothing has shown yet that there are none."""
        return _moved(self.outputs, self.watch.outputs(self.inputs)) if self._restless else ()


@dataclass(frozen=True)
class Effect:
    """What moves when parts of one input are exchanged.

    Args:
        base: The inputs, and what comes out of them with nothing exchanged.
        tensor: One of them.
        share: How far along its sorted values its entries are exchanged; see :func:`exchanged`.
    """

    base: Base
    tensor: Tensor
    share: float
    _known: dict[tuple[int, int, int], dict[Key, Sketch]] = field(default_factory=dict)

    @cached_property
    def other(self) -> Tensor | None:
        """What the entries are exchanged for; None if they cannot be, whatever the share."""
        return exchanged(self.tensor, self.share)

    def all(self) -> Moved:
        """Everything is exchanged."""
        return self.part(0, 0, len(self.tensor))

    def part(self, axis: int, start: int, end: int) -> Moved:
        """The positions from ``start`` to ``end`` along an axis are exchanged.

        Those before them are so already, where the model takes that: one run then shows what either part moves.
        """
        before, after = self._with(axis, 0, start), self._with(axis, 0, end)
        if start and not (before and after):
            before, after = self.base.outputs, self._with(axis, start, end)
        return self.base.moved(before, after) if after else {}

    def corner(self, last: bool) -> Moved:
        """What is in the same half of every axis but the first is exchanged."""
        halves = [slice(n // 2, n) if last else slice(0, n // 2) for n in self.tensor.shape[1:]]
        return self.base.moved(self.base.outputs, self.base.run(self.changed((slice(None), *halves))))

    def _with(self, axis: int, start: int, end: int) -> dict[Key, Sketch]:
        """All outputs with some positions exchanged."""
        if end == 0:
            return self.base.outputs
        if (start, end) == (0, self.tensor.shape[axis]):
            axis, end = 0, len(self.tensor)
        if (place := (axis, start, end)) not in self._known:
            self._known[place] = self.base.run(self.changed((slice(None),) * axis + (slice(start, end),)))
        return self._known[place]

    def changed(self, places: tuple[slice, ...]) -> dict[int, Tensor]:
        """The input with some places exchanged, by the ``id`` of what it is in the place of."""
        changed = self.tensor.clone()
        changed[places] = cast(Tensor, self.other)[places]
        return {id(self.tensor): changed}


def earlier_samples(base: Base, effects: Iterable[Effect]) -> Moved | None:
    """What all samples but the last move, along the first axis of all inputs at once; of one sample: that.

    None: the model does not take them exchanged, or returns something else.
    """
    changed: dict[int, Tensor] = {}
    for effect in effects:
        changed |= effect.changed((slice(0, max(len(effect.tensor) - 1, 1)),))
    after = base.run(changed)
    shapes = [{key: [len(v) for v in sketch] for key, sketch in outputs.items()} for outputs in (base.outputs, after)]
    return base.moved(base.outputs, after) if shapes[0] == shapes[1] else None


def exchanged(tensor: Tensor, share: float = 0.5) -> Tensor | None:
    """The same tensor with every value exchanged for another of its values; None if that cannot be.

    Args:
        tensor: Of any shape.
        share: Which other: so far along the sorted values, from the last on to the first again.
    """
    if tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_nested or tensor.numel() < 2 or tensor.is_sparse:
        return None
    values, places = torch.unique(tensor.detach(), return_inverse=True)
    if len(values) > 1:
        other: Tensor = values[(places + max(int(share * len(values)), 1)) % len(values)]
        return other
    return tensor.detach() + 1 if tensor.is_floating_point() else None

"""Is this model causal? Batch statistics would then show every position the future of its batch.

Nothing is read off how attention is written. Parts of the inputs are changed and the outputs of all modules watched,
so masks of any kind, causal convolutions, recurrent and state-space models are found alike. Cut a sequence in two, and
ask of each position of an output whether it hears the first part, the second, or both:

====================  =============================  ==============================
the output is         some position hears only the   some position hears only the
                      first part                     second part
====================  =============================  ==============================
causal                yes                            no
token by token        yes                            yes
bidirectional         no                             no
====================  =============================  ==============================

That needs no correspondence between the positions of inputs and outputs, so it survives patches, strides, prefixes and
shifts. Cut in the middle it sees what reaches far; what only reaches its neighbours (short convolutions, windows)
looks token by token there, and is cut again next to either end. A second part that is all padding hears the first and
is heard by nobody, which looks causal: then the first is cut alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import named_tensors, tensors_in
from lightning_efficient.common.running import as_found, evaluating
from lightning_efficient.norms.blend import blend_norms


class CausalModelError(ValueError):
    """A causal model was given norms with batch statistics.

    Args:
        found: Norm -> what showed it to be causal.
        norms: Names of all norms that are swapped.
        target: The norm asked for.
    """

    def __init__(self, found: Mapping[str, str], norms: list[str], target: str) -> None:
        some = ", ".join(list(found)[:4]) + (", ..." if len(found) > 4 else "")
        others = len([name for name in norms if name not in found])
        exclude = f" The other {others} norms are not concerned: `exclude` these." if others else ""
        super().__init__(
            f"the model is causal: {next(iter(found.values()))}. The batch statistics of `target={target!r}` in "
            f"{len(found)} of {len(norms)} norms ({some}) would let every position see the future of its batch while "
            "training: the loss would be too good, and evaluation would see another network. Use `target='affine'`, "
            f"which has no batch statistics, or accept the leak with `allow_causal=True`.{exclude}"
        )


def causal_norms(model: nn.Module, run: Callable[[Any], object], inputs: Any) -> dict[str, str]:
    """The swapped norms that work on a sequence whose later positions the model hides from the earlier ones.

    A model that treats every token by itself hides nothing: its tokens are a batch like any other. A causal part whose
    output is mixed in both directions later (a causal stem, the forward half of a bidirectional recurrent net) does not
    count either. Everything runs in evaluation mode, where swapped norms have no batch statistics; parameters that are
    constant (zero-initialised branches, tiny layer scales) get noise meanwhile, because a zero hides what it is for.
    Modes, buffers, parameters and random state are as before afterwards.

    Args:
        model: With ``BlendNorm`` in it.
        run: Runs the model on such inputs.
        inputs: Tensors in any nest. Values are only ever exchanged for others of the same tensor, so that indices stay
            in their vocabulary; bool tensors stay. A few samples are enough.

    Returns:
        Norm name -> what was seen, for people. Empty: not causal, or no sequence.

    Raises:
        Exception: ``run`` fails on the inputs as they are.
    """
    norms = blend_norms(model)
    found: dict[str, str] = {}
    with evaluating(model), _awake(model), uncompiled(), _Watch(model, run) as watch:
        base = watch.outputs(inputs)
        noise = _moved(base, watch.outputs(inputs))
        base = {key: value for key, value in base.items() if key not in noise}
        for name, tensor in named_tensors(inputs):
            others = [other for share in _SHARES if (other := exchanged(tensor, share)) is not None]
            if not others:
                continue
            effects = [_Effect(watch, base, inputs, tensor, other) for other in others]
            moved = [key for key in effects[0].all() if key.module in norms]
            touched = {key.module: _rows(base[key], norms[key.module].spec.axis) for key in moved}
            for axis in range(tensor.dim()):
                # Along any axis but the first a norm with one row a sample has no positions to leak between.
                mixed = [name for name, rows in touched.items() if axis == 0 or rows > len(tensor)]
                if mixed and (seen := _causal_always(axis, effects)):
                    what = (
                        f"the output of {seen!r} does not hear later positions of {name or 'the input'!r} (axis "
                        f"{axis}), and later ones hear the earlier"
                    )
                    found = dict.fromkeys(mixed, what) | found
    return found


class _Key(NamedTuple):
    """One tensor of one call of a module."""

    module: str
    call: int
    output: int


_Sketch = tuple[Tensor, ...]
"""What is kept of a tensor: for each axis a vector, in which an entry changes when something at that index does."""

_Moved = dict[_Key, tuple[Tensor, ...] | None]
"""Outputs that changed -> for each axis, where (bool, on the CPU); None: by so little that it may be rounding."""


class _Watch:
    """Runs a model with hooks on all its modules but the insides of norms.

    Args:
        model: The model.
        run: Runs it.
    """

    def __init__(self, model: nn.Module, run: Callable[[Any], object]) -> None:
        self._model, self._run, self._seen = model, run, dict[_Key, _Sketch]()
        self._calls: Counter[str] = Counter()
        inside = {m for norm in blend_norms(model).values() for m in norm.modules() if m is not norm}
        self._handles = [
            module.register_forward_hook(self._hook(canonical_name(name)))
            for name, module in model.named_modules()
            if module is not model and module not in inside and not isinstance(module, torch.jit.ScriptModule)
        ]

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def outputs(self, inputs: Any) -> dict[_Key, _Sketch]:
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
                    self._seen[_Key(name, self._calls[name], index)] = _sketch(tensor)

        return hook


def _sketch(tensor: Tensor) -> _Sketch:
    """Random projections onto each axis. An entry stays, up to the rounding of sums, if nothing at its index moved."""
    x = torch.nan_to_num(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(x) for size in x.shape]
    axes = []
    for axis in range(x.dim()):
        y = x.movedim(axis, 0)
        for weight in reversed([w for a, w in enumerate(weights) if a != axis]):
            y = y @ weight
        axes.append(y)
    return tuple(axes)


def _moved(base: Mapping[_Key, _Sketch], other: Mapping[_Key, _Sketch]) -> _Moved:
    """Where outputs differ, by more than the rounding of an FFT or of a sum in another order."""
    moved: _Moved = {}
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


@dataclass(frozen=True)
class _Effect:
    """What moves when parts of one input are exchanged.

    Args:
        watch: Runs the model.
        base: Its outputs with nothing exchanged.
        inputs: All inputs.
        tensor: One of them.
        other: What its entries are exchanged for.
    """

    watch: _Watch
    base: dict[_Key, _Sketch]
    inputs: Any
    tensor: Tensor
    other: Tensor

    def all(self) -> _Moved:
        """Everything is exchanged."""
        return self.part(0, 0, len(self.tensor))

    def part(self, axis: int, start: int, end: int) -> _Moved:
        """The positions from ``start`` to ``end`` along an axis are exchanged."""
        changed = self.tensor.clone()
        changed.narrow(axis, start, end - start).copy_(self.other.narrow(axis, start, end - start))
        inputs = apply_to_collection(self.inputs, Tensor, lambda t: changed if t is self.tensor else t)
        try:
            return _moved(self.base, self.watch.outputs(inputs))
        except Exception:  # the model checks its inputs (sorted lengths, ...): this one cannot be varied
            return {}


def _rows(sketch: _Sketch, axis: int) -> int:
    """Rows over which a norm on channels along ``axis`` takes its batch statistics."""
    shape = [len(vector) for vector in sketch]
    return math.prod(shape) // shape[axis]


def _causal_always(axis: int, effects: Iterable[_Effect]) -> str:
    """The module that is causal with whatever the input is exchanged for.

    With one exchange an entry of a narrow layer may hear the first part only by chance: behind a ReLU, say.
    """
    seen = ""
    for effect in effects:
        if not (seen := _causal_along(axis, effect)):
            break
    return seen


def _causal_along(axis: int, effect: _Effect) -> str:
    """The module whose output is causal along an axis of an input, unless the sequence is mixed both ways behind it."""
    length = whole = effect.tensor.shape[axis]
    padding: _Moved = {}
    while length >= 2:
        first, last = effect.part(axis, 0, length // 2), effect.part(axis, length // 2, length)
        hears = {key: _hearing((first, last), (last, first), key, padding) for key in effect.base}
        if length > 2 and _last_word("token", hears, effect.base):
            head = effect.part(axis, 0, 1), effect.part(axis, 1, length)
            tail = effect.part(axis, length - 1, length), effect.part(axis, 0, length - 1)
            hears |= {
                key: _hearing(head, tail, key, padding, was.axis) for key, was in hears.items() if was.kind == "token"
            }
        seen = _last_word("causal", hears, effect.base)
        if not seen or length < 4 or not _is_padding(axis, length, effect, hears, seen):
            return seen
        length //= 2
        padding = effect.part(axis, length, whole)
    return ""


def _is_padding(axis: int, length: int, effect: _Effect, hears: Mapping[_Key, _Hearing], seen: str) -> bool:
    """Whether the last position hears nothing of the rest of its half, as padding does not: it hears what counts.

    Then real tokens have no later ones in that half to hear, in any model, and only the half before can tell.
    """
    rest, last = effect.part(axis, length // 2, length - 1), effect.part(axis, length - 1, length)
    for key, what in hears.items():
        if what.kind == "causal" and key.module == seen:
            by_rest, by_last = rest.get(key), last.get(key)
            if by_rest is None or by_last is None or (by_rest[what.axis] & by_last[what.axis]).any():
                return False
    return True


class _Hearing(NamedTuple):
    """What an output hears, and along which of its axes; ``kind`` is empty where that means nothing."""

    kind: str
    axis: int = 0


def _hearing(
    head: tuple[_Moved, _Moved], tail: tuple[_Moved, _Moved], key: _Key, padding: _Moved, axis: int | None = None
) -> _Hearing:
    """Judge an output by what moved with either end of the sequence, and with all but that end.

    Args:
        head: Moved by the beginning, and by the rest.
        tail: Moved by the end, and by the rest.
        key: The output.
        padding: Moved by positions that are known to be padding: their own outputs, which are left out.
        axis: Its axis that is the sequence; None: to be found.
    """
    four = [part.get(key, ()) for part in (*head, *tail)]
    if None in four or not four[0] or not four[2]:
        return _Hearing("")
    kinds, known = {}, padding.get(key)
    for a in range(len(four[0])) if axis is None else (axis,):
        begin, no_begin, end, no_end = (part[a] if part else torch.tensor(False) for part in four)
        own = torch.zeros_like(begin) if known is None else known[a]
        only_begin, only_end = begin & ~no_begin & ~own, end & ~no_end & ~own
        if not (only_begin | only_end).any():
            kinds["mixed"] = a
        elif only_begin.any() and (axis is not None or _is_beginning(only_begin, end, int((~own).sum()))):
            kinds["token" if only_end.any() else "causal"] = a
        else:
            kinds[""] = a
    return next(_Hearing(kind, kinds[kind]) for kind in ("token", "causal", "", "mixed") if kind in kinds)


def _is_beginning(part: Tensor, before: Tensor, entries: int) -> bool:
    """Whether an axis is a sequence of so many that begins with ``part``, or several of the same length in a row.

    Along an axis of features a few entries hear one part only by chance (behind a ReLU), in no order.
    """
    starts = (part & ~part.roll(1)).nonzero().flatten().tolist()
    if not starts or len(part) % len(starts) or before[: starts[0]].any():
        return False
    period = len(part) // len(starts)
    return starts == list(range(starts[0], len(part), period)) and 4 * int(part.sum()) >= entries


def _last_word(kind: str, hears: Mapping[_Key, _Hearing], base: Mapping[_Key, _Sketch]) -> str:
    """The last module with an output of a kind, unless a mixed one with an axis of that length comes behind it.

    A pooled output hears everything, too, and says nothing about the sequence: it has two axes at most.
    """
    last, length = "", 0
    for key, what in hears.items():
        shape = [len(vector) for vector in base[key]]
        if what.kind == kind:
            last, length = key.module, shape[what.axis]
        elif what.kind == "mixed" and len(shape) > 2 and length in shape:
            last = ""
    return last


# How far along its sorted values every value of an input moves.
_SHARES = (1 / 2, 1 / 3, 3 / 4, 1 / 5)


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


@contextmanager
def _awake(model: nn.Module) -> Iterator[None]:
    """Noise on the parameters that are constant, inside this context."""
    generator = torch.Generator().manual_seed(0)
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
                    saved.append((parameter, parameter.clone()))
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)

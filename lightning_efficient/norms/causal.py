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
looks token by token there, and is cut again next to either end. Where all see a prefix of more than half, every
position hears both parts: that is cut again in the last quarter. A second part that is all padding hears the first and
is heard by nobody, which looks causal: then the first is cut alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.running import evaluating
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.effects import Base, Effect, Key, Moved, Sketch, Watch, earlier_samples

# How far along its sorted values every value of an input moves.
_SHARES = (1 / 2, 1 / 3, 3 / 4, 1 / 5)


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
    with evaluating(model), _awake(model), uncompiled(), Watch(model, run) as watch:
        base = Base(watch, inputs)
        asked = {name: [Effect(base, tensor, share) for share in _SHARES] for name, tensor in named_tensors(inputs)}
        asked = {name: effects for name, effects in asked.items() if effects[0].other is not None}
        earlier = earlier_samples(base, [effects[0] for effects in asked.values()])
        for key, moved in (earlier or {}).items():
            if _ends_alone(moved):
                base.trust(key)

        def ask(name: str, axes: Iterable[int]) -> None:
            effects = asked[name]
            moved = [key for key in effects[0].all() if key.module in norms]
            rows = {key: _rows(base.outputs[key], norms[key.module].spec.axis) for key in moved}
            for axis in axes:
                # Along any axis but the first a norm with one row a sample has no positions to leak between.
                mixed = [key for key, number in rows.items() if axis == 0 or number > len(effects[0].tensor)]
                if mixed and (seen := _causal_always(axis, effects)):
                    what = (
                        f"the output of {seen!r} does not hear later positions of {name or 'the input'!r} (axis "
                        f"{axis}), and later ones hear the earlier"
                    )
                    for key in mixed:
                        if key not in base.noise:
                            found.setdefault(key.module, what)

        for name, effects in asked.items():
            axes = range(1, effects[0].tensor.dim())
            image = len(axes) > 2 and earlier is not None  # of which two runs may be enough
            if axes and not (image and _is_mixed(effects[0], earlier or {})):
                ask(name, axes)
        if not _samples_apart(base, earlier):
            for name in asked:
                ask(name, (0,))
    return found


def _samples_apart(base: Base, earlier: Moved | None) -> bool:
    """Whether the end of every output is left alone by all samples but the last, and is moved by something.

    Then nothing is hidden along the first axis of any input, whatever that is: where something is, the last position
    hears an earlier one.

    Args:
        base: Knows what has moved by anything.
        earlier: What those samples move; None: not known.
    """
    keys = [] if earlier is None else [k for k, m in earlier.items() if not _ends_alone(m, base.heard.get(k))]
    return earlier is not None and all(key in base.noise for key in keys)


def _ends_alone(moved: tuple[Tensor, ...] | None, heard: Sequence[Tensor] | None = None) -> bool:
    """Whether an axis begins with what moved, and what counts of the rest did not; ``heard``: where it counts."""
    for axis, part in enumerate(moved or ()):
        alone = ~part if heard is None else heard[axis] & ~part
        if alone.any() and _is_beginning(part, alone, len(part)):
            return True
    return False


def _rows(sketch: Sketch, axis: int) -> int:
    """Rows over which a norm on channels along ``axis`` takes its batch statistics."""
    shape = [len(vector) for vector in sketch]
    return math.prod(shape) // shape[axis]


def _causal_always(axis: int, effects: Iterable[Effect]) -> str:
    """The module that is causal with whatever the input is exchanged for.

    With one exchange an entry of a narrow layer may hear the first part only by chance: behind a ReLU, say.
    """
    seen = ""
    for effect in effects:
        if not (seen := _causal_along(axis, effect)):
            break
    return seen


def _is_mixed(effect: Effect, earlier: Moved) -> bool:
    """Whether two runs show that nothing is hidden along any axis but the first: a corner moves everything.

    It is a part of either half of every axis, so that an output that both corners move throughout is mixed along all
    of them. It has to come behind the last one that may be something else, and to have the axes along which that may.

    Args:
        effect: Of the image.
        earlier: Outputs that hear a sample.
    """
    first, last, doubtful, mixed = effect.corner(last=False), effect.corner(last=True), set[int](), True
    for key in earlier:
        shape = [len(vector) for vector in effect.base.outputs[key]]
        axes = [one & two for one, two in zip(first.get(key) or (), last.get(key) or (), strict=False)]
        still = [axis for axis in range(len(shape)) if not axes or not axes[axis].all()]
        if still or key in effect.base.noise:
            doubtful, mixed = {shape[axis] for axis in still}, False
        elif len(shape) > 2 and doubtful.issubset(shape):
            mixed = True
    return mixed


def _causal_along(axis: int, effect: Effect) -> str:
    """The module whose output is causal along an axis of an input, unless the sequence is mixed both ways behind it."""
    length = whole = effect.tensor.shape[axis]
    padding: Moved = {}
    sample: dict[Key, list[Tensor]] | None = None
    while length >= 2:
        outputs = {key: sketch for key, sketch in effect.base.outputs.items() if key not in effect.base.noise}
        hears, cut = _heard_along(axis, length, effect, outputs, padding, sample or {})
        seen = _last_word("causal", hears, outputs)
        if seen and axis > 0 and sample is None:  # samples that are padded differently look like positions
            sample = _first_sample(effect)
            continue
        if not seen or length < 4 or not _is_padding(axis, cut, length, effect, hears, seen, sample or {}):
            return seen
        if cut > length // 2:
            return ""
        length //= 2
        padding = effect.part(axis, length, whole)
    return ""


def _heard_along(
    axis: int,
    length: int,
    effect: Effect,
    outputs: Mapping[Key, Sketch],
    padding: Moved,
    sample: Mapping[Key, Sequence[Tensor]],
) -> tuple[dict[Key, _Hearing], int]:
    """What each output hears of the first positions along an axis, and where these were cut in two at last."""

    def two(at: int) -> tuple[Moved, Moved]:
        return effect.part(axis, 0, at), effect.part(axis, at, length)

    hears: dict[Key, _Hearing] = {}

    def again(kind: str, head: tuple[Moved, Moved], tail: tuple[Moved, Moved], only: str = "") -> None:
        for key in [key for key in outputs if key not in hears or hears[key].kind == kind]:
            along = hears[key].axis if key in hears and not only else None
            now = _hearing(head, tail, key, padding, sample.get(key), along)
            hears[key] = hears[key] if only and now.kind != only else now

    cut = length // 2
    first, last = two(cut)
    again("", (first, last), (last, first))
    if length > 2 and _last_word("causal", hears, outputs):
        # Of few outputs with wide windows the first may end before the second part, and the last not begin after the
        # first part; but it begins after the first position.
        again("causal", (first, last), two(1)[::-1])
    if length > 2 and _last_word("token", hears, outputs):
        again("token", two(1), two(length - 1)[::-1])
    if length > 3 and not _last_word("causal", hears, outputs) and _last_word("mixed", hears, outputs):
        cut = length - max(length // 4, 2)
        again("mixed", two(cut), two(1)[::-1], only="causal")
    return hears, cut


def _first_sample(effect: Effect) -> dict[Key, list[Tensor]]:
    """Output -> for each axis the entries of the first sample; all, where the samples do not lie along it.

    Where too little moves to tell, an axis of as many entries as there are samples is theirs.
    """
    samples = len(effect.tensor)
    first, rest = effect.part(0, 0, 1), effect.part(0, 1, samples)
    found: dict[Key, list[Tensor]] = {}
    for key, sketch in effect.base.outputs.items():
        one, two = first.get(key), rest.get(key)
        found[key] = [torch.ones(len(vector), dtype=torch.bool) for vector in sketch]
        for axis, entries in enumerate(found[key]):
            if one is None or two is None:
                entries[1:] = len(entries) != samples
            elif one[axis].any() and not (one[axis] & two[axis]).any():
                found[key][axis] = one[axis]
    return found


def _is_padding(
    axis: int,
    cut: int,
    length: int,
    effect: Effect,
    hears: Mapping[Key, _Hearing],
    seen: str,
    sample: Mapping[Key, Sequence[Tensor]],
) -> bool:
    """Whether the last position hears nothing of the rest of its part, as padding does not: it hears what counts.

    Then real tokens have no later ones in that part to hear, in any model, and only the part before can tell.
    """
    rest, last = effect.part(axis, cut, length - 1), effect.part(axis, length - 1, length)
    for key, what in hears.items():
        if what.kind == "causal" and key.module == seen:
            by_rest, by_last = rest.get(key), last.get(key)
            if by_rest is None or by_last is None:
                return False
            both = by_rest[what.axis] & by_last[what.axis]
            if (both & sample[key][what.axis] if key in sample else both).any():
                return False
    return True


class _Hearing(NamedTuple):
    """What an output hears, and along which of its axes; ``kind`` is empty where that means nothing."""

    kind: str
    axis: int = 0


def _hearing(
    head: tuple[Moved, Moved],
    tail: tuple[Moved, Moved],
    key: Key,
    padding: Moved,
    sample: Sequence[Tensor] | None = None,
    axis: int | None = None,
) -> _Hearing:
    """Judge an output by what moved with either end of the sequence, and with all but that end.

    Args:
        head: Moved by the beginning, and by the rest.
        tail: Moved by the end, and by the rest.
        key: The output.
        padding: Moved by positions that are known to be padding: their own outputs, which are left out.
        sample: For each axis the entries to judge by, from :func:`_first_sample`; None: all.
        axis: Its axis that is the sequence; None: to be found.
    """
    four = [part.get(key, ()) for part in (*head, *tail)]
    if None in four or not four[0] or not four[2]:
        return _Hearing("")
    kinds, known = {}, padding.get(key)
    for a in range(len(four[0])) if axis is None else (axis,):
        mine = torch.ones_like(four[0][a]) if sample is None else sample[a]
        if mine.sum() == 1 < len(mine):
            continue  # samples, and nothing else, lie along this axis
        begin, no_begin, end, no_end = (part[a][mine] if part else torch.tensor(False) for part in four)
        own = torch.zeros_like(begin) if known is None else known[a][mine]
        only_begin, only_end = begin & ~no_begin & ~own, end & ~no_end & ~own
        if not (only_begin | only_end).any():
            kinds["mixed"] = a
        elif only_begin.any() and (axis is not None or _is_beginning(only_begin, end, int((~own).sum()))):
            kinds["token" if only_end.any() else "causal"] = a
        else:
            kinds[""] = a
    kind = next((kind for kind in ("token", "causal", "", "mixed") if kind in kinds), "")
    return _Hearing(kind, kinds.get(kind, 0))


def _is_beginning(part: Tensor, before: Tensor, entries: int) -> bool:
    """Whether an axis is a sequence of so many that begins with ``part``, or several of the same length in a row.

    Along an axis of features a few entries hear one part only by chance (behind a ReLU), in no order.
    """
    starts = (part & ~part.roll(1)).nonzero().flatten().tolist()
    if not starts or len(part) % len(starts) or before[: starts[0]].any():
        return False
    period = len(part) // len(starts)
    return starts == list(range(starts[0], len(part), period)) and 4 * int(part.sum()) >= entries


def _last_word(kind: str, hears: Mapping[Key, _Hearing], base: Mapping[Key, Sketch]) -> str:
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

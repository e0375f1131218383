"""Who reads a norm's output: found by tracking its channels through one real forward.

Symbolic tracing and export fail on many of the models people use; a real forward does not. See ``tags`` for how
channels are carried along, ``readers`` for the calls an affine can be folded into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_efficient.common.match import canonical_name
from lightning_efficient.folding.readers import How
from lightning_efficient.folding.tracking import Call, Slot, Tracker


@dataclass(frozen=True)
class Weight:
    """A weight and the bias that goes with it, by name.

    Args:
        module: Name of the module that holds the weight.
        how: The call it is used in.
        name: Name of the weight.
        bias: Name of the bias; None where there is none and no place for one.
        has_bias: False: ``bias`` is the place where one can be put.
        bias_size: Its number of entries.
        groups: Of a convolution.
    """

    module: str
    how: How
    name: str
    bias: str | None
    has_bias: bool
    bias_size: int
    groups: int = 1


@dataclass(frozen=True)
class Part:
    """Rows of a weight that read the norm.

    Args:
        rows: First and last (exclusive) output row.
        bias_start: Where these rows begin in the bias.
        channels: The norm's channel that every input of these rows reads; -1 where it reads something else.
    """

    rows: tuple[int, int]
    bias_start: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """One weight that reads the norm.

    Args:
        weight: Which.
        parts: Which of its rows read which channels.
        padded: Zeros are put around the input first: a scale can be folded, a shift cannot.
    """

    weight: Weight
    parts: tuple[Part, ...]
    padded: bool


@dataclass(frozen=True)
class Producer:
    """The one weight whose product is all that the norm reads, and whose product nothing else reads.

    Args:
        weight: Which.
        channels: The norm's channel of every output row; -1 for rows that do not go into it.
    """

    weight: Weight
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Consumers:
    """What one forward showed about a norm.

    Args:
        readers: The weights that read its output.
        blocked: Why an affine cannot be moved into them; None if it can.
        producer: The weight it could be moved into backwards, if any.
    """

    readers: tuple[Reader, ...] = ()
    blocked: str | None = None
    producer: Producer | None = None


def consumers_of(tracker: Tracker) -> dict[str, Consumers]:
    """Who reads the output of the watched norms, by what a finished ``Tracker`` has seen.

    A reader counts only if *all* its calls read the same channels of the same norms and its weight is used for nothing
    else. Whatever is not understood blocks. What one forward cannot show (a branch that depends on the data, padding
    that depends on the size) is for the caller to check at other inputs; ``fold_affines`` does.

    Args:
        tracker: After its forward.

    Returns:
        Name -> what was found, by the names the tracker was given.
    """
    return {name: _consumers(tracker, canonical_name(name)) for name in tracker.axes}


def _consumers(tracker: Tracker, name: str) -> Consumers:
    producer = _producer(tracker, name)
    if not tracker.feeds[name]:
        return Consumers(blocked="not called in the traced forward")
    readers, blocked = [], tracker.blocked.get(name)
    for weight, calls in tracker.calls.items():
        if any(name in call.norms for call in calls):
            blocked = blocked or _shared(tracker, weight) or _differs(tracker, weight, calls)
            readers.append(_reader(tracker, name, weight, calls[0]))
    readers = [reader for reader in readers if reader.parts]  # one with no parts reads in a way that blocks
    if not readers:
        blocked = blocked or "nothing reads its output"
    return Consumers(tuple(readers), blocked, producer)


def _weight(tracker: Tracker, key: int, call: Call) -> Weight:
    slot, contraction = tracker.slots[key][0], call.contraction
    bias: str | None = None
    if contraction.bias is not None:
        slots = tracker.slots.get(id(contraction.bias))
        bias = slots[0].name if slots else None
    elif getattr(slot.owner, contraction.bias_name, ...) is None:
        bias = Slot(slot.module, slot.owner, contraction.bias_name).name
    has_bias = contraction.bias is not None
    return Weight(
        slot.module, contraction.how, slot.name, bias, has_bias, contraction.bias_size, contraction.groups
    )  # fmt: skip


def _reader(tracker: Tracker, name: str, key: int, call: Call) -> Reader:
    parts = tuple(
        Part(block.rows, block.bias_start, tuple(tracker.channels.local(name, numbers).tolist()))
        for block, numbers in zip(call.contraction.blocks, call.channels, strict=True)
        if numbers is not None
    )
    used = tuple(part for part in parts if any(channel >= 0 for channel in part.channels))
    return Reader(_weight(tracker, key, call), used, call.contraction.padded)


def _producer(tracker: Tracker, name: str) -> Producer | None:
    """Every call of the norm reads the same rows of one weight, each row as one channel, and nobody else does."""
    feeds = tracker.feeds[name]
    first = feeds[0] if feeds else None
    if first is None or any(
        f is None or f.weight != first.weight or not torch.equal(f.channels, first.channels) for f in feeds
    ):
        return None
    rows = {row for row, channel in enumerate(first.channels.tolist()) if channel >= 0}
    others = [feed for other, feeds in tracker.feeds.items() if other != name for feed in feeds if feed is not None]
    claims = [feed.channels.tolist() for feed in others if feed.weight == first.weight]
    claimed = {row for channels in claims for row, channel in enumerate(channels) if channel >= 0}
    if rows & (claimed | tracker.leaked(first.weight)) or _shared(tracker, first.weight):
        return None
    return Producer(_weight(tracker, first.weight, tracker.calls[first.weight][0]), tuple(first.channels.tolist()))


def _shared(tracker: Tracker, key: int) -> str | None:
    """Why changing a weight and its bias would change something else, too."""
    slot, calls = tracker.slots[key][0], tracker.calls[key]
    if not any(type(p) is nn.Parameter for n, p in slot.owner.named_parameters(recurse=False) if n == slot.attribute):
        return f"the weight of {slot.module!r} is of a special tensor type (quantised?)"
    weight = calls[0].contraction.weight
    biases = {id(call.contraction.bias): call.contraction.bias for call in calls if call.contraction.bias is not None}
    for parameter in (weight, *biases.values()):
        what = "weight" if id(parameter) == key else "bias"
        slots = tracker.slots.get(id(parameter), [])
        if len(slots) > 1:
            return f"tied {what}: {slots[0].name!r} is {slots[1].name!r}"
        if id(parameter) in tracker.uses:
            return f"{what} of {slots[0].module!r} is also read by {tracker.uses[id(parameter)]}"
        if parameter.numel() and tracker.storages[parameter.untyped_storage().data_ptr()] > 1:
            return f"{what} of {slots[0].module!r} shares its memory with another parameter"
    if len(biases) > 1:
        return f"{slot.module!r} is called with two biases"
    return _shared_bias(tracker, key, set(biases))


def _shared_bias(tracker: Tracker, key: int, biases: set[int]) -> str | None:
    """One bias added to the products of two weights: allowed only where each has its own stretch of it."""
    mine = {block.bias_start for call in tracker.calls[key] for block in call.contraction.blocks}
    for other, calls in tracker.calls.items():
        for call in calls:
            starts = {block.bias_start for block in call.contraction.blocks}
            if other != key and id(call.contraction.bias) in biases and starts & mine:
                return f"bias of {tracker.slots[key][0].module!r} is added by {tracker.slots[other][0].module!r}, too"
    return None


def _differs(tracker: Tracker, key: int, calls: list[Call]) -> str | None:
    first, reader = calls[0].channels, tracker.slots[key][0].module
    for call in calls[1:]:
        for one, two in zip(first, call.channels, strict=True):
            if (one is None) != (two is None) or (one is not None and two is not None and not torch.equal(one, two)):
                return f"{reader!r} is called {len(calls)} times, and not always with this norm's output alone"
    return None

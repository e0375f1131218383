"""Skipping feed-forward blocks token by token at inference, by a threshold that calibration data decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.nests import mapped, outputs_in
from lightning_efficient.common.running import Call, calls_of_batch, evaluating, first_line
from lightning_efficient.companions.feed_forward import FeedForward, find_feed_forwards

_NEVER = 2.0  # no cosine reaches it
_CLOSE = 0.005  # of the share asked for
_TRIES = 8


def _tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


class FFNSkip:
    """What :func:`ffn_skip_` has put on a model.

    Attributes:
        tau: The threshold: a token whose cosine between the input and the output of a block's feed-forward part (with
            its residual) reaches it goes past those of the blocks that follow.
        blocks: Names of the blocks concerned; the first one only decides.
        skipped: Share of all (token, block) pairs of the calibration data that were skipped, blocks that never skip
            included.
        error: Norm of what skipping changed in the model's outputs there, over the norm of the outputs.
        enabled: ``False``: the model runs whole.
    """

    def __init__(self, model: nn.Module, parts: Sequence[FeedForward], cold: tuple[int, int], warm_up: int) -> None:
        self.tau, self.skipped, self.error, self.enabled = _NEVER, 0.0, 0.0, True
        self.warm_up, self.total = warm_up, len(parts)
        self.saturated: Tensor | None = None
        self.layers = [_Layer(self, part) for part in parts[slice(*cold)]]
        self.blocks = tuple(layer.part.name for layer in self.layers)

    def remove(self) -> None:
        """Give the model back as it was."""
        for layer in self.layers:
            layer.remove()
        self.layers = []

    def __repr__(self) -> str:
        """What it does to the calibration data."""
        return f"FFNSkip(tau={self.tau:.4g}, skipped={self.skipped:.1%}, error={self.error:.2g}, blocks={self.blocks})"


class _Layer:
    """On one block: two hooks, and forwards that run on the tokens that are left."""

    def __init__(self, skip: FFNSkip, part: FeedForward) -> None:
        self.skip, self.part = skip, part
        self.before: Tensor | None = None
        self.mask: Tensor | None = None
        self.cosines: list[Tensor] | None = None
        self.counts = [0, 0]
        self.gates = [_Gate(self, module) for module in part.gates]
        self.handles: list[RemovableHandle] = [
            part.reader.register_forward_pre_hook(self.enter, with_kwargs=True),
            part.block.register_forward_hook(self.leave),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the feed-forward part: which tokens go past it."""
        self.before = self.mask = None
        skip = self.skip
        if not skip.enabled or self.part.block.training:
            return
        self.before = x = _tensor(args, kwargs)
        if self is skip.layers[0]:
            skip.saturated = x.new_zeros(x.shape[:-1], dtype=torch.bool)
            return
        if skip.saturated is None or skip.saturated.shape != x.shape[:-1]:
            raise ValueError(
                f"ffn_skip_: {self.part.name} was given tokens {tuple(x.shape[:-1])}, other ones than the block before "
                "it. Tokens can only be followed through blocks that keep them all: name such by `include`."
            )
        self.mask = skip.saturated.clone()
        if skip.warm_up and x.dim() > 2 and x.shape[1] > 1:  # a single token is one that is being generated
            self.mask[:, : skip.warm_up] = False

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the block: tokens that the feed-forward part hardly turned are saturated."""
        before, skip = self.before, self.skip
        if before is None or skip.saturated is None:
            return
        after = next(iter(outputs_in(output))).reshape(before.shape)
        cosines = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        left = torch.ones_like(skip.saturated) if self.mask is None else ~self.mask
        self.counts = [self.counts[0] + int((~left).sum()), self.counts[1] + left.numel()]
        if self.cosines is not None:
            self.cosines.append(cosines.cpu())
        skip.saturated = skip.saturated | (left & (cosines >= skip.tau))
        self.before = self.mask = None

    def remove(self) -> None:
        """Give the block back as it was."""
        for handle in self.handles:
            handle.remove()
        for gate in self.gates:
            gate.remove()


class _Gate:
    """Stands in a module's ``forward`` attribute and runs it on the tokens that are not skipped.

    An object, not a closure: it can be pickled, and a deep copy of the module runs the copy.
    """

    def __init__(self, layer: _Layer, module: nn.Module) -> None:
        self.layer, self.module = layer, module
        self.inner = vars(module).get("forward")  # somebody else's, on the instance
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; zeros for tokens that are skipped."""
        skipped = self.layer.mask
        if skipped is None or not bool(skipped.any()):
            return self._own(*args, **kwargs)
        x = _tensor(args, kwargs)
        rows = x[~skipped][None]
        args, kwargs = mapped((args, kwargs), lambda value: rows if value is x else value)
        left = self._own(*args, **kwargs)
        out = left.new_zeros(*x.shape[:-1], left.shape[-1])
        out[~skipped] = left[0]
        return out

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return (
            type(self.module).forward(self.module, *args, **kwargs)
            if self.inner is None
            else self.inner(*args, **kwargs)
        )

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self.inner is not None:
            self.module.forward = self.inner


def ffn_skip_(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    target_skip: float = 0.25,
    *,
    tau: float | None = None,
    cold_start: int = 1,
    cold_end: int = -1,
    warm_up: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    batches: int = 8,
) -> FFNSkip:
    """Skip the feed-forward parts of a model's blocks for tokens that they hardly change, at inference, in place.

    A token that leaves the feed-forward part of a block in the direction in which it came (cosine of ``x`` and ``x +
    ffn(norm(x))`` at least ``tau``) goes past those of the blocks that follow; attention always runs, so that a cache
    of keys and values stays whole. No threshold fits two models, so it is chosen on calibration data. In training mode
    the model runs whole. Weights and ``state_dict`` stay as they are, and files know nothing of it: call it again
    after loading, and take it off (``.remove()``) before ``torch.compile`` and export, which cannot follow it.

    Args:
        model: Of pre-norm blocks, ``x + attention(norm(x))`` and then ``x + ffn(norm(x))``, in one list; found by what
            the blocks do, not by their names.
        loader: Calibration data: batches as the model's forward takes them, alone, first in a tuple, or by name in a
            mapping. Needed.
        target_skip: Share of all (token, block) pairs to skip, blocks that never skip included. The paper keeps its
            quality up to about 0.25 to 0.3 and loses it from 0.35, on large language models.
        tau: The threshold instead, for which the calibration data only say what it does.
        cold_start: Blocks before this one never skip, and this one only decides.
        cold_end: Nor do blocks from this one on; negative: from the end.
        warm_up: The first so many tokens of a prompt (axis 1) never skip.
        include: Globs over names of blocks. ``None``: all.
        exclude: Globs over names of blocks.
        batches: Read at most so many.

    Returns:
        What was put on: threshold, share skipped and error on the calibration data, ``remove()``.

    Raises:
        ValueError: No calibration data, an argument out of range, or a model without such blocks. Nothing has changed
            then.

    Source: Jaiswal et al., *FFN-SkipLLM*, 2024, arXiv 2404.03865, of which no code was published: the rule is from its
    text, and the calibration is ours.
    """
    held = [] if loader is None else list(islice(loader, batches))
    if not held:
        raise ValueError(
            f"`loader` is {'None' if loader is None else 'empty'}: ffn_skip_ needs calibration data, a few batches of "
            "what the model will see. A threshold of another model skips nothing, or ruins this one."
        )
    if not 0 <= target_skip < 1 or warm_up < 0:
        raise ValueError(
            f"`target_skip` is {target_skip} and `warm_up` {warm_up}; expected 0 <= target_skip < 1 and warm_up from 0."
        )
    if any(isinstance(vars(module).get("forward"), _Gate) for module in model.modules()):
        raise ValueError(f"ffn_skip_ was called on this {type(model).__name__} before: take it off first, by remove().")
    calls = [_call(model, batch) for batch in held]
    parts = find_feed_forwards(model, _small(calls[0]), include, exclude)
    start, end, _ = slice(cold_start, cold_end).indices(len(parts))
    most = max(0, end - start - 1) / len(parts)
    if end - start < 2:
        raise ValueError(
            f"`cold_start` is {cold_start} and `cold_end` {cold_end}: of {len(parts)} blocks that leaves "
            f"{max(0, end - start)}; expected at least two, the first of which decides and the others skip."
        )
    if tau is None and target_skip > most:
        raise ValueError(
            f"`target_skip` is {target_skip}; with `cold_start`={cold_start} and `cold_end`={cold_end} at most "
            f"{most:.3g} of {len(parts)} blocks can be skipped."
        )
    skip = FFNSkip(model, parts, (start, end), warm_up)
    try:
        _calibrate(model, skip, calls, target_skip, tau)
    except BaseException:
        skip.remove()
        raise
    return skip


def _call(model: nn.Module, batch: Any) -> Call:
    """How a batch is given to the model."""
    problem = ""
    for call in calls_of_batch(model, batch):
        try:
            with evaluating(model):
                call.run(model)
        except Exception as error:  # not the way in which it is given
            problem = problem or first_line(error)
        else:
            return call
    raise ValueError(f"{type(model).__name__} cannot be run on a batch of `loader`: {problem}")


def _small(call: Call) -> Call:
    """Two samples of it, where there is a batch to cut."""
    try:
        return call.resized(2)
    except ValueError:
        return call


def _run(model: nn.Module, skip: FFNSkip, calls: Sequence[Call], tau: float) -> list[Tensor]:
    skip.tau = tau
    for layer in skip.layers:
        layer.counts = [0, 0]
    with evaluating(model):
        # The largest tensor: a model that is given labels returns its loss first.
        outputs = [max(outputs_in(call.run(model)), key=Tensor.numel).double().cpu() for call in calls]
    skip.skipped = sum(layer.counts[0] for layer in skip.layers) / (skip.layers[0].counts[1] * skip.total)
    return outputs


def _calibrate(model: nn.Module, skip: FFNSkip, calls: Sequence[Call], target: float, tau: float | None) -> None:
    """Set the threshold by which the share is skipped that is asked for, and measure what that does."""
    for layer in skip.layers:
        layer.cosines = []
    whole = _run(model, skip, calls, _NEVER)
    # Were what a token does the same whatever others skip, it would skip where its largest cosine so far is enough.
    rows = torch.stack([torch.cat([c.flatten() for c in layer.cosines or ()]) for layer in skip.layers[:-1]])
    reached = rows.cummax(0).values.flatten().sort(descending=True).values
    for layer in skip.layers:
        layer.cosines = None
    if tau is not None:
        outputs = _run(model, skip, calls, tau)
    elif target == 0:
        outputs = _run(model, skip, calls, _NEVER)
    else:
        low, high = 0, len(reached) - 1
        place = min(high, round(target * rows.shape[1] * skip.total) - 1)
        for _ in range(_TRIES):
            outputs = _run(model, skip, calls, float(reached[place]))
            if abs(skip.skipped - target) <= _CLOSE or low >= high:
                break
            low, high = (low, max(low, place - 1)) if skip.skipped > target else (min(high, place + 1), high)
            guess = round(place * target / skip.skipped) if skip.skipped else high
            place = guess if low < guess < high else (low + high) // 2
    pairs = list(zip(outputs, whole, strict=True))
    changed = sum(float((one - two).square().sum()) for one, two in pairs)
    total = sum(float(two.square().sum()) for _, two in pairs)
    skip.error = (changed / total) ** 0.5 if changed else 0.0

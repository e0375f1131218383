"""Watches the attention of one forward pass, whatever library wrote it, without changing the pass.

There are two watchers, this one and :class:`~lightning_efficient.attention.trace.Trace`, because what they promise
excludes each other. A trace answers which weights scale the logits: it computes all logits of a float64 copy, keeps
them with their autograd graph, cuts that graph, and may run the attention at another temperature. The probe sits in a
real training step: no bit, random number or gradient of it may change, and of each call it keeps a few numbers a head,
from a sample of queries, in float32. They share what they can: the calls that count as attention (``SOFTMAX``,
``Follower``), whose they are (``Owners``), how ``nn.MultiheadAttention`` makes queries, keys and masks
(:mod:`~lightning_efficient.attention.multihead`); a test holds that both find the same attentions under the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.attention.biases import Biases
from lightning_efficient.attention.multihead import rows_of_multihead
from lightning_efficient.attention.owners import ROOT, Owners, scripted_attention
from lightning_efficient.attention.sdpa import Limits, rows_of_sdpa
from lightning_efficient.attention.softmax import SOFTMAX, Follower, rows_of_softmax
from lightning_efficient.common.eager import uncompiled
from lightning_efficient.metrics.functional import AttentionRows

Kind = Literal["scaled_dot_product_attention", "multi_head_attention_forward", "softmax"]
_READERS: dict[Callable[..., Any], tuple[Kind, Callable[..., AttentionRows]]] = {
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", rows_of_sdpa),
    F.multi_head_attention_forward: ("multi_head_attention_forward", rows_of_multihead),
}


@dataclass(frozen=True)
class AttentionCall:
    """One attention call that was read.

    Args:
        site: Name of the module that made it; ``"(model)"`` if no submodule was running, and ``"...#2"`` for
            the second call of one module within the pass.
        kind: How it was written.
        rows: What was measured, on the call's device.
    """

    site: str
    kind: Kind
    rows: AttentionRows


class AttentionProbe(TorchFunctionMode):
    """Context manager around one forward: records the entropy and logit norms of every attention call it can read.

    Reads ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``,
    ``nn.TransformerEncoder``) and softmax followed by a matrix product, before dropout, in float32. The pass computes
    the same numbers with the probe as without, to the bit, and draws the same random numbers; two exceptions where the
    probe makes torch take another of its own ways: the inference fast path of ``nn.TransformerEncoder`` is off, and
    compiled code runs eagerly. torch runs backward with function modes off, so calls that activation checkpointing
    repeats are not read a second time. Forwards in other threads (``nn.DataParallel``) are not seen.

    Args:
        model: Sites are named relative to it.
        max_samples: Measure this many samples of the batch, from the first. ``None``: all.
        max_queries: Measure at most this many evenly spaced queries of a call. ``None``: all.
        keep: Which sites to measure, by module name. ``None``: all.

    Raises:
        ValueError: ``max_samples`` or ``max_queries`` below 1.

    Example:
        >>> with AttentionProbe(model) as probe:
        ...     model(images)
        >>> {call.site: call.rows.entropy.mean() for call in probe.calls}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_samples: int | None = None,
        max_queries: int | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("max_samples", max_samples), ("max_queries", max_queries)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected at least 1, or None for all.")
        self.calls: list[AttentionCall] = []
        self._keep = keep or (lambda name: True)
        self.unread: dict[str, str] = {name: w for name, w in scripted_attention(model).items() if self._keep(name)}
        self._limits = Limits(max_samples, max_queries)
        self._owners = Owners(model)
        self._follower: Follower[AttentionCall] = Follower()
        self._biases = Biases()
        self._unconfirmed: dict[str, str] = {}
        self._reading = True
        self._visits: Counter[str] = Counter()
        self._exits = ExitStack()

    def __enter__(self) -> AttentionProbe:
        self._exits.enter_context(uncompiled())
        self._exits.enter_context(self._owners)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self.pause()
        self._exits.close()

    def pause(self) -> None:
        """Stop reading and remove the hooks, for a caller that cannot leave the context just now."""
        self._reading = False
        self._owners.release()
        self._follower, self._biases = Follower(), Biases()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the call as it is, then read its arguments."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _READERS or func in SOFTMAX:
            if self._reading and self._keep(self._owners.current):
                self._read(func, args, kwargs, out)
        elif (call := self._follower.see(func, args, kwargs, out)) is not None:
            self._add(call)
        elif self._reading:
            self._biases.see(func, args, kwargs, out)
        return out

    @property
    def report(self) -> str:
        """What the pass held that could not be read, in one sentence for the user; empty if nothing."""
        sites = [call.site.partition("#")[0] for call in self.calls]
        silent = [name for name in self._owners.silent([*sites, *self.unread, *self._unconfirmed]) if self._keep(name)]
        parts = [f"{site}: {why}" for site, why in (self.unread | self._unconfirmed).items()]
        if self.calls or self.unread or self._unconfirmed:
            silent = [name for name in silent if name]  # the model itself, which attends as "(model)"
        if silent:
            parts.append(f"no attention call was seen in {_some([name or ROOT for name in silent])}")
        if not parts and not self.calls:
            parts.append("no attention call was seen at all")
        if not parts:
            return ""
        return (
            f"{'; '.join(parts)}. Readable are F.scaled_dot_product_attention, "
            "nn.MultiheadAttention, and softmax over the last axis followed by a matrix product; not "
            "flex_attention, custom kernels or exp/sum written by hand."
        )

    @torch.no_grad()
    def _read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        site = self._owners.current or ROOT
        if func in SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            if _over_channels(logits, self._biases.summed(logits), self._owners.shape):
                self.unread[site] = "attends over channels, not tokens (cross-covariance)"
                return
            rows = rows_of_softmax(self._limits, self._biases, *args, **kwargs)
            if rows is not None:
                self._follower.start(out, AttentionCall(site, "softmax", rows))
                if out.dim() >= 4:
                    shape = tuple(out.shape)
                    self._unconfirmed[site] = f"a softmax of shape {shape} is not a product's left factor"
            return
        kind, read = _READERS[func]
        try:
            self._add(AttentionCall(site, kind, read(self._limits, *args, **kwargs)))
        except (ValueError, TypeError) as why:  # what the shape checks say; the user's own call went through
            self.unread[site] = str(why)

    def _add(self, call: AttentionCall) -> None:
        """Keep a call for good; a module's further calls within the pass are numbered."""
        self._unconfirmed.pop(call.site, None)
        self._visits[call.site] += 1
        if (visit := self._visits[call.site]) > 1:
            call = replace(call, site=f"{call.site}#{visit}")
        self.calls.append(call)


def _over_channels(logits: Any, summed: int | None, given: tuple[int, ...]) -> bool:
    """Whether the product before a softmax summed over the tokens, and left a head's channels against each other."""
    if summed is None or logits.dim() != 4 or logits.shape[-1] != logits.shape[-2] or len(given) not in (3, 4):
        return False
    width, heads = logits.shape[-1], logits.shape[1]
    layouts = [(given[1], given[2])] if len(given) == 3 else []
    if len(given) == 4:
        layouts = [(given[1] * given[2], given[3]), (given[2] * given[3], given[1])]
    return width != summed and any((summed, heads * width) == layout for layout in layouts)


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(name) for name in names[:count]) + more

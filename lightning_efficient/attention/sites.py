"""Every attention of a model, whatever library wrote it, and how its logits can be scaled."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_efficient.attention.knobs import (
    MASK_GAP,
    Graph,
    Knob,
    NoKnobError,
    are_knobs,
    find_knobs,
    over_channels,
    reaches_weights,
)
from lightning_efficient.attention.owners import ROOT, head_count
from lightning_efficient.attention.trace import Seen, Trace
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.nests import mapped, tensors_behind
from lightning_efficient.common.running import Float64, float64_copy, forget
from lightning_efficient.folding.probes import Probe, capture

# Numbers that are drawn at a time: as many as a cache holds.
_NOISE = 1 << 16
# Below most weights that a network computes with: logits of next to nothing would hide that they are capped.
_NOTHING = 5e-3


@dataclass(frozen=True)
class AttentionSite:
    """A module that attends.

    Args:
        name: Its name; ``"(model)"`` for the model itself.
        kind: The torch function it calls: ``"scaled_dot_product_attention"``, ``"multi_head_attention_forward"`` or
            ``"softmax"``.
        calls: Attention calls in one forward.
        heads: Number of heads, where the shape of its logits says so.
        causal: Whether no query sees a later key.
        cross: Whether queries and keys come from different tensors, where that can be told.
        knobs: The weights that together scale its logits; empty: a forward adapter has to.
        why: Why there are no knobs.
        refused: Why its temperature cannot be changed at all; empty: it can.
    """

    name: str
    kind: str
    calls: int = 1
    heads: int | None = None
    causal: bool | None = None
    cross: bool | None = None
    knobs: tuple[Knob, ...] = ()
    why: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Reference:
    """A pass of a float64 copy that is as the model is, to compare with others of the same copy.

    Args:
        twin: The copy.
        probe: Its arguments.
        calls: All its calls of attention, and of softmaxes that are none, without their graphs.
        outputs: What the model returned.
        blind: Sites with queries that see no key.
    """

    twin: nn.Module
    probe: Probe
    calls: list[Seen]
    outputs: list[Tensor]
    blind: list[str]


@dataclass(frozen=True)
class Attention:
    """What :func:`find_attention` found.

    Args:
        sites: Name -> attention, in the order of the forward.
        skipped: Name -> what looked a little like attention and is not.
        reference: The pass in which it was found.
    """

    sites: dict[str, AttentionSite]
    skipped: dict[str, str]
    reference: Reference = field(repr=False, compare=False)

    def again(self, by_head: Sequence[str], by_keys: Sequence[str] = ()) -> Attention:
        """Look once more, with other questions; see :func:`find_attention`."""
        return _Search(self.reference.twin, self.reference.probe, by_head, by_keys, alike=True).result()


def as_probe(model: nn.Module, example: Any) -> Probe:
    """The arguments that the model is called with.

    Args:
        model: The model.
        example: A tensor; a tuple or list of arguments, a mapping of named ones; or a function that calls the model.

    Raises:
        ValueError: The function did not call the model, or not with tensors.
    """
    if isinstance(example, Probe):
        return example
    if isinstance(example, Tensor):
        return Probe("the example", (example,), {})
    if isinstance(example, Mapping):
        return Probe("the example", (), dict(example))
    if isinstance(example, list | tuple):
        return Probe("the example", tuple(example), {})
    if not callable(example):
        raise ValueError(
            f"`example` is a {type(example).__name__}; expected a tensor, a tuple of arguments, a dict of named "
            "arguments, or a function that calls the model."
        )
    return capture(model, example)


def run_float64(model: nn.Module, probe: Probe) -> Any:
    """Forward of a float64 copy in evaluation mode.

    Args:
        model: The copy.
        probe: Its arguments.

    Raises:
        ValueError: It fails.
    """

    def double(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value

    forget(model)
    try:
        with Float64():
            return model(*mapped(probe.args, double), **mapped(probe.kwargs, double))
    except Exception as why:
        raise ValueError(
            "the model does not run in float64 on the example, so nothing about it can be checked: "
            f"{type(why).__name__}: {why}"
        ) from why


def traced(twin: nn.Module, probe: Probe, **options: Any) -> Trace:
    """Forward of a float64 copy, as :func:`run_float64`, with its attention and its outputs.

    Args:
        twin: The copy.
        probe: Its arguments.
        options: Of the :class:`~lightning_efficient.attention.trace.Trace`.
    """
    with Trace(twin, **options) as trace:
        result = run_float64(twin, probe)
    trace.outputs = [t.detach().clone() for t in tensors_behind(result)]
    return trace


@torch.inference_mode(False)
def find_attention(
    model: nn.Module, example: Any, *, by_head: Sequence[str] = (), by_keys: Sequence[str] = (), alike: bool = False
) -> Attention:
    """Find every attention that runs on an example, and the weights that scale its logits.

    Nothing is known about libraries here: queries, keys and logits are watched on a float64 copy of the model, and the
    weights are found from the gradients. The copy has the model's weights, but for random numbers in the place of
    those that hide something: a zero hides a bias, and what is behind a gate that is shut; a one, behind one that is
    open. The others stay, as a clamp may hold there alone.

    Args:
        model: Not touched.
        example: See :func:`as_probe`; a small batch of at least two tokens.
        by_head: Sites whose knobs are cut by heads.
        by_keys: Sites whose knobs are to be looked for in the keys only (MViT adds its queries to its output).
        alike: For who proves what is found: where a site looks like one before, take the same weights, if its logits
            are proportional to them as well, and do not look for others. Its ``cross`` is None then.

    Raises:
        ValueError: The model does not run in float64.
    """
    probe = as_probe(model, example)
    twin = perturbed(float64_copy(model), _NOTHING)
    return _Search(twin, probe, by_head, by_keys, alike).result()


def perturbed(model: nn.Module, below: float = math.inf) -> nn.Module:
    """Add small random numbers, from an own generator, to every parameter, in place: a zero hides what it is for.

    Args:
        model: Statistics of batch norms are moved as well, upwards.
        below: Only to numbers of at most this magnitude, and to ones.
    """
    generator = torch.Generator().manual_seed(0)
    statistics = [
        s
        for m in model.modules()
        if isinstance(m, _BatchNorm)
        for s in (m.running_mean, m.running_var)
        if s is not None
    ]
    with torch.no_grad():
        for tensor in [*(p for p in model.parameters() if p.is_floating_point()), *statistics]:
            rows = _NOISE // max(tensor[:1].numel(), 1) if tensor.ndim else 0
            for part in torch.split(tensor, max(rows, 1)) if tensor.ndim else [tensor.view(1)]:
                places = ((part.abs() <= below) | (part == 1)).nonzero(as_tuple=True)
                noise = 0.02 * torch.randn(len(places[0]), generator=generator).to(part)
                part.index_put_(places, noise if tensor.requires_grad else noise.abs(), accumulate=True)
    return model


class _Search:
    """Traces of one perturbed copy, cut at the modules that attend, or further out where those project nothing."""

    def __init__(
        self, twin: nn.Module, probe: Probe, by_head: Sequence[str], by_keys: Sequence[str], alike: bool
    ) -> None:
        self.twin, self.probe, self.by_head, self.by_keys = twin, probe, set(by_head), set(by_keys)
        self.alike = alike
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.parameters = {canonical_name(n): p for n, p in twin.named_parameters()}
        self.modules, self.projections = modules_by_name(twin), _projections(twin)
        self.known: dict[Hashable, tuple[str, tuple[Knob, ...]]] = {}  # look of a site -> its cut, and its knobs
        self.found: dict[str, AttentionSite] = {}
        with torch.enable_grad():
            self._look(self._guess() or self._trace(()))

    def _trace(self, cut: Collection[str]) -> Trace:
        return traced(self.twin, self.probe, cut=cut, products=True)

    def _guess(self) -> Trace | None:
        """The trace cut at what says that it has heads, if that is what attends, and nothing else looks like it."""
        heads = [canonical_name(name) for name, module in self.twin.named_modules() if name and head_count(module)]
        inner = [name for name in heads if not any(other.startswith(f"{name}.") for other in heads)]
        trace = self._trace(inner) if inner else None
        if trace is None or set(trace.sites) != set(inner) or trace.others or trace.silent or trace.unread:
            return None
        return trace

    def _look(self, trace: Trace) -> None:
        """Try every site with the cut at its own module, then at its parent's, until there are weights behind it.

        Args:
            trace: The first one, cut anywhere; not kept, as it holds a whole graph.
        """
        self.order, self.others, self.silent, self.unread = trace.sites, trace.others, trace.silent, trace.unread
        self.mixing = trace.mixing
        calls = [call.alone() for call in trace.every]
        self.reference = Reference(self.twin, self.probe, calls, trace.outputs, list(trace.blind))
        cuts = {site: site for site in self.order}
        while cuts:
            wanted = {cut for cut in cuts.values() if cut not in (ROOT, "")}
            if trace.cut != wanted:
                del trace  # before there is another
                trace = self._trace(wanted)
            graph = Graph(self.parameters, trace.aliases)
            again = {}
            for site, cut in cuts.items():
                if (found := self._judge(site, cut, trace.of(site), graph)) is None:
                    again[site] = cut.rpartition(".")[0]
                else:
                    self.found[site] = found
                graph.forget()
            cuts = again
        self.found = {site: self.found[site] for site in self.order}

    def _judge(self, site: str, cut: str, calls: list[Seen], graph: Graph) -> AttentionSite | None:
        """What is found at a site; None: nothing, as no weights lie behind the cut."""
        first, look = calls[0], self._look_of(site, cut, calls)
        knobs = self._proposed(look, cut)
        if not (knobs and are_knobs(knobs, calls, graph)):
            knobs = ()
            if cut not in (ROOT, "") and not reaches_weights(calls, graph):
                return None
        heads = first.logits.shape[1] if first.logits.dim() == 4 else None
        facts: dict[str, Any] = {"kind": first.kind, "calls": len(calls), "heads": heads, "causal": _is_causal(calls)}
        facts["cross"] = None if knobs else _is_cross(first, graph)
        if over_channels(calls, graph, self.projections):
            return AttentionSite(site, **facts, refused="attends over channels, not tokens (cross-covariance)")
        if site in self.others:
            shapes = sorted(self.others[site])
            return AttentionSite(site, **facts, refused=f"another softmax, of shape {shapes}, runs beside attention's")
        try:
            knobs = knobs or find_knobs(calls, graph, heads if site in self.by_head else None, site in self.by_keys)
        except NoKnobError as why:
            return AttentionSite(site, **facts, why=str(why))
        if self.alike:
            self.known.setdefault(look, (cut, knobs))
        return AttentionSite(site, **facts, knobs=knobs)

    def _look_of(self, site: str, cut: str, calls: Sequence[Seen]) -> Hashable:
        """What sites have in common that are likely to have their knobs in the same places."""
        module = self.modules["" if cut == ROOT else cut]
        shapes = tuple((canonical_name(name), p.shape) for name, p in module.named_parameters())
        asked = site in self.by_head, site in self.by_keys
        return type(module), shapes, site.removeprefix(cut), asked, tuple(call.logits.shape for call in calls)

    def _proposed(self, look: Hashable, cut: str) -> tuple[Knob, ...]:
        """The knobs of a site that looks the same, at the same places of this one, whatever they are there."""
        other, knobs = self.known.get(look, ("", ()))
        inside = all(knob.parameter.startswith(f"{other}.") for knob in knobs)
        mine = [replace(knob, parameter=f"{cut}.{knob.parameter.removeprefix(f'{other}.')}") for knob in knobs]
        return tuple(mine) if inside and all(knob.parameter in self.parameters for knob in mine) else ()

    def result(self) -> Attention:
        """The sites, those that attend in a way that cannot be read among them, and what is none."""
        sites, skipped = dict(self.found), {}
        for name in [name for name in self.others if name not in sites]:
            reason = "its softmax is not of a product of queries and keys"
            if head_count(self.modules.get(name)):
                sites[name] = AttentionSite(name, "softmax", refused=reason)
            else:
                skipped[name] = reason
        # The whole model knows its number of heads, too.
        for name in [name for name in self.silent if name and name not in sites and name not in skipped]:
            sites[name] = AttentionSite(name, "unknown", refused="has heads, but no softmax attention was seen in it")
        sites |= {name: AttentionSite(name, "unknown", refused=why) for name, why in self.unread.items()}
        why = "it multiplies products of activations, as attention does, but with no softmax over the last axis"
        skipped |= {name: why for name in self.mixing if name not in sites and name not in skipped}
        return Attention(sites, skipped, self.reference)


def _projections(model: nn.Module) -> dict[str, int]:
    """Parameters that multiply activations -> the axis of their outputs."""
    table: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 0, nn.Conv2d: 0, nn.Conv3d: 0}
    if (library := sys.modules.get("transformers.pytorch_utils")) is not None:
        table[library.Conv1D] = 1
    return {
        canonical_name(f"{name}.weight"): axis
        for name, module in model.named_modules()
        for kind, axis in table.items()
        if isinstance(module, kind)
    }


def _is_causal(calls: Sequence[Seen]) -> bool:
    """No query sees a key after its own, and some key is hidden that way."""
    square = [call.logits for call in calls if call.logits.shape[-1] == call.logits.shape[-2] > 1]
    seen = [logits > logits.amax(-1, keepdim=True) - MASK_GAP for logits in square]
    return bool(seen) and not any(bool(mask.triu(1).any()) for mask in seen)


def _is_cross(call: Seen, graph: Graph) -> bool | None:
    """Whether queries and keys reach no leaf in common."""
    if call.q is None or call.k is None:
        return None
    leaves = [graph.behind(t)[1] for t in (call.q, call.k)]
    used = [{i for i, gradient in enumerate(found) if gradient is not None} for found in leaves]
    return used[0].isdisjoint(used[1]) if all(used) else None

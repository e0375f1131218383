"""The proof that scaled weights and adapters do what dividing the logits does, on float64 copies of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install, installed, remove
from lightning_efficient.attention.knobs import MASK_GAP
from lightning_efficient.attention.owners import ROOT
from lightning_efficient.attention.sites import Reference, traced
from lightning_efficient.attention.temper import Law, keys_seen
from lightning_efficient.attention.trace import Seen
from lightning_efficient.common.comparing import gap
from lightning_efficient.common.match import modules_by_name, parameters_by_name
from lightning_efficient.weightspace import Block

# Relative; two float64 forwards that differ in the order of a multiplication are a thousand times closer.
_TOLERANCE = 1e-11

Factors = Mapping[str, Mapping[Block, float]]


@dataclass
class Verdict:
    """What a comparison found.

    Args:
        wrong: Site (or ``"output"``) -> what differs.
        error: Largest relative difference.
        entropy: Site -> mean entropy of its attention in nats, at temperature 1 and at its own, on the same inputs.
        blind: Sites some of whose queries see no key on the example; these were not judged.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    entropy: dict[str, tuple[float, float]] = field(default_factory=dict)
    blind: list[str] = field(default_factory=list)


@torch.inference_mode(False)
@torch.no_grad()
def verify(reference: Reference, laws: Mapping[str, Law], factors: Factors, adapters: Sequence[str]) -> Verdict:
    """Compare the model whose logits are multiplied, call by call, with the one whose weights and forwards are changed.

    Every call of the changed model is compared with the reference's, its logits multiplied, and then has the
    reference's result: so all calls are compared on the same inputs, and what else the changed weights move shows in
    the logits of a later call or in the output. Where the factor goes by the number of keys, adapters write the same
    attention in another way, and two whole passes are compared.

    Args:
        reference: Its copy of the model is changed, and comes back as it was.
        laws: Site -> how its logits are to be multiplied.
        factors: Parameter -> block -> what it is multiplied by.
        adapters: Sites that get a forward adapter, with their law.
    """
    verdict, twin, probe = Verdict(blind=list(reference.blind)), reference.twin, reference.probe
    if all(law.mode == "constant" for law in laws.values()):
        given, outputs = reference.calls, reference.outputs
        calls = [call.under(laws[call.site]) if call.site in laws else call for call in given]
    else:
        whole = traced(twin, probe, laws=laws)
        given, calls, outputs = [], whole.every, whole.outputs
    with _changed(twin, laws, factors, adapters):
        found = traced(twin, probe, given=given)
    _compare(verdict, (calls, outputs), (found.every, found.outputs))
    _entropies(verdict, laws, calls)
    return verdict


@contextmanager
def _changed(twin: nn.Module, laws: Mapping[str, Law], factors: Factors, adapters: Sequence[str]) -> Iterator[None]:
    """A model with other weights and forwards, inside this context."""
    parameters, modules = parameters_by_name(twin), modules_by_name(twin)
    adapted = [(modules["" if site == ROOT else site], laws[site]) for site in adapters]
    saved = {name: parameters[name].detach().clone() for name in factors}
    try:
        scale_blocks(parameters, factors)
        for module, law in adapted:
            install(twin, module, law)
        yield
    finally:
        for name, value in saved.items():
            parameters[name].data.copy_(value)
        for module, _ in adapted:
            if installed(module):
                remove(twin, module)


@torch.no_grad()
def scale_blocks(parameters: Mapping[str, Tensor], factors: Factors) -> None:
    """Multiply blocks of parameters in place.

    Args:
        parameters: Name -> parameter.
        factors: Name -> block -> factor.
    """
    for name, blocks in factors.items():
        for block, factor in blocks.items():
            block.of(parameters[name].data).mul_(factor)


def module_at(model: nn.Module, site: str) -> nn.Module:
    """The module of a site."""
    return modules_by_name(model)["" if site == ROOT else site]


def _compare(verdict: Verdict, expected: Any, found: Any) -> None:
    (calls, outputs), (other_calls, other_outputs) = expected, found
    pairs = [(one.site, one, two) for one, two in zip(calls, other_calls, strict=False)]
    if [c.site for c in calls] != [c.site for c in other_calls]:
        verdict.wrong["output"] = "other modules attended"
        return
    for site, one, two in pairs:
        _judge(verdict, site, "logits", *_visible(one, two))
        if one.kind == two.kind:  # an adapter may write the same attention in another way
            _judge(verdict, site, "result", one.out, two.out)
    if len(outputs) != len(other_outputs):
        verdict.wrong["output"] = "another number of outputs"
    for a, b in zip(outputs, other_outputs, strict=False):
        _judge(verdict, "output", "output", a, b)


def _visible(one: Seen, two: Seen) -> tuple[Tensor, Tensor]:
    """Logits that matter in the first; where masks differ by more than nothing, the results will say so."""
    if one.logits.shape != two.logits.shape:
        return one.logits, two.logits
    counts = one.logits > one.logits.amax(-1, keepdim=True) - MASK_GAP
    if counts.all():
        return one.logits, two.logits
    return torch.where(counts, one.logits, 0.0), torch.where(counts, two.logits, 0.0)


def _judge(verdict: Verdict, site: str, what: str, a: Tensor, b: Tensor) -> None:
    apart = gap(a, b)
    if not apart <= _TOLERANCE:
        verdict.wrong.setdefault(site, f"its {what} differs by {apart:.1e} (relative) from what logits / tau gives")
    verdict.error = max(verdict.error, apart)


def _entropies(verdict: Verdict, laws: Mapping[str, Law], calls: Sequence[Seen]) -> None:
    """Entropy at both temperatures, of the logits that came out at the second."""
    for site, law in laws.items():
        before, after = [], []
        for call in (c for c in calls if c.site == site):
            factor = law.of(keys_seen(call.logits))
            factor = factor.clamp(min=1e-9) if isinstance(factor, Tensor) else factor
            after.append(_entropy(call.logits))
            before.append(_entropy(call.logits / factor))
        verdict.entropy[site] = (_mean(before), _mean(after))


def _entropy(logits: Tensor) -> Tensor:
    weights: Tensor = torch.softmax(logits.double(), -1)
    return -torch.xlogy(weights, weights).sum(-1).flatten()


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).nanmean()) if parts else float("nan")

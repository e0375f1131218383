"""Which attentions TempScale changes and how: found by running the model, and proved in float64 before it is done."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_efficient.attention.adapter import compiled, installed
from lightning_efficient.attention.gradients import wrong_gradients
from lightning_efficient.attention.sites import Attention, AttentionSite, as_probe, find_attention
from lightning_efficient.attention.temper import Law, Mode
from lightning_efficient.attention.verify import Verdict, module_at, verify
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import REFERENCE, Choice, NoMatchError, canonical_name, references
from lightning_efficient.weightspace import Block

METHOD = "temp_scale"
# Plain data on the model that says what was done to it, so that copies and unpickled models can be undone as well.
MARK = "_temp_scale"


class TempScaleError(ValueError):
    """An attention whose temperature cannot be changed exactly; the message names it and says why."""


@dataclass(frozen=True)
class TempScaleConfig:
    """Hyper-parameters of TempScale.

    Args:
        tau: Temperature, or one per targeted attention in the order of the forward, or by their names (1 for others).
            1 changes nothing.
        mode: ``"constant"``, or a factor that grows with the number of keys a query sees: see
            :class:`~lightning_efficient.attention.temper.Law`.
        length: Number of keys at which ``mode="log_n"`` changes nothing.
        per_head: One learned temperature per head (only where every weight behind the logits divides by heads).
    """

    tau: float | Sequence[float] | Mapping[str, float] = 1.0
    mode: Mode = "constant"
    length: float = 512.0
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("constant", "log_n", "ssmax"):
            raise ValueError(f"TempScale(`mode`) takes 'constant', 'log_n' or 'ssmax'; got {self.mode!r}.")
        if not (math.isfinite(self.length) and self.length > 1):
            raise ValueError(f"TempScale(`length`) is {self.length!r}; expected a number of keys above 1.")
        tau = self.tau.values() if isinstance(self.tau, Mapping) else self.tau
        taus = [tau] if isinstance(tau, float | int) else list(tau)
        if not taus:
            raise ValueError(f"TempScale(`tau`) is {taus!r}; expected a number, or one for each attention.")
        for tau in taus:
            if not isinstance(tau, float | int) or isinstance(tau, bool) or not (math.isfinite(tau) and tau > 0):
                raise ValueError(
                    f"TempScale(`tau`) is {tau!r}; expected finite numbers above 0 (1: no change; below: sharper)."
                )

    def laws(self, sites: Sequence[str]) -> dict[str, Law]:
        """The law of every site.

        Raises:
            ValueError: ``tau`` is a list of another length.
        """
        if isinstance(self.tau, Mapping):
            return {site: Law(float(self.tau.get(site, 1.0)), self.mode, self.length) for site in sites}
        taus = [float(self.tau)] * len(sites) if isinstance(self.tau, float | int) else [float(t) for t in self.tau]
        if len(taus) != len(sites):
            raise ValueError(
                f"TempScale(`tau`) holds {len(taus)} temperatures for {len(sites)} attentions: {list(sites)}. Give one "
                "for each of these, in this order, or a single number."
            )
        return {site: Law(tau, self.mode, self.length) for site, tau in zip(sites, taus, strict=True)}


@dataclass
class Targets:
    """What TempScale would do to a model, proved to be exact.

    Args:
        sites: Name -> attention, those whose temperature changes.
        laws: Name -> how.
        factors: Parameter -> block -> what it is multiplied by.
        adapters: Site -> why it needs a forward adapter.
        skipped: Site -> why it is left alone.
        verdict: Of the self-check.
    """

    sites: dict[str, AttentionSite] = field(default_factory=dict)
    laws: dict[str, Law] = field(default_factory=dict)
    factors: dict[str, dict[Block, float]] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)

    def groups(self) -> list[list[str]]:
        """Sites that need one temperature because they share a parameter (T5's table of position biases)."""
        groups: list[tuple[list[str], set[str]]] = []
        for site in (s for s in self.sites if s not in self.adapters):
            mine, names = [site], {knob.parameter for knob in self.sites[site].knobs}
            for group in [g for g in groups if g[1] & names]:
                groups.remove(group)
                mine, names = group[0] + mine, group[1] | names
            groups.append((mine, names))
        return [sites for sites, _ in groups]

    def held_by(self, names: Collection[str]) -> dict[str, str]:
        """Sites whose temperature one of these parameters would hold, and the parameter."""
        knobs = [(s, knob) for s in self.sites if s not in self.adapters for knob in self.sites[s].knobs]
        return {site: knob.parameter for site, knob in knobs if knob.parameter in names}

    def change(self) -> Change:
        """The record of it."""
        change = Change(method=METHOD, skipped=dict(self.skipped))
        for name, law in self.laws.items():
            names = ", ".join(knob.parameter.removeprefix(f"{name}.") for knob in self.sites[name].knobs)
            how = f"by a forward adapter ({self.adapters[name]})" if name in self.adapters else f"in {names}"
            amount = f"tau = {law.tau:g}" if law.mode == "constant" else f"{law.mode}, tau = {law.tau:g}"
            unjudged = ", not checked for queries that see no key" if name in self.verdict.blind else ""
            change.targets[name] = f"{amount}, {how}{unjudged}"
        return change


def find_targets(
    model: nn.Module,
    example: Any,
    config: TempScaleConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    fixed: Collection[str] = (),
) -> Targets:
    """Find every attention, decide where its temperature goes, and prove on float64 copies that it is exact.

    Args:
        model: Not touched.
        example: A small batch as the model takes it: a tensor, a tuple of arguments, a dict of named ones, or a
            function that calls the model. At least two tokens.
        config: Hyper-parameters.
        include: Globs over the names of attention modules; None: all.
        exclude: Globs over names left alone.
        fixed: Names of parameters that are not to be written to: what they scale gets an adapter.

    Raises:
        NoMatchError: The model has no attention, or the globs leave none.
        TempScaleError: One cannot be scaled exactly, or the self-check failed.
        ValueError: ``tau`` has another length than there are attentions; the weights are quantized, the temperature
            was changed before, or the model does not run on the example in float64.
    """
    config = config or TempScaleConfig()
    _refuse(model)
    attention = find_attention(model, example, alike=True)
    names, skipped = _select(attention, include, exclude)
    idle = references(model)
    if not model.training and idle.issuperset(names):
        idle = set()  # evaluated as a whole, and nothing beside it that attends: the network itself (prompt tuning)
    skipped |= {name: REFERENCE for name in names if name in idle}
    names = [name for name in names if name not in idle]
    if not names:
        raise NoMatchError(f"{METHOD}: all attentions are {REFERENCE}: {sorted(skipped)[:5]}.")
    _refuse_sites([attention.sites[name] for name in names])
    by_head = names if config.per_head else []
    if by_head:
        attention = attention.again(by_head)
    targets = Targets({name: attention.sites[name] for name in names}, config.laws(names), skipped=skipped)
    for name, site in targets.sites.items():
        if config.mode != "constant":
            targets.adapters[name] = "the factor depends on the length"
        elif not site.knobs:
            targets.adapters[name] = site.why
    _prove(attention, targets, by_head)
    if frozen := targets.held_by(fixed):
        targets.adapters |= {site: f"{name!r} is in no optimizer" for site, name in frozen.items()}
        _prove(attention, targets, by_head)
    for name in targets.adapters:
        if compiled(module_at(model, name)):
            raise TempScaleError(
                f"the forward of {name!r} was replaced by a compiled function, around which an adapter cannot work. "
                "Compile the module (`module.compile()` or `torch.compile(model)`) instead."
            )
    return targets


def check_gradients(model: nn.Module, example: Any, targets: Targets) -> None:
    """Refuse adapters that would train with wrong gradients.

    Args:
        model: Not touched; in the mode that it trains in.
        example: See :func:`find_targets`.
        targets: What that returned.

    Raises:
        TempScaleError: Naming them.
    """
    if not targets.adapters:
        return
    if wrong := wrong_gradients(model, as_probe(model, example), list(targets.adapters)):
        raise TempScaleError(
            "the temperature would be right in the forward and wrong in the gradient of "
            + "; ".join(f"{name!r} ({why})" for name, why in list(wrong.items())[:4])
            + ". Does its forward checkpoint its own attention, or use an autograd.Function? To train with the others: "
            f"exclude={list(wrong)}."
        )


# -- choosing ----------------------------------------------------------------------------------------------------------


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if MARK in vars(module) or installed(module) is not None:
            trained = not any(MARK in vars(m) for m in model.modules())
            raise ValueError(
                f"the temperature of {canonical_name(name) or 'this model'!r} was changed before"
                + (", when it was trained. " if trained else ". Undo that with `remove_temp_scale` first: ")
                + "Two temperatures would multiply."
            )
        packed = "_packed_params" in vars(module)
        for attribute, parameter in module.named_parameters(recurse=False):
            if (
                packed
                or parameter.is_quantized
                or not parameter.is_floating_point()
                or type(parameter.data) is not Tensor
            ):
                raise ValueError(
                    f"{canonical_name(f'{name}.{attribute}').lstrip('.')!r} is quantized ({parameter.dtype}, "
                    f"{type(parameter.data).__name__}): its values can be neither scaled nor checked. Change the "
                    "temperature first, then quantize."
                )
        if packed:
            raise ValueError(f"{name!r} is quantized. Change the temperature first, then quantize.")


def _select(
    attention: Attention, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """Names of the attentions to change, and why the others are not."""
    if not attention.sites:
        more = "".join(f" {name}: {why}." for name, why in list(attention.skipped.items())[:5])
        raise NoMatchError(f"TempScale: no attention was seen when the example ran.{more}")
    choice = Choice(attention.sites, include, exclude, METHOD, "attention")
    left = {name: why for name in attention.sites if (why := choice.why_not(name))}
    names, skipped = [name for name in attention.sites if name not in left], dict(attention.skipped) | left
    if not names:
        raise NoMatchError(f"TempScale: `include` and `exclude` leave none of {list(attention.sites)[:8]}.")
    return names, skipped


def _refuse_sites(sites: Sequence[AttentionSite]) -> None:
    if refused := [site for site in sites if site.refused]:
        raise TempScaleError(
            "no exact temperature for "
            + "; ".join(f"{site.name!r} ({site.refused})" for site in refused[:6])
            + (f"; and {len(refused) - 6} more" if len(refused) > 6 else "")
            + (
                f". To change the other attentions: exclude={[site.name for site in refused]}."
                if len(refused) < len(sites)
                else ". These are all that it was to change: use another method here."
            )
        )


# -- proving -----------------------------------------------------------------------------------------------------------


def _prove(attention: Attention, targets: Targets, by_head: Sequence[str]) -> None:
    """Fill in ``factors``; what weights do not scale exactly goes to adapters; give up where those do not either."""
    _weigh(attention, targets)
    trivial = all(law == Law() for law in targets.laws.values())
    laws = {name: Law(0.5) for name in targets.laws} if trivial else targets.laws
    targets.verdict = _try(attention, targets, laws)
    if targets.verdict.wrong:
        _sort_out(attention, targets, laws, by_head)
        targets.verdict = _try(attention, targets, laws)
    if wrong := targets.verdict.wrong:
        raise TempScaleError(
            "the self-check failed, nothing was changed: "
            + "; ".join(f"{name!r}: {why}" for name, why in list(wrong.items())[:6])
            + f". Exclude what is at fault, if the rest is enough: exclude={[n for n in wrong if n != 'output']}."
        )
    _check_entropy(targets.verdict, laws)


def _sort_out(attention: Attention, targets: Targets, laws: Mapping[str, Law], by_head: Sequence[str]) -> None:
    """Try the attentions one by one; those whose queries feed something else, too, by their keys, or by an adapter."""

    def wrong_alone(group: Sequence[str], found: Attention) -> dict[str, str]:
        alone = Targets({s: found.sites[s] for s in group}, {s: laws[s] for s in group})
        _weigh(found, alone)
        return _try(found, alone, alone.laws).wrong

    failed = {tuple(group): wrong for group in targets.groups() if (wrong := wrong_alone(group, attention))}
    sites = [site for group in failed for site in group]
    other = attention.again(by_head, by_keys=sites) if sites else attention
    for group, wrong in failed.items():
        if all(other.sites[site].knobs for site in group) and not wrong_alone(group, other):
            attention.sites.update({site: other.sites[site] for site in group})
            targets.sites.update({site: other.sites[site] for site in group})
        else:
            why = next((wrong[site] for site in group if site in wrong), "they feed more than the logits")
            targets.adapters |= dict.fromkeys(group, f"scaling {_names(targets, group)} is not exact: {why}")
    _weigh(attention, targets)


def _weigh(attention: Attention, targets: Targets) -> None:
    """Which blocks are multiplied by what. Attentions that need a parameter at two scales are left to adapters."""
    users: dict[str, set[str]] = {}
    for site in attention.sites.values():
        for knob in site.knobs:
            users.setdefault(knob.parameter, set()).add(site.name)
    changed = True
    while changed:
        changed = False
        for name in [n for n in targets.laws if n not in targets.adapters]:
            for knob in targets.sites[name].knobs:
                rest = sorted(users[knob.parameter] - {name})
                other = [n for n in rest if n in targets.adapters or targets.laws.get(n) != targets.laws[name]]
                if other:
                    targets.adapters[name] = f"{knob.parameter!r} also scales {other[0]!r}, at another temperature"
                    changed = True
    targets.factors = {}
    for name in [n for n in targets.laws if n not in targets.adapters]:
        for knob in targets.sites[name].knobs:
            blocks = targets.factors.setdefault(knob.parameter, {})
            blocks.update(dict.fromkeys(knob.blocks, targets.laws[name].factor))


def _try(attention: Attention, targets: Targets, laws: Mapping[str, Law]) -> Verdict:
    factors = {
        name: dict.fromkeys(blocks, 2.0) if laws is not targets.laws else blocks
        for name, blocks in targets.factors.items()
    }
    return verify(attention.reference, laws, factors, list(targets.adapters))


def _names(targets: Targets, group: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(knob.parameter for site in group for knob in targets.sites[site].knobs))


def _check_entropy(verdict: Verdict, laws: Mapping[str, Law]) -> None:
    for name, (before, after) in verdict.entropy.items():
        law = laws[name]
        if law.mode != "constant" or law.tau == 1.0:
            continue
        if not (after < before if law.tau < 1 else after > before):
            raise TempScaleError(
                f"{name!r}: entropy {before:.6g} -> {after:.6g} nats at tau = {law.tau:g}. On the example its "
                "attention is uniform or sees a single key, so nothing about its temperature can be checked. Give an "
                f"example with more tokens, or exclude=[{name!r}]."
            )

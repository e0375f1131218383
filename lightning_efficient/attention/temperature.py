"""TempScale: softmax(QKᵀ / (τ √d)) in every attention of a model (Zhou et al., ACL 2025, arXiv 2410.24200).

τ < 1 sharpens attention, which low-pass filters long texts less; no training is needed. The published code patches
three classes of an old version of one library and leaves other models as they are, without a word. Here every
attention is found by running the model; the temperature goes into the weights behind the logits, biases on the logits
included, where that is exact, and into a forward adapter where not; it is proved in float64 before anything changes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from lightning_efficient.attention.adapter import LOST, install, installed, remove
from lightning_efficient.attention.owners import ROOT
from lightning_efficient.attention.temper import Law, Mode
from lightning_efficient.attention.temperature_targets import (
    MARK,
    METHOD,
    Targets,
    TempScaleConfig,
    TempScaleError,
    check_gradients,
    find_targets,
)
from lightning_efficient.attention.verify import module_at, scale_blocks
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.running import forget
from lightning_efficient.common.saving import allow_saving, refuse_saving
from lightning_efficient.weightspace import Block, ScaleTransform, Temperature

__all__ = [
    "METHOD",
    "Targets",
    "TempScaleConfig",
    "TempScaleError",
    "apply_temp_scale",
    "carriers",
    "check_gradients",
    "find_targets",
    "hold_in_weights",
    "install_targets",
    "keep_saving_honest",
    "make_transforms",
    "remove_temp_scale",
]


def apply_temp_scale(
    model: nn.Module,
    tau: float | Sequence[float] = 1.0,
    example: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    mode: Mode = "constant",
    length: float = 512.0,
) -> Change:
    """Change the temperature of a model's attention, in place and exactly, for evaluation.

    Weights keep their identity; ``tau=1`` leaves every bit as it is. :func:`remove_temp_scale` undoes it to the bit.

    Args:
        model: Changed at the end, after every check.
        tau: Temperature: the logits are divided by it, biases on them included. Or one per attention.
        example: See :func:`find_targets`.
        include: Globs over the names of attention modules; None: all.
        exclude: Globs over names left alone.
        mode: ``"constant"``, ``"log_n"`` or ``"ssmax"``.
        length: Number of keys at which ``"log_n"`` changes nothing.

    Raises:
        ValueError: See :func:`find_targets` and :class:`TempScaleConfig`. The model is unchanged then.
    """
    targets = find_targets(model, example, TempScaleConfig(tau, mode, length), include, exclude)
    install_targets(model, targets)
    return targets.change()


@torch.no_grad()
def install_targets(model: nn.Module, targets: Targets, weights: bool = True) -> None:
    """Do to a model what :func:`find_targets` found.

    Args:
        model: Changed in place.
        targets: What to do.
        weights: Also multiply weights; False: only put adapters on (the weights are an optimizer boundary's then).
    """
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    factors = {n: {b: f for b, f in blocks.items() if f != 1.0} for n, blocks in targets.factors.items() if weights}
    originals = {
        name: [(b.start, b.length, b.dim, f, b.of(parameters[name].detach()).clone()) for b, f in blocks.items()]
        for name, blocks in factors.items()
        if blocks
    }
    adapters = [site for site in targets.adapters if targets.laws[site] != Law()]
    scale_blocks(parameters, factors)
    for site in adapters:
        install(model, module_at(model, site), targets.laws[site])
    setattr(model, MARK, {"originals": originals, "adapters": adapters})
    keep_saving_honest(model, originals)
    forget(model)


def keep_saving_honest(model: nn.Module, scaled: Collection[str]) -> None:
    """Have ``save_pretrained`` of PEFT's models refuse, which writes adapters alone, if that loses a scaled weight.

    Args:
        model: The model.
        scaled: Names of the parameters that hold a temperature.
    """
    for owner, lost in _unwritten(model).items():
        if not lost.isdisjoint(scaled):
            refuse_saving(model, MARK, LOST, [owner])


def _unwritten(model: nn.Module) -> dict[nn.Module, set[str]]:
    """PEFT's models -> their parameters that ``save_pretrained`` does not write."""
    found: dict[nn.Module, set[str]] = {}
    if (peft := sys.modules.get("peft")) is not None:
        names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        for owner in (module for module in model.modules() if isinstance(module, peft.PeftModel)):
            state = peft.get_peft_model_state_dict(owner, save_embedding_layers=False)
            written = {tensor.data_ptr() for tensor in state.values()}
            found[owner] = {names[id(p)] for p in owner.parameters() if p.data_ptr() not in written}
    return found


@torch.no_grad()
def hold_in_weights(model: nn.Module, example: Any) -> dict[str, str]:
    """Have weights hold what adapters do in a model that is not trained on: frozen ones, too, may change then.

    Only what is a number for each attention, and exact in the weights, as for :func:`apply_temp_scale`; other adapters
    stay.

    Args:
        model: Changed in place.
        example: See :func:`find_targets`.

    Returns:
        Attentions whose adapters stay, and why.

    Raises:
        ValueError: See :func:`find_targets`. The model is unchanged then.
    """
    modules = modules_by_name(model)
    forwards = {name or ROOT: forward for name, module in modules.items() if (forward := installed(module))}
    taus = {site: tau for site, forward in forwards.items() if (tau := forward.law.number) is not None}
    left = {
        site: "a temperature for each head" if forward.law.mode == "constant" else f"mode={forward.law.mode!r}"
        for site, forward in forwards.items()
        if site not in taus
    }
    if not taus:
        return left
    mark = vars(model).pop(MARK, None)
    held: set[str] = set()
    for site in forwards:
        remove(model, module_at(model, site))
    try:
        targets = find_targets(model, example, TempScaleConfig(taus), include=list(taus))
        left |= targets.adapters
        lost = {name for names in _unwritten(model).values() for name in names}
        if unwritten := targets.held_by(lost):
            name = next(iter(unwritten.values()))
            left |= dict.fromkeys(taus, f"PEFT does not save {name!r}, which would hold it: `merge_and_unload()` first")
        else:
            scale_blocks({canonical_name(name): p for name, p in model.named_parameters()}, targets.factors)
        held = forwards.keys() - left.keys()
    finally:
        for site, forward in forwards.items():
            if site not in held:
                install(model, module_at(model, site), forward.law, saved=True)
        if mark is not None:
            setattr(model, MARK, mark | {"adapters": [site for site in mark["adapters"] if site not in held]})
    forget(model)
    return left


@torch.no_grad()
def remove_temp_scale(model: nn.Module) -> None:
    """Undo :func:`apply_temp_scale`, to the bit; also on a copy of the model it was applied to.

    Args:
        model: The model, on any device and in any dtype.

    Raises:
        ValueError: It was not applied, or a weight has changed since. The model is unchanged then.
    """
    mark = vars(model).get(MARK)
    if mark is None:
        raise ValueError("TempScale was not applied to this model; give the module that `apply_temp_scale` was given.")
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    restored = []
    for name, blocks in mark["originals"].items():
        for start, length, dim, factor, original in blocks:
            now = Block(start, length, dim).of(parameters[name].data)
            if not torch.equal((original * factor).to(now), now):
                raise ValueError(
                    f"{name!r} has changed since TempScale was applied (trained, or loaded?), so its former values no "
                    f"longer belong to the model. Load the weights you want, or multiply it by {1 / factor:g}."
                )
            restored.append((now, original))
    modules = [module_at(model, site) for site in mark["adapters"]]
    if not all(installed(module) for module in modules):
        raise ValueError("a forward adapter of TempScale is gone; was the module's `forward` replaced since?")
    for now, original in restored:
        now.copy_(original)
    for module in modules:
        remove(model, module)
    allow_saving(model, MARK)
    delattr(model, MARK)
    forget(model)


def make_transforms(
    model: nn.Module, targets: Targets, temperatures: Mapping[str, Temperature]
) -> dict[str, tuple[nn.Parameter, ScaleTransform]]:
    """The transforms that hold the temperatures of a training run at the optimizer boundary.

    Args:
        model: The model.
        targets: What was found in it; attentions that need an adapter are left out: see :func:`carriers`.
        temperatures: Site -> temperature; sites of one group (:meth:`Targets.groups`) share the first one's.

    Raises:
        TempScaleError: A temperature moves, and a parameter that it would drive is frozen.
    """
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    made: dict[str, tuple[nn.Parameter, ScaleTransform]] = {}
    for group in targets.groups():
        temperature = temperatures[group[0]]
        for knob in (knob for site in group for knob in targets.sites[site].knobs):
            parameter = parameters[knob.parameter]
            if temperature.moves and not parameter.requires_grad:
                raise TempScaleError(
                    f"{knob.parameter!r} is frozen, so a learned or scheduled temperature of {group[0]!r} could not "
                    "reach it. Unfreeze it, exclude the attention, or use a constant `tau`."
                )
            heads = knob.heads if len(temperature.log_tau) > 1 else None
            made.setdefault(knob.parameter, (parameter, ScaleTransform(temperature, knob.blocks, heads)))
    return made


def carriers(targets: Targets, sites: Sequence[str], trained: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """The weight with which the temperature of each adapter is stepped, saved and resumed, at its learning rate.

    Args:
        targets: What was found.
        sites: Those of its adapters whose temperature moves.
        trained: Names of the parameters in optimizers.
        taken: Those that have a temperature already.

    Returns:
        Site -> a parameter of its own: one that makes its logits where there is one, else the nearest in the model.

    Raises:
        TempScaleError: There are not enough.
    """
    free, found = [name for name in trained if name not in taken], {}
    for site in sites:
        own = [knob.parameter for knob in targets.sites[site].knobs]
        if not free:
            raise TempScaleError(
                f"every trained weight drives a temperature already, and that of {site!r} would need one more to learn "
                f"or move with. Train more weights, use a constant `tau`, or exclude=[{site!r}]."
            )
        found[site] = max(free, key=lambda name: (name in own, _shared(site, name)))
        free.remove(found[site])
    return found


def _shared(one: str, two: str) -> int:
    """How many modules two names share."""
    pairs = zip(one.split("."), two.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

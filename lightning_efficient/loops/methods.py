"""Which methods run in a loop, and why the others do not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.loops.norms import NormSwapPart
from lightning_efficient.loops.parts import Part
from lightning_efficient.loops.units import HessoPart
from lightning_efficient.loops.weights import MagnitudePruningPart, SigmaReparamPart, TempScalePart

PARTS: dict[str, type[Part]] = {
    part.method: part for part in (NormSwapPart, SigmaReparamPart, TempScalePart, MagnitudePruningPart, HessoPart)
}
# Why the others have none, and what to do instead.
REFUSED = {
    "linear_attention": "it has no schedule: `functional.apply_linear_attention(model)` before you make the optimizer",
    "pagcp_pruning": "it measures the validation loss of every cut; use PAGCPPruning in a Lightning Trainer",
    "sap_pruning": "its iterations go back and need a validation metric; use SAPPruning in a Lightning Trainer",
    "distillation": "its teacher is a line of your loop: add `alpha * F.mse_loss(student, teacher)`, say, to the loss",
    "collapse_monitor": "it only looks; use `lightning_efficient.metrics` in the loop",
}


def read_methods(methods: Mapping[str, Mapping[str, Any] | bool | None]) -> dict[str, dict[str, Any]]:
    """What a user says of methods, in the order in which they apply: checked as far as it can be without a model.

    Args:
        methods: Method, by any of its spellings, to its arguments, as YAML has them: ``True`` and ``None`` are short
            for ``{}``; ``False`` and ``enabled: false`` switch it off.

    Returns:
        Key of each method that is on → its arguments.

    Raises:
        ValueError: A method is unknown, refused here or named twice; or an argument is unknown or wrong.
    """
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"`methods` maps keys of methods to arguments, {{'sigma_reparam': {{}}}}; got {methods!r}.")
    found: dict[str, dict[str, Any]] = {}
    for key, given in methods.items():
        name = METHODS.named(key)
        if name is None:
            hint = METHODS.near(key) or f"; possible are {', '.join(PARTS)}"
            raise ValueError(f"`methods`: no method {key!r}{hint}.")
        if not (given is None or isinstance(given, bool | Mapping)):
            raise ValueError(f"`methods`: {key!r} should be true, false or a mapping of arguments; got {given!r}.")
        arguments = dict(given) if isinstance(given, Mapping) else {"enabled": given is not False}
        if not arguments.pop("enabled", True):
            continue
        if name not in PARTS:
            why = REFUSED.get(name, "it is a callback, for a Lightning Trainer")
            raise ValueError(f"{name} does not run in a loop of your own: {why}.")
        if name in found:
            raise ValueError(f"`methods` names {name} twice.")
        _check(name, arguments)
        found[name] = arguments
    if not found:
        raise ValueError(f"`methods`: all of {', '.join(map(str, methods))} are off; leave `attach` out.")
    METHODS.check(list(found))
    return {name: found[name] for name in PARTS if name in found}


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    known = list(inspect.signature(PARTS[name]).parameters)
    for argument in arguments:
        if argument not in known:
            hint = near(argument, known) or f"; possible are {', '.join(known)}"
            raise ValueError(f"{name}: no argument {argument!r} in a loop{hint}.")
    PARTS[name](**arguments)

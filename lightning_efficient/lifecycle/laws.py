"""Attention temperatures in a checkpoint: those of forward adapters, in its states, and what its recipe says of all."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import set_laws, take_laws
from lightning_efficient.attention.owners import ROOT
from lightning_efficient.attention.temper import Law
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.schema import (
    Anything,
    Flag,
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    OrNone,
    Part,
    Record,
    Such,
    TensorOf,
    Text,
    TupleOf,
    check,
)
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.checkpoint import NOTE, STATES
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.weightspace.memory import without_memory
from lightning_efficient.weightspace.scale import tau_at

_WHERE = "temp_scale in the checkpoint's recipe"
_BLOCK = TupleOf((Int(low=0), Int(low=1), Int(low=0)))
_KNOB = Such(
    TupleOf((Text(), Such(ListOf(_BLOCK), bool, "not empty"), OrNone(ListOf(Int(low=0))))),
    lambda knob: knob[2] is None or len(knob[2]) == len(knob[1]),
    "with a head for each block",
)
_SITE = Such(
    Record({"heads": OrNone(Int(low=1)), "knobs": ListOf(_KNOB), "adapter": OrNone(Text())}),
    lambda site: all(max(knob[2] or [0]) < (site["heads"] or sys.maxsize) for knob in site["knobs"]),
    "with blocks of no other heads than it has",
)
_TAU = Number(low=math.exp(-20), high=math.exp(20))
_CONFIG = Part(
    {
        "layout": MapOf(Text(), _SITE), "tau": Anything(), "mode": OneOf(("constant", "log_n", "ssmax")),
        "length": Number(above=1), "learnable": Flag(), "per_head": Flag(), "transition": Number(low=0),
        "steps": OrNone(Int(low=0)),
    }
)  # fmt: skip
_STATE = Record(
    {"log_tau": TensorOf("floating", ndim=1, finite=True), "step": TensorOf("integer", shape=(), low=0)},
    optional={"raw": TensorOf("floating")},  # W of narrow weights
)


def read_laws(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Law], dict[str, dict[str, Any]]]:
    """The temperatures of forward adapters that a file's states hold, and the states without them.

    Args:
        checkpoint: The file; it stays as it is.

    Raises:
        RecipeError: They are malformed, or not those that the recipe says.
    """
    laws: dict[str, Law] = {}
    states = {
        name: {key: value for key, value in checkpoint[name].items() if not key.startswith(NOTE)}
        for name in STATES
        if name in checkpoint
    }
    try:
        for state in states.values():
            laws |= take_laws(state)
        entries = recipe.read(checkpoint)
        was_cut = any(entry.method == "slim" for entry in entries)  # then a layout of the old sizes is taken out
        for entry in (e for e in entries if e.method == "temp_scale"):
            if not was_cut or entry.config.get("layout", {}) is not None:
                _check_entry(entry, laws, states.get("state_dict", {}))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return laws, states


def put_laws(model: nn.Module, laws: Mapping[str, Law]) -> None:
    """Give a model the attention adapters of a file, and no others.

    Args:
        model: The model.
        laws: From :func:`read_laws`.

    Raises:
        RecipeError: A module is missing. Nothing has changed then.
    """
    try:
        set_laws(model, laws)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_entry(entry: Entry, laws: Mapping[str, Law], state: Mapping[str, Any]) -> None:
    """Refuse a recipe that does not say the temperatures of the file's weights.

    Raises:
        ValueError: Names the field.
    """
    check(entry.config, _CONFIG, f"{_WHERE}, `config`")
    layout, tau = entry.config["layout"], entry.config["tau"]
    if isinstance(tau, (list, tuple)):
        check(tau, ListOf(_TAU, length=len(layout)), f"{_WHERE}, `tau`")
    else:
        check(tau, _TAU, f"{_WHERE}, `tau`")
    if entry.config["per_head"] and (unknown := [name for name, what in layout.items() if what["heads"] is None]):
        raise ValueError(f"{_WHERE}, `heads` of {unknown[0]!r} should be a number, as `per_head` is True; got None.")
    tensors = {name: without_memory(state) for name, state in entry.tensors.items()}
    check(tensors, MapOf(Text(), _STATE), f"{_WHERE}, `tensors`")
    if state:  # beside a folder of shards there are no weights
        _check_knobs(layout, state)
    taus: list[float] = list(tau) if isinstance(tau, (list, tuple)) else [tau] * len(layout)
    driven = _check_weights(entry, taus)
    _check_adapters(entry, laws, taus, [s["log_tau"] for name, s in entry.tensors.items() if name not in driven])


def _check_knobs(layout: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse rows of weights that the file does not have.

    Raises:
        ValueError: Names them.
    """
    shapes = {canonical_name(name): tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for site, name, blocks in ((site, knob[0], knob[1]) for site, what in layout.items() for knob in what["knobs"]):
        for start, length, dim in blocks:
            shape = shapes.get(name, torch.Size())
            if dim >= len(shape) or start + length > shape[dim]:
                raise ValueError(
                    f"{_WHERE}, `layout` of {site!r}: it scales {start} to {start + length} of {name!r} along axis "
                    f"{dim}, and the file has {tuple(shape) or 'no such weight'}."
                )


def _check_weights(entry: Entry, taus: Sequence[float]) -> set[str]:
    """Refuse weights behind one attention's logits that say different temperatures, or another than the arguments do.

    Returns:
        Names of the weights that hold a temperature; what else has a state moves an adapter's.

    Raises:
        ValueError: Names the weight.
    """
    driven: set[str] = set()
    for (site, what), tau in zip(entry.config["layout"].items(), taus, strict=True):
        names = [] if what["adapter"] is not None else [knob[0] for knob in what["knobs"] if knob[0] in entry.tensors]
        known = None  # attentions that share a weight share the temperature of the first
        if not entry.config["learnable"] and not driven & set(names):
            known = tau
        for name in names:
            found = entry.tensors[name]["log_tau"]
            expected = entry.tensors[names[0]]["log_tau"]
            if known is not None:
                moves, step = entry.config["transition"], int(entry.tensors[name]["step"])
                now = tau_at(step, known, entry.config["steps"]) if moves else known
                expected = torch.full_like(found[:1], math.log(now))
            if found.shape != expected.shape or not torch.allclose(found, expected.to(found), 1e-4, 1e-5):
                raise ValueError(
                    f"{_WHERE}, `log_tau` of {name!r} should be that of {site!r}, {expected.tolist()[:4]}; got "
                    f"{found.tolist()[:4]}."
                )
        driven |= set(names)
    return driven


def _check_adapters(entry: Entry, laws: Mapping[str, Law], taus: Sequence[float], moving: Sequence[Tensor]) -> None:
    """Refuse adapters in the states that are not those of the recipe.

    Raises:
        ValueError: Names the attention.
    """
    layout = {"" if name == ROOT else name: site for name, site in entry.config["layout"].items()}
    sites = {name: site for name, site in layout.items() if site["adapter"] is not None}
    mode, tau, left = entry.config["mode"], entry.config["tau"], list(moving)
    all_move = mode != "constant" or (type(tau) in (int, float) and tau != 1)  # 1 needs no adapter
    if strangers := set(laws) - set(sites) or (set(sites) - set(laws) if all_move else set()):
        raise ValueError(
            f"{_WHERE}, `layout`, should name the attentions whose temperature the file's weights hold "
            f"({sorted(laws)[:4]}); it names {sorted(sites)[:4]}, and they differ in {sorted(strangers)[:4]}."
        )
    for name, law in laws.items():
        same = law.mode == mode and (law.mode != "log_n" or law.length == entry.config["length"])
        if law.log_tau is None:
            same &= law.tau in taus
        elif entry.tensors:
            here = law.log_tau.data
            known = [i for i, t in enumerate(left) if t.shape == here.shape and torch.allclose(t.to(here), here)]
            same &= bool(known)
            left = [t for i, t in enumerate(left) if i not in known[:1]]
        if not same:
            raise ValueError(
                f"the temperature of {name!r} in the file's weights ({law}) should be the one that the recipe's "
                "temp_scale says in `tau`, `mode`, `length` or `tensors`, and is another."
            )

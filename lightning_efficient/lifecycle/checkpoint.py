"""Checkpoints of models whose modules were changed: plain on disk wherever a change folds exactly.

Weight-space methods never come here: their ``state_dict`` is plain at all times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import set_laws, take_laws, write_laws
from lightning_efficient.attention.linear import LinearAttentionConfig
from lightning_efficient.attention.owners import ROOT
from lightning_efficient.attention.temper import Law
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import NoMatchError, canonical_name
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.schema import Int, ListOf, MapOf, OrNone, Record, TensorOf, Text, TupleOf, check
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.norms.swap import NormSwapConfig

# What the function of a method reads of a recipe's `config`, all of it written there.
_CONFIGS: dict[str, type[Any]] = {"norm_swap": NormSwapConfig, "linear_attention": LinearAttentionConfig}

# What is read of temp_scale's `layout` here.
_BLOCK = TupleOf((Int(low=0), Int(low=1), Int(low=0)))
_KNOB = TupleOf((Text(), ListOf(_BLOCK), OrNone(ListOf(Int(low=0)))))
_SITE = Record({"heads": OrNone(Int(low=1)), "knobs": ListOf(_KNOB), "adapter": OrNone(Text())})
_LAYOUT = MapOf(Text(), _SITE)

# `current_model_state` is where Lightning's WeightAveraging keeps the weights being trained.
_STATES = ("state_dict", "current_model_state")


@runtime_checkable
class Foldable(Protocol):
    """A replacement module whose tensors determine those of the module it replaced, exactly."""

    def fold_state(self, live: dict[str, Tensor]) -> dict[str, Tensor]:
        """The original module's tensors, from this module's; a pure function of its argument."""

    def unfold_state(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """This module's tensors, from the original's, with the function preserved."""


class StructuralRequest(Protocol):
    """What the codec needs of a callback's request."""

    method: str
    key: str
    config: dict[str, Any]
    changes: list[Change]


def fold(model: nn.Module, requests: Sequence[StructuralRequest], checkpoint: dict[str, Any]) -> None:
    """Make every state in ``checkpoint`` plain where it folds, keep the raw tensors in the recipe."""
    for request in requests:
        if not request.changes:
            continue
        tensors: dict[str, dict[str, Tensor]] = {name: {} for c in request.changes for name in c.swaps}
        for state_name in _STATES:
            if state_name not in checkpoint:
                continue
            state = checkpoint[state_name] = dict(checkpoint[state_name])
            for name, prefix, module in _prefixes(model, request.changes):
                if f"{prefix}_extra_state" in state:  # an averaged copy does not keep it up to date
                    state[f"{prefix}_extra_state"] = module.get_extra_state()
                if isinstance(module, Foldable):
                    live = _take(state, prefix)
                    tensors[name] |= {f"{state_name}/{key}": value for key, value in live.items()}
                    state.update({prefix + key: value for key, value in module.fold_state(live).items()})
        recipe.write(checkpoint, Entry(request.method, request.key, request.config, tensors))
    for state_name in _STATES:
        if state_name in checkpoint:  # an averaged copy, made earlier, knows nothing of adapters
            write_laws(model, checkpoint[state_name])


def unfold(
    model: nn.Module, requests: Sequence[StructuralRequest], checkpoint: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """The states of a file for a changed model: raw tensors if saved, else derived from the plain ones.

    Returns:
        Name of a state in the checkpoint → what to put there. Nothing is changed.

    Raises:
        RecipeError: The checkpoint was written with other structural changes than the model has now.
    """
    saved = {(e.method, e.key): e for e in recipe.read(checkpoint) if METHODS[e.method].replay}
    if unknown := [key for key in saved if key not in {(r.method, r.key) for r in requests if r.changes}]:
        raise RecipeError(
            f"the checkpoint was written with {[key for _, key in unknown]}, which this run lacks or "
            f"configures differently (it has {[r.key for r in requests] or 'none'}). "
            "Add the same callback with the same arguments."
        )
    states = {name: dict(checkpoint[name]) for name in _STATES if name in checkpoint}
    for request in requests:
        entry = saved.get((request.method, request.key))
        changed = {name for change in request.changes for name in change.swaps}
        if entry is not None and (others := sorted(set(entry.tensors) - changed)):
            raise RecipeError(
                f"the checkpoint's {request.key} changed {others[:5]}, which this run's leaves alone. Use the same "
                "`include` and `exclude`."
            )
        for state_name, state in states.items():
            for name, prefix, module in _prefixes(model, request.changes):
                _unfold_one(state, prefix, module, name, request, entry, state_name)
    return states


def of_weights(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that say what is in the weights, not how modules or widths were changed: a model carries them."""
    return [entry for entry in entries if not METHODS[entry.method].replay and entry.method != "slim"]


def has_laws(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a file holds temperatures of attention adapters."""
    return bool(_laws(checkpoint)[0])


def adapt(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give the model the attention adapters of a file, and leave its own keys in the states."""
    laws, states = _laws(checkpoint)
    try:
        set_laws(model, laws)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    checkpoint.update(states)


def _laws(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Law], dict[str, dict[str, Any]]]:
    """The temperatures of forward adapters that a file's states hold, checked, and the states without them."""
    laws: dict[str, Law] = {}
    states = {name: dict(checkpoint[name]) for name in _STATES if name in checkpoint}
    try:
        for state in states.values():
            laws |= take_laws(state)
        _check_laws(laws, recipe.read(checkpoint), states.get("state_dict", {}))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return laws, states


def _check_laws(laws: Mapping[str, Law], entries: Sequence[Entry], state: Mapping[str, Any]) -> None:
    """Refuse temperatures that are not those of the attentions in the recipe.

    Raises:
        ValueError: Names the attention.
    """
    for entry in (e for e in entries if e.method == "temp_scale" and e.config.get("layout") is not None):
        check(entry.config["layout"], _LAYOUT, "temp_scale in the checkpoint's recipe, `layout`")
        _check_knobs(entry.config["layout"], state)
        layout = {"" if name == ROOT else name: site for name, site in entry.config["layout"].items()}
        sites = {name: site for name, site in layout.items() if site["adapter"] is not None}
        tau: Any = entry.config.get("tau")  # 1 needs no adapter
        all_move = entry.config.get("mode") != "constant" or (type(tau) in (int, float) and tau != 1)
        if strangers := set(laws) - set(sites) or (set(sites) - set(laws) if all_move else set()):
            raise ValueError(
                "temp_scale in the checkpoint's recipe, `layout`, should name the attentions whose temperature the "
                f"file's weights hold ({sorted(laws)[:4]}); it names {sorted(sites)[:4]}, and they differ in "
                f"{sorted(strangers)[:4]}."
            )
        taus = tau if isinstance(tau, list | tuple) else [tau]
        moving = [tensors["log_tau"] for tensors in entry.tensors.values() if "log_tau" in tensors]
        check(moving, ListOf(TensorOf("floating", ndim=1)), "temp_scale in the checkpoint's recipe, its `log_tau`")
        for name, law in laws.items():
            same = law.mode == entry.config.get("mode")
            same &= law.mode != "log_n" or law.length == entry.config.get("length")
            if law.log_tau is None:
                same &= law.tau in taus
            elif entry.tensors:
                here = law.log_tau.data
                same &= any(t.shape == here.shape and torch.allclose(t.to(here), here, 1e-2, 1e-3) for t in moving)
            if not same:
                raise ValueError(
                    f"the temperature of {name!r} in the file's weights ({law}) should be the one that the recipe's "
                    "temp_scale says in `tau`, `mode`, `length` or `tensors`, and is another."
                )


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
                    f"temp_scale in the checkpoint's recipe, `layout` of {site!r}: it scales {start} to "
                    f"{start + length} of {name!r} along axis {dim}, and the file has "
                    f"{tuple(shape) or 'no such weight'}."
                )


def _unfold_one(
    state: dict[str, Tensor],
    prefix: str,
    module: nn.Module,
    name: str,
    request: StructuralRequest,
    entry: Entry | None,
    state_name: str,
) -> None:
    if entry is not None and name not in entry.tensors:
        raise RecipeError(
            f"{request.key} changes {name!r} now but did not when the checkpoint was written (it changed "
            f"{list(entry.tensors)[:5]}). Use the same `include` and `exclude`."
        )
    if not isinstance(module, Foldable):
        if entry is not None and entry.tensors[name]:
            raise RecipeError(
                f"{request.method} in the checkpoint's recipe, `tensors`: {name!r} should have none, as "
                f"{type(module).__name__} does not fold; got {list(entry.tensors[name])[:4]}."
            )
        if entry is None:
            raise RecipeError(
                f"the checkpoint was written without {request.method}, and {type(module).__name__} {name!r} cannot "
                "take over its tensors. Load it into a model without the callback."
            )
        return
    plain = _take(state, prefix)
    raw = {} if entry is None else _take(dict(entry.tensors[name]), f"{state_name}/")
    if raw:
        _check_raw(module, raw, plain, f"{request.method} in the checkpoint's recipe, `tensors` of {name!r}")
    state.update({prefix + k: v for k, v in (raw or module.unfold_state(plain)).items()})


def _check_raw(module: Foldable, raw: dict[str, Tensor], plain: dict[str, Tensor], where: str) -> None:
    """Refuse raw tensors that are not the module's, or are not those that the file's plain weights were folded from."""
    own = {key: value for key, value in cast(nn.Module, module).state_dict().items() if isinstance(value, Tensor)}
    for key in own.keys() | raw.keys():
        if key not in raw or key not in own or raw[key].shape != own[key].shape:
            expected = f"a tensor of shape {tuple(own[key].shape)}" if key in own else "not there"
            found = f"a tensor of shape {tuple(raw[key].shape)}" if key in raw else "none"
            raise RecipeError(f"{where}: {key!r} should be {expected}; got {found}.")
    folded = module.fold_state(dict(raw))
    for key, value in plain.items():
        if key in folded and not torch.allclose(folded[key].double(), value.double(), 1e-2, 1e-3, equal_nan=True):
            raise RecipeError(f"{where}: they should fold to the weights in the file, and {key!r} is another.")


def _prefixes(model: nn.Module, changes: Sequence[Change]) -> Iterator[tuple[str, str, nn.Module]]:
    """Target name, state-dict prefix and module of every changed module, once for each name it is registered under."""
    target = {id(new): name for change in changes for name, (_, new) in change.swaps.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in target:
            yield target[id(module)], f"{canonical_name(name)}.", module


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = [key for key in state if key.startswith(prefix)]
    return {key[len(prefix) :]: state.pop(key) for key in keys}


def replay_of(entry: Entry) -> Callable[[nn.Module, Collection[str]], Change] | None:
    """What makes the change of an entry on a model, but for the modules that have it; None: it folds, and is plain.

    Raises:
        RecipeError: When called: the model lacks modules that were changed, or the entry's arguments are no such.
    """
    # What folded exactly is plain in the file (its raw tensors lie in the entry) and needs no other module.
    names = [name for name, raw in entry.tensors.items() if not raw]
    if not names:
        return None
    known = fields(_CONFIGS[entry.method]) if entry.method in _CONFIGS else ()
    apply = METHODS[entry.method].find("replay")

    def replay(model: nn.Module, done: Collection[str]) -> Change:
        missing = [name for name in names if name not in done]
        if not missing:
            raise NoMatchError(f"{entry.method}: every module of the checkpoint's is changed already.")
        present = {canonical_name(name) for name, _ in model.named_modules()}
        if lacking := [name for name in names if name not in present]:
            raise RecipeError(
                f"the checkpoint's {entry.method} changed modules that {type(model).__name__} lacks: {lacking[:5]}. "
                "Was the model built with other arguments?"
            )
        if lacking := [argument.name for argument in known if argument.name not in entry.config]:
            raise RecipeError(f"{entry.method} in the checkpoint's recipe, `config`: {lacking[0]!r} is missing.")
        try:
            change: Change = apply(model, entry.config, missing)
        except NoMatchError:
            raise
        except ValueError as error:
            raise RecipeError(f"{entry.method} in the checkpoint's recipe: {error}") from error
        return change

    return replay

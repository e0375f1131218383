"""Checkpoints of models whose modules were changed: plain on disk wherever a change folds exactly.

Weight-space methods never come here: their ``state_dict`` is plain at all times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import write_laws
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import NoMatchError, canonical_name
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.weightspace import Transform
from lightning_efficient.weightspace.site import check_state

# `current_model_state` is where Lightning's WeightAveraging keeps the weights being trained.
STATES = ("state_dict", "current_model_state")
# A key of what does not fold: a run without the callback fails, and torch then lists it.
NOTE = "lightning_efficient: this needs "


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
        for state_name in STATES:
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
        entry = Entry(request.method, request.key, request.config, tensors)
        recipe.write(checkpoint, entry)
        if not all(isinstance(new, Foldable) for c in request.changes for _, new in c.swaps.values()):
            for state_name in STATES:
                if state_name in checkpoint:
                    checkpoint[state_name] = {**checkpoint[state_name], f"{NOTE}{called(entry)}": torch.empty(0)}
    for state_name in STATES:
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
        needed = " and ".join(called(saved[key]) for key in unknown)
        raise RecipeError(
            f"the checkpoint was written with {[key for _, key in unknown]}, which this run lacks or "
            f"configures differently (it has {[r.key for r in requests] or 'none'}). "
            f"Add the same callback with the same arguments: {needed}."
        )
    states = {name: dict(checkpoint[name]) for name in STATES if name in checkpoint}
    for request in requests:
        entry = saved.get((request.method, request.key))
        changed = {name for change in request.changes for name in change.swaps}
        if entry is not None and (others := sorted(set(entry.tensors) - changed)):
            raise RecipeError(
                f"the checkpoint's {request.key} changed {others[:5]}, which this run's leaves alone. Use the same "
                f"`include` and `exclude`, and build {type(model).__name__} as it was."
            )
        for state_name, state in states.items():
            for name, prefix, module in _prefixes(model, request.changes):
                _unfold_one(state, prefix, module, name, request, entry, state_name)
    return states


def called(entry: Entry) -> str:
    """The callback of an entry as one would write it, with what its entry differs in from the defaults."""
    cls = METHODS[entry.method].find("callback")
    if cls is None:  # another callback's doing, which has an entry, or a key, of its own
        return f"{entry.key.partition('{')[0]} ({entry.method})"
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    given = {n: v for n, v in entry.config.items() if n in defaults and n != "enabled" and v != defaults[n]}
    return f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def of_weights(entries: Sequence[Entry], states: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The entries that say what is in the weights, not how modules or widths were changed: a model carries them.

    Args:
        entries: Of a file's recipe.
        states: The file's weights, as :func:`unfold` returns them: the entries are checked against them.

    Raises:
        RecipeError: The state of a weight is not one of its method, or not of this weight.
    """
    found = [entry for entry in entries if not METHODS[entry.method].replay and entry.method != "slim"]
    weights: dict[str, list[Tensor]] = {}
    for name, tensor in (item for state in states.values() for item in state.items()):
        if isinstance(tensor, Tensor):
            weights.setdefault(canonical_name(name), []).append(tensor)
    for entry in found:
        where = f"{entry.method} in the checkpoint's recipe, `tensors`"
        transform = getattr(METHODS[entry.method].find("callback"), "transform", Transform)
        for name, state in entry.tensors.items():
            for weight in weights.get(name, ()):
                check_state(state, transform, weight, f"{where} of {name!r}", RecipeError)
    return found


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
            f"{list(entry.tensors)[:5]}). Use the same `include` and `exclude`, and build the model as it was."
        )
    if entry is not None and not entry.tensors[name]:
        _check_shape(state, prefix, module, name, request, entry)
    if not isinstance(module, Foldable):
        if entry is not None and entry.tensors[name]:
            raise RecipeError(
                f"{request.method} in the checkpoint's recipe, `tensors`: {name!r} should have none, as "
                f"{type(module).__name__} does not fold; got {list(entry.tensors[name])[:4]}."
            )
        if entry is None:
            raise RecipeError(
                f"the checkpoint was written without {request.key.partition('{')[0]}, and {type(module).__name__} "
                f"{name!r} cannot take over its tensors. Load it into a model without the callback; to begin with the "
                "callback from these weights, load them first, and fit without `ckpt_path`."
            )
        return
    plain = _take(state, prefix)
    raw = {} if entry is None else _take(dict(entry.tensors[name]), f"{state_name}/")
    if raw:
        _check_raw(module, raw, plain, f"{request.method} in the checkpoint's recipe, `tensors` of {name!r}")
    state.update({prefix + k: v for k, v in (raw or module.unfold_state(plain)).items()})


def _check_shape(
    state: Mapping[str, Any], prefix: str, module: nn.Module, name: str, request: StructuralRequest, entry: Entry
) -> None:
    """Refuse tensors of a module that was made with other arguments, which torch would list key by key."""
    there = {k: tuple(v.shape) for k, v in state.items() if k.startswith(prefix) and isinstance(v, Tensor)}
    own = {prefix + k: tuple(v.shape) for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    if there and there != own:
        changed = [
            f"`{argument}`: {entry.config.get(argument)!r} then, {value!r} now"
            for argument, value in request.config.items()
            if entry.config.get(argument) != value
        ]
        odd = sorted(key for key in there.keys() | own.keys() if there.get(key) != own.get(key))
        raise RecipeError(
            f"{called(entry).partition('(')[0]} made {name!r} with other arguments when the checkpoint was written "
            f"({'; '.join(changed) or 'of another model'}), so its tensors do not fit ({odd[0]!r}, ...). Use the saved "
            "values, or start a new run from the weights alone."
        )


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
    apply, config = (METHODS[entry.method].find(argument) for argument in ("replay", "config"))
    known = () if config is None else fields(config)

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

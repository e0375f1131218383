"""Hugging Face's ``config`` after a cut: the numbers with which its class builds the model that is left.

There is no table of architectures. The class itself is asked: every number of the config is changed once, to see on the
meta device which shapes and attributes follow it; those that move what was cut are set to values that the cut asks for,
until the class builds the same shapes; and what it builds then has to compute the same in float64, from perturbed
weights. Where no config does, ``save_pretrained`` refuses, since ``from_pretrained`` could not read what it wrote.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_efficient.attention.sites import perturbed, run_float64
from lightning_efficient.common.comparing import largest_gap
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.nests import mapped, outputs_in
from lightning_efficient.common.running import float64_copy
from lightning_efficient.common.saving import SAVE, allow_saving, refuse_saving
from lightning_efficient.folding.probes import Probe
from lightning_efficient.structured.cuts import Cuts

# Module → how it was called; what has to come out the same.
Calls: TypeAlias = Mapping[str, Probe]
# Path in a config → number.
Fields: TypeAlias = dict[str, int | float]

# What a file would lose, for ``save_pretrained``.
REFUSED = "cut"
_TOLERANCE = 1e-9
# How many combinations may be built, on the meta device; how many may be run; how many ratios one number may stand for.
_BUILDS, _RUNS, _RATIOS = 200, 8, 3
_SIZE, _ATTRIBUTE = "size", "attribute"


def _base() -> Any:
    """The class of Hugging Face's models, if it is in use; else one that nothing is an instance of."""
    library = sys.modules.get("transformers.modeling_utils")
    return () if library is None else library.PreTrainedModel


def pretrained(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost models of Hugging Face's in a model, by canonical name."""
    found: dict[str, nn.Module] = {}
    for name, module in modules_by_name(model).items():
        if isinstance(module, _base()) and not any(_within(name, outer) for outer in found):
            found[name] = module
    return found


def calls_of(model: nn.Module, run: Callable[[], Any]) -> dict[str, Probe]:
    """How Hugging Face's models in a model are called: the first call of each that no other one makes.

    Args:
        model: The model.
        run: Runs it.
    """
    calls: dict[str, Probe] = {}
    depth = [0]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if depth[0] == 0 and name not in calls:
                given = mapped((args, dict(kwargs)), lambda v: v.detach().clone() if isinstance(v, Tensor) else v)
                calls[name] = Probe("a call", *given)
            depth[0] += 1

        return hook

    def leave(*_: Any) -> None:
        depth[0] -= 1

    handles: list[Any] = []
    for name, module in modules_by_name(model).items():
        if isinstance(module, _base()):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        if handles:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def find_configs(model: nn.Module, cuts: Cuts, calls: Calls) -> tuple[Cuts, dict[str, str]]:
    """The configs that build what a cut has left of Hugging Face's models; nothing is changed.

    Args:
        model: Cut already, its configs as they were.
        cuts: That were made.
        calls: From :func:`calls_of`, of the model before or after.

    Returns:
        The cuts with :attr:`~lightning_efficient.structured.slim.Cuts.configs`, and model → why there is none.
    """
    configs, reasons = dict(cuts.configs), {}
    for name, owner in pretrained(model).items():
        mine = cuts.within(name) if name else cuts
        if mine.kept:
            inside = {_relative(n, name): probe for n, probe in calls.items() if _within(n, name)}
            found = _Search(owner, mine, inside).found()
            if isinstance(found, str):
                reasons[name] = found
                configs.pop(name, None)
            else:
                configs[name] = configs.get(name, {}) | found
    return replace(cuts, configs=configs), reasons


def put_configs(model: nn.Module, cuts: Cuts, reasons: Mapping[str, str] | None = None, refuse: bool = True) -> str:
    """Give the models of a cut model their configs, and have ``save_pretrained`` refuse where there is none.

    Args:
        model: Cut already.
        cuts: With configs: from :func:`find_configs`, or from a file.
        reasons: From there.
        refuse: False: leave ``save_pretrained`` as it is.

    Returns:
        What it would do where there is none; empty: the configs say all.
    """
    modules = modules_by_name(model)
    said = {name for name, fields in cuts.configs.items() if name in modules and _set(modules[name], fields)}
    allow_saving(model, REFUSED)
    why = ""
    for name, owner in modules.items():
        left = [n for n in cuts.kept if _within(n, name) and not any(_within(n, known) for known in said)]
        if left and callable(getattr(owner, SAVE, None)):
            near = (why for n, why in (reasons or {}).items() if _within(n, name) or _within(name, n))
            reason = next(near, f"its config does not say how wide {left[0]!r} is now")
            why = why or _refusal(reason)
            if refuse:
                refuse_saving(model, REFUSED, _refusal(reason), [owner])
    return why


def _refusal(reason: str) -> str:
    return (
        f"would write a model that from_pretrained cannot build: units were cut out of it, and {reason}. Write it with "
        "lightning_efficient.save_pretrained(model, folder, inputs), which adds the code that builds it; or keep a "
        "Trainer's checkpoint, for lightning_efficient.load_from_checkpoint. (To need neither: prune with "
        "`uniform=True`, which keeps equal widths equal, and `exclude` what the config has no number for.)"
    )


class _Search:
    """Looks for the config of one model.

    Args:
        owner: Cut already.
        cuts: Of it, with its names.
        calls: Of modules inside it.
    """

    def __init__(self, owner: nn.Module, cuts: Cuts, calls: Calls) -> None:
        self.owner, self.calls = owner, calls
        self.wanted = _print(owner)
        self.before = _built(owner, {}) or {}
        self.whole = {
            key: size if (mask := cuts.kept.get(key[1], {}).get(key[2])) is None else mask.numel()
            for key, size in self.wanted.items()
            if key[0] == _SIZE
        }
        self.ratios = sorted({Fraction(int(m.sum()), m.numel()) for k in cuts.kept.values() for m in k.values()} - {1})

    def found(self) -> Fields | str:
        """The numbers that change, or why there are none."""
        if _sizes(self.before) != self.whole:
            return "its class builds other modules from its config than it has"
        if not self.calls:
            return "no call of it is known on which a config could be tried (find the groups anew)"
        cut = {key for key, size in self.whole.items() if self.wanted[key] != size}
        steps: dict[str, set[int | float]] = {}
        uneven: dict[int, str] = {}
        followed: set[Any] = set()
        for path, value in [*numbers(self.owner.config), *self._defaults({self.whole[key] for key in cut})]:
            moved = self._moved(path, value)
            followed |= moved
            if len(self._ratios(moved & cut)) > 1:
                uneven.setdefault(len(moved), path)
            if len(ratios := self._ratios(moved) - {1}) <= _RATIOS:
                steps[path] = {new for ratio in ratios if (new := _scaled(value, ratio)) is not None}
        if left := cut - followed:
            return f"no number of its config says how wide {min(left)[1]!r} is"
        found = self._best({path: values for path, values in steps.items() if values})
        if isinstance(found, str) and uneven:
            return f"`{uneven[min(uneven)]}` of its config is one number for layers that are not equally wide any more"
        return found

    def _defaults(self, sizes: set[int]) -> Iterator[tuple[str, int]]:
        """What the config leaves open (None) and a number of these would say as well."""
        for path in _unset(self.owner.config):
            if _built(self.owner, {path: 2 * max(sizes)}) != self.before:
                yield from ((path, size) for size in sizes if _built(self.owner, {path: size}) == self.before)

    def _ratios(self, keys: set[Any]) -> set[Fraction]:
        return {Fraction(self.wanted[key]) / Fraction(self.before[key]) for key in keys}

    def _best(self, steps: Mapping[str, set[int | float]]) -> Fields | str:
        """Best first: the config whose model has the fewest other shapes, then the fewest other attributes."""
        count = itertools.count()
        seen: set[frozenset[Any]] = set()
        queue: list[tuple[int, int, int, int, Fields]] = [(*self._score(self.before), 0, next(count), {})]
        ran = 0
        while queue and ran < _RUNS:
            wrong, _, _, _, fields = heapq.heappop(queue)
            if not wrong:
                ran += 1
                if self._same(fields):
                    return fields
            for path, values in steps.items():
                for value in values if path not in fields else ():
                    more = {**fields, path: value}
                    if (key := frozenset(more.items())) in seen or len(seen) >= _BUILDS:
                        continue
                    seen.add(key)
                    if (made := _built(self.owner, more)) is not None:
                        heapq.heappush(queue, (*self._score(made), len(more), next(count), more))
        tried = f"(tried: {', '.join(steps) or 'none'})"
        if ran:
            return f"no config from which its class builds these widths computes the same {tried}"
        return f"its class builds these widths from no config {tried}"

    def _moved(self, path: str, value: int | float) -> set[Any]:
        """What follows a number of the config; nothing, if that says which tensors there are."""
        tries = [new for ratio in self.ratios[:_RATIOS] if (new := _scaled(value, ratio)) is not None]
        tries += [new for new in (value // 2, value * 2) if isinstance(value, int) and new > 0]
        for new in tries:
            if (made := _built(self.owner, {path: new})) is not None:
                both = made.keys() & self.before.keys() & self.wanted.keys()
                same = _sizes(made).keys() == _sizes(self.before).keys()
                return {key for key in both if same and made[key] != self.before[key] != 0}
        return set()

    def _score(self, made: Mapping[Any, Any]) -> tuple[int, int]:
        wrong = [key for key in {**made, **self.wanted} if made.get(key) != self.wanted.get(key)]
        sizes = sum(key[0] == _SIZE for key in wrong)
        return sizes, len(wrong) - sizes

    def _same(self, fields: Fields) -> bool:
        """Whether the model of a config computes the same, from the same perturbed weights."""
        if (made := _build(self.owner, fields, "cpu")) is None:
            return False
        twin = perturbed(float64_copy(self.owner))
        other = made.to(next(self.owner.parameters()).device).double().eval()
        try:
            other.load_state_dict(twin.state_dict())
            with torch.no_grad():
                for name, probe in self.calls.items():
                    left, right = (run_float64(modules_by_name(m)[name], probe) for m in (twin, other))
                    one, two = ({str(i): t for i, t in enumerate(outputs_in(out))} for out in (left, right))
                    if not one or one.keys() != two.keys() or not largest_gap(one, two) <= _TOLERANCE:
                        return False
        except (RuntimeError, ValueError):  # other names in the state; a forward that does not run
            return False
        return True


def _scaled(value: int | float, ratio: Fraction) -> int | float | None:
    """A number times a ratio; None where a whole number would be none any more."""
    if isinstance(value, float):
        return value * float(ratio)
    scaled = value * ratio
    return int(scaled) if scaled.denominator == 1 and scaled > 0 else None


def build_from_config(owner: nn.Module, cls: type[nn.Module]) -> nn.Module | None:
    """What a class builds from a model's config, on the meta device.

    Args:
        owner: The model.
        cls: Its class, or the one beneath it that the library brings.

    Returns:
        The model; None if it refuses.
    """
    return _build(owner, {}, "meta", cls)


def _build(owner: nn.Module, fields: Fields, device: str, cls: type[nn.Module] | None = None) -> nn.Module | None:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            return (cls or type(owner))(_changed(owner.config, fields))
        except Exception:  # whatever a class or a config raises at numbers that do not go together
            return None


def _built(owner: nn.Module, fields: Fields) -> dict[Any, Any] | None:
    """What a model's class builds from its config with other numbers; None if it refuses."""
    made = _build(owner, fields, "meta")
    return None if made is None else _print(made)


def _sizes(made: Mapping[Any, Any]) -> dict[Any, int]:
    return {key: size for key, size in made.items() if key[0] == _SIZE}


def _print(model: nn.Module) -> dict[Any, Any]:
    """What a model is built like: sizes of tensors, and plain public attributes of modules."""
    found: dict[Any, Any] = {}
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*both):
        found |= {(_SIZE, canonical_name(name), dim): size for dim, size in enumerate(tensor.shape)}
    for name, module in modules_by_name(model).items():
        for attribute, value in vars(module).items():
            if type(value) in (int, float) and not attribute.startswith("_"):
                found[_ATTRIBUTE, name, attribute] = value
    return found


# -- configs -----------------------------------------------------------------------------------------------------------


def numbers(config: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers of a config, those in its lists and in configs inside it too, each with its path."""
    return ((path, value) for path, value in _entries(config) if type(value) in (int, float) and value > 0)


def _unset(config: Any) -> Iterator[str]:
    """Paths of what a config leaves to its class."""
    return (path for path, value in _entries(config) if value is None)


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = enumerate(config) if isinstance(config, (list, tuple)) else vars(config).items()
    for key, value in items:
        path = f"{prefix}{key}"
        if path.rpartition(".")[2].startswith("_"):
            continue
        if isinstance(value, (list, tuple)) or hasattr(value, "to_dict"):
            yield from _entries(value, f"{path}.")
        else:
            yield path, value


def _changed(config: Any, fields: Mapping[str, int | float], copies: dict[int, Any] | None = None) -> Any:
    """A copy of a config with other numbers; ``copies``: a memo, for configs that are parts of each other."""
    config = copy.deepcopy(config, copies)
    for path, value in fields.items():
        _put(config, path.split("."), value)
    return config


def _put(holder: Any, path: list[str], value: Any) -> Any:
    """Set a number in a config, or in a list, which is returned anew."""
    key = path[0]
    if isinstance(holder, (list, tuple)):
        items = list(holder)
        items[int(key)] = value if len(path) == 1 else _put(items[int(key)], path[1:], value)
        return type(holder)(items)
    setattr(holder, key, value if len(path) == 1 else _put(getattr(holder, key), path[1:], value))
    return holder


def _set(owner: nn.Module, fields: Fields) -> bool:
    """Give a model, and all inside it, the config with other numbers, if its class builds its shapes from that."""
    known = dict(_entries(owner.config))
    if any(path not in known or type(known[path]) not in (type(value), type(None)) for path, value in fields.items()):
        return False
    made = _build(owner, fields, "meta")
    if made is None or _sizes(_print(made)) != _sizes(_print(owner)):
        return False
    built, copies = modules_by_name(made), dict[int, Any]()
    for name, module in modules_by_name(owner).items():
        mine, theirs = vars(module).get("config"), vars(built[name]).get("config")
        if hasattr(mine, "to_dict") and theirs is not None:
            now, old = dict(numbers(theirs)), dict(_entries(mine))
            other = {path: value for path, value in now.items() if path in old and old[path] != value}
            module.config = _changed(mine, other, copies)
    return True


def _within(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(f"{parent}.")


def _relative(name: str, parent: str) -> str:
    return name.removeprefix(parent).removeprefix(".")

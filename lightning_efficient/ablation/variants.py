"""Variants of an ablation: name → methods, from a YAML file, a mapping, or the short form of the command line."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.lifecycle.methods import build_callback, read_yaml, spelled

BASELINE = "baseline"
CONFIG = "config"  # of a variant: options of the command line beside its methods
Methods = dict[str, dict[str, Any]]
VariantsLike = str | os.PathLike[str] | Mapping[str, Any] | Sequence[str]

_GRID = "grid"
# A folder, a TensorBoard run and a word of the table; `seed_1` or `version_1` would be taken for a replica.
_NAME = re.compile(r"(?!(?:seed|version)[_-]?\d+$)[A-Za-z0-9][\w.,=+-]{0,120}", re.IGNORECASE)
_UNSAFE = re.compile(r"[^\w.+-]+")


def read_variants(variants: VariantsLike) -> dict[str, Methods]:
    """Every variant by name, grids expanded, the baseline first; all checked.

    Args:
        variants: A YAML file with ``variants:``, a mapping name → methods as in such a file, or a list such as
            ``["sigma_reparam", "sigma_reparam+norm_swap"]``.

    Returns:
        Name → method → arguments, with ``enabled`` spelled out; options of the command line under ``"config"``. The
        baseline switches nothing on.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The YAML is not what is expected, a method or an argument is unknown, two methods of a variant
            exclude each other, or a name cannot be a folder.
    """
    if isinstance(variants, (str, os.PathLike)):
        content = read_yaml(variants)
        try:
            return _checked(_variants_in(content))
        except ValueError as error:
            raise ValueError(f"{os.fspath(variants)}: {error}") from None
    if not isinstance(variants, Mapping):
        variants = {name: dict.fromkeys(name.split("+"), True) for name in variants}
    return _checked(variants)


def _variants_in(content: Any) -> Mapping[str, Any]:
    expected = "expected `variants:` with a name for each, such as `variants: {sigma: {sigma_reparam: true}}`"
    if not isinstance(content, Mapping) or "variants" not in content:
        raise ValueError(f"{expected}; got {content!r}.")
    if unknown := [key for key in content if key != "variants"]:
        raise ValueError(f"unknown key {unknown[0]!r}{near(unknown[0], ['variants'])}; {expected}.")
    if not isinstance(content["variants"], Mapping):
        raise ValueError(f"{expected}; got `variants: {content['variants']!r}`.")
    variants: Mapping[str, Any] = content["variants"]
    return variants


def _checked(variants: Mapping[str, Any]) -> dict[str, Methods]:
    found: dict[str, Methods] = {BASELINE: {}}
    for name, methods in variants.items():
        if name == BASELINE and not methods:
            continue
        if name == BASELINE:
            raise ValueError(f"`{BASELINE}` is the configuration as it is, and always there: rename this variant.")
        if not isinstance(methods, Mapping) or not methods:
            raise ValueError(
                f"variant {name!r} should map methods to arguments, such as `{{sigma_reparam: true}}`; got {methods!r}."
            )
        for label, chosen in _expanded(str(name), methods).items():
            if not _NAME.fullmatch(label):
                raise ValueError(
                    f"variant {label!r} cannot be a folder: use letters, digits and `_.,=+-`, at most 121 of them, and "
                    "not seed_<n> or version_<n>."
                )
            if label in found:
                raise ValueError(f"two variants are called {label!r}: rename one of them.")
            try:
                found[label] = _methods(chosen)
            except ValueError as error:
                raise ValueError(f"variant {label!r}: {error}") from None
    if len(found) == 1:
        raise ValueError(
            f"nothing to compare with the baseline: name methods among {', '.join(METHODS.with_callback)}."
        )
    return found


def _expanded(name: str, methods: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The product over all ``{grid: [...]}``, of whole methods or of arguments; without any, the variant itself."""
    axes: list[tuple[tuple[str, ...], Sequence[Any]]] = []
    for method, arguments in methods.items():
        if _is_grid(arguments, method):
            axes.append(((method,), arguments[_GRID]))
        elif isinstance(arguments, Mapping):
            axes += [((method, a), v[_GRID]) for a, v in arguments.items() if _is_grid(v, f"{method}.{a}")]
    last = [path[-1] for path, _ in axes]
    labels = [path[-1] if last.count(path[-1]) == 1 else ".".join(path) for path, _ in axes]
    found: dict[str, Mapping[str, Any]] = {}
    for values in itertools.product(*(values for _, values in axes)):
        chosen: dict[str, Any] = deepcopy(dict(methods))
        for (path, _), value in zip(axes, values, strict=True):
            place = chosen if len(path) == 1 else chosen[path[0]]
            place[path[-1]] = value
        label = ",".join([name, *(f"{k}={_text(v)}" for k, v in zip(labels, values, strict=True))])
        if label in found:
            raise ValueError(f"variant {name!r}: two values of a grid read {label!r}: split the grid by hand.")
        found[label] = chosen
    return found


def _is_grid(value: Any, where: str) -> bool:
    if not isinstance(value, Mapping) or set(value) != {_GRID}:
        return False
    if not isinstance(value[_GRID], list) or not value[_GRID]:
        raise ValueError(f"`{where}`: `grid` should be a list of values; got {value[_GRID]!r}.")
    return True


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "+".join(map(_text, value))
    if isinstance(value, Mapping):
        return "+".join(f"{_text(k)}-{_text(v)}" for k, v in value.items())
    return _UNSAFE.sub("_", str(value))


def options_of(variant: Methods) -> list[str]:
    """What a variant changes of the configuration itself, as options of the command line.

    Args:
        variant: Its methods, and perhaps ``"config"``.
    """
    options = variant.get(CONFIG, {})
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def methods_of(variant: Methods) -> Methods:
    """A variant without ``"config"``.

    Args:
        variant: Its methods, and perhaps ``"config"``.
    """
    return {name: arguments for name, arguments in variant.items() if name != CONFIG}


def methods_file(variant: Methods) -> str:
    """The text of a file of a variant's methods, as ``LIGHTNING_EFFICIENT`` and ``EfficientCLI`` read it.

    Args:
        variant: Its methods, and perhaps ``"config"``.
    """
    return str(yaml.safe_dump(methods_of(variant), sort_keys=False))


def _methods(methods: Mapping[str, Any]) -> Methods:
    """Arguments with ``enabled`` spelled out, as an ``EfficientCLI`` config and a methods file both understand them."""
    if CONFIG in methods:
        options = methods[CONFIG]
        if not isinstance(options, Mapping) or not options or not all(isinstance(name, str) for name in options):
            raise ValueError(
                f"`{CONFIG}` should map options to values, such as `{{model.init_args.width: 32}}`; got {options!r}."
            )
        if method := next((name for name in options if METHODS.named(name.partition(".")[0])), None):
            raise ValueError(f"`{CONFIG}` is for what is no method: name {method!r} beside it.")
        return {CONFIG: dict(options), **_methods(methods_of(dict(methods)))}
    found = spelled(methods)
    for method, arguments in found.items():
        build_callback(method, arguments)
    METHODS.check([method for method, arguments in found.items() if arguments["enabled"]])
    return found

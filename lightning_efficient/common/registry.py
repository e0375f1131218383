"""Methods switched on by a YAML file: one key per method, checked against the signature of its callback.

.. code-block:: yaml

    sigma_reparam: true
    collapse_monitor: {every_n_steps: 50, exclude: ["head"]}
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import combinations
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

# Key in YAML and on the command line -> name of the callback in `lightning_efficient`.
METHODS: dict[str, str] = {
    "sigma_reparam": "SigmaReparam",
    "norm_swap": "PRepBN",
    "linear_attention": "SimplifiedLinearAttention",
    "temp_scale": "TempScale",
    "magnitude_pruning": "MagnitudePruning",
    "sap_pruning": "SAPPruning",
    "hesso_pruning": "HESSOPruning",
    "pagcp_pruning": "PAGCPPruning",
    "collapse_monitor": "CollapseMonitor",
    "run_cost": "RunCost",
}


def callback_class(method: str) -> type[Callback]:
    """The callback of a method.

    Args:
        method: A key of :data:`METHODS`.
    """
    cls: type[Callback] = getattr(import_module("lightning_efficient"), METHODS[method])
    return cls


def read_methods_file(path: str | PathLike[str]) -> list[Callback]:
    """Build the callbacks that a YAML file asks for.

    Args:
        path: A YAML mapping of methods. ``true``, ``false`` and nothing are short for ``{enabled: true}``,
            ``{enabled: false}`` and ``{}``; a mapping gives the callback's arguments. A method in the file is on unless
            it says ``enabled: false``.

    Returns:
        One callback a method, in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a YAML mapping, a key is unknown, or a value is of the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (looked in {Path.cwd()}).")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} should hold a mapping such as `sigma_reparam: true`; got {content!r}.")
    try:
        return [build_callback(method, arguments) for method, arguments in content.items()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build_callback(method: str, arguments: Any) -> Callback:
    """Build the callback of one method.

    Args:
        method: A key of :data:`METHODS`.
        arguments: Its arguments as YAML gives them; ``True``, ``False`` and ``None`` as in :func:`read_methods_file`.

    Raises:
        ValueError: The method or an argument is unknown, or a value is of the wrong type.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{near(method, METHODS)}; expected one of {', '.join(METHODS)}.")
    if arguments is None or isinstance(arguments, bool):
        arguments = {} if arguments is None else {"enabled": arguments}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"`{method}` should be true, false or a mapping of arguments; got {arguments!r}.")
    cls = callback_class(method)
    known = list(inspect.signature(cls).parameters)
    for name in arguments:
        if name not in known:
            raise ValueError(f"`{method}` has no argument {name!r}{near(name, known)}; it has {', '.join(known)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, method)
    try:
        parsed = parser.parse_object({method: dict(arguments)})
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return cls(**parsed[method].as_dict())


def near(name: object, names: Iterable[str]) -> str:
    """A hint at what a mistyped name may have meant, or nothing.

    Args:
        name: What the user wrote.
        names: What exists.
    """
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def announce(callbacks: Iterable[Callback], source: str) -> None:
    """Say in one line, on one process, what was added and why.

    Args:
        callbacks: What was added.
        source: What asked for it.
    """
    names = [type(cb).__name__ + ("" if getattr(cb, "enabled", True) else " (off)") for cb in callbacks]
    rank_zero_info(f"lightning_efficient: {source} adds {', '.join(names)}.")


# Methods that replace modules come first: the rest bind to the Parameters they leave behind. What follows is the
# chain raw weight -> used weight, from the inside out:
# - temp_scale after sigma_reparam: W / sigma(W) divides any factor inside it out again, so a temperature inside would
#   do nothing and a learned one would get a zero gradient;
# - structured pruning and masks last: what they zero stays zero. They act on the raw weight, so that a spectral norm is
#   that of what is left;
# - slim, the cutting out of what they zeroed, after everything.
STRUCTURED = ("hesso_pruning", "pagcp_pruning")
MASKS = ("magnitude_pruning", "sap_pruning")
ORDER: tuple[str, ...] = (
    "remove_norms",
    "norm_swap",
    "linear_attention",
    "sigma_reparam",
    "temp_scale",
    *STRUCTURED,
    *MASKS,
    "slim",
)

CONFLICTS: Mapping[frozenset[str], str] = MappingProxyType(
    {
        frozenset({"linear_attention", "temp_scale"}): (
            "linear attention has no softmax, so there is no temperature to scale: drop temp_scale, or keep"
            " softmax attention"
        ),
        frozenset(STRUCTURED): (
            "both decide which units go, and each would count those of the other: run one of them first, export the"
            " smaller model, and use the other in a second run"
        ),
        **{
            frozenset({structured, masks}): (
                "structured pruning removes the rows whose single entries masks would score: run structured pruning"
                " first, export the smaller model, and mask that one in a second run"
            )
            for structured in STRUCTURED
            for masks in MASKS
        },
    }
)


def check_methods(names: Sequence[str]) -> None:
    """Refuse combinations that cannot work.

    Args:
        names: Methods to be used on one model; a method may appear twice, aimed at different modules.

    Raises:
        ValueError: A name is unknown, or two methods exclude each other; says what to do instead.
    """
    for name in names:
        if name not in ORDER:
            near = difflib.get_close_matches(name, ORDER, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Unknown method {name!r}; expected one of {', '.join(ORDER)}.{hint}")
    for first, second in combinations(names, 2):
        message = CONFLICTS.get(frozenset({first, second}))
        if message is not None:
            raise ValueError(f"{first} and {second} cannot be used together: {message}.")


def sort_methods(names: Iterable[str]) -> list[str]:
    """The order in which methods apply to a model, whatever the order in which they were given.

    Args:
        names: Known methods; repeated ones keep their relative order.

    Returns:
        The same names, sorted by ``ORDER``.

    Raises:
        ValueError: See ``check_methods``.
    """
    names = list(names)
    check_methods(names)
    return sorted(names, key=ORDER.index)

"""In which order methods apply, and which of them exclude each other: data, and three lines that read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

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

"""Which cells of the contract tables always run; the others are ``exhaustive``: run on request."""

from __future__ import annotations

from collections.abc import Collection

# What a network is made of shows in its weights, wherever they are trained, saved, resumed and exported.
# What the Trainer does around them is the same for every network: precision, accumulation, hooks, how a module is made.
ON_EVERY_NET = ("plain", "resume")


def rare(scenario: str, head: bool, also: Collection[str] = ()) -> bool:
    """Whether a cell belongs to the long tail.

    Args:
        head: it is on the callback's own network, where every scenario runs.
        also: what always runs besides :data:`ON_EVERY_NET` on another network, or together with another callback.
    """
    return not head and scenario not in ON_EVERY_NET and scenario not in also

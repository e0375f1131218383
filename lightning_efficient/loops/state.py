"""What a driver saves, and how that is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_efficient.common.schema import (
    Anything,
    Int,
    ListOf,
    MapOf,
    OneOf,
    OrNone,
    Plain,
    Record,
    Such,
    TensorOf,
    Text,
    check,
)
from lightning_efficient.loops.methods import PARTS

_STATES = MapOf(Text(), MapOf(Text(), TensorOf()))
_METHOD = Record(
    {
        "arguments": Plain(),
        "schedule": ListOf(Int(low=0)),
        "progress": Anything(),  # each has a schema of its own
        "weights": _STATES,
    }
)
STATE = Record(
    {"version": OneOf((1,)), "step": Int(low=0), "total_steps": OrNone(Int(low=1)), "methods": MapOf(Text(), _METHOD)}
)


def check_driver_state(state: Any, arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a state that is none, or of other methods or arguments.

    Args:
        state: From a file.
        arguments: Method → arguments, now.

    Raises:
        ValueError: It says what was expected.
    """
    check(state, STATE, "the driver's state")
    then = {name: method["arguments"] for name, method in state["methods"].items()}
    if then.keys() != arguments.keys():
        raise ValueError(f"the state is of {sorted(then)}; this run has {sorted(arguments)}. Resume with the same.")
    for name in then:
        lengths = PARTS[name].lengths
        schedule = Such(ListOf(Int(low=0)), lambda steps, n=lengths: len(steps) in n, f"of {lengths} numbers")  # type: ignore[misc]
        check(state["methods"][name]["schedule"], schedule, f"the driver's schedule of {name}")
        check(state["methods"][name]["progress"], PARTS[name].progress_schema, f"the driver's progress of {name}")
    for name, now in arguments.items():
        for argument in sorted(now.keys() | then[name].keys()):
            if (old := then[name].get(argument)) != (new := now.get(argument)):
                raise ValueError(f"{name}: `{argument}` was {old!r} and is {new!r} now. Resume with the saved value.")

"""Arguments that a user gave, against the annotations of the function that takes them; nothing is converted."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_efficient.common.registry import near
from lightning_efficient.common.schema import (
    Anything,
    Flag,
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    OrNone,
    Schema,
    Text,
    Wrong,
)

_SINGLE: dict[Any, Schema] = {bool: Flag(), int: Int(), float: Number(), str: Text()}
_LONGEST = 200


@dataclass(frozen=True)
class _AnyOf(Schema):
    schemas: tuple[Schema, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.schemas))

    def wrong(self, value: Any, path: str = "") -> Wrong | None:
        found = [schema.wrong(value, path) for schema in self.schemas]
        if None in found:
            return None
        inside = [wrong for wrong in found if wrong is not None and wrong.path != path]  # of the right kind outside
        return inside[0] if len(inside) == 1 else Wrong(path, value, str(self))


def check_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], skip: Collection[str] = ()
) -> None:
    """Refuse arguments that are not of the types in a signature, before they are used.

    Args:
        function: A class, or a function.
        args: Positional arguments.
        kwargs: Arguments by name.
        skip: Names of arguments that are checked elsewhere.

    Raises:
        TypeError: There is no such argument.
        ValueError: One is of another type; says which, what was given, and what was expected.
    """
    signature, name = inspect.signature(function), function.__name__
    known = signature.parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for key in kwargs:
            if key not in known:
                hint = near(key, known) or f"; it has {', '.join(known)}"
                raise TypeError(f"{name} has no argument {key!r}{hint}.")
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    except (TypeError, NameError):  # Python says what is wrong with the call; a type is known to checkers only
        return
    for argument, value in given.items():
        if argument in hints and argument not in skip:
            require(name, argument, value, schema_of(hints[argument]))


def require(who: str, argument: str, value: Any, schema: Schema) -> None:
    """Refuse a value of an argument.

    Args:
        who: Whose argument.
        argument: Its name.
        value: As the user gave it.
        schema: What it should be.

    Raises:
        ValueError: Says all of these.
    """
    if (wrong := schema.wrong(value)) is not None:
        raise ValueError(f"{who}: `{argument}{wrong.path}` must be {wrong.expected}; got {given(wrong.value)}.")


OnlyWith = tuple[str, tuple[Any, ...], tuple[str, ...]]


def without_use(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], only_with: Sequence[OnlyWith]) -> str:
    """What of the arguments of a call that went well means nothing beside the others, as a sentence; empty if none.

    Args:
        cls: What was made.
        args: Positional arguments.
        kwargs: Arguments by name.
        only_with: An argument, values of it, and the arguments that mean something with these values alone.
    """
    call = inspect.signature(cls).bind(*args, **kwargs)
    call.apply_defaults()
    said = []
    for other, values, names in only_with:
        idle = [name for name in names if call.arguments[name] != call.signature.parameters[name].default]
        if idle and call.arguments[other] not in values:
            those = ", ".join(f"`{name}`={given(call.arguments[name])}" for name in idle)
            allowed = " or ".join(map(repr, values))
            said.append(f"{those} has no effect with {other}={call.arguments[other]!r}, only with {allowed}")
    return "; ".join(said)


def given(value: Any) -> str:
    """A value as the user wrote it, cut if it is long; with its type, if it only looks like plain data."""
    try:
        text = repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    kind = type(value)
    plain = kind.__module__ == "builtins" or text.startswith(("<", f"{kind.__module__.partition('.')[0]}."))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if plain else f"{text} (a {kind.__module__}.{kind.__name__})"


def schema_of(annotation: Any) -> Schema:
    """What a value of an annotated argument must look like; anything, where the annotation is none of plain data.

    Args:
        annotation: Such as ``int | float`` or ``dict[str, float] | None``.
    """
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SINGLE:
        return _SINGLE[annotation]
    if origin is Literal:
        return OneOf(inside)
    if origin in (typing.Union, types.UnionType):
        schemas = tuple(_without_doubles(schema_of(part) for part in inside if part is not types.NoneType))
        single = schemas[0] if len(schemas) == 1 else _AnyOf(schemas)
        return OrNone(single) if types.NoneType in inside else single
    if origin in (list, Sequence) and inside:
        return ListOf(schema_of(inside[0]))
    if origin in (dict, Mapping) and inside:
        return MapOf(schema_of(inside[0]), schema_of(inside[1]))
    return Anything()


def _without_doubles(schemas: Iterator[Schema]) -> list[Schema]:
    """A float may be whole."""
    found = list(schemas)
    return [schema for schema in found if not (isinstance(schema, Int) and Number() in found)]

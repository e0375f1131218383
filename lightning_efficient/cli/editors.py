"""A JSON schema of the methods' YAML keys, by which editors complete and check them while one types."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class

_TYPES = {
    bool: {"type": "boolean"}, int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"},
    type(None): {"type": "null"},
}  # fmt: skip


def json_schema(alone: bool = True) -> dict[str, Any]:
    """The schema of a methods file, or of the methods' part of an ``EfficientCLI`` configuration (draft 2020-12).

    Registered methods of other packages are in it. What is not a type of YAML (an object that only Python can give) is
    left open.

    Args:
        alone: Whether a file has these keys and no other, as a methods file does; a configuration has its own beside
            them.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Methods of lightning-efficient",
        "type": "object",
        "properties": {name: _method(name) for name in METHODS.with_callback},
        "additionalProperties": not alone,
    }


def _method(name: str) -> dict[str, Any]:
    cls = callback_class(name)
    texts = parse(inspect.getdoc(cls) or "")
    described = {p.arg_name: " ".join((p.description or "").replace("``", "`").split()) for p in texts.params}
    hints = get_type_hints(cls.__init__)
    arguments = {}
    for argument, parameter in inspect.signature(cls).parameters.items():
        made = dict(of_type(hints.get(argument, Any)))
        if text := described.get(argument):
            made["description"] = text
        if parameter.default is not inspect.Parameter.empty and _is_plain(parameter.default):
            made["default"] = parameter.default
        arguments[argument] = made
    mapping = {"type": "object", "properties": arguments, "additionalProperties": False}
    required = [n for n, p in inspect.signature(cls).parameters.items() if p.default is inspect.Parameter.empty]
    if required:
        mapping["required"] = required
    short = [] if required else [{"type": "boolean"}, {"type": "null"}]
    return {"description": texts.short_description or cls.__name__, "anyOf": [*short, mapping]}


def of_type(hint: Any) -> Mapping[str, Any]:
    """The schema of an annotation; empty, which allows everything, for what YAML cannot write."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _TYPES:
        return _TYPES[hint]
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        options = [of_type(option) for option in inner]
        return {"anyOf": options} if all(options) else {}
    if origin in (list, Sequence, tuple):
        item = of_type(inner[0]) if inner else {}
        return {"type": "array", "items": item}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": of_type(inner[1]) or True}
    return {}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))

"""A JSON schema of the methods' YAML keys, by which editors complete and check them while one types."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from lightning.pytorch import Trainer

from lightning_efficient.cli.efficient_cli import EfficientCLI
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class


def _any_case(words: str) -> str:
    """A pattern for small and capital letters; those of JSON schemas have no flag for that."""
    return "".join(f"[{char}{char.upper()}]" if char.isalpha() else char for char in words)


def _or_text(kind: str, pattern: str) -> dict[str, Any]:
    """What the loaders take in quotation marks, too. An editor reads YAML 1.2, in which `yes` and `1_000` are texts."""
    return {"type": [kind, "string"], "pattern": rf"^\s*({pattern})\s*$"}  # the pattern is about texts only


_INT = r"[-+]?(0[xX][\da-fA-F_]+|0b[01_]+|\d[\d_]*)"
_FLOAT = rf"{_INT}|[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?"
_TYPES = {
    bool: _or_text("boolean", _any_case("true|false|yes|no|on|off")),
    int: _or_text("integer", _INT),
    float: _or_text("number", _FLOAT),
    str: {"type": "string"},
    type(None): _or_text("null", "null|Null|NULL|~"),
}
_LIST = _or_text("array", r"\[[\s\S]*\]|- [\s\S]*")
_MAPPING = _or_text("object", r"\{[\s\S]*\}|[\s\S]*:[\s\S]*")


def json_schema(alone: bool = True) -> dict[str, Any]:
    """The schema of a methods file, or of a configuration of ``lightning-efficient fit`` (draft 2020-12).

    Registered methods of other packages are in it. What is not a type of YAML (an object that only Python can give) is
    left open, and so is what a configuration holds beside methods.

    Args:
        alone: Whether a file has these keys and no other, as a methods file does.
    """
    commands = {} if alone else {command: {"$ref": "#"} for command in EfficientCLI.subcommands()}
    others = [] if alone else _keys_beside_methods()
    spellings = {pattern: made for name in METHODS.with_callback for pattern, made in _spellings(name).items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Methods of lightning-efficient",
        "type": "object",
        "properties": {
            **{name: _method(name, alone) for name in METHODS.with_callback}, **commands, **dict.fromkeys(others, True)
        },
        "patternProperties": {**spellings, **({rf"^({'|'.join([*commands, *others])})\..": True} if others else {})},
        "additionalProperties": False,
    }  # fmt: skip


def _keys_beside_methods() -> list[str]:
    arguments = [
        argument
        for command, skipped in EfficientCLI.subcommands().items()
        for argument in inspect.signature(getattr(Trainer, command)).parameters
        if argument != "self" and argument not in skipped
    ]
    return list(
        dict.fromkeys(
            ["config", "seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", *arguments]
        )
    )


def _spellings(name: str) -> dict[str, Any]:
    """Patterns for what :meth:`Registry.named` takes for a method beside its key, and for keys of single arguments."""
    words = {word.replace("_", "").lower() for word in (name, METHODS[name].class_name)}
    word = "|".join("[-_]*".join(map(_any_case, word)) for word in sorted(words))
    arguments = "|".join(inspect.signature(callback_class(name)).parameters)
    this = rf"[-_]*({word})[-_]*"
    return {
        rf"^(?!{name}$)(.*\.)?{this}$": {"$ref": f"#/properties/{name}"},
        rf"^{this}\.({arguments})$": True,
    }


def _method(name: str, alone: bool) -> dict[str, Any]:
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
    short = [] if required else [_TYPES[bool], {"type": "null"}]
    file = [] if alone else [{"type": "string", "pattern": r"\.(ya?ml|json)$"}]  # that has the arguments in it
    return {"description": texts.short_description or cls.__name__, "anyOf": [*short, *file, mapping]}


def of_type(hint: Any) -> Mapping[str, Any]:
    """The schema of an annotation; empty, which allows everything, for what YAML cannot write."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _TYPES:
        return _TYPES[hint]
    if origin is Literal:
        return {"enum": list(dict.fromkeys([*inner, *map(str, inner)]))}
    if origin in (Union, types.UnionType):
        options = [of_type(option) for option in inner]
        return {"anyOf": options} if all(options) else {}
    if origin in (list, Sequence, tuple):
        return {**_LIST, "items": of_type(inner[0]) if inner else {}}
    if origin in (dict, Mapping):
        return {**_MAPPING, "additionalProperties": of_type(inner[1]) or True}
    return {}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))

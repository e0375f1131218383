"""Methods by name: registering a callback of one's own, and building callbacks from what a YAML file says.

.. code-block:: yaml

    sigma_reparam: true
    collapse_monitor: {every_n_steps: 50, exclude: ["head"]}

A method that is named is on, unless it says ``enabled: false``: in a methods file, in a configuration of
``EfficientCLI``, on the command line and in a variant of ``ablate``. In all of them its class's name will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from lightning_efficient.common.arguments import require, schema_of
from lightning_efficient.common.method import Method
from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.common.schema import Flag
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.structural import StructuralCallback


def register_method(
    name: str,
    callback: str | type[EfficientCallback],
    *,
    after: str | None = None,
    before: str | None = None,
    replay: str | Callable[..., Any] | None = None,
    config: str | type[Any] | None = None,
    excludes: Mapping[str, str] | None = None,
    charts: Mapping[str, str] | None = None,
    prunes: Literal["weights", "units"] | None = None,
    lasting: bool = False,
) -> None:
    """Make a callback of your own a method like those of this package, in this process.

    It gets a key in methods files, in ``EfficientCLI`` and on the command line, entries in checkpoints that
    ``load_from_checkpoint`` and resumed runs read, a place in the order, a column of hyper-parameters in every run, and
    charts in TensorBoard. Call it where the callback is defined, so that whoever imports the one has the other. Files
    that name the method need that import; a package with an entry point in the group ``lightning_efficient.methods``
    that names the module is imported without being asked.

    Args:
        name: The callback's ``method``, an identifier that no other method has: the key in YAML and on the command line
            and the folder of logged quantities, ``efficient/<name>/...``. Registering the same again changes nothing.
        callback: The class, or ``"package.module:Class"``, which is imported when it is first used.
        after: The method that it follows in the order. Where several follow the same one, in that of registration.
        before: The method that it precedes. Without either it comes last.
        replay: For a callback that replaces modules: ``function(model, config, names) -> Change``, or where it is. It
            replaces the modules ``names`` of a new model before weights are loaded, with the ``config`` of the recipe.
        config: A dataclass, or where it is: a recipe whose ``config`` lacks one of its fields is refused before
            ``replay`` is called.
        excludes: Method that cannot be used on the same model → why, and what to do instead.
        charts: Title of a TensorBoard chart → regular expression for the names of the scalars in it.
        prunes: What it makes zero, if that stays so only while it runs: no run may then resume without it.
        lasting: Whether it multiplies weights by something that stays in them: files of a model that is trained on
            without the callback then still name it.

    Raises:
        ValueError: The name is no identifier or taken, a method named here is unknown, or the class is not such a
            callback: an ``EfficientCallback`` with ``method = name`` and the argument ``enabled``; or ``config`` is no
            dataclass.
    """
    method = Method(name, callback, after, before, replay, config, excludes or {}, charts or {}, prunes, lasting)
    if not isinstance(callback, str):
        _check_class(method, callback)
    if not isinstance(config, str):
        method.find("config")
    METHODS.add(method)


def callback_class(method: str) -> type[EfficientCallback]:
    """The callback of a method.

    Args:
        method: Its name.

    Raises:
        ValueError: What is registered under the name is not there, or is no callback for it.
    """
    return _check_class(METHODS[method], METHODS[method].find("callback"))


def _check_class(method: Method, cls: Any) -> type[EfficientCallback]:
    if not (isinstance(cls, type) and issubclass(cls, EfficientCallback)):
        raise ValueError(
            f"the callback of the method {method.name!r} is {cls!r}; expected a subclass of EfficientCallback."
        )
    if getattr(cls, "method", None) != method.name:
        raise ValueError(
            f"{cls.__name__} is registered as {method.name!r}, and its `method` is {getattr(cls, 'method', None)!r}; "
            "expected the same name."
        )
    if "enabled" not in inspect.signature(cls).parameters:
        raise ValueError(
            f"{cls.__name__} has no argument `enabled`, by which YAML switches {method.name!r} on and off."
        )
    if issubclass(cls, StructuralCallback) and method.replay is None:
        raise ValueError(
            f"{cls.__name__} replaces modules, so {method.name!r} needs `replay`: the function that does it again "
            "before weights are loaded."
        )
    return cls


def read_methods_file(path: str | PathLike[str]) -> list[EfficientCallback]:
    """Build the callbacks that a YAML file asks for.

    Args:
        path: A YAML mapping of methods, see :func:`spelled`.

    Returns:
        One callback a method, in the order of the methods: that of the file means nothing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a YAML mapping, a key is unknown, or a value is of the wrong type.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} should hold a mapping such as `sigma_reparam: true`; got {content!r}.")
    try:
        callbacks = [build_callback(method, arguments) for method, arguments in spelled(content).items()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return sorted(callbacks, key=lambda callback: METHODS.position(callback.method))


def read_yaml(path: str | PathLike[str]) -> Any:
    """What a YAML file holds.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (looked in {Path.cwd()}).")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _NoDoubles)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def check_doubles(text: str) -> None:
    """Refuse YAML in which a key is twice, whatever else is in it.

    Args:
        text: The YAML.

    Raises:
        TypeError: There is one; says where.
    """
    try:
        yaml.load(text, _NoDoubles)
    except _DoubleError as error:
        raise TypeError(str(error)) from None
    except yaml.YAMLError:  # for whoever reads it
        pass


class _DoubleError(yaml.constructor.ConstructorError):  # type: ignore[misc]
    pass


class _NoDoubles(yaml.SafeLoader):  # type: ignore[misc]
    """YAML of which nothing is lost: of a key that is there twice the first value would be."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key, (mark, _) in zip(keys, node.value, strict=False):
            if keys.count(key) > 1:
                raise _DoubleError(None, None, f"the key {key!r} is there twice", mark.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def nested(content: Mapping[Any, Any], named: Callable[[object], str | None] = METHODS.named) -> dict[Any, Any]:
    """With ``method: {argument: value}`` for ``method.argument: value``, and true for ``"true"``.

    Args:
        content: What some YAML says, of methods or of anything else.
        named: The name that the part of a key before its first dot stands for, if it is a method's.

    Raises:
        ValueError: An argument is there twice, or beside something that holds no arguments.
    """
    found: dict[Any, Any] = {}
    dotted: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        head, _, argument = str(key).partition(".")
        if argument and (name := named(head)) is not None:
            dotted.setdefault(name, {})[argument] = value
        else:
            found[key] = switch(value) if named(key) is not None else value
    for name, arguments in dotted.items():
        key = next((key for key in found if named(key) == name), name)
        beside = found.get(key)
        given = {"enabled": beside} if isinstance(beside, bool) else beside or {}
        if not isinstance(given, Mapping) or (arguments.keys() & given.keys()):
            raise ValueError(f"`{name}.{next(iter(arguments))}` stands beside `{key}: {beside}`: merge them into one.")
        found[key] = {**given, **arguments}
    return found


def switch(value: Any) -> Any:
    """A text that YAML would read as true or false without its quotation marks, as that.

    Args:
        value: Of a method's key.
    """
    words = yaml.SafeLoader.bool_values
    return words.get(value.lower(), value) if isinstance(value, str) else value


def spelled(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """What some YAML says of methods, as names and arguments with ``enabled`` among them.

    Args:
        content: Method, by any of its spellings (:meth:`Registry.named`), to its arguments; ``True``, ``False`` and
            ``None`` are short for ``{enabled: true}``, ``{enabled: false}`` and ``{}``. A key may also be that of one
            argument, ``sigma_reparam.init``.

    Raises:
        ValueError: A method is unknown or named twice, or is given something else than arguments.
    """
    found: dict[str, dict[str, Any]] = {}
    keys: dict[str, Any] = {}
    for key, arguments in nested(content).items():
        method = METHODS.named(key)
        if method is None:
            hint = METHODS.near(key) or f"; expected one of {', '.join(METHODS.with_callback)}"
            raise ValueError(f"unknown method {key!r}{hint}.")
        if method in found:
            raise ValueError(f"{keys[method]!r} and {key!r} are the same method: merge them into one.")
        if not (arguments is None or isinstance(arguments, bool | Mapping)):
            raise ValueError(f"`{key}` should be true, false or a mapping of arguments; got {arguments!r}.")
        given = dict(arguments) if isinstance(arguments, Mapping) else {"enabled": arguments is not False}
        found[method], keys[method] = {"enabled": True, **given}, key
    return found


def build_callback(method: str, arguments: Any) -> EfficientCallback:
    """Build the callback of one method.

    Args:
        method: Its name, or its class's.
        arguments: Its arguments as YAML gives them; ``True``, ``False`` and ``None`` as in :func:`spelled`.

    Raises:
        ValueError: The method or an argument is unknown, or a value is of the wrong type.
    """
    ((name, given),) = spelled({method: arguments}).items()
    cls = callback_class(name)
    accepted = list(inspect.signature(cls).parameters)
    for argument in given:
        if argument not in accepted:
            hint = near(argument, accepted) or f"; it has {', '.join(accepted)}"
            raise ValueError(f"`{method}` has no argument {argument!r}{hint}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, name)
    try:
        parsed = parser.parse_object({name: given})
    except (ArgumentError, OverflowError) as error:
        hints = get_type_hints(cls.__init__)
        for argument in given:
            # In words of YAML, where its own are Python's types; of a number without end it names none.
            if f'"{name}.{argument}"' in str(error) or isinstance(error, OverflowError):
                require(name, argument, given[argument], schema_of(hints[argument]))
        raise ValueError(" ".join(str(error).split())) from None
    require(name, "enabled", parsed[name]["enabled"], Flag())
    return cls(**parsed[name].as_dict())


def announce(callbacks: Iterable[EfficientCallback], source: str) -> None:
    """Say in one line, on one process, what was added and why.

    Args:
        callbacks: What was added.
        source: What asked for it.
    """
    names = [type(callback).__name__ + ("" if callback.enabled else " (off)") for callback in callbacks]
    rank_zero_info(f"lightning_efficient: {source} adds {', '.join(names)}.")

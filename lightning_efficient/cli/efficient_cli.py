"""LightningCLI with one top-level key per method."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from types import MappingProxyType
from typing import Any, NoReturn, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_efficient.common.arguments import schema_of
from lightning_efficient.common.names import VARIABLE
from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.lifecycle.files import ShardedCheckpointError, check_checkpoint
from lightning_efficient.lifecycle.methods import callback_class, check_doubles, nested, switch

# As jsonargparse has put it since 4.39.
_UNKNOWN_OPTION = re.compile(
    r"(?:does not accept (?:option|nested key) '|Option '|Key '|[Uu]nrecognized arguments: --)([\w.]+)"
)

_GROUP = re.compile(r"Group '(\w+)' does not accept")

_VALUE = re.compile(r'Parser key "(\w+)\.(\w+)"')

_NO_CLASS = re.compile(r"class_path 'lightning\.[\w.]*Lightning(?:Data)?Module'")

_OPTION = re.compile(r"--([A-Za-z_][\w-]*)((?:\.[\w.+-]+)?)(=.*)?", re.DOTALL)


class EfficientArgumentParser(LightningArgumentParser):
    """LightningCLI's parser with errors of a few lines, and any spelling of the methods' keys."""

    _commands: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `python -m package` is no `__main__.py` that one could run.
        self.prog = self.prog.replace("__main__.py", "lightning-efficient")

    def format_usage(self) -> str:
        """One line: the full usage of a Trainer's parser is sixty, and buries the error below it."""
        prog = self.prog.replace(" [options]", "")
        return f"usage: {prog} [options]\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and the message; a mistyped option gets a hint.

        Args:
            message: What is wrong.
            ex: The exception it comes from.
        """
        if (found := _UNKNOWN_OPTION.search(message)) is not None:
            parser: Any = getattr(ex, "subcommand_parser", None) or self
            group = _GROUP.search(message)
            if group and parser is self and self._commands:  # a file of options for a command
                parser = next(iter(self._commands.values()))
            known = list(parser.get_defaults().keys())
            if group:  # its options are named without it
                known = [name.removeprefix(f"{group[1]}.") for name in known if name.startswith(f"{group[1]}.")]
            key, argument = found[1].partition(".")[::2]
            of_method = "" if any(name.startswith(f"{key}.") for name in known) else METHODS.near(key)
            # Names of one group only: what they begin with would make any two of them alike.
            inside = [name.partition(".")[2] for name in known if name.startswith(f"{key}.")] if argument else []
            of_argument = near(found[1], known) if not inside or near(argument, inside) else ""
            if inside and not of_argument and self._method(key) == key:
                of_argument = f"; {key} has {', '.join(inside)}"
            message += of_argument or of_method if argument else of_method or of_argument
        if (wrong := _VALUE.search(message)) is not None and self._method(wrong[1]) == wrong[1]:
            hints = get_type_hints(callback_class(wrong[1]).__init__)
            if wrong[2] in hints:  # beside Python's types
                message = f"{message.rstrip()}\n`{wrong[2]}` must be {schema_of(hints[wrong[2]])}."
        if _NO_CLASS.search(message):  # arguments as a script with `LightningCLI(MyModel)` takes them
            message += (
                "\nNo class is named: write `model: {class_path: my_package.MyModel, init_args: {...}}`, and `data` "
                "likewise, or run the script that names them."
            )
        super().error(message, ex)
        raise AssertionError("unreachable")

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, and keep them: a configuration may be of several.

        Args:
            *args: As for the base class.
            **kwargs: As for the base class.
        """
        commands = super().add_subcommands(*args, **kwargs)
        self._commands = commands.choices
        return commands

    # -- one spelling for all ------------------------------------------------------------------------------------

    def parse_args(self, args: Any = None, namespace: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse options, those of methods in any spelling; see :class:`EfficientCLI`.

        Args:
            args: The options; None: those of the process.
            namespace: As for the base class.
            *rest: As for the base class.
            **kwargs: As for the base class.
        """
        if self.callback_keys:
            args = self._options(list(sys.argv[1:] if args is None else args))
        return super().parse_args(args, namespace, *rest, **kwargs)

    def parse_string(self, content: str, *rest: Any, **kwargs: Any) -> Any:
        """Parse a configuration, with methods in any spelling; files come by here as well.

        Args:
            content: The configuration.
            *rest: As for the base class.
            **kwargs: As for the base class.
        """
        loaded: Any = None
        with suppress(Exception):  # what cannot be read is refused by the base class
            loaded = get_loader(self.parser_mode)(content)
            if isinstance(loaded, str):  # a key without a value: the loader takes it for a text
                loaded = yaml.safe_load(content)
        if isinstance(loaded, dict):
            check_doubles(content)
        if isinstance(loaded, dict) and (spelled := self._config(loaded)) != loaded:
            content = yaml.safe_dump(spelled, sort_keys=False)
        return super().parse_string(content, *rest, **kwargs)

    def parse_object(self, cfg_obj: Any, *rest: Any, **kwargs: Any) -> Any:
        """Parse a configuration, with methods in any spelling.

        Args:
            cfg_obj: The configuration.
            *rest: As for the base class.
            **kwargs: As for the base class.
        """
        return super().parse_object(self._config(cfg_obj) if isinstance(cfg_obj, dict) else cfg_obj, *rest, **kwargs)

    @property
    def _said(self) -> set[str]:
        """Methods of which some file or option has said whether they are on, of all subcommands together."""
        said: set[str] = vars(getattr(self, "parent_parser", self)).setdefault("_methods_said", set())
        return said

    def _method(self, key: str) -> str | None:
        method = METHODS.named(key)
        return method if method in self.callback_keys else None

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with one spelling; a method that is named, and not switched off, is on."""
        found: dict[str, Any] = {}
        try:
            config = nested(config, lambda key: str(key) if key in self._commands else self._method(str(key)))
        except ValueError as error:
            raise TypeError(str(error)) from None
        for key, value in config.items():
            if key in self._commands and isinstance(value, Mapping):
                found[key] = self._commands[key]._config(value)
            elif (method := self._method(str(key))) is None:
                found[key] = value
            elif method in found:
                raise TypeError(f"{key!r} is another word for the method {method!r}, which is there, too: merge them.")
            elif isinstance(value, Mapping) and "enabled" not in value:
                found[method] = dict(value) if method in self._said else {"enabled": True, **value}
            elif value is None or isinstance(value, bool | Mapping):
                found[method] = value if isinstance(value, Mapping) else {"enabled": value is not False}
                self._said.add(method)
            elif isinstance(value, str):
                found[method] = value  # the path of a file with its arguments
            else:
                raise TypeError(f"`{key}` should be true, false or a mapping of arguments; got {value!r}.")
        return found

    def _options(self, options: list[str]) -> list[str]:
        """The same for options; ``--sigma_reparam`` alone switches a method on."""
        found: list[str] = []
        named: list[str] = []
        while options:
            option = options.pop(0)
            parts = _OPTION.fullmatch(option)
            method = self._method(parts[1]) if parts else None
            if parts is None or method is None:
                found.append(option)
                continue
            argument, value = parts[2], parts[3]
            if not argument and value is None:
                value = f"={options.pop(0)}" if options and not options[0].startswith("-") else "=true"
            if not argument and isinstance(on := switch(str(value)[1:]), bool):
                argument, value = ".enabled", f"={str(on).lower()}"
            (self._said.add if argument == ".enabled" else named.append)(method)
            found.append(f"--{method}{argument}{value or ''}")
        # The weakest of all, so first: a file may say otherwise.
        return [f"--{method}.enabled=true" for method in dict.fromkeys(named) if method not in self._said] + found


def add_method_arguments(parser: LightningArgumentParser) -> None:
    """Give a parser one key per method, off by default.

    Args:
        parser: The parser of a command that runs a Trainer.
    """
    for method in METHODS.with_callback:
        parser.add_lightning_class_args(callback_class(method), method)
        parser.set_defaults({f"{method}.enabled": False})


def check_path(config: Any, weights_only: bool | None) -> None:
    """Refuse the ``ckpt_path`` of a parsed configuration if it is no whole checkpoint.

    Args:
        config: Of one command, with ``trainer`` in it.
        weights_only: As it will be loaded.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is something else.
    """
    path, strategy = config.get("ckpt_path"), config["trainer"].get("strategy")
    if path in (None, "best", "last", "hpc") or str(path).startswith("registry"):  # what the Trainer looks for itself
        return
    try:
        check_checkpoint(str(path), weights_only)
    except ShardedCheckpointError:
        if strategy is None or str(strategy).startswith(("auto", "ddp", "single")):
            raise


class EfficientCLI(LightningCLI):
    """``LightningCLI`` with one top-level key per method: ``sigma_reparam``, ``collapse_monitor``.

    A method is off until it is named: ``sigma_reparam: true`` or ``sigma_reparam: {init: one}`` in a config file,
    ``--sigma_reparam`` or ``--sigma_reparam.init=one`` on the command line; it then is on unless some file or option
    says ``enabled: false``. The name of its class will do for a key: ``PRepBN`` or ``prepbn`` for ``norm_swap``.
    Several ``-c`` files merge key by key, so that an override file of two lines makes an ablation, and every run's
    saved config holds the same keys. Everything else is as in ``LightningCLI``.

    Args:
        *args: As for ``LightningCLI``.
        **kwargs: As for ``LightningCLI``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", EfficientArgumentParser)
        given = signature(LightningCLI).bind(*args, **kwargs).arguments.get("args")
        words = sys.argv[1:] if given is None else given
        self._first = words[0] if isinstance(words, list) and words else None
        super().__init__(*args, **kwargs)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parser; where the first word is a command, of this one only: each takes a fifth of a second.

        Args:
            add_subcommands: Whether it runs commands.
            main_kwargs: Arguments of the whole parser.
            subparser_kwargs: Command → arguments of its parser.
        """
        commands = self.subcommands()
        # Files and variables that belong to the whole parser may have sections for any command.
        if (
            add_subcommands
            and self._first in commands
            and not main_kwargs
            and "JSONARGPARSE_DEFAULT_ENV" not in os.environ
        ):
            only = {self._first: commands[self._first]}
            self.subcommands = lambda: only  # type: ignore[method-assign]
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the methods' keys; ``add_arguments_to_parser`` stays free for subclasses.

        Args:
            parser: The parser of one subcommand.
        """
        super().add_core_arguments_to_parser(parser)
        add_method_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then refuse a ``ckpt_path`` that is no whole checkpoint before anything is made.

        Args:
            parser: The parser.
            args: What to parse; None: the arguments of the process.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is something else.
        """
        super().parse_arguments(parser, args)
        if name := self.config.get("subcommand"):
            # Lightning reads the hyper-parameters in it now, and only from plain data.
            check_path(self.config[name], weights_only=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, unless a method would be in it twice.

        Args:
            **kwargs: Trainer arguments.
        """
        config = self.config_init.get(str(self.subcommand), self.config_init)
        listed = config["trainer"].get("callbacks") or []
        for method in METHODS.with_callback:
            ours = config[method]
            for other in listed if isinstance(listed, list) else [listed]:
                if type(other) is type(ours) and other.state_key == ours.state_key:
                    self.parser.error(
                        f"{type(ours).__name__} is in `trainer.callbacks` and has its own key `{method}` here: move "
                        f"its arguments to `{method}`, with `enabled: true`."
                    )
        if os.environ.get(VARIABLE):
            self.parser.error(
                f"the environment variable {VARIABLE} is set, and every method has its own key here: unset it, and "
                f"pass the methods as a `-c` file or as `--{METHODS.with_callback[0]}.enabled=true`."
            )
        return super().instantiate_trainer(**kwargs)

"""LightningCLI with one top-level key per method."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_efficient.common.names import VARIABLE
from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.lifecycle.files import ShardedCheckpointError, check_checkpoint
from lightning_efficient.lifecycle.methods import callback_class

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)")


class EfficientArgumentParser(LightningArgumentParser):
    """LightningCLI's parser with errors of a few lines."""

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
            message += near(found[1], parser.get_defaults().keys())
        super().error(message, ex)
        raise AssertionError("unreachable")


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

    Every method is off unless its key says ``enabled: true``, in a config file or as ``--sigma_reparam.enabled=true``.
    Several ``-c`` files merge key by key, so that an override file of two lines makes an ablation, and every run's
    saved config holds the same keys. Everything else is as in ``LightningCLI``.

    Args:
        *args: As for ``LightningCLI``.
        **kwargs: As for ``LightningCLI``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", EfficientArgumentParser)
        super().__init__(*args, **kwargs)

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

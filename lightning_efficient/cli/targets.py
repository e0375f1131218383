"""``lightning-efficient targets``: what each method would change in a model, before any training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_efficient.attention import AttentionProbe
from lightning_efficient.callbacks.collapse_monitor import CollapseMonitor
from lightning_efficient.cli.efficient_cli import EfficientCLI, add_method_arguments
from lightning_efficient.common.change import Change
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.running import as_call, evaluating
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.lifecycle.weights import WeightSpaceCallback

USAGE = """\
usage: lightning-efficient targets [-c CONFIG ...] [--model CLASS] [--model.ARG VALUE ...] [--METHOD.ARG VALUE ...]

What each method would change in a model, and why not the rest, before any training.

  -c CONFIG           a config file as for `lightning-efficient fit`; several merge
  --model CLASS       import path of a LightningModule or nn.Module class, or of a function annotated to return one
  --model.ARG VALUE   an argument of it
  --METHOD.ARG VALUE  an argument of a method, such as --sigma_reparam.exclude='[head]'

example: lightning-efficient targets --model timm.models.vit_tiny_patch16_224 --sigma_reparam.qkv=split"""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class _ModelOnly(EfficientCLI):
    """Accepts what ``fit`` accepts, and makes the model and the callbacks only."""

    def __init__(self, args: Sequence[str]) -> None:
        prog = {"prog": "lightning-efficient targets"}
        super().__init__(seed_everything_default=False, parser_kwargs=prog, args=list(args), run=False)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        add_method_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(list[str], args))
        self.config["seed_everything"] = False

    def before_instantiate_classes(self) -> None:
        for unused in ("trainer", "data", "optimizer", "lr_scheduler"):
            self.config.pop(unused, None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return cast(Trainer, None)


def show_targets(args: Sequence[str], console: Console | None = None) -> None:
    """Print one table a method.

    Args:
        args: Command-line arguments after ``targets``.
        console: Where to; None: standard output.

    Raises:
        ValueError: A method that is switched on refuses the model.
    """
    if not args or {"-h", "--help"} & set(args):
        print(USAGE)
        return
    cli = _ModelOnly(args)
    model: nn.Module = cli.model
    if isinstance(model, LightningModule):
        model.configure_model()
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters yet: does it build its layers in `setup`?")
    console = console or Console()
    refused = []
    for method in METHODS.with_callback:
        callback: EfficientCallback = cli.config_init[method]
        if not isinstance(callback, CollapseMonitor | StructuralCallback) and not hasattr(callback, "plan"):
            continue  # of the run, whatever its modules
        console.print(
            Text.assemble((f"\n{method}", "bold"), "" if callback.enabled else "  (off in this configuration)")
        )
        try:
            change = planned(callback, model)
        except ValueError as error:
            refused += [method] * callback.enabled
            console.print(Text(f"  {error}"))
            continue
        console.print(_table(change))
        for note in change.notes:
            console.print(f"  {note}", highlight=False)
        console.print(f"  {len(change.targets)} matched, {len(change.skipped)} left alone", highlight=False)
    if refused:
        raise ValueError(f"{', '.join(refused)}: switched on, and would refuse this model.")


def planned(callback: EfficientCallback, model: nn.Module) -> Change:
    """The record of what a callback would do, without doing it.

    Args:
        callback: One of this package's.
        model: The model.

    Raises:
        ValueError: The method finds nothing, or refuses the model.
    """
    if isinstance(callback, CollapseMonitor):
        return _attention(callback, model)
    if not hasattr(callback, "plan"):
        return cast(StructuralCallback, callback).apply(deepcopy(cast(LightningModule, model)))
    change = cast(WeightSpaceCallback, callback).plan(cast(LightningModule, model)).change
    assert change is not None
    return change


def _attention(monitor: CollapseMonitor, model: nn.Module) -> Change:
    """Attention is known only once it runs: one forward on the model's own example input."""
    example = getattr(model, "example_input_array", None)
    if example is None:
        raise ValueError(
            "attention is found while the model runs, and this one has no `example_input_array` to run on."
        )
    monitor.choose(model)
    with evaluating(model), AttentionProbe(model, max_samples=1, max_queries=1) as probe:
        as_call(example).run(model)
    change = Change(monitor.method, skipped=dict(probe.unread))
    for call in probe.calls:
        name = call.site.partition("#")[0]
        if monitor.covered(name):
            change.targets[call.site] = f"{call.kind}, {call.rows.entropy.shape[1]} heads"
        else:
            change.skipped[call.site] = "not covered by include, or excluded"
    return change


def _table(change: Change) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", style="dim")
    table.add_column(overflow="fold")
    for notes, mark, style in ((change.targets, "✓", ""), (change.skipped, "–", "dim")):
        for (name, note), count in _grouped(notes).items():
            table.add_row(Text(f"{mark} {name}", style), f"× {count}" if count > 1 else "", Text(note, style))
    return table


def _grouped(notes: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Names that differ in layer numbers only and say the same: one line, counted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, note in notes.items():
        groups.setdefault((_NUMBER.sub("*", name), note), []).append(name)
    return {(key[0] if len(names) > 1 else names[0], key[1]): len(names) for key, names in groups.items()}

"""``lightning-efficient targets``: what each method would change in a model, before any training."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_efficient.attention import AttentionProbe
from lightning_efficient.callbacks.collapse_monitor import CollapseMonitor
from lightning_efficient.cli.efficient_cli import EfficientCLI, add_method_arguments
from lightning_efficient.cli.inputs import first_batch_of, inputs_of, read_inputs
from lightning_efficient.common.change import Change
from lightning_efficient.common.escaping import printable_lines, rich_text
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.running import Call, Inputs, as_call, evaluating, first_line, logs_from
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.lifecycle.weights import WeightSpaceCallback
from lightning_efficient.trainer.example import example_of, first_batch

USAGE = """\
usage: lightning-efficient targets [-c CONFIG ...] [--model CLASS] [--model.ARG VALUE ...] [--METHOD.ARG VALUE ...]

What each method would change in a model, and why not the rest, before any training.

  -c CONFIG           a config file as for `lightning-efficient fit`; several merge
  --model CLASS       import path of a LightningModule or nn.Module class, or of a function annotated to return one
  --model.ARG VALUE   an argument of it
  --METHOD.ARG VALUE  an argument of a method, such as --sigma_reparam.exclude='[head]'
  --data CLASS        import path of a LightningDataModule: what the training step does with its first batch decides
  --input SHAPE       else, one for each input: [name=]N,N,...[:kind], kind float, int (ids), mask or bool;
                      without either the model's `example_input_array`

example: lightning-efficient targets --model timm.models.vit_tiny_patch16_224 --sigma_reparam.qkv=split"""

_INPUT = re.compile(r"--input(?:[-_]shape)?(?==|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class _ModelOnly(EfficientCLI):
    """Accepts what ``fit`` accepts, and makes the model, the data and the callbacks only."""

    def __init__(self, args: Sequence[str]) -> None:
        prog = {"prog": "lightning-efficient targets"}
        super().__init__(seed_everything_default=False, parser_kwargs=prog, args=list(args), run=False)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        add_method_arguments(parser)
        parser.add_argument("--input", type=list[str], default=[], help="shape of an input")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(_listed(cast(list[str], args)))
        self.config["seed_everything"] = False

    def before_instantiate_classes(self) -> None:
        for unused in ("trainer", "optimizer", "lr_scheduler"):
            self.config.pop(unused, None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return cast(Trainer, None)


def _listed(args: Sequence[str]) -> list[str]:
    """``--input`` and ``--input-shape``, perhaps several times, as one list."""
    found: list[str] = []
    rest = [part for arg in args for part in (arg.split("=", 1) if _INPUT.match(arg) else [arg])]
    kept = []
    while rest:
        arg = rest.pop(0)
        if _INPUT.fullmatch(arg) and rest:
            found.append(rest.pop(0))
        else:
            kept.append(arg)
    return [*kept, f"--input={json.dumps(found)}"] if found else kept


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
    inputs, data = read_inputs(cli.config_init["input"]), cli.datamodule
    if isinstance(model, LightningModule):
        if data is not None:
            data.prepare_data()
            data.setup("fit")
        model.configure_model()
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters yet: does it build its layers in `setup`?")
    trains = isinstance(model, LightningModule) and inputs is None and _has_data(model, data)
    if inputs is None and data is not None and not trains:
        inputs = inputs_of(model, first_batch_of(data))
    if inputs is not None:
        _check_runs(model, inputs)
        model.example_input_array = inputs  # type: ignore[assignment]
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
            if trains:
                change = planned_in_training(callback, cast(LightningModule, model), data)
            else:
                change = planned(callback, model)
        except ValueError as error:
            refused += [method] * callback.enabled
            console.print(Text(f"  {printable_lines(error)}"))
            continue
        console.print(_table(change))
        for note in change.notes:
            console.print(Text(f"  {printable_lines(note)}"))
        console.print(f"  {len(change.targets)} matched, {len(change.skipped)} left alone", highlight=False)
    if refused:
        raise ValueError(f"{', '.join(refused)}: switched on, and would refuse this model.")


def _has_data(model: LightningModule, data: LightningDataModule | None) -> bool:
    """Whether a training step can be run: then what it does is what counts."""
    given = data is not None or (is_overridden("train_dataloader", model) and model.example_input_array is None)
    return given and is_overridden("training_step", model) and is_overridden("configure_optimizers", model)


def planned(callback: EfficientCallback, model: nn.Module) -> Change:
    """The record of what a callback would do, without doing it, by the model's ``example_input_array``.

    Args:
        callback: One of this package's.
        model: The model.

    Raises:
        ValueError: The method finds nothing, or refuses the model.
    """
    if isinstance(callback, CollapseMonitor):
        example = getattr(model, "example_input_array", None)
        if example is None:
            raise ValueError(
                "attention is found while the model runs, and this one has no `example_input_array` to run on: give "
                "--data, or --input with its shape."
            )
        return _attention(callback, model, model, as_call(example))
    if not hasattr(callback, "plan"):
        return cast(StructuralCallback, callback).apply(deepcopy(cast(LightningModule, model)))
    change = cast(WeightSpaceCallback, callback).plan(cast(LightningModule, model)).change
    assert change is not None
    return change


def planned_in_training(
    callback: EfficientCallback, model: LightningModule, data: LightningDataModule | None
) -> Change:
    """The same, as a run on this data finds it: a copy begins to train, and ends before the first step.

    Args:
        callback: One of this package's.
        model: The model.
        data: Its data; None: its own.

    Raises:
        ValueError: The method finds nothing, or refuses the model.
    """
    ours, look = deepcopy(callback), _Look()
    ours.enabled = True
    with warnings.catch_warnings(), logs_from(logging.ERROR, "lightning.pytorch", "lightning.fabric"):
        warnings.simplefilter("ignore")  # what a run says, it says in the run
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0, logger=False, callbacks=[look, ours],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with suppress(_SeenError):
            trainer.fit(deepcopy(model), datamodule=data)
    assert look.change is not None
    return look.change


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    call = as_call(inputs)
    try:
        with evaluating(model):
            call.run(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on the --input [{call}]: {first_line(error)}."
        ) from error


class _SeenError(Exception):
    """Ends a run that has begun."""


class _Look(Callback):
    """Reads what the next callback has planned, once all are ready."""

    change: Change | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callback = next(cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback))  # type: ignore[attr-defined]
        if isinstance(callback, CollapseMonitor):
            example = example_of(trainer, pl_module, "fit", first_batch(trainer))
            self.change = _attention(callback, pl_module, example.model, Call(example.args))
        elif isinstance(callback, WeightSpaceCallback):
            self.change = callback.change
        else:
            changes = [c for c in attachment(pl_module).changes if c.method == callback.method]
            self.change = Change(callback.method)
            for change in changes:
                self.change.targets |= change.targets
                self.change.skipped |= change.skipped
                self.change.notes += change.notes
        raise _SeenError


def _attention(monitor: CollapseMonitor, names: nn.Module, model: nn.Module, call: Call) -> Change:
    """Attention is known only once it runs: one forward."""
    monitor.choose(names)
    with evaluating(model), AttentionProbe(model, max_samples=1, max_queries=1) as probe:
        call.run(model)
    change = Change(monitor.method, skipped=dict(probe.unread))
    for seen in probe.calls:
        if monitor.covered(seen.site.partition("#")[0]):
            change.targets[seen.site] = f"{seen.kind}, {seen.rows.entropy.shape[1]} heads"
        else:
            change.skipped[seen.site] = "not covered by include, or excluded"
    return change


def _table(change: Change) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", style="dim")
    table.add_column(overflow="fold")
    for notes, mark, style in ((change.targets, "✓", ""), (change.skipped, "–", "dim")):
        for (name, note), count in _grouped(notes).items():
            table.add_row(rich_text(f"{mark} {name}", style), f"× {count}" if count > 1 else "", rich_text(note, style))
    return table


def _grouped(notes: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Names that differ in layer numbers only and say the same: one line, counted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, note in notes.items():
        groups.setdefault((_NUMBER.sub("*", name), note), []).append(name)
    return {(key[0] if len(names) > 1 else names[0], key[1]): len(names) for key, names in groups.items()}

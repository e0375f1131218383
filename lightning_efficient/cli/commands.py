"""What the commands do; imported when one of them runs."""

from __future__ import annotations

import json
import signal
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from rich.text import Text
from torch import nn

from lightning_efficient.cli.efficient_cli import EfficientCLI
from lightning_efficient.cli.errors import only_libraries, plain_warnings, short_errors
from lightning_efficient.cli.targets import show_targets
from lightning_efficient.cli.tune import tune
from lightning_efficient.common.escaping import printable, printable_lines, shown_or_skipped, write_whole
from lightning_efficient.common.registry import near
from lightning_efficient.lifecycle.load import load_from_checkpoint

T = TypeVar("T")

__all__ = [
    "run_ablate",
    "run_compare",
    "run_completion",
    "run_demo",
    "run_export",
    "run_targets",
    "run_tune_temperature",
    "train",
]


def train(args: Sequence[str] | None) -> None:
    """``fit``, ``validate``, ``test`` and ``predict``.

    Args:
        args: The command and its arguments; None: those of the process.
    """
    with short_errors():
        EfficientCLI(args=None if args is None else list(args))


def run_targets(args: Sequence[str]) -> None:
    """``targets``.

    Args:
        args: Arguments after the command.
    """
    with short_errors():
        show_targets(args)


def run_tune_temperature(args: Sequence[str]) -> None:
    """``tune-temperature``.

    Args:
        args: Arguments after the command.
    """
    with short_errors():
        tune(args)


def run_export(options: Namespace) -> None:
    """``export``: load a checkpoint, export a plain model, save and check the file.

    Args:
        options: As ``lightning-efficient export --help`` lists them.
    """
    from lightning_efficient.cli.inputs import first_batch_of, inputs_of, read_inputs
    from lightning_efficient.deploy.export import export, save_exported
    from lightning_efficient.deploy.formats import check_path

    with short_errors():
        of_onnx = {"opset": options.opset, "output_names": options.output_names}
        check_path(options.out, **of_onnx)
        given = read_inputs(options.input)
        if given is not None and options.data is not None:
            raise ValueError("--data and --input both say what the inputs are: give one of them.")
        cls: type[LightningModule] = import_class(options.model)
        data = None if options.data is None else import_class(options.data, LightningDataModule, "--data")()
        model: nn.Module = _load(cls, options.checkpoint, options.weights_only)
        example: Any = getattr(model, "example_input_array", None) if given is None else given
        if example is None and data is None:
            raise ValueError(
                f"{cls.__name__} has no `example_input_array`, and `export` compares outputs: give --input with the "
                "shape of each input, such as --input 1,3,224,224 or --input ids=1,16:int, or --data."
            )
        if options.submodule is not None:
            model = submodule(model, options.submodule)
        if data is not None:
            example = inputs_of(model, first_batch_of(data))
        plain = export(model, example)
        apart = save_exported(
            plain, example, options.out, dynamic_batch=options.dynamic_batch, dynamic_axes=dict(options.dynamic_axes),
            **of_onnx,
        )  # fmt: skip
    size = options.out.stat().st_size / 2**20
    checked = "state dict, read back bit for bit" if apart is None else f"read back: {apart}"
    Console().print(Text(f"{printable_lines(options.out)}  {size:.1f} MiB  ({checked})"), soft_wrap=True)


def _load(cls: type[LightningModule], checkpoint: str, weights_only: bool | None) -> LightningModule:
    try:
        return load_from_checkpoint(cls, checkpoint, map_location="cpu", weights_only=weights_only)
    except (TypeError, RuntimeError) as error:
        if not only_libraries(error):
            raise
        raise ValueError(
            f"{checkpoint!r} does not fit --model {cls.__module__}.{cls.__name__}: {error} Is it another class, or "
            "does it not call `save_hyperparameters()`?"
        ) from error


def import_class(path: str, kind: type[T] = LightningModule, option: str = "--model") -> type[T]:  # type: ignore[assignment]
    """The class at an import path.

    Args:
        path: Such as ``my_package.models.MyModule``.
        kind: What it has to be a subclass of.
        option: That gives the path, for messages.

    Raises:
        ValueError: There is no such module or class, or it is something else.
    """
    module, _, name = path.rpartition(".")
    try:
        if not module:
            raise ValueError("no module is named")
        found = getattr(import_module(module), name, None)
        if found is None:
            raise ValueError(f"module {module!r} has no {name!r}{near(name, vars(import_module(module)))}")
    except (ModuleNotFoundError, ValueError) as error:
        # What that module itself fails to import is a mistake in it.
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"cannot import {option} {path!r}: {error}. Expected package.module.Class.") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{option} {path!r} is {found!r}; expected a {kind.__name__} class.")
    return found


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A part of a model by its dotted name.

    Args:
        model: The model.
        name: Such as ``net`` or ``net.encoder``.

    Raises:
        ValueError: There is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = ", ".join(child for child, _ in model.named_children())
        raise ValueError(f"{type(model).__name__} has no submodule {name!r}; it has {parts}.") from None


def run_schema(options: Namespace) -> None:
    """``schema``: what editors complete and check methods' keys with.

    Args:
        options: ``config``, ``out``.
    """
    from lightning_efficient.cli.editors import json_schema

    text = json.dumps(json_schema(alone=not options.config), indent=2) + "\n"
    with short_errors():
        if options.out is None:
            print(text, end="")
        else:
            write_whole(options.out, text)
            print(f"{options.out}: name it in the first line of the YAML file, # yaml-language-server: $schema=...")


def run_compare(options: Namespace) -> None:
    """``compare``: a table of runs from their logs, a page, a picture and the numbers on request.

    Args:
        options: ``logdir``, ``metrics``, ``baseline``, ``judge``, ``html``, ``png``, ``json``.
    """
    from lightning_efficient.comparison import compare
    from lightning_efficient.comparison.html import to_html
    from lightning_efficient.comparison.pictures import png

    with short_errors(), plain_warnings():
        comparison = compare(options.logdir, options.metrics, options.baseline, options.judge)
        # Files first: whoever reads what is printed may go away (`| head`).
        console, of_files = Console(), list[Text]()
        if options.json is not None:
            write_whole(options.json, json.dumps(comparison.to_dict(), indent=1))
            of_files.append(Text(str(options.json)))
        if options.png is not None:
            with shown_or_skipped("picture", of_files.append):
                write_whole(options.png, png(comparison.figure()))
                of_files.append(Text(str(options.png)))
        if options.html is not None:
            with shown_or_skipped("page", of_files.append):
                write_whole(options.html, to_html(comparison))
                of_files.append(Text(str(options.html)))
        with shown_or_skipped("table", console.print):
            console.print(comparison.table())
        for verdict in comparison.verdicts():
            for text in filter(None, (verdict.text, verdict.cost)):
                console.print(Text.assemble((printable(verdict.variant), "bold"), "  ", printable_lines(text)))
        for line in of_files:
            console.print(line, soft_wrap=True)


def run_ablate(options: Namespace) -> None:
    """``ablate``: exit code 1 if a run failed or nothing could be compared, 130 if it was interrupted.

    Args:
        options: As ``lightning-efficient ablate --help`` lists them; ``rest``: arguments of every run; ``warm``: the
            process that is forked into them.
    """
    from lightning_efficient.ablation.run import ablate

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has one of them
        signal.signal(signal.Signals[name], interrupt)
    with short_errors():
        try:
            done = ablate(
                options.variants or options.methods,
                options.script,
                [*(f"--config={file}" for file in options.config), *options.rest],
                seeds=options.seeds, out=options.out, metrics=options.metrics, test=options.test,
                retry_failed=options.retry_failed, n_jobs=options.jobs, threads=options.threads,
                engine=options.engine, address=options.address, run_cost=options.run_cost, export=options.export,
                checkpoint_every=options.checkpoint_every, time_limit=options.time_limit, warm=options.warm,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    if not done.finished or done.comparison is None:
        raise SystemExit(1)


def run_completion(options: Namespace) -> None:
    """``completion``: a script for a shell.

    Args:
        options: ``shell``, and ``parser`` of all commands.
    """
    from lightning_efficient.cli.completion import script

    with short_errors():
        print(script(options.shell, options.parser))


def run_demo(options: Namespace) -> None:
    """``demo``: exit code 1 if a run failed, 130 if it was interrupted.

    Args:
        options: ``quick``, ``out``, and ``warm``: the process that is forked into the runs.
    """
    with short_errors():
        from lightning_efficient.demo.run import run

        try:
            done = run(options.out, quick=options.quick, warm=options.warm)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    if not done.finished:
        raise SystemExit(1)

"""``lightning-efficient tune-temperature``: a sweep over attention's temperature, by a metric of the validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from rich.text import Text

from lightning_efficient.callbacks.temp_scale import TempScale
from lightning_efficient.cli.efficient_cli import EfficientCLI, check_path
from lightning_efficient.common.escaping import printable_lines, shown_or_skipped, write_whole
from lightning_efficient.comparison.pictures import png
from lightning_efficient.tuning.sweep import TAUS
from lightning_efficient.tuning.validation import tune_on_validation

USAGE = """\
usage: lightning-efficient tune-temperature [-c CONFIG ...] --metric NAME [--taus T,T] [--ckpt_path FILE] ...

Validates a model at several temperatures of its attention and says which is best, or that the choice is noise.

  -c CONFIG           a config file as for `lightning-efficient fit`; several merge
  --ckpt_path FILE    weights to load first
  --metric NAME       what the module logs in its validation, such as val_acc
  --taus T,T          temperatures above 0; default: {taus}
  --mode max|min      whether more of the metric is better; default: by its name
  --resamples N       bootstrap samples; default: 10000
  --png FILE          also draw the curve
  --json FILE         also write the numbers
  --temp_scale.exclude '[GLOB, ...]'  attentions left alone; or temp_scale.include

example: lightning-efficient tune-temperature -c config.yaml --ckpt_path last.ckpt --metric val_acc --png curve.png"""


class _TuneCLI(EfficientCLI):
    """Accepts what ``validate`` accepts, and makes everything without running it."""

    def __init__(self, args: Sequence[str]) -> None:
        prog = {"prog": "lightning-efficient tune-temperature"}
        super().__init__(save_config_callback=None, parser_kwargs=prog, args=_listed(args), run=False)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        # A config file of `fit` may hold the arguments of `fit`; of these, `ckpt_path` is used.
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        parser.add_argument("--metric", type=str, required=True, help="what the module logs in its validation")
        parser.add_argument("--taus", type=list[float], default=list(TAUS), help="temperatures above 0")
        parser.add_argument("--mode", type=Literal["max", "min"] | None, default=None, help="which is better")
        parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap samples")
        parser.add_argument("--png", type=str | None, default=None, help="also draw the curve")
        parser.add_argument("--json", type=str | None, default=None, help="also write the numbers")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(list[str], args))
        check_path(self.config, self.config.get("weights_only"))

    def before_instantiate_classes(self) -> None:
        # Every batch is a validation of its own here: nothing to log, and no bar for each.
        for unwanted in ("logger", "enable_progress_bar", "enable_model_summary"):
            self.config["trainer"][unwanted] = False


def _listed(args: Sequence[str]) -> list[str]:
    """``--taus 0.8,0.9`` is a list without its brackets, too."""
    found: list[str] = []
    for arg in args:
        option, equals, value = arg.partition("=") if arg.startswith("--taus=") else ("", "", arg)
        of_taus = equals or found[-1:] == ["--taus"]
        found.append(f"{option}{equals}[{value}]" if of_taus and not value.startswith("[") else arg)
    return found


def tune(args: Sequence[str], console: Console | None = None) -> None:
    """Print the curve and the verdict.

    Args:
        args: Command-line arguments after ``tune-temperature``.
        console: Where to; None: standard output.

    Raises:
        ValueError: See :func:`lightning_efficient.tuning.validation.tune_on_validation`.
    """
    if not args or {"-h", "--help"} & set(args):
        print(USAGE.format(taus=list(TAUS)))
        return
    cli = _TuneCLI(args)
    options: Any = cli.config_init
    ours: TempScale = options["temp_scale"]
    if ours.options.mode != "constant" or ours.learnable:
        raise ValueError(
            "`temp_scale` asks for a temperature that depends on the length or is learned, and a sweep sets a constant "
            "one: leave its `mode` and `learnable` out."
        )
    ours.enabled = False  # the sweep sets the temperature; of the method's key, only what it covers is used
    found = tune_on_validation(
        cli.trainer, cli.model, options["metric"], options["taus"], datamodule=cli.datamodule,
        ckpt_path=options["ckpt_path"], weights_only=options.get("weights_only"),
        maximize=None if options["mode"] is None else options["mode"] == "max",
        include=ours.include, exclude=ours.exclude, resamples=options["resamples"],
    )  # fmt: skip
    # Files first: whoever reads what is printed may go away (`| head`).
    console, of_files = console or Console(), list[Text]()
    if options["json"] is not None:
        write_whole(options["json"], json.dumps(found.to_dict(), indent=1))
        of_files.append(Text(options["json"]))
    if options["png"] is not None:
        with shown_or_skipped("picture", of_files.append):
            write_whole(options["png"], png(found.figure()))
            of_files.append(Text(options["png"]))
    with shown_or_skipped("table", console.print):
        console.print(found.table())
    console.print(printable_lines(found.verdict), highlight=False, markup=False, soft_wrap=True)
    for line in of_files:
        console.print(line, soft_wrap=True)

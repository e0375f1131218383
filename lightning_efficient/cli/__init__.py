"""The command line. ``lightning-efficient --help`` answers at once: commands import what they need when they run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_efficient.cli.output import standard_output

_TRAINER = {
    "fit": "train a model",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run the model on the prediction data",
}
_DESCRIPTION = "Efficient-training methods for PyTorch Lightning."
_EPILOG = """\
fit, validate, test and predict take the arguments of LightningCLI and one key per method, off until named:

  lightning-efficient fit -c config.yaml --sigma_reparam

Classes are named by import path (--model my_package.MyModule); the current folder is importable."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script ``lightning-efficient``.

    Args:
        argv: Arguments; ``None``: those of the process.

    Raises:
        SystemExit: With code 2 and one message for wrong arguments or refused input.
    """
    with standard_output():
        _run(argv)


def _run(argv: Sequence[str] | None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    command = args[0] if args else ""
    if command not in (*_TRAINER, "targets", "tune-temperature"):
        # What follows `--` is for the runs of `ablate`; argparse would give it to an option that takes several values.
        end = args.index("--") if command == "ablate" and "--" in args else len(args)
        options = build_parser().parse_args(args[:end])
        options.rest = args[end + 1 :]
        command = options.command
    _import_from_here()
    if command in ("ablate", "demo"):
        return _run_with_forks(command, options)
    from lightning_efficient.cli import commands

    if command in _TRAINER:
        # LightningCLI warns about arguments that do not come from the process.
        commands.train(None if argv is None else args)
    elif command == "targets":
        commands.run_targets(args[1:])
    elif command == "tune-temperature":
        commands.run_tune_temperature(args[1:])
    else:
        getattr(commands, f"run_{command}")(options)
    return None


def _run_with_forks(command: str, options: argparse.Namespace) -> None:
    """The process that is forked into the runs begins to import before this one does: seconds, side by side."""
    from lightning_efficient.ablation.starters import warm_process

    of_demo = ("sklearn.datasets", "lightning_efficient.demo.data", "lightning_efficient.demo.model")
    also = of_demo if command == "demo" else ()
    with warm_process(getattr(options, "script", None), getattr(options, "threads", 1), *also) as options.warm:
        from lightning_efficient.cli import commands

        getattr(commands, f"run_{command}")(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the commands that are not the Trainer's."""
    parser = argparse.ArgumentParser(
        prog="lightning-efficient",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-efficient')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, text in _TRAINER.items():
        commands.add_parser(name, help=text)
    commands.add_parser("targets", help="what each method would change in a model, and why not the rest")
    commands.add_parser("tune-temperature", help="attention's temperature against a validation metric, with intervals")
    _add_export(commands.add_parser("export", help="turn a checkpoint into a plain model, checked"))
    _add_compare(commands.add_parser("compare", help="a table, a page and a picture of runs, from their logs"))
    _add_ablate(commands.add_parser("ablate", help="train with methods toggled, over seeds, and compare"))
    _add_schema(commands.add_parser("schema", help="a JSON schema of the methods' keys, for editors"))
    shells = commands.add_parser("completion", help="print a script that completes commands and options in a shell")
    shells.add_argument("shell", choices=("bash", "zsh", "fish"), help='such as: eval "$(%(prog)s bash)"')
    shells.set_defaults(parser=parser)
    _add_demo(commands.add_parser("demo", help="a tour: train a small ViT with every method, compare and export"))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="file written by a Trainer: a path, or a URL such as s3://bucket/last.ckpt")
    parser.add_argument("--model", required=True, metavar="CLASS", help="import path of the LightningModule")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE",
        help=".pt2 (torch.export), .onnx, or the state dict alone: .safetensors, .pt, .pth",
    )  # fmt: skip
    parser.add_argument("--submodule", metavar="NAME", help="export this part of the model, such as `net`")
    parser.add_argument(
        "--input", "--input-shape", action="append", metavar="SHAPE", default=[],
        help="an input, batch first: [name=]N,N,...[:kind], kind float, int (ids), mask or bool; several by position "
        "or by name; default: the model's example_input_array",
    )  # fmt: skip
    parser.add_argument("--data", metavar="CLASS", help="a LightningDataModule: its first training batch is the input")
    parser.add_argument(
        "--trust", dest="weights_only", action="store_false", default=None,
        help="run what code the file asks for; else only plain data is read",
    )  # fmt: skip
    parser.add_argument(
        "--weights-only", "--weights_only", dest="weights_only", type=_flag, metavar="BOOL", help=argparse.SUPPRESS
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="let the program accept any batch size")
    parser.add_argument(
        "--dynamic-axes", action="append", metavar="INPUT=N,N", type=_axes, default=[],
        help="let the program accept any size along these axes of an input, such as input_ids=0,1",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, metavar="N", help="of an .onnx file; default: what torch.onnx chooses")
    parser.add_argument("--output-names", nargs="+", metavar="NAME", help="of an .onnx file's outputs")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logdir", nargs="+", type=Path, help="folder of a run, or of several")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME",
        help="which scalars, the one to judge by first, with :min or :max where its name does not tell",
    )  # fmt: skip
    parser.add_argument("--baseline", metavar="NAME", help="compare the others with this one")
    parser.add_argument("--judge", choices=("final", "best"), default="final", help="verdicts are about this value")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to read and to share")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s (--methods METHOD ... | --variants FILE) [--script SCRIPT] [-c CONFIG] [options] [-- ARG ...]"
    )
    parser.epilog = "What follows -- goes to every run, such as -- --trainer.max_epochs=3. The same command continues."
    add = parser.add_argument
    add("--script", help="a LightningCLI script: file or module; default: `lightning-efficient fit`")
    add("-c", "--config", action="append", default=[], metavar="FILE", help="config file of every run; several merge")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--methods", nargs="+", metavar="METHOD", help="a variant each; a+b for both in one")
    which.add_argument("--variants", metavar="FILE", help="YAML: `variants: {name: {method: {argument: value}}}`")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--out", type=Path, default=Path("ablation"), metavar="DIR", help="default: %(default)s")
    add("--metrics", nargs="+", metavar="NAME", help="which scalars to compare; default: all validation metrics")
    add("--test", action="store_true", help="also test the best checkpoint of each run")
    add("--export", action="store_true", help="also export each model and log its size, compute and latency")
    add("--no-run-cost", dest="run_cost", action="store_false", help="leave out time a step, memory and parameters")
    add("--time-limit", type=_limit, metavar="TIME", help="of a run, such as 90 (seconds), 30m or 2h; default: none")
    add("--retry-failed", action="store_true", help="train failed runs anew; default: keep them as they are")
    add("--jobs", type=int, metavar="N", help="runs at a time; default: cores / threads, or one a GPU")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of a run; default: %(default)s")
    add("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    add("--address", metavar="ADDRESS", help="of a Ray cluster; default: one on this machine")
    add("--checkpoint-every", type=_seconds, default=30.0, metavar="TIME", help="resume points; default: 30 seconds")


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "First line of the YAML file: # yaml-language-server: $schema=methods.schema.json"
    parser.add_argument(
        "--config", action="store_true", help="for a configuration of `lightning-efficient fit`, which has other keys"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; default: the terminal")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="three methods, one seed, a few epochs: under a minute")
    parser.add_argument("--out", type=Path, default=Path("efficient_demo"), metavar="DIR", help="default: %(default)s")


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _axes(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, numbers = text.partition("=")
    axes = numbers.split(",")
    if not (name and equals and all(axis.strip().isdigit() for axis in axes)):
        raise argparse.ArgumentTypeError(f"{text!r} is no input and axes, such as input_ids=0,1")
    return name, tuple(map(int, axes))


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 90, 30m or 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _limit(text: str) -> float:
    if not (seconds := _seconds(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0, such as 90, 30m or 1.5h")
    return seconds


def _import_from_here() -> None:
    # As `python -m` does: a user's `my_model.py` lies in the current folder, which a console script cannot see.
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)

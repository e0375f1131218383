"""What is trained: a user's LightningCLI script or our own ``fit``, asked once for its whole configuration."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.files import CSV, METHODS_FILE
from lightning_efficient.ablation.job import error_lines
from lightning_efficient.ablation.variants import BASELINE, CONFIG, Methods, methods_file, methods_of, options_of
from lightning_efficient.common.escaping import write_whole
from lightning_efficient.common.names import VARIABLE
from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.lifecycle.methods import build_callback

_HEADER = "# lightning.pytorch=="
_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
_CSV = "lightning.pytorch.loggers.CSVLogger"
_NO_CLI = (
    "\nIt was asked for its configuration, `--print_config`, as LightningCLI scripts tell it. Run another script with "
    "LIGHTNING_EFFICIENT=methods.yaml, once for each file and seed; `lightning-efficient compare` reads the logs."
)
_END = '--trainer.logger=[{"class_path": "lightning_efficient.ablation.parsed.EndOfParsing"}]'


@dataclass(frozen=True)
class Program:
    """A training command that is understood.

    Args:
        command: What follows ``python``: a script, or ``-m`` and a module.
        arguments: For every run, before those that ``ablate`` adds.
        subcommands: ``False`` for a script with ``LightningCLI(run=False)``, which has no ``fit``, ``test`` or
            ``--ckpt_path``.
        methods_are_keys: Each method is a key of its configuration (``EfficientCLI``).
        config: The whole configuration that these arguments give, without the seed.
    """

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    subcommands: bool
    methods_are_keys: bool
    config: dict[str, Any]

    def argv(
        self, step: str, folder: Path, methods: Methods, seed: int, checkpoint: Path | None = None
    ) -> tuple[str, ...]:
        """The command line of one run, after ``python``.

        Args:
            step: ``"fit"`` or ``"test"``.
            folder: The run's, ``<out>/<variant>/seed_<n>``.
            methods: Of its variant, and its ``"config"``.
            seed: For ``--seed_everything``.
            checkpoint: To continue from.
        """
        argv = [*self.command, *([step] if self.subcommands else []), *self.arguments]
        if self.methods_are_keys and methods_of(methods):
            argv += [f"--config={folder / METHODS_FILE}"]
        argv += [
            *options_of(methods),
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={folder}",
            f"--trainer.logger={json.dumps(loggers(self.config, folder, step))}",
            "--trainer.enable_progress_bar=false",
        ]
        return (*argv, *([f"--ckpt_path={checkpoint}"] if checkpoint and self.subcommands else []))

    def environment(self, folder: Path, methods: Methods) -> dict[str, str]:
        """What switches the methods on in a script that does not know them.

        Args:
            folder: The run's.
            methods: Of its variant.
        """
        return {VARIABLE: "" if self.methods_are_keys or not methods_of(methods) else str(folder / METHODS_FILE)}

    def check(self, methods: Methods, asked: Asked) -> None:
        """Parse the command line of a run as the run will, which ``--print_config`` does not: it is not complete.

        Args:
            methods: Of its variant, and its ``"config"``.
            asked: Whoever asks the program.

        Raises:
            ValueError: It would not start, with the reason that it gives.
        """
        with TemporaryDirectory() as out:
            folder = Path(out, "variant", "seed_0")
            write_whole(folder / METHODS_FILE, methods_file(methods))
            done = asked.ask([*self.argv("fit", folder, methods, 0), _END])
        if done.returncode:
            words = [*self.command, *(["fit"] if self.subcommands else []), *self.arguments, *options_of(methods)]
            raise ValueError(f"`python {shlex.join(words)}` would not start:\n{error_lines(done.stderr)}")


def find_program(script: str | os.PathLike[str] | None, arguments: Sequence[str], asked: Asked) -> Program:
    """Ask a script for its configuration, so that what is wrong with it is said once and before any run.

    Args:
        script: A file, or a module's import path. ``None``: ``lightning-efficient fit``.
        arguments: For every run, such as ``["--config=base.yaml", "--trainer.max_epochs=3"]``.
        asked: Whoever asks it.

    Raises:
        FileNotFoundError: No such script.
        ValueError: It refuses the arguments, or it is not a LightningCLI script.
    """
    command = _command(script)
    failed = ""
    for words in (["fit"], []):
        done = asked.ask([*command, *words, *arguments, "--print_config"])
        if done.returncode == 0:
            config = _config(done.stdout, " ".join(command))
            if config.get("model", command) is None:  # of any class: required, and LightningCLI prints it without
                raise ValueError(
                    f"`python {shlex.join([*command, *words, *arguments])}` would not start: it trains any model, and "
                    "none is named. Add -c CONFIG with `model:` in it, or -- --model=my_package.MyModel."
                )
            keys = [config[method] for method in METHODS.with_callback if method in config]
            efficient = bool(keys) and all(isinstance(key, Mapping) and "enabled" in key for key in keys)
            return Program(command, tuple(arguments), bool(words), efficient, config)
        failed = failed or error_lines(done.stderr) + (_NO_CLI if "Traceback" in done.stderr else "")
        if "arguments: fit" not in done.stderr:
            break
    raise ValueError(f"`python {shlex.join([*command, 'fit', *arguments])}` would not start:\n{failed}")


def loggers(config: Mapping[str, Any], folder: Path, step: str) -> list[dict[str, Any]]:
    """The user's loggers, those that write files led into the run's folder, and TensorBoard in any case.

    Args:
        config: The whole configuration.
        folder: ``<out>/<variant>/seed_<n>``: TensorBoard shows the run under this name.
        step: ``"fit"`` or ``"test"``.
    """
    given = config.get("trainer", {}).get("logger") or []
    entries = [e for e in (given if isinstance(given, list) else [given]) if isinstance(e, Mapping)]
    place: dict[str, Any] = {"save_dir": str(folder.parents[1]), "name": folder.parent.name, "version": folder.name}
    # Else a script that logs hyper-parameters when it begins makes these the only columns, and `hp_metric` the metric.
    place["default_hp_metric"] = False
    board: dict[str, Any] = {"class_path": _TENSORBOARD, "init_args": place}
    others: list[dict[str, Any]] = []
    for entry in entries:
        path, init = entry.get("class_path"), dict(entry.get("init_args") or {})
        if path == _TENSORBOARD:
            board["init_args"] = {**init, **place, "sub_dir": None}
        elif path == _CSV:
            others.append(
                {"class_path": _CSV, "init_args": {**init, "save_dir": str(folder), "name": "", "version": CSV[step]}}
            )
        else:
            others.append(dict(entry))
    return [board, *others]


def _command(script: str | os.PathLike[str] | None) -> tuple[str, ...]:
    if script is None:
        return ("-m", "lightning_efficient")
    name = os.fspath(script)
    if Path(name).is_file():
        return (name,)
    try:
        spec = importlib.util.find_spec(name) if not name.endswith(".py") and os.sep not in name else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        parent = Path(name).parent
        here = [str(file) for file in parent.glob("*.py")] if parent.is_dir() else []
        raise FileNotFoundError(f"no script {name!r}{near(name, here)}: neither a file nor an importable module.")
    return ("-m", name)


def _config(printed: str, command: str) -> dict[str, Any]:
    _, found, text = printed.partition(_HEADER)
    config = yaml.safe_load(_HEADER + text) if found else None
    if not isinstance(config, dict) or "trainer" not in config:
        raise ValueError(
            f"`python {command} fit --print_config` printed no configuration: `ablate` runs LightningCLI scripts."
        )
    config.pop("seed_everything", None)
    return config


def check_variants(variants: Mapping[str, Methods], program: Program, asked: Asked) -> list[str]:
    """Put every variant together with the configuration that it changes, before the first run.

    Args:
        variants: Name → methods.
        program: What they train, with its configuration.
        asked: Whoever asks it about a variant's ``"config"``.

    Returns:
        What to know before waiting for the runs: variants that train as the baseline does, and methods that change
        nothing with the arguments that they have.

    Raises:
        ValueError: A method refuses its arguments as they are then, two exclude each other, or the program would not
            start: an argument is missing, unknown or of a wrong type, in the configuration or in a variant's
            ``"config"``.
    """
    base: Methods = {name: dict(program.config[name]) for name in METHODS.with_callback if program.methods_are_keys}
    program.check(variants[BASELINE], asked)
    remarks, trained = [], dict[str, str]()
    for variant, changes in variants.items():
        methods = methods_of(changes)
        if options_of(changes):
            try:
                program.check(changes, asked)
            except ValueError as error:
                raise ValueError(f"variant {variant!r}: {error}") from None
        whole = {name: {**base.get(name, {}), **methods.get(name, {})} for name in {**base, **methods}}
        on = {name: arguments for name, arguments in whole.items() if arguments.get("enabled")}
        try:
            callbacks = {name: build_callback(name, arguments) for name, arguments in on.items()}
            METHODS.check(list(callbacks))
        except ValueError as error:
            raise ValueError(f"variant {variant!r} with the configuration: {error}") from None
        remarks += [
            f"{variant}: {type(callbacks[name]).__name__} changes nothing: {why}."
            for name in methods
            if name in callbacks and (why := callbacks[name].without_effect())
        ]
        configs = {name: callback.config() for name, callback in callbacks.items()}
        same = json.dumps([changes.get(CONFIG), configs], sort_keys=True)
        if (other := trained.setdefault(same, variant)) != variant:
            remarks.append(f"{variant} trains exactly as {other} does: its methods have the same arguments.")
    return remarks

"""Completion scripts: commands and their options, written into the script so that completing starts no Python."""

from __future__ import annotations

import argparse
import inspect

from lightning.pytorch import Trainer

from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class

_PROG = "lightning-efficient"


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell.

    Args:
        shell: ``"bash"``, ``"zsh"`` or ``"fish"``.
        parser: Of all commands.
    """
    words = _words(parser)
    if shell == "fish":
        known = " ".join(words)
        lines = [f"complete -c {_PROG} -n 'not __fish_seen_subcommand_from {known}' -f -a '{known}'"]
        for command, options in words.items():
            seen = f"__fish_seen_subcommand_from {command}"
            for option in options:
                word = f"-l '{option.removeprefix('--')}'" if option.startswith("--") else f"-f -a '{option}'"
                lines.append(f"complete -c {_PROG} -n '{seen}' {word}")
        return "\n".join(lines)
    cases = "\n".join(f"    {command}) words='{' '.join(options)}' ;;" for command, options in words.items())
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{head}_lightning_efficient() {{
  local words
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words='{" ".join(words)}' ;;
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then words='{" ".join(words)}'; fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -o nosort -F _lightning_efficient {_PROG}"""


def _words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Command → its words and options; those that have none here are LightningCLI's."""
    (commands,) = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    methods = [
        f"--{name}.{argument}"
        for name in METHODS.with_callback
        for argument in inspect.signature(callback_class(name)).parameters
    ]
    trainer = [f"--trainer.{name}" for name in inspect.signature(Trainer).parameters]
    of_cli = ["--help", "--config", "--print_config", "--model", "--data", "--seed_everything", "--ckpt_path"]
    of_cli += [*trainer, *(f"--{name}" for name in METHODS.with_callback), *methods]
    extra = {
        "targets": ["--input"],
        "tune-temperature": ["--metric", "--taus", "--mode", "--resamples", "--png", "--json"],
    }
    found = {}
    for name, command in commands.items():
        own = [option for action in command._actions for option in action.option_strings if option.startswith("--")]
        of_lightning = own == ["--help"] and not any(not action.option_strings for action in command._actions)
        words = [str(word) for action in command._actions if not action.option_strings for word in action.choices or ()]
        found[name] = [*of_cli, *extra.get(name, [])] if of_lightning else [*words, *own]
    return found

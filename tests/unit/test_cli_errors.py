"""Which errors of the command line are short: those raised on purpose, about what the user gave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_efficient.cli import commands
from lightning_efficient.cli.efficient_cli import EfficientArgumentParser
from lightning_efficient.lifecycle.recipe import read


def inside(name: str, source: str) -> Callable[[], Any]:
    """The function ``f`` of a module of that name."""
    module = ModuleType(name)
    exec(compile(source, f"<{name}>", "exec"), vars(module))
    return module.f


# As a command does: code of this package, around code of this package or the user's.
within_short_errors = inside(
    "lightning_efficient.x",
    "from lightning_efficient.cli.errors import short_errors\n"
    "def f(function):\n    with short_errors():\n        function()",
)


def ours(statement: str) -> Callable[[], Any]:
    return inside("lightning_efficient.x", f"import lightning_efficient as l\ndef f():\n    {statement}")


ASKED: dict[str, Callable[[], Any]] = {
    "a value": ours("l.MagnitudePruning(amount=3.0)"),
    "a missing file": ours("l.load_from_checkpoint(None, 'nope.ckpt')"),
    "a recipe": partial(read, {"lightning_efficient": 3}),
    "a class": partial(commands.import_class, "nope.Class"),
    "a Trainer's argument": partial(Trainer, devices=0, accelerator="cpu"),
    "a path that cannot be opened": ours("open('nowhere/x', 'w')"),
    "by way of the standard library": ours("__import__('pathlib').Path('nowhere/x').write_text('')"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_refused_ends_shortly(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        within_short_errors(ASKED[name])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown


UNEXPECTED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "a key that this package misses": (ours("{}['a']"), KeyError),
    "a conversion in this package": (ours("int('a')"), ValueError),
    "a wrong call in this package": (ours("len(3)"), TypeError),
    "a bug in a message": (ours("raise ValueError(int('a'))"), ValueError),
    "an assertion": (ours("assert 0"), AssertionError),
    "torch, called by this package": (ours("__import__('torch').ones(2) @ __import__('torch').ones(3)"), RuntimeError),
    "a file that the user's model reads": (inside("theirs", "def f():\n    open('nowhere/x')"), FileNotFoundError),
    "the user's model": (inside("theirs", "def f():\n    raise ValueError('mine')"), ValueError),
    "this package, called by the user's model": (
        inside("theirs", "import lightning_efficient as l\ndef f():\n    l.MagnitudePruning(amount=3.0)"),
        ValueError,
    ),
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_what_is_an_accident_keeps_its_traceback(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    function, kind = UNEXPECTED[name]
    with pytest.raises(kind) as caught:
        within_short_errors(function)
    said = "\n".join(getattr(caught.value, "__notes__", [])) + capsys.readouterr().err
    assert "did not expect this error" in said


def test_what_a_users_module_fails_to_import_is_a_mistake_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_broken_module.py").write_text("import not_installed_anywhere", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        within_short_errors(partial(commands.import_class, "a_broken_module.Model"))


def test_a_module_is_called_by_the_name_of_its_command() -> None:
    """`python -m lightning_efficient fit` runs a `__main__.py`, which nobody could run by that name."""
    assert EfficientArgumentParser(prog="__main__.py").format_usage() == "usage: lightning-efficient [options]\n"
    assert EfficientArgumentParser(prog="train.py").format_usage() == "usage: train.py [options]\n"

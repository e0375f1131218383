"""What would stop every run is said before the first: its command line is parsed as a run does, and nothing is made."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import forked

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.program import check_variants, find_program
from lightning_efficient.ablation.variants import read_variants

pytestmark = pytest.mark.forks

# Whatever makes the model or a Trainer says so.
PARTS = """
import pathlib
from torch import nn
from lightning.pytorch import Callback, LightningDataModule, LightningModule

class Encoder(nn.Module):
    def __init__(self, width: int, depth: int = 1):
        super().__init__()

class Net(LightningModule):
    def __init__(self, encoder: nn.Module, classes: int, rates: list[float] = [0.1]):
        super().__init__()
        (pathlib.Path(__file__).parent / "made").write_text("a model")

class Plain(LightningModule):
    def __init__(self, classes: int, encoder: Encoder = None):
        super().__init__()
        (pathlib.Path(__file__).parent / "made").write_text("a model")

class Data(LightningDataModule):
    def __init__(self, folder: str, classes: int = 3):
        super().__init__()
        self.classes = classes

class Mine(Callback):
    def __init__(self, every: int):
        pass
"""
SCRIPT = """
import sys, pathlib
sys.path.insert(0, str(pathlib.Path(__file__).parent))
from lightning.pytorch.cli import LightningCLI
import parts
class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        LINKS
if __name__ == "__main__":
    CLI(ARGUMENTS)
"""
ANY = "parts.LightningModule, parts.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True"
ENCODER = {"class_path": "parts.Encoder", "init_args": {"width": 8}}
WHOLE: dict[str, Any] = {
    "model": {"class_path": "parts.Net", "init_args": {"encoder": ENCODER, "classes": 3}},
    "data": {"class_path": "parts.Data", "init_args": {"folder": "x"}},
    "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "parts.Mine", "init_args": {"every": 2}}]},
}
OF_ONE = {"model": {"classes": 3}, "data": {"folder": "x"}}


class Forks(Asked):
    """Asks a fork of this process, which has imported everything."""

    def ask(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        done = forked(Path(argv[0]), *argv[1:])
        return subprocess.CompletedProcess(list(argv), done.code, done.output, done.output)


def check(folder: Path, config: Any, arguments: str = ANY, links: str = "pass", **options: Any) -> list[str]:
    """Of a script with two variants, one of which has these options."""
    (folder / "parts.py").write_text(PARTS, encoding="utf-8")
    (folder / "train.py").write_text(SCRIPT.replace("ARGUMENTS", arguments).replace("LINKS", links), encoding="utf-8")
    (folder / "base.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    variants = read_variants({"a": {"sigma_reparam": True, **({"config": options} if options else {})}})
    with Forks() as asked:
        program = find_program(folder / "train.py", [f"--config={folder / 'base.yaml'}"], asked)
        remarks = check_variants(variants, program, asked)
    assert not (folder / "made").exists()
    return remarks


def without(path: str, config: Any = WHOLE) -> Any:
    """The configuration but for one key."""
    key, _, rest = path.partition("/")
    if isinstance(config, list):
        return [without(rest, config[0])]
    return {k: (without(rest, v) if k == key else v) for k, v in config.items() if k != key or rest}


@pytest.mark.parametrize(
    ("config", "arguments", "links"),
    [
        (WHOLE, ANY, "pass"),
        (OF_ONE, "parts.Plain, parts.Data", "pass"),
        (OF_ONE, "parts.Plain, parts.Data, run=False", "pass"),
        (without("model/init_args/classes"), ANY,
         "parser.link_arguments('data.init_args.classes', 'model.init_args.classes')"),
    ],
    ids=["any class", "one class", "no subcommands", "linked"],
)  # fmt: skip
def test_what_a_run_can_start_with_is_let_through_and_nothing_is_made(
    tmp_path: Path, config: Any, arguments: str, links: str
) -> None:
    assert check(tmp_path, config, arguments, links, **{"trainer.max_epochs": 3}) == []


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("model", "model"), ("model/init_args/classes", "classes"), ("model/init_args/encoder", "encoder"),
        ("model/init_args/encoder/init_args/width", "width"), ("data/init_args/folder", "folder"),
        ("trainer/callbacks/0/init_args/every", "every"),
    ],
)  # fmt: skip
def test_a_missing_argument_is_named(tmp_path: Path, missing: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)would not start:.*\b{named}\b"):
        check(tmp_path, without(missing))


def replaced(path: str, value: Any, config: Any = WHOLE) -> Any:
    """The configuration with another value."""
    key, _, rest = path.partition("/")
    return {**config, key: replaced(rest, value, config.get(key, {})) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model/init_args/classes", "many", "classes"),
        ("model/init_args/encoder/init_args/width", [8], "width"),
        ("model/init_args/encoder/init_args/widht", 8, "widht"),
        ("model/init_args/rates", [0.1, "fast"], "rates"),
        ("trainer/logger", {"class_path": "CSVLogger", "init_args": {"nmae": "x"}}, "nmae"),
        ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"speed": 1}}, "speed"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)would not start:.*({named})"):
        check(tmp_path, replaced(path, value))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model.init_args.classes": None}, "classes"),
        ({"model.init_args.encoder": "torch.nn.Linear"}, "in_features"),
        ({"data.init_args.fodler": "x"}, "fodler"),
    ],
)
def test_of_a_variant_too(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)variant 'a': .*would not start:.*\b{named}\b"):
        check(tmp_path, WHOLE, **options)


def test_a_link_that_takes_an_option_of_the_run(tmp_path: Path) -> None:
    """No run could start: `ablate` gives each a folder of its own."""
    config = replaced("data/init_args/folder", "x")
    with pytest.raises(ValueError, match=r"(?s)would not start:.*default_root_dir"):
        check(tmp_path, config, links="parser.link_arguments('data.init_args.folder', 'trainer.default_root_dir')")


def test_data_and_model_that_are_linked_as_they_are_made(tmp_path: Path) -> None:
    links = "parser.link_arguments('data.classes', 'model.classes', apply_on='instantiate')"
    with pytest.raises(AssertionError):  # made, as the card says
        check(tmp_path, {"data": {"folder": "x"}}, "parts.Plain, parts.Data", links)
    with pytest.raises(ValueError, match=r"(?s)would not start:.*folder"):
        check(tmp_path, {}, "parts.Plain, parts.Data", links)

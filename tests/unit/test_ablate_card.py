"""The card of ``ablate``: its variants can be read, its commands and its Python have arguments that exist."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from lightning_efficient.ablation import run
from lightning_efficient.ablation.variants import read_variants
from lightning_efficient.cli import build_parser

CARD = (Path(__file__).parents[2] / "docs" / "ablate.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CARD, re.DOTALL)


def test_variants() -> None:
    (block,) = blocks("yaml")
    assert list(read_variants(yaml.safe_load(block)["variants"])) == [
        "baseline", "sigma", "both", "prune,amount=0.5,schedule=cubic", "prune,amount=0.5,schedule=one_shot",
        "prune,amount=0.9,schedule=cubic", "prune,amount=0.9,schedule=one_shot",
    ]  # fmt: skip


def test_commands() -> None:
    (block,) = blocks("bash")
    for line in block.splitlines():
        program, *words = shlex.split(line)
        words = words[: words.index("--")] if "--" in words else words
        assert program == "lightning-efficient"
        options = build_parser().parse_args(words)
        assert options.config == ["base.yaml"]
        assert options.methods or options.variants


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("python")
    recorded: Any = mock.create_autospec(run.ablate)
    monkeypatch.setattr(run, "ablate", recorded)
    exec(compile(block, "docs/ablate.md", "exec"), {})
    (variants,), given = recorded.call_args
    assert len(read_variants(variants)) == 4
    assert given["script"] == "train.py"


def test_the_command_line_offers_every_argument() -> None:
    options = vars(build_parser().parse_args(["ablate", "--methods", "sigma_reparam"]))
    renamed = {"n_jobs": "jobs", "arguments": "config"}
    wanted = {renamed.get(name, name) for name in inspect.signature(run.ablate).parameters} - {"console", "warm"}
    assert wanted == set(options) - {"command", "methods"}

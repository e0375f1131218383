"""The Python of the method card runs, one block after the other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from lightning_efficient import MagnitudePruning, SAPPruning

CARD = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/pruning.md", "exec"), namespace)


def test_the_tables_hold_every_argument_with_its_default() -> None:
    for cls in (MagnitudePruning, SAPPruning):
        section = CARD.split(f"## {cls.__name__}: arguments")[1].split("\n## ")[0]
        named = set(
            re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in section.splitlines() if line[:1] == "|"))
        )
        common = {"enabled", "embeddings", "include", "exclude", "seed", "tolerance"}
        parameters = inspect.signature(cls).parameters
        assert named <= set(parameters)
        assert set(parameters) - named <= common

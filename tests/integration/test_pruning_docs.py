"""The Python of the method card runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CARD = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/pruning.md", "exec"), namespace)

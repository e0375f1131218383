"""The Python of the method card runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

CARD = (Path(__file__).parents[2] / "docs" / "temp_scale.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "docs/temp_scale.md", "exec"), namespace)
    assert len(namespace["change"].targets) == 2
    assert "any τ beats 1" in namespace["sweep"].verdict

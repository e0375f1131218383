"""Metrics of embeddings: two processes come to the same numbers as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from forking import forked


@pytest.mark.forks
def test_two_processes_equal_one() -> None:
    done = forked(Path(__file__).parent / "scripts" / "metric_processes.py", processes=2)
    assert done.code == 0, done.output
    assert done.output.count("agreed") == 2

"""The library itself needs none of the heavy packages: what it does with them is imported where it is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive  # `.ci/wheel` runs the script, with the wheel
@pytest.mark.slow
def test_every_callback_trains_without_them(tmp_path: Path) -> None:
    """A process of its own: what an earlier test has imported could not be missed."""
    script = ROOT / "tests/integration/scripts/without_heavy.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" ok\n") == 9

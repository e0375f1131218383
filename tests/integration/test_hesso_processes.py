"""HESSO on two processes: they agree on what goes, and a cut between two fits gives both the same smaller model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sigma_runs import differing

SCRIPT = Path(__file__).parent / "scripts" / "hesso_ddp.py"
TESTS = Path(__file__).parents[1]


@pytest.mark.exhaustive  # starts two processes of ten seconds; the battery trains on two in any case
def test_two_processes_prune_cut_and_train_on_alike(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a["keep"] == b["keep"]
    assert a["again"] == b["again"]
    # Running statistics of batch norms are each process's own, as in every run with DDP.
    for when in ("zeros", "cut", "end"):
        one, two = ({n: t for n, t in side[when].items() if "running" not in n} for side in (a, b))
        assert differing(one, two) == []
    before, cut, end = (a[when]["net.stem.weight"] for when in ("zeros", "cut", "end"))
    assert cut.shape == end.shape == (4, 1, 3, 3)
    assert torch.equal(cut, before[before.flatten(1).any(1)])
    assert int((~end.flatten(1).any(1)).sum()) == 2, "of the two units left, of two channels each, one goes"

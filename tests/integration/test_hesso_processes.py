"""HESSO on two processes: they agree on what goes, and a cut between two fits gives both the same smaller model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forking import forked
from sigma_runs import differing

SCRIPT = Path(__file__).parent / "scripts" / "hesso_ddp.py"


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_two_processes_prune_cut_and_train_on_alike(tmp_path: Path) -> None:
    ended = forked(SCRIPT, tmp_path, processes=2)
    assert ended.code == 0, ended.output
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

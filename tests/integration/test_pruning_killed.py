"""Pruning runs that are killed in the middle of an epoch and of their schedule, and resumed in a new process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from forking import forked
from sigma_runs import differing

from lightning_efficient.lifecycle import recipe
from lightning_efficient.testing.checks import flat
from lightning_efficient.weightspace.mask import unpack_mask

SCRIPT = Path(__file__).parent / "scripts" / "killed_pruning.py"
LONG = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("ticket", "pagcp")]


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("method", ["cubic", "sap", "hesso", *LONG])
def test_killed_and_resumed_equals_uninterrupted(method: str, tmp_path: Path) -> None:
    """SIGKILL after step 8, a new process from the file of step 6: every tensor of the final file is equal.

    Forked processes, each of which starts as the others do; test_sigma_reparam_resume.py starts new ones.
    """
    killed, whole = ((method, tmp_path / name, tmp_path / f"{name}.ckpt") for name in ("killed", "whole"))
    ended = forked(SCRIPT, *killed, "--kill-after", 8)
    assert ended.code == -signal.SIGKILL, ended.output
    middle = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert middle["global_step"] == 6
    for arguments in ((*killed, "--resume"), whole):
        ended = forked(SCRIPT, *arguments)
        assert ended.code == 0, ended.output

    a, b = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "killed"))
    assert a["global_step"] == b["global_step"] == 17
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert differing(flat(a), flat(b)) == []
    pruned = {}
    for when, content in {"middle": middle, "end": b}.items():
        entry = next(e for e in recipe.read(content) if e.method.endswith("_pruning"))
        weights = content["state_dict"]
        if "keep" in entry.config:
            rows = [weights[f"{name}.weight"].flatten(1).any(1) for name in entry.config["keep"]]
            pruned[when] = sum(int((~row).sum()) for row in rows)
            continue
        masks = {n: unpack_mask(t["mask"], weights[n].shape) for n, t in entry.tensors.items()}
        assert all(not bool(weights[n][~mask].any()) for n, mask in masks.items())
        pruned[when] = sum(int((~mask).sum()) for mask in masks.values())
    assert 0 < pruned["middle"] < pruned["end"], "nothing happened before the kill, or nothing after it"

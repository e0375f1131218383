"""PRepBN over two processes (strategy "ddp", gloo): one schedule, one set of statistics, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forking import forked

SCRIPT = Path(__file__).parent / "scripts" / "swapped.py"

pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:PRepBN. each process takes the statistics of its own samples"),
]


def train(folder: Path, *options: str, processes: int = 2) -> None:
    ended = forked(SCRIPT, folder, "--processes", processes, *options, processes=processes)
    assert ended.code == 0, ended.output[-4000:]


def left(folder: Path, target: str, processes: int, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"{target}.{processes}.{rank}.pt", weights_only=True)
    return content


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.filterwarnings("ignore:PRepBN. gradient norm is .* The transition stays")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_trouble_in_one_process_holds_up_both_and_statistics_agree(tmp_path: Path) -> None:
    train(tmp_path, "--trouble")
    first, second = (left(tmp_path, "repbn", 2, rank) for rank in (0, 1))
    assert first["lams"] == second["lams"]
    assert len(set(first["lams"][31:35])) == 1, "three steps' pause after step 31"
    assert first["lams"][34] > first["lams"][35]
    assert first["metrics"]["efficient/norm_swap/jumps"] == second["metrics"]["efficient/norm_swap/jumps"] == 2
    assert equal(first["tensors"], second["tensors"]), "weights, and the averaged running statistics"
    whole = first["tensors"]
    train(tmp_path, "--trouble", "--resume")
    resumed = left(tmp_path, "repbn", 2, 1)
    assert resumed["lams"] == second["lams"][33:]
    assert equal(resumed["tensors"], whole)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Dynamic Tanh has no batch statistics, so that two processes see what one does, old norms gone or not."""
    train(tmp_path, "--target", "dyt")
    train(tmp_path, "--target", "dyt", processes=1)
    one, two = left(tmp_path, "dyt", 1, 0), left(tmp_path, "dyt", 2, 0)
    assert one["lams"] == two["lams"]
    assert one["lams"][-1] == 0.0
    for name, value in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][name], value, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_of_one_process_goes_on_in_two(tmp_path: Path) -> None:
    train(tmp_path, "--target", "dyt", processes=1)
    whole = left(tmp_path, "dyt", 1, 0)
    train(tmp_path, "--target", "dyt", "--resume")
    resumed = left(tmp_path, "dyt", 2, 0)
    assert resumed["lams"] == whole["lams"][33:]
    for name, value in whole["tensors"].items():
        torch.testing.assert_close(resumed["tensors"][name], value, rtol=0, atol=1e-9)

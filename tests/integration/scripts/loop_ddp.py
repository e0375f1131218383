"""A loop with DDP: each process has half of every batch; they end with what one with the whole batches has.

Norms that bring parameters are swapped before the model is wrapped, or refused; so are shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient import attach
from lightning_efficient.loops.driver import Driver

UNITS = {"sigma_reparam": {}, "hesso_pruning": {"target": 0.5, "start": 1, "duration": 4, "periods": 2}}
NORMS = {"norm_swap": {"target": "dyt", "hold": 1, "transition": 3}}
BATCHES = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WHOLE = slice(0, 8)


def make(norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 12), nn.LayerNorm(12) if norm else nn.GELU(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


def trained(net: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, driver: Driver, rows: slice) -> Any:
    for batch in BATCHES:
        model(batch[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    return driver.finish().state_dict()


def units(rows: slice, parallel: bool) -> dict[str, Tensor]:
    net = make(norm=False)
    model = DistributedDataParallel(net) if parallel else net
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    driver = attach(model, optimizer, UNITS, total_steps=6, example=BATCHES[0, :2])
    return trained(net, model, optimizer, driver, rows)


def norms(rows: slice, parallel: bool) -> dict[str, Tensor]:
    net = make(norm=True)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    driver = attach(net, optimizer, NORMS, total_steps=6, example=BATCHES[0, :2])
    return trained(net, DistributedDataParallel(net) if parallel else net, optimizer, driver, rows)


def refused(error: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=words):
        call()


def wrong(rows: slice) -> None:
    net = make(norm=True)
    wrapped, optimizer = DistributedDataParallel(net), torch.optim.AdamW(net.parameters(), 1e-2)
    args = (optimizer, NORMS)
    refused(ValueError, "before they are wrapped", lambda: attach(wrapped, *args, total_steps=6, example=BATCHES[0]))
    assert isinstance(net[1], nn.LayerNorm)
    driver = attach(net, *args, total_steps=6, example=BATCHES[0])  # it cannot see what is around the model
    refused(RuntimeError, "differ between processes", lambda: trained(net, wrapped, optimizer, driver, rows))
    sums = [torch.cat([p.detach().flatten() for p in net.parameters()]).sum() for _ in range(2)]
    distributed.all_reduce(sums[0], distributed.ReduceOp.MAX)
    assert torch.equal(*sums), "found before they are apart"
    cut = make(norm=False)
    fully_shard(cut, mesh=init_device_mesh("cpu", (2,)))
    shards = torch.optim.AdamW(cut.parameters(), 1e-2)
    for methods in ({"sigma_reparam": {}}, {"magnitude_pruning": {}}, UNITS):
        refused(ValueError, "'0.weight' is cut over processes", lambda m=methods: attach(cut, shards, m, total_steps=6))


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    rows = slice(4 * rank, 4 * rank + 4)
    mine = {run: run(rows, parallel=True) for run in (units, norms)}
    wrong(rows)
    distributed.destroy_process_group()
    for run, found in mine.items():
        for name, value in run(WHOLE, parallel=False).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    print("agreed on", [len(value) for name, value in mine[units].items() if name.endswith("bias")])


if __name__ == "__main__":
    main()

"""HESSO in a loop with DDP: each process has half of every batch; they end with what one with the whole batches has."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient import attach

METHODS = {"sigma_reparam": {}, "hesso_pruning": {"target": 0.5, "start": 1, "duration": 4, "periods": 2}}
BATCHES = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ended(rows: slice, parallel: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    net: nn.Module = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model = DistributedDataParallel(net) if parallel else net
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    driver = attach(model, optimizer, METHODS, total_steps=6, example=BATCHES[0, :2])
    for batch in BATCHES:
        model(batch[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    return driver.finish().state_dict()


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mine = ended(slice(4 * rank, 4 * rank + 4), parallel=True)
    distributed.destroy_process_group()
    alone = ended(slice(0, 8), parallel=False)
    for name, value in alone.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-12)
    print("agreed on", [len(value) for name, value in mine.items() if name.endswith("bias")])


if __name__ == "__main__":
    main()

"""SyncBatchNorm with padding: two processes with different masks see the statistics of all valid rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_efficient.norms.repbn import RepBN

C = 3


def rows_and_masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 7, C, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0])[:, None, None]
    return rows, torch.tensor([[True] * 5 + [False] * 2, [True] + [False] * 6])


def worker(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rows, masks = rows_and_masks()
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(RepBN(C, eta=0.5).double())
    x = rows[rank].clone().requires_grad_()
    y = norm(x, masks[rank])
    (y**3).sum().backward()
    torch.save([y.detach(), x.grad, norm.eta.grad, *(b.clone() for b in norm.buffers())], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.forks
def test_masked_statistics_over_processes(tmp_path: Path):
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    rows, masks = rows_and_masks()
    alone = RepBN(C, eta=0.5).double()
    x = rows.flatten(0, 1).clone().requires_grad_()
    y = alone(x, masks.flatten())
    (y**3).sum().backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(r[2] for r in results), alone.eta.grad, rtol=1e-12, atol=1e-12)
    for result in results:
        for mine, theirs in zip(result[3:], alone.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)

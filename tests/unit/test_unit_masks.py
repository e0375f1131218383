"""Entries of a weight that are scaled after a step, by hooks that come before the boundary's or after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_efficient.weightspace import Block, Boundary, SpectralTransform
from lightning_efficient.weightspace.mask import UnitMask, scale_entries


@pytest.mark.parametrize("first", [True, False])
def test_entries_are_scaled_once_whichever_hook_comes_first(first: bool) -> None:
    param = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], 0.1)
    boundary, where = Boundary(), torch.tensor([1, 4])
    boundary.add("w", param, UnitMask())
    boundary.add("w", param, SpectralTransform((Block(0, 6),)))
    boundary.start()
    (site,) = boundary.sites.values()

    def shrink(*_: object) -> None:
        scale_entries(site, {0: where}, 0.5)

    if first:
        optimizer.register_step_post_hook(shrink)
    boundary.attach([optimizer])
    if not first:
        optimizer.register_step_post_hook(shrink)
    raw = param.detach().clone()  # what init="preserve" starts with
    for _ in range(5):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        raw[where] *= 0.5
    with torch.no_grad():
        site.pull(None)
    torch.testing.assert_close(param.detach(), raw, rtol=1e-9, atol=0)

"""Units of a weight: scaled after a step by hooks before the boundary's or after them, and pruned in its parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_efficient.weightspace import Block, Boundary, SpectralTransform
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.unit_mask import UnitMask, scale_entries


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
        scale_entries([(site, {0: where})], 0.5)

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


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_of_parts_are_parts_of_the_mask(axis: int) -> None:
    """And know it whole: files are the same, whichever process writes them."""
    weight, dropped = torch.randn(6, 4), {0: torch.tensor([1, 4, 5]), 1: torch.tensor([3])}
    whole = UnitMask()
    for dim, where in dropped.items():
        whole.drop(dim, where, weight)
    for start, length in ((0, 3), (3, weight.shape[axis] - 3), (weight.shape[axis], 0)):
        offset = (start, 0) if axis == 0 else (0, start)
        local = (length, 4) if axis == 0 else (6, length)
        layout, mask = Layout((6, 4), local, offset, {axis: ("a group",)}), UnitMask()
        mask.place(layout)
        here = layout.part(weight).clone()
        for dim, where in dropped.items():
            mask.drop(dim, where, here)
        mask.write(here)
        assert torch.equal(here == 0, layout.part(whole.dropped(weight)))
        assert torch.equal(mask.dropped(here), here == 0)
        assert mask.first is None or here[mask.first] == 0
        state = mask.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
        again = UnitMask()
        again.place(layout)
        again.load_state_dict(state, here)
        assert torch.equal(again.dropped(here), here == 0)

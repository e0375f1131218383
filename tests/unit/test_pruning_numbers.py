"""Numbers that a network's code goes by: sizes held in lists, and what kernels of its own precision want."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim, plan_slim, replay_slim


class Parts(nn.Module):
    """One projection into a gate and two values, cut by a list of sizes that the module holds."""

    def __init__(self, sizes: Any = (12, 8, 4)) -> None:
        super().__init__()
        self.parts = sizes
        self.expand, self.mix = nn.Linear(6, 24), nn.Linear(4, 4)
        self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, left, right = self.expand(x).split(list(self.parts), -1)
        return self.head(self.down(gate.relu() * torch.cat([left, self.mix(right)], -1)).relu())


@pytest.mark.parametrize("kind", [list, tuple])
def test_sizes_in_a_list_follow_the_cut(kind: Any) -> None:
    torch.manual_seed(0)
    sizes = kind((12, 8, 4))
    model, x = Parts(sizes).double(), torch.randn(3, 6, dtype=torch.float64)
    groups = find_groups(model, x)
    assert {name: group.units for name, group in groups.found.items()} == {
        "expand": 8, "expand#2": 4, "expand#3": 4, "down": 10,
    }  # fmt: skip
    keep = {name: range(1, group.units) for name, group in groups.found.items()}
    zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
    for group in groups.found.values():
        group.zero(dict(zeroed.named_parameters()), [0])
    apply_slim(slim, keep, groups)
    torch.testing.assert_close(slim(x), zeroed(x))
    assert type(slim.parts) is kind
    assert sum(slim.parts) == slim.expand.out_features < 24
    assert model.parts is sizes  # others may hold it
    assert sizes == kind((12, 8, 4))


def test_a_cut_of_sizes_in_a_list_is_made_again() -> None:
    model, x = Parts(), torch.randn(3, 6)
    groups = find_groups(model, x)
    cuts = plan_slim(model, {name: range(group.units // 2) for name, group in groups.found.items()}, groups)
    assert cuts.attributes[""] == {"parts.0": 6, "parts.1": 4, "parts.2": 2}
    again = Parts()
    replay_slim(again, cuts)
    assert again.parts == (6, 4, 2)
    assert again(x).shape == (3, 3)
    cuts.attributes[""]["parts.7"] = 1
    with pytest.raises(ValueError, match=r"the cuts set `parts.7` of ''"):
        replay_slim(Parts(), cuts)


class Named(Parts):
    """The same, with sizes under names of their own."""

    def __init__(self) -> None:
        super().__init__(None)
        self.gate, self.left, self.right = 12, 8, 4

    def forward(self, x: Tensor) -> Tensor:
        gate, left, right = self.expand(x).split([self.gate, self.left, self.right], -1)
        return self.head(self.down(gate.relu() * torch.cat([left, self.mix(right)], -1)).relu())


def test_parts_of_other_sizes_are_counted_by_name() -> None:
    model, x = Named().double(), torch.randn(3, 6, dtype=torch.float64)
    groups = find_groups(model, x)
    assert sorted(group.units for group in groups.found.values()) == [4, 4, 8, 10]
    zeroed = copy.deepcopy(model)
    for group in groups.found.values():
        group.zero(dict(zeroed.named_parameters()), [0, 2])
    keep = {name: [u for u in range(group.units) if u not in (0, 2)] for name, group in groups.found.items()}
    apply_slim(model, keep, groups)
    torch.testing.assert_close(model(x), zeroed(x))
    assert (model.gate, model.left, model.right) == (8, 6, 2)


class Aligned(nn.Linear):
    """As fused kernels do: rows of its input are whole numbers of so many bytes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] * x.element_size() % 16:
            raise RuntimeError("strides should be multiple of 16 bytes")
        return super().forward(x)


@pytest.mark.parametrize(("dtype", "divisor"), [(torch.float64, 2), (torch.float32, 4), (torch.bfloat16, 8)])
def test_what_kernels_of_its_own_precision_want_is_kept(dtype: torch.dtype, divisor: int) -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), Aligned(24, 10), nn.ReLU(), nn.Linear(10, 3)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, x := torch.randn(3, 6, dtype=dtype))
    assert {name: group.divisor for name, group in groups.found.items()} == {"0": divisor, "2": 1}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    apply_slim(model, {"0": range(divisor)}, groups)
    assert model(x).shape == (3, 3)


class Wide(nn.Linear):
    """A kernel that takes no other width in the precision of the model."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.shape[-1] != 24:
            raise RuntimeError("only widths of 24 are compiled in")
        return super().forward(x)


def test_a_width_that_runs_in_float64_only_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), Wide(24, 10), nn.ReLU(), nn.Linear(10, 3))
    groups = find_groups(model, torch.randn(3, 6))
    assert list(groups.found) == ["2"]
    assert "only widths of 24 are compiled in" in groups.refused["0"]


class Keyed(nn.Module):
    """Queries, keys and values of one projection, by sizes in a dict; nothing but it makes the queries' width."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"query": 6, "key": 6, "value": 9}
        self.project, self.out = nn.Linear(5, 21), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split(list(self.sizes.values()), -1)
        return self.out((q @ k.transpose(-1, -2)).tanh() @ v)


class Experts(nn.Module):
    """All experts in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 7)), nn.Parameter(torch.randn(3, 7, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bni,eih->bneh", x, self.up).relu()
        return torch.einsum("bneh,eho,bne->bno", hidden, self.down, self.gate(x).softmax(-1))


@pytest.mark.parametrize(("kind", "units"), [(Keyed, [6, 9]), (Experts, [7])])
def test_widths_of_one_tensor_are_found(kind: type[nn.Module], units: list[int]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    groups = find_groups(model, x)
    assert sorted(group.units for group in groups.found.values()) == units
    zeroed = copy.deepcopy(model)
    for group in groups.found.values():
        group.zero(dict(zeroed.named_parameters()), [1, 2])
    keep = {name: [u for u in range(group.units) if u not in (1, 2)] for name, group in groups.found.items()}
    apply_slim(model, keep, groups)
    torch.testing.assert_close(model(x), zeroed(x))


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.code, self.decode = nn.Linear(5, 6), nn.Embedding(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        return self.decode(self.code(torch.cdist(z, self.code.weight).argmin(-1)) + z)


def test_distances_to_a_codebook_lose_what_both_lose() -> None:
    torch.manual_seed(0)
    model, x = Codebook().double(), torch.randn(9, 5, dtype=torch.float64)
    groups = find_groups(model, x)
    (group,) = groups.found.values()
    assert {part.name for part in group.slices} >= {"encode.weight", "code.weight", "decode.weight"}
    zeroed = copy.deepcopy(model)
    group.zero(dict(zeroed.named_parameters()), [0, 5])
    apply_slim(model, {group.name: [1, 2, 3, 4]}, groups)
    torch.testing.assert_close(model(x), zeroed(x))

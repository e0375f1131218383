"""Heads are found in attention as people write it, and never taken for channels that could go one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim, plan_slim, replay_slim
from tests.slim_models import lively


class Around(nn.Module):
    """An attention with something before and behind it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, 24), attention, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x))


class Fused(nn.Module):
    """The norm inside, one projection for all, and a count under a name of its own: lucidrains' way."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.h, self.norm = heads, nn.LayerNorm(24)
        self.to_qkv, self.to_out = nn.Linear(24, 72, bias=False), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.h) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        mixed = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        return self.to_out(rearrange(mixed, "b h n d -> b n (h d)"))


class SharedKeys(nn.Module):
    """One key and value for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.q, self.kv, self.out = 4, nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(q, k[:, None], v[:, None]).transpose(1, 2).reshape(b, n, -1))


class FusedGroups(nn.Module):
    """Queries, and keys and values that groups of them share, in one projection split by fixed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_query, self.n_shared, self.head_size = 6, 3, 4
        self.c_attn, self.c_proj = nn.Linear(24, 12 * 4), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = [self.n_query * self.head_size, *[self.n_shared * self.head_size] * 2]
        q, k, v = (t.view(b, n, -1, self.head_size).transpose(1, 2) for t in self.c_attn(x).split(sizes, -1))
        k, v = (t.repeat_interleave(self.n_query // self.n_shared, 1) for t in (k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ByClass(nn.Module):
    """Only the first token asks; heads of a fixed size, counted by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.q(x[:, :1]).view(b, 1, -1, 6), self.k(x).view(b, n, -1, 6), self.v(x).view(b, n, -1, 6)
        y = torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v)
        return torch.cat([self.proj(y.flatten(2)), x[:, 1:]], 1)


class Rotated(nn.Module):
    """Queries and keys normalised by head, and rotated in part."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.norm = 4, nn.LayerNorm(6)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("frequencies", torch.rand(2))

    def rotate(self, x: Tensor) -> Tensor:
        turn, rest = x[..., :4], x[..., 4:]
        angle = torch.cat([torch.arange(x.shape[2])[:, None] * self.frequencies] * 2, -1)
        turned = torch.cat([-turn[..., 2:], turn[..., :2]], -1)
        return torch.cat([turn * angle.cos() + turned * angle.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).transpose(1, 2).chunk(3, -1)
        q, k = self.rotate(self.norm(q)), self.rotate(self.norm(k))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Windows in one axis with the samples, and a constant mask for each of them, as shifted windows have it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("mask", torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x.view(b * 3, 2, c)).view(b * 3, 2, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = self.mask[None, :, None].expand(b, -1, self.heads, -1, -1).reshape(-1, self.heads, 2, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, -1))


class Sizes:
    """Numbers that every layer looks up when it runs."""

    def __init__(self) -> None:
        self.n_head, self.n_query_groups, self.head_size = 6, 3, 4


class Looked(nn.Module):
    """Its heads are counted by an object that all layers share."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config, self.qkv, self.proj = config, nn.Linear(24, 12 * 4), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        b, n, _ = x.shape
        end = c.n_head * c.head_size
        more = end + c.n_query_groups * c.head_size
        q, k, v = (t.view(b, n, -1, c.head_size).transpose(1, 2) for t in self.qkv(x).tensor_split((end, more), -1))
        k, v = (t.repeat_interleave(c.n_head // c.n_query_groups, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(mixed.reshape(b, n, c.head_size * c.n_head))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "two fused heads": (lambda: Fused(2), 2),
    "six fused heads": (lambda: Fused(6), 6),
    "one key for all": (SharedKeys, 4),
    "fused groups": (FusedGroups, 3),
    "class attention": (ByClass, 4),
    "rotated": (Rotated, 4),
    "windows": (Windows, 4),
    "counted by a config": (lambda: Looked(Sizes()), 3),
}
SUBSETS: list[Callable[[int], list[int]]] = [
    lambda n: [0], lambda n: [n - 1], lambda n: list(range(n - 1)), lambda n: list(range(1, n)),
    lambda n: list(range(0, n, 2)), lambda n: list(range((n + 1) // 2)),
]  # fmt: skip


def check(model: nn.Module, x: Any, groups: Any, name: str) -> None:
    """Zeroed equals removed, whichever units go."""
    for subset in SUBSETS:
        group = groups.found[name]
        keep = subset(group.units)
        zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
        group.zero(dict(zeroed.named_parameters()), set(range(group.units)) - set(keep))
        apply_slim(slim, {name: keep}, groups)
        with torch.no_grad():
            torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_heads_go_as_a_whole(name: str) -> None:
    build, heads = CASES[name]
    model, x = lively(Around(build())).double().eval(), torch.randn(2, 6, 5).double()
    groups = find_groups(model, x)
    assert {n: g.units for n, g in groups.found.items() if n.startswith("attention")} == {"attention": heads}
    check(model, x, groups, "attention")


def test_layers_that_share_a_config_lose_heads_apart() -> None:
    sizes = Sizes()
    model, x = (
        lively(Around(nn.Sequential(Looked(sizes), Looked(sizes)))).double().eval(),
        torch.randn(2, 5, 5).double(),
    )
    groups = find_groups(model, x)
    keep = {"attention.0": [1], "attention.1": [0, 2]}
    zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
    for name, stay in keep.items():
        groups.found[name].zero(dict(zeroed.named_parameters()), set(range(3)) - set(stay))
    apply_slim(slim, keep, groups)
    assert [(part.config.n_head, part.config.n_query_groups) for part in slim.attention] == [(2, 1), (4, 2)]
    assert (sizes.n_head, model.attention[0].config.n_head) == (6, 6)
    torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-10)
    again = copy.deepcopy(model)
    replay_slim(again, plan_slim(model, keep, groups))
    torch.testing.assert_close(again(x), slim(x), rtol=0, atol=0)


def test_attention_in_the_root_module() -> None:
    model, x = lively(Fused(4)).double().eval(), torch.randn(2, 5, 24).double()
    groups = find_groups(model, x)
    assert groups.found["to_qkv"].units == 4
    check(model, x, groups, "to_qkv")


class Hidden(nn.Module):
    """Blocks of channels that nothing shows but the result: a library that sees the numbers only."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.first, self.last, self.divisor = nn.Linear(5, 12), nn.Linear(12, 3), divisor

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[-1] % self.divisor:
            raise RuntimeError("widths are multiples of 4 here")
        return self.last(x)


def test_a_failure_teaches_the_divisor() -> None:
    model, x = Hidden(4), torch.randn(3, 5)
    group = find_groups(model, x).found["first"]
    assert (group.units, group.divisor) == (12, 4)


class Mixed(nn.Module):
    """Reverses each half of its channels in a way that no trace sees: cut evenly it even runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.more, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        values = torch.from_numpy(y.detach().numpy().reshape(len(x), 2, -1)[:, :, ::-1].reshape(len(x), -1).copy())
        return self.out(self.more(self.last(values).relu()).relu())


def test_what_cannot_be_seen_is_refused_and_ends_nothing_else() -> None:
    groups = find_groups(Mixed(), torch.randn(3, 5))
    assert list(groups.found) == ["last", "more"]
    assert groups.refused["first"]


class SharedBias(nn.Module):
    """As in T5's decoder: the first attention makes a bias of as many heads, all zeros, that the second adds too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in "qkvo"}) for _ in range(2))
        self.mlp, self.out = nn.Linear(16, 20), nn.Linear(20, 3)
        for layer in self.layers:
            layer.n_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            q, k, v = (layer[n](x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
            logits = q @ k.transpose(-1, -2)
            if bias is None:
                bias = torch.zeros(1, layer.n_heads, x.shape[1], x.shape[1], dtype=x.dtype)
            x = x + layer["o"](((logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.out(self.mlp(x).relu())  # type: ignore[no-any-return]


def test_heads_that_a_constant_joins_go_together() -> None:
    model, x = lively(SharedBias()).double().eval(), torch.randn(2, 5, 16).double()
    groups = find_groups(model, x)
    heads = [group for group in groups.found.values() if group.heads]
    assert [(group.units, len(group.slices)) for group in heads] == [(4, 14)], groups.report()
    for subset in SUBSETS:
        keep = {name: subset(group.units) for name, group in groups.found.items()}
        zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
        for name, stay in keep.items():
            group = groups.found[name]
            group.zero(dict(zeroed.named_parameters()), set(range(group.units)) - set(stay))
        apply_slim(slim, keep, groups)
        torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-10)


class Sloped(nn.Module):
    """The model makes slopes of its number of heads, and every layer adds them: without one head the others' change."""

    def __init__(self, made_of_heads: bool) -> None:
        super().__init__()
        self.num_heads, self.made_of_heads = 4, made_of_heads
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in "qkvo"}) for _ in range(2))
        self.mlp, self.out = nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        rate = 8 / self.num_heads if self.made_of_heads else 0.0
        slopes = 2 ** (-rate * torch.arange(1, self.num_heads + 1, dtype=x.dtype))
        distance = torch.arange(x.shape[1], dtype=x.dtype)
        for layer in self.layers:
            q, k, v = (layer[n](x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
            logits = q @ k.transpose(-1, -2) + slopes[:, None, None] * distance
            x = x + layer["o"]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.out(self.mlp(x).relu())  # type: ignore[no-any-return]


def test_heads_whose_number_the_model_makes_something_of() -> None:
    x = torch.randn(2, 5, 16).double()
    groups = find_groups(lively(Sloped(True)).double().eval(), x)
    assert list(groups.found) == ["mlp"]
    for layer, other in (("layers.0", "layers.1"), ("layers.1", "layers.0")):
        assert groups.refused[layer] == (
            f"its heads run without some only if those of {other!r} go along and `num_heads` of the model counts them, "
            "and the others then compute something else: what is made of that number changes"
        )
    same = find_groups(lively(Sloped(False)).double().eval(), x)
    assert [(g.units, len(g.slices), dict(g.counts)) for g in same.found.values() if g.heads] == [
        (4, 14, {"": {"num_heads": 1}})
    ]

"""PAGCP's core: budgets and tolerances against closed forms, the search against brute force on a toy oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_efficient.structured.alike import as_one, bundled, opened
from lightning_efficient.structured.budgets import Budget, decay, read_budgets, tolerances
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.structured.pagcp import Layer, PagcpConfig, search, unit_scores
from lightning_efficient.weightspace.unit_mask import UnitMask

# -- budgets ---------------------------------------------------------------------------------------------------------


def test_what_a_budget_allows() -> None:
    loss, accuracy = Budget("loss", 0.05), Budget("accuracy", 0.05, "max")
    assert loss.cost(2.1, 2.0) == pytest.approx(1.05)
    assert loss.within(2.1, 2.0)
    assert not loss.within(2.101, 2.0)
    assert accuracy.within(0.855, 0.9)
    assert not accuracy.within(0.854, 0.9)
    assert loss.cost(1.0, 2.0) == 0.5, "an improvement costs less than nothing"
    assert loss.within(-0.96, -1.0), "a share of the absolute value"
    assert not loss.within(-0.94, -1.0), "a share of the absolute value"
    assert loss.within(0.0, 0.0)
    assert not loss.within(1e-9, 0.0)
    assert not loss.within(math.nan, 1.0)


@pytest.mark.parametrize(
    ("budgets", "modes", "message"),
    [
        ({}, None, "such as {'val_loss': 0.05}; got {}"),
        (["val_loss"], None, "maps logged metrics"),
        ({"a": 0}, None, r"`budgets\['a'\]` is a share of the metric's value, a number above 0 such as 0.05; got 0"),
        ({"a": -0.1}, None, "above 0"),
        ({"a": math.nan}, None, "above 0"),
        ({"a": math.inf}, None, "above 0"),
        ({"a": True}, None, "above 0"),
        ({"a": "5%"}, None, "above 0"),
        ({"a": 1.0}, {"a": "max"}, "let the metric fall to 0"),
        ({"a": 0.1}, {"a": "lower"}, r"must be one of \('min', 'max'\)"),
        ({"a": 0.1}, {"b": "max"}, r"names \['b'\], for which there is no budget; `budgets` has \['a'\]"),
    ],
)
def test_budgets_that_are_none(budgets: Any, modes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_budgets(budgets, modes)


def test_the_decay_solves_the_product_equation_in_closed_form() -> None:
    # Two steps: (1 + t)(1 + tλ) = 1 + b. Three: a quadratic would be needed for the sum; equal steps have λ = 1.
    for share, first in itertools.product((0.01, 0.05, 0.5, 4.0), (0.3, 0.5, 0.9)):
        begin = first * share
        assert decay(share, begin, 2) == pytest.approx(((1 + share) / (1 + begin) - 1) / begin, rel=1e-12)
        equal = (1 + share) ** (1 / 7) - 1
        assert decay(share, equal, 7) == pytest.approx(1.0, rel=1e-9)
    assert decay(0.05, 0.05, 9) == pytest.approx(0.0, abs=1e-12)
    assert decay(0.05, 0.05, 1) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 10), st.integers(1, 80), st.floats(0.05, 20))
def test_tolerances_make_up_the_budget(share: float, count: int, first: float) -> None:
    made = tolerances(share, count, first)
    assert len(made) == count
    assert math.prod(1 + t for t in made) == pytest.approx(1 + share, rel=1e-9)
    falling = made == sorted(made, reverse=True)
    assert falling if first > 1 else made == sorted(made) or first == 1


@pytest.mark.parametrize(
    ("share", "first", "count"), [(0.05, 0.06, 3), (0.05, 0.0, 3), (0.05, 0.04, 1), (0.05, 0.01, 0)]
)
def test_decays_that_do_not_exist(share: float, first: float, count: int) -> None:
    with pytest.raises(ValueError, match="cannot make up a budget"):
        decay(share, first, count)


# -- the search ------------------------------------------------------------------------------------------------------


class Toy:
    """Metrics that are a known function of what is dropped: every unit has a price for each of them."""

    def __init__(self, prices: Mapping[str, Mapping[str, Sequence[float]]], interplay: float = 0.0) -> None:
        self.prices, self.interplay = prices, interplay
        self.seen: list[dict[str, tuple[int, ...]]] = []

    def __call__(self, dropped: Mapping[str, Sequence[int]]) -> dict[str, float]:
        self.seen.append({name: tuple(units) for name, units in dropped.items()})
        out = {}
        for metric, layers in self.prices.items():
            costs = [sum(layers[name][u] for u in units) for name, units in dropped.items()]
            out[metric] = 1.0 + sum(costs) + self.interplay * sum(a * b for a, b in itertools.combinations(costs, 2))
        return out


def layers_of(sizes: Mapping[str, int], seed: int = 0, divisor: int = 1) -> list[Layer]:
    g = torch.Generator().manual_seed(seed)
    return [
        Layer(n, torch.rand(size, generator=g), torch.ones(size, dtype=torch.bool), divisor)
        for n, size in sizes.items()
    ]


def linear_compute(weights: Mapping[str, float]) -> Any:
    def compute(counts: Mapping[str, int] | None = None) -> float:
        return 100.0 - sum(weights[name] * count for name, count in (counts or {}).items())

    return compute


def by_hand(layers: list[Layer], oracle: Toy, shares: Mapping[str, float], weights: Any, config: PagcpConfig) -> Any:
    """The description once more, in the simplest words: lists, no early stop but the one that is described."""
    order = sorted(layers, key=lambda x: -weights[x.name] * max(int(0.3 * x.left), 1))
    if config.first < 1:
        order.sort(key=lambda x: weights[x.name] * max(int(0.3 * x.left), 1))
    start = oracle({})
    reached = dict.fromkeys(shares, 1.0)
    last = dict.fromkeys(shares, 1.0)
    done: dict[str, tuple[int, ...]] = {}
    spent = {}
    for i, layer in enumerate(order):
        ranked = sorted(range(layer.left), key=lambda u: (float(layer.scores[u]), u))
        accepted: tuple[int, ...] = ()
        after = dict(last)
        for trial in range(1, round(config.most / config.step) + 1):
            count = math.floor(trial * config.step * layer.left + 1e-9)
            units = tuple(sorted(ranked[:count]))
            values = oracle({**done, layer.name: units})
            cost = {m: values[m] / start[m] for m in shares}
            if any(cost[m] > reached[m] * (1 + tolerances(shares[m], len(order), config.first)[i]) for m in shares):
                break
            accepted, after = units, cost
        spent[layer.name] = max((after[m] - last[m]) / shares[m] for m in shares)
        reached = {m: max(reached[m], after[m]) for m in shares}
        last = after
        if accepted:
            done[layer.name] = accepted
    ranked_layers = sorted(done, key=lambda n: spent[n] / (weights[n] * len(done[n])))
    keep = ranked_layers[: max(int(config.topk * len(ranked_layers) + 1e-9), 1)]
    return {name: done[name] for name in keep}


@pytest.mark.parametrize("first", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_the_description(seed: int, first: float) -> None:
    sizes = {"a": 20, "b": 7, "c": 13, "d": 40}
    layers = layers_of(sizes, seed)
    g = torch.Generator().manual_seed(100 + seed)
    prices = {
        metric: {n: (scale * torch.rand(s, generator=g)).tolist() for n, s in sizes.items()}
        for metric, scale in (("x", 0.02), ("y", 0.01))
    }
    weights = {"a": 0.5, "b": 2.0, "c": 1.0, "d": 0.3}
    shares, config = {"x": 0.2, "y": 0.15}, PagcpConfig(first=first, topk=0.7)
    oracle = Toy(prices)
    found = search(layers, read_budgets(shares), oracle, linear_compute(weights), config)
    expected = by_hand(layers, Toy(prices), shares, weights, config)
    assert found.dropped == expected
    assert found.evaluations == len(oracle.seen)
    assert found.saved == pytest.approx(sum(weights[n] * len(u) for n, u in expected.items()) / 100)
    assert all(b.within(found.values[b.metric], found.baseline[b.metric]) for b in read_budgets(shares))


def test_against_every_selection() -> None:
    """Additive prices that follow the scores: greedy with one budget finds what brute force over prefixes finds."""
    sizes = {"a": 4, "b": 4}
    layers = [Layer(n, torch.arange(4.0), torch.ones(4, dtype=torch.bool)) for n in sizes]
    prices = {"loss": {"a": [0.001, 0.002, 0.2, 0.4], "b": [0.001, 0.3, 0.4, 0.5]}}
    weights = {"a": 2.0, "b": 1.0}
    config = PagcpConfig(first=1.0, step=0.25, most=0.75, topk=1.0)
    found = search(layers, read_budgets({"loss": 0.1}), Toy(prices), linear_compute(weights), config)
    best = max(
        (
            (a, b)
            for a, b in itertools.product(range(4), range(4))
            if sum(prices["loss"]["a"][:a]) + sum(prices["loss"]["b"][:b]) <= 0.1
        ),
        key=lambda c: 2.0 * c[0] + c[1],
    )
    assert {n: len(u) for n, u in found.dropped.items()} == {"a": best[0], "b": best[1]} == {"a": 2, "b": 1}


def test_what_breaks_the_budget_together_is_given_back() -> None:
    """The search sees a sample on which everything is free; all the data says otherwise."""
    sizes = {"a": 10, "b": 10}
    prices = {"loss": {n: [0.01] * 10 for n in sizes}}
    layers = layers_of(sizes)
    whole = Toy(prices)
    found = search(
        layers, read_budgets({"loss": 0.12}), Toy({"loss": {n: [0.0] * 10 for n in sizes}}),
        linear_compute({"a": 1.0, "b": 2.0}), PagcpConfig(topk=1.0), verify=whole,
    )  # fmt: skip
    assert len(found.given_back) == 1
    assert list(found.dropped) == ["b"]
    assert len(found.dropped["b"]) == 9
    assert found.values == {"loss": pytest.approx(1.09)}
    assert found.baseline == {"loss": 1.0}


def test_nothing_is_dropped_where_everything_is_dear() -> None:
    layers = layers_of({"a": 10})
    found = search(layers, read_budgets({"loss": 0.1}), Toy({"loss": {"a": [1.0] * 10}}), linear_compute({"a": 1.0}))
    assert found.dropped == {}
    assert found.saved == 0
    assert found.values == found.baseline
    assert found.rows[0].trials == 1


def test_divisors_and_units_pruned_before() -> None:
    alive = torch.ones(16, dtype=torch.bool)
    alive[:4] = False
    layer = Layer("a", torch.arange(16.0), alive, divisor=4)
    assert layer.left == 12
    assert layer.counts(0.05, 0.95) == [4, 8]
    assert layer.lowest(4) == (4, 5, 6, 7)
    assert Layer("a", torch.zeros(1), torch.ones(1, dtype=torch.bool)).counts(0.05, 0.95) == []
    assert Layer("a", torch.zeros(4), torch.ones(4, dtype=torch.bool), 4).counts(0.05, 0.95) == []
    assert Layer("a", torch.zeros(3), torch.ones(3, dtype=torch.bool)).counts(0.4, 0.9) == [1, 2]


def test_alike_layers_lose_as_many_of_their_own_lowest() -> None:
    """Two of 9, one of 9 of which some are gone, one of 5: the search sees three layers, and prices all of each."""
    sizes = {"a": 9, "b": 5, "c": 9, "d": 9}
    layers = layers_of(sizes)
    layers[3].alive[:2] = False
    bundles = bundled(layers, list(sizes.values()))
    assert {name: [m.name for m in members] for name, members in bundles.items()} == {
        "a and 1 alike": ["a", "c"], "b": ["b"], "d": ["d"],
    }  # fmt: skip
    oracle = Toy({"loss": {n: [0.01] * size for n, size in sizes.items()}})
    compute = linear_compute({"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0})
    found = search(
        [as_one(name, members) for name, members in bundles.items()],
        read_budgets({"loss": 0.2}),
        lambda dropped: oracle(opened(dropped, bundles)),
        lambda counts: compute({m.name: counts[name] for name in counts for m in bundles[name]}),
        PagcpConfig(first=1.0, topk=1.0),
    )
    gone = opened(found.dropped, bundles)
    assert len(gone["a"]) == len(gone["c"]) == 3  # of a third of 0.2, at 0.02 a unit of each
    assert gone["a"] == layers[0].lowest(3) != gone["c"] == layers[2].lowest(3)
    assert set(gone["d"]).isdisjoint((0, 1))
    assert found.values["loss"] == pytest.approx(1 + 0.01 * sum(map(len, gone.values())))


def test_a_baseline_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"\{'loss': nan\}: has training diverged"):
        search(layers_of({"a": 3}), read_budgets({"loss": 0.1}), lambda d: {"loss": math.nan}, linear_compute({"a": 1}))
    with pytest.raises(ValueError, match="no layer"):
        search([], read_budgets({"loss": 0.1}), lambda d: {"loss": 1.0}, linear_compute({}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most": 1.0}, "`most` is a share of a layer's units, within .0, 1.; got 1.0. All of them would"),
        ({"most": 0}, "`most`"),
        ({"step": 0}, "`step` must be within"),
        ({"step": 0.5, "most": 0.4}, "`step`"),
        ({"topk": 0}, "`topk`"),
        ({"topk": 1.5}, "`topk`"),
        ({"first": 0}, "`first`"),
        ({"first": math.inf}, "`first`"),
        ({"first": True}, "`first`"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagcpConfig(**arguments)


# -- units: scores, cost, masks --------------------------------------------------------------------------------------


def conv_net() -> tuple[nn.Sequential, dict[str, UnitGroup]]:
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3),
    )  # fmt: skip
    six, four, flat = torch.arange(6)[:, None], torch.arange(4)[:, None], torch.arange(100).view(4, 25)
    first = [Slice(name, 0, six, "produce") for name in ("0.weight", "1.weight", "1.bias")]
    second = [Slice(name, 0, four, "produce") for name in ("3.weight", "3.bias")]
    groups = (
        UnitGroup("first", 6, (*first, Slice("3.weight", 1, six, "consume"))),
        UnitGroup("second", 4, (*second, Slice("6.weight", 1, flat, "consume"))),
    )
    return net, {group.name: group for group in groups}


def cut(first: int, second: int) -> nn.Sequential:
    """The same network, built smaller."""
    return nn.Sequential(
        nn.Conv2d(1, 6 - first, 3, padding=1, bias=False), nn.BatchNorm2d(6 - first), nn.ReLU(),
        nn.Conv2d(6 - first, 4 - second, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear((4 - second) * 25, 3),
    )  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(itertools.product((0, 1, 5), (0, 2, 3))))
def test_the_cost_is_that_of_the_smaller_network(first: int, second: int) -> None:
    net, groups = conv_net()
    dropped = {"first": first, "second": second}
    x = torch.zeros(2, 1, 5, 5)
    small = cut(first, second)
    macs = Cost.macs(net, groups, lambda: net(x))
    by_hand = 2 * 25 * 9 * (6 - first) * (1 + 4 - second) + 2 * (4 - second) * 25 * 3
    assert macs(dropped) == pytest.approx(by_hand)
    assert Cost.macs(small, {}, lambda: small(x))() == pytest.approx(by_hand)
    assert Cost.parameters(net, groups)(dropped) == pytest.approx(sum(p.numel() for p in small.parameters()))


def test_counting_leaves_no_trace() -> None:
    net, groups = conv_net()
    net[4] = nn.Dropout(0.5)
    before, state = {n: b.clone() for n, b in net.named_buffers()}, torch.get_rng_state()
    Cost.macs(net, groups, lambda: net(torch.ones(2, 1, 5, 5)))
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in net.modules())


def test_attention_counts_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    x = torch.zeros(1, 5, 8)
    cost = Cost.macs(layer, {}, lambda: layer(x))
    assert cost() == pytest.approx(5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8 + 2 * 5 * 8 * 16)


def test_scores_are_mean_magnitudes() -> None:
    net, groups = conv_net()
    parameters = dict(net.named_parameters())
    expected = parameters["0.weight"].detach().abs().mean((1, 2, 3))
    torch.testing.assert_close(unit_scores(groups["first"], parameters), expected)
    only_norm = UnitGroup("n", 6, (Slice("1.weight", 0, torch.arange(6)[:, None], "produce"),))
    torch.testing.assert_close(unit_scores(only_norm, parameters), torch.ones(6))


def test_a_mask_of_units_zeroes_and_survives() -> None:
    weight = nn.Parameter(torch.randn(6, 4, 3))
    mask = UnitMask()
    mask.drop(0, torch.tensor([1, 4]), weight)
    mask.drop(1, torch.tensor([2]), weight)
    mask.drop(0, torch.tensor([5]), weight)
    gone = torch.zeros(6, 4, 3, dtype=torch.bool)
    gone[[1, 4, 5]] = True
    gone[:, 2] = True
    assert torch.equal(mask.dropped(weight), gone)
    assert not mask.fits(weight.detach(), 0.0)
    grad = torch.full_like(weight, torch.inf)
    mask.pull(weight.detach(), grad)
    assert bool((grad[gone] == 0).all())
    assert bool(torch.isinf(grad[~gone]).all())
    mask.push(weight.data)
    assert torch.equal(weight.detach() == 0, gone)
    assert mask.fits(weight.detach(), 0.0)
    again = UnitMask()
    again.load_state_dict(mask.state_dict(), weight.detach())
    assert torch.equal(again.dropped(weight), gone)
    again.start(weight)
    assert not bool(again.dropped(weight).any())
    with pytest.raises(ValueError, match="holds"):
        again.load_state_dict({"axis3": torch.zeros(1, dtype=torch.uint8)}, weight.detach())
    with pytest.raises(ValueError, match="Was the model changed"):
        again.load_state_dict({"axis0": torch.zeros(9, dtype=torch.uint8)}, weight.detach())


@pytest.mark.parametrize(("topk", "layers", "left"), [(0.8, 4, 3), (0.8, 5, 4), (0.8, 1, 1), (0.5, 3, 1), (1.0, 4, 4)])
def test_of_few_layers_too_some_are_given_back(topk: float, layers: int, left: int) -> None:
    """Rounded down, as published: the dearest for the compute it saves first."""
    names = [f"l{i}" for i in range(layers)]
    prices = {"loss": {name: [0.001 * (i + 1)] * 4 for i, name in enumerate(names)}}
    found = search(
        layers_of(dict.fromkeys(names, 4), 0), read_budgets({"loss": 4.0}), Toy(prices),
        linear_compute(dict.fromkeys(names, 1.0)), PagcpConfig(step=0.25, most=0.75, topk=topk),
    )  # fmt: skip
    assert list(found.dropped) == [name for name in (row.name for row in found.rows) if name in names[:left]]
    assert len(found.dropped) == left


def test_the_order_is_by_whole_units() -> None:
    """0.3 of 9 units are 2, not 3."""
    layers = layers_of({"a": 9, "b": 10}, 0)
    found = search(layers, read_budgets({"loss": 1.0}), Toy({"loss": {"a": [0.0] * 9, "b": [0.0] * 10}}),
                   linear_compute({"a": 1.2, "b": 1.0}))  # fmt: skip
    assert [row.name for row in found.rows] == ["b", "a"]

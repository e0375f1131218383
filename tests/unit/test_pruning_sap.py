"""SAP's formula in exact arithmetic, its scopes by brute force, and the phases."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_efficient.metrics.functional import pq_index
from lightning_efficient.pruning.sap import SapConfig, phase, prune_count, sap_step

properties = settings(max_examples=300, deadline=None, derandomize=True)


def exact_count(
    index: Fraction, d: int, gamma: Fraction, beta: Fraction, power: int, eta: Fraction = Fraction(0)
) -> int:
    """``⌊d · min(γ (1 - ⌈r⌉/d), β)⌋`` for the published norms, where the exponents are whole (``power`` 1 or 2)."""
    r = d * (1 + eta) ** -2 * (1 - index) ** power
    return max(math.floor(d * min(gamma * (1 - Fraction(math.ceil(r), d)), beta)), 0)


@properties
@given(
    st.integers(0, 1000),
    st.integers(1, 3000),
    st.sampled_from(["1", "1.2", "3", "0.5"]),
    st.sampled_from(["0.9", "0.5", "0.25"]),
    st.sampled_from([((0.5, 1.0), 1), ((1.0, 2.0), 2)]),
    st.sampled_from(["0", "0.25", "1"]),
)
def test_the_formula_with_its_ceiling_and_floor(
    thousandths: int, d: int, gamma: str, beta: str, norms: tuple[tuple[float, float], int], eta: str
) -> None:
    """Indices are multiples of 1/1024, which float64 holds exactly."""
    index = Fraction(thousandths, 1024)
    (p, q), power = norms
    config = SapConfig(p, q, float(eta), float(gamma), float(beta))
    found = prune_count(torch.tensor(float(index), dtype=torch.float64), torch.tensor(d), config)
    assert int(found) == exact_count(index, d, Fraction(gamma), Fraction(beta), power, Fraction(eta))


def test_worked_examples() -> None:
    """100 weights with index 0.305: 69.5 have to stay, so 70 do and 30 go; with (1, 2) 48.3, so 49 do."""
    index, d = torch.tensor(0.305, dtype=torch.float64), torch.tensor(100)
    assert int(prune_count(index, d, SapConfig())) == 30
    assert int(prune_count(index, d, SapConfig(1, 2))) == 51
    assert int(prune_count(index, d, SapConfig(gamma=2.0))) == 60
    assert int(prune_count(index, d, SapConfig(gamma=9.0))) == 90  # beta
    assert int(prune_count(index, d, SapConfig(beta=0.1))) == 10
    # eta: (1 + 0.1)^-2 · 69.5 = 57.4
    assert int(prune_count(index, d, SapConfig(eta=0.1))) == 42
    assert int(prune_count(torch.tensor(0.0), torch.tensor(7), SapConfig())) == 0
    assert int(prune_count(torch.tensor(torch.nan), torch.tensor(7), SapConfig(1, 2))) == 0
    # Small fan-in: 1.2 of 6 could go, the ceiling keeps 5, one goes; of 5 none.
    assert prune_count(torch.tensor([0.2, 0.19]), torch.tensor([6, 5]), SapConfig()).tolist() == [1, 0]


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 20, generator=g).double() ** 3,
        "b": torch.randn(4, 5, 3, 3, generator=g).double(),
        "c": torch.zeros(2, 8).double(),
    }


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
@pytest.mark.parametrize("norms", [(0.5, 1.0), (1.0, 2.0)])
def test_a_step_by_brute_force(scope: Any, norms: tuple[float, float]) -> None:
    config = SapConfig(*norms, scope=scope)
    w = weights()
    g = torch.Generator().manual_seed(1)
    kept = {name: torch.rand(value.shape, generator=g) < 0.7 for name, value in w.items()}
    kept["a"][0] = False  # a neuron that is gone
    step = sap_step(w, kept, config)

    entries = [
        (name, row, i, float(value.flatten(1)[row, i].abs()))
        for name, value in w.items()
        for row in range(len(value))
        for i in range(value[0].numel())
        if bool(kept[name].flatten(1)[row, i])
    ]
    groups: dict[Any, list[tuple[str, int, int, float]]] = {}
    for entry in entries:
        key = {"global": "", "layer": entry[0], "neuron": entry[:2]}[scope]
        groups.setdefault(key, []).append(entry)
    gone = set()
    indices = []
    for group in groups.values():
        if any(e[3] for e in group):
            index = float(pq_index(torch.tensor([e[3] for e in group], dtype=torch.float64), *norms))
            indices.append(index)
            count = int(prune_count(torch.tensor(index), torch.tensor(len(group)), config))
            gone |= {e[:3] for e in sorted(group, key=lambda e: e[3])[:count]}
    for name, value in w.items():
        mask = step.masks[name].flatten(1)
        assert mask.shape == value.flatten(1).shape
        for row in range(mask.shape[0]):
            for i in range(mask.shape[1]):
                alive = bool(kept[name].flatten(1)[row, i]) and (name, row, i) not in gone
                assert bool(mask[row, i]) is alive, (name, row, i)
    assert (step.pruned, step.left, step.total) == (len(gone), len(entries), sum(v.numel() for v in w.values()))
    assert step.pruned > 0
    everything = torch.tensor([e[3] for e in entries], dtype=torch.float64)
    assert step.index == pytest.approx(float(pq_index(everything, *norms)), abs=1e-12)
    assert step.scoped == pytest.approx(math.fsum(indices) / len(indices), abs=1e-12)


def test_equal_magnitudes_stall() -> None:
    step = sap_step({"w": torch.ones(5, 7)}, {"w": torch.ones(5, 7, dtype=torch.bool)}, SapConfig())
    assert step.pruned == 0
    assert bool(step.masks["w"].all())
    with pytest.raises(ValueError, match="without a nonzero entry"):
        sap_step({"w": torch.zeros(5, 7)}, {"w": torch.ones(5, 7, dtype=torch.bool)}, SapConfig())


def test_phases() -> None:
    """The course of the paper's figure: index down, up, and then the metric goes."""
    pqi = [0.31, 0.25, 0.20, 0.28, 0.37, 0.14]
    accuracy = [0.90, 0.91, 0.90, 0.89, 0.86, 0.58]
    names = [phase(pqi[: i + 1], accuracy[: i + 1], 0.1, "max") for i in range(6)]
    assert names == ["dense", "regularise", "regularise", "compress", "compress", "collapse"]
    loss = [1 - a for a in accuracy]
    assert phase(pqi, loss, 0.1, "min") == "collapse"
    assert phase(pqi[:2], loss[:2], 0.1, "min") == "regularise"
    assert phase([0.3, 0.2], [None, None], 0.1, "min") == "regularise"
    assert phase([0.3, 0.2], [0.9, math.nan], 0.1, "max") == "collapse"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"p": 1, "q": 1}, "0 < p < q; got p=1, q=1"),
        ({"p": 2, "q": 1}, "0 < p < q; got p=2, q=1"),
        ({"eta": -1}, "`eta` must be 0 or larger; got -1"),
        ({"gamma": 0}, "`gamma` must be above 0; got 0"),
        ({"beta": 1}, r"`beta` must be within \(0, 1\); got 1"),
        ({"scope": "row"}, "`scope` must be one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SapConfig(**arguments)

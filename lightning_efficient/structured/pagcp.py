"""PAGCP: performance-aware global channel pruning, from the paper's description (Ye et al., arXiv 2303.11923).

Which units to cut together, so that no task's loss leaves its budget, is approximated layer by layer, each judged on
the network that the layers before it have left (sequential greedy), with the losses themselves as the judge (an oracle)
instead of a proxy. One round:

1. Layers in the order of the compute that 30 % of their units would save, the largest first.
2. Each layer has a tolerance; together they make up the budget: :func:`~lightning_efficient.structured.budgets.decay`.
3. In each layer ever more of the units with the smallest weights go, until a metric would become worse than what was
   reached before it by more than the layer's tolerance; the share before that is kept.
4. Of the layers, those stay pruned that cost the least budget for the compute they save.

Where the paper's step 4 stops, the result is measured once more, and layers are given back, the dearest first, until
every budget is kept: what one layer costs depends on the others, so that fewer pruned layers need not be better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_efficient.structured.budgets import Budget, tolerances
from lightning_efficient.structured.groups import UnitGroup

Dropped: TypeAlias = Mapping[str, Sequence[int]]
# The metrics of the network with some units zeroed, beside those that were zero before.
Oracle: TypeAlias = Callable[[Dropped], Mapping[str, float]]

# The share of a layer's units by which the compute it can save is measured.
_PROBE = 0.3


@dataclass(frozen=True, eq=False)
class Layer:
    """A group of units as the search sees it.

    Args:
        name: Of the group.
        scores: ``(units,)``; the lowest go first.
        alive: ``(units,)`` bool: not pruned earlier.
        divisor: How many units may stay: a multiple of this.
    """

    name: str
    scores: Tensor
    alive: Tensor
    divisor: int = 1

    @property
    def left(self) -> int:
        """How many units there are to choose from."""
        return int(self.alive.sum())

    def lowest(self, count: int) -> tuple[int, ...]:
        """The ``count`` units that go first; of equal ones the first."""
        order = self.scores.masked_fill(~self.alive, math.inf).argsort(stable=True)
        return tuple(sorted(order[:count].tolist()))

    def counts(self, step: float, most: float) -> list[int]:
        """How many units to try to drop: ``step``, ``2 step``, ... up to ``most`` of those left, ever more.

        Rounded down to what the divisor allows; something always stays.
        """
        tried: list[int] = []
        for i in range(1, int(most / step + 1e-9) + 1):
            kept = self.left - int(i * step * self.left + 1e-9)
            kept = max(-(-kept // self.divisor), 1) * self.divisor
            if (count := self.left - kept) > 0 and count not in tried:
                tried.append(count)
        return tried


@dataclass(frozen=True)
class Row:
    """What the search found in one layer.

    Args:
        name: Of the group.
        units: Units before this round.
        dropped: Those that could go.
        tolerance: Metric → by how much this layer may have made it worse, relative to what it was before the layer.
        values: The metrics with everything dropped up to this layer.
        spent: Share of a budget that this layer cost, of the metric where it is largest; negative for an improvement.
        saved: Share of the network's compute that is saved by cutting these units alone.
        trials: How many shares were measured.
        chosen: Whether they go in the end.
    """

    name: str
    units: int
    dropped: tuple[int, ...]
    tolerance: dict[str, float]
    values: dict[str, float]
    spent: float
    saved: float
    trials: int
    chosen: bool = False


@dataclass(frozen=True)
class Decision:
    """What one round decided.

    Args:
        rows: One a layer, in the order of the search.
        baseline: The metrics before.
        values: The metrics with the chosen units dropped.
        saved: Share of the network's compute saved by all of them together.
        given_back: Layers that were chosen, then given back because a budget was not kept.
        evaluations: How often metrics were measured.
    """

    rows: tuple[Row, ...]
    baseline: dict[str, float]
    values: dict[str, float]
    saved: float
    given_back: tuple[str, ...] = ()
    evaluations: int = 0
    dropped: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", {row.name: row.dropped for row in self.rows if row.chosen})


@dataclass(frozen=True)
class PagcpConfig:
    """How a round searches.

    Args:
        first: Tolerance of the first layer in multiples of an equal share. Above 1 the layers that save the most come
            first and may cost more; below 1 those that save the least come first.
        step: By how much the share of a layer's units grows from one trial to the next.
        most: Largest share of a layer's units that one round may drop.
        topk: Share of the layers that stay pruned, rounded down but at least one: those with the least cost for the
            compute saved. Costs are in shares of a budget, as losses of several tasks have several units; with one
            budget that is the order of loss increase over compute saved.
        uniform: Groups of as many units, heads or others, are one layer of the search and lose as many, so that equal
            widths stay equal.
    """

    first: float = 1.5
    step: float = 0.05
    most: float = 0.95
    topk: float = 0.8
    uniform: bool = False

    def __post_init__(self) -> None:
        if not _number(self.first) or not 0 < self.first < math.inf:
            raise ValueError(f"`first` must be above 0; got {self.first!r}. 1 gives every layer the same tolerance.")
        if not _number(self.most) or not 0 < self.most < 1:
            raise ValueError(
                f"`most` is a share of a layer's units, within (0, 1); got {self.most!r}. All of them would leave "
                "nothing for the next layer to read."
            )
        if not _number(self.step) or not 0 < self.step <= self.most:
            raise ValueError(f"`step` must be within (0, most={self.most}]; got {self.step!r}.")
        if not _number(self.topk) or not 0 < self.topk <= 1:
            raise ValueError(f"`topk` is a share of the layers, within (0, 1]; got {self.topk!r}.")
        if not isinstance(self.uniform, bool):
            raise ValueError(f"`uniform` is true or false; got {self.uniform!r}.")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def unit_scores(group: UnitGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Mean magnitude of the weights that make each unit, summed over its tensors.

    Args:
        group: The group.
        parameters: Name → parameter.

    Returns:
        ``(units,)`` on the CPU. Biases and affine maps of norms do not count, unless there is nothing else.
    """
    made = [part for part in group.produced if part.name in parameters]
    weights = [part for part in made if parameters[part.name].ndim > 1] or made
    total = torch.zeros(group.units)
    for part in weights:
        total += part.rows(parameters[part.name].detach()).abs().float().mean(1).cpu()
    return total


def search(
    layers: Sequence[Layer],
    budgets: Sequence[Budget],
    evaluate: Oracle,
    compute: Callable[[Mapping[str, int]], float],
    config: PagcpConfig | None = None,
    *,
    verify: Oracle | None = None,
    progress: Callable[[str], None] | None = None,
) -> Decision:
    """One round: which units go, so that no metric leaves its budget.

    Args:
        layers: The groups.
        budgets: One a metric.
        evaluate: The metrics with some units zeroed; called up to ``len(layers) / step`` times, so possibly on a part
            of the validation data.
        compute: Cost of the network with some units of some groups cut, beside those cut already, such as a
            :class:`~lightning_efficient.structured.cost.Cost`.
        config: How to search.
        verify: The same on all validation data, for the baseline and the end; None: ``evaluate``.
        progress: Called with the name of the layer before each trial.

    Returns:
        The decision; every budget is kept by it as ``verify`` measures, if need be by dropping nothing.

    Raises:
        ValueError: There are no layers, or the baseline of a metric is not finite.
    """
    config = config or PagcpConfig()
    if not layers:
        raise ValueError("there is no layer to prune.")
    found = _Search(budgets, evaluate, compute, progress or (lambda name: None))
    final = verify or evaluate
    baseline = found.measure(final, {})
    small = baseline if verify is None else found.measure(evaluate, {})
    rows = found.greedy(_ordered(layers, compute, config.first), small, config)
    chosen = _best(rows, config.topk)
    given_back: list[str] = []
    values = baseline
    while chosen:
        values = found.measure(final, {row.name: row.dropped for row in chosen})
        if all(budget.within(values[budget.metric], baseline[budget.metric]) for budget in budgets):
            break
        given_back.append(chosen.pop().name)
        values = baseline
    names = {row.name for row in chosen}
    rows = [replace(row, chosen=row.name in names) for row in rows]
    whole = compute({})
    left = compute({row.name: len(row.dropped) for row in chosen})
    return Decision(
        tuple(rows), baseline, values, (whole - left) / whole if whole else 0.0, tuple(given_back), found.evaluations
    )


def _ordered(layers: Sequence[Layer], compute: Callable[[Mapping[str, int]], float], first: float) -> list[Layer]:
    """By the compute that a fixed share of their units would save."""
    whole = compute({})
    saved = [whole - compute({layer.name: max(int(_PROBE * layer.left), 1)}) for layer in layers]
    order = sorted(range(len(layers)), key=lambda i: -saved[i] if first >= 1 else saved[i])
    return [layers[i] for i in order]


def _best(rows: Sequence[Row], topk: float) -> list[Row]:
    """The layers to keep pruned, the cheapest first."""
    some = [row for row in rows if row.dropped]
    some.sort(key=lambda row: row.spent / max(row.saved, 1e-12))
    return some[: max(int(topk * len(some) + 1e-9), 1)]


class _Search:
    """The state of a round: what has been dropped, and how far each metric has come."""

    def __init__(
        self,
        budgets: Sequence[Budget],
        evaluate: Oracle,
        compute: Callable[[Mapping[str, int]], float],
        progress: Callable[[str], None],
    ) -> None:
        self.budgets, self.evaluate, self.compute, self.progress = budgets, evaluate, compute, progress
        self.evaluations = 0

    def measure(self, oracle: Oracle, dropped: Dropped) -> dict[str, float]:
        self.evaluations += 1
        values = oracle(dropped)
        out = {budget.metric: float(values[budget.metric]) for budget in self.budgets}
        if not dropped and (bad := {name: value for name, value in out.items() if not math.isfinite(value)}):
            raise ValueError(f"a budget is a share of the metric now, but {bad}: has training diverged?")
        return out

    def greedy(self, layers: Sequence[Layer], baseline: Mapping[str, float], config: PagcpConfig) -> list[Row]:
        shares = {b.metric: tolerances(b.share, len(layers), config.first) for b in self.budgets}
        dropped: dict[str, tuple[int, ...]] = {}
        # The worst that each metric has been: what a layer improves does not pay for another.
        level = {budget.metric: 1.0 for budget in self.budgets}
        before, values = dict(level), dict(baseline)
        rows: list[Row] = []
        whole = self.compute({})
        for i, layer in enumerate(layers):
            limit = {name: level[name] * (1.0 + shares[name][i]) for name in level}
            best: tuple[int, ...] = ()
            trials, after = 0, before
            for count in layer.counts(config.step, config.most):
                self.progress(layer.name)
                trials += 1
                units = layer.lowest(count)
                tried = self.measure(self.evaluate, {**dropped, layer.name: units})
                cost = {b.metric: b.cost(tried[b.metric], baseline[b.metric]) for b in self.budgets}
                if any(cost[name] > limit[name] for name in cost):
                    break
                best, values, after = units, tried, cost
            spent = max((after[b.metric] - before[b.metric]) / b.share for b in self.budgets)
            saved = (whole - self.compute({layer.name: len(best)})) / whole if best and whole else 0.0
            tolerance = {name: shares[name][i] for name in level}
            rows.append(Row(layer.name, layer.left, best, tolerance, dict(values), spent, saved, trials))
            before = after
            level = {name: max(level[name], after[name]) for name in level}
            if best:
                dropped[layer.name] = best
        return rows


def spending(decision: Decision, budgets: Sequence[Budget]) -> dict[str, float]:
    """Metric → share of its budget that a decision uses; negative where it became better.

    Args:
        decision: The decision.
        budgets: Those it was made under.
    """
    return {b.metric: (b.cost(decision.values[b.metric], decision.baseline[b.metric]) - 1.0) / b.share for b in budgets}


def table(decision: Decision, budgets: Sequence[Budget]) -> str:
    """What was decided, for people: layers in the order of the search, then every budget in words.

    Args:
        decision: The decision.
        budgets: Those it was made under.
    """
    width = max([len(row.name) for row in decision.rows] + [5])
    lines = [f"  {'layer':{width}}  kept/units  budget spent  compute saved"]
    for row in decision.rows:
        left = row.units - (len(row.dropped) if row.chosen else 0)
        fate = "" if row.chosen else "  given back" if row.name in decision.given_back else ""
        fate = fate or ("" if row.chosen else "  not chosen" if row.dropped else "  nothing fits")
        spent, saved = (f"{row.spent:.1%}", f"{row.saved:.1%}") if row.dropped else ("-", "-")
        lines.append(f"  {row.name:{width}}  {f'{left}/{row.units}':>10}  {spent:>12}  {saved:>13}{fate}")
    lines.append(f"  {decision.saved:.1%} of the compute goes, after {decision.evaluations} evaluations.")
    for budget in budgets:
        before, after = decision.baseline[budget.metric], decision.values[budget.metric]
        worse = budget.cost(after, before) - 1.0
        kept = "kept" if budget.within(after, before) else "NOT kept"
        how = f"{worse:.2%} worse" if worse >= 0 else f"{-worse:.2%} better"
        values = f"{before:.5g} before, {after:.5g} after"
        lines.append(f"  Budget of {budget.metric} {kept}: {values}, {how}; {budget.share:.2%} allowed.")
    return "\n".join(lines)

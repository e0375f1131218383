"""HESSO: units that are redundant shrink to nothing in small steps while the rest of the network trains on.

Pure functions of the optimizer step and plain data. A run has a warm-up, then ``periods`` equal periods, then trains
what is left. At the start of period ``p`` the units with the lowest saliency are chosen, so that ``(p + 1) / periods``
of the target is gone in its end; after each of its ``D`` steps they are multiplied by ``(D - t - 1) / (D - t)``,
``t = 0 … D - 1``. The product after ``k`` steps is ``(D - k) / D``: a straight line to exactly zero.

Source: Chen et al. 2024, arXiv 2409.09085. From the paper's description, without the published code's defects: units
are chosen by saliency, not by position among the candidates; every period counts what is gone already, so that the
target is met; and the first period shrinks as often as the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_efficient.common.schedule import check_spans, transition_steps
from lightning_efficient.common.schema import Int, MapOf, Record, TensorOf, Text
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.saliency import check_weights

KEPT, SHRINKING, PRUNED = 0, 1, 2
Unit = Literal["groups", "params", "macs"]


PERIODS = 10  # of the published code


@dataclass(frozen=True)
class HessoConfig:
    """What to prune, and when.

    Args:
        target: Share that is gone in the end, in (0, 1).
        unit: Of what: ``"groups"`` (units, all the same), ``"params"`` or ``"macs"`` of the whole network.
        start: When the first units are chosen: steps (int) or fraction of the run (float).
        duration: How long it takes until the last are gone, likewise.
        periods: In how many portions; None: 10, or as many as ``duration`` has steps.
        group_divisible: As many units as a multiple of this stay in every group that loses any.
        saliency: Criterion → weight, see :mod:`lightning_efficient.structured.saliency`; None: 0.2 each.
        uniform: Groups of as many units, heads or others, lose as many, so that equal widths stay equal.
        published: As the published code chooses and shrinks, see :mod:`lightning_efficient.structured.published`.
    """

    target: float = 0.5
    unit: Unit = "groups"
    start: int | float = 0.1
    duration: int | float = 0.2
    periods: int | None = None
    group_divisible: int = 1
    saliency: Mapping[str, float] | None = None
    uniform: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.target, (int, float)) and not isinstance(self.target, bool)
        if not number or not 0 < self.target < 1:
            raise ValueError(
                f"`target` is the share to prune, a number in (0, 1) such as 0.5; got {self.target!r}. At 1 nothing "
                "would be left to train."
            )
        if self.unit not in get_args(Unit):
            raise ValueError(f"`unit` must be one of {get_args(Unit)}; got {self.unit!r}.")
        for name in ("periods", "group_divisible"):
            value = getattr(self, name)
            if value is None and name == "periods":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number from 1; got {value!r}.")
        check_spans(start=self.start, duration=self.duration)
        check_weights(self.saliency)
        if self.published and (self.unit != "groups" or self.uniform):
            raise ValueError(
                f"`published=True` counts units, each layer by itself; got `unit`={self.unit!r}, "
                f"`uniform`={self.uniform}. Leave one of them out."
            )

    def plan(self, total: int | None) -> Plan:
        """The schedule in a run of ``total`` steps; None: its length is unknown.

        Raises:
            ValueError: It does not fit into the run, or a period would have no step.
        """
        if total == 0:
            return Plan(0, 1, 1)
        first, span = transition_steps(total, hold=self.start, length=self.duration, names=("start", "duration"))
        if self.periods is None:
            return Plan(first, span, max(min(PERIODS, span), 1), self.published)
        if span < self.periods:
            raise ValueError(
                f"{self.periods} `periods` need at least one step each, but `duration`={self.duration!r} is {span} "
                f"step(s) of the run's {total}. Train longer, lower `periods`, or raise `duration`."
            )
        return Plan(first, span, self.periods, self.published)


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps.

    Args:
        first: Steps done when the first units are chosen.
        span: Steps until the last are gone.
        periods: Portions.
        published: Periods of equal length, each with a shrinking step less than it has steps.
    """

    first: int
    span: int
    periods: int
    published: bool = False

    def begin(self, period: int) -> int:
        """Steps done when a period begins; ``begin(periods)`` is the end of the last."""
        if self.published:
            return self.first + period * (self.span // self.periods)
        return self.first + period * self.span // self.periods

    def end(self, period: int) -> int:
        """Steps done when the units of a period are zero."""
        begin, end = self.begin(period), self.begin(period + 1)
        return max(end - 1, begin + 1) if self.published else end

    def period(self, step: int) -> int:
        """The period to which the step after ``step`` steps belongs: -1 in the warm-up, ``periods`` after the last."""
        if step < self.first:
            return -1
        if self.published:
            return min((step - self.first) // (self.span // self.periods), self.periods)
        return min(((step - self.first + 1) * self.periods - 1) // self.span, self.periods)

    def due(self, step: int, chosen: int) -> int | None:
        """The period whose units are to be chosen in the step after ``step`` steps, if any.

        Args:
            step: Steps done.
            chosen: Periods whose units have been chosen.
        """
        period = min(self.period(step), self.periods - 1)
        return period if period >= chosen else None


def shrink_factor(begin: int, end: int, before: int, after: int) -> float:
    """What redundant units are multiplied by.

    Args:
        begin: Steps done at the beginning of the period.
        end: At its end.
        before: Steps done when they were last shrunk, or chosen.
        after: Steps done now; one more unless steps were skipped.

    Returns:
        ``(end - after) / (end - before)``; exactly 0 at the end of the period and later.
    """
    before = min(max(before, begin), end - 1)
    return (end - min(max(after, before), end)) / (end - before)


HESSO_STATE = Record(
    {"status": MapOf(Text(), TensorOf(torch.int8, ndim=1, low=0)), "chosen": Int(low=0), "shrunk": Int(low=0)}
)


@dataclass(eq=False)
class HessoState:
    """Where a run stands.

    Args:
        status: Group → int8, ``(units,)``: ``KEPT``, ``SHRINKING`` or ``PRUNED``.
        chosen: Periods whose units have been chosen.
        shrunk: Steps done when the shrinking units were last shrunk.
    """

    status: dict[str, Tensor] = field(default_factory=dict)
    chosen: int = 0
    shrunk: int = 0

    @classmethod
    def of(cls, groups: Groups, gone: Mapping[str, Tensor] | None = None) -> HessoState:
        """Nothing chosen yet.

        Args:
            groups: Of the model.
            gone: Group → bool, ``(units,)``: pruned by an earlier run. None: nothing was.
        """
        state = {name: torch.zeros(group.units, dtype=torch.int8) for name, group in groups.found.items()}
        return cls({name: s.masked_fill((gone or {}).get(name, s).bool(), PRUNED) for name, s in state.items()})

    def marked(self, *statuses: int) -> dict[str, Tensor]:
        """Group → bool, ``(units,)``: units of one of these statuses."""
        wanted = torch.tensor(statuses, dtype=torch.int8)
        return {name: torch.isin(status, wanted) for name, status in self.status.items()}

    def lost(self) -> dict[str, int]:
        """Group → units that are gone or going."""
        return {name: int((status != KEPT).sum()) for name, status in self.status.items()}

    def kept(self) -> dict[str, list[int]]:
        """Group → the units that stay, of groups that have lost any: what physical removal needs to know."""
        stays = {name: (status == KEPT).nonzero().flatten().tolist() for name, status in self.status.items()}
        return {name: units for name, units in stays.items() if len(units) < len(self.status[name])}

    def choose(self, units: Mapping[str, Tensor], period: int, step: int) -> None:
        """Let the shrinking of a period begin.

        Args:
            units: Group → bool, ``(units,)``: those that are redundant.
            period: Of the plan.
            step: Steps done.
        """
        for name, redundant in units.items():
            self.status[name] = self.status[name].masked_fill(redundant.cpu(), SHRINKING)
        self.chosen, self.shrunk = period + 1, step

    def commit(self) -> None:
        """What was shrinking is gone."""
        self._turn(SHRINKING, PRUNED)

    def release(self) -> None:
        """What was shrinking may stay: the run that it belonged to ended half way."""
        self._turn(SHRINKING, KEPT)

    def _turn(self, old: int, new: int) -> None:
        self.status = {name: s.masked_fill(s == old, new) for name, s in self.status.items()}

    def as_plain(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"status": dict(self.status), "chosen": self.chosen, "shrunk": self.shrunk}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> HessoState:
        """The inverse of :meth:`as_plain`."""
        status = {str(name): value.clone() for name, value in plain["status"].items()}
        return cls(status, int(plain["chosen"]), int(plain["shrunk"]))


class Pruner:
    """Chooses units: how many, and which.

    Args:
        groups: All units that compete.
        unit: Of the target.
        group_divisible: As in :class:`HessoConfig`.
        cost: Of the network, for ``"params"`` and ``"macs"``.
        uniform: As in :class:`HessoConfig`.
    """

    def __init__(
        self,
        groups: Groups,
        unit: str = "groups",
        group_divisible: int = 1,
        cost: Cost | None = None,
        uniform: bool = False,
    ) -> None:
        self.groups, self.unit, self.uniform = groups, unit, uniform
        self.divisors = {name: math.lcm(g.divisor, group_divisible) for name, g in groups.found.items()}
        self.total = sum(group.units for group in groups.found.values())
        self._cost = cost

    def removed(self, lost: Mapping[str, int]) -> float:
        """The share that is gone if so many units of each group are."""
        if self._cost is None:
            return sum(lost.values()) / max(self.total, 1)
        return 1.0 - self._cost(lost) / self._cost()

    def reached(self, lost: Mapping[str, int], share: float) -> bool:
        """Whether at least a share is gone; of units, rounded down to whole ones."""
        if self._cost is None:
            return sum(lost.values()) >= int(share * self.total + 1e-9)
        return self.removed(lost) >= share - 1e-9

    def fewest(self, lost: Mapping[str, int], share: float) -> bool:
        """Whether a share is gone if so many units of each group are, and would not be with some portion less."""
        if not self.reached(lost, share):
            return False
        teams = [team for team in self._teams(lost) if lost[team[0].name]]
        less = ({**lost, **{g.name: lost[g.name] - self._last(g, lost[g.name]) for g in team}} for team in teams)
        return not teams or not all(self.reached(fewer, share) for fewer in less)

    def _teams(self, lost: Mapping[str, int]) -> list[list[UnitGroup]]:
        """Groups that lose as many units as each other."""
        teams: dict[Any, list[UnitGroup]] = {}
        for name, group in self.groups.found.items():
            alike = (group.units, group.heads, self.divisors[name], lost[name]) if self.uniform else name
            teams.setdefault(alike, []).append(group)
        return list(teams.values())

    def _last(self, group: UnitGroup, lost: int) -> int:
        """How large the last portion of a group was."""
        sizes, gone = self.steps(group, group.units), 0
        return next((size for size in sizes if (gone := gone + size) >= lost), lost)

    def steps(self, group: UnitGroup, left: int) -> list[int]:
        """How many units of a group can go, and then how many more: its survivors stay a multiple of its divisor."""
        divisor = self.divisors[group.name]
        if left <= divisor:
            return []
        first = left % divisor or divisor
        return [first] + [divisor] * ((left - first) // divisor - 1)

    def check(self, target: float) -> None:
        """Refuse a target that cannot be reached.

        Raises:
            ValueError: There are no units, or too few may go.
        """
        if not self.groups.found:
            raise ValueError(f"there is nothing to prune. {self.groups.report()}")
        most = {name: sum(self.steps(group, group.units)) for name, group in self.groups.found.items()}
        if not self.reached(most, target):
            held = [name for name, count in most.items() if count == 0]
            note = f" {held[:3]} may lose none: they have no more units than their divisor." if held else ""
            raise ValueError(
                f"`target`={target} of the {self.unit} cannot be reached: with one unit (or a multiple of the divisor) "
                f"kept in each of {len(most)} groups, at most {self.removed(most):.4g} can go.{note} Lower `target` or "
                "`group_divisible`, or cover more groups (`include`, `exclude`)."
            )

    def choose(self, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """The fewest units with the lowest scores, so that ``share`` is gone together with those gone before.

        Units of a group go in portions of its divisor, a portion counting with the mean of its scores. With divisors of
        1 those are exactly the units with the lowest scores, but for the last unit of each group, which always stays.
        Where widths stay equal, a portion is one of each of their groups.

        Args:
            scores: Group → ``(units,)``.
            gone: Group → bool, ``(units,)``.
            share: Of the target, all in all.

        Returns:
            Group → bool, ``(units,)``: the units that go beside those gone.
        """
        lost = {name: int(where.sum()) for name, where in gone.items()}
        ranked = {name: scores[name].masked_fill(where, math.inf).argsort(stable=True) for name, where in gone.items()}
        means, owners, sizes, teams = [], [], [], self._teams(lost)
        for number, team in enumerate(teams):
            portions = self.steps(team[0], team[0].units - lost[team[0].name])
            if portions:
                each = [_means(scores[group.name][ranked[group.name]].double(), portions) for group in team]
                means.append(torch.stack(each).mean(0))
                owners.append(torch.full((len(portions),), number))
                sizes.append(torch.tensor(portions))
        taken = lost
        if means:
            taken = self._fewest(torch.cat(means), torch.cat(owners), torch.cat(sizes), teams, lost, share)
        redundant = {}
        for name, where in gone.items():
            redundant[name] = torch.zeros_like(where)
            redundant[name][ranked[name][: taken[name] - lost[name]]] = True
        return redundant

    def _fewest(
        self,
        means: Tensor,
        owners: Tensor,
        sizes: Tensor,
        teams: list[list[UnitGroup]],
        lost: Mapping[str, int],
        share: float,
    ) -> dict[str, int]:
        """Units lost by each group after the fewest portions, in the order of their means, that reach the share."""
        order = means.argsort(stable=True)

        def after(count: int) -> dict[str, int]:
            chosen = order[:count]
            more = torch.zeros(len(teams), dtype=torch.long).index_add_(0, owners[chosen], sizes[chosen]).tolist()
            return {g.name: lost[g.name] + extra for team, extra in zip(teams, more, strict=True) for g in team}

        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reached(after(middle), share) else (middle + 1, high)
        return after(low)


def _means(ranked: Tensor, portions: list[int]) -> Tensor:
    """The mean score of each portion, the first of its own size and the rest of one size."""
    first, rest = portions[0], portions[1:]
    width = rest[0] if rest else 1
    means = torch.cat([ranked[:first].mean()[None], ranked[first : first + width * len(rest)].view(-1, width).mean(1)])
    return means.cummax(0).values  # rounding must not turn two portions of a group around

"""CRIC: try out what looks redundant before it is cut, and go back.

A saliency that is taken once may be wrong about units that matter. Corrective Redundancy Identification Cycles shrink
the units that look redundant to zero while the network trains, watch which other units come to look redundant
meanwhile, put the weights back, and try those in the next cycle, until no new ones turn up. All saliencies seen on the
way vote: the units whose mean is lowest are cut. Before the cycles, each group is probed once: its least salient
quarter, half and three quarters are zeroed and the loss compared with that of the whole network.

Plain data and pure functions; :mod:`lightning_efficient.callbacks.hesso_pruning` says when.

Source: Chen et al. 2024, arXiv 2409.09085. The published code spends two training steps a probe and compares losses of
different batches; here a probe is a forward more on the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.common.schema import Int, MapOf, Number, Record, TensorOf, Text

PROBES = (0.25, 0.5, 0.75)

Marks = dict[str, Tensor]


@dataclass(frozen=True)
class CricPlan:
    """When cycles happen, in optimizer steps: one step to look, then cycles, then the shrinking of what was chosen.

    Args:
        first: Steps done at the first look.
        span: Steps until everything chosen is gone, at most.
        cycles: At most.
    """

    first: int
    span: int
    cycles: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(
                f"cric=True needs {self.cycles + 2} steps for {self.cycles} cycles (`periods`), and `duration` is "
                f"{self.span}. Train longer, lower `periods`, or raise `duration`."
            )

    @property
    def length(self) -> int:
        """Steps of a cycle, and of the shrinking at the end."""
        return (self.span - 1) // (self.cycles + 1)

    def begin(self, cycle: int) -> int:
        """Steps done when a cycle begins, counted from 1; ``begin(cycles + 1)`` is the latest end."""
        return self.first + 1 + (cycle - 1) * self.length


_MARKS = MapOf(Text(), TensorOf(torch.bool, ndim=1))
CRIC_STATE = Record(
    {
        "cycle": Int(low=0), "active": _MARKS, "trial": _MARKS, "history": _MARKS, "samples": Int(low=0),
        "scores": MapOf(Text(), TensorOf("floating", ndim=1, finite=True)),
        "probes": MapOf(Text(), Number(finite=False)),
    }
)  # fmt: skip


@dataclass(eq=False)
class CricState:
    """Where the cycles stand.

    Args:
        cycle: Cycles begun; 0 before the first.
        active: Group → bool, ``(units,)``: units that shrink in this cycle.
        trial: Units that came to look redundant in this cycle, and were never active.
        history: Units that were active in any cycle.
        scores: Group → sum of all saliencies seen.
        samples: How many those are.
        probes: Group → mean ratio of the loss without a part of its units to that of the whole network.
    """

    cycle: int = 0
    active: Marks = field(default_factory=dict)
    trial: Marks = field(default_factory=dict)
    history: Marks = field(default_factory=dict)
    scores: Marks = field(default_factory=dict)
    samples: int = 0
    probes: dict[str, float] = field(default_factory=dict)

    def observe(self, scores: Mapping[str, Tensor], lowest: Mapping[str, Tensor]) -> None:
        """Take one step's saliencies into account.

        Args:
            scores: Group → ``(units,)``.
            lowest: Group → bool: as many units with the lowest of them as the target asks for.
        """
        for name, values in scores.items():
            wide = values.double()
            self.scores[name] = self.scores[name] + wide if name in self.scores else wide.clone()
            none = torch.zeros_like(lowest[name])
            known = self.active.get(name, none) | self.history.get(name, none)
            self.trial[name] = self.trial.get(name, none) | (lowest[name] & ~known)
        self.samples += 1

    def begin(self) -> None:
        """Begin a cycle: what has turned up in the last one is active, and nothing has turned up yet."""
        self.cycle += 1
        self.active = self.trial
        self.history = {n: where | self.history.get(n, torch.zeros_like(where)) for n, where in self.active.items()}
        self.trial = {name: torch.zeros_like(where) for name, where in self.active.items()}

    def over(self, cycles: int, tolerance: int = 0) -> bool:
        """Whether the cycle that ended was the last.

        Args:
            cycles: At most.
            tolerance: So many units may turn up without another cycle.
        """
        found = sum(int(where.sum()) for where in self.trial.values())
        return self.cycle >= cycles or (self.cycle >= 1 and found <= tolerance)

    def verdict(self, weight: float = 1.0) -> dict[str, Tensor]:
        """The scores that decide: mean saliency, plus ``weight`` times the mean loss ratio a unit of the group.

        Args:
            weight: Of the probes.
        """
        final = {}
        for name, total in self.scores.items():
            final[name] = total / self.samples + weight * self.probes.get(name, 0.0) / len(total)
        return final

    def as_plain(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> CricState:
        """The inverse of :meth:`as_plain`."""
        copied: dict[str, Any] = {n: dict(v) if isinstance(v, Mapping) else v for n, v in plain.items()}
        return cls(**copied)


def probe_units(scores: Tensor, share: float) -> list[int]:
    """The units of a group that a probe zeroes: the least salient, at least one and not all.

    Args:
        scores: ``(units,)``.
        share: Of the units.
    """
    count = min(max(int(share * len(scores)), 1), len(scores) - 1)
    return scores.argsort(stable=True)[:count].tolist()

"""How much of which weights goes when: what a callback and a loop of one's own ask alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_efficient.common.match import Globs, NoMatchError, modules_by_name, references
from lightning_efficient.common.schedule import Schedule, check_amount, check_spans, transition_steps
from lightning_efficient.pruning import criteria
from lightning_efficient.pruning.granularity import Granularity
from lightning_efficient.pruning.selection import check_scope, count_of, make_masks
from lightning_efficient.pruning.targets import PrunableWeight
from lightning_efficient.weightspace import Site
from lightning_efficient.weightspace.layout import Layout


@dataclass(frozen=True)
class GradualPruning:
    """The arguments of :class:`~lightning_efficient.MagnitudePruning` that say what to prune, and when.

    Raises:
        ValueError: An argument is out of range.
    """

    amount: float = 0.5
    schedule: Schedule = field(default_factory=Schedule)
    criterion: str = "magnitude"
    scope: str = "global"
    granularity: str = "element"
    rewind: Literal["weights", "learning_rate", "none"] = "weights"
    rewind_to: int | float = 0
    amounts: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_spans(rewind_to=self.rewind_to)
        cut = Granularity.parse(self.granularity)
        check_scope(self.scope, cut)
        for name, value, allowed in (
            ("criterion", self.criterion, criteria.CRITERIA),
            ("rewind", self.rewind, ("weights", "learning_rate", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}; got {value!r}.")
        of_globs = {f"amounts[{glob!r}]": amount for glob, amount in (self.amounts or {}).items()}
        for name, amount in {"amount": self.amount, **of_globs}.items():
            check_amount(amount, name)
            if cut.kind == "n:m" and count_of(amount, cut.second) != cut.second - cut.first:
                raise ValueError(
                    f"granularity={self.granularity!r} prunes {1 - cut.first / cut.second:g} of a weight; got {name}="
                    f"{amount!r}. Give that amount."
                )

    @property
    def returns(self) -> bool:
        """Whether the schedule goes back to an earlier step."""
        return self.schedule.kind == "iterative" and self.rewind != "none"

    def resolve(self, total: int | None) -> tuple[int, int, int, int]:
        """``(first, span, every, rewind_to)`` in steps; nothing in a run of no steps.

        Args:
            total: Optimizer steps of the run; None: unknown.

        Raises:
            ValueError: The schedule does not fit into the run.
        """
        if total == 0:
            return 0, 0, 1, 0
        first, span, every = self.schedule.steps(total)
        if not self.returns:
            return first, span, every, 0
        back, _ = transition_steps(total, hold=self.rewind_to, length=0, names=("rewind_to", None))
        if back >= first:
            raise ValueError(
                f"`rewind_to`={self.rewind_to!r} is step {back}, but the first pruning is at step {first} already. "
                "Go back to an earlier step."
            )
        return first, span, every, back

    def read_amounts(self, model: nn.Module, targets: Mapping[str, PrunableWeight], who: str) -> Globs:
        """``amounts``, read against a model.

        Args:
            model: The model.
            targets: The weights in it that are pruned.
            who: For messages.

        Raises:
            NoMatchError: A glob covers none of the weights.
            ValueError: Others before it cover all that it does.
        """
        names = list(self.amounts or {})
        globs = Globs("amounts", names, modules_by_name(model), who, aside=references(model))
        hits = [globs.hits(target.layer) for target in targets.values()]
        for glob in names:
            before = [found[0] for found in hits if glob in found]
            if not before:
                layers = [target.layer for target in targets.values()]
                raise NoMatchError(
                    f"{who}: `amounts` {glob!r} covers no weight that is pruned; these are {layers[:8]}."
                )
            if glob not in before:
                raise ValueError(
                    f"{who}: `amounts` {glob!r} has no effect, as {before[0]!r} before it covers the same modules, "
                    "and the first one counts. Put it first."
                )
        return globs

    def groups(self, globs: Globs, targets: Mapping[str, PrunableWeight]) -> dict[str, tuple[float, list[str]]]:
        """Pattern of ``amounts`` → its amount and weights; the rest stands under the empty pattern.

        Args:
            globs: ``amounts``, read against the model.
            targets: The weights.
        """
        groups: dict[str, tuple[float, list[str]]] = {}
        for name, target in targets.items():
            glob = next(iter(globs.hits(target.layer)), "")
            amount = self.amount if not glob else (self.amounts or {})[glob]
            groups.setdefault(glob, (amount, []))[1].append(name)
        return groups

    def due(
        self,
        step: int,
        steps: tuple[int, ...],
        groups: Mapping[str, tuple[float, list[str]]],
        applied: Mapping[str, float],
    ) -> dict[str, float]:
        """Pattern → share to be pruned now, where it has grown.

        Args:
            step: Optimizer steps done.
            steps: From :meth:`resolve`; empty: not known yet.
            groups: From :meth:`groups`.
            applied: Pattern → share that was pruned before.
        """
        if not steps or step < 0:
            return {}
        first, span, every, _ = steps
        shares = {glob: self.schedule.share(step, (first, span, every), amount) for glob, (amount, _) in groups.items()}
        return {glob: share for glob, share in shares.items() if share > applied.get(glob, 0.0)}

    def score(self, name: str, site: Site) -> Tensor:
        """Of a weight, where it alone decides (``magnitude``, ``random``)."""
        if self.criterion == "random":
            return site.layout.part(criteria.random(site.param, self.seed + zlib.crc32(name.encode())))
        return criteria.magnitude(site.weight)

    def masks(
        self,
        due: Mapping[str, float],
        groups: Mapping[str, tuple[float, list[str]]],
        targets: Mapping[str, PrunableWeight],
        scores: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        layouts: Mapping[str, Layout] | None = None,
    ) -> dict[str, Tensor]:
        """Name → mask, in the weight's own layout, of the weights that lose something now.

        Args:
            due: From :meth:`due`.
            groups: From :meth:`groups`.
            targets: The weights.
            scores: Name → score of each entry, as the weight is stored.
            kept: Name → present mask, likewise.
            layouts: How weights are cut over processes, where they are.
        """
        masks: dict[str, Tensor] = {}
        for glob, share in due.items():
            some = {name: targets[name] for name in groups[glob][1]}
            chosen = make_masks(
                {name: target.canonical(scores[name]) for name, target in some.items()},
                share,
                granularity=self.granularity,
                scope=self.scope,
                kept={name: target.canonical(kept[name]) for name, target in some.items()},
                heads={name: target.heads for name, target in some.items() if target.heads},
                layouts=None if layouts is None else {name: layouts[name] for name in some},
            )
            masks |= {name: target.canonical(chosen[name]) for name, target in some.items()}
        return masks

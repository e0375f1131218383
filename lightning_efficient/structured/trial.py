"""Trying groups of units: does zeroing them equal cutting them out, whichever of them go?

One subset proves little: half of the channels of two heads may happen to be as many of each. Every group is tried with
an unbalanced subset, all units but one, one alone, the first ones and the last ones; counts are odd and have no divisor
in common with the number of units where that is possible. All groups are tried together, each with another kind of
subset at a time, and in halves where that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.comparing import largest_gap
from lightning_efficient.common.match import modules_by_name
from lightning_efficient.common.nests import outputs_in
from lightning_efficient.common.running import forget
from lightning_efficient.structured.cuts import tensors_by_name
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.slim import plan_slim, replay_slim
from lightning_efficient.structured.widths import Width

KINDS = ("unbalanced", "all but one", "one alone", "the first", "the last")
_DIVISORS = (2, 4, 8, 16, 32)


class Trial:
    """A copy of a model on which units are zeroed and cut, and which is put back each time.

    Args:
        model: The copy, its weights perturbed so that none is zero.
        run: Runs it.
        tolerance: Of the difference relative to the outputs. In float64 rounding leaves 1e-13, an activation or a norm
            that is not invariant 1e-3 and more.
        training: Runs it in training mode; None: it does not.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Any],
        tolerance: float = 1e-9,
        training: Callable[[], Any] | None = None,
    ) -> None:
        self.model, self.run, self.tolerance, self.training = model, run, tolerance, training
        self._random = torch.Generator().manual_seed(0)
        self._modules = modules_by_name(model)

    def judge(self, widths: Sequence[Width], refused: dict[str, str]) -> list[UnitGroup]:
        """The groups that stand the trial, those among them that are not exact marked.

        Args:
            widths: Tried together first, and in halves where that fails; those over which a norm was seen to go apart
                from the others, as most of them do fail.
            refused: Gets the reasons for the others.
        """
        parts = [[width for width in widths if bool(width.mixed) == mixed] for mixed in (False, True)]
        tried = [batch for part in parts for batch in self._halves(part, refused)]
        tried += self._coupled([width for width in widths if width.group.name in refused], refused)
        found = [group for batch in tried for group in batch]
        if sum(any(group.exact for group in batch) for batch in tried) > 1:  # they were tried apart
            together = self._together([group for group in found if group.exact], refused)
            found = [group for group in found if not group.exact or any(group is one for one in together)]
        return self._trained(found, refused)

    def _halves(self, widths: list[Width], refused: dict[str, str]) -> list[list[UnitGroup]]:
        """Groups that stand the trial, those that did it together in one list."""
        if not widths:
            return []
        failed = self._fails([width.versions()[0] for width in widths])
        if failed is None:
            return [[width.versions()[0] for width in widths]]
        if len(widths) > 1:
            middle = len(widths) // 2
            return [*self._halves(widths[:middle], refused), *self._halves(widths[middle:], refused)]
        group = self._alone(widths[0], failed, refused)
        return [] if group is None else [[group]]

    def _coupled(self, widths: Sequence[Width], refused: dict[str, str]) -> list[list[UnitGroup]]:
        """Groups of which none stands the trial alone, but all together do: a constant of as many heads joins them."""
        alike: dict[Any, list[UnitGroup]] = {}
        for width in widths:
            alike.setdefault((width.group.units, width.heads), []).append(width.versions()[0])
        found = []
        for groups in alike.values():
            slices = [part for group in groups for part in group.slices]
            if len(groups) < 2 or len({(part.name, part.dim) for part in slices}) < len(slices):
                continue
            counts = {name: dict(steps) for group in groups for name, steps in group.counts.items()}
            divisor = math.lcm(*(group.divisor for group in groups))
            joined = replace(groups[0], slices=tuple(slices), counts=counts, divisor=divisor)
            if self._fails([joined]) is None:
                found.append([joined])
                for group in groups:
                    refused.pop(group.name, None)
        return found

    def _fails(self, groups: Sequence[UnitGroup]) -> tuple[int, str] | None:
        """The first kind of subset that zeroing and cutting disagree on, with the error if it does not even run."""
        for kind in range(len(KINDS)):
            keep = {g.name: self._subset(g, kind + i) for i, g in enumerate(groups)}
            known = Groups({g.name: g for g in groups})
            try:
                gap = self._gap(known, keep)
            except Exception as raised:  # whatever a forward raises when its tensors do not fit
                return kind, _said(raised)
            if not gap <= self.tolerance:
                return kind, ""
        return None

    def _alone(self, width: Width, failed: tuple[int, str], refused: dict[str, str]) -> UnitGroup | None:
        """One group: with other attributes lowered, a divisor, or as one whose zeros are not gone."""
        versions = width.versions()
        if width.heads:  # keys and values that all heads share do not vanish with one: what reads it has to
            versions += [_read_too(version) for version in versions[:2]]
        running = [] if failed[1] else [versions[0]]
        error = failed[1]
        for group in versions[1:]:
            again = self._fails([group])
            if again is None:
                return group
            if not again[1]:
                running.append(group)
        for group in versions if not running else ():
            for divisor in _DIVISORS:
                if group.units >= 2 * divisor > group.divisor and group.units % divisor == 0:
                    coarse = replace(group, divisor=math.lcm(divisor, group.divisor))
                    again = self._fails([coarse])
                    if again is None:
                        return coarse
                    if not again[1]:
                        running.append(coarse)
                        break
        name = width.group.name
        if error:
            self._outputs(self.run)  # one that fails by itself is an error, not a reason
        if not running:
            refused[name] = f"the model does not run without some of its units ({error})"
        for group in running:
            if why := self._breaks(group):
                refused[name] = f"the model does not run without some of its units ({why})"
            elif why := self._leaks(group):
                refused[name] = why
            elif note := self._note(group, width.mixed):
                refused.pop(name, None)
                return replace(group, exact=False, note=note)
            else:
                refused[name] = (
                    "cutting its units changes what the others compute, though no norm over them was seen: they are "
                    "part of something larger that was not recognised"
                )
        return None

    def _together(self, groups: list[UnitGroup], refused: dict[str, str]) -> list[UnitGroup]:
        """Those that can be cut at once."""
        if not groups or self._fails(groups) is None:
            return groups
        if len(groups) == 1:
            return groups
        middle = len(groups) // 2
        left, right = self._together(groups[:middle], refused), self._together(groups[middle:], refused)
        if self._fails([*left, *right]) is None:
            return [*left, *right]
        for group in right:
            refused[group.name] = f"it cannot be cut at the same time as {left[0].name!r}"
        return left

    def _trained(self, groups: list[UnitGroup], refused: dict[str, str]) -> list[UnitGroup]:
        """Those without which the model runs in training mode, too."""
        if not groups or self.training is None or not (error := self._training_error(groups)):
            return groups
        if len(groups) == 1:
            refused[groups[0].name] = f"the model does not train without some of its units ({error})"
            return []
        middle = len(groups) // 2
        return [*self._trained(groups[:middle], refused), *self._trained(groups[middle:], refused)]

    def _training_error(self, groups: Sequence[UnitGroup]) -> str:
        assert self.training is not None
        keep = {g.name: self._subset(g, 0) for g in groups}
        with self._restored():
            try:
                replay_slim(self.model, plan_slim(self.model, keep, Groups({g.name: g for g in groups})))
                self._outputs(self.training)
            except Exception as raised:  # whatever a forward raises when its tensors do not fit
                return _said(raised)
        return ""

    # -- subsets ---------------------------------------------------------------------------------------------------

    def _subset(self, group: UnitGroup, kind: int) -> list[int]:
        """Units that stay."""
        units, step = group.units, group.divisor
        blocks = units // step
        count = {1: blocks - 1, 2: 1}.get(kind % len(KINDS)) or _coprime(blocks)
        count = min(max(count, 1), max(blocks - 1, 1)) * step
        order = torch.randperm(units, generator=self._random)
        if kind % len(KINDS) == 0:  # three of the first half for one of the second
            first, second = order[order < units // 2], order[order >= units // 2]
            many = min(-(-3 * count // 4), len(first))
            order = torch.cat([first[:many], second, first[many:]])
        elif kind % len(KINDS) in (3, 4):
            order = torch.arange(units) if kind % len(KINDS) == 3 else torch.arange(units).flip(0)
        return order[:count].sort().values.tolist()

    # -- running ---------------------------------------------------------------------------------------------------

    def _gap(self, groups: Groups, keep: Mapping[str, Sequence[int]]) -> float:
        with self._zeroed(groups, keep):
            zeroed = self._outputs(self.run)
        return largest_gap(zeroed, self._cut(groups, keep))

    def _cut(self, groups: Groups, keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """What the model gives without some units."""
        with self._restored():
            replay_slim(self.model, plan_slim(self.model, keep, groups))
            return self._outputs(self.run)

    def _breaks(self, group: UnitGroup) -> str:
        """The error of the first kind of subset without which the model does not run."""
        for kind in range(len(KINDS)):
            try:
                self._cut(Groups({group.name: group}), {group.name: self._subset(group, kind)})
            except Exception as raised:  # whatever a forward raises when its tensors do not fit
                return _said(raised)
        return ""

    @torch.no_grad()
    def _outputs(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = run()
        return {f"output {i}": t.detach().clone() for i, t in enumerate(outputs_in(result))}

    @contextmanager
    def _zeroed(self, groups: Groups, keep: Mapping[str, Sequence[int]], readers: bool = False) -> Iterator[None]:
        """Zeros in the parameters that make some units; with ``readers``, in those that read them, too."""
        parameters = {n: t for n, t in tensors_by_name(self.model).items() if isinstance(t, nn.Parameter)}
        before: list[tuple[Tensor, int, Tensor, Tensor]] = []
        try:
            for name, stay in keep.items():
                group = groups.found[name]
                gone = sorted(set(range(group.units)) - set(stay))
                for part in group.slices if readers else group.produced:
                    if (tensor := parameters.get(part.name)) is not None:
                        entries = part.entries(gone)
                        before.append((tensor.data, part.dim, entries, tensor.data.index_select(part.dim, entries)))
                        tensor.data.index_fill_(part.dim, entries, 0)
            forget(self.model)
            yield
        finally:
            for data, dim, entries, values in reversed(before):
                data.index_copy_(dim, entries, values)
            forget(self.model)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Tensors and attributes come back as they were."""
        tensors = [(t, t.data) for t in {id(t): t for t in tensors_by_name(self.model).values()}.values()]
        attributes = [(m, dict(vars(m))) for m in self.model.modules()]
        try:
            yield
        finally:
            for tensor, data in tensors:
                tensor.data = data
            for module, values in attributes:
                vars(module).update(values)
            forget(self.model)

    # -- reasons ---------------------------------------------------------------------------------------------------

    def _leaks(self, group: UnitGroup) -> str:
        """A reason if zeroed units still carry something that depends on the input: then the trace was wrong."""
        keep = self._subset(group, 0)
        gone = sorted(set(range(group.units)) - set(keep))
        seen: dict[str, Tensor] = {}
        readers = {
            name: part
            for part in group.consumed
            for name in [part.name.rpartition(".")[0]]
            if part.name.endswith("weight") and part.dim == 1 and isinstance(self._modules.get(name), nn.Linear)
        }

        def look(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                seen[name] = inputs[0].detach()

            return hook

        handles = [self._modules[name].register_forward_pre_hook(look(name)) for name in readers]
        try:
            with self._zeroed(Groups({group.name: group}), {group.name: keep}):
                self._outputs(self.run)
        finally:
            for handle in handles:
                handle.remove()
        for name, value in seen.items():
            columns = value.index_select(value.ndim - 1, readers[name].entries(gone)).flatten(0, -2)
            if not float((columns - columns[:1]).abs().max()) <= self.tolerance * float(value.abs().max()):
                return f"its units still reach {name!r} when they are zero, so something else writes into them"
        return ""

    def _note(self, group: UnitGroup, mixed: str) -> str:
        """Why zeros are not gone, if that can be told."""
        for part in group.produced:
            name = part.name.rpartition(".")[0]
            if isinstance(module := self._modules.get(name), (nn.LayerNorm, nn.GroupNorm)):
                return f"{type(module).__name__} {name!r} takes its mean and variance over the width"
        keep = {group.name: self._subset(group, 0)}
        known = Groups({group.name: group})
        with self._zeroed(known, keep, readers=True):
            unread = self._outputs(self.run)
        if largest_gap(unread, self._cut(known, keep)) <= self.tolerance:
            return "an activation with f(0) ≠ 0 lies behind it"
        return f"{mixed!r} takes all of the width together" if mixed else ""


def _read_too(group: UnitGroup) -> UnitGroup:
    """The same units, zeroed where they are read as well as where they are made."""
    return replace(group, slices=tuple(replace(part, role="produce") for part in group.slices))


def _coprime(count: int) -> int:
    """About three fifths of a number, odd, without a divisor in common with it where possible."""
    about = max(round(0.6 * count), 1)
    near = sorted(range(1, count), key=lambda c: abs(c - about))
    return next((c for c in near if c % 2 and math.gcd(c, count) == 1), about)


def _said(error: Exception) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__

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
from lightning_efficient.structured.cases import DIVISORS, KINDS, Case, broken, next_running, sifted, subset
from lightning_efficient.structured.coupled import together
from lightning_efficient.structured.cuts import tensors_by_name
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.slim import plan_slim, replay_slim
from lightning_efficient.structured.widths import Width


class Trial:
    """A copy of a model on which units are zeroed and cut, and which is put back each time.

    Args:
        model: The copy, its weights perturbed so that none is zero.
        run: Runs it.
        tolerance: Of the difference relative to the outputs. In float64 rounding leaves 1e-13, an activation or a norm
            that is not invariant 1e-3 and more.
        training: Runs it in training mode; None: it does not.
        inexact: Groups whose zeros are not gone will be cut as well, so that they have to run at every count.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Any],
        tolerance: float = 1e-9,
        training: Callable[[], Any] | None = None,
        inexact: bool = True,
    ) -> None:
        self.model, self.run, self.tolerance, self.training, self.inexact = model, run, tolerance, training, inexact
        self._modules, self._tensors = modules_by_name(model), tensors_by_name(model)
        self._devices = sorted({t.device.index for t in self._tensors.values() if t.device.type == "cuda"})
        self._latest: tuple[Any, dict[str, Tensor]] = (None, {})  # of the units that were zeroed alone last

    def judge(self, widths: Sequence[Width], refused: dict[str, str]) -> list[UnitGroup]:
        """The groups that stand the trial, those among them that are not exact marked.

        Args:
            widths: Those over which a norm was seen to go are looked at alone first, as most of them fail; the others,
                and what is left of these, are tried together.
            refused: Gets the reasons for the others.
        """
        cases = [Case(width, i) for i, width in enumerate(widths)]
        pool: list[Case] = []
        failed: list[Case] = []
        for case in cases:
            failure = self._disagree([case], 0) if case.width.mixed else None
            if failure == "":  # it runs, and what was seen to go over the width explains the rest
                case.running.append(case.group)
                failed.append(case)
            else:
                (pool if failure is None or self._another(case, 0, failure) else failed).append(case)
        pool, more = self._stand(pool, self._disagree, self._another, refused)
        loose = self._loose(failed + more, refused)
        found = [case.group for case in pool] + together(failed + more, self._modules, self._fails, refused)
        found = self._trained(found + loose, refused) if self.inexact else self._trained(found, refused) + loose
        order = {case.width.group.name: i for i, case in enumerate(cases)}
        return sorted(found, key=lambda group: order[group.name])

    def _stand(
        self,
        pool: list[Case],
        fails: Callable[[Sequence[Case], int], str | None],
        another: Callable[[Case, int, str], bool],
        refused: dict[str, str],
    ) -> tuple[list[Case], list[Case]]:
        """Cases that stand every kind of subset together, and those that are out of ways to do so.

        Args:
            pool: All of them.
            fails: What goes wrong with some of them on a kind of subset; None: nothing.
            another: Gives a case that failed another way to be read, if there is one.
            refused: Gets those that stand it, but not together with others.
        """
        failed: list[Case] = []
        kinds = list(range(len(KINDS)))
        while kinds and pool:
            bad = self._culprits(pool, kinds[0], fails)
            if not bad:
                kinds.pop(0)
            for case, failure, other in bad:
                pool.remove(case)
                if other is not None:
                    refused[case.group.name] = f"it cannot be cut at the same time as {other.group.name!r}"
                elif another(case, kinds[0], failure):
                    pool.append(case)
                    kinds = [kinds[0], *(kind for kind in range(len(KINDS)) if kind != kinds[0])]
                else:
                    failed.append(case)
        return pool, failed

    def _culprits(
        self, cases: list[Case], kind: int, fails: Callable[[Sequence[Case], int], str | None]
    ) -> list[tuple[Case, str, Case | None]]:
        """The cases for which a trial fails, why, and beside which other one, if not alone."""
        failure = fails(cases, kind)
        if failure is None:
            return []
        if len(cases) == 1:
            return [(cases[0], failure, None)]
        middle = len(cases) // 2
        left, right = cases[:middle], cases[middle:]
        bad = self._culprits(left, kind, fails) + self._culprits(right, kind, fails)
        if not bad:  # each half stands it alone
            one = self._first(left, right, kind, fails)
            return [(one, failure, self._first([one], left, kind, fails))]
        return bad

    def _first(
        self,
        beside: list[Case],
        cases: list[Case],
        kind: int,
        fails: Callable[[Sequence[Case], int], str | None],
    ) -> Case:
        """The first of some cases that others cannot be tried beside."""
        while len(cases) > 1:
            half = cases[: len(cases) // 2]
            if fails([*beside, *half], kind) is None:
                beside, cases = [*beside, *half], cases[len(half) :]
            else:
                cases = half
        return cases[0]

    def _another(self, case: Case, kind: int, failure: str) -> bool:
        """Whether there is another way to read a width that stands the kind of subset on which it failed."""
        while case.next(failure):
            again = self._disagree([case], kind)
            if again is None:
                return True
            failure = again
        return False

    def _fails(self, case: Case, kind: int) -> bool:
        """Whether a case stands a kind of subset in no way that is left."""
        failure = self._disagree([case], kind)
        return failure is not None and not self._another(case, kind, failure)

    def _loose(self, cases: list[Case], refused: dict[str, str]) -> list[UnitGroup]:
        """Of cases whose zeros are not gone, the groups that can be cut all the same."""
        if any(case.error for case in cases):
            self._outputs(self.run)  # one that fails by itself is an error, not a reason
        able = []
        for case in cases:
            if case.running:
                case.group = case.running.pop(0)
                able.append(case)
            else:
                refused[case.width.group.name] = broken(case.error)
        if self.inexact:
            able, gone = self._stand(able, self._breaks, next_running, refused)
            refused |= {case.width.group.name: broken(case.error) for case in gone}
        leaks = self._leaks(able) if self.inexact else {}
        found = []
        for case in able:
            name = case.width.group.name
            if name in leaks:
                refused[name] = leaks[name]
            elif note := self._noted(case):
                found.append(replace(case.group, exact=False, note=note))
            else:
                refused[name] = (
                    "cutting its units changes what the others compute, though no norm over them was seen: they are "
                    "part of something larger that was not recognised"
                )
        return found

    def _trained(self, groups: list[UnitGroup], refused: dict[str, str]) -> list[UnitGroup]:
        """Those without which the model runs in training mode, too."""

        def refuse(group: UnitGroup, error: str) -> None:
            refused[group.name] = f"the model does not train without some of its units ({error})"

        run = self.training
        return groups if run is None else sifted(groups, lambda some: self._error(some, run), refuse)

    def aligned(self, groups: list[UnitGroup], refused: dict[str, str]) -> list[UnitGroup]:
        """Groups that stood a trial in another precision: with a divisor where a kernel of this one wants it."""

        def divided(group: UnitGroup, error: str) -> UnitGroup | None:
            for divisor in DIVISORS:
                other = replace(group, divisor=math.lcm(divisor, group.divisor))
                if other.divisor < group.units and not self._error([other], self.run):
                    return other
            refused[group.name] = broken(error)
            return None

        if not self._error(groups, self.run) or self._error([], self.run):  # or it is used under autocast only
            return groups
        return sifted(groups, lambda some: self._error(some, self.run), divided)

    def _error(self, groups: Sequence[UnitGroup], run: Callable[[], Any]) -> str:
        """What running without some units of these raises; empty: nothing."""
        try:
            keep = {group.name: subset(group, 0, turn) for turn, group in enumerate(groups)}
            self._cut({group.name: group for group in groups}, keep, run)
        except Exception as raised:  # whatever a forward raises when its tensors do not fit
            return _said(raised)
        return ""

    # -- running ---------------------------------------------------------------------------------------------------

    def _disagree(self, cases: Sequence[Case], kind: int) -> str | None:
        """Whether zeroing and cutting disagree on a kind of subset: the error if it does not even run, else empty."""
        groups = {case.group.name: case.group for case in cases}
        keep = {case.group.name: case.subset(kind) for case in cases}
        try:
            cut = self._cut(groups, keep, self.run)  # first, as it is what fails early
            gap = largest_gap(self._without(groups, keep), cut)
        except Exception as raised:  # whatever a forward raises when its tensors do not fit
            return _said(raised)
        return None if gap <= self.tolerance else ""

    def _breaks(self, cases: Sequence[Case], kind: int) -> str | None:
        """The error if the model does not run without a kind of subset."""
        groups = {case.group.name: case.group for case in cases}
        try:
            self._cut(groups, {case.group.name: case.subset(kind) for case in cases}, self.run)
        except Exception as raised:  # whatever a forward raises when its tensors do not fit
            return _said(raised)
        return None

    def _without(self, groups: dict[str, UnitGroup], keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """What the model gives with zeros for some units; of one group, whatever its attributes are, once."""
        whose = [(group.slices, keep[name]) for name, group in groups.items()]
        if len(whose) == 1 and whose == self._latest[0]:
            return self._latest[1]
        with self._zeroed(groups, keep):
            zeroed = self._outputs(self.run)
        if len(whose) == 1:
            self._latest = whose, zeroed
        return zeroed

    def _cut(
        self, groups: dict[str, UnitGroup], keep: Mapping[str, Sequence[int]], run: Callable[[], Any]
    ) -> dict[str, Tensor]:
        """What the model gives without some units."""
        with self._restored():
            replay_slim(self.model, plan_slim(self.model, keep, Groups(groups)))
            return self._outputs(run)

    @torch.no_grad()
    def _outputs(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=self._devices):
            # `torch.manual_seed` takes longer than a small model's forward where there is no GPU.
            torch.default_generator.manual_seed(0)
            for device in self._devices:
                torch.cuda.default_generators[device].manual_seed(0)
            result = run()
        return {f"output {i}": t.detach().clone() for i, t in enumerate(outputs_in(result))}

    @contextmanager
    def _zeroed(
        self, groups: Mapping[str, UnitGroup], keep: Mapping[str, Sequence[int]], readers: bool = False
    ) -> Iterator[None]:
        """Zeros in the parameters that make some units; with ``readers``, in those that read them, too."""
        before: list[tuple[Tensor, int, Tensor, Tensor]] = []
        try:
            for name, stay in keep.items():
                group = groups[name]
                gone = sorted(set(range(group.units)) - set(stay))
                for part in group.slices if readers else group.produced:
                    if isinstance(tensor := self._tensors.get(part.name), nn.Parameter):
                        entries = part.entries(gone).to(tensor.device)
                        before.append((tensor.data, part.dim, entries, tensor.data.index_select(part.dim, entries)))
                        tensor.data.index_fill_(part.dim, entries, 0)
            yield
        finally:
            for data, dim, entries, values in reversed(before):
                data.index_copy_(dim, entries, values)
            forget(self.model)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Tensors and attributes come back as they were."""
        self._without_gradients()
        tensors = [(t, t.data) for t in self._tensors.values()]
        attributes = [(m, dict(vars(m))) for m in self._modules.values()]
        try:
            yield
        finally:
            self._without_gradients()
            for tensor, data in tensors:
                tensor.data = data
            for module, values in attributes:
                vars(module).update(values)
            forget(self.model)

    def _without_gradients(self) -> None:
        """A step that takes gradients itself leaves some, as wide as the model was in that run."""
        for tensor in self._tensors.values():
            tensor.grad = None

    # -- reasons ---------------------------------------------------------------------------------------------------

    def _leaks(self, cases: Sequence[Case]) -> dict[str, str]:
        """Name → reason if zeroed units still carry something that depends on the input: then the trace was wrong."""
        readers = {
            name: (case, part)
            for case in cases
            for part in case.group.consumed
            for name in [part.name.rpartition(".")[0]]
            if part.name.endswith("weight") and part.dim == 1 and isinstance(self._modules.get(name), nn.Linear)
        }
        if not readers:
            return {}
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                seen[name] = inputs[0].detach()

            return hook

        handles = [self._modules[name].register_forward_pre_hook(look(name)) for name in readers]
        keep = {case.group.name: case.subset(0) for case in cases}
        try:
            with self._zeroed({case.group.name: case.group for case in cases}, keep):
                self._outputs(self.run)
        finally:
            for handle in handles:
                handle.remove()
        leaks = {}
        for name, value in seen.items():
            case, part = readers[name]
            gone = sorted(set(range(case.group.units)) - set(keep[case.group.name]))
            columns = value.index_select(value.ndim - 1, part.entries(gone)).flatten(0, -2)
            if not float((columns - columns[:1]).abs().max()) <= self.tolerance * float(value.abs().max()):
                why = f"its units still reach {name!r} when they are zero, so something else writes into them"
                leaks[case.group.name] = why
        return leaks

    def _noted(self, case: Case) -> str:
        """Why zeros are not gone, in the first way of reading the width in which that can be told."""
        while not (note := self._note(case)) and case.running:
            case.group = case.running.pop(0)
            if self.inexact and any(self._breaks([case], kind) is not None for kind in range(len(KINDS))):
                return ""
        return note

    def _note(self, case: Case) -> str:
        """Why zeros are not gone, if that can be told."""
        group, mixed = case.group, case.width.mixed
        for part in group.produced:
            name = part.name.rpartition(".")[0]
            if isinstance(module := self._modules.get(name), (nn.LayerNorm, nn.GroupNorm)):
                return f"{type(module).__name__} {name!r} takes its mean and variance over the width"
        if mixed and not self.inexact:
            return f"{mixed!r} takes all of the width together"
        groups, keep = {group.name: group}, {group.name: case.subset(0)}
        with self._zeroed(groups, keep, readers=True):
            unread = self._outputs(self.run)
        if largest_gap(unread, self._cut(groups, keep, self.run)) <= self.tolerance:
            return "an activation with f(0) ≠ 0 lies behind it"
        return f"{mixed!r} takes all of the width together" if mixed else ""


def _said(error: Exception) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__

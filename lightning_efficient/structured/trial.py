"""Trying groups of units: does zeroing them equal cutting them out?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.attention.sites import run_float64
from lightning_efficient.common.comparing import largest_gap
from lightning_efficient.common.match import modules_by_name
from lightning_efficient.common.nests import tensors_behind
from lightning_efficient.common.running import forget
from lightning_efficient.folding.probes import Probe
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.slim import plan_slim, replay_slim, tensors_by_name

# Of float64 outputs; rounding leaves 1e-13, an activation or a norm that is not invariant 1e-3 and more.
_TOLERANCE = 1e-9


class Trial:
    """A float64 copy of a model on which units are zeroed and cut, and which is put back each time.

    Args:
        model: The copy, its weights perturbed so that none is zero.
        probe: Arguments of its forward.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model, self.probe = model, probe
        self._random = torch.Generator().manual_seed(0)

    def judge(self, groups: Sequence[UnitGroup], refused: dict[str, str]) -> list[UnitGroup]:
        """The groups that stand the trial, those among them that are not exact marked.

        Args:
            groups: Tried together first, and in halves where that fails.
            refused: Gets the reasons for the others.
        """
        if not groups:
            return []
        keep = {group.name: self._half(group) for group in groups}
        known = Groups({group.name: group for group in groups})
        gap, error = float("inf"), ""
        try:
            gap = self._gap(known, keep)
        except Exception as raised:  # whatever a forward raises when its tensors do not fit
            error = str(raised.__cause__ or raised).strip().partition("\n")[0]
        if gap <= _TOLERANCE:
            return list(groups)
        if len(groups) > 1:
            middle = len(groups) // 2
            return [*self.judge(groups[:middle], refused), *self.judge(groups[middle:], refused)]
        group = groups[0]
        if error:
            refused[group.name] = f"the model does not run without its units ({error})"
        elif why := self._leaks(group, keep[group.name]):
            refused[group.name] = why
        else:
            return [replace(group, exact=False, note=self._reason(group))]
        return []

    def _half(self, group: UnitGroup) -> list[int]:
        """Half of the units, at random, as many as may stay."""
        count = max(group.units // 2 // group.divisor, 1) * group.divisor
        return torch.randperm(group.units, generator=self._random)[:count].sort().values.tolist()

    def _gap(self, groups: Groups, keep: Mapping[str, Sequence[int]]) -> float:
        with self._restored():
            self._zero(groups, keep)
            zeroed = self._run()
            replay_slim(self.model, plan_slim(self.model, keep, groups))
            cut = self._run()
        return largest_gap(zeroed, cut)

    def _zero(self, groups: Groups, keep: Mapping[str, Sequence[int]]) -> None:
        parameters = {n: t for n, t in tensors_by_name(self.model).items() if isinstance(t, nn.Parameter)}
        for name, stay in keep.items():
            group = groups.found[name]
            group.zero(parameters, sorted(set(range(group.units)) - set(stay)))

    @torch.no_grad()
    def _run(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = run_float64(self.model, self.probe)
        return {f"output {i}": t.detach().clone() for i, t in enumerate(tensors_behind(result))}

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Tensors and attributes come back as they were."""
        tensors = [
            (t, t.data, t.data.clone()) for t in {id(t): t for t in tensors_by_name(self.model).values()}.values()
        ]
        attributes = [(m, dict(vars(m))) for m in self.model.modules()]
        try:
            yield
        finally:
            for tensor, data, value in tensors:
                tensor.data = data.copy_(value)
            for module, values in attributes:
                vars(module).update(values)
            forget(self.model)

    def _leaks(self, group: UnitGroup, keep: Sequence[int]) -> str:
        """A reason if zeroed units still carry something that depends on the input: then the trace was wrong."""
        gone = sorted(set(range(group.units)) - set(keep))
        seen: dict[str, Tensor] = {}
        readers = {part.name.rpartition(".")[0]: part for part in group.consumed if part.name.endswith(".weight")}
        modules = modules_by_name(self.model)

        def look(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                seen[name] = inputs[0].detach()

            return hook

        handles = [modules[name].register_forward_pre_hook(look(name)) for name in readers]
        try:
            with self._restored():
                self._zero(Groups({group.name: group}), {group.name: keep})
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        for name, value in seen.items():
            axis = value.ndim - 1 if isinstance(modules[name], nn.Linear) else 1
            columns = value.index_select(axis, readers[name].entries(gone)).movedim(axis, 0).flatten(1)
            if not float((columns - columns[:, :1]).abs().max()) <= _TOLERANCE * float(value.abs().max()):
                return f"its units still reach {name!r} when they are zero, so something else writes into them"
        return ""

    def _reason(self, group: UnitGroup) -> str:
        makers = {part.name.rpartition(".")[0] for part in group.produced}
        modules = modules_by_name(self.model)
        for name in sorted(makers):
            if isinstance(modules.get(name), (nn.LayerNorm, nn.GroupNorm)):
                kind = "LayerNorm" if isinstance(modules[name], nn.LayerNorm) else "GroupNorm"
                return f"{kind} {name!r} takes its mean and variance over the width"
        return "a norm over the width, or an activation with f(0) ≠ 0 behind it"

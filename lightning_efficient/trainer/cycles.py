"""CRIC inside a Trainer: what ``HESSOPruning(cric=True)`` does before it cuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_efficient.common.running import randomness_kept
from lightning_efficient.common.schema import Int, OrNone, Record, Schema, Such
from lightning_efficient.structured.cric import CRIC_STATE, PROBES, CricPlan, CricState, probe_units
from lightning_efficient.structured.groups import Groups
from lightning_efficient.trainer.replay import Replay, cuda_devices, own
from lightning_efficient.weightspace import Site
from lightning_efficient.weightspace.snapshot import SNAPSHOT, Snapshot, check_snapshot, restore_snapshot, rewind, take

CYCLES = Record(
    {
        "state": CRIC_STATE, "snapshot": OrNone(SNAPSHOT), "decided": OrNone(Int(low=0)), "forwards": Int(low=0),
        "undone": Int(low=0), "bytes": Int(low=0),
    }
)  # fmt: skip


def cycles_schema(plan: CricPlan, units: Mapping[str, int], step: int) -> Schema:
    """What :meth:`Cycles.as_plain` can be after some steps.

    Args:
        plan: Of the run.
        units: Group → how many units it has.
        step: Optimizer steps done.
    """

    def possible(cycles: Mapping[str, Any]) -> bool:
        state, decided = cycles["state"], cycles["decided"]
        begun = state["cycle"] > 0
        named = {"scores": state["samples"] > 0, "trial": state["samples"] > 0}
        named |= dict.fromkeys(("active", "history", "probes"), begun)
        return (
            state["cycle"] <= plan.cycles
            and state["samples"] <= max(step - plan.first, 0)
            and (decided is None or (begun and plan.first < decided <= step))
            and (cycles["snapshot"] is not None) == (begun and decided is None)
            and all(state[name].keys() == (units.keys() if there else set()) for name, there in named.items())
            and all(
                len(state[name][group]) == units[group]
                for name in ("scores", "trial", "active", "history")
                for group in state[name]
            )
        )

    return Such(
        CYCLES, possible, f"as after {step} steps, of which {plan.first} are the first, for {len(units)} groups"
    )


class Cycles:
    """The cycles of one run: their schedule, what they have seen, and the way back.

    Args:
        plan: When they happen.
    """

    def __init__(self, plan: CricPlan) -> None:
        self.plan = plan
        self.state = CricState()
        self.snapshot: Snapshot | None = None
        self.decided: int | None = None
        self.forwards = 0
        self.undone = 0
        self.bytes = 0

    def as_plain(self) -> dict[str, Any]:
        """Plain data for a checkpoint; while cycles run, with a copy of the training state."""
        return {
            "state": self.state.as_plain(), "snapshot": self.snapshot and self.snapshot.as_plain(),
            "decided": self.decided, "forwards": self.forwards, "undone": self.undone, "bytes": self.bytes,
        }  # fmt: skip

    @classmethod
    def from_plain(cls, plan: CricPlan, plain: Mapping[str, Any]) -> Cycles:
        """The inverse of :meth:`as_plain`."""
        cycles = cls(plan)
        cycles.state = CricState.from_plain(plain["state"])
        cycles.snapshot, cycles.decided = restore_snapshot(plain["snapshot"]), plain["decided"]
        cycles.forwards, cycles.undone, cycles.bytes = plain["forwards"], plain["undone"], plain["bytes"]
        return cycles

    def check(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        sites: Mapping[str, Site],
        where: str,
        error: type[ValueError],
    ) -> None:
        """Refuse a training state from a file that is not of this run.

        Raises:
            ValueError: See :func:`~lightning_efficient.weightspace.snapshot.check_snapshot`.
        """
        if self.snapshot is not None:
            where = f"{where} ['cycles']['snapshot']"
            check_snapshot(self.snapshot, pl_module, sites, trainer.optimizers, (), where, error)

    def looking(self, step: int) -> bool:
        """Whether the saliencies of this step count."""
        return self.decided is None and step >= self.plan.first

    def due(self, step: int) -> bool:
        """Whether a cycle begins, or the last has ended, before this step."""
        return self.looking(step) and self.state.samples > 0 and step >= self.plan.begin(self.state.cycle + 1)

    def interval(self) -> tuple[int, int]:
        """Steps done when the present shrinking begins and ends."""
        begin = self.plan.begin(self.state.cycle) if self.decided is None else self.decided
        return begin, begin + self.plan.length

    def keep(self, trainer: Trainer, pl_module: LightningModule, sites: Mapping[str, Site]) -> None:
        """Copy the training state to come back to: weights, buffers, memory of the optimizers."""
        self.snapshot = take(pl_module, sites, trainer.optimizers)
        states = [state for o in self.snapshot.optimizers for state in o["state"].values()]
        tensors = [*self.snapshot.model.values(), *(v for s in states for v in s.values() if isinstance(v, Tensor))]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def go_back(self, trainer: Trainer, pl_module: LightningModule, sites: Mapping[str, Site], step: int) -> None:
        """Undo the cycle; learning rates and schedulers go on, as the steps have been spent."""
        assert self.snapshot is not None
        now = [optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers]
        saved = self.snapshot.optimizers
        states = [{"state": s["state"], "param_groups": g} for s, g in zip(saved, now, strict=True)]
        rewind(Snapshot(self.snapshot.model, self.snapshot.transforms, states), pl_module, sites, trainer.optimizers)
        self.undone += step - self.plan.begin(self.state.cycle)

    def decide(self, step: int) -> dict[str, Tensor]:
        """The scores that decide; nothing is undone from here on."""
        self.decided, self.snapshot = step, None
        return self.state.verdict()

    def probe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        groups: Groups,
        params: Mapping[str, Tensor],
    ) -> None:
        """The loss on one batch without a part of the units of each group, as a ratio to that of the whole network.

        In evaluation mode, so that neither dropout nor batch statistics come in between; where the step does not run
        in that, as it is in training, with the same random numbers each time. Nothing is logged or counted.
        """
        replay = Replay(trainer, pl_module, "fit")
        modes = [(module, module.training) for module in pl_module.modules()]

        def loss() -> float:
            self.forwards += 1
            with randomness_kept(cuda_devices(trainer)):
                return _loss_of(replay.step(own(batch)))

        with replay.quiet():
            try:
                whole = loss()
            except Exception:  # such as with heads that a network has in training mode only
                for module, training in (*modes, (replay.twin, True)):
                    module.training = training
                whole = loss()
            for name, group in groups.found.items():
                names = {part.name for part in group.produced if part.name in params}
                kept = {n: params[n].detach().clone() for n in names}
                ratios = []
                for share in PROBES if group.units > 1 and whole > 0 else ():
                    group.zero(params, probe_units(self.state.scores[name], share))
                    ratios.append(loss() / whole)
                    for n in names:
                        params[n].copy_(kept[n])
                self.state.probes[name] = sum(ratios) / max(len(ratios), 1)

    def say(self, cycles: int) -> None:
        """What the cycles have cost."""
        history = sum(int(where.sum()) for where in self.state.history.values())
        rank_zero_info(
            f"HESSOPruning, CRIC: {self.state.cycle} of at most {cycles} cycles tried {history} units and undid "
            f"{self.undone} optimizer steps; {self.forwards} forwards more for probes; a copy of the training state "
            f"({self.bytes / 2**20:.1f} MiB) to go back to."
        )


def _loss_of(output: Any) -> float:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"cric=True compares losses: `training_step` should return the loss, or a dict with 'loss'; got "
            f"{type(output).__name__}."
        )
    return float(loss.detach())

"""``PAGCPPruning``: prune as many units as every metric's budget allows, judged by the user's own validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_efficient.common.schedule import check_moments, moments
from lightning_efficient.common.schema import Flag, Int, ListOf, MapOf, Number, Record, TensorOf, Text, check
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.units import FOUND, UnitPruningCallback
from lightning_efficient.lifecycle.weights import Plan
from lightning_efficient.structured.alike import as_one, bundled, opened
from lightning_efficient.structured.budgets import read_budgets
from lightning_efficient.structured.pagcp import (
    Decision,
    Layer,
    PagcpConfig,
    search,
    spending,
    table,
    unit_scores,
)
from lightning_efficient.trainer.validation import ValidationOracle
from lightning_efficient.weightspace import Transform

_VALUES = MapOf(Text(), Number(finite=False))
_LAYER = Record(
    {
        "name": Text(), "units": Int(low=0), "dropped": Int(low=0), "chosen": Flag(), "spent": Number(finite=False),
        "saved": Number(finite=False), "trials": Int(low=0),
    }
)  # fmt: skip
_ROUND = Record(
    {
        "step": Int(low=0), "rows": ListOf(_LAYER), "baseline": _VALUES, "values": _VALUES, "spent": _VALUES,
        "saved": Number(finite=False), "kept": Flag(), "given_back": ListOf(Text()), "evaluations": Int(low=0),
    }
)  # fmt: skip


class PAGCPPruning(UnitPruningCallback):
    """Structured pruning under a performance budget for every task (PAGCP, Ye et al. 2023, arXiv 2303.11923).

    At its moments the run stops and looks for units (channels, hidden neurons, heads) that can go: layer by layer,
    those that save the most compute first, ever more of the units with the smallest weights, until your own
    ``validation_step`` says that a metric would leave its budget. The rest of the run is the fine-tuning; what was
    pruned is held at zero, and ``export`` gives the smaller network.

    A budget is about the moment of the decision, relative to the metrics just before it: fine-tuning usually wins back
    more than was lost, but that is not promised. The whole validation data is measured before and after, whatever
    ``batches`` says of the search in between, and a budget that would not be kept gives layers back. Logs
    ``efficient/pagcp/units_left``, ``efficient/pagcp/compute_left`` and, once something was decided,
    ``efficient/pagcp/<metric>_spent`` (share of its budget); :attr:`history` holds the decisions.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names: groups made by one of them. ``None``: all.
        exclude: Globs over module names: groups made by none of them.
        budgets: Metric that validation logs → by how much it may become worse, as a share of its value: 0.05 is 5 %.
            One for each task, or for their sum. ``None``: ``{"val_loss": 0.05}``.
        modes: Metric → ``"max"`` where larger is better, or ``"min"``. ``None``: what the name tells
            (``val_acc``: larger), and where it tells nothing, smaller.
        start: When to prune: steps (int) or fraction of the run (float). 0 prunes a pretrained model before training.
        rounds: How often. Each round has the whole budget, relative to the metrics then.
        every: Between two rounds, likewise.
        batches: Validation batches that a trial looks at, of each loader. ``None``: all of them.
        step: By how much the share of a layer's units grows from one trial to the next.
        most: Largest share of a layer's units that a round may prune.
        first: Tolerance of the first layer in multiples of an equal share. Above 1 layers that save much come first and
            may cost more; below 1 they come last.
        topk: Share of the layers that stay pruned: those that cost the least budget for what they save.
        inexact: Also prune groups whose zeros are not gone (LayerNorm over the residual width, ...).
        round_to: Every tensor of a group that loses units keeps a multiple of so many channels, such as 8.
        uniform: Groups of as many units (heads, or others) are judged as one layer and lose as many, so that widths
            that are equal stay equal, as the ``config`` of a model of Hugging Face's must have it.

    Raises:
        ValueError: An argument is out of range, a budget is on a metric that is not logged, there is no validation
            data, nothing can be pruned, or a round lies beyond the end of the run.
    """

    method = "pagcp_pruning"
    progress_schema = Record(
        {
            **FOUND, "done": Int(low=0), "gone": MapOf(Text(), TensorOf(torch.bool, ndim=1)),
            "history": ListOf(_ROUND),
        }
    )  # fmt: skip
    resume_may_change = frozenset({"enabled"})

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        budgets: dict[str, float] | None = None,
        modes: dict[str, Literal["min", "max"]] | None = None,
        start: int | float = 0.5,
        rounds: int = 1,
        every: int | float = 0.1,
        batches: int | None = None,
        step: float = 0.05,
        most: float = 0.95,
        first: float = 1.5,
        topk: float = 0.8,
        inexact: bool = False,
        round_to: int = 1,
        uniform: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude, inexact, round_to)
        self.budgets = read_budgets({"val_loss": 0.05} if budgets is None else budgets, modes)
        self.options = PagcpConfig(first, step, most, topk, uniform)
        self.start, self.rounds, self.every, self.batches = start, rounds, every, batches
        for name, value in (("rounds", rounds), ("batches", batches)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number from 1; got {value!r}.")
        check_moments(start, every, rounds)
        self.history: list[dict[str, Any]] = []
        self._gone: dict[str, Tensor] = {}
        self._moments: tuple[int, ...] = ()
        self._done = 0

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        own = {name: getattr(self, name) for name in ("start", "rounds", "every", "batches")}
        budgets = {budget.metric: budget.share for budget in self.budgets}
        modes = {budget.metric: budget.mode for budget in self.budgets}
        return super().config() | {"budgets": budgets, "modes": modes} | own | vars(self.options)

    def wants_macs(self) -> bool:
        """Compute is what layers are ordered by."""
        return True

    @property
    def keep(self) -> dict[str, list[int]]:
        """Group → indices of the units that stay, of groups that have lost any."""
        return {name: (~gone).nonzero().flatten().tolist() for name, gone in self._gone.items() if bool(gone.any())}

    # -- life cycle ------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """How far it has got, and what was decided."""
        own = {"done": self._done, "gone": dict(self._gone), "history": [dict(row) for row in self.history]}
        return super().progress() | own

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        super().resume(progress)
        self._done, self._gone = progress["done"], dict(progress["gone"])
        self.history = [dict(row) for row in progress["history"]]

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """As many rounds are done as the history tells of, and the marks are of the groups' units."""
        super().check_progress(state, step)
        rounds = len(state["standing"]["schedule"] or ())
        if not state["done"] == len(state["history"]) <= rounds:
            self.refuse("['done']", f"the number of rounds in `history`, up to {rounds}", state["done"])
        units = {name: TensorOf(torch.bool, shape=(g["units"],)) for name, g in state["groups"]["found"].items()}
        check(state["gone"], Record(units), f"the checkpoint's state of {self.state_key}, field ['gone']", RecipeError)

    def restart(self) -> None:
        """Begin the rounds anew; units that the model has lost stay gone."""
        super().restart()
        self._done, self._gone, self._moments, self.history = 0, {}, (), []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to judge by, then find the groups and put the masks on."""
        if self.enabled:
            oracle = self._oracle(trainer, pl_module, 1)
            with oracle.quiet():
                oracle()
        super().on_fit_start(trainer, pl_module)

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the parameters, without changing anything."""
        plan = super().plan(pl_module)
        if not self.standing.resumed:
            self._gone = self.gone(pl_module)
        return plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the moments."""
        super().on_train_start(trainer, pl_module)
        if self.enabled:
            self._moments = self.standing.fix(
                trainer, type(self).__name__, self._resolve, lambda s: s[-1] + 1 if s else 0
            )

    def _resolve(self, total: int | None) -> tuple[int, ...]:
        return moments(total, self.start, self.every, self.rounds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune between two steps, when it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._boundary is None:
            return
        while self._done < len(self._moments) and self.step(trainer) >= self._moments[self._done]:
            self._round(trainer, pl_module)
            self._done += 1

    # -- a round ---------------------------------------------------------------------------------------------------

    def _oracle(self, trainer: Trainer, pl_module: LightningModule, batches: int | None) -> ValidationOracle:
        return ValidationOracle(trainer, pl_module, [budget.metric for budget in self.budgets], batches)

    def _round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = self._oracle(trainer, pl_module, None)
        sample = whole if self.batches is None else self._oracle(trainer, pl_module, self.batches)
        parameters = {name: param.detach() for name, param in self._params.items()}
        layers = [
            Layer(name, unit_scores(group, parameters), ~self._gone[name], group.divisor)
            for name, group in self.groups.found.items()
        ]
        kinds = [(g.units, g.heads) if self.options.uniform else name for name, g in self.groups.found.items()]
        bundles = bundled(layers, kinds)
        layers = [as_one(name, members) if len(members) > 1 else members[0] for name, members in bundles.items()]
        cost = self._macs()
        before = self._counts()

        def measured(oracle: ValidationOracle, dropped: Mapping[str, Sequence[int]]) -> dict[str, float]:
            with self._without(opened(dropped, bundles)):
                return oracle()

        def compute(dropped: Mapping[str, int]) -> float:
            more = {member.name: count for name, count in dropped.items() for member in bundles[name]}
            return cost({name: count + more.get(name, 0) for name, count in before.items()})

        with whole.quiet(), self._progress(trainer, layers) as progress:
            decision = search(
                layers, self.budgets, partial(measured, sample), compute, self.options,
                verify=None if sample is whole else partial(measured, whole), progress=progress,
            )  # fmt: skip
        units = {}
        for name, chosen in trainer.strategy.broadcast(opened(decision.dropped, bundles)).items():
            units[name] = torch.zeros_like(self._gone[name])
            units[name][list(chosen)] = True
            self._gone[name] = self._gone[name] | units[name]
        self._drop(trainer, pl_module, units)
        self.history.append(self._entry(decision, self.step(trainer)))
        self._say(decision, self.step(trainer))

    def _entry(self, decision: Decision, step: int) -> dict[str, Any]:
        """A decision as plain data."""
        rows = [
            {
                "name": row.name, "units": row.units, "dropped": len(row.dropped), "chosen": row.chosen,
                "spent": row.spent, "saved": row.saved, "trials": row.trials,
            }
            for row in decision.rows
        ]  # fmt: skip
        return {
            "step": step, "rows": rows, "baseline": decision.baseline, "values": decision.values,
            "spent": spending(decision, self.budgets), "saved": decision.saved,
            "kept": all(b.within(decision.values[b.metric], decision.baseline[b.metric]) for b in self.budgets),
            "given_back": list(decision.given_back), "evaluations": decision.evaluations,
        }  # fmt: skip

    @contextmanager
    def _without(self, dropped: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """The network with some units zeroed, for as long as it takes to look at it."""
        parameters = {name: param.data for name, param in self._params.items()}
        touched = {part.name for name in dropped for part in self.groups.found[name].produced} & parameters.keys()
        saved = {name: parameters[name].clone() for name in touched}
        try:
            for name, units in dropped.items():
                self.groups.found[name].zero(parameters, units)
            yield
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)

    def _counts(self) -> dict[str, int]:
        return {name: int(gone.sum()) for name, gone in self._gone.items()}

    @contextmanager
    def _progress(self, trainer: Trainer, layers: Sequence[Layer]) -> Iterator[Any]:
        """A bar over the trials of a round; it ends early, since layers stop at their first failure."""
        most = sum(len(layer.counts(self.options.step, self.options.most)) for layer in layers)
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        label = f"{type(self).__name__}, round {self._done + 1} of {len(self._moments)}"
        with tqdm(total=most, desc=label, disable=not shown, leave=False, dynamic_ncols=True) as bar:

            def trial(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            yield trial

    # -- reports ---------------------------------------------------------------------------------------------------

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """How much is left, and what the last round spent."""
        cost, gone = self._macs(), self._counts()
        total = sum(len(marks) for marks in self._gone.values())
        out = {
            "units_left": 1.0 - sum(gone.values()) / max(total, 1),
            "compute_left": cost(gone) / cost() if cost() else 1.0,
        }
        if self.history:
            out |= {f"{metric}_spent": spent for metric, spent in self.history[-1]["spent"].items()}
        return {name: torch.tensor(value) for name, value in out.items()}

    def _say(self, decision: Decision, step: int) -> None:
        said = table(decision, self.budgets)
        rank_zero_info(
            f"{type(self).__name__}, round {self._done + 1} of {len(self._moments)}, before step {step}:\n{said}"
        )
        if not decision.dropped:
            rank_zero_warn(
                f"{type(self).__name__} pruned nothing before step {step}: no share of any layer's units keeps every "
                f"budget ({', '.join(f'{b.metric}: {b.share:.1%}' for b in self.budgets)}). Raise `budgets`, lower "
                "`step`, or train longer before `start`."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was pruned, and whether rounds are missing."""
        if self._boundary is None:
            return
        cost = self._macs()
        self._say_widths(1.0 - cost(self._counts()) / cost() if cost() else 0.0, "multiply-accumulates")
        super().on_train_end(trainer, pl_module)

    def unfinished(self) -> str:
        """For the report of a schedule that the run did not finish."""
        return f"{len(self._moments) - self._done} of {len(self._moments)} rounds have not come."

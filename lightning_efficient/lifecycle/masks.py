"""What the callbacks that prune share: targets, masks on the optimizer boundary, averaged copies, reports."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_efficient.common.change import Change
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.schema import Record, check
from lightning_efficient.common.shards import gather_anew, is_cut
from lightning_efficient.lifecycle.base import peers
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.strategies import is_sharded
from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback
from lightning_efficient.pruning.selection import check_layout
from lightning_efficient.pruning.targets import PrunableWeight, find_targets
from lightning_efficient.trainer.averages import averages, prune_copies
from lightning_efficient.weightspace import Boundary, Site, Transform
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.mask import (
    MaskTransform,
    forget,
    pack_mask,
    pack_parts,
    packed_mask,
    set_mask,
    unpack_mask,
)
from lightning_efficient.weightspace.snapshot import Snapshot, check_snapshot, rewind, take
from lightning_efficient.weightspace.sums import run, total

# Biases and layers that start at zero make some; no initialization makes this many.
_ZEROS_TO_NAME = 0.05
NO_SPEED = (
    "Masks make nothing faster or smaller by themselves: dense kernels multiply the zeros too, and files store them."
)


class PruningCallback(WeightSpaceCallback):
    """Base of the callbacks that prune with masks.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names.
        exclude: Globs over module names, applied after ``include``.
        embeddings: Include ``nn.Embedding`` tables.
        keep_zeros: Hold weights that are zero when a new run begins (a model that was pruned elsewhere) at zero.
    """

    transform = MaskTransform

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        embeddings: bool = False,
        keep_zeros: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.embeddings, self.keep_zeros = embeddings, keep_zeros
        self.granularity, self.criterion, self.scope = "element", "magnitude", "global"
        self._targets: dict[str, PrunableWeight] = {}
        self._snapshot: Snapshot | None = None
        self._sparsity = 0.0

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | {"embeddings": self.embeddings, "keep_zeros": self.keep_zeros}

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""
        found = find_targets(
            pl_module, self.granularity, self.criterion, self.include, self.exclude, self.embeddings,
            self._saved(pl_module),
        )  # fmt: skip
        self._targets = found.matched
        change = Change(method=self.method, skipped=dict(found.skipped))
        plan = Plan(change=change)
        for name, target in found.matched.items():
            if is_cut(target.param):
                check_layout(name, self.granularity, self.scope, self._layout(name))
            plan.sites[name] = (target.param, partial(MaskTransform, target.param.shape))
            change.targets[name] = "×".join(map(str, target.param.shape))
        return plan

    # -- masks -----------------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name → bool mask, True where the weight is kept; of the run that goes on, or of the last one.

        Of a weight that is cut over processes: of what is here.
        """
        return {name: t.mask for name, t in self._mask_transforms().items()}

    def carried(self, pl_module: LightningModule) -> Entry | None:
        """The masks on a model, of this callback or of another one that prunes with masks."""
        mine, masks = attachment(pl_module), METHODS.pruning("weights")
        return super().carried(pl_module) or next((e for e in mine.entries if e.method in masks), None)

    def _mask_transforms(self) -> dict[str, MaskTransform]:
        return {name: cast(MaskTransform, transform) for name, transform in self._transforms.items()}

    def _sites(self) -> dict[str, Site]:
        assert self._boundary is not None
        return self._boundary.sites

    def _set_masks(
        self, trainer: Trainer, pl_module: LightningModule, masks: Mapping[str, Tensor], advance: bool
    ) -> bool:
        """Put masks on weights, memory of the optimizers and averaged copies alike; whether anything changed."""
        if trainer.world_size > 1 and not is_sharded(trainer):
            # Weights are equal on all processes, scores almost surely: one of them decides.
            packed = trainer.strategy.broadcast({name: pack_mask(mask).cpu() for name, mask in masks.items()})
            masks = {name: unpack_mask(packed[name], mask.shape).to(mask.device) for name, mask in masks.items()}
        transforms = self._mask_transforms()
        # Of a weight that is cut, perhaps in another part than this.
        news = self._counts({name: mask != transforms[name].mask for name, mask in masks.items()})
        changed = {name: mask for name, mask in masks.items() if news[name]}
        pruned = {self._targets[name].param: ~mask | transforms[name].dropped for name, mask in changed.items()}
        for name, mask in changed.items():
            set_mask(self._sites()[name], transforms[name], mask, advance=advance)
        if changed:
            forget(trainer.optimizers, pruned)
            prune_copies(trainer, pl_module, {name: mask.dropped for name, mask in transforms.items()})
            gather_anew(pl_module)
            self._measure()
        return bool(changed)

    def _packed(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of what is here as bits of the whole."""
        sites = self._sites()
        return dict(zip(masks, run(pack_parts(sites[n].layout, mask) for n, mask in masks.items()), strict=True))

    def _unpacked(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        found = {name: (self._sites()[name], bits) for name, bits in packed.items()}
        return {
            n: s.layout.part(unpack_mask(bits.to(s.weight.device), s.param.shape)) for n, (s, bits) in found.items()
        }

    def _measure(self) -> None:
        zeros = self._counts({name: self._sites()[name].weight == 0 for name in self._present()})
        self._sparsity = sum(zeros.values()) / max(self._size(), 1)

    def _size(self) -> int:
        return sum(target.param.numel() for target in self._present().values())

    def _counts(self, where: Mapping[str, Tensor]) -> dict[str, int]:
        """Name of a weight → how many are true, in all parts of it."""
        sites = self._sites()
        found = run(total(sites[name].layout, torch.count_nonzero(mask)) for name, mask in where.items())
        return {name: int(count) for name, count in zip(where, found, strict=True)}

    def _layout(self, name: str) -> Layout:
        """How a weight is cut, seen as ``(outputs, inputs, ...)``."""
        target = self._targets[name]
        layout = Layout.find(name, target.param)
        return layout.transposed() if target.transposed else layout

    def _present(self) -> dict[str, PrunableWeight]:
        return {name: self._targets[name] for name in self._transforms}

    # -- going back ------------------------------------------------------------------------------------------------

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> Snapshot:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        return take(pl_module, self._sites(), trainer.optimizers, schedulers)

    def _check_snapshot(
        self, trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot | None, field: str, whole: bool
    ) -> None:
        """Refuse what a file has to go back to, if it is not of this model; ``whole``: with its optimizers."""
        if snapshot is not None and self._boundary is not None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs] if whole else []
            optimizers = trainer.optimizers if whole else []
            where = f"the checkpoint's state of {self.state_key}, field {field}"
            check_snapshot(snapshot, pl_module, self._sites(), optimizers, schedulers, where, RecipeError)

    def _check_masks(self, packed: Mapping[str, Tensor] | None, field: str) -> None:
        """Refuse masks of a file that are not of this run's weights."""
        if packed is not None:
            masks = Record({name: packed_mask(self._targets[name].param.shape) for name in self._transforms})
            check(packed, masks, f"the checkpoint's state of {self.state_key}, field {field}", RecipeError)

    def _rewind(self, trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot, weights: bool = True) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        rewind(snapshot, pl_module, self._sites(), trainer.optimizers, schedulers, weights=weights)
        if weights:
            self.rewinds += 1
            for average in averages(trainer):  # of a training that has been undone: begin anew
                average.n_averaged.zero_()
        gather_anew(pl_module)
        self._measure()

    def _put_back(self, pl_module: LightningModule, snapshot: Snapshot) -> None:
        """The model of a snapshot without optimizers, under the masks of today."""
        rewind(snapshot, pl_module, self._sites())
        gather_anew(pl_module)
        self._measure()

    def _waits(self, trainer: Trainer) -> bool:
        """Whether the weights are not finite, and a guard in this Trainer will bring better ones: prune by those."""
        guarded = any(cb.guards for cb in peers(trainer))
        return guarded and not all(bool(t.param.detach().isfinite().all()) for t in self._present().values())

    def rewound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count anew."""
        super().rewound(trainer, pl_module)
        self._measure()

    # -- life cycle ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget the training state to go back to."""
        super().restart()
        self._snapshot = None

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        fresh = self.carried(pl_module) is None
        super()._begin(pl_module, boundary)
        if fresh:
            self._meet_zeros()
        for name, transform in self._mask_transforms().items():
            if not run([transform.fits(self._sites()[name].weight, 0.0)])[0]:  # weights from elsewhere
                set_mask(self._sites()[name], transform, transform.mask)
        self._measure()

    def _meet_zeros(self) -> None:
        """Zeros that no mask explains: of a model that was pruned elsewhere, or loaded without its recipe."""
        zero = {name: self._sites()[name].weight == 0 for name in self._present()}
        counts = self._counts(zero)
        share = sum(counts.values()) / max(self._size(), 1)
        if self.keep_zeros:
            for name, where in zero.items():
                if counts[name]:
                    set_mask(self._sites()[name], self._mask_transforms()[name], ~where)
        elif share > _ZEROS_TO_NAME:
            rank_zero_warn(
                f"{type(self).__name__}: {share:.1%} of the weights are zero already, and will grow again until they "
                "are pruned anew. To go on from a pruned model use keep_zeros=True, or load it with "
                "`lightning_efficient.load_from_checkpoint`, which brings its masks."
            )

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """The true sparsity, counted when masks change."""
        return {"sparsity": torch.tensor(self._sparsity)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was pruned, what that buys, and which weights are gone altogether."""
        super().on_train_end(trainer, pl_module)
        if self._boundary is None:
            return
        self._measure()
        present = self._present()
        size = self._size()
        everything = sum(p.numel() for p in pl_module.parameters())
        zeros = round(self._sparsity * size)
        rank_zero_info(
            f"{type(self).__name__}: {zeros} of {size} weights in {len(present)} tensors are zero "
            f"({self._sparsity:.1%}; {zeros / max(everything, 1):.1%} of all parameters). {NO_SPEED}"
        )
        left = self._counts({name: self._sites()[name].weight != 0 for name in present})
        gone = [name for name, count in left.items() if not count]
        if gone:
            rank_zero_warn(
                f"{type(self).__name__} pruned {len(gone)} weight(s) altogether ({gone[:3]}), so nothing passes them "
                "any more. Use scope='layer', a lower amount, or `exclude` them."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return super().__getstate__() | {"_targets": {}, "_snapshot": None}

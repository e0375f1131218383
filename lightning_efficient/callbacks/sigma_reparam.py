"""``SigmaReparam``: spectral reparametrization of weight matrices, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_efficient.common.change import Change
from lightning_efficient.common.running import as_call
from lightning_efficient.common.shards import is_cut
from lightning_efficient.lifecycle.state import Request
from lightning_efficient.lifecycle.structural import install_before_averaging, rebind_optimizers
from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback
from lightning_efficient.norms import remove as remove_norms
from lightning_efficient.trainer.example import example_of, first_batch
from lightning_efficient.weightspace import SpectralTransform, Transform
from lightning_efficient.weightspace.sigma_reparam import (
    METHOD,
    SigmaReparamConfig,
    describe,
    find_loose,
    find_targets,
    find_uses,
    make_transform,
)
from lightning_efficient.weightspace.used import Use


class SigmaReparam(WeightSpaceCallback):
    """Train weight matrices as ``Ŵ = γ W / σ(W)`` (Zhai et al., ICML 2023, arXiv 2303.06296).

    Bounds the attention logits through the spectral norms, which guards against attention-entropy collapse and widens
    the range of learning rates that train. The module keeps holding ``Ŵ`` under its own names, so checkpoints, EMA,
    ``torch.compile`` and export see an ordinary model; the optimizer moves ``W`` and the gains ``γ``. Covered are the
    weights of known layers, and what else multiplies as a matrix in a forward on the first batch (experts: one gain
    each); the report says which share of the parameters that is, and what is not bounded. LoRA is refused. Logs
    ``efficient/sigma_reparam/{sigma_max,gain_min,gain_mean,gain_max}``.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
        init: ``"preserve"`` starts with ``γ = σ(W)`` and leaves the function unchanged, as pretrained models need;
            ``"one"`` starts with ``γ = 1``, the paper's pseudo-code.
        qkv: A fused query-key-value projection counts as one matrix (``"fused"``, as published) or as three.
        monitor_only: Log the spectral norms, change nothing.
        embeddings: Include ``nn.Embedding`` tables.
        learnable_gain: Train ``γ``. ``False`` is plain spectral normalization, the paper's control arm.
        gain: ``"log"`` trains ``log γ``: a step is relative to the gain, and none leads through zero. ``"linear"``
            trains ``γ``, as published, and starves small models at small rates (``benchmarks/results/sigma_gain.md``).
        gain_lr: Factor on the learning rate of each gain, which else is that of its weight, group and schedule.
            Published: 1.
        remove_norms: Replace every normalization layer outside ``exclude`` by the identity: the paper's from-scratch
            recipe for ViTs. Such checkpoints load with :func:`lightning_efficient.load_from_checkpoint`.
    """

    method = METHOD
    only_with = (("learnable_gain", (True,), ("gain", "gain_lr")),)
    sharded = True
    transform = SpectralTransform
    resume_may_change = frozenset({"enabled", "init"})
    later_arguments: ClassVar[Mapping[str, Any]] = {"gain": "linear", "gain_lr": 1.0}

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        init: Literal["preserve", "one"] = "preserve",
        qkv: Literal["fused", "split"] = "fused",
        monitor_only: bool = False,
        embeddings: bool = False,
        learnable_gain: bool = True,
        remove_norms: bool = False,
        gain: Literal["linear", "log"] = "log",
        gain_lr: float = 10.0,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.remove_norms = remove_norms
        self._trainer: Trainer | None = None
        self.options = SigmaReparamConfig(init, qkv, monitor_only, embeddings, learnable_gain, gain, gain_lr)

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | vars(self.options) | {"remove_norms": self.remove_norms}

    def without_effect(self) -> str:
        """It may only look."""
        return "monitor_only=True logs spectral norms only" if self.only_looks else ""

    @property
    def only_looks(self) -> bool:
        """With ``monitor_only``."""
        return self.options.monitor_only and not self.remove_norms

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the norms out, if asked to, before weights are loaded."""
        super().setup(trainer, pl_module, stage)
        if self.enabled and self.remove_norms:
            config: dict[str, Any] = {"include": None, "exclude": self.exclude}
            request = Request(
                remove_norms.METHOD,
                self.state_key,
                config,
                partial(remove_norms.apply_remove_norms, config=config),
            )
            install_before_averaging(self, trainer, pl_module, request)

    def check_sharded(self, pl_module: LightningModule) -> None:
        """Removing norms of a sharded model is refused."""
        if self.remove_norms:
            raise ValueError(
                "SigmaReparam(remove_norms=True) replaces modules, which a sharded model has no place for: build it "
                "without norms, or train unsharded."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop removed norms from the optimizers, then put the transforms on."""
        if self.enabled and self.remove_norms:
            rebind_optimizers(trainer, pl_module, remove_norms.METHOD, self.state_key)
        self._trainer = trainer
        try:
            super().on_fit_start(trainer, pl_module)
        finally:
            self._trainer = None

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""
        targets = find_targets(pl_module, self.options, self.include, self.exclude, self._uses(pl_module))
        change = Change(method=METHOD, skipped=dict(targets.skipped), notes=[targets.coverage])
        plan = Plan(change=change)
        for name, (param, blocks) in targets.matched.items():
            plan.sites[name] = (param, partial(make_transform, self.options, blocks))
            change.targets[name] = describe(param, blocks, targets.notes.get(name))
        return plan

    def _uses(self, pl_module: LightningModule) -> Mapping[str, Use] | None:
        """How the parameters of modules of no known kind are used: as when their state was saved, or from one batch."""
        loose = find_loose(pl_module)
        if not loose:
            return {}
        if saved := self._saved(pl_module):
            return {name: "matrix" if p.dim() == 2 else "stack" for name, p in loose.items() if name in saved}
        if any(is_cut(p) for p in pl_module.parameters()):  # a copy of it to run is not to be had
            return None
        if self._trainer is None:  # asked before any training: `lightning-efficient targets`
            given = getattr(pl_module, "example_input_array", None)
            return None if given is None else find_uses(pl_module, lambda: as_call(given).run(pl_module))
        try:
            example = example_of(self._trainer, pl_module, "fit", first_batch(self._trainer))
        except ValueError:  # a step that cannot be repeated: these parameters are left alone, and named
            return None
        return find_uses(example.model, lambda: example.model(*example.args))

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Largest spectral norm of the raw weights, and the spread of the gains (the norms of the network's)."""
        spectral = [cast(SpectralTransform, t) for t in transforms.values()]
        sigma = torch.cat([t.sigma for t in spectral])
        if self.options.monitor_only:
            return {"sigma_max": sigma.max(), "sigma_mean": sigma.mean()}
        gain = torch.cat([t.gain for t in spectral])
        return {
            "sigma_max": sigma.max(),
            "gain_min": gain.min(),
            "gain_mean": gain.mean(),
            "gain_max": gain.max(),
        }

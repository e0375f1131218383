"""``SigmaReparam``: spectral reparametrization of every weight matrix, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_efficient.common.change import Change
from lightning_efficient.lifecycle.state import Request
from lightning_efficient.lifecycle.structural import install_before_averaging, rebind_optimizers
from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback
from lightning_efficient.norms import remove as remove_norms
from lightning_efficient.weightspace import SpectralTransform, Transform
from lightning_efficient.weightspace.sigma_reparam import (
    METHOD,
    SigmaReparamConfig,
    describe,
    find_targets,
    make_transform,
)


class SigmaReparam(WeightSpaceCallback):
    """Train every weight matrix as ``Ŵ = γ W / σ(W)`` (Zhai et al., ICML 2023, arXiv 2303.06296).

    Bounds the attention logits through the spectral norms, which guards against attention-entropy collapse and widens
    the range of learning rates that train. The module keeps holding ``Ŵ`` under its own names, so checkpoints, EMA,
    ``torch.compile`` and export see an ordinary model; the optimizer moves ``W`` and the gains ``γ``. Logs
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
        remove_norms: Replace every normalization layer outside ``exclude`` by the identity: the paper's from-scratch
            recipe for ViTs. Such checkpoints load with :func:`lightning_efficient.load_from_checkpoint`.
    """

    method = METHOD
    resume_may_change = frozenset({"enabled", "init"})

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
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.remove_norms = remove_norms
        self.options = SigmaReparamConfig(init, qkv, monitor_only, embeddings, learnable_gain)

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | vars(self.options) | {"remove_norms": self.remove_norms}

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop removed norms from the optimizers, then put the transforms on."""
        if self.enabled and self.remove_norms:
            rebind_optimizers(trainer, pl_module, remove_norms.METHOD, self.state_key)
        super().on_fit_start(trainer, pl_module)

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""
        targets = find_targets(pl_module, self.options, self.include, self.exclude)
        change = Change(method=METHOD, skipped=dict(targets.skipped))
        plan = Plan(change=change)
        for name, (param, blocks) in targets.matched.items():
            plan.sites[name] = (param, partial(make_transform, self.options, blocks))
            change.targets[name] = describe(param, blocks, targets.notes.get(name))
        return plan

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Largest spectral norm of the raw weights, and the spread of the gains (the norms of the network's)."""
        spectral = [cast(SpectralTransform, t) for t in transforms.values()]
        sigma = torch.cat([t.sigma for t in spectral])
        if self.options.monitor_only:
            return {"sigma_max": sigma.max(), "sigma_mean": sigma.mean()}
        gain = torch.cat([t.gain.detach() for t in spectral])
        return {
            "sigma_max": sigma.max(),
            "gain_min": gain.min(),
            "gain_mean": gain.mean(),
            "gain_max": gain.max(),
        }

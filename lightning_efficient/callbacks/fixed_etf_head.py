"""``FixedETFHead``: a classifier head that is a simplex frame and is not learned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.match import NoMatchError, select_modules
from lightning_efficient.companions.simplex import fix_head
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.recipe import Entry, RecipeError


class FixedETFHead(EfficientCallback):
    """Give classifier heads the vectors of a simplex equiangular tight frame, and freeze them.

    All classes are then equally far apart from the start, the rare ones as well; what is learned are the features. The
    layer stays where it is, with its names in ``state_dict``: files load without this package and nothing has to be
    exported. It is frozen, and taken out of the optimizers.

    Its vectors point to all sides, which features behind a ReLU cannot: one class or more is then hard to reach. Have
    the last layer before the head give values of both signs; if it does not, one warning says so.

    The frame is set in ``setup``, before weights are loaded, the model is wrapped or optimizers are made. So the layer
    has to be there: made in ``__init__``, not in ``setup`` or ``configure_model``.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over names of linear layers; needed, because which layer is the head cannot be seen.
        exclude: Globs over module names, applied after ``include``.
        sparsity: Share of the weights that are zero, at random places. 0: the exact frame.
        bias: ``"zero"``, or ``"keep"`` what it is; frozen either way.
        steps: Of the optimization of a sparse frame, about 0.6 ms each.
        seed: Of the frame; the same in all processes.

    Raises:
        ValueError: An argument out of range; more classes than features; during the run: a head made too late.
        NoMatchError: ``include`` is missing or names no linear layer.

    Source: Xiao et al., FedLoGe, ICLR 2024, arXiv 2401.08977 (SSE-C). Differs: the bias is zero by default; there it
    stays at its random start.
    """

    method = "fixed_etf_head"
    resume_may_change = frozenset({"enabled"})

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        sparsity: float = 0.6,
        bias: Literal["zero", "keep"] = "zero",
        steps: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(enabled, include, exclude)
        if not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` is {sparsity}; expected 0 <= sparsity < 1.")
        if steps < 1:
            raise ValueError(f"`steps` is {steps}; expected at least 1.")
        self.sparsity, self.bias, self.steps, self.seed = sparsity, bias, steps, seed
        self._looks: list[RemovableHandle] = []

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | {name: getattr(self, name) for name in ("sparsity", "bias", "steps", "seed")}

    def heads(self, pl_module: LightningModule) -> dict[str, nn.Linear]:
        """Name → layer, of those that ``include`` names.

        Args:
            pl_module: The module.

        Raises:
            NoMatchError: There is none.
        """
        if self.include is None:
            linear = [name for name, module in pl_module.named_modules() if isinstance(module, nn.Linear)]
            raise NoMatchError(f"FixedETFHead: name the head, include=[...]; the linear layers are {linear[-8:]}.")
        globs: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "method": "FixedETFHead"}
        found = select_modules(pl_module, types=(nn.Linear,), **globs).matched
        return {name: head for name, head in found.items() if isinstance(head, nn.Linear)}

    def check_checkpoint(
        self, pl_module: LightningModule, checkpoint: dict[str, Any], entries: Sequence[Entry]
    ) -> None:
        """The optimizers of a run with it lack the head's parameters, so it cannot come or go in the middle."""
        super().check_checkpoint(pl_module, checkpoint, entries)
        there = bool(checkpoint.get("callbacks", {}).get(self.state_key))
        if pl_module.trainer.state.fn == "fit" and there != self.enabled:
            raise RecipeError(
                f"the checkpoint was trained {'with' if there else 'without'} {self.state_key}, and this run has it "
                f"{'on' if self.enabled else 'off (enabled=False)'}: the state of the optimizers does not fit. Resume "
                "as it was, or start a new run from the weights alone "
                f"({type(pl_module).__name__}.load_from_checkpoint(path))."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set and freeze the heads, if they are there."""
        super().setup(trainer, pl_module, stage)
        if not self.enabled or stage != "fit":
            return
        try:
            heads = self.heads(pl_module)
        except NoMatchError:  # said in `on_fit_start`, if it is still so when the model is complete
            return
        for head in heads.values():
            fix_head(head, self.sparsity, bias=self.bias, steps=self.steps, seed=self.seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the heads are those of ``setup``; take them out of the optimizers before their state is loaded."""
        super().on_fit_start(trainer, pl_module)
        if not self.enabled:
            return
        heads = self.heads(pl_module)
        if late := [name for name, head in heads.items() if any(p.requires_grad for p in head.parameters())]:
            raise ValueError(
                f"FixedETFHead: {late} was made or made trainable after the callbacks' setup, in `setup` or "
                f"`configure_model` of {type(pl_module).__name__}; by now its weights are loaded and the optimizers "
                "made. Make it in `__init__`, or call lightning_efficient.functional.fix_head(layer, sparsity=...) "
                "where it is made."
            )
        frozen = {id(p) for head in heads.values() for p in head.parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in frozen]
        rank_zero_info(f"FixedETFHead: {', '.join(heads)}: a simplex, {self.sparsity:.0%} zeros, frozen.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features of the first batch."""
        super().on_train_start(trainer, pl_module)
        if self.enabled:
            for name, head in self.heads(pl_module).items():
                self._looks.append(head.register_forward_pre_hook(partial(self._look, name)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave no hook behind."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def _close(self) -> None:
        while self._looks:
            self._looks.pop().remove()

    def _look(self, name: str, head: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and args and isinstance(args[0], Tensor) and bool((args[0] >= 0).all()):
            rank_zero_warn(
                f"FixedETFHead: the features that {name!r} is given are never negative (behind a ReLU?), and a simplex "
                "has vectors that no such features point along: some classes are hard to reach. Leave out the last "
                "activation before it."
            )

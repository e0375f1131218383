"""``AdaptiveGradientModulation``: in a network of several modalities, slow down the one that is ahead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.near import near_names
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.running import randomness_kept
from lightning_efficient.common.schema import Int, ListOf, Number, Record
from lightning_efficient.companions.modulation import (
    masked_outputs,
    modulated,
    modulation,
    mono_modal_responses,
    response_scores,
)
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.trainer.replay import cuda_devices


class AdaptiveGradientModulation(EfficientCallback):
    """Balance the modalities of a classifier: multiply the gradient of each by how far it is behind.

    In every training forward of the network also the outputs with single modalities (and sets of them) are computed,
    the others replaced by zeros, in evaluation mode: no random numbers, no running statistics. They give each
    modality's share of the output (Shapley values, which add up to it) and how well it predicts alone. The gradient
    that reaches a share is multiplied by ``exp(alpha * (usual lead - lead))``; the output itself stays the same. Under
    several processes all use the mean of the scores. Evaluation is untouched, and files hold a few numbers.

    Logs, under ``efficient/adaptive_gradient_modulation/``: ``score/<name>`` (mean negative log-likelihood of a
    modality alone) and ``factor/<name>``, on the Trainer's logging steps.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        modalities: Name → argument of the network's forward that holds it, by position or name; at least two, tensors.
        alpha: Strength; 0: nothing is modulated.
        module: Name of the network. ``None``: the LightningModule's own ``forward``.
        target: Name of the classes in the batch, keys and positions joined by dots. ``None``: its only tensor of whole
            numbers, one a sample.
        clamp: Bound of the exponent, from above.
        start: First epoch in which it acts.
        end: Last one. ``None``: to the end.

    Raises:
        ValueError: An argument out of range; during the run: no such module, argument or target, or an output that is
            not (samples, classes).

    Source: Li et al., ICCV 2023, arXiv 2308.07686 (AGM). Differs: scores are those of all processes; no gradient
    clipping of its own.
    """

    method = "adaptive_gradient_modulation"
    resume_may_change = frozenset({"enabled", "alpha", "module", "target", "clamp", "start", "end"})
    progress_schema = Record({"seen": Int(low=0), "means": ListOf(Number())})

    def __init__(
        self,
        enabled: bool = True,
        modalities: dict[str, int | str] | None = None,
        alpha: float = 1.0,
        module: str | None = None,
        target: str | None = None,
        clamp: float = 10.0,
        start: int = 0,
        end: int | None = 20,
    ) -> None:
        super().__init__(enabled)
        if enabled and not 2 <= len(modalities or ()) <= 4:
            raise ValueError(f"`modalities` is {modalities}; expected from 2 to 4, name → argument of the forward.")
        for name, value, least in (("alpha", alpha, 0), ("clamp", clamp, 0), ("start", start, 0), ("end", end, start)):
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}; expected at least {least}{' (`start`)' * (name == 'end')}.")
        self.modalities = dict(modalities or {})
        self.alpha, self.module, self.target, self.clamp = alpha, module, target, clamp
        self.start, self.end = start, end
        self._handle: RemovableHandle | None = None
        self.restart()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("enabled", "modalities", "alpha", "module", "target", "clamp", "start", "end")
        return {name: getattr(self, name) for name in names}

    # -- what belongs to a fit -----------------------------------------------------------------------------------

    def restart(self) -> None:
        """No score has been seen."""
        self._seen, self._means = 0, torch.zeros(len(self.modalities))
        self._scores: Tensor | None = None
        self._factors = torch.ones(len(self.modalities))
        self._batch: Any = None
        self._inside = False

    def progress(self) -> dict[str, Any]:
        """Running means of the scores."""
        return {"seen": self._seen, "means": self._means.tolist()}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on with them."""
        self._seen, self._means = progress["seen"], torch.tensor(progress["means"])

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """As many means as modalities."""
        if len(state["means"]) != len(self.modalities):
            self.refuse("['means']", f"a list of {len(self.modalities)}, one a modality", state["means"])

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look at the network's training forwards."""
        super().on_train_start(trainer, pl_module)
        if self.enabled:
            network = self._network(pl_module)

            # Inside compiled code it runs as written, and so do the masked forwards.
            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
                return self._forward(trainer, pl_module, module, args, kwargs, out)

            self._handle = network.register_forward_hook(hook, with_kwargs=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The classes of this batch; its first forward says what is ahead."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        last = trainer.current_epoch if self.end is None else self.end
        acts = self.enabled and self.start <= trainer.current_epoch <= last
        self._batch, self._scores = (batch if acts else None), None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Only now the scores count as usual."""
        scores, waited, self._batch = self._scores, self._batch is not None, None
        if scores is None:
            if waited:
                raise ValueError(
                    f"AdaptiveGradientModulation: the step did not call {self.module or type(pl_module).__name__!r} "
                    f"with the tensors {self.modalities}. Name the module whose forward takes them: module='...'."
                )
            return
        self._seen += 1
        self._means = torch.lerp(self._means.to(scores), scores, 1 / self._seen)
        if self.logs_now(trainer, pl_module):
            figures = {f"score/{n}": s for n, s in zip(self.modalities, scores.tolist(), strict=True)}
            figures |= {f"factor/{n}": k for n, k in zip(self.modalities, self._factors.tolist(), strict=True)}
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.prefix}/{k}": v for k, v in figures.items()}, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no hook behind."""
        super().on_train_end(trainer, pl_module)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._batch = self._scores = None

    # -- what ----------------------------------------------------------------------------------------------------

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if self.module is None:
            return pl_module
        modules: dict[str, nn.Module] = {canonical_name(n): m for n, m in pl_module.named_modules()}
        if self.module not in modules:
            near = near_names(self.module, modules)
            raise ValueError(f"AdaptiveGradientModulation: `module` {self.module!r} is none; near names: {near}.")
        return modules[self.module]

    def _forward(
        self, trainer: Trainer, pl_module: LightningModule, network: nn.Module, args: Any, kwargs: Any, out: Any
    ) -> Any:
        if self._inside or self._batch is None or not network.training or not torch.is_grad_enabled():
            return out
        given = inspect.signature(network.forward).bind(*args, **kwargs)
        names = list(inspect.signature(network.forward).parameters)
        places = [names[p] if isinstance(p, int) and p < len(names) else p for p in self.modalities.values()]
        if not all(isinstance(given.arguments.get(str(place)), Tensor) for place in places):
            return out  # DDP calls the LightningModule with its step in the place of its forward
        if not isinstance(out, Tensor) or out.dim() != 2:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"AdaptiveGradientModulation: the network returns {shape}; expected (samples, classes).")

        def run(kept: frozenset[int]) -> Tensor:
            changed = inspect.signature(network.forward).bind(*args, **kwargs)
            for number, place in enumerate(places):
                if number not in kept:
                    changed.arguments[str(place)] = torch.zeros_like(given.arguments[str(place)])
            return network(*changed.args, **changed.kwargs)  # type: ignore[no-any-return]

        self._inside = True
        try:
            with _evaluating(network), randomness_kept(cuda_devices(trainer)):
                outputs = masked_outputs(run, out, len(places))
        finally:
            self._inside = False
        responses = mono_modal_responses(outputs, len(places))
        if self._scores is None:  # once a batch: activation checkpointing and later forwards get the same factors
            mine = response_scores(responses, self._target(out))
            self._scores = trainer.strategy.reduce(mine, reduce_op="mean")
            usual = self._means.to(self._scores) if self._seen else None
            self._factors = modulation(self._scores, usual, self.alpha, self.clamp)
        return modulated(out, responses, self._factors) if self.alpha else out

    def _target(self, out: Tensor) -> Tensor:
        tensors = dict(named_tensors(self._batch))
        if self.target is not None and self.target in tensors:
            return tensors[self.target].to(out.device)
        whole = {
            name: t
            for name, t in tensors.items()
            if t.dim() == 1 and len(t) == len(out) and not t.is_floating_point() and t.dtype != torch.bool
        }
        if self.target is not None or len(whole) != 1:
            shapes = {name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()}
            raise ValueError(
                f"AdaptiveGradientModulation: `target` is {self.target!r}; expected the name of the classes in the "
                f"batch, which has {shapes}."
            )
        return next(iter(whole.values())).to(out.device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients; nothing is put back in place, which their graph may need."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
